"""Choices of this room. Torch-free."""

from dataclasses import dataclass
from typing import ClassVar

from kontext_train.errors import ConfigError


@dataclass(slots=True)
class ObjectiveConfig:
    """Base of every stage's options; a stage's YAML picks the class."""

    trained: ClassVar[tuple[str, ...]] = ("student",)
    encodes_text: ClassVar[bool] = False  # whether it has prompts of its own, beside those of the data
    frozen: ClassVar[tuple[str, ...]] = ()  # roles that never train; weights.ROLE says where each comes from


@dataclass(slots=True)
class FlowMatchingConfig(ObjectiveConfig):
    """flow_finetune: rectified-flow training on triplets, jointly with text-to-image."""

    guidance: float = 1.0  # given to a model with a guidance embedding while it trains


@dataclass(slots=True)
class SafetyConfig(ObjectiveConfig):
    """safety: concepts that must not be made are suppressed, against an attack on the conditioning (docs/safety.md)."""

    frozen: ClassVar[tuple[str, ...]] = ("reference",)
    encodes_text: ClassVar[bool] = True

    concepts: str | None = None  # JSON Lines of prompts, their anchors and context images
    concepts_per_pack: int = 8  # suppressed beside each pack of ordinary samples; at most as many as these
    suppress_weight: float = 1.0  # of a concept's error, against that of an ordinary sample
    negative_guidance: float = 1.0  # how far beyond the empty prompt a concept without an anchor is turned round
    attack_steps: int = 4  # of the inner ascent; 0 trains without an adversary
    text_budget: float = 0.3  # how far the ascent may move each T5 token, relative to its length
    pooled_budget: float = 0.3  # the same of CLIP's vector
    context_budget: float = 0.0  # and of each token of the context images
    guidance: float = 1.0  # given to models with a guidance embedding while they train

    def __post_init__(self) -> None:
        if self.concepts_per_pack < 1:
            rule = "must be at least 1"
            raise ConfigError("objective.concepts_per_pack", self.concepts_per_pack, rule, "Use stage=flow_finetune")
        if not self.suppress_weight > 0:
            raise ConfigError("objective.suppress_weight", self.suppress_weight, "must be above 0", "1 is usual")
        for key in ("negative_guidance", "attack_steps", "text_budget", "pooled_budget", "context_budget"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"objective.{key}", getattr(self, key), "must not be negative", "Give 0 or more")
        if self.attack_steps and not (self.text_budget or self.pooled_budget or self.context_budget):
            rule = "has no effect with text_budget, pooled_budget and context_budget all 0"
            raise ConfigError("objective.attack_steps", self.attack_steps, rule, "Give a budget, or 0 steps")
