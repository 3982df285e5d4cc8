"""A sample read by offset is the sample that was packed, at the size that was planned."""

import gc
import io
import json
import multiprocessing
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch.utils.data
import webdataset
from PIL import Image

from kontext_train.data import storage
from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import build_index
from kontext_train.data.sample import BadSample, SampleReader
from kontext_train.data.transforms import Transform, fit_size
from kontext_train.errors import StorageError


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(image: Image.Image | np.ndarray, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **options)
    return file.getvalue()


def write_folder(folder: Path, samples: list[dict[str, bytes]], per_shard: int = 2) -> ShardIndex:
    """Samples as {"target.png": …}; each gets a json with its number unless it brings one."""
    with webdataset.ShardWriter(f"{folder}/%03d.tar", maxcount=per_shard, verbose=0, encoder=False) as writer:
        for i, members in enumerate(samples):
            about = {"json": json.dumps({"prompt": f"prompt {i}", "number": i}).encode()}
            writer.write({"__key__": f"k{i}"} | about | members)
    report = build_index(folder)
    assert report.problems == []
    return ShardIndex.open(folder)


def read_target(folder: Path, raw: bytes, suffix: str = "png") -> np.ndarray:
    """One image through index and reader, at its own size."""
    return SampleReader(write_folder(folder, [{f"target.{suffix}": raw}]), Transform(1 << 20, 1)).read(0).target


# ------------------------------------------------------------------------------------------------------------- reading


