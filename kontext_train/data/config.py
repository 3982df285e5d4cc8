"""Choices of this room. Torch-free."""

from dataclasses import dataclass

from kontext_train.errors import ConfigError


@dataclass(slots=True)
class DataConfig:
    train: str = ""  # folder of indexed shards
    validation: str | None = None  # folder of indexed shards; none switches validation off
    max_pixels: int = 1024 * 1024  # larger images are scaled down to this, keeping their aspect ratio
    tokens_per_pack: int = 16_384  # budget of one forward pass on one GPU: text + target + context tokens
    pad_packs: bool = False  # pad every pack to tokens_per_pack, so that compiled code is specialised for one length
    window_samples: int = 16_384  # samples are packed among this many neighbours of the epoch's permutation
    prompt_dropout: float = 0.1  # share of samples trained with the empty prompt, for classifier-free guidance
    context_dropout: float = 0.0  # share of samples trained without their context images
    workers: int = 4  # reader processes for each rank; 0 reads in the training process
    prefetch: int = 2  # packs that each worker holds ready

    def __post_init__(self) -> None:
        for key in ("max_pixels", "tokens_per_pack", "window_samples", "prefetch"):
            if getattr(self, key) < 1:
                raise ConfigError(f"data.{key}", getattr(self, key), "must be at least 1", "Give a larger value")
        if self.workers < 0:
            raise ConfigError("data.workers", self.workers, "must not be negative", "0 reads in the training process")
        for key in ("prompt_dropout", "context_dropout"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"data.{key}", getattr(self, key), "is a probability", "Give a value from 0 to 1")
