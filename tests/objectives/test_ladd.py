"""The game's rules: hinge, times, penalty, and a student that learns where the discriminator says real is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kontext_train.data.batch import PackedBatch
from kontext_train.errors import ConfigError
from kontext_train.flow.config import ShiftConfig
from kontext_train.flow.timesteps import sampling_schedule
from kontext_train.models.config import DiscriminatorConfig, InitConfig
from kontext_train.models.discriminator import neighbours
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import block_features, predict_velocity
from kontext_train.models.weights import initialise
from kontext_train.objectives.build import build_objective
from kontext_train.objectives.config import LaddConfig
from kontext_train.objectives.ladd import Ladd
from kontext_train.randomness import VisitRandom
from tests.objectives.cases import TINY, Formula, packed


class Verdict(nn.Module):
    """Logits that are a linear function of the features, the same for every head."""

    def __init__(self, slope_D: Tensor, offset: float = 0.0) -> None:
        super().__init__()
        self.slope_D, self.offset = nn.Parameter(slope_D), offset

    def forward(self, features: Sequence[Tensor], *_: Tensor) -> Tensor:
        return torch.stack([x_MD.float() @ self.slope_D + self.offset for x_MD in features])


def teacher() -> Flux:
    model = Flux(TINY)
    initialise(model, InitConfig(gate=1.0), seed=0)
    nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    return model.requires_grad_(False)


def stage(config: LaddConfig, verdict: nn.Module, student: nn.Module | None = None, shift: float = 0.0) -> Ladd:
    student = student or Formula(lambda z, t, vec: z)
    return Ladd(config, student, teacher(), verdict, ShiftConfig(base_mu=shift, max_mu=shift), None)


class Recording(nn.Module):
    """Notes what heads are given, and says so many logits of it."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__()
        self.verdict, self.given = verdict, tuple[Tensor, ...]()

    def forward(self, features: Sequence[Tensor], *others: Tensor) -> Tensor:
        self.given = (torch.stack(list(features)), *others)
        return self.verdict(features)


def by_hand(ladd: Ladd, phase: str, batch: PackedBatch, step: int) -> dict[str, Tensor]:
    """Pictures and features [H, M, D] of a phase, made of the network's parts. The student is x -> v = z."""
    random, own = VisitRandom(0), batch.layout.sample_of_target_M

    def noised(x_MC: Tensor, purpose: str, t_S: Tensor) -> Tensor:
        noise = random.normal(purpose, batch.visits, batch.layout.target_lengths, x_MC.shape[1])
        return (1 - t_S[own][:, None]) * x_MC + t_S[own][:, None] * noise

    def seen(x_MC: Tensor, what: str) -> Tensor:
        z_MC = noised(x_MC, f"{what} renoise", renoise_S)
        return torch.stack(block_features(ladd.teacher, z_MC, renoise_S, batch.cond, ladd.blocks))

    start_S = ladd.student_times(phase, batch, random, step)
    renoise_S = ladd.renoise_times(phase, batch, random)
    z_MC = noised(batch.x_MC, f"{phase} start", start_S)
    found = {"made": z_MC - start_S[own][:, None] * z_MC, "start": start_S, "renoise": renoise_S}
    return found | {"of made": seen(found["made"], phase), "of real": seen(batch.x_MC, phase)}


def assert_given(given: tuple[Tensor, ...], features: list[Tensor], t_S: Tensor, batch: PackedBatch) -> None:
    """Views one after the other, and every token of each with its own time, prompt and neighbours."""
    views, own, around = len(features), batch.layout.sample_of_target_M, neighbours(batch.layout.shapes)
    torch.testing.assert_close(given[0], torch.cat(features, 1))
    assert torch.equal(given[1][given[3]], t_S[own].repeat(views))
    assert torch.equal(given[2][given[3]], batch.cond.vec_SP[own].repeat(views, 1))
    shifted = [torch.where(around < 0, around, around + i * len(own)) for i in range(views)]
    assert torch.equal(given[4], torch.cat(shifted))


def mean_over_samples(value_HM: Tensor, batch: PackedBatch) -> float:
    """Of the means of each sample's tokens, over heads too."""
    return sum(v.mean() for v in value_HM.split(batch.layout.target_lengths, 1)).item() / len(batch.visits)


