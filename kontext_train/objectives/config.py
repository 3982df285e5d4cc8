"""Choices of this room. Torch-free."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from kontext_train.errors import ConfigError
from kontext_train.models.config import DiscriminatorConfig

GRADIENT_PENALTY_STD = 0.01
UNGUIDED = 1.0
ROLLOUT_STEPS = 3  # of safety's reference, from noise to a picture: one gives the mean of all that a prompt allows


@dataclass(slots=True)
class ObjectiveConfig:
    """Base of every stage's options; a stage's YAML picks the class."""

    trained: ClassVar[tuple[str, ...]] = ("student",)
    edits_only: ClassVar[bool] = False
    needs_empty_prompt: ClassVar[bool] = False
    frozen: ClassVar[tuple[str, ...]] = ()  # roles that never train; weights.ROLE says where each comes from

    def passes(self) -> tuple[int, int]:
        """What a step runs beside the student's forward and backward, of networks of its shape: (without gradients,
        through a frozen role, forward and back to its inputs).
        """
        return 0, 0

    def extra_passes(self) -> int:
        """The cost of those in forward passes."""
        without, through = self.passes()
        return without + 2 * through

    def samples_beside(self, samples: int) -> int:
        """Of the stage's own, on which the student trains beside a pack of so many."""
        return 0

    def passes_beside(self) -> tuple[int, int]:
        """(without gradients, through) of those."""
        return 0, 0

    def extra_passes_beside(self) -> int:
        without, through = self.passes_beside()
        return without + 2 * through


@dataclass(slots=True)
class FlowMatchingConfig(ObjectiveConfig):
    """flow_finetune: rectified-flow training on triplets, jointly with text-to-image."""

    guidance: float = 1.0  # given to a model with a guidance embedding while it trains


@dataclass(slots=True)
class GuidanceDistillationConfig(ObjectiveConfig):
    """guidance_distillation: a student with a guidance embedding learns a teacher's guided velocity, on edits."""

    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    edits_only: ClassVar[bool] = True
    needs_empty_prompt: ClassVar[bool] = True

    guidance: tuple[float, float] = (1.0, 6.0)  # scales are drawn from here, and the student is good for them
    interval: tuple[float, float] = (0.0, 1.0)  # times at which the teacher is guided; outside, its scale is 1

    def passes(self) -> tuple[int, int]:
        return 2, 0  # the teacher's, with and without the prompt

    def __post_init__(self) -> None:
        if not 0 <= self.guidance[0] < self.guidance[1] < math.inf:
            rule = "must be a lower and a higher scale, not below 0"
            raise ConfigError("objective.guidance", self.guidance, rule, "For example [1, 6]")
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            rule = "must be an earlier and a later time from 0 to 1"
            raise ConfigError("objective.interval", self.interval, rule, "[0, 1] guides everywhere")


