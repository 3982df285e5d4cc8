"""From a planned pack to what the objective sees."""

import multiprocessing
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from kontext_train.data.batch import PixelBatch
from kontext_train.data.config import DataConfig
from kontext_train.data.encode import Encoders, encode, load_encoders
from kontext_train.data.index import ShardIndex
from kontext_train.data.loader import PackReader, load_packs, plan_ahead
from kontext_train.data.plan import Pack, Planner, Position
from kontext_train.data.sample import BadSample
from kontext_train.data.sources import Mixture, Source
from kontext_train.data.transforms import Transform
from kontext_train.models.config import EncoderDtype, EncodersConfig, FluxConfig
from kontext_train.models.flops import forward_flops
from kontext_train.models.kontext import tokens_from_latent
from kontext_train.randomness import VisitRandom
from tests.runs import ENCODERS, broken_copy


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    config = EncodersConfig(path=str(ENCODERS), t5_tokens=12, dtype=EncoderDtype.float32)
    return load_encoders(config, torch.device("cpu"))


@pytest.fixture(scope="module")
def source(shards: Path) -> PackReader:
    return pack_reader(shards)


def pack_reader(folder: Path, holes: bool = False) -> PackReader:
    index = ShardIndex.open(folder)
    source = Source("train", index, Fraction(1), Transform(64 * 64, 16), 0.0, 0.0)
    return PackReader(Mixture([source], 12), holes=holes)


def pack_of(samples: list[int], drop_context: bool = False, drop_prompt: bool = False, counts: bool = True) -> Pack:
    n = len(samples)
    return Pack(
        samples=np.array(samples),
        visits=np.array(samples) + 1000,
        drop_prompt=np.full(n, drop_prompt),
        drop_context=np.full(n, drop_context),
        counts=np.full(n, counts),
        samples_in_step=2 * n,
        position=Position(),
    )


def one_of_each(source: PackReader) -> list[int]:
    """Samples with no, one and two context images."""
    contexts = np.diff(source.mixture.sources[0].index.context_start)
    return [int(np.flatnonzero(contexts == n)[0]) for n in (0, 1, 2)]


def test_a_batch_holds_the_images_of_the_shard(source: PackReader) -> None:
    chosen = one_of_each(source)
    batch = source[pack_of(chosen)]
    raws = [source.readers[0].read(i) for i in chosen]
    for target, raw in zip(batch.targets, raws, strict=True):
        np.testing.assert_array_equal(target.permute(1, 2, 0), raw.target)
    for context, expected in zip(batch.contexts, [c for r in raws for c in r.contexts], strict=True):
        np.testing.assert_array_equal(context.permute(1, 2, 0), expected)
    assert batch.prompts == [r.prompt for r in raws]
    assert [s.tokens for s in batch.layout.shapes] == [source.mixture.shape(i, False).tokens for i in chosen]
    assert batch.keys[0].startswith("train:train-00000.tar:train_")


def test_dropped_prompts_and_contexts_are_gone(source: PackReader) -> None:
    batch = source[pack_of(one_of_each(source), drop_context=True, drop_prompt=True)]
    assert batch.prompts == ["", "", ""]
    assert batch.contexts == []
    assert all(s.contexts == () for s in batch.layout.shapes)


def test_encoding_equals_each_image_alone(source: PackReader, encoders: Encoders) -> None:
    batch = source[pack_of(one_of_each(source))]
    encoders.sample_latents = False
    packed = encode(batch, encoders, VisitRandom(0))
    encoders.sample_latents = True
    alone = [tokens_from_latent(encoders.autoencoder.encode(i[None])[0][0]) for i in batch.targets]
    torch.testing.assert_close(packed.x_MC, torch.cat(alone), atol=1e-5, rtol=1e-5)
    contexts = [tokens_from_latent(encoders.autoencoder.encode(i[None])[0][0]) for i in batch.contexts]
    torch.testing.assert_close(packed.cond.context_KC, torch.cat(contexts), atol=1e-5, rtol=1e-5)


