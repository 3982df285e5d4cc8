"""KontextBench as it is released is read; what is not all of it, or not it, is named and counted."""

import json
from pathlib import Path

import pytest
from PIL import Image

from kontext_train.errors import ConfigError
from kontext_train.evaluation.benchmark import KONTEXT_BENCH, read_benchmark
from tests.evaluation.cases import benchmark, line


def released(folder: Path, leave_out: int = 0) -> Path:
    """The released form: test/metadata.jsonl, test/images/0000.jpg, 1,026 prompts on 108 images."""
    root = folder / "test"
    (root / "images").mkdir(parents=True)
    for number in range(108):
        Image.new("RGB", (32, 16), (number, 0, 0)).save(root / "images" / f"{number:04d}.jpg")
    names = [name for name, count in KONTEXT_BENCH.items() for _ in range(count)]
    rows = [
        {"key": f"{i:04d}", "category": name, "instruction": f"edit {i}", "file_name": f"images/{i % 108:04d}.jpg"}
        for i, name in enumerate(names)
    ]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[leave_out:]))
    return folder


def test_the_released_form_is_read_whole(tmp_path: Path) -> None:
    found = read_benchmark(released(tmp_path))
    assert found.name == "KontextBench"
    assert len(found.pairs) == sum(KONTEXT_BENCH.values()) == 1026
    assert len({case.base for case in found.pairs}) == 108
    assert found.pairs[0].contexts == (tmp_path / "test" / "images" / "0000.jpg",)
    few = found.first(3)
    assert [case.category for case in few.pairs] == [name for name in KONTEXT_BENCH for _ in range(3)]
    assert few.digest == found.digest


def test_a_partial_benchmark_is_refused_with_counts_unless_meant(tmp_path: Path) -> None:
    folder = released(tmp_path, leave_out=6)
    with pytest.raises(ConfigError, match=r"1,020 of 1,026 pairs \(Instruction Editing - Local 410 of 416\)"):
        read_benchmark(folder)
    assert len(read_benchmark(folder, partial=True).pairs) == 1020


def test_missing_images_are_named_and_counted(tmp_path: Path) -> None:
    folder = released(tmp_path)
    for number in range(7):
        (folder / "test" / "images" / f"{number:04d}.jpg").unlink()
    with pytest.raises(ConfigError, match=r"lacks 7 files .*images/0000\.jpg, .*images/0004\.jpg, … 2 more"):
        read_benchmark(folder, partial=True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([line(0), line(1), line(1)], r"1 keys more than once \(0001\)"),
        ([line(0, category="")], r"metadata\.jsonl line 1'.*has no category"),
        ([line(0) | {"instruction": None}], r"has no instruction"),
        ([line(0) | {"key": "../x"}], r"the key '\.\./x', which cannot be a file's name"),
        ([line(0) | {"key": "a" * 201}], r"has a key of 201 bytes, 'aaa.*: files are named by it\. Use at most 200"),
        ([], r"holds no pairs and no chains"),
    ],
)
def test_bad_lines_are_refused(tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_benchmark(benchmark(tmp_path, rows))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mask_file_name": 7}, r"the mask_file_name 7, which is no file's name"),
        ({"file_name": ["a.png"]}, r"the file_name \['a\.png'\], which is no file's name"),
        ({"file_name": "../a.png"}, r"the file_name '\.\./a\.png', which leads out of the benchmark's folder"),
        ({"target_file_name": "/a.png"}, r"the target_file_name '/a\.png', which leads out"),
        ({"reference_file_names": "a.png"}, r"reference_file_names 'a\.png', no list"),
        ({"reference_file_names": [3]}, r"the reference_file_names 3, which is no file's name"),
        ({"text": 5}, r"the text 5, which is no text"),
        ({"source_caption": ["a"]}, r"the source_caption \['a'\], which is no text"),
        ({"height": "512"}, r"the height '512', which is no number of pixels"),
        ({"width": 0}, r"the width 0, which is no number of pixels"),
        ({"category": "all"}, r"the category 'all', which results over all pairs have"),
        ({"category": "turn 3"}, r"the category 'turn 3', which results over chains have"),
    ],
)
def test_fields_of_the_wrong_kind_are_named(tmp_path: Path, more: dict[str, object], message: str) -> None:
    folder = benchmark(tmp_path, [line(0), line(1)])
    (folder / "metadata.jsonl").write_text(f"{json.dumps(line(0))}\n{json.dumps(line(1) | more)}\n")
    with pytest.raises(ConfigError, match=rf"metadata\.jsonl line 2'.*{message}"):
        read_benchmark(folder)


def test_a_line_ends_where_the_line_ends(tmp_path: Path) -> None:
    folder = benchmark(tmp_path, [line(0), line(1)])
    rows = [line(0, instruction="write a\u2028b\x85c"), line(1)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert [case.instruction for case in read_benchmark(folder).pairs] == ["write a\u2028b\x85c", "add hat 1"]
    (folder / "metadata.jsonl").write_bytes(b'{"key": "\xff"}\n')
    with pytest.raises(ConfigError, match=r"line 1 is no JSON"):
        read_benchmark(folder)


def test_unknown_categories_are_named_and_counted(tmp_path: Path) -> None:
    folder = benchmark(tmp_path, [line(0), line(1, "coats"), line(2, "coats")])
    (folder / "benchmark.json").write_text('{"name": "hats", "categories": {"hats": 1}}')
    with pytest.raises(ConfigError, match=r"1 categories that hats has not \('coats' × 2\)\. It has hats"):
        read_benchmark(folder, partial=True)
    (folder / "benchmark.json").unlink()
    with pytest.raises(ConfigError, match=r"2 categories that KontextBench has not \('hats' × 1, 'coats' × 2\)"):
        read_benchmark(folder)
    (folder / "benchmark.json").write_text('{"name": "hats"}')
    with pytest.raises(ConfigError, match=r"has no name and number of pairs by category"):
        read_benchmark(folder)


def test_a_torn_file_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must hold metadata\.jsonl, itself or in test/"):
        read_benchmark(tmp_path)
    folder = benchmark(tmp_path, [line(0)])
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"key": "00')
    with pytest.raises(ConfigError, match=r"line 2 is no JSON"):
        read_benchmark(folder)


def test_chains_are_turns_that_know_their_start(tmp_path: Path) -> None:
    chain = {"key": "c", "file_name": "images/c.png", "instructions": ["a", "b"], "home": True}
    found = read_benchmark(benchmark(tmp_path, [line(0)], [chain]))
    (first, second) = found.chains[0]
    assert [(t.key, t.category, t.instruction, t.home) for t in (first, second)] == [
        ("c.turn_1", "turn 1", "a", False),
        ("c.turn_2", "turn 2", "b", True),
    ]
    assert second.before == "c.turn_1"
    assert first.contexts == second.contexts == (tmp_path / "images" / "c.png",)
    with pytest.raises(ConfigError, match=r"has 1 mask_file_names for 2 instructions"):
        read_benchmark(benchmark(tmp_path, [line(0)], [chain | {"mask_file_names": ["images/m.png"]}]))
    with pytest.raises(ConfigError, match=r"has no instructions"):
        read_benchmark(benchmark(tmp_path, [line(0)], [chain | {"instructions": []}]))


def test_the_digest_sees_lines_and_pixels(tmp_path: Path) -> None:
    folder = benchmark(tmp_path, [line(0), line(1)])
    before = read_benchmark(folder).digest
    assert read_benchmark(folder).digest == before
    with Image.open(folder / "images" / "0001.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "images" / "0001.png")
    assert read_benchmark(folder).digest != before
