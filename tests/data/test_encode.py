"""From a planned pack to what the objective sees."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kontext_train.data.batch import PixelBatch, read_pack
from kontext_train.data.config import DataConfig
from kontext_train.data.encode import Encoders, encode, load_encoders
from kontext_train.data.index import ShardIndex
from kontext_train.data.loader import PackReader, load_packs
from kontext_train.data.plan import Pack, Position, SampleSizes, sample_sizes
from kontext_train.data.sample import SampleReader
from kontext_train.data.transforms import Transform
from kontext_train.models.config import EncoderDtype, EncodersConfig
from kontext_train.models.kontext import tokens_from_latent
from kontext_train.randomness import VisitRandom
from tests.runs import ENCODERS


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    config = EncodersConfig(path=str(ENCODERS), t5_tokens=12, dtype=EncoderDtype.float32)
    return load_encoders(config, torch.device("cpu"))


@pytest.fixture(scope="module")
def source(shards: Path) -> tuple[SampleReader, SampleSizes]:
    index = ShardIndex.open(shards)
    return SampleReader(index, Transform(64 * 64, 16)), sample_sizes(index, Transform(64 * 64, 16), 12)


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


def one_of_each(sizes: SampleSizes) -> list[int]:
    """Samples with no, one and two context images."""
    contexts = np.diff(sizes.context_start)
    return [int(np.flatnonzero(contexts == n)[0]) for n in (0, 1, 2)]


def test_a_batch_holds_the_images_of_the_shard(source: tuple[SampleReader, SampleSizes]) -> None:
    reader, sizes = source
    chosen = one_of_each(sizes)
    batch = read_pack(pack_of(chosen), reader, sizes)
    raws = [reader.read(i) for i in chosen]
    for target, raw in zip(batch.targets, raws, strict=True):
        np.testing.assert_array_equal(target.permute(1, 2, 0), raw.target)
    for context, expected in zip(batch.contexts, [c for r in raws for c in r.contexts], strict=True):
        np.testing.assert_array_equal(context.permute(1, 2, 0), expected)
    assert batch.prompts == [r.prompt for r in raws]
    assert [s.tokens for s in batch.layout.shapes] == sizes.tokens(np.array(chosen), np.zeros(3, dtype=bool)).tolist()
    assert batch.keys[0].startswith("train-00000.tar:train_")


def test_dropped_prompts_and_contexts_are_gone(source: tuple[SampleReader, SampleSizes]) -> None:
    reader, sizes = source
    batch = read_pack(pack_of(one_of_each(sizes), drop_context=True, drop_prompt=True), reader, sizes)
    assert batch.prompts == ["", "", ""]
    assert batch.contexts == []
    assert all(s.contexts == () for s in batch.layout.shapes)


def test_encoding_equals_each_image_alone(source: tuple[SampleReader, SampleSizes], encoders: Encoders) -> None:
    reader, sizes = source
    batch = read_pack(pack_of(one_of_each(sizes)), reader, sizes)
    encoders.sample_latents = False
    packed = encode(batch, encoders, VisitRandom(0))
    encoders.sample_latents = True
    alone = [tokens_from_latent(encoders.autoencoder.encode(i[None])[0][0]) for i in batch.targets]
    torch.testing.assert_close(packed.x_MC, torch.cat(alone), atol=1e-5, rtol=1e-5)
    contexts = [tokens_from_latent(encoders.autoencoder.encode(i[None])[0][0]) for i in batch.contexts]
    torch.testing.assert_close(packed.cond.context_KC, torch.cat(contexts), atol=1e-5, rtol=1e-5)


def test_noise_belongs_to_the_visit_not_to_the_pack(
    source: tuple[SampleReader, SampleSizes], encoders: Encoders
) -> None:
    reader, sizes = source
    chosen = one_of_each(sizes)

    def latents(samples: list[int], seed: int = 0) -> list[torch.Tensor]:
        batch = read_pack(pack_of(samples), reader, sizes)
        return list(encode(batch, encoders, VisitRandom(seed)).x_MC.split(batch.layout.target_lengths))

    together, last_alone = latents(chosen), latents(chosen[2:])
    torch.testing.assert_close(together[2], last_alone[0], atol=1e-5, rtol=1e-5)
    assert (latents(chosen, seed=1)[2] - together[2]).abs().max() > 1e-3


def test_weights_make_the_global_mean_over_samples(
    source: tuple[SampleReader, SampleSizes], encoders: Encoders
) -> None:
    reader, sizes = source
    batch = encode(read_pack(pack_of(one_of_each(sizes)), reader, sizes), encoders, VisitRandom(0))
    assert batch.token_weight_M().sum().item() == pytest.approx(0.5)  # this pack is half of its step's samples
    per_sample = [w.sum().item() for w in batch.token_weight_M().split(batch.layout.target_lengths)]
    assert per_sample == pytest.approx([1 / 6] * 3)
    filler = read_pack(pack_of([0], counts=False), reader, sizes)
    assert encode(filler, encoders, VisitRandom(0)).token_weight_M().sum() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_keep_the_order(source: tuple[SampleReader, SampleSizes], workers: int) -> None:
    reader, sizes = source
    packs = [pack_of([i, i + 1]) for i in range(0, 20, 2)]
    batches: list[PixelBatch] = list(load_packs(packs, PackReader(reader, sizes), DataConfig(workers=workers)))
    assert [b.visits for b in batches] == [p.visits.tolist() for p in packs]
