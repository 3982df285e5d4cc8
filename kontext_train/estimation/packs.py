"""What a pack holds: from an index, or from one typical sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from kontext_train.data.config import DataConfig
from kontext_train.data.plan import Planner, Position
from kontext_train.data.sources import Mixture, open_sources
from kontext_train.errors import ConfigError
from kontext_train.estimation.config import Sample
from kontext_train.models.config import EncodersConfig, FluxConfig
from kontext_train.models.flops import forward_flops
from kontext_train.models.sequence import SampleShape

RELEASED_PIXELS_PER_TOKEN = 16


@dataclass(frozen=True, slots=True)
class TokenMix:
    largest: tuple[SampleShape, ...]  # the pack that memory must hold
    samples: float  # in a pack, on average
    forward_flops: float  # of a pack, on average
    pad_to: int | None  # tokens of every pack, with padding; None adds none
    source: str  # where this is from, for the reader


def token_mix(
    data: DataConfig, encoders: EncodersConfig, model: FluxConfig, sample: Sample, packs_per_step: int, seed: int
) -> TokenMix:
    """Of data.train if it is given, of so many typical samples as a pack holds if not. ConfigError if none fits."""
    pad_to = data.tokens_per_pack if data.pad_packs else None
    if data.train or data.sources:
        packs = _planned(data, encoders, model, packs_per_step, seed)
        paths = ", ".join(source.path for source in data.of_sources().values())
        return _mix(model, packs, pad_to, f"first steps of {paths}")
    side = RELEASED_PIXELS_PER_TOKEN
    image = (sample.height // side, sample.width // side)
    shape = SampleShape(encoders.t5_tokens, image, (image,) * sample.contexts)
    if shape.tokens > data.tokens_per_pack:
        rule = f"must hold the typical sample, which has {shape.tokens} tokens"
        raise ConfigError("data.tokens_per_pack", data.tokens_per_pack, rule, "Raise it, or lower sample.height")
    images = f"{sample.height} x {sample.width} with {sample.contexts} contexts"
    pack = (shape,) * (data.tokens_per_pack // shape.tokens)
    return _mix(model, [pack], pad_to, f"typical sample, {images}: {shape.tokens} tokens")


def _mix(model: FluxConfig, packs: Sequence[tuple[SampleShape, ...]], pad_to: int | None, source: str) -> TokenMix:
    flops = forward_flops(model)
    return TokenMix(
        largest=max(packs, key=lambda pack: sum(shape.tokens for shape in pack)),
        samples=sum(map(len, packs)) / len(packs),
        forward_flops=sum(flops.sample(shape) for pack in packs for shape in pack) / len(packs),
        pad_to=pad_to,
        source=source,
    )


def _planned(
    data: DataConfig, encoders: EncodersConfig, model: FluxConfig, packs_per_step: int, seed: int, steps: int = 100
) -> list[tuple[SampleShape, ...]]:
    """The packs of a run's first steps."""
    side = encoders.pixels_per_token() if encoders.path else RELEASED_PIXELS_PER_TOKEN
    mixture = Mixture(open_sources(data, side, seed), encoders.t5_tokens)
    mixture.check_budget(data.tokens_per_pack)
    planner = Planner(mixture, data, seed, forward_flops(model).of_tokens)
    first = islice(planner.steps(Position(), packs_per_step), steps)
    return [
        tuple(mixture.shape(int(i), bool(drop)) for i, drop in zip(pack.samples, pack.drop_context, strict=True))
        for packs in first
        for pack in packs
        if pack.counts.any()
    ]
