"""Choices of this room. Torch-free."""

import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from urllib.parse import urlsplit

from kontext_train.errors import ConfigError
from kontext_train.flow.config import SamplerConfig


class Resolution(Enum):
    """The size of images, and of their contexts."""

    trained = "trained"  # as the model's run saw images: the first context's own size within data.max_pixels
    kontext = "kontext"  # the nearest by aspect ratio of the 17 released sizes, as released inference has it


@dataclass(slots=True)
class MakingConfig:
    """How images are made. All of it but seeds, per_category and at_once is one result folder's for ever."""

    seeds: int = 1  # images of each pair
    per_category: int | None = None  # the first pairs of each category, and as many chains; none: all
    resolution: Resolution = Resolution.trained
    height: int = 1024  # pixels, of pairs without a context
    width: int = 1024
    at_once: int = 1  # images sampled together; latency is measured at 1 only
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        for key in ("seeds", "per_category", "height", "width", "at_once"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"making.{key}", value, "must be at least 1", "Give a larger value")


@dataclass(slots=True)
class RunConfig:
    """kontext-evaluate run: make the images of a benchmark with a model."""

    checkpoint: str = ""  # a run folder, a step folder, or what kontext-export wrote
    benchmark: str = ""
    out: str = ""  # a result folder of this model
    name: str | None = None  # of the model, in reports; none: of the folder `out`
    partial: bool = False  # take a benchmark that is not complete
    ema: bool = True
    encoders: str | None = None  # where they are now, if not where the run had them
    making: MakingConfig = field(default_factory=MakingConfig)

    def __post_init__(self) -> None:
        _given(self, "checkpoint", "benchmark", "out")


DEFAULT_KEY = "OPENAI_API_KEY"


@dataclass(slots=True)
class VlmConfig:
    """A judge behind an OpenAI-compatible endpoint."""

    url: str | None = None  # http://host:8000/v1; none does not ask
    model: str = ""
    key_variable: str = DEFAULT_KEY  # the environment variable with the key; no key is sent if this one is not set
    timeout_s: float = 120.0
    retries: int = 3
    concurrency: int = 4  # questions at once

    def __post_init__(self) -> None:
        if self.url is not None and not _is_http(self.url):
            hint = "For example http://localhost:8000/v1"
            raise ConfigError("metrics.vlm.url", self.url, "must be an HTTP address without a user or a query", hint)
        if self.url is not None and not self.model:
            raise ConfigError("metrics.vlm.model", "", "must be given with metrics.vlm.url", "The server's model name")
        if self.url is None and self.model:
            raise ConfigError("metrics.vlm.model", self.model, "has no effect without metrics.vlm.url", "Give both")
        if self.url is not None and self.key_variable != DEFAULT_KEY and not os.environ.get(self.key_variable):
            rule = "is not set in the environment, or empty"
            raise ConfigError("metrics.vlm.key_variable", self.key_variable, rule, f"export {self.key_variable}=KEY")
        for key, least in (("timeout_s", 0.001), ("retries", 0), ("concurrency", 1)):
            value = getattr(self, key)
            if not least <= value < float("inf"):
                rule = f"must be a number of at least {least}"
                raise ConfigError(f"metrics.vlm.{key}", value, rule, f"Use {getattr(VlmConfig(), key)}")


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        if parts.username or parts.query or parts.fragment:  # keys are the environment's: an address is written down
            return False
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False


METRIC_FILES = ("clip", "dino", "aesthetic", "lpips", "face", "inception", "references")


@dataclass(slots=True)
class MetricsConfig:
    """What is measured. Each model is a local folder or file; none leaves the metric out. See docs/evaluation.md."""

    pixels: bool = True  # against context and truth: untouched region, colour shift, cycle error
    clip: str | None = None  # folder of a transformers CLIPModel with its processor
    dino: str | None = None  # folder of a transformers DINOv2 with its processor
    aesthetic: str | None = None  # file: a head on the embeddings of `clip`
    lpips: str | None = None  # file: torchvision's AlexNet, alexnet-owt-7be5be79.pth
    face: str | None = None  # folder: an ONNX face detector (SCRFD) and recogniser, as AuraFace is released
    ocr: bool = False  # the models are in the package rapidocr
    inception: str | None = None  # file: TorchScript of the FID Inception (inception-2015-12-05.pt)
    cmmd: bool = False  # by `clip`
    references: str | None = None  # folder of real images, for inception and cmmd; none: the benchmark's own targets
    vlm: VlmConfig = field(default_factory=VlmConfig)

    def __post_init__(self) -> None:
        for key in METRIC_FILES:
            path = getattr(self, key)
            if path is not None and not Path(path).exists():
                raise ConfigError(f"metrics.{key}", path, "is not there", f"Put it there, or leave metrics.{key} out")
        for key in ("aesthetic", "cmmd"):
            if getattr(self, key) and self.clip is None:
                hint = f"Give metrics.clip, or leave metrics.{key} out"
                raise ConfigError(f"metrics.{key}", getattr(self, key), "is a function of CLIP's embeddings", hint)
        if self.references is not None and not (self.inception or self.cmmd):
            rule = "has no effect without metrics.inception or metrics.cmmd"
            raise ConfigError("metrics.references", self.references, rule, "Leave it out")


@dataclass(slots=True)
class InTrainingConfig:
    """A slice of a benchmark that is made and measured at each validation of a training run (its key: evaluation)."""

    benchmark: str | None = None  # folder in KontextBench's form; none makes no slice
    per_category: int = 2  # the first pairs of each category, and as many chains
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        if self.per_category < 1:
            raise ConfigError("evaluation.per_category", self.per_category, "must be at least 1", "Use 2")


@dataclass(slots=True)
class ScoreConfig:
    """kontext-evaluate score: measure the images of a result folder."""

    results: str = ""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        _given(self, "results")


@dataclass(slots=True)
class ReportConfig:
    """kontext-evaluate report: result folders side by side on one page."""

    results: list[str] = field(default_factory=list)  # the first is what the others are held against
    out: str = ""  # a folder; open its index.html

    def __post_init__(self) -> None:
        _given(self, "results", "out")


@dataclass(slots=True)
class ArenaConfig:
    """kontext-evaluate arena: people choose between two models' images without knowing which is whose."""

    results: list[str] = field(default_factory=list)
    votes: str = ""  # a JSONL file; votes in it count, new ones are added
    host: str = "127.0.0.1"
    port: int = 8360  # 0: a free one
    seed: int = 0  # of the order and the sides

    def __post_init__(self) -> None:
        _given(self, "results", "votes")
        if len(self.results) < 2:
            raise ConfigError("results", self.results, "must be two result folders or more", "results=[A,B]")


def _given(config: object, *keys: str) -> None:
    for key in keys:
        if not getattr(config, key):
            raise ConfigError(key, getattr(config, key), "must be given", "kontext-evaluate --help shows how")
