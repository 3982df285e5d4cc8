"""A sample read by offset is the sample that was packed, at the size that was planned."""

import gc
import io
import json
import math
import multiprocessing
import os
import pickle
import struct
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch.utils.data
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kontext_train.data import sample as sample_module
from kontext_train.data import storage
from kontext_train.data.index import ShardIndex, build_index
from kontext_train.data.sample import BadSample, SampleReader, fit_size, load_image
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
    return SampleReader(write_folder(folder, [{f"target.{suffix}": raw}]), 1 << 20, 1).read(0).target


# ------------------------------------------------------------------------------------------------------------ fit_size


@pytest.mark.parametrize(
    ("hw", "max_pixels", "multiple", "expected"),
    [
        ((1024, 1024), 1 << 20, 16, (1024, 1024)),  # fits exactly
        ((3072, 3072), 1 << 20, 16, (1024, 1024)),  # float scaling gives 1023.99… here and loses a row of patches
        ((512, 768), 1 << 20, 16, (512, 768)),  # small: never up
        ((1000, 1000), 1 << 20, 16, (992, 992)),
        ((2160, 3840), 1 << 20, 16, (768, 1360)),
        ((3, 5), 1 << 20, 16, (16, 16)),  # at least one multiple
        ((1, 100_000), 1 << 16, 16, (16, 4096)),  # thin: the raised side takes pixels from the long one
    ],
)
def test_fit_size_by_hand(hw: tuple[int, int], max_pixels: int, multiple: int, expected: tuple[int, int]) -> None:
    assert tuple(fit_size(np.array(hw), max_pixels, multiple)) == expected
    assert tuple(fit_size(np.array(hw[::-1]), max_pixels, multiple)) == expected[::-1]


def test_float_scaling_would_lose_a_patch() -> None:
    """Control: the exact root is there for a reason, common sizes among them."""
    wrong = [side for side in range(1025, 8192) if int(side * math.sqrt((1 << 20) / (side * side))) != 1024]
    assert wrong
    sides = np.array(wrong)
    assert (fit_size(np.stack([sides, sides], -1), 1 << 20, 16) == 1024).all()


side = st.integers(1, 100_000)