def test_noise_belongs_to_the_visit_not_to_the_pack(source: PackReader, encoders: Encoders) -> None:
    chosen = one_of_each(source)

    def latents(samples: list[int], seed: int = 0) -> list[torch.Tensor]:
        batch = source[pack_of(samples)]
        return list(encode(batch, encoders, VisitRandom(seed)).x_MC.split(batch.layout.target_lengths))

    together, last_alone = latents(chosen), latents(chosen[2:])
    torch.testing.assert_close(together[2], last_alone[0], atol=1e-5, rtol=1e-5)
    assert (latents(chosen, seed=1)[2] - together[2]).abs().max() > 1e-3


def test_weights_make_the_global_mean_over_samples(source: PackReader, encoders: Encoders) -> None:
    batch = encode(source[pack_of(one_of_each(source))], encoders, VisitRandom(0))
    assert batch.token_weight_M().sum().item() == pytest.approx(0.5)  # this pack is half of its step's samples
    per_sample = [w.sum().item() for w in batch.token_weight_M().split(batch.layout.target_lengths)]
    assert per_sample == pytest.approx([1 / 6] * 3)
    filler = source[pack_of([0], counts=False)]
    assert encode(filler, encoders, VisitRandom(0)).token_weight_M().sum() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_keep_the_order(source: PackReader, workers: int) -> None:
    packs = [pack_of([i, i + 1]) for i in range(0, 20, 2)]
    batches: list[PixelBatch] = list(load_packs(packs, source, DataConfig(workers=workers)))
    assert [b.visits for b in batches] == [p.visits.tolist() for p in packs]


def test_a_bad_sample_leaves_a_hole_of_its_size_and_touches_no_other(
    source: PackReader, shards: Path, tmp_path: Path, encoders: Encoders
) -> None:
    chosen = one_of_each(source)
    holed = pack_reader(broken_copy(shards, tmp_path / "broken", chosen[1:2]), holes=True)
    whole, batch = source[pack_of(chosen)], holed[pack_of(chosen)]
    assert batch.layout.shapes == whole.layout.shapes
    assert [t.shape for t in (*batch.targets, *batch.contexts)] == [t.shape for t in (*whole.targets, *whole.contexts)]
    assert batch.keys == whole.keys
    assert batch.prompts == [whole.prompts[0], "", whole.prompts[2]]
    (note,) = batch.bad
    assert (note.visit, note.key) == (1000 + chosen[1], whole.keys[1].split(":")[-1])
    assert note.shard.endswith("broken/train-00000.tar")
    assert "target: cannot be decoded" in note.reason
    assert whole.bad == []
    assert (batch.weight_S > 0).tolist() == [True, False, True]
    assert batch.samples_in_step == whole.samples_in_step
    lengths = batch.layout.target_lengths
    ours, theirs = (encode(b, encoders, VisitRandom(0)) for b in (batch, whole))
    for i, weight in enumerate((1, 0, 1)):
        x, expected = (b.x_MC.split(lengths)[i] for b in (ours, theirs))
        w, planned = (b.token_weight_M().split(lengths)[i] for b in (ours, theirs))
        torch.testing.assert_close(w, planned * weight)
        assert torch.allclose(x, expected, atol=1e-5) == (weight == 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_without_holes_a_bad_sample_stops_the_reading(
    source: PackReader, shards: Path, tmp_path: Path, workers: int
) -> None:
    strict = pack_reader(broken_copy(shards, tmp_path / "broken", [3]))
    batches = load_packs([pack_of([1, 2]), pack_of([3])], strict, DataConfig(workers=workers))
    next(batches)
    with pytest.raises(BadSample, match=r"train-00000\.tar: train_\w+: target: cannot be decoded"):
        next(batches)


def test_planning_ahead_is_bounded_ends_with_its_reader_and_gives_the_same(source: PackReader) -> None:
    config = DataConfig(window_samples=50, workers=1, tokens_per_pack=500)
    planner = Planner(source.mixture, config, 0, forward_flops(FluxConfig()).of_tokens)
    ahead = plan_ahead(planner, 3, config)
    before = set(multiprocessing.active_children())
    found = [next(ahead) for _ in range(3)]
    (process,) = set(multiprocessing.active_children()) - before
    for number, window in enumerate(found, 3):
        expected = planner.window(number)
        assert window.number == number
        assert np.array_equal(window.visits, expected.visits)
        assert np.array_equal(window.first, expected.first)
    ahead.close()
    process.join(timeout=20)
    assert not process.is_alive()
