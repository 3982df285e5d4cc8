"""Choices of this room. Torch-free."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from kontext_train.errors import ConfigError

URL_SCHEMES = ("http", "https", "s3")
KONTEXT_PIXELS = 1024 * 1024  # what the sizes of Resize.kontext have, about


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


class Resize(Enum):
    pixel_budget = "pixel_budget"  # the image's own aspect ratio, at most max_pixels
    kontext = "kontext"  # the nearest by aspect ratio of the 17 sizes of one megapixel that Kontext was trained at


class Crop(Enum):
    center = "center"
    random = "random"  # another place at each visit, the same for all images of a sample


@dataclass(slots=True)
class SourceConfig:
    """One dataset of several. What is not given here is as for all of them."""

    path: str = ""  # folder of indexed shards, or its URL
    weight: float | None = None  # its share of every window, relative to the other sources' weights
    repeat: float | None = None  # instead of a weight: share by number of samples, times this
    max_pixels: int | None = None
    prompt_dropout: float | None = None
    context_dropout: float | None = None


@dataclass(slots=True)
class DataConfig:
    train: str = ""  # folder of indexed shards, or its URL; or instead of it
    sources: dict[str, Any] = field(default_factory=dict)  # SourceConfig by name: +data.sources.web.path=SHARDS
    validation: str | None = None  # folder of indexed shards, or its URL; none switches validation off
    resize: Resize = Resize.pixel_budget
    max_pixels: int = 1024 * 1024  # larger images are scaled down to this, keeping their aspect ratio
    max_upscale: float = 1.0  # an image that had to grow more than this a side keeps its own size; 1 enlarges none
    crop: Crop = Crop.center  # where the few pixels go that the resized image has too many
    background: list[int] = field(default_factory=lambda: [255, 255, 255])  # RGB, seen through transparency
    tokens_per_pack: int = 32_768  # budget of one forward pass on one GPU: text + target + context tokens
    pad_packs: bool = False  # pad every pack to tokens_per_pack, so that compiled code is specialised for one length
    window_samples: int = 65_536  # samples are mixed and packed among so many; 16 steps' worth or more balance well
    prompt_dropout: float = 0.1  # share of samples trained with the empty prompt, for classifier-free guidance
    context_dropout: float = 0.0  # share of samples trained without their context images
    max_bad_fraction: float = 0.001  # of samples that cannot be read, before the run stops; 0 stops at the first
    require_safety_filter: str | None = None  # a policy, NAME or NAME@DIGEST, that all shards must have passed
    workers: int = 4  # reader processes for each rank; 0 reads and plans in the training process
    prefetch: int = 2  # packs that each worker holds ready
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        for key in ("max_pixels", "tokens_per_pack", "window_samples", "prefetch"):
            if getattr(self, key) < 1:
                raise ConfigError(f"data.{key}", getattr(self, key), "must be at least 1", "Give a larger value")
        _check_scheme("data.train", self.train)
        _check_scheme("data.validation", self.validation or "")
        if self.resize is Resize.kontext and self.max_pixels < KONTEXT_PIXELS:
            rule = f"must be at least {KONTEXT_PIXELS} with data.resize=kontext, whose sizes are of one megapixel"
            raise ConfigError("data.max_pixels", self.max_pixels, rule, "Use data.resize=pixel_budget for less")
        if self.max_upscale < 1:
            raise ConfigError("data.max_upscale", self.max_upscale, "must be at least 1", "1 enlarges no image")
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            rule = "must be red, green and blue from 0 to 255"
            raise ConfigError("data.background", self.background, rule, "White is [255,255,255]")
        if self.workers < 0:
            raise ConfigError("data.workers", self.workers, "must not be negative", "0 reads in the training process")
        for key in ("prompt_dropout", "context_dropout", "max_bad_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"data.{key}", getattr(self, key), "is a probability", "Give a value from 0 to 1")
        if self.train and self.sources:
            rule = f"cannot be given together with data.sources ({', '.join(self.sources)})"
            raise ConfigError("data.train", self.train, rule, "Make it one of data.sources")
        self._check_sources()

    def _check_sources(self) -> None:
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        for name, source in self.sources.items():
            key = f"data.sources.{name}"
            if not source.path:
                raise ConfigError(f"{key}.path", source.path, "must be given", "A folder of indexed shards")
            _check_scheme(f"{key}.path", source.path)
            for part in ("weight", "repeat"):
                given = getattr(source, part)
                if given is not None and not 0 < given < float("inf"):
                    raise ConfigError(f"{key}.{part}", given, "must be above 0", "Leave the source out instead")
            if weighted and (source.weight is None or source.repeat is not None):
                rule = f"but data.sources.{weighted[0]} has a weight"
                raise ConfigError(key, _given(source), rule, "Give a weight to every source, or repeat, or neither")
            if source.max_pixels is not None and source.max_pixels < 1:
                raise ConfigError(f"{key}.max_pixels", source.max_pixels, "must be at least 1", "Give a larger value")
            if source.max_pixels is not None and self.resize is Resize.kontext:
                rule = "has no effect with data.resize=kontext, whose sizes are of one megapixel"
                raise ConfigError(f"{key}.max_pixels", source.max_pixels, rule, "Use data.resize=pixel_budget")
            for part in ("prompt_dropout", "context_dropout"):
                given = getattr(source, part)
                if given is not None and not 0 <= given <= 1:
                    raise ConfigError(f"{key}.{part}", given, "is a probability", "Give a value from 0 to 1")

    def of_sources(self) -> dict[str, SourceConfig]:
        """Every training source with nothing left open but its weight. A single folder is a source named `train`."""
        given = self.sources or {"train": SourceConfig(path=self.train)}
        return {name: self._filled(source) for name, source in given.items()}

    def _filled(self, source: SourceConfig) -> SourceConfig:
        shared = ("max_pixels", "prompt_dropout", "context_dropout")
        own = {key: getattr(source, key) for key in shared if getattr(source, key) is not None}
        filled = {key: getattr(self, key) for key in shared} | own
        return SourceConfig(path=source.path, weight=source.weight, repeat=source.repeat or 1.0, **filled)


def _check_scheme(key: str, folder: str) -> None:
    if is_url(folder) and folder.partition("://")[0] not in URL_SCHEMES:
        rule = f"is neither a local folder nor one of {', '.join(f'{s}://' for s in URL_SCHEMES)}"
        raise ConfigError(key, folder, rule, "See docs/storage.md")


def _given(source: SourceConfig) -> dict[str, float | None]:
    return {"weight": source.weight, "repeat": source.repeat}
