"""Choices of this room. Torch-free."""

from dataclasses import dataclass

from kontext_train.errors import ConfigError


@dataclass(slots=True)
class ShiftConfig:
    """Resolution shift: mu is linear in the number of target tokens, through two points (as released)."""

    base_tokens: int = 256
    base_mu: float = 0.5
    max_tokens: int = 4096
    max_mu: float = 1.15

    def __post_init__(self) -> None:
        if self.base_tokens == self.max_tokens:
            rule = "must differ from flow.max_tokens: a line needs two points"
            raise ConfigError("flow.base_tokens", self.base_tokens, rule, "Use 256 and 4096")


@dataclass(slots=True)
class SamplerConfig:
    """How an image is generated."""

    steps: int = 28
    guidance: float = 1.0  # true classifier-free guidance with the empty prompt; 1 is off and costs one pass a step
    embedded_guidance: float = 2.5  # given to models with a guidance embedding
    stochastic: bool = False  # new noise at every step, for students of few steps; false takes Euler's steps

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError("sampler.steps", self.steps, "must be at least 1", "Kontext-dev is sampled with 28")
