"""From options to metrics. Libraries are imported where they are asked for; some come with kontext-train[eval]."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kontext_train.errors import ConfigError
from kontext_train.evaluation.config import MetricsConfig
from kontext_train.evaluation.metrics.base import Metric, SetMetric


def build_metrics(config: MetricsConfig) -> tuple[list[Metric], list[SetMetric]]:
    """All that was asked for, loaded. ConfigError names what cannot be, and what to do."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    metrics: list[Metric] = []
    sets: list[SetMetric] = []
    if config.pixels:
        from kontext_train.evaluation.metrics.pixels import Pixels

        metrics.append(Pixels())
    if config.clip is not None:
        from kontext_train.evaluation.metrics.clip import Aesthetic, Clip, ClipEmbedder
        from kontext_train.evaluation.metrics.distribution import Cmmd

        embedder = ClipEmbedder(config.clip, device)
        metrics.append(Clip(embedder))
        if config.aesthetic is not None:
            metrics.append(Aesthetic(embedder, config.aesthetic))
        if config.cmmd:
            sets.append(Cmmd(embedder))
    if config.dino is not None:
        from kontext_train.evaluation.metrics.dino import Dino

        metrics.append(Dino(config.dino, device))
    if config.lpips is not None:
        from kontext_train.evaluation.metrics.lpips import Lpips

        metrics.append(Lpips(config.lpips, device))
    if config.face is not None:
        with _extra("face", config.face):
            from kontext_train.evaluation.metrics.face import Face
        metrics.append(Face(config.face))
    if config.ocr:
        with _extra("ocr", True):
            from kontext_train.evaluation.metrics.ocr import Ocr
        metrics.append(Ocr())
    if config.inception is not None:
        from kontext_train.evaluation.metrics.distribution import Inception

        sets.append(Inception(config.inception, device))
    if config.vlm.url is not None:
        from kontext_train.evaluation.metrics.vlm import Vlm

        metrics.append(Vlm(config.vlm))
    if not metrics and not sets:
        raise ConfigError("metrics", "", "measures nothing", "Give at least one, or leave metrics.pixels=true")
    return metrics, sets


@contextmanager
def _extra(key: str, given: object) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        rule = f"needs a package that is not installed ({error})"
        raise ConfigError(f"metrics.{key}", given, rule, 'pip install "kontext-train[eval]"') from error