@given(st.lists(st.tuples(side, side), min_size=1), st.sampled_from([1, 8, 16, 32]), st.integers(1 << 10, 1 << 22))
@settings(max_examples=200, deadline=None)
def test_fit_size_properties(sizes: list[tuple[int, int]], multiple: int, max_pixels: int) -> None:
    fitted = fit_size(np.array(sizes, np.int32), max_pixels, multiple)
    assert fitted.dtype == np.int64
    assert (fitted % multiple == 0).all()
    assert (fitted >= multiple).all()
    assert (fitted.prod(-1) <= max_pixels).all()
    for (height, width), result in zip(sizes, fitted, strict=True):
        assert (fit_size(np.array([height, width]), max_pixels, multiple) == result).all()  # one by one, or all at once
        assert (fit_size(np.array([width, height]), max_pixels, multiple) == result[::-1]).all()
        if height * width <= max_pixels:
            ideal = (height, width)
        else:
            ideal = (math.isqrt(height * max_pixels // width), math.isqrt(width * max_pixels // height))
        if min(ideal) >= multiple:
            assert tuple(result) == tuple(side // multiple * multiple for side in ideal)


def test_integer_root_is_exact_around_squares() -> None:
    k = np.random.default_rng(0).integers(1, 1 << 31, 100_000)
    k[:100] = np.arange(1, 101)
    k[100:] >>= np.arange(k.size - 100) % 31
    k = np.maximum(k, 1)
    assert np.array_equal(sample_module._isqrt(k * k), k)
    assert np.array_equal(sample_module._isqrt(k * k - 1), k - 1)
    assert np.array_equal(sample_module._isqrt(k * k + 2 * k), k)
    assert (np.sqrt((k * k - 1).astype(np.float64)).astype(np.int64) != k - 1).any()  # control: floats alone are not


def test_fit_size_keeps_shape_and_takes_no_samples() -> None:
    assert fit_size(np.ones((4, 3, 2), np.int32), 256, 16).shape == (4, 3, 2)
    assert fit_size(np.empty((0, 2), np.int32), 256, 16).shape == (0, 2)


def test_fit_size_refuses_values_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"multiple is 0; it must be at least 1"):
        fit_size((4, 4), 100, 0)
    with pytest.raises(ValueError, match=r"max_pixels is 255; it must be at least multiple \*\* 2 = 256"):
        fit_size((4, 4), 255, 16)


# ------------------------------------------------------------------------------------------------------------- reading


def test_pixels_equal_those_that_webdataset_reads(tmp_path: Path) -> None:
    samples = [
        {"target.png": encode(noise(16, 32)), "context.0.jpg": encode(noise(32, 16, seed=1), "JPEG")},
        {"target.webp": encode(noise(48, 16, seed=2), "WEBP")},
        {"target.jpg": encode(noise(16, 16, seed=3), "JPEG")}
        | {f"context.{i}.png": encode(noise(16, 16 * (i + 1), seed=10 + i)) for i in range(11)},
    ]
    reader = SampleReader(write_folder(tmp_path, samples), 1 << 20, 16)
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
    reader = SampleReader(index, 64 * 64, 16)
    targets, contexts = fit_size(index.target_hw, 64 * 64, 16), fit_size(index.context_hw, 64 * 64, 16)
    for i in range(len(index)):
        sample = reader.read(i)
        assert sample.target.shape == (*targets[i], 3)
        assert sample.contexts[0].shape == (*contexts[i], 3)


def test_resize_covers_and_crops_the_centre(tmp_path: Path) -> None:
    # Left and right tenths are red and blue: a square of 160×200 keeps the middle 160 columns, so no colour is left.
    pixels = np.full((160, 200, 3), 128, np.uint8)
    pixels[:, :20], pixels[:, 180:] = (255, 0, 0), (0, 0, 255)
    index = write_folder(tmp_path, [{"target.png": encode(pixels)}])
    wide = SampleReader(index, 160 * 200, 8).read(0).target
    assert (wide[:, 0] == (255, 0, 0)).all()
    assert (wide[:, -1] == (0, 0, 255)).all()  # control: nothing is cropped where the ratio is kept
    square = SampleReader(index, 64 * 64, 64).read(0).target
    assert square.shape == (64, 64, 3)
    assert np.abs(square.astype(int) - 128)[:, 3:-3].max() <= 1


def test_downscaling_is_antialiased(tmp_path: Path) -> None:
    checkers = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    index = write_folder(tmp_path, [{"target.png": encode(checkers)}])
    small = SampleReader(index, 48 * 48, 16).read(0).target
    assert np.abs(small.astype(int) - 127.5).max() < 25  # grey; without a filter it stays black and white
    nearest = np.asarray(Image.fromarray(checkers).resize((48, 48), Image.Resampling.NEAREST))
    assert np.abs(nearest.astype(int) - 127.5).max() > 100


# -------------------------------------------------------------------------------------------------- modes, orientation


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, form: str, orientation: int) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation to the Image.Transpose that a camera applied
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    target = read_target(tmp_path, encode(stored, form, exif=exif, quality=95), form.lower())
    assert target.shape == upright.shape
    quarters = (slice(4, 12), slice(20, 28)), (slice(4, 20), slice(28, 44))
    for rows in quarters[0]:
        for columns in quarters[1]:
            assert np.abs(target[rows, columns].astype(int) - upright[rows, columns]).max() < 12


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_png_with_orientation_after_its_pixels_is_never_trained_unturned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = encode(noise(16, 32))
    end = raw.rindex(b"IEND") - 4
    late = raw[:end] + png_chunk(b"eXIf", exif.tobytes()[6:]) + raw[end:]
    with pytest.raises(BadSample, match=r"k0: target: decodes to 32×16, the index says 16×32"):
        read_target(tmp_path, late)


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    rgba = noise(16, 16, 4)
    rgba[:8, :, 3], rgba[8, :, 3] = 0, 255
    target = read_target(tmp_path, encode(rgba))
    assert (target[:8] == 255).all()
    assert np.array_equal(target[8], rgba[8, :, :3])
    alpha = rgba[9:, :, 3:].astype(float) / 255
    assert np.abs(target[9:] - (rgba[9:, :, :3] * alpha + 255 * (1 - alpha))).max() <= 1


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    indices = np.array([[0, 1], [2, 3]], np.uint8).repeat(8, 0).repeat(8, 1)
    image = Image.fromarray(indices, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)[indices]
    (tmp_path / "plain").mkdir()
    assert np.array_equal(read_target(tmp_path / "plain", encode(image)), colours)
    colours[:8, 8:] = 255
    (tmp_path / "clear").mkdir()
    assert np.array_equal(read_target(tmp_path / "clear", encode(image, transparency=1)), colours)


def test_grey_and_grey_with_alpha(tmp_path: Path) -> None:
    grey = noise(16, 16, 2)
    (tmp_path / "l").mkdir()
    assert np.array_equal(read_target(tmp_path / "l", encode(grey[..., 0])), grey[..., :1].repeat(3, -1))
    grey[..., 1] = np.arange(16) % 2 * 255
    (tmp_path / "la").mkdir()
    white = np.where(grey[..., 1:] > 0, grey[..., :1], 255).repeat(3, -1)
    assert np.array_equal(read_target(tmp_path / "la", encode(Image.fromarray(grey, "LA"))), white)


def test_black_and_white(tmp_path: Path) -> None:
    bits = noise(16, 16, 1)[..., 0] > 127
    assert np.array_equal(read_target(tmp_path, encode(Image.fromarray(bits)))[..., 0] > 0, bits)


def test_sixteen_bit_grey_keeps_its_tones(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    assert Image.open(io.BytesIO(encode(ramp))).mode.startswith("I")  # it is the 16-bit case
    target = read_target(tmp_path, encode(ramp))
    assert np.array_equal(target[..., 0].ravel(), np.arange(256))


def test_cmyk(tmp_path: Path) -> None:
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:8, :, 0], ink[8:, :, 1] = 255, 255  # cyan above magenta
    target = read_target(tmp_path, encode(Image.fromarray(ink, "CMYK"), "JPEG", quality=95), "jpg").astype(int)
    assert np.abs(target[2:6] - (0, 255, 255)).max() < 8
    assert np.abs(target[10:14] - (255, 0, 255)).max() < 8


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
    reader = SampleReader(index, 1 << 20, 16)
    with pytest.raises(BadSample, match=r"000\.tar: k0: context\.0: cannot be decoded \(UnidentifiedImageError"):
        reader.read(0)
    assert reader.read(1).key == "k1"  # its neighbour is good


def test_image_with_a_good_header_and_cut_pixels(tmp_path: Path) -> None:
    index = write_folder(tmp_path, [{"target.jpg": encode(noise(64, 64), "JPEG")[:-500]}])  # the index cannot see this
    with pytest.raises(BadSample, match=r"000\.tar: k0: target: cannot be decoded \(OSError: .*truncated"):
        SampleReader(index, 1 << 20, 16).read(0)


def test_image_of_another_size_than_indexed(tmp_path: Path) -> None:
    index = write_folder(tmp_path, [{"target.png": encode(np.zeros((16, 32), np.uint8))}])
    replacement = encode(np.zeros((32, 16), np.uint8))
    span = index.location(0).target
    overwrite(index, span.offset, replacement.ljust(span.size, b"\0"))
    with pytest.raises(BadSample, match=r"k0: target: decodes to 32×16, the index says 16×32"):
        SampleReader(index, 1 << 20, 16).read(0)


def test_bad_json_bytes(tmp_path: Path) -> None:
    index = write_folder(tmp_path, [{"target.png": encode(noise(16, 16))}])
    overwrite(index, index.location(0).json.offset, b"!")
    with pytest.raises(BadSample, match=r"000\.tar: k0: json: json cannot be parsed"):
        SampleReader(index, 1 << 20, 16).read(0)


def test_shard_that_was_cut_under_a_run(tmp_path: Path) -> None:
    index = write_folder(tmp_path, [{"target.png": encode(noise(16, 16))}])
    span = index.location(0).target
    os.truncate(index.location(0).shard, span.offset + span.size - 7)
    with pytest.raises(StorageError, match=r"000\.tar has \d+ bytes, \d+ when indexed"):
        SampleReader(index, 1 << 20, 16).read(0)


def test_shard_that_was_modified_under_a_run_is_refused_by_name(tmp_path: Path) -> None:
    index = write_folder(tmp_path, [{"target.png": encode(noise(16, 16, seed=i))} for i in range(2)], per_shard=1)
    reader = SampleReader(index, 1 << 20, 16)
    reader.read(0)  # the file is open when it changes
    os.utime(index.location(0).shard, ns=(0, 1))
    with pytest.raises(StorageError, match=r"000\.tar was modified after it was indexed.*index them again"):
        reader.read(0)
    assert reader.read(1).key == "k1"  # in another shard


def test_lost_storage_is_no_bad_sample(tmp_path: Path) -> None:
    index = write_folder(tmp_path, [{"target.png": encode(noise(16, 16))}])
    index.location(0).shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"000\.tar"):
        SampleReader(index, 1 << 20, 16).read(0)