def test_pixels_equal_those_that_webdataset_reads(tmp_path: Path) -> None:
    samples = [
        {"target.png": encode(noise(16, 32)), "context.0.jpg": encode(noise(32, 16, seed=1), "JPEG")},
        {"target.webp": encode(noise(48, 16, seed=2), "WEBP")},
        {"target.jpg": encode(noise(16, 16, seed=3), "JPEG")}
        | {f"context.{i}.png": encode(noise(16, 16 * (i + 1), seed=10 + i)) for i in range(11)},
    ]
    reader = SampleReader(write_folder(tmp_path, samples), Transform(1 << 20, 16))
    shards = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("rgb8"))
    assert len(theirs) == len(samples)
    for i in (2, 0, 1):  # any order
        ours, other = reader.read(i), theirs[i]
        names = {name.rsplit(".", 1)[0]: name for name in samples[i]}
        assert (ours.key, ours.shard, ours.prompt) == (f"k{i}", Path(shards[i // 2]).name, f"prompt {i}")
        assert ours.metadata == {"number": i}
        assert ours.target.dtype == np.uint8
        assert np.array_equal(ours.target, other[names["target"]])
        assert len(ours.contexts) == len(names) - 1
        for number, context in enumerate(ours.contexts):
            assert np.array_equal(context, other[names[f"context.{number}"]])
    assert not np.array_equal(reader.read(0).target, theirs[2]["target.jpg"])  # control


def test_arrays_can_be_written_to(tmp_path: Path) -> None:
    target = read_target(tmp_path, encode(noise(4, 4)))
    torch.from_numpy(target).add_(1)  # torch warns about read-only memory


def test_images_have_the_planned_size_exactly(tmp_path: Path) -> None:
    sizes = [(1, 1), (17, 31), (33, 200), (200, 33), (300, 301), (3, 400), (64, 64), (255, 129)]
    samples = [{"target.png": encode(noise(*hw)), "context.0.png": encode(noise(*hw[::-1]))} for hw in sizes]
    index = write_folder(tmp_path, samples)
    reader = SampleReader(index, Transform(64 * 64, 16))
    targets, contexts = fit_size(index.target_hw, 64 * 64, 16), fit_size(index.context_hw, 64 * 64, 16)
    for i in range(len(index)):
        sample = reader.read(i)
        assert sample.target.shape == (*targets[i], 3)
        assert sample.contexts[0].shape == (*contexts[i], 3)


# --------------------------------------------------------------------------------------------------------- bad samples


def overwrite(index: ShardIndex, offset: int, content: bytes) -> None:
    """Changes bytes of the first shard behind the index's back."""
    shard = index.location(0).shard
    state = shard.stat()
    with open(shard, "r+b") as file:
        file.seek(offset)
        file.write(content)
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_bad_image_bytes_name_shard_key_and_reason(tmp_path: Path) -> None:
    index = write_folder(
        tmp_path, [{"target.png": encode(noise(16, 16)), "context.0.jpg": encode(noise(64, 64), "JPEG")}] * 2
    )
    span = index.location(0).contexts[0]
    overwrite(index, span.offset, b"\0" * span.size)
    reader = SampleReader(index, Transform(1 << 20, 16))
    with pytest.raises(BadSample, match=r"000\.tar: k0: context\.0: cannot be decoded \(not a PNG, JPEG or WebP"):
        reader.read(0)
    assert reader.read(1).key == "k1"  # its neighbour is good


def test_image_with_a_good_header_and_cut_pixels(tmp_path: Path) -> None:
    index = write_folder(tmp_path, [{"target.jpg": encode(noise(64, 64), "JPEG")[:-500]}])  # the index cannot see this
    with pytest.raises(BadSample, match=r"000\.tar: k0: target: cannot be decoded \(OSError: .*truncated"):
        SampleReader(index, Transform(1 << 20, 16)).read(0)


def test_image_of_another_size_than_indexed(tmp_path: Path) -> None:
    index = write_folder(tmp_path, [{"target.png": encode(np.zeros((16, 32), np.uint8))}])
    replacement = encode(np.zeros((32, 16), np.uint8))
    span = index.location(0).target
    overwrite(index, span.offset, replacement.ljust(span.size, b"\0"))
    with pytest.raises(BadSample, match=r"k0: target: decodes to 32×16, the index says 16×32"):
        SampleReader(index, Transform(1 << 20, 16)).read(0)


def test_bad_json_bytes(tmp_path: Path) -> None:
    index = write_folder(tmp_path, [{"target.png": encode(noise(16, 16))}])
    overwrite(index, index.location(0).json.offset, b"!")
    with pytest.raises(BadSample, match=r"000\.tar: k0: json: json cannot be parsed"):
        SampleReader(index, Transform(1 << 20, 16)).read(0)


def test_shard_that_was_cut_under_a_run(tmp_path: Path) -> None:
    index = write_folder(tmp_path, [{"target.png": encode(noise(16, 16))}])
    span = index.location(0).target
    os.truncate(index.location(0).shard, span.offset + span.size - 7)
    with pytest.raises(StorageError, match=r"000\.tar has \d+ bytes, \d+ when indexed"):
        SampleReader(index, Transform(1 << 20, 16)).read(0)


def test_shard_that_was_modified_under_a_run_is_refused_by_name(tmp_path: Path) -> None:
    index = write_folder(tmp_path, [{"target.png": encode(noise(16, 16, seed=i))} for i in range(2)], per_shard=1)
    reader = SampleReader(index, Transform(1 << 20, 16))
    reader.read(0)  # the file is open when it changes
    os.utime(index.location(0).shard, ns=(0, 1))
    with pytest.raises(StorageError, match=r"000\.tar was modified after it was indexed.*index them again"):
        reader.read(0)
    assert reader.read(1).key == "k1"  # in another shard


def test_lost_storage_is_no_bad_sample(tmp_path: Path) -> None:
    index = write_folder(tmp_path, [{"target.png": encode(noise(16, 16))}])
    index.location(0).shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"000\.tar"):
        SampleReader(index, Transform(1 << 20, 16)).read(0)


# ----------------------------------------------------------------------------------------------- processes and threads


@pytest.fixture
def reader(tmp_path: Path) -> SampleReader:
    """Twelve samples in six shards."""
    samples = [{"target.png": encode(noise(16, 16, seed=i))} for i in range(12)]
    return SampleReader(write_folder(tmp_path, samples), Transform(1 << 20, 16))


def expect(sample: object, i: int) -> None:
    assert np.array_equal(sample.target, noise(16, 16, seed=i))  # type: ignore[attr-defined]


def open_files(folder: Path) -> int:
    """Open descriptors of shards in the folder; others come and go with garbage collection."""
    gc.collect()
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.path.exists(link) and os.readlink(link).startswith(f"{folder}/") for link in links)


def test_open_files_are_few_and_closed(reader: SampleReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "OPEN_SHARDS", 2)
    small = SampleReader(reader.index, Transform(1 << 20, 16))
    assert open_files(reader.index.folder) == 0
    for i in [*range(12), *range(12)]:
        expect(small.read(i), i)
    assert open_files(reader.index.folder) == 2
    del small
    assert open_files(reader.index.folder) == 0


def test_threads_share_a_reader(reader: SampleReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "OPEN_SHARDS", 1)  # every read closes a file that another thread may be reading
    small = SampleReader(reader.index, Transform(1 << 20, 16))
    with ThreadPoolExecutor(8) as pool:
        for i, sample in enumerate(pool.map(small.read, list(range(12)) * 10)):
            expect(sample, i % 12)


def test_reader_is_pickled_without_its_files(reader: SampleReader) -> None:
    expect(reader.read(3), 3)
    packed = pickle.dumps(reader)
    assert len(packed) < 1000
    expect(pickle.loads(packed).read(3), 3)


def _read_in_child(reader: SampleReader, results: "multiprocessing.Queue[tuple[int, bytes]]") -> None:
    for i in range(12):
        results.put((i, reader.read(i).target.tobytes()))


def test_forked_readers_share_open_files_without_harm(reader: SampleReader) -> None:
    for i in range(12):  # all shards open before the fork
        reader.read(i)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=_read_in_child, args=(reader, results)) for _ in range(2)]
    for child in children:
        child.start()
    for i in list(range(12)) * 3:
        expect(reader.read(i), i)
    for _ in range(24):
        i, raw = results.get(timeout=10)
        assert raw == noise(16, 16, seed=i).tobytes()
    for child in children:
        child.join()


class _Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, reader: SampleReader) -> None:
        self.reader = reader

    def __getitem__(self, i: int) -> np.ndarray:
        return self.reader.read(i).target


def test_bad_sample_crosses_a_dataloader_worker(reader: SampleReader) -> None:
    overwrite(reader.index, reader.index.location(0).target.offset, b"\0" * 50)
    loader = torch.utils.data.DataLoader(_Rows(reader), batch_size=None, sampler=[1, 0], num_workers=1)
    rows = iter(loader)
    assert np.array_equal(next(rows), noise(16, 16, seed=1))
    with pytest.raises(BadSample, match=r"000\.tar: k0: target: cannot be decoded"):
        next(rows)


def test_tarfile_agrees_on_offsets(reader: SampleReader) -> None:
    location = reader.index.location(5)
    with tarfile.open(location.shard) as tar:
        member = tar.getmember("k5.target.png")
        assert location.target == (member.offset_data, member.size)
        file = tar.extractfile(member)
        assert file is not None
        assert np.array_equal(np.asarray(Image.open(file)), reader.read(5).target)