def test_heads_learn_by_the_hinge_of_real_above_made() -> None:
    """Against logits that are computed by hand. Made and real ones differ, on both sides of 0 and of the hinge."""
    torch.manual_seed(0)
    heads, batch = Recording(Verdict(torch.randn(16), offset=0.3)), packed(6)
    ladd = stage(LaddConfig(warmup_steps=0), heads)
    loss = ladd.loss("discriminator", batch, VisitRandom(0), 0)
    hand = by_hand(ladd, "discriminator", batch, 0)
    assert_given(heads.given, [hand["of made"], hand["of real"]], hand["renoise"], batch)
    made, real = (hand[f"of {what}"] @ heads.verdict.slope_D.detach() + 0.3 for what in ("made", "real"))
    right = ((made < 0).float() + (real > 0).float()) / 2
    hinge = mean_over_samples((1 + made).clamp(min=0) + (1 - real).clamp(min=0), batch)
    metrics = {name.removeprefix("discriminator/"): value.item() for name, value in loss.metrics.items()}
    assert loss.value.item() == pytest.approx(hinge, rel=1e-4)
    expected = {f"accuracy_block_{i}": mean_over_samples(right[i : i + 1], batch) for i in range(3)}
    expected |= {"hinge": hinge, "accuracy": mean_over_samples(right, batch)}
    expected |= {"logit_made": mean_over_samples(made, batch), "logit_real": mean_over_samples(real, batch)}
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert abs(expected["logit_made"] - expected["logit_real"]) > 0.01  # or swapped ones would pass
    assert abs(expected["accuracy"] - 0.5) > 0.001
    assert abs(hinge - ((1 + made).clamp(min=0) + (1 - real).clamp(min=0)).mean().item()) > 0.01


def test_made_and_real_pictures_that_are_equal_teach_the_heads_nothing() -> None:
    """For they are read with one noise. With another for each, the noise itself would be a gradient."""
    batch, random = packed(6), VisitRandom(0)
    heads = Verdict(torch.zeros(16))
    ladd = stage(LaddConfig(warmup_steps=0), heads, Formula(lambda z, t, vec: (z - batch.x_MC) / t))
    ladd.loss("discriminator", batch, random, 0).value.backward()
    assert heads.slope_D.grad is not None
    assert heads.slope_D.grad.abs().max() < 1e-5
    t_S = ladd.renoise_times("discriminator", batch, random)
    one, other = (ladd.read(what, batch.x_MC, t_S, batch, random)[0].mean(0) for what in ("discriminator", "student"))
    assert (one - other).abs().max() > 1e-2


def test_a_step_of_the_student_raises_the_logit_of_what_it_makes() -> None:
    """And the heads are asked about that alone, made of other noise and times than in their own turn."""
    torch.manual_seed(0)
    heads, batch, student = Recording(Verdict(torch.randn(16))), packed(6), Formula(lambda z, t, vec: z)
    ladd = stage(LaddConfig(warmup_steps=0), heads, student)
    before = ladd.loss("student", batch, VisitRandom(0), 0)
    hand = by_hand(ladd, "student", batch, 0)
    assert_given(heads.given, [hand["of made"]], hand["renoise"], batch)
    logit = mean_over_samples(hand["of made"] @ heads.verdict.slope_D.detach(), batch)
    assert before.value.item() == pytest.approx(-logit, rel=1e-4)
    before.value.backward()
    assert student.scale.grad is not None
    with torch.no_grad():
        student.scale -= 1e-2 * student.scale.grad
    ladd.loss("student", batch, VisitRandom(0), 0)
    after = heads.verdict(list(heads.given[0])).detach()
    assert mean_over_samples(after, batch) > logit
    others = by_hand(ladd, "discriminator", batch, 0)
    assert not any(torch.equal(hand[name], others[name]) for name in ("made", "start", "renoise"))


def test_a_student_that_embeds_guidance_is_told_its_scale() -> None:
    student = Formula(lambda z, t, vec: z)
    shift = ShiftConfig()
    ladd = Ladd(LaddConfig(), student, teacher(), Verdict(torch.zeros(16)), shift, 4.0)
    ladd.make("student", packed(3), VisitRandom(0), 0, None)
    assert student.told is not None
    assert student.told.tolist() == [4.0] * 3


def test_a_scale_is_refused_by_a_teacher_that_is_told_none() -> None:
    networks = {"student": Formula(lambda z, t, vec: z), "teacher": teacher(), "discriminator": nn.Identity()}
    build_objective(LaddConfig(), networks, TINY, ShiftConfig(), None, None)
    with pytest.raises(ConfigError, match=r"objective\.teacher_guidance=7: has no effect: weights\.teacher has no"):
        build_objective(LaddConfig(teacher_guidance=7), networks, TINY, ShiftConfig(), None, None)


