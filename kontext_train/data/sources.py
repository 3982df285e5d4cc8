"""The datasets of a run and how they are mixed: which samples window k holds, a pure function of (seed, k).

A run is a sequence of windows. Source i gives floor((k + 1) c) - floor(k c) samples to window k, where c is its share
of the samples of a window, an exact fraction, so that nothing drifts however long the run is. It takes them in order
from an endless sequence of its own: one fresh permutation after another, each an epoch of that source.

Legend: rows number the samples of all sources, one source after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from kontext_train.data.config import Crop, DataConfig, SourceConfig, StorageConfig
from kontext_train.data.index import ShardIndex
from kontext_train.data.order import permuted
from kontext_train.data.safety_filter import check_filter
from kontext_train.data.transforms import Transform
from kontext_train.errors import ConfigError, StorageError
from kontext_train.models.sequence import SampleShape
from kontext_train.randomness import key_of

Ints = npt.NDArray[np.int64]

CHUNK = 1 << 20  # samples looked at together when all must be


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One dataset of a run. share: of the samples of a window, above 0; the shares of all sources sum to 1."""

    key: str  # of its folder in the configuration, for errors
    index: ShardIndex
    share: Fraction
    transform: Transform
    prompt_dropout: float
    context_dropout: float

    @classmethod
    def of(cls, key: str, config: SourceConfig, index: ShardIndex, share: Fraction, transform: Transform) -> "Source":
        """config: with nothing left open, as DataConfig.of_sources gives it. transform: of all, but for max_pixels."""
        assert config.max_pixels is not None
        assert config.prompt_dropout is not None
        assert config.context_dropout is not None
        transform = replace(transform, max_pixels=config.max_pixels)
        return cls(key, index, share, transform, config.prompt_dropout, config.context_dropout)

    def grid(self, hw: npt.NDArray[np.int32]) -> Ints:
        """[..., 2] rows and columns of tokens of images, by the same rule that the reader crops with."""
        size = self.transform.size(hw) if self.index.encoding is None else hw.astype(np.int64)  # what is encoded has it
        return size // self.transform.multiple


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """The samples of a window before they are packed. Arrays of one entry a sample."""

    rows: Ints
    visits: Ints  # epoch of its source * samples of all sources + row: names this sight of the sample
    prompt_dropout: npt.NDArray[np.float64]  # probabilities
    context_dropout: npt.NDArray[np.float64]


class Mixture:
    """The sources of a run as one list of samples. Looks at an index only where it is asked about a sample."""

    def __init__(self, sources: Sequence[Source], txt_tokens: int) -> None:
        self.sources, self.txt_tokens = tuple(sources), txt_tokens
        self.first_row = np.cumsum([0, *(len(source.index) for source in sources)])

    def __len__(self) -> int:
        return int(self.first_row[-1])

    def locate(self, row: int) -> tuple[int, int]:
        """(number of the source, row of its index)."""
        number = int(np.searchsorted(self.first_row, row, side="right")) - 1
        return number, row - int(self.first_row[number])

    def draw(self, seed: int, window: int, window_samples: int) -> Drawn:
        """The samples of a window, source after source; about `window_samples` in all, and the same at every scale."""
        rows, visits, source_of = [], [], []
        for number, source in enumerate(self.sources):
            first, last = (int(k * source.share * window_samples) for k in (window, window + 1))
            epochs, places = np.divmod(np.arange(first, last), len(source.index))
            key = key_of(seed, "order", number)
            rows.append(self.first_row[number] + permuted(places, epochs, len(source.index), key))
            visits.append(epochs * len(self) + rows[-1])
            source_of.append(np.full(last - first, number))
        number_of = np.concatenate(source_of)
        return Drawn(
            rows=np.concatenate(rows),
            visits=np.concatenate(visits),
            prompt_dropout=np.array([source.prompt_dropout for source in self.sources])[number_of],
            context_dropout=np.array([source.context_dropout for source in self.sources])[number_of],
        )

    def image_tokens(self, rows: Ints) -> tuple[Ints, Ints]:
        """(target tokens, context tokens) of samples, as trained at."""
        target, context = np.empty_like(rows), np.empty_like(rows)
        number_of = np.searchsorted(self.first_row, rows, side="right") - 1
        for number, source in enumerate(self.sources):
            own = number_of == number
            target[own], context[own] = self._image_tokens(source, rows[own] - self.first_row[number])
        return target, context

    def _image_tokens(self, source: Source, rows: Ints) -> tuple[Ints, Ints]:
        start = source.index.context_start[rows]
        count = source.index.context_start[rows + 1] - start
        last = np.cumsum(count)
        images = np.repeat(start - (last - count), count) + np.arange(count.sum())
        running = np.append(0, np.cumsum(source.grid(source.index.context_hw[images]).prod(axis=1)))
        return source.grid(source.index.target_hw[rows]).prod(axis=1), running[last] - running[last - count]

    def shape(self, row: int, drop_context: bool) -> SampleShape:
        number, own = self.locate(row)
        source = self.sources[number]
        first, last = source.index.context_start[own], source.index.context_start[own + 1]
        contexts = () if drop_context else source.grid(source.index.context_hw[first:last]).tolist()
        h, w = source.grid(source.index.target_hw[own]).tolist()
        return SampleShape(txt=self.txt_tokens, target=(h, w), contexts=tuple((h, w) for h, w in contexts))

    def check_budget(self, tokens_per_pack: int) -> None:
        """ConfigError if some sample alone exceeds the token budget.

        Looks at every sample only where not even one with the most contexts, all of the largest size, must fit.
        """
        for source in self.sources:
            most_images = len(source.index.samples_by_contexts)  # the target and the most contexts
            if self.txt_tokens + source.transform.most_tokens() * most_images <= tokens_per_pack:
                continue
            for first in range(0, len(source.index), CHUNK):
                rows = np.arange(first, min(first + CHUNK, len(source.index)))
                target, context = self._image_tokens(source, rows)
                tokens = self.txt_tokens + target + context
                longest = int(tokens.argmax())
                if tokens[longest] > tokens_per_pack:
                    where = f"sample {first + longest} of {source.key}"
                    rule = f"must hold the largest sample: {where} has {tokens[longest]} tokens"
                    raise ConfigError("data.tokens_per_pack", tokens_per_pack, rule, "Raise it, or lower max_pixels")


