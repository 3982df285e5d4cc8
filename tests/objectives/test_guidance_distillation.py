"""The target is the teacher's guided velocity, at the scale that the student is told."""

import pytest
import torch
from torch import Tensor

from kontext_train.flow.config import ShiftConfig
from kontext_train.objectives.config import GuidanceDistillationConfig
from kontext_train.objectives.guidance_distillation import GuidanceDistillation
from kontext_train.randomness import VisitRandom
from tests.objectives.cases import POOLED, TEXT, Formula, packed

EMPTY = (torch.zeros(3, TEXT), torch.zeros(POOLED))


def teacher_formula(z: Tensor, t: Tensor, vec: Tensor) -> Tensor:
    return z * (1 - t) + vec[:, :1]  # guided at w: z (1 - t) + w vec


def objective(student: Formula, **options: tuple[float, float]) -> GuidanceDistillation:
    config = GuidanceDistillationConfig(**options)
    return GuidanceDistillation(config, student, Formula(teacher_formula), ShiftConfig(), EMPTY)


class Guided(Formula):
    """Knows the closed form of the guided velocity."""

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, t: Tensor, layout: object, guidance: Tensor | None
    ) -> Tensor:
        assert guidance is not None
        return super().forward(img, txt, guidance[:, None] * vec, t, layout, guidance)


def test_a_student_that_is_the_guided_velocity_has_no_loss() -> None:
    batch = packed(64)
    stage = objective(Guided(teacher_formula))
    assert stage.loss("student", batch, VisitRandom(0), 0).value.item() < 1e-10


@pytest.mark.parametrize("scales", [(0.0, 1.0), (0.5, 3.0), (1.0, 6.0)])
def test_errors_are_relative_to_the_scale_where_that_is_above_1(scales: tuple[float, float]) -> None:
    """Of a student that is not guided: z (1 - t) + vec. The control is a mean without weights."""
    batch = packed(64)
    stage = objective(Formula(teacher_formula), guidance=scales)
    w = stage.scales(VisitRandom(0).normal_per_visit("guidance", batch.visits))
    errors = ((w - 1) * batch.cond.vec_SP[:, 0]).square()
    loss = stage.loss("student", batch, VisitRandom(0), 0).value.item()
    assert loss == pytest.approx((errors / w.clamp(min=1) ** 2).mean().item(), rel=1e-5)
    assert (loss == pytest.approx(errors.mean().item(), rel=1e-5)) is (scales[1] <= 1)


def test_scales_are_uniform_in_their_range_and_told_to_the_student() -> None:
    student = Formula(teacher_formula)
    objective(student, guidance=(2.0, 5.0)).loss("student", packed(4000, sizes=((1, 1),)), VisitRandom(0), 0)
    told = student.told
    assert told is not None
    assert 2 <= told.min() < 2.01
    assert 4.99 < told.max() <= 5
    quarters = torch.tensor([2.75, 3.5, 4.25])
    shares = torch.bucketize(told, quarters).bincount() / len(told)
    assert (shares - 0.25).abs().max() < 0.03


def test_outside_the_interval_the_teacher_is_not_guided() -> None:
    batch = packed(3, sizes=((1, 2),))
    stage = objective(Formula(teacher_formula), interval=(0.2, 0.6))
    z, w = torch.zeros_like(batch.x_MC), torch.full((3,), 4.0)
    t = torch.tensor([0.1, 0.5, 0.9])
    guided = stage.guided_velocity(z, t, w, batch.cond)[::2, 0] / batch.cond.vec_SP[:, 0]
    assert guided.tolist() == pytest.approx([1, 4, 1])


def test_the_teacher_gets_no_gradient() -> None:
    stage = objective(Formula(teacher_formula))
    stage.loss("student", packed(4), VisitRandom(0), 0).value.backward()
    assert stage.modules["student"].scale.grad is not None
    assert stage.teacher.scale.grad is None


class Recording(Formula):
    """Notes the image and text tokens and the pooled vectors of each pass."""

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, t: Tensor, layout: object, guidance: Tensor | None
    ) -> Tensor:
        self.passes.append((img, txt, vec))
        return super().forward(img, txt, vec, t, layout, guidance)


def test_the_empty_pass_has_the_empty_prompt_and_the_same_contexts() -> None:
    """Guidance is along the text alone, as users' is."""
    batch, teacher = packed(5), Recording(teacher_formula)
    teacher.passes = []
    empty = (torch.full((3, TEXT), 7.0), torch.full((POOLED,), 8.0))
    stage = GuidanceDistillation(GuidanceDistillationConfig(), Formula(teacher_formula), teacher, ShiftConfig(), empty)
    stage.loss("student", batch, VisitRandom(0), 0)
    (image, txt, vec), (image_empty, txt_empty, vec_empty) = teacher.passes
    assert torch.equal(image, image_empty)
    assert torch.equal(image[batch.layout.targets :], batch.cond.context_KC)
    assert torch.equal(txt, batch.cond.txt_TE)
    assert torch.equal(vec, batch.cond.vec_SP)
    assert torch.equal(txt_empty, torch.full_like(txt, 7.0))
    assert torch.equal(vec_empty, torch.full_like(vec, 8.0))
