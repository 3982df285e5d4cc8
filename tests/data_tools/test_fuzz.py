"""Hostile and damaged input: index, reader, check and filter name what is wrong, end, and stay in their folders."""

import io
import json
import os
import shutil
import struct
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.check_shards import check_shards, measure_shard
from data_tools.filter_shards import filter_shards
from kontext_train.data.index import INDEX_NAME, ShardIndex
from kontext_train.data.index_build import build_index
from kontext_train.data.sample import BadSample, SampleReader
from kontext_train.data.transforms import Transform

FUZZ = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def png(height: int = 16, width: int = 16, seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def sample(seed: int = 0, **members: bytes) -> dict[str, bytes]:
    return {"json": b'{"prompt": "p"}', "target.png": png(seed=seed), "context.0.png": png(seed=seed + 1), **members}


def pack(samples: Mapping[str, Mapping[str, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for key, members in samples.items():
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


GOOD = {f"k{i}": sample(i) for i in range(4)}
SHARD = pack(GOOD)
with tarfile.open(fileobj=io.BytesIO(SHARD)) as _tar:
    OFFSETS = [member.offset for member in _tar]
    END = _tar.offset  # of the last member; then come the end marker and padding


@dataclass
class Seen:
    """What the four of them made of one shard."""

    read: list[str]  # keys
    unreadable: list[str]  # keys: the index has them, their bytes are bad
    problems: list[tuple[str, str]]  # key and reason, of the index
    broken: list[tuple[str, str]]  # of check_shards
    kept: int  # of filter_shards


def use_all(folder: Path, shard: bytes) -> Seen:
    """Indexes, reads, checks and filters a folder of one shard. Nothing else may appear, and no nameless error."""
    data, filtered = folder / "data", folder / "filtered"
    data.mkdir(exist_ok=True)
    shutil.rmtree(filtered, ignore_errors=True)
    (data / "a.tar").write_bytes(shard)
    report = build_index(data)
    _, broken = measure_shard(data / "a.tar")
    assert all(problem.shard == "a.tar" and problem.reason for problem in [*report.problems, *broken])
    seen = Seen([], [], *([problem[1:] for problem in found] for found in (report.problems, broken)), 0)
    if report.samples:
        read_all(ShardIndex.open(data), seen)
        seen.kept = filter_shards(data, filtered, ["width > 0"])["kept"]
        assert seen.kept == report.samples
        assert ShardIndex.open(filtered).target_hw.tolist() == ShardIndex.open(data).target_hw.tolist()
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}  # nothing beside it
    assert {path.name for path in folder.iterdir()} <= {"data", "filtered"}
    assert {path.name for path in data.iterdir()} == {"a.tar", INDEX_NAME}
    return seen


def read_all(index: ShardIndex, seen: Seen) -> None:
    reader = SampleReader(index, Transform(1 << 20, 16))
    for i in range(len(index)):
        key = index.location(i).key
        try:
            seen.read.append(reader.read(i).key)
        except BadSample as error:
            seen.unreadable += [key] if f"a.tar: {key}: " in str(error) else []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "fuzz").mkdir()
    return tmp_path / "fuzz"


def test_good_shard_passes_whole(folder: Path) -> None:
    assert use_all(folder, SHARD) == Seen(list(GOOD), [], [], [], 4)


# ------------------------------------------------------------------------------------------------- damage at random


@FUZZ
@given(length=st.integers(0, END + tarfile.BLOCKSIZE - 1))
def test_truncated_anywhere(folder: Path, length: int) -> None:
    seen = use_all(folder, SHARD[:length])
    # What is read is a beginning of the shard, whole; and it is said that something is missing.
    assert seen.read == list(GOOD)[: len(seen.read)]
    assert seen.problems
    assert not seen.unreadable


@FUZZ
@given(member=st.integers(0, 11), byte=st.integers(0, 511), bit=st.integers(0, 7))
def test_bit_flipped_in_a_header(folder: Path, member: int, byte: int, bit: int) -> None:
    damaged = bytearray(SHARD)
    damaged[OFFSETS[member] + byte] ^= 1 << bit
    seen = use_all(folder, bytes(damaged))
    # tar's checksum covers all of a header, except that a set high bit or a space in its own field may read the same.
    if seen.problems:
        assert seen.read == list(GOOD)[: len(seen.read)]
    else:
        assert seen.read == list(GOOD)
        assert 148 <= byte < 156


@FUZZ
@given(at=st.integers(0, len(SHARD) - 1), value=st.integers(0, 255))
def test_byte_changed_anywhere(folder: Path, at: int, value: int) -> None:
    seen = use_all(folder, SHARD[:at] + bytes([value]) + SHARD[at + 1 :])
    assert set(seen.read) <= set(GOOD)
    assert {key for key, _ in seen.broken} - {""} == {key for key, _ in seen.problems if key} | set(seen.unreadable)


@FUZZ
@given(content=st.binary(max_size=3000))
def test_bytes_that_are_no_tar(folder: Path, content: bytes) -> None:
    assert use_all(folder, content).problems


# ----------------------------------------------------------------------------------------------------- headers that lie


def header(name: str, size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header with a good checksum. size: the 12 bytes of its field."""
    member = tarfile.TarInfo(name)
    member.type = kind
    raw = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    raw[124:136] = size
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def blocks(content: bytes) -> bytes:
    return content + bytes(-len(content) % tarfile.BLOCKSIZE)


def pax(**values: str) -> bytes:
    records = b""
    for name, value in values.items():
        body = f" {name.replace('__', '.')}={value}\n".encode()
        length = len(body) + len(str(len(body) + 3))
        records += str(length + (len(str(length)) + len(body) > length)).encode() + body
    return header("pax", octal(len(records)), tarfile.XHDTYPE) + blocks(records)


EMPTY = header("bad.json", octal(0))
LIES = {
    "size below zero in pax": (pax(size="-2000") + EMPTY, "damaged: it gives -2000 bytes"),
    "size below zero in base 256": (header("bad.json", b"\xff" * 11 + b"\0"), "damaged: it gives -256 bytes"),
    "size beyond all files": (pax(size="9" * 40) + EMPTY, "the shard is truncated"),
    "size beyond all files, of no known type": (
        header("bad.json", b"\x80" + bytes(3) + b"\x3f" + b"\xff" * 7, b"Z") + EMPTY,
        "the shard is truncated",
    ),
    "5,000 pax headers for one member": (pax(a="b") * 5000 + EMPTY, "cannot be parsed (RecursionError"),
    "5,000 long names for one member": (
        (header("x", octal(5), tarfile.GNUTYPE_LONGNAME) + blocks(b"abcde")) * 5000 + EMPTY,
        "cannot be parsed (RecursionError",
    ),
    "sparse file with a map of words": (pax(GNU__sparse__map="a,b,c") + EMPTY, "cannot be parsed (ValueError"),
    "sparse file with no map": (
        pax(GNU__sparse__major="1", GNU__sparse__minor="0") + header("bad.json", octal(600)) + blocks(b"no\n" * 200),
        "cannot be parsed (ValueError",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_header_that_lies_ends_the_shard_by_name(folder: Path, case: str) -> None:
    lie, reason = LIES[case]
    seen = use_all(folder, SHARD[:END] + lie + bytes(1024))
    assert seen.read == list(GOOD)[: len(seen.read)]
    assert len(seen.read) >= 3  # the last may lack a member that came after the break
    assert any(reason in said for _, said in seen.problems), seen.problems
    first = use_all(folder, lie + bytes(1024))  # also where it is the first of all
    assert first.problems
    assert not first.read


LINKS = {
    "symbolic link": (tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": (tarfile.LNKTYPE, "../../outside.png"),
    "device": (tarfile.CHRTYPE, ""),
    "pipe": (tarfile.FIFOTYPE, ""),
}


@pytest.mark.parametrize("case", LINKS)
def test_member_that_is_no_file(folder: Path, case: str) -> None:
    kind, target = LINKS[case]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        member = tarfile.TarInfo("bad.target.png")
        member.type, member.linkname = kind, target
        tar.addfile(member)
    seen = use_all(folder, file.getvalue()[: tarfile.BLOCKSIZE] + SHARD)
    assert seen.read == list(GOOD)
    assert [key for key, _ in seen.problems] == ["bad"]
    assert "is a link or a sparse or special file" in seen.problems[0][1]


@pytest.mark.parametrize("key", ["../../x", "/tmp/x", "a/../../../x", "<script>alert(1)"])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT])
def test_names_that_lead_elsewhere_are_only_names(folder: Path, key: str, form: int) -> None:
    seen = use_all(folder, pack({key: sample()}, form))
    assert seen.read == [key]
    check_shards(folder / "data", folder / "report")
    assert {path.name for path in folder.iterdir()} == {"data", "filtered", "report"}
    assert key.replace("<", "&lt;").replace(">", "&gt;") in (folder / "report" / "report.html").read_text()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_very_many_members_with_very_long_names(folder: Path, form: int) -> None:
    long = {f"{'d' * 90}/{'ü' * 100}/{i:05d}": {"json": b"{}"} for i in range(3000)}
    key = "n" * 300
    seen = use_all(folder, pack({**long, key: sample()}, form))
    assert seen.read == [key]
    assert len(seen.problems) == 3000
    with tarfile.open(folder / "filtered" / "a.tar") as tar:  # long names come through the filter
        assert [member.name for member in tar] == [f"{key}.json", f"{key}.target.png", f"{key}.context.0.png"]


def test_key_used_twice(folder: Path) -> None:
    seen = use_all(folder, SHARD[:END] + pack({"k1": sample(2)}))
    assert seen.read == list(GOOD)
    assert seen.problems == [("k1", "this key was used before in the shard: members of a sample must be consecutive")]


# --------------------------------------------------------------------------------------------------------------- JSON


WRONG_JSON = {
    "list": b"[]",
    "null": b"null",
    "number": b"1",
    "no prompt": b"{}",
    "prompt is a list": b'{"prompt": ["p"]}',
    "prompt is NaN": b'{"prompt": NaN}',
    "half a character": b'{"prompt": "\\ud800"}',
    "not UTF-8": b'{"prompt": "\xff"}',
    "UTF-8 with half a character": b'{"prompt": "\xed\xa0\x80"}',
    "very deep": b'{"prompt": "p", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "number of 10,000 digits": b'{"prompt": "p", "a": ' + b"9" * 10_000 + b"}",
    "two objects": b'{"prompt": "p"}{"prompt": "p"}',
    "zeros": bytes(100),
}
ODD_JSON = {
    "NaN": b'{"prompt": "p", "a": NaN}',
    "infinite": b'{"prompt": "p", "a": 1e999}',
    "half a character elsewhere": b'{"prompt": "p", "\\udc00": "\\ud800"}',
    "name twice": b'{"prompt": 1, "prompt": "p"}',
    "with a NUL": b'{"prompt": "a\\u0000b"}',
    "very long": json.dumps({"prompt": "字" * 300_000}).encode(),
    "deep": b'{"prompt": "p", "a": ' + b"[" * 200 + b"]" * 200 + b"}",
    "UTF-16": '{"prompt": "p"}'.encode("utf-16"),
}


@pytest.mark.parametrize("case", WRONG_JSON)
def test_wrong_json_is_the_problem_of_its_sample(folder: Path, case: str) -> None:
    seen = use_all(folder, pack({"bad": sample(json=WRONG_JSON[case]), **GOOD}))
    assert seen.read == list(GOOD)
    assert [key for key, _ in seen.problems] == ["bad"]
    assert seen.problems[0][1].startswith("json ")


@pytest.mark.parametrize("case", ODD_JSON)
def test_odd_json_is_still_json(folder: Path, case: str) -> None:
    assert use_all(folder, pack({"odd": sample(json=ODD_JSON[case])})).read == ["odd"]


@FUZZ
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("prompt"), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_any_json(folder: Path, value: Any) -> None:
    seen = use_all(folder, pack({"x": sample(json=json.dumps(value).encode())}))
    is_good = isinstance(value, dict) and isinstance(value.get("prompt"), str)
    assert (seen.read, [key for key, _ in seen.problems]) == ((["x"], []) if is_good else ([], ["x"]))


# ------------------------------------------------------------------------------------------------------------- images


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(height: int, width: int, *before: bytes) -> bytes:
    """A PNG of a few hundred bytes that says it has so many pixels."""
    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + size
        + b"".join(before)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


UNREADABLE = {
    "empty": b"",
    "one byte": b"\x89",
    "text": b"no image",
    "gif": b"GIF89a" + bytes(100),
    "3.6 gigapixels": bomb(60_000, 60_000),
    "no pixels": bomb(0, 0),
    "text that unpacks to 200 MB": bomb(16, 16, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 9))),
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("role", ["target.png", "context.0.png"])
def test_image_that_the_index_refuses(folder: Path, case: str, role: str) -> None:
    seen = use_all(folder, pack({"bad": sample(**{role: UNREADABLE[case]}), **GOOD}))
    assert seen.read == list(GOOD)
    assert [key for key, _ in seen.problems] == ["bad"]
    assert role.removesuffix(".png") in seen.problems[0][1]


def test_image_that_only_decoding_finds_bad(folder: Path) -> None:
    cut = {"cut": sample(**{"target.png": png(64, 64)[:5000]}), "few": sample(**{"context.0.png": bomb(2000, 2000)})}
    seen = use_all(folder, pack({**cut, **GOOD}))
    assert seen.read == list(GOOD)
    assert not seen.problems
    assert seen.unreadable == ["cut", "few"] == [key for key, _ in seen.broken]


def test_100_megapixels(folder: Path) -> None:
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    assert use_all(folder, pack({"big": sample(**{"target.png": file.getvalue()})})).read == ["big"]


@FUZZ
@given(form=st.sampled_from(["PNG", "JPEG", "WEBP"]), at=st.floats(0, 0.999), change=st.binary(min_size=1, max_size=8))
def test_damaged_image(folder: Path, form: str, at: float, change: bytes) -> None:
    file = io.BytesIO()
    Image.open(io.BytesIO(png(32, 32))).save(file, form)
    good = file.getvalue()
    start = int(at * len(good))
    seen = use_all(folder, pack({"x": sample(**{"target.png": good[:start] + change + good[start + len(change) :]})}))
    # Damage may still decode; but what index or reader refuse, check refuses, and the other way round.
    assert [key for key, _ in seen.broken] == [key for key, _ in seen.problems] + seen.unreadable


# -------------------------------------------------------------------------------------------------- files in the folder


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nowhere"])
def test_folder_with_what_is_no_file(folder: Path, kind: str) -> None:
    (folder / "a.tar").write_bytes(SHARD)
    match kind:
        case "pipe":
            os.mkfifo(folder / "bad.tar")
        case "folder":
            (folder / "bad.tar").mkdir()
        case _:
            (folder / "bad.tar").symlink_to(folder / "nowhere")
    for tool in (build_index, lambda path: check_shards(path, folder / "report")):
        with pytest.raises(ValueError, match=r"bad\.tar is not a file"):
            tool(folder)


# ----------------------------------------------------------------------------------------------------- the index itself


@settings(FUZZ, max_examples=150)
@example(changes=[(0.75390625, 32)])  # a key of a shard's entry
@example(changes=[(0.7578125, 32)])
@given(changes=st.lists(st.tuples(st.floats(0, 0.999999), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_index_is_named(folder: Path, changes: list[tuple[float, int]]) -> None:
    (folder / "a.tar").write_bytes(SHARD)
    build_index(folder)
    index = bytearray((folder / INDEX_NAME).read_bytes())
    for at, value in changes:
        index[int(at * len(index))] = value
    (folder / INDEX_NAME).unlink()  # not written over: an earlier example still has it mapped
    (folder / INDEX_NAME).write_bytes(index)
    seen = Seen([], [], [], [], 0)
    try:
        read_all(ShardIndex.open(folder), seen)
    except (ValueError, OSError) as error:
        said = str(error)
    else:
        said = ""  # padding, or numbers that are wrong and possible: samples are then bad, or have other keys
    assert not said or str(folder) in said