def open_sources(config: DataConfig, pixels_per_token: int, seed: int) -> list[Source]:
    """The training sources as configured. seed: the run's. Raises ConfigError by key."""
    transform = Transform.of(config, pixels_per_token, seed)
    given = config.of_sources()
    key = "data.sources.{}.path" if config.sources else "data.train"
    indexes = {name: _opened(key.format(name), source.path, config.storage) for name, source in given.items()}
    for name, index in indexes.items():
        check_filter(key.format(name), index.folder, index.safety_filter, config.require_safety_filter)
    _check_one_kind(indexes)
    share = shares(given, {name: len(index) for name, index in indexes.items()})
    return [Source.of(key.format(name), given[name], indexes[name], share[name], transform) for name in given]


def check_edits_only(sources: Sequence[Source]) -> None:
    """ConfigError by key if some sample has no context image, or may be trained without."""
    for source in sources:
        if (without := source.index.samples_by_contexts[0]) or source.context_dropout:
            rule = f"must hold edits alone for this stage, and {without:,} of its samples have no context image"
            if not without:
                rule = f"is trained without context images with probability {source.context_dropout}"
            hint = "Leave them out: python -m data_tools.filter_shards --help; and set data.context_dropout=0"
            raise ConfigError(source.key, source.index.folder, rule, hint)


def open_validation(config: DataConfig, folder: str, pixels_per_token: int) -> Source:
    """The samples of `data.validation`, which never change: cropped around the centre, nothing dropped."""
    transform = replace(Transform.of(config, pixels_per_token, seed=0), crop=Crop.center)
    index = _opened("data.validation", folder, config.storage)
    return Source("data.validation", index, Fraction(1), transform, prompt_dropout=0.0, context_dropout=0.0)


def _opened(key: str, folder: str, storage: StorageConfig) -> ShardIndex:
    try:
        return ShardIndex.open(folder, storage)
    except (ValueError, StorageError) as error:
        raise ConfigError(key, folder, "must be a folder of indexed shards", str(error)) from error


def _check_one_kind(indexes: dict[str, ShardIndex]) -> None:
    """ConfigError if a run, by name of source, would mix images and latents, or prompts encoded and not."""
    kinds = {name: _kind(index) for name, index in indexes.items()}
    first = next(iter(kinds))
    for name, kind in kinds.items():
        if kind != kinds[first]:
            rule = f"holds {kind}, but data.sources.{first} {kinds[first]}: a pack takes samples of all sources"
            raise ConfigError(f"data.sources.{name}.path", indexes[name].folder, rule, "Encode all of them alike")


def _kind(index: ShardIndex) -> str:
    if index.encoding is None:
        return "images"
    return "latents and T5's tokens" if index.encoding["t5"] else "latents"


def shares(sources: dict[str, SourceConfig], sizes: dict[str, int]) -> dict[str, Fraction]:
    """Share of each source in every window, exactly: by weight, or by number of samples times repeat."""
    parts = {
        name: sizes[name] * Fraction(str(source.repeat)) if source.weight is None else Fraction(str(source.weight))
        for name, source in sources.items()
    }
    return {name: part / sum(parts.values()) for name, part in parts.items()}
