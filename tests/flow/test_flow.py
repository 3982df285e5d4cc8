"""Rectified-flow mathematics against closed forms and against diffusers' scheduler."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers import scheduling_flow_match_euler_discrete

from kontext_train.errors import ConfigError
from kontext_train.flow.config import SamplerConfig, ShiftConfig
from kontext_train.flow.guidance import guided
from kontext_train.flow.path import interpolate, velocity
from kontext_train.flow.sampler import euler, stochastic
from kontext_train.flow.timesteps import logit_normal, mu_for_tokens, sampling_schedule, shift


def diffusers_sigmas(steps: int, tokens: int) -> torch.Tensor:
    """As the released Flux pipelines set their timesteps."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("tokens", [256, 1024, 4096, 8000])
def test_schedule_equals_diffusers(steps: int, tokens: int) -> None:
    ours = sampling_schedule(steps, mu_for_tokens(torch.tensor(float(tokens)), ShiftConfig()))
    torch.testing.assert_close(ours, diffusers_sigmas(steps, tokens), rtol=0, atol=1e-6)


def test_another_shift_is_another_schedule() -> None:
    ours = sampling_schedule(28, mu_for_tokens(torch.tensor(4096.0), ShiftConfig(max_mu=1.0)))
    assert (ours - diffusers_sigmas(28, 4096)).abs().max() > 1e-2


def test_logit_normal_is_the_shifted_unit_logit_normal() -> None:
    normal, mu = torch.randn(1000), torch.tensor(0.8)
    torch.testing.assert_close(logit_normal(normal, mu), shift(torch.sigmoid(normal), mu), rtol=1e-5, atol=1e-6)


def test_logit_normal_median_is_where_mu_puts_it() -> None:
    """The median of training times at mu is e^mu / (e^mu + 1), the shifted image of 1/2."""
    t = logit_normal(torch.randn(200_000), torch.tensor(1.15))
    assert t.median().item() == pytest.approx(np.exp(1.15) / (np.exp(1.15) + 1), abs=3e-3)


def test_path_and_velocity() -> None:
    x, noise = torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(interpolate(x, noise, torch.zeros(5, 1)), x)
    torch.testing.assert_close(interpolate(x, noise, torch.ones(5, 1)), noise)
    slope = (interpolate(x, noise, torch.tensor(0.75)) - interpolate(x, noise, torch.tensor(0.25))) / 0.5
    torch.testing.assert_close(velocity(x, noise), slope)


def test_euler_is_exact_on_a_straight_path_whatever_the_schedule_of_each_sample() -> None:
    x, noise = torch.randn(5, 3), torch.randn(5, 3)
    sample_of_token = torch.tensor([0, 0, 1, 1, 1])
    schedule = sampling_schedule(3, torch.tensor([0.0, 1.5]))
    out = euler(lambda z, t: velocity(x, noise), noise, schedule, sample_of_token)
    torch.testing.assert_close(out, x)
    wrong = euler(lambda z, t: x - noise, noise, schedule, sample_of_token)  # negative control: the sign of time
    assert (wrong - x).abs().max() > 0.5


def diffusers_samples(stochastic: bool, noises: list[torch.Tensor], v_of: torch.nn.Module) -> torch.Tensor:
    """By diffusers' scheduler; its draws are replaced by `noises`, in turn."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift=3.0, stochastic_sampling=stochastic, time_shift_type="exponential"
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / len(noises), len(noises)), mu=0.8)
    drawn = iter([*noises[1:], torch.zeros_like(noises[0])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling_flow_match_euler_discrete, "randn_tensor", lambda *_, **__: next(drawn))
        z = noises[0]
        for t in scheduler.timesteps:
            z = scheduler.step(v_of(torch.cat([z, t.expand(len(z), 1) / 1000], 1)), t, z).prev_sample
    return z


def test_both_samplers_equal_diffusers() -> None:
    network, noises = torch.nn.Linear(4, 3).requires_grad_(False), list(torch.randn(4, 5, 3))
    schedule, sample_of_token = sampling_schedule(4, torch.tensor([0.8])), torch.zeros(5, dtype=torch.int64)

    def v(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return network(torch.cat([z, t.expand(len(z), 1)], 1))

    along = euler(v, noises[0], schedule, sample_of_token)
    renewed = stochastic(v, lambda i: [*noises, noises[0]][i], schedule, sample_of_token)
    torch.testing.assert_close(along, diffusers_samples(False, noises, network), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(renewed, diffusers_samples(True, noises, network), rtol=1e-5, atol=1e-5)
    assert (along - renewed).abs().max() > 0.1  # the control: each is not the other


def test_stochastic_steps_hand_each_sample_its_own_time_and_end_in_the_last_prediction() -> None:
    schedule, sample_of_token = sampling_schedule(4, torch.tensor([0.0, 1.5])), torch.tensor([0, 1, 1])
    x, noises, seen = torch.randn(3, 3), torch.randn(5, 3, 3), []

    def towards_x(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((z, t))
        return (z - x) / t[sample_of_token][:, None]

    out = stochastic(towards_x, lambda i: noises[i], schedule, sample_of_token)
    torch.testing.assert_close(out, x)
    for i, (z, t) in enumerate(seen):
        torch.testing.assert_close(t, schedule[i])
        torch.testing.assert_close(z, interpolate(x, noises[i], schedule[i][sample_of_token][:, None]))


def test_euler_hands_each_sample_its_own_time() -> None:
    schedule = sampling_schedule(4, torch.tensor([0.0, 1.5]))
    seen = []
    euler(lambda z, t: seen.append(t) or torch.zeros_like(z), torch.randn(2, 3), schedule, torch.tensor([0, 1]))
    torch.testing.assert_close(torch.stack(seen), schedule[:-1])


def test_guidance() -> None:
    cond, uncond = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(guided(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guided(cond, uncond, 0.0), uncond)
    torch.testing.assert_close(guided(cond, uncond, 3.0) - cond, 2 * (cond - uncond))


def test_bad_values_are_refused_by_key() -> None:
    with pytest.raises(ConfigError, match=r"sampler\.steps=0"):
        SamplerConfig(steps=0)
    with pytest.raises(ConfigError, match=r"flow\.base_tokens=4096"):
        ShiftConfig(base_tokens=4096)