def test_times_are_those_that_a_sampler_meets_with_their_probabilities() -> None:
    config = LaddConfig(warmup_steps=10)
    ladd, batch = stage(config, Verdict(torch.zeros(16)), shift=1.7), packed(4000, sizes=((1, 1),))
    met = sampling_schedule(4, torch.tensor(1.7))[:-1]
    for step, probabilities in ((9, config.warmup_probabilities), (10, config.probabilities)):
        t_S = ladd.student_times("student", batch, VisitRandom(0), step)
        which = (t_S[:, None] - met).abs().argmin(1)
        torch.testing.assert_close(t_S, met[which])
        shares = which.bincount(minlength=4) / len(t_S)
        assert (shares - torch.tensor(probabilities)).abs().max() < 0.03
    assert not torch.equal(t_S, ladd.student_times("discriminator", batch, VisitRandom(0), 10))


def own_starts(config: LaddConfig, step: int, count: int = 400) -> tuple[Tensor, Tensor]:
    """Whether the student of [S] samples of one token began from its own picture, and from a real one. It halves z."""
    batch, random, seen = packed(count, sizes=((1, 1),)), VisitRandom(0), list[Tensor]()

    def halved(z_MC: Tensor, t_M1: Tensor, vec_MP: Tensor) -> Tensor:
        seen.append(z_MC)
        return z_MC / 2

    ladd = stage(config, Verdict(torch.zeros(16)), Formula(halved))
    ladd.make("student", batch, random, step, ladd.first_pictures("student", batch, random, step))
    t_M1 = ladd.student_times("student", batch, random, step)[:, None]

    def began_from(x_MC: Tensor) -> Tensor:
        noise_MC = random.normal("student start", batch.visits, batch.layout.target_lengths, 8)
        return (seen[-1] - (1 - t_M1) * x_MC - t_M1 * noise_MC).abs().amax(1) < 1e-5

    first_MC = random.normal("student first", batch.visits, batch.layout.target_lengths, 8)
    return began_from(first_MC / 2), began_from(batch.x_MC)  # a step of length 1 from the first noise


def test_a_second_step_learns_from_what_a_first_one_made() -> None:
    """After the warm-up, and for the share of samples that is asked for; other samples start from real pictures."""
    less = [1e-6, 0.5, 0.3, 0.199999]  # from noise alone nobody can tell
    half = LaddConfig(warmup_steps=5, backward_simulation=0.5, probabilities=less)
    own_S, real_S = own_starts(half, step=5)
    assert torch.equal(own_S, ~real_S)
    assert own_S.float().mean().item() == pytest.approx(0.5, abs=0.08)
    for config, step, expected in ((half, 4, False), (replace(half, backward_simulation=1.0), 5, True)):
        own_S, real_S = own_starts(config, step)
        assert own_S.tolist() == [expected] * 400
        assert real_S.tolist() == [not expected] * 400


def test_no_gradient_goes_through_the_first_step() -> None:
    """d/d scale of mean z - t scale z, where z is made of the first picture as it stands."""
    batch, random, student = packed(6), VisitRandom(0), Formula(lambda z, t, vec: z / 2)
    config = LaddConfig(warmup_steps=0, backward_simulation=1.0, probabilities=[0.01, 0.5, 0.49, 0])
    ladd = stage(config, Verdict(torch.zeros(16)), student)
    ladd.make("student", batch, random, 0, ladd.first_pictures("student", batch, random, 0)).mean().backward()
    own, shape = batch.layout.sample_of_target_M, (batch.visits, batch.layout.target_lengths, 8)
    t_M1 = ladd.student_times("student", batch, random, 0)[own][:, None]
    z_MC = (1 - t_M1) * random.normal("student first", *shape) / 2 + t_M1 * random.normal("student start", *shape)
    assert student.scale.grad is not None
    torch.testing.assert_close(student.scale.grad, -(t_M1 * z_MC / 2).mean())


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_step_runs_the_passes_that_are_said_to_be_its_cost(share: float) -> None:
    config, batch, calls = LaddConfig(warmup_steps=0, backward_simulation=share), packed(4), list[bool]()
    ladd = stage(config, Verdict(torch.zeros(16)))
    for network in (ladd.modules["student"], ladd.teacher.double_blocks[0]):
        network.register_forward_hook(lambda module, given, made: calls.append(torch.is_grad_enabled()))
    for phase in ladd.phases:
        ladd.loss(phase, batch, VisitRandom(0), 0)
    without, through = config.passes()
    assert calls.count(False) == without
    assert calls.count(True) == 1 + through  # the student's own


