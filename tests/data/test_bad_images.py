"""Whatever bytes an image member holds: pixels, or a bad sample with shard, key and reason; in bounded time and memory.

The index may refuse a member first, with the same name. What counts is that nothing crashes, hangs or trains unnoticed.
"""

import io
import multiprocessing
import resource
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import build_index
from kontext_train.data.sample import BadSample, SampleReader
from kontext_train.data.transforms import Transform
from tests.data.test_index import write_tar
from tests.data.test_sample import encode, noise
from tests.data.test_transforms import png_chunk

TRANSFORM = Transform(64 * 64, 16)


def fate(folder: Path, raw: bytes, suffix: str = "png") -> str:
    """What becomes of a member, through index and reader: `read`, or the reason why not."""
    folder.mkdir(exist_ok=True)
    write_tar(folder / "a.tar", [("k.json", b'{"prompt": ""}'), (f"k.target.{suffix}", raw)])
    report = build_index(folder)
    if report.problems:
        (problem,) = report.problems
        assert (problem.shard, problem.key) == ("a.tar", "k")
        return problem.reason
    index = ShardIndex.open(folder)
    try:
        target = SampleReader(index, TRANSFORM).read(0).target
    except BadSample as error:
        named, reason = str(error).split(": target: ")
    else:
        assert target.shape == (*TRANSFORM.size(index.target_hw[0]).tolist(), 3)
        assert target.dtype == np.uint8
        return "read"
    assert named == f"{folder / 'a.tar'}: k"
    return reason


GOOD = {
    "png": encode(noise(70, 90)),
    "rgba.png": encode(noise(70, 90, 4)),
    "jpg": encode(noise(70, 90), "JPEG"),
    "progressive.jpg": encode(noise(70, 90), "JPEG", progressive=True),
    "webp": encode(noise(70, 90), "WEBP"),
    "lossless.webp": encode(noise(70, 90, 4), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.7, 0.98])
def test_truncated_images_have_a_name(tmp_path: Path, name: str, kept: float) -> None:
    raw, suffix = GOOD[name], name.split(".")[-1]
    assert fate(tmp_path / "whole", raw, suffix) == "read"
    reason = fate(tmp_path / "cut", raw[: int(len(raw) * kept)], suffix)
    if kept == 0:
        assert reason == "target is empty (0 bytes)"
    else:
        assert "readable" in reason or "cannot be decoded" in reason, reason


def frames(form: str) -> bytes:
    file = io.BytesIO()
    pictures = [Image.fromarray(noise(20, 20, seed=i)) for i in range(3)]
    pictures[0].save(
        file, form, save_all=True, append_images=pictures[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    return file.getvalue()


@pytest.mark.parametrize(("form", "suffix"), [("PNG", "png"), ("WEBP", "webp")])
def test_of_an_animation_the_first_frame_counts(form: str, suffix: str) -> None:
    first = Transform(1 << 20, 1).apply(io.BytesIO(frames(form)))
    assert np.array_equal(first, noise(20, 20))


STRANGE = {
    "gif": frames("GIF"),
    "bmp": encode(noise(20, 20), "BMP"),
    "tiff": encode(noise(20, 20), "TIFF"),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "zeros": bytes(1000),
    "ps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_other_formats_behind_a_good_suffix_have_a_name(tmp_path: Path, name: str, suffix: str) -> None:
    assert "not a readable PNG, JPEG or WebP image" in fate(tmp_path, STRANGE[name], suffix)


MODES = {
    "1.png": encode(Image.fromarray(noise(30, 40, 1)[..., 0] > 99)),
    "L.png": encode(noise(30, 40, 1)[..., 0]),
    "I;16.png": encode(noise(30, 40, 1)[..., 0].astype(np.uint16) * 257),
    "LA.png": encode(Image.fromarray(noise(30, 40, 2), "LA")),
    "RGBA.png": encode(noise(30, 40, 4)),
    "P.png": encode(Image.fromarray(noise(30, 40)).quantize(16)),
    "P transparent.png": encode(Image.fromarray(noise(30, 40)).quantize(16), transparency=b"\0\x80\xff"),
    "RGB transparent.png": encode(noise(30, 40), transparency=(1, 2, 3)),
    "L.jpg": encode(noise(30, 40, 1)[..., 0], "JPEG"),
    "CMYK.jpg": encode(Image.fromarray(noise(30, 40, 4), "CMYK"), "JPEG"),
    "444.jpg": encode(noise(30, 40), "JPEG", subsampling=0),
    "RGBA.webp": encode(noise(30, 40, 4), "WEBP"),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_is_read(tmp_path: Path, name: str) -> None:
    assert fate(tmp_path, MODES[name], name.split(".")[-1]) == "read"


@pytest.mark.parametrize("colour", [2, 6])
def test_sixteen_bit_colour_keeps_its_high_bytes(colour: int) -> None:
    """Pillow cannot write these, so the file is put together here."""
    channels = {2: 3, 6: 4}[colour]
    high = noise(8, 9, channels)
    high[..., 3:] = 255
    wide = (high.astype(">u2") << 8 | 0x7F).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    head = struct.pack(">IIBBBBB", 9, 8, 16, colour, 0, 0, 0)
    chunks = png_chunk(b"IHDR", head) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    target = Transform(1 << 20, 1).apply(io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunks))
    assert np.array_equal(target, high[..., :3])


def test_a_bomb_is_refused_by_name(tmp_path: Path) -> None:
    """A PNG of 400 megapixels in 50 KB; and a small one with a comment that unpacks to 100 MB."""
    bits = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(20_000 * 2501), 9)
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", bits) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    assert len(bomb) < 60_000
    assert "DecompressionBombError" in fate(tmp_path / "pixels", bomb)
    raw = encode(noise(20, 20))
    comment = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(100 << 20), 9))
    reason = fate(tmp_path / "comment", raw[:33] + comment + raw[33:])
    assert "Decompressed data too large" in reason


def _read_large(connection, raw: bytes) -> None:  # type: ignore[no-untyped-def]
    """In a process that may use 1.5 GiB more than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 29), used + (3 << 29)))
    try:
        connection.send(str(Transform(1 << 20, 16).apply(io.BytesIO(raw)).shape))
    except ValueError as error:
        connection.send(str(error))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("form", ["jpg", "png"])
def test_a_hundred_megapixels_take_bounded_memory_and_time(form: str) -> None:
    """Far more than any camera's, but not refused: an image of this size may be meant."""
    large = Image.new("RGB", (10_000, 10_000), (200, 30, 30))
    raw = encode(large, "JPEG") if form == "jpg" else encode(large, compress_level=1)
    del large
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_read_large, args=(theirs, raw))
    started = time.perf_counter()
    process.start()
    assert ours.poll(60), "it hangs"
    assert ours.recv() == "(1024, 1024, 3)"
    process.join()
    assert time.perf_counter() - started < 60


@given(st.sampled_from(sorted(GOOD)), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_never_crash_without_a_name(tmp_path: Path, name: str, changes: list[tuple[float, int]]) -> None:
    raw = bytearray(GOOD[name])
    for where, value in changes:
        raw[int(where * (len(raw) - 1))] = value
    assert fate(tmp_path, bytes(raw), name.split(".")[-1])  # its asserts are the test
