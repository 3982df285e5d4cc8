"""Choices of this room. Torch-free."""

from dataclasses import dataclass, field

from kontext_train.errors import ConfigError

URL_SCHEMES = ("http", "https", "s3")


def is_url(folder: str) -> bool:
    return "://" in folder


@dataclass(slots=True)
class StorageConfig:
    """How remote shards (s3://, https://, http://) are read; local ones need none of it. See docs/storage.md."""

    timeout_s: float = 60.0  # of one range request, from asking to its last byte
    retries: int = 5  # after a request that failed, before the run gives up
    backoff_s: float = 0.5  # before the first retry; doubles with each, and is varied by half so that ranks spread
    concurrency: int = 16  # requests at once in each reader process
    cache_dir: str | None = None  # local disk that keeps what was read; none keeps nothing
    cache_gib: float = 50.0  # its bound, for all processes together

    def __post_init__(self) -> None:
        for key in ("timeout_s", "cache_gib"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"data.storage.{key}", getattr(self, key), "must be above 0", "Give a larger value")
        for key, least in (("retries", 0), ("backoff_s", 0), ("concurrency", 1)):
            if not getattr(self, key) >= least:
                rule = f"must be at least {least}"
                raise ConfigError(f"data.storage.{key}", getattr(self, key), rule, "Give a larger value")


@dataclass(slots=True)
class DataConfig:
    train: str = ""  # folder of indexed shards, or its URL
    validation: str | None = None  # folder of indexed shards, or its URL; none switches validation off
    max_pixels: int = 1024 * 1024  # larger images are scaled down to this, keeping their aspect ratio
    tokens_per_pack: int = 16_384  # budget of one forward pass on one GPU: text + target + context tokens
    pad_packs: bool = False  # pad every pack to tokens_per_pack, so that compiled code is specialised for one length
    window_samples: int = 16_384  # samples are packed among this many neighbours of the epoch's permutation
    prompt_dropout: float = 0.1  # share of samples trained with the empty prompt, for classifier-free guidance
    context_dropout: float = 0.0  # share of samples trained without their context images
    workers: int = 4  # reader processes for each rank; 0 reads in the training process
    prefetch: int = 2  # packs that each worker holds ready
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        for key in ("max_pixels", "tokens_per_pack", "window_samples", "prefetch"):
            if getattr(self, key) < 1:
                raise ConfigError(f"data.{key}", getattr(self, key), "must be at least 1", "Give a larger value")
        for key in ("train", "validation"):
            folder = getattr(self, key) or ""
            if is_url(folder) and folder.partition("://")[0] not in URL_SCHEMES:
                rule = f"is neither a local folder nor one of {', '.join(f'{s}://' for s in URL_SCHEMES)}"
                raise ConfigError(f"data.{key}", folder, rule, "See docs/storage.md")
        if self.workers < 0:
            raise ConfigError("data.workers", self.workers, "must not be negative", "0 reads in the training process")
        for key in ("prompt_dropout", "context_dropout"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"data.{key}", getattr(self, key), "is a probability", "Give a value from 0 to 1")