def test_renoise_times_are_logit_normal() -> None:
    ladd = stage(LaddConfig(renoise_mean=-0.5, renoise_std=0.7), Verdict(torch.zeros(16)))
    logit_S = torch.logit(ladd.renoise_times("student", packed(4000, sizes=((1, 1),)), VisitRandom(0)))
    assert logit_S.mean().item() == pytest.approx(-0.5, abs=0.04)
    assert logit_S.std().item() == pytest.approx(0.7, abs=0.03)


def test_the_penalty_is_the_squared_slope_of_the_heads() -> None:
    """Of a linear head it is known: E (std |x| n . w)^2 / std^2 = |x|^2 |w|^2, |x| the size of a feature."""
    slope = torch.zeros(16)
    slope[3] = 2.0
    config = LaddConfig(gradient_penalty=0.5, discriminator=DiscriminatorConfig(blocks=[1]))
    ladd, batch = stage(config, Verdict(slope)), packed(3000, sizes=((1, 1),))
    found = ladd.loss("discriminator", batch, VisitRandom(0), 0)
    t_S = ladd.renoise_times("discriminator", batch, VisitRandom(0))
    (features,) = ladd.read("discriminator", batch.x_MC, t_S, batch, VisitRandom(0))
    expected = (features.square().mean(-1) * 4).mean()
    assert found.metrics["discriminator/gradient_penalty"].item() == pytest.approx(expected.item(), rel=0.1)
    plain = stage(LaddConfig(discriminator=DiscriminatorConfig(blocks=[1])), Verdict(slope))
    hinge = plain.loss("discriminator", batch, VisitRandom(0), 0).value
    assert (found.value - hinge).item() == pytest.approx(0.5 * expected.item(), rel=0.1)


def test_features_of_the_last_block_are_what_the_velocity_is_made_of() -> None:
    """So heads read the network itself; and fewer blocks are run where no head needs them."""
    model, batch = teacher(), packed(4)
    t_S = torch.tensor([0.1, 0.4, 0.6, 0.9])
    first, last = block_features(model, batch.x_MC, t_S, batch.cond, [0, 2])
    vec_SD = model._embed(batch.x_MC, batch.cond.txt_TE, batch.cond.vec_SP, t_S, None)[2]
    v_MC = model.final_layer(last, vec_SD, batch.layout.sample_of_target_M)
    torch.testing.assert_close(v_MC, predict_velocity(model, batch.x_MC, t_S, batch.cond))
    model.single_blocks = nn.ModuleList()
    torch.testing.assert_close(block_features(model, batch.x_MC, t_S, batch.cond, [0])[0], first)


def test_of_blocks_without_a_head_nothing_is_kept() -> None:
    copies = list[torch.Size]()

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            if function is torch.ops.aten.clone.default:
                copies.append(arguments[0].shape)
            return function(*arguments, **(options or {}))

    model, batch = Flux(replace(TINY, depth=4)), packed(4)
    with Copies():
        block_features(model, batch.x_MC, torch.rand(4), batch.cond, [1, 5])
    assert copies.count(torch.Size([batch.layout.targets, 16])) == 1


def test_gradients_reach_the_student_through_the_teacher_and_only_in_its_phase() -> None:
    student, verdict = Formula(lambda z, t, vec: z), Verdict(torch.randn(16))
    ladd = stage(LaddConfig(), verdict, student)
    ladd.loss("discriminator", packed(4), VisitRandom(0), 0).value.backward()
    assert student.scale.grad is None
    assert verdict.slope_D.grad is not None
    ladd.loss("student", packed(4), VisitRandom(0), 0).value.backward()
    assert student.scale.grad is not None
    assert student.scale.grad.abs() > 1e-6
    assert all(p.grad is None for p in ladd.teacher.parameters())


HEALTHY = {
    "diversity_made": 0.9,
    "diversity_real": 1.0,
    "discriminator/accuracy": 0.6,
    "discriminator/hinge": 1.8,
    "samples_judged": 4.0,
}
DEAF = {"discriminator/accuracy": 0.503, "discriminator/hinge": 1.995}


