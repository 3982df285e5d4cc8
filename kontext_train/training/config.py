"""Choices of this room. Torch-free."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from kontext_train.errors import ConfigError
from kontext_train.flow.config import SamplerConfig


class OptimizerName(Enum):
    adamw = "adamw"
    muon = "muon"  # Muon for the matrices of the blocks, AdamW for the rest


class MomentDtype(Enum):
    float32 = "float32"
    int8 = "int8"  # codes of a dynamic 8-bit type, with a scale for each 256 values


class ScheduleName(Enum):
    constant = "constant"
    cosine = "cosine"
    linear = "linear"


class Wandb(Enum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass(slots=True)
class OptimizerConfig:
    key: ClassVar[str] = "optimizer"

    name: OptimizerName = OptimizerName.adamw
    lr: float = 1e-5  # AdamW's
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices; never on biases and norms
    max_grad_norm: float = 1.0
    muon_lr: float = 2e-3
    muon_momentum: float = 0.95
    moments: MomentDtype = MomentDtype.float32  # of AdamW
    stochastic_rounding: bool = False  # of weights kept in bfloat16: parallel.master_dtype=bfloat16 needs it

    def __post_init__(self) -> None:
        for key in ("lr", "eps", "max_grad_norm", "muon_lr"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"{self.key}.{key}", getattr(self, key), "must be positive", "Give a value above 0")
        for key, momentum in (
            ("betas", self.betas[0]),
            ("betas", self.betas[1]),
            ("muon_momentum", self.muon_momentum),
        ):
            if not 0 <= momentum < 1:
                rule = "must be at least 0 and below 1"
                raise ConfigError(f"{self.key}.{key}", getattr(self, key), rule, "For example 0.95")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"{self.key}.weight_decay", self.weight_decay, "must not be negative", "0 is no decay")
        if self.moments is MomentDtype.int8 and self.name is OptimizerName.muon:
            rule = "is for AdamW, and Muon has one momentum, which its orthogonalisation needs finer"
            raise ConfigError(f"{self.key}.moments", "int8", rule, f"Use {self.key}.name=adamw, or moments=float32")


@dataclass(slots=True)
class ScheduleConfig:
    """Learning rate over the run, as a factor of the peak."""

    key: ClassVar[str] = "schedule"

    name: ScheduleName = ScheduleName.constant
    warmup_steps: int = 100
    final_factor: float = 0.0  # where cosine and linear end

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError(f"{self.key}.warmup_steps", self.warmup_steps, "must not be negative", "0 is no warm-up")
        if not 0 <= self.final_factor <= 1:
            raise ConfigError(f"{self.key}.final_factor", self.final_factor, "must be from 0 to 1", "0 ends at no rate")


@dataclass(slots=True)
class DiscriminatorOptimizerConfig(OptimizerConfig):
    """The same options for the phase that trains a discriminator. No momentum: what it judges changes every step."""

    key: ClassVar[str] = "discriminator_optimizer"

    lr: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.99)


@dataclass(slots=True)
class DiscriminatorScheduleConfig(ScheduleConfig):
    key: ClassVar[str] = "discriminator_schedule"


@dataclass(slots=True)
class EMAConfig:
    """Exponential moving average of the weights; used to validate, sample and export."""

    half_life_images: float = 0.0  # images after which an old weight counts half; 0 keeps no average

    def __post_init__(self) -> None:
        if self.half_life_images < 0:
            raise ConfigError("ema.half_life_images", self.half_life_images, "must not be negative", "0 keeps no EMA")


@dataclass(slots=True)
class ValidationConfig:
    samples: int = 64  # of data.validation, for the loss at eight fixed times
    pictures: int = 8  # of them, sampled into a grid
    guidance: float = 1.0  # told to a model with a guidance embedding, for the loss
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        if self.samples < 1 or not 0 <= self.pictures <= self.samples:
            given, rule = (self.samples, self.pictures), "need samples >= 1 and 0 <= pictures <= samples"
            raise ConfigError("validation.samples, pictures", given, rule, "For example 64 and 8")


@dataclass(slots=True)
class LoggingConfig:
    wandb: Wandb = Wandb.offline
    project: str = "kontext_train"
    progress_bar: bool = True


class Best(Enum):
    lowest = "lowest"
    highest = "highest"


@dataclass(slots=True)
class CheckpointConfig:
    """Where checkpoints are, which of them stay, and whether training goes on while one is written."""

    folder: str | None = None  # a local folder that all ranks share, or an fsspec URL; none is run.dir/checkpoints
    asynchronous: bool = True  # train on while a copy in host memory is written; false needs no such copy, and waits
    keep_last: int = 3
    keep_best: int = 0  # of those that were validated when they were saved
    best_by: str = "validation/loss"  # or another number of validation, such as benchmark/target_mae
    best_is: Best = Best.lowest
    keep_every_steps: int = 0  # those of such steps stay for ever; 0 is none

    def __post_init__(self) -> None:
        for key, least in (("keep_last", 1), ("keep_best", 0), ("keep_every_steps", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"checkpoint.{key}", getattr(self, key), f"must be at least {least}", f"Use {least}")


@dataclass(slots=True)
class HealthConfig:
    """What a run does about trouble, and tells of itself. See docs/health.md."""

    # An update whose loss or gradient norm is above median + spike_mads x MAD of the last spike_window accepted ones is
    # not made. 0: every finite update is made.
    spike_mads: float = 0.0
    spike_window: int = 128
    max_skips: int = 10  # that spike_window steps in a row may have; one more ends the run, or rolls it back
    max_rollbacks: int = 0  # to the last checkpoint, past the data since, in place of ending the run
    # A rank that takes more than so many times the median over ranks, at each of three log steps, is named. 0: none is.
    straggler_factor: float = 1.5
    memory_history: int = 0  # allocations and frees remembered for a snapshot when out of GPU memory; 100000 is usual

    def __post_init__(self) -> None:
        if not (self.spike_mads == 0 or 1 <= self.spike_mads < math.inf):
            rule = "must be at least 1, or 0 to make every finite update"
            raise ConfigError("health.spike_mads", self.spike_mads, rule, "10 skips what is far out")
        if not (self.straggler_factor == 0 or 1 < self.straggler_factor < math.inf):
            rule = "must be above 1, or 0 to name no rank"
            raise ConfigError("health.straggler_factor", self.straggler_factor, rule, "Use 1.5")
        for key, least in (("spike_window", 4), ("max_skips", 1), ("max_rollbacks", 0), ("memory_history", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"health.{key}", getattr(self, key), f"must be at least {least}", f"Use {least}")


@dataclass(slots=True)
class ProfilerConfig:
    """One window of steps recorded by torch.profiler into run.dir/profile, a trace a rank."""

    start_step: int = 0  # updates made before the window
    steps: int = 0  # that it records; 0 records none
    ranks: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        for key in ("start_step", "steps"):
            if getattr(self, key) < 0:
                raise ConfigError(f"profiler.{key}", getattr(self, key), "must not be negative", "steps=0 records none")


@dataclass(slots=True)
class RunConfig:
    """One run: where it writes, how long it goes on, how often it does what."""

    dir: str = "outputs/run"
    seed: int = 0
    steps: int = 1000
    microbatches: int = 1  # packs that each rank accumulates before an update
    resume: str = (
        "auto"  # auto: the newest complete checkpoint of the run; none: refuse a used folder; or another run's step
    )
    log_every_steps: int = 10
    save_every_steps: int = 1000
    validate_every_steps: int = 1000
    allow_changes: list[str] = field(default_factory=list)  # options, or sections of them, that a resume may change

    def __post_init__(self) -> None:
        intervals = ("log_every_steps", "save_every_steps", "validate_every_steps")
        for key in ("steps", "microbatches", *intervals):
            if getattr(self, key) < 1:
                raise ConfigError(f"run.{key}", getattr(self, key), "must be at least 1", "Give a larger value")
