"""The stage that a config names."""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from kontext_train.errors import ConfigError
from kontext_train.flow.config import ShiftConfig
from kontext_train.models.config import FluxConfig
from kontext_train.models.flux import Flux
from kontext_train.objectives.base import Objective
from kontext_train.objectives.concepts import ConceptBank
from kontext_train.objectives.config import (
    UNGUIDED,
    FlowMatchingConfig,
    GuidanceDistillationConfig,
    LaddConfig,
    ObjectiveConfig,
    SafetyConfig,
)
from kontext_train.objectives.flow_matching import FlowMatching
from kontext_train.objectives.guidance_distillation import GuidanceDistillation
from kontext_train.objectives.ladd import Ladd
from kontext_train.objectives.safety import Safety


def build_objective(
    config: ObjectiveConfig,
    networks: Mapping[str, nn.Module],
    model: FluxConfig,
    shift: ShiftConfig,
    empty_prompt: tuple[Tensor, Tensor] | None,
    concepts: ConceptBank | None,
) -> Objective:
    """networks: by role, those that config.trained and config.frozen name. model: the student's.

    empty_prompt: its text tokens [L, E] and pooled vector [P], where config.needs_empty_prompt.
    concepts: of the safety stage.
    """
    student = networks["student"]
    match config:
        case FlowMatchingConfig():
            return FlowMatching(student, shift, config.guidance if model.guidance_embed else None)
        case GuidanceDistillationConfig():
            assert empty_prompt is not None
            if cast(Flux, networks["teacher"]).config.guidance_embed:
                rule = "is told its guidance, and this stage learns from one that is guided by two passes"
                raise ConfigError(
                    "weights.teacher", "with guidance_in", rule, "Give the model from before, such as pro"
                )
            return GuidanceDistillation(config, student, networks["teacher"], shift, empty_prompt)
        case LaddConfig():
            teacher, told = cast(Flux, networks["teacher"]), config.student_guidance if model.guidance_embed else None
            if config.teacher_guidance != UNGUIDED and not teacher.config.guidance_embed:
                rule = "has no effect: weights.teacher has no guidance_in"
                raise ConfigError("objective.teacher_guidance", config.teacher_guidance, rule, "Leave it out")
            return Ladd(config, student, teacher, networks["discriminator"], shift, told)
        case SafetyConfig():
            assert concepts is not None
            return Safety(student, networks["reference"], concepts, config, shift)
    raise AssertionError(config)
