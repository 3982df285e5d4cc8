"""Choices of this room. Torch-free."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(slots=True)
class ObjectiveConfig:
    """Base of every stage's options; a stage's YAML picks the class."""

    frozen: ClassVar[tuple[str, ...]] = ()  # roles that never train; weights.ROLE says where each comes from


@dataclass(slots=True)
class FlowMatchingConfig(ObjectiveConfig):
    """flow_finetune: rectified-flow training on triplets, jointly with text-to-image."""

    guidance: float = 1.0  # given to a model with a guidance embedding while it trains