def test_reader_refuses_bad_sizes_at_once(tmp_path: Path) -> None:
    index = write_folder(tmp_path, [{"target.png": encode(noise(16, 16))}])
    with pytest.raises(ValueError, match="max_pixels is 100; it must be at least"):
        SampleReader(index, 100, 16)


def test_load_image_is_what_the_reader_gives(tmp_path: Path) -> None:
    raw = encode(noise(50, 90, 4))
    file = tmp_path / "x.png"
    file.write_bytes(raw)
    expected = SampleReader(write_folder(tmp_path, [{"target.png": raw}]), 32 * 32, 16).read(0).target
    assert np.array_equal(load_image(file, 32 * 32, 16), expected)
    file.write_bytes(raw[:-100])
    with pytest.raises(ValueError, match=r"x\.png: cannot be decoded"):
        load_image(file, 32 * 32, 16)


# ----------------------------------------------------------------------------------------------- processes and threads


@pytest.fixture
def reader(tmp_path: Path) -> SampleReader:
    """Twelve samples in six shards."""
    samples = [{"target.png": encode(noise(16, 16, seed=i))} for i in range(12)]
    return SampleReader(write_folder(tmp_path, samples), 1 << 20, 16)


def expect(sample: object, i: int) -> None:
    assert np.array_equal(sample.target, noise(16, 16, seed=i))  # type: ignore[attr-defined]


def open_files(folder: Path) -> int:
    """Open descriptors of shards in the folder; others come and go with garbage collection."""
    gc.collect()
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.path.exists(link) and os.readlink(link).startswith(f"{folder}/") for link in links)


def test_open_files_are_few_and_closed(reader: SampleReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "OPEN_SHARDS", 2)
    small = SampleReader(reader.index, 1 << 20, 16)
    assert open_files(reader.index.folder) == 0
    for i in [*range(12), *range(12)]:
        expect(small.read(i), i)
    assert open_files(reader.index.folder) == 2
    del small
    assert open_files(reader.index.folder) == 0


def test_threads_share_a_reader(reader: SampleReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "OPEN_SHARDS", 1)  # every read closes a file that another thread may be reading
    small = SampleReader(reader.index, 1 << 20, 16)
    with ThreadPoolExecutor(8) as pool:
        for i, sample in enumerate(pool.map(small.read, list(range(12)) * 10)):
            expect(sample, i % 12)


def test_reader_is_pickled_without_its_files(reader: SampleReader) -> None:
    expect(reader.read(3), 3)
    packed = pickle.dumps(reader)
    assert len(packed) < 600
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
