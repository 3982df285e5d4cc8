"""The stage that a config names."""

from collections.abc import Mapping

import torch
from torch import nn

from kontext_train.data.encode import Encoders
from kontext_train.data.transforms import Transform
from kontext_train.flow.config import ShiftConfig
from kontext_train.models.config import FluxConfig
from kontext_train.objectives.base import Objective
from kontext_train.objectives.concept_list import read_concepts
from kontext_train.objectives.concepts import encode_concepts
from kontext_train.objectives.config import FlowMatchingConfig, ObjectiveConfig, SafetyConfig
from kontext_train.objectives.flow_matching import FlowMatching
from kontext_train.objectives.safety import Safety


def build_objective(
    config: ObjectiveConfig,
    networks: Mapping[str, nn.Module],
    model: FluxConfig,
    shift: ShiftConfig,
    encoders: Encoders,
    transform: Transform,
    device: torch.device,
) -> Objective:
    """networks: by role, the student and those that config.frozen names. model: the student's.

    encoders, transform: for what a stage is shown besides its data.
    """
    match config:
        case FlowMatchingConfig():
            return FlowMatching(networks["student"], shift, config.guidance if model.guidance_embed else None)
        case SafetyConfig():
            bank = encode_concepts(read_concepts(config.concepts), encoders, transform, device)
            return Safety(networks["student"], networks["reference"], bank, config, shift)
    raise AssertionError(config)