@pytest.mark.parametrize(
    ("step", "means", "message"),
    [
        (10, {"diversity_made": 0.2}, "differ 0.20 times as much"),
        (10, {"diversity_made": 2.5}, "differ 2.50 times as much"),
        (10, {"discriminator/accuracy": 0.99}, "right about 99.0% of tokens"),
        (100, DEAF, "the heads tell nothing apart (accuracy 0.503, hinge 1.995)"),
        (10, {"samples_judged": 1.0}, "each hinge is over one sample"),
        (10, {}, None),
        (99, DEAF, None),  # new heads
        (900, DEAF | {"discriminator/hinge": 1.9}, None),
        (900, DEAF | {"discriminator/accuracy": 0.52}, None),
        (900, {"diversity_made": 0.0, "diversity_real": 0.0}, None),  # packs of one sample
    ],
)
def test_trouble_is_told(step: int, means: dict[str, float], message: str | None) -> None:
    warning = stage(LaddConfig(), Verdict(torch.zeros(16))).warning(step, HEALTHY | means)
    assert (warning is None) if message is None else (warning is not None and message in warning)


def diversities(make: Callable[[Tensor], Tensor], batch: PackedBatch, config: LaddConfig) -> tuple[float, float]:
    """Of a student that makes the picture make(z), and of real ones."""
    student = Formula(lambda z, t, vec: (z - make(z)) / t)  # x = z - t v
    metrics = stage(config, Verdict(torch.zeros(16)), student).loss("student", batch, VisitRandom(0), 0).metrics
    return metrics["diversity_made"].item(), metrics["diversity_real"].item()


def test_one_picture_for_all_prompts_has_no_diversity() -> None:
    """Though its tokens differ from each other as real ones do. The control makes another for each."""
    torch.manual_seed(0)
    batch, one = packed(16, sizes=((4, 4),)), torch.randn(16, 8)
    config = LaddConfig(warmup_steps=0, times=[1.0], probabilities=[1], warmup_probabilities=[1])
    made, real = diversities(lambda z: one.repeat(16, 1), batch, config)
    assert made < 1e-5
    assert real == pytest.approx(2 / math.pi**0.5, abs=0.05)  # E |a - b| of standard normals
    made, real = diversities(lambda z: z, batch, config)
    assert made == pytest.approx(real, rel=0.05)


def test_one_picture_from_noise_is_seen_among_many_from_less_noise() -> None:
    """A student that is right from low noise and makes one picture from noise: the common collapse."""
    torch.manual_seed(0)
    batch, one = packed(64, sizes=((2, 2),)), torch.randn(4, 8).repeat(64, 1)
    config, own = LaddConfig(warmup_steps=0), batch.layout.sample_of_target_M
    start_S = stage(config, Verdict(torch.zeros(16))).student_times("student", batch, VisitRandom(0), 0)
    made, real = diversities(lambda z: torch.where(start_S[own][:, None] == 1, one, batch.x_MC), batch, config)
    assert made / real < 0.2


def test_one_picture_for_each_prompt_is_seen_between_noises() -> None:
    """Though pictures of different prompts differ as real ones do. The control makes another of each noise."""
    torch.manual_seed(0)
    batch, verdict = packed(64, sizes=((2, 2),)), Verdict(torch.zeros(16))
    config = LaddConfig(warmup_steps=0, backward_simulation=1.0, probabilities=[0.5, 0.3, 0.1, 0.1])

    def found(make: Callable[[Tensor], Tensor]) -> dict[str, float]:
        student = Formula(lambda z, t, vec: (z - make(z)) / t)  # x = z - t v
        metrics = stage(config, verdict, student).loss("student", batch, VisitRandom(0), 0).metrics
        return {name: value.item() for name, value in metrics.items()}

    one = found(lambda z: batch.x_MC)
    assert one["diversity_noise"] < 1e-5
    assert one["diversity_made"] == pytest.approx(one["diversity_real"])
    assert found(lambda z: z)["diversity_noise"] == pytest.approx(2 / math.pi**0.5, abs=0.1)  # E |a - b| of normals
    without = stage(LaddConfig(), verdict).loss("student", batch, VisitRandom(0), 0).metrics
    assert "diversity_noise" not in without


def test_samples_alone_in_their_size_have_no_diversity() -> None:
    """And none that is not a number: packs of one sample, of one token, of different sizes."""
    config = LaddConfig(warmup_steps=0)
    for batch in (packed(1, sizes=((1, 1),)), packed(2, sizes=((2, 3), (3, 2)))):
        assert diversities(lambda z: z, batch, config) == (0.0, 0.0)
