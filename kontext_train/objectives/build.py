"""The stage that a config names."""

from collections.abc import Mapping

from torch import nn

from kontext_train.flow.config import ShiftConfig
from kontext_train.models.config import FluxConfig
from kontext_train.objectives.base import Objective
from kontext_train.objectives.config import FlowMatchingConfig, ObjectiveConfig
from kontext_train.objectives.flow_matching import FlowMatching


def build_objective(
    config: ObjectiveConfig, networks: Mapping[str, nn.Module], model: FluxConfig, shift: ShiftConfig
) -> Objective:
    """networks: by role, the student and those that config.frozen names. model: the student's."""
    match config:
        case FlowMatchingConfig():
            return FlowMatching(networks["student"], shift, config.guidance if model.guidance_embed else None)
    raise AssertionError(config)