@dataclass(slots=True)
class LaddConfig(ObjectiveConfig):
    """ladd: a student of few steps learns from heads on a frozen teacher (Sauer et al. 2024, arXiv 2403.12015)."""

    trained: ClassVar[tuple[str, ...]] = ("discriminator", "student")
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)

    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    # Times that the student starts from, before the resolution shift: those of a sampler of so many steps. Falling.
    times: list[float] = field(default_factory=lambda: [1.0, 0.75, 0.5, 0.25])
    probabilities: list[float] = field(default_factory=lambda: [0.7, 0.1, 0.1, 0.1])  # of each time
    warmup_probabilities: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.5, 0.5])  # easy ones first
    warmup_steps: int = 500  # with those
    # After the warm-up, the share of samples for which the student starts from a picture of its own, noised, instead of
    # a real one: what a second step meets when it samples. Any share costs two forward passes a step.
    backward_simulation: float = 0.0
    renoise_mean: float = 1.0  # of the logit of the times at which the teacher reads
    renoise_std: float = 1.0
    gradient_penalty: float = 0.0  # weight of the heads' squared slope at real pictures; 0 costs nothing
    gradient_penalty_std: float = GRADIENT_PENALTY_STD  # step along which it is measured, relative to the features
    # Told to a student, and to a teacher, that embed guidance.
    student_guidance: float = UNGUIDED
    teacher_guidance: float = UNGUIDED

    def passes(self) -> tuple[int, int]:
        """The student makes and the teacher reads made and real; in the student's phase it reads what is made then."""
        return 3 + 2 * (self.backward_simulation > 0), 1

    def __post_init__(self) -> None:
        if not self.times or not all(0 < t <= 1 for t in self.times) or sorted(set(self.times))[::-1] != self.times:
            rule = "must be falling times above 0, at most 1"
            raise ConfigError("objective.times", self.times, rule, "For example [1.0, 0.75, 0.5, 0.25]")
        for key in ("probabilities", "warmup_probabilities"):
            given = getattr(self, key)
            if len(given) != len(self.times) or min(given) < 0 or not math.isclose(sum(given), 1, abs_tol=1e-6):
                rule = f"must be a probability for each of objective.times={self.times}, 1 in all"
                raise ConfigError(f"objective.{key}", given, rule, "For example [0.7, 0.1, 0.1, 0.1] of four")
        if not 0 <= self.backward_simulation <= 1:
            rule = "must be a share, from 0 to 1"
            raise ConfigError("objective.backward_simulation", self.backward_simulation, rule, "0 is off, 1 is usual")
        if self.backward_simulation and not (self.times[0] == 1 and 0 < self.probabilities[0] < 1):
            rule = (
                f"is of students that start from noise and from less, and objective.times={self.times} with "
                f"objective.probabilities={self.probabilities} have none of one of them"
            )
            hint = "Use 0, or a first time of 1 with a probability between 0 and 1"
            raise ConfigError("objective.backward_simulation", self.backward_simulation, rule, hint)
        for key in ("warmup_steps", "gradient_penalty"):
            if getattr(self, key) < 0:
                raise ConfigError(f"objective.{key}", getattr(self, key), "must not be negative", "Use 0")
        for key in ("renoise_std", "gradient_penalty_std"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"objective.{key}", getattr(self, key), "must be above 0", "See docs/distillation.md")
        if self.gradient_penalty == 0 and self.gradient_penalty_std != GRADIENT_PENALTY_STD:
            rule = "has no effect: objective.gradient_penalty is 0"
            raise ConfigError("objective.gradient_penalty_std", self.gradient_penalty_std, rule, "Leave it out")


@dataclass(slots=True)
class SafetyConfig(ObjectiveConfig):
    """safety: concepts that must not be made are suppressed, against an attack on the conditioning (docs/safety.md)."""

    frozen: ClassVar[tuple[str, ...]] = ("reference",)

    concepts: str | None = None  # JSON Lines of prompts, their anchors and context images
    concepts_per_pack: int = 8  # suppressed beside each pack of ordinary samples; at most as many as these
    suppress_weight: float = 1.0  # of a concept's error, against that of an ordinary sample
    negative_guidance: float = 1.0  # how far beyond the empty prompt a concept without an anchor is turned round
    attack_steps: int = 4  # of the inner ascent; 0 trains without an adversary
    text_budget: float = 0.3  # how far the ascent may move each T5 token, relative to its length
    pooled_budget: float = 0.3  # the same of CLIP's vector
    context_budget: float = 0.0  # and of each token of the context images
    guidance: float = 1.0  # given to models with a guidance embedding while they train

    def passes(self) -> tuple[int, int]:
        return 1, 0  # the reference's

    def samples_beside(self, samples: int) -> int:
        return min(self.concepts_per_pack, samples)

    def passes_beside(self) -> tuple[int, int]:
        return ROLLOUT_STEPS + 2, self.attack_steps  # the reference on the way, at the goal and at the anchor

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
