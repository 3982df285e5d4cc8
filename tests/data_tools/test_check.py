"""check_shards: what is broken, doubled or out of proportion is found, counted, listed and shown."""

import base64
import io
import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import T5TokenizerFast

from data_tools import check_shards
from data_tools.check_statistics import Histogram
from data_tools.filter_shards import filter_shards
from data_tools.near_duplicates import bit_distance, duplicate_groups, near_pairs
from data_tools.shard_writing import write_shard
from kontext_train.data.index_build import build_index
from kontext_train.safety.hashes import perceptual_hash
from tests.runs import ENCODERS


def picture(seed: int, height: int = 64, width: int = 96) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def about(prompt: str) -> bytes:
    return json.dumps({"prompt": prompt}).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with one of everything."""
    folder = tmp_path / "data"
    folder.mkdir()
    flat = encoded(Image.new("RGB", (40, 40), "teal"))
    good: dict[str, Mapping[str, bytes]] = {
        f"g{i}": {
            "json": about(f"prompt {i}"),
            "target.png": encoded(picture(i)),
            "context.0.png": encoded(picture(50 + i)),
        }
        for i in range(5)
    }
    odd: dict[str, Mapping[str, bytes]] = {
        "again": {"json": about("prompt 0"), "target.png": encoded(picture(0))},  # the same bytes as g0
        "jpeg": {
            "json": about("<i>other</i> 一"),
            "target.jpg": encoded(picture(1), "JPEG", quality=70),
        },  # looks like g1
        "same": {
            "json": about(""),
            "target.png": encoded(picture(9)),
            "context.0.webp": encoded(picture(9), "WEBP", lossless=True),
        },
        "flat0": {"json": about(""), "target.png": flat},
        "flat1": {"json": about(""), "target.png": encoded(Image.new("RGB", (40, 40), "black"))},
        "cut": {"json": about("c"), "target.png": encoded(picture(20))[:900]},
        "zero": {"json": about("z"), "target.png": b""},
        "latin": {"json": b'{"prompt": "caf\xe9"}', "target.png": flat},
    }
    write_shard(folder / "a.tar", good.items())
    write_shard(folder / "b.tar", odd.items())
    (folder / "c.tar").write_bytes(b"no tar")
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_finds_one_of_everything(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    report = check_shards.check_shards(folder, out)
    assert report == json.loads((out / "report.json").read_text())
    assert (report["samples"], report["shards"]) == (10, 3)

    broken = [(line["shard"], line["key"]) for line in lines(out / "broken.jsonl")]
    assert broken == [("b.tar", "cut"), ("b.tar", "zero"), ("b.tar", "latin"), ("c.tar", "")]
    assert [line["reason"][:24] for line in lines(out / "broken.jsonl")][:3] == [
        "target cannot be decoded",
        "target is empty (0 bytes",
        "json cannot be parsed ('",
    ]
    first, second = sorted(lines(out / "duplicates.jsonl"), key=lambda line: line["key"])
    assert first == {
        "shard": "b.tar",
        "key": "again",
        "like": {"shard": "a.tar", "key": "g0"},
        "bits": 0,
        "same_file": True,
        "same_prompt": True,
    }
    assert (second["key"], second["like"]["key"]) == ("jpeg", "g1")
    assert second["bits"] <= 4
    assert (second["same_file"], second["same_prompt"]) == (False, False)
    assert lines(out / "identical.jsonl") == [{"shard": "b.tar", "key": "same"}]
    assert report["one_colour"] == 2  # and they are no duplicates of each other
    assert (report["broken"], report["duplicates"], report["identical"]) == (4, 2, 1)

    prompts = report["prompts"]
    assert (prompts["different"], prompts["empty"], prompts["broken"]) == (7, 3, 1)
    assert prompts["most_repeated"] == [{"prompt": "", "times": 3}, {"prompt": "prompt 0", "times": 2}]
    assert prompts["characters"] == {"least": 0, "median": 8, "p95": 14, "p99": 14, "most": 14}
    assert report["histograms"]["context images"] == {"edges": [1], "counts": [4, 6]}
    assert report["histograms"]["target pixels"]["counts"] == [10, 0, 0, 0, 0, 0, 0]
    assert sum(report["histograms"]["target width / height"]["counts"]) == 10


def test_page_needs_nothing_else_and_shows_all(folder: Path, tmp_path: Path) -> None:
    check_shards.check_shards(folder, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith("data:image/") for source in sources)
    assert "http" not in re.sub(r'src="[^"]*"', "", page)
    assert "<i>" not in page
    assert "&lt;i&gt;other&lt;/i&gt; 一" in page
    for text in ("Look alike", "Target is a context image", "target is empty (0 bytes)", "c.tar", "b.tar · jpeg"):
        assert text in page
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]
    kinds = [image.format for image in pictures]
    assert kinds.count("PNG") == 5  # plots
    # 2 groups of 2 alike; 1 identical with its context; 10 samples with 6 contexts
    assert kinds.count("JPEG") == 4 + 2 + 16
    assert all(max(image.size) <= 168 for image in pictures if image.format == "JPEG")


def test_lists_are_what_filter_drops(folder: Path, tmp_path: Path) -> None:
    check_shards.check_shards(folder, tmp_path / "report")
    (folder / "c.tar").unlink()
    build_index(folder)
    drop = [tmp_path / "report" / f"{name}.jsonl" for name in ("duplicates", "identical")]
    cut = tmp_path / "cut.jsonl"  # without what is said of c.tar
    cut.write_text("".join((tmp_path / "report" / "broken.jsonl").read_text().splitlines(keepends=True)[:3]))
    filter_shards(folder, tmp_path / "clean", drop_lists=[*drop, cut])
    report = check_shards.check_shards(tmp_path / "clean", tmp_path / "again")
    assert (report["samples"], report["broken"], report["duplicates"], report["identical"]) == (7, 0, 0, 0)


def test_command_says_by_its_status_that_something_is_broken(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--processes", "1", "--out"]
    assert check_shards.main([str(folder), *options, str(tmp_path / "report")]) == 1
    assert "10 good samples in 3 shards" in capsys.readouterr().out
    (folder / "b.tar").unlink()
    (folder / "c.tar").unlink()
    assert check_shards.main([str(folder), *options, str(tmp_path / "good")]) == 0
    assert check_shards.main([str(folder), *options, str(tmp_path / "good")]) == 1
    assert "which exists and is not an empty folder" in capsys.readouterr().err
    assert check_shards.main([str(tmp_path / "good"), *options, str(tmp_path / "other")]) == 1
    assert "has no shards" in capsys.readouterr().err


def test_shards_that_are_done_are_not_read_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, done = check_shards.measure_shard, list[str]()

    def once(shard: Path) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(shard.name)
        return real(shard)

    monkeypatch.setattr(check_shards, "measure_shard", once)
    with pytest.raises(KeyboardInterrupt):
        check_shards.check_shards(folder, tmp_path / "report")
    assert not (tmp_path / "report").exists()
    (folder / "b.tar").write_bytes((folder / "a.tar").read_bytes())  # this one changed
    done.clear()
    assert check_shards.check_shards(folder, tmp_path / "report", processes=1)["samples"] == 10
    assert done == ["b.tar", "c.tar"]


def test_nothing_good_at_all(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").write_bytes(b"")
    report = check_shards.check_shards(tmp_path / "data", tmp_path / "report")
    assert (report["samples"], report["broken"], report["prompts"]["characters"]) == (0, 1, {})


def test_bad_arguments(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="duplicate_distance is 9; it must be 0 to 8 bits"):
        check_shards.check_shards(folder, tmp_path / "report", duplicate_distance=9)
    with pytest.raises(ValueError, match=r"tokenizer is .*none, which is not a folder"):
        check_shards.check_shards(folder, tmp_path / "report", tokenizer=tmp_path / "none")


def test_prompts_are_counted_in_t5_tokens(folder: Path, tmp_path: Path) -> None:
    tokenizer = ENCODERS / "tokenizer_2"
    report = check_shards.check_shards(folder, tmp_path / "report", tokenizer=tokenizer, t5_tokens=4)
    prompts = [f"prompt {i}" for i in range(5)] + ["prompt 0", "<i>other</i> 一", "", "", ""]
    lengths = sorted(len(ids) for ids in T5TokenizerFast.from_pretrained(tokenizer)(prompts).input_ids)
    found = report["prompts"]["t5_tokens"]
    assert (found["least"], found["median"], found["most"]) == (1, lengths[5], lengths[-1])  # 1: the end token
    assert (found["limit"], found["cut"]) == (4, sum(length > 4 for length in lengths))
    assert 0 < found["cut"] < 10
    assert sum(report["histograms"]["prompt T5 tokens"]["counts"]) == 10


def test_exif_turned_images_are_measured_upright(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture(3, 64, 96).transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)
    upright = encoded(picture(3, 64, 96), "JPEG", quality=95)
    write_shard(
        tmp_path / "data" / "a.tar",
        [(k, {"json": about(k), "target.jpg": t}) for k, t in [("t", turned), ("u", upright)]],
    )
    report = check_shards.check_shards(tmp_path / "data", tmp_path / "report")
    assert report["broken"] == 0
    assert report["duplicates"] == 1


# -------------------------------------------------------------------------------------------------- hashes and numbers

HASHES = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8, unique=True)
FLIPS = st.lists(st.tuples(st.integers(0, 7), st.sets(st.integers(0, 63), max_size=9)), max_size=20)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(hashes=HASHES, flips=FLIPS, distance=st.integers(0, 8))
def test_near_pairs_are_those_of_a_plain_search(hashes: list[int], flips: Any, distance: int) -> None:
    near = [hashes[which % len(hashes)] ^ sum(1 << bit for bit in bits) for which, bits in flips]
    unique = np.unique(np.array(hashes + near, np.uint64))
    values = unique.tolist()
    plain = [
        [i, j]
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if (values[i] ^ values[j]).bit_count() <= distance
    ]
    assert near_pairs(unique, distance).tolist() == plain


def test_groups_join_chains_and_exact_copies() -> None:
    a, b = 0x0123_4567_89AB_CDEF, 0xFFFF_0000_FFFF_0000
    hashes = np.array([a, b, a ^ 0b1111, a ^ 0b1111_1111, b, 5], np.uint64)
    assert [group.tolist() for group in duplicate_groups(hashes, 4)] == [[0, 2, 3], [1, 4]]
    assert [group.tolist() for group in duplicate_groups(hashes, 0)] == [[1, 4]]
    assert duplicate_groups(hashes[:0], 4) == []


def test_100_000_copies_are_one_group_without_pairing_them() -> None:
    rng = np.random.default_rng(0)
    hashes = np.concatenate([np.full(100_000, 7, np.uint64), rng.integers(0, 2**64, 100_000, dtype=np.uint64)])
    groups = duplicate_groups(hashes, 4)
    assert len(groups[0]) == 100_000
    assert sum(map(len, groups)) < 100_010  # random hashes are not near: 32 bits apart on average


def test_hash_is_that_of_the_library() -> None:
    for seed in range(5):
        ours = perceptual_hash(picture(seed))
        assert f"{ours:016x}" == str(imagehash.phash(picture(seed)))
    assert bit_distance(np.array([0b111], np.uint64), np.array([0b010], np.uint64)).tolist() == [2]


def test_histogram_edges() -> None:
    assert Histogram.of(np.array([0, 1, 9, 10, 10, 500]), [1, 10, 100]).counts == [1, 2, 2, 1]


def test_resized_and_recompressed_copies_are_found_and_others_not(tmp_path: Path) -> None:
    """50 pictures, each at four sizes and qualities: recall at least 0.95 at distance 4, no false pair."""
    (tmp_path / "data").mkdir()
    samples = []
    for i in range(50):
        image = picture(i, 128, 128)
        copies = [image, image.resize((96, 96)), image.resize((64, 64))]
        samples += [
            (f"{i}-{n}", {"json": about(""), "target.jpg": encoded(copy, "JPEG", quality=90 - 20 * n)})
            for n, copy in enumerate(copies)
        ]
    write_shard(tmp_path / "data" / "a.tar", samples)
    check_shards.check_shards(tmp_path / "data", tmp_path / "report")
    found = lines(tmp_path / "report" / "duplicates.jsonl")
    assert all(line["key"].split("-")[0] == line["like"]["key"].split("-")[0] for line in found)
    assert len(found) >= 0.95 * 100


def test_tar_of_the_writer_is_plain(folder: Path) -> None:
    with tarfile.open(folder / "a.tar") as tar:
        assert all(member.isreg() and member.mtime == 0 for member in tar)
