"""Several datasets: shares hold in every window, each source has epochs of its own, settings are its own."""

from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing import FLOPS, MixedIndex
from kontext_train.data.config import DataConfig, SourceConfig
from kontext_train.data.index import ShardIndex
from kontext_train.data.plan import Planner, Position
from kontext_train.data.sample import SampleReader
from kontext_train.data.sources import Mixture, Source, shares
from kontext_train.data.transforms import Transform


def mixture(sizes: dict[str, int], **options: SourceConfig) -> Mixture:
    config = DataConfig(sources={name: options.get(name, SourceConfig(path=name)) for name in sizes})
    given = config.of_sources()
    share = shares(given, sizes)
    indexes = {name: MixedIndex(n, seed) for seed, (name, n) in enumerate(sizes.items())}
    transform = Transform.of(config, multiple=16, seed=0)
    return Mixture([Source.of(name, given[name], indexes[name], share[name], transform) for name in sizes], 512)  # type: ignore[arg-type]


def test_shares() -> None:
    sizes = {"a": 100, "b": 300}
    assert mixture(sizes).sources[0].share == Fraction(1, 4)
    repeated = mixture(sizes, a=SourceConfig(path="a", repeat=3))
    assert [s.share for s in repeated.sources] == [Fraction(1, 2)] * 2
    weighted = mixture(sizes, a=SourceConfig(path="a", weight=0.7), b=SourceConfig(path="b", weight=0.1))
    assert [s.share for s in weighted.sources] == [
        Fraction(7, 8),
        Fraction(1, 8),
    ]  # exactly: 0.7 / 0.8 in floats is not


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=6),
    window=st.integers(0, 1 << 45),
    window_samples=st.integers(1, 5000),
)
def test_shares_hold_in_every_window(weights: list[float], window: int, window_samples: int) -> None:
    sizes = {f"s{i}": 50 + 17 * i for i in range(len(weights))}
    options = {f"s{i}": SourceConfig(path="x", weight=w) for i, w in enumerate(weights)}
    mixed = mixture(sizes, **options)
    rows = mixed.draw(0, window, window_samples).rows
    for number, source in enumerate(mixed.sources):
        own = (rows >= mixed.first_row[number]) & (rows < mixed.first_row[number + 1])
        assert abs(int(own.sum()) - source.share * window_samples) < 1


def test_weights_are_within_a_percent_of_the_default_window() -> None:
    weights = {"web": 0.62, "edits": 0.35, "text": 0.03}
    options = {name: SourceConfig(path=name, weight=w) for name, w in weights.items()}
    mixed = mixture({"web": 9000, "edits": 4000, "text": 100}, **options)
    for window in (0, 1, 12_345_678):
        rows = mixed.draw(0, window, DataConfig().window_samples).rows
        counts = np.histogram(rows, mixed.first_row)[0]
        assert counts / counts.sum() == pytest.approx(list(weights.values()), rel=0.01)


def test_each_source_has_epochs_of_its_own_and_visits_never_repeat() -> None:
    mixed = mixture({"big": 700, "small": 30}, small=SourceConfig(path="x", repeat=5))
    drawn = [mixed.draw(0, window, 100) for window in range(17)]
    rows, visits = (np.concatenate([getattr(d, name) for d in drawn]) for name in ("rows", "visits"))
    assert len(np.unique(visits)) == len(visits)
    assert np.array_equal(visits % len(mixed), rows)
    for first, last in ((0, 700), (700, 730)):
        own = rows[(rows >= first) & (rows < last)]
        epochs = [own[i : i + last - first] for i in range(0, len(own) - (last - first) + 1, last - first)]
        assert len(epochs) >= 1
        assert all(sorted(epoch) == list(range(first, last)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "an order came again"


def test_sources_mix_within_every_window_and_step() -> None:
    mixed = mixture({"a": 3000, "b": 1000})
    plan = Planner(mixed, DataConfig(tokens_per_pack=32_768, window_samples=1000), 0, FLOPS.of_tokens)
    of_a = [np.concatenate([p.samples < 3000 for p in step]) for step in islice(plan.steps(Position(), 8), 30)]
    assert np.mean([own.mean() for own in of_a]) == pytest.approx(0.75, abs=0.03)
    spread = np.std([own.mean() for own in of_a])
    assert spread < 2.5 * (0.75 * 0.25 / np.mean([len(own) for own in of_a])) ** 0.5  # as chance has it
    apart = np.sort(np.concatenate(of_a))  # control: one source after the other
    assert np.std([part.mean() for part in np.array_split(apart, 30)]) > 3 * spread


def test_settings_are_the_sources_own() -> None:
    small = SourceConfig(path="x", max_pixels=256 * 256, prompt_dropout=1.0, context_dropout=1.0)
    mixed = mixture({"a": 400, "b": 400}, b=small)
    plan = Planner(mixed, DataConfig(tokens_per_pack=32_768, window_samples=400), 0, FLOPS.of_tokens)
    window = plan.window(0)
    own = window.samples >= 400
    assert window.drop_prompt[own].all()
    assert window.drop_context[own].all()
    assert window.drop_prompt[~own].mean() == pytest.approx(0.1, abs=0.05)
    assert not window.drop_context[~own].any()
    target, _ = mixed.image_tokens(np.arange(800))
    assert target[:400].max() == 4096
    assert target[400:].max() == 256
    assert mixed.shape(400 + int(target[400:].argmax()), drop_context=True).target_tokens == 256


def test_sizes_are_those_that_the_reader_gives(shards: Path) -> None:
    """Per sample and many at once, for two sources on the same shards at different resolutions."""
    index = ShardIndex.open(shards)
    parts = [Source(str(p), index, Fraction(1, 2), Transform(p, 16), 0.0, 0.0) for p in (64 * 64, 32 * 32)]
    mixed = Mixture(parts, 12)
    rows = np.random.default_rng(0).integers(0, 400, 60)
    target, context = mixed.image_tokens(rows)
    for row, of_target, of_context in zip(rows.tolist(), target, context, strict=True):
        number, own = mixed.locate(row)
        raw = SampleReader(index, parts[number].transform).read(own)
        shape = mixed.shape(row, drop_context=False)
        assert (shape.target_tokens, shape.context_tokens) == (of_target, of_context)
        assert raw.target.shape[:2] == (shape.target[0] * 16, shape.target[1] * 16)
        assert [c.shape[:2] for c in raw.contexts] == [(h * 16, w * 16) for h, w in shape.contexts]
    assert Counter(number for number, _ in map(mixed.locate, rows.tolist())).keys() == {0, 1}
