"""The game's rules: hinge, times, penalty, and a student that learns where the discriminator says real is."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from kontext_train.flow.config import ShiftConfig
from kontext_train.flow.timesteps import sampling_schedule
from kontext_train.models.config import DiscriminatorConfig, InitConfig
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import block_features, predict_velocity
from kontext_train.models.weights import initialise
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


@pytest.mark.parametrize(("offset", "hinge", "accuracy"), [(0.25, 2.0, 0.5), (3.0, 4.0, 0.5), (-3.0, 4.0, 0.5)])
def test_the_hinge_is_that_of_its_logits(offset: float, hinge: float, accuracy: float) -> None:
    """relu(1 + made) + relu(1 - real), both logits being `offset`."""
    loss = stage(LaddConfig(), Verdict(torch.zeros(16), offset)).loss("discriminator", packed(6), VisitRandom(0), 0)
    assert loss.value.item() == pytest.approx(hinge)
    assert loss.metrics["discriminator/accuracy"].item() == pytest.approx(accuracy)
    assert loss.metrics["discriminator/accuracy_block_2"].item() == pytest.approx(accuracy)


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
    (features,) = ladd.read("real", batch.x_MC, t_S, batch, VisitRandom(0))
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


@pytest.mark.parametrize(
    ("means", "message"),
    [
        ({"diversity_made": 0.2, "diversity_real": 1.0, "discriminator/accuracy": 0.6}, "vary 0.20 times as much"),
        ({"diversity_made": 0.9, "diversity_real": 1.0, "discriminator/accuracy": 0.99}, "right about 99.0% of tokens"),
        ({"diversity_made": 0.9, "diversity_real": 1.0, "discriminator/accuracy": 0.7}, None),
    ],
)
def test_collapse_is_told(means: dict[str, float], message: str | None) -> None:
    warning = stage(LaddConfig(), Verdict(torch.zeros(16))).warning(means)
    assert (warning is None) if message is None else (warning is not None and message in warning)


def test_diversity_of_a_student_that_makes_one_picture_is_near_none() -> None:
    def blank(z: Tensor, t: Tensor, vec: Tensor) -> Tensor:
        return z / t  # x = z - t v = 0

    metrics = (
        stage(LaddConfig(), Verdict(torch.zeros(16)), Formula(blank))
        .loss("student", packed(8), VisitRandom(0), 0)
        .metrics
    )
    assert metrics["diversity_made"].item() < 1e-6
    assert math.isclose(metrics["diversity_real"].item(), 1.0, abs_tol=0.15)
