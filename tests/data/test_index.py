"""The index says what is in the shards: nothing is invented, nothing is lost without a word."""

import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from PIL import Image

from kontext_train.data import index as index_module
from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import build_index
from kontext_train.data.shard import Problem, Span, read_image_hw
from tests.runs import fork

Members = list[tuple[str, bytes]]


def encoded(height: int, width: int, form: str = "PNG", seed: int = 0, **options: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def write_tar(path: Path, members: Members, form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key: str, contexts: int = 1, prompt: str = "make it red") -> Members:
    """Members of a good sample; sizes depend on the context's number, so that a mix-up shows."""
    images = [(f"{key}.context.{i}.png", encoded(10 + i, 20 + i, seed=i)) for i in range(contexts)]
    about = json.dumps({"prompt": prompt, "source": "test"}).encode()
    return [(f"{key}.json", about), *images, (f"{key}.target.png", encoded(8, 12, seed=99))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good samples in two shards: 1, 0 and 12 contexts."""
    write_tar(tmp_path / "a.tar", sample("00") + sample("01", contexts=0))
    write_tar(tmp_path / "b.tar", sample("deep/v1.0/02", contexts=12))
    return tmp_path


def only_problem(folder: Path) -> Problem:
    report = build_index(folder)
    assert len(report.problems) == 1, report.problems
    return report.problems[0]


# ---------------------------------------------------------------------------------------------------------- good data


def test_index_holds_every_sample_with_its_sizes(folder: Path) -> None:
    report = build_index(folder)
    assert (report.samples, report.shards, report.problems) == (3, 2, [])
    index = ShardIndex.open(str(folder))
    assert len(index) == 3
    assert index.target_hw.dtype == index.context_hw.dtype == np.int32
    assert index.context_start.dtype == np.int64
    assert index.target_hw.tolist() == [[8, 12]] * 3
    assert index.context_start.tolist() == [0, 1, 1, 13]
    # Numbered, not sorted as text: context.10 comes after context.9.
    assert index.context_hw.tolist() == [[10, 20], *([10 + i, 20 + i] for i in range(12))]
    assert index.location(2).shard == folder / "b.tar"
    assert index.location(2).key == "deep/v1.0/02"


def test_spans_are_what_webdataset_reads(folder: Path) -> None:
    build_index(folder)
    index = ShardIndex.open(folder)
    shards = [str(folder / name) for name in ("a.tar", "b.tar")]
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert len(theirs) == len(index)
    for i, other in enumerate(theirs):
        location = index.location(i)
        raw = location.shard.read_bytes()

        def content(span: Span, raw: bytes = raw) -> bytes:
            return raw[span.offset : span.offset + span.size]

        assert location.key == other["__key__"]
        assert content(location.json) == other["json"]
        assert content(location.target) == other["target.png"]
        assert [content(span) for span in location.contexts] == [
            other[f"context.{number}.png"] for number in range(len(location.contexts))
        ]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_upper_case_suffixes(tmp_path: Path, form: int) -> None:
    key = "folder/" + "é" * 150  # needs an extra header in both formats
    write_tar(tmp_path / "a.tar", [(f"{key}.JSON", b'{"prompt": ""}'), (f"{key}.target.PNG", encoded(4, 5))], form)
    assert build_index(tmp_path).problems == []
    assert ShardIndex.open(tmp_path).location(0).key == key


def test_folder_without_any_context_image(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("0", contexts=0))
    build_index(tmp_path)
    index = ShardIndex.open(tmp_path)
    assert index.context_hw.shape == (0, 2)
    assert index.location(0).contexts == ()


def test_directories_in_a_tar_are_no_problem(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, content in sample("0"):
        (source / name).write_bytes(content)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(source, arcname=".", filter=None)
    report = build_index(tmp_path)
    assert report.problems == []


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_upright_image(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(6, 9, form, exif=exif)
    assert read_image_hw(io.BytesIO(raw)) == ((9, 6) if orientation >= 5 else (6, 9))


def test_sizes_come_from_headers_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Image.Image) -> None:
        raise AssertionError("decoded")

    raw = {form: encoded(6, 9, form) for form in ("PNG", "JPEG")}
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    for content in raw.values():
        assert read_image_hw(io.BytesIO(content)) == (6, 9)
    with pytest.raises(AssertionError, match="decoded"):  # the trap does catch a decode
        Image.open(io.BytesIO(raw["PNG"])).load()


def test_arrays_are_read_only_views_of_the_file(folder: Path) -> None:
    build_index(folder)
    index = ShardIndex.open(folder)
    for array in (index.target_hw, index.context_start, index.context_hw):
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_location_refuses_numbers_outside_the_index(folder: Path) -> None:
    build_index(folder)
    index = ShardIndex.open(folder)
    assert index.location(np.int64(2)) == index.location(2)
    for i in (-1, 3):
        with pytest.raises(IndexError, match=f"sample {i} of an index of 3 samples"):
            index.location(i)


# ------------------------------------------------------------------------------------------------------ broken samples

GOOD_JSON = ("1.json", b'{"prompt": "x"}')
GOOD_TARGET = ("1.target.png", encoded(4, 4))
BROKEN: dict[str, tuple[Members, str]] = {
    "json is not json": ([("1.json", b"{prompt"), GOOD_TARGET], "json cannot be parsed"),
    "json is not utf-8": ([("1.json", b'{"prompt": "\xff"}'), GOOD_TARGET], "json cannot be parsed"),
    "json is a list": ([("1.json", b"[]"), GOOD_TARGET], "json is a list; it must be an object"),
    "no prompt": ([("1.json", b'{"text": "x"}'), GOOD_TARGET], "it has no prompt"),
    "prompt is a number": ([("1.json", b'{"prompt": 3}'), GOOD_TARGET], "prompt is 3"),
    "prompt is half a character": ([("1.json", b'{"prompt": "\\ud800"}'), GOOD_TARGET], "not valid Unicode"),
    "json is empty": ([("1.json", b""), GOOD_TARGET], "json is empty (0 bytes)"),
    "json is missing": ([GOOD_TARGET], "json is missing"),
    "target is missing": ([GOOD_JSON, ("1.context.0.png", encoded(4, 4))], "target is missing"),
    "target is empty": ([GOOD_JSON, ("1.target.png", b"")], "target is empty (0 bytes)"),
    "target is no image": ([GOOD_JSON, ("1.target.png", b"hello")], "target is not a readable PNG, JPEG or WebP"),
    "target has another format": ([GOOD_JSON, ("1.target.png", encoded(4, 4, "GIF"))], "target is not a readable"),
    "two targets": ([GOOD_JSON, GOOD_TARGET, ("1.target.jpg", encoded(4, 4, "JPEG"))], "two members for target"),
    "context is no image": ([GOOD_JSON, GOOD_TARGET, ("1.context.0.png", b"x")], "context.0 is not a readable"),
    "context gap": (
        [GOOD_JSON, GOOD_TARGET, ("1.context.0.png", encoded(4, 4)), ("1.context.2.png", encoded(4, 4))],
        "found [0, 2]",
    ),
    "context from 1": ([GOOD_JSON, GOOD_TARGET, ("1.context.1.png", encoded(4, 4))], "found [1]"),
    "number with a zero": ([GOOD_JSON, GOOD_TARGET, ("1.context.00.png", encoded(4, 4))], "not part of the format"),
    "misspelt context": ([GOOD_JSON, GOOD_TARGET, ("1.contxt.0.png", encoded(4, 4))], ".contxt.0.png is not part"),
    "image of another suffix": ([GOOD_JSON, ("1.target.gif", encoded(4, 4, "GIF"))], ".target.gif is not part"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_sample_is_named_and_left_out(tmp_path: Path, case: str) -> None:
    members, reason = BROKEN[case]
    write_tar(tmp_path / "a.tar", sample("0") + members + sample("2"))
    problem = only_problem(tmp_path)
    assert (problem.shard, problem.key) == ("a.tar", "1")
    assert reason in problem.reason
    index = ShardIndex.open(tmp_path)
    assert [index.location(i).key for i in range(len(index))] == ["0", "2"]


def test_the_broken_cases_are_broken_by_their_defect_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*sample("0"), GOOD_JSON, GOOD_TARGET, *sample("2")])
    report = build_index(tmp_path)
    assert (report.samples, report.problems) == (3, [])


@pytest.mark.parametrize("name", ["README", ".hidden.target.png", "folder.d/noext"])
def test_member_without_a_key_is_reported(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "a.tar", [*sample("0"), (name, b"x"), *sample("1")])
    problem = only_problem(tmp_path)
    assert problem == Problem("a.tar", "", f"member {name!r} has no key: names are UTF-8, like KEY.target.png")
    assert len(ShardIndex.open(tmp_path)) == 2


def test_name_that_is_not_utf8_is_reported_and_printable(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*sample("0"), ("1\udcff.json", b'{"prompt": "x"}')])
    problem = only_problem(tmp_path)
    assert "names are UTF-8" in problem.reason
    str(problem).encode()


def test_link_is_reported(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in [*sample("0"), GOOD_JSON]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("1.target.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.target.png"
        tar.addfile(link)
    problem = only_problem(tmp_path)
    assert (problem.key, "target is a link" in problem.reason) == ("1", True)


def test_members_of_a_sample_must_be_consecutive(tmp_path: Path) -> None:
    first, second = sample("0", contexts=0), sample("1", contexts=0)
    write_tar(tmp_path / "a.tar", [first[0], second[0], first[1], second[1]])
    report = build_index(tmp_path)
    assert report.samples == 0
    assert [problem.reason for problem in report.problems[:2]] == ["target is missing"] * 2
    assert all("members of a sample must be consecutive" in problem.reason for problem in report.problems[2:])
    with pytest.raises(ValueError, match=r"holds no samples: all are broken.*data_tools\.index_shards"):
        ShardIndex.open(tmp_path)


# ------------------------------------------------------------------------------------------------------- broken shards


def test_truncation_at_any_byte_keeps_whole_samples_and_names_the_break(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole", sample("0") + sample("1") + sample("2"))
    with tarfile.open(whole) as tar:
        ends = [
            member.offset_data + -(-member.size // 512) * 512 for member in tar if member.name.endswith("target.png")
        ]
        end_of_archive = tar.offset
    raw = whole.read_bytes()
    for cut in [*range(1, end_of_archive, 300), *range(512, end_of_archive + 1, 512)]:
        (tmp_path / "a.tar").write_bytes(raw[:cut])
        report = build_index(tmp_path)
        # A sample is known to be whole when another key's header follows it.
        assert report.samples == sum(cut >= end + 512 for end in ends), cut
        assert len(report.problems) == 1, cut
        assert report.problems[0].shard == "a.tar"
    (tmp_path / "a.tar").write_bytes(raw[: end_of_archive + 512])  # control: with the end marker it is complete
    assert build_index(tmp_path).problems == []


def test_truncation_names_the_sample_and_the_byte(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", sample("0") + sample("1"))
    with tarfile.open(path) as tar:
        cut = tar.getmember("1.target.png").offset_data + 5
    os.truncate(path, cut)
    problem = only_problem(tmp_path)
    assert problem.key == "1"
    assert f"truncated: it ends at byte {cut}, inside '1.target.png'" in problem.reason


def test_damaged_header_in_the_middle_is_a_problem(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", sample("0") + sample("1") + sample("2"))
    with tarfile.open(path) as tar:
        offset = tar.getmember("2.json").offset
        everything = len(tar.getmembers())
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\x01" * 100)
    with tarfile.open(path) as tar:  # the reason for the check: tarfile takes this for the end
        assert len(tar.getmembers()) < everything
    problem = only_problem(tmp_path)
    assert f"header at byte {offset} is damaged" in problem.reason
    assert len(ShardIndex.open(tmp_path)) == 1


def test_shards_joined_with_cat_are_a_problem(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "a", sample("0") + sample("1")).read_bytes()
    (tmp_path / "a.tar").write_bytes(first + write_tar(tmp_path / "b", sample("2")).read_bytes())
    assert "data follows tar's end marker" in only_problem(tmp_path).reason
    assert len(ShardIndex.open(tmp_path)) == 2  # both whole samples of the first part


@pytest.mark.parametrize("content", [b"", b"not a tar at all" * 100], ids=["empty", "text"])
def test_file_that_is_no_tar_is_a_problem(tmp_path: Path, content: bytes) -> None:
    write_tar(tmp_path / "a.tar", sample("0"))
    (tmp_path / "b.tar").write_bytes(content)
    problem = only_problem(tmp_path)
    assert (problem.shard, problem.key) == ("b.tar", "")
    assert "not an uncompressed tar file" in problem.reason


def test_compressed_shards_are_reported_under_either_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("0"))
    for name in ("b.tar.gz", "c.tar"):
        with tarfile.open(tmp_path / name, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("1.json"))
    reasons = {problem.shard: problem.reason for problem in build_index(tmp_path).problems}
    assert reasons.keys() == {"b.tar.gz", "c.tar"}
    assert "decompress it to .tar" in reasons["b.tar.gz"]
    assert "not an uncompressed tar" in reasons["c.tar"]


# ------------------------------------------------------------------------------------------------- building and opening


def test_build_refuses_a_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no shards: .*data_tools\.make_shards"):
        build_index(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_build_takes_the_shards_it_is_given(folder: Path) -> None:
    report = build_index(folder, shards=[folder / "b.tar"])
    assert (report.samples, report.shards) == (1, 1)
    assert len(ShardIndex.open(folder)) == 1  # and a.tar is not taken for a shard that was added


def test_build_refuses_shards_outside_the_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = write_tar(tmp_path_factory.mktemp("other") / "c.tar", sample("0"))
    for shard in (elsewhere, folder / "missing.tar"):
        with pytest.raises(ValueError, match=f"shard {shard} is not a file inside {folder}"):
            build_index(folder, shards=[shard])


def test_failed_write_leaves_the_old_index_and_no_litter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_index(folder)
    before = (folder / "index.arrow").read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(index_module.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        build_index(folder)
    assert (folder / "index.arrow").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["a.tar", "b.tar", "index.arrow"]


def test_open_refuses_a_folder_that_is_not_indexed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ValueError, match=rf"{folder} has shards but no index.*data_tools\.index_shards {folder}"):
        ShardIndex.open(folder)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match=rf"{empty} has no shards.*make_shards"):
        ShardIndex.open(empty)
    with pytest.raises(ValueError, match="is not a folder"):
        ShardIndex.open(folder / "a.tar")


def test_open_refuses_shards_that_changed(folder: Path) -> None:
    build_index(folder)
    shard = folder / "b.tar"
    raw, state = shard.read_bytes(), shard.stat()
    rerun = rf".*index_shards {folder}"

    shard.write_bytes(raw + bytes(512))
    with pytest.raises(ValueError, match=rf"b\.tar has {len(raw) + 512} bytes, {len(raw)} when indexed{rerun}"):
        ShardIndex.open(folder)
    shard.write_bytes(raw)
    os.utime(shard, ns=(0, state.st_mtime_ns + 1))
    with pytest.raises(ValueError, match=rf"b\.tar was modified after it was indexed{rerun}"):
        ShardIndex.open(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"b\.tar is missing{rerun}"):
        ShardIndex.open(folder)
    shard.write_bytes(raw)
    os.utime(shard, ns=(0, state.st_mtime_ns))
    assert len(ShardIndex.open(folder)) == 3  # control: the very file is accepted
    write_tar(folder / "c.tar", sample("9"))
    with pytest.raises(ValueError, match=rf"c\.tar was added after{rerun}"):
        ShardIndex.open(folder)


def rewrite_header(folder: Path, **changes: object) -> None:
    with pa.ipc.open_file(folder / "index.arrow") as reader:
        batch = reader.get_batch(0)
    header = json.loads(batch.schema.metadata[b"kontext_train"]) | changes
    batch = batch.replace_schema_metadata({b"kontext_train": json.dumps(header)})
    (folder / "index.arrow").unlink()  # it is mapped
    with pa.ipc.new_file(folder / "index.arrow", batch.schema) as writer:
        writer.write_batch(batch)


def test_open_refuses_a_newer_format(folder: Path) -> None:
    build_index(folder)
    rewrite_header(folder, format_version=2)
    assert len(ShardIndex.open(folder)) == 3  # control: rewriting alone does no harm
    rewrite_header(folder, format_version=3)
    with pytest.raises(ValueError, match=r"format version 3 \(it was written by a newer.*reads 2.*index_shards"):
        ShardIndex.open(folder)
    rewrite_header(folder, format_version=1)
    with pytest.raises(ValueError, match=r"format version 1, this program reads 2.*index_shards"):
        ShardIndex.open(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, 1000])
def test_open_refuses_a_damaged_index(folder: Path, keep: int) -> None:
    build_index(folder)
    os.truncate(folder / "index.arrow", keep)
    with pytest.raises(ValueError, match=r"index\.arrow is not a shard index or is damaged.*index_shards"):
        ShardIndex.open(folder)


def test_open_refuses_other_arrow_files(folder: Path) -> None:
    table = pa.table({"a": [1]})
    with pa.ipc.new_file(folder / "index.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match="is not a shard index or is damaged"):
        ShardIndex.open(folder)


def test_digest_names_the_data_and_not_the_place_or_time(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def digest(where: Path) -> str:
        build_index(where)
        return ShardIndex.open(where).digest

    copy = tmp_path_factory.mktemp("copy")
    for name in ("a.tar", "b.tar"):
        shutil.copyfile(folder / name, copy / name)
    original = digest(folder)
    digests = [original]
    assert digest(copy) == original
    # Same shard sizes, same offsets, the image turned: another plan, so another digest.
    members = sample("00") + sample("01", contexts=0)
    room = len(encoded(12, 8, seed=99)) + 10
    for height, width in ((8, 12), (12, 8)):
        padded = encoded(height, width, seed=99).ljust(room, b"\0")  # what follows the end of a PNG is not read
        write_tar(copy / "a.tar", [(name, padded if "target" in name else raw) for name, raw in members])
        digests.append(digest(copy))
    assert len(set(digests)) == 3
    (copy / "b.tar").rename(copy / "c.tar")
    shutil.copyfile(folder / "a.tar", copy / "a.tar")
    assert digest(copy) != original


def test_index_is_pickled_by_path(folder: Path) -> None:
    build_index(folder)
    index = ShardIndex.open(folder)
    packed = pickle.dumps(index)
    assert len(packed) < 500
    again = pickle.loads(packed)
    assert again.digest == index.digest
    assert again.location(2) == index.location(2)
    assert np.array_equal(again.context_hw, index.context_hw)

    build_index(folder, shards=[folder / "a.tar"])  # replaced while workers start
    with pytest.raises(ValueError, match="was replaced while it was in use"):
        pickle.loads(packed)
    assert len(index) == 3  # whoever has mapped it keeps the old one


def test_two_indexers_of_one_folder_wait_for_each_other(shards: Path, tmp_path: Path) -> None:
    """Without that the first to finish removes what the other still reads."""
    for shard in shards.glob("*.tar"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    both = [fork(build_index, tmp_path) for _ in range(2)]
    for process in both:
        process.join(timeout=120)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(ShardIndex.open(tmp_path)) == len(ShardIndex.open(shards))
