"""Folder and table to shards and back: the same bytes, and words about everything that is wrong."""

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools import index_shards, make_shards, shard_writing, tables
from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import IndexReport
from kontext_train.data.sample import SampleReader
from kontext_train.data.transforms import Transform


def image(height: int, width: int, form: str, seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "in").mkdir(parents=True)
    (folder / "a.png").write_bytes(image(16, 16, "PNG", 0))
    (folder / "b.JPG").write_bytes(image(32, 16, "JPEG", 1))
    (folder / "in" / "c d.webp").write_bytes(image(16, 48, "WEBP", 2))
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("x")
    (tmp_path / "outside.png").write_bytes(image(16, 16, "PNG", 3))
    return folder


COLUMNS = ["target", "prompt", "context", "source"]
ROWS: list[list[str]] = [
    ["a.png", "make it red, please", "b.JPG", "studio"],
    ["b.JPG", "", "", "web"],
    ["in/c d.webp", "zwei Zeilen\nund ein ü", "a.png; b.JPG", ""],
]


def csv_table(folder: Path, rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> Path:
    path = folder / "pairs.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def jsonl_table(folder: Path, rows: Sequence[object]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pack(images: Path, table: Path, out: Path, **options: Any) -> IndexReport:
    return make_shards.make_shards(tables.table_files([table], images), out, **options)


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


# --------------------------------------------------------------------------------------------------------- make_shards


def test_csv_becomes_indexed_shards(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "100%d"  # a percent sign must not reach the shard writer's pattern
    report = pack(images, csv_table(tmp_path, ROWS), out, samples_per_shard=2)
    assert (report.samples, report.shards, report.problems) == (3, 2, [])
    assert sorted(path.name for path in out.iterdir()) == ["index.arrow", "shard-000000.tar", "shard-000001.tar"]
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    index = ShardIndex.open(out)
    assert index.target_hw.tolist() == [[16, 16], [32, 16], [16, 48]]
    assert index.context_start.tolist() == [0, 1, 1, 3]
    assert index.context_hw.tolist() == [[32, 16], [16, 16], [32, 16]]
    samples = [SampleReader(index, Transform(1 << 20, 16)).read(i) for i in range(3)]
    assert [sample.prompt for sample in samples] == [row[1] for row in ROWS]
    assert [sample.metadata for sample in samples] == [{"source": row[3]} for row in ROWS]
    assert [sample.key for sample in samples] == ["00000000", "00000001", "00000002"]


def test_images_are_stored_byte_for_byte(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(images, csv_table(tmp_path, ROWS), out)
    with tarfile.open(out / "shard-000000.tar") as tar:
        stored = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert stored["00000000.target.png"] == (images / "a.png").read_bytes()
    assert stored["00000000.context.0.jpg"] == (images / "b.JPG").read_bytes()
    assert stored["00000002.target.webp"] == (images / "in" / "c d.webp").read_bytes()
    assert stored["00000002.context.1.jpg"] == (images / "b.JPG").read_bytes()


def test_jsonl_says_the_same_as_csv_and_keeps_types(images: Path, tmp_path: Path) -> None:
    def record(row: list[str], context: object) -> dict[str, object]:
        return {"target": row[0], "prompt": row[1], "context": context, "source": row[3]}

    rows = [record(ROWS[0], ["b.JPG"]), record(ROWS[1], None), record(ROWS[2], "a.png;b.JPG")]
    pack(images, csv_table(tmp_path, ROWS), tmp_path / "csv")
    pack(images, jsonl_table(tmp_path, rows), tmp_path / "jsonl")
    # Bit for bit, so no time and no order of a dictionary gets into a shard.
    assert shard_bytes(tmp_path / "csv") == shard_bytes(tmp_path / "jsonl")

    rows[0]["tags"] = {"n": [1, None]}
    pack(images, jsonl_table(tmp_path, rows), tmp_path / "typed")
    reader = SampleReader(ShardIndex.open(tmp_path / "typed"), Transform(1 << 20, 16))
    assert reader.read(0).metadata == {"source": "studio", "tags": {"n": [1, None]}}
    assert shard_bytes(tmp_path / "typed") != shard_bytes(tmp_path / "jsonl")


def test_spreadsheet_habits_are_accepted(images: Path, tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_bytes(b"\xef\xbb\xbf,target,prompt\r\n0,a.png,x\r\n\r\n1,b.JPG,y\r\n")  # mark, row numbers, blank line
    assert pack(images, table, tmp_path / "out").samples == 2


BAD_CSV_ROWS: dict[str, tuple[list[str], str]] = {
    "no file": (["x.png", "p", "", ""], r"column target is 'x\.png'; there is no such file in .*Correct the path"),
    "no context file": (["a.png", "p", "b.JPG;x.png", ""], r"column context is 'x\.png'; there is no such file"),
    "no target": (["", "p", "", ""], r"column target is ''; it must be the path of an image\. Fill it in"),
    "empty context": (["a.png", "p", "b.JPG;", ""], r"column context is ''; it must be the path"),
    "outside": (["../outside.png", "p", "", ""], r"column target is '\.\./outside\.png'; it must stay inside"),
    "suffix": (
        ["notes.txt", "p", "", ""],
        r"column target is 'notes\.txt'; it must end in png, jpg, jpeg, webp\. Convert",
    ),
    "empty image": (
        ["empty.png", "p", "", ""],
        r"column target is 'empty\.png'; it is not a readable PNG.*Replace the image",
    ),
    "too few": (["a.png"], r"it must have 4 values, one a column"),
    "too many": (["a.png", "p", "", "", "more"], r"it must have 4 values, one a column"),
}


@pytest.mark.parametrize("case", BAD_CSV_ROWS)
def test_bad_csv_row_is_named_and_nothing_is_written(images: Path, tmp_path: Path, case: str) -> None:
    row, message = BAD_CSV_ROWS[case]
    table = csv_table(tmp_path, [ROWS[0], row, ROWS[1]])
    with pytest.raises(ValueError, match=rf"pairs\.csv, row 2: {message}"):
        pack(images, table, tmp_path / "out")
    left = ["images", "out.bad_rows.jsonl", "outside.png", "pairs.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


BAD_JSONL_ROWS: dict[str, tuple[object, str]] = {
    "not an object": ([1], r"line is '\[1\]'; every line must be a JSON object"),
    "no prompt": ({"target": "a.png"}, r"column prompt is None; it must be a string"),
    "prompt number": ({"target": "a.png", "prompt": 3}, r"column prompt is 3; it must be a string"),
    "half a character": ({"target": "a.png", "prompt": "\ud800"}, r"column prompt is .*not valid Unicode"),
    "target list": ({"target": ["a.png"], "prompt": "p"}, r"column target is \['a\.png'\]; it must be the path"),
    "context number": (
        {"target": "a.png", "prompt": "p", "context": 1},
        r"column context is 1; it must be an image or a list",
    ),
    "context item": ({"target": "a.png", "prompt": "p", "context": [1]}, r"column context is 1; it must be the path"),
}


@pytest.mark.parametrize("case", BAD_JSONL_ROWS)
def test_bad_jsonl_row_is_named(images: Path, tmp_path: Path, case: str) -> None:
    row, message = BAD_JSONL_ROWS[case]
    table = jsonl_table(tmp_path, [{"target": "a.png", "prompt": "p"}, row])
    with pytest.raises(ValueError, match=rf"pairs\.jsonl, row 2: {message}"):
        pack(images, table, tmp_path / "out")


def test_line_that_is_not_json_is_named(images: Path, tmp_path: Path) -> None:
    table = tmp_path / "pairs.jsonl"
    table.write_text('{"target": "a.png", "prompt": "p"}\n\n{"target": \n')
    with pytest.raises(ValueError, match=r"row 2: line is '\{\"target\":'; every line must be a JSON object"):
        pack(images, table, tmp_path / "out")


def test_all_bad_rows_are_told_at_once_up_to_ten(images: Path, tmp_path: Path) -> None:
    table = csv_table(tmp_path, [["x.png", "p", "", ""]] * 12)
    with pytest.raises(ValueError, match=r"row 10: [^\n]*\n… and 2 more bad rows\nmore than max_bad_rows = 0"):
        pack(images, table, tmp_path / "out")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["target", "words"], r"one must be 'prompt' or 'edit_prompt' or 'text', or give --prompt"),
        (["target", "target", "prompt"], r"two have one name"),
        (["prompt", "x"], r"one must be 'target' or .*, or give --target"),
    ],
)
def test_bad_header(images: Path, tmp_path: Path, columns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"pairs\.csv: columns are .*{message}"):
        pack(images, csv_table(tmp_path, [], columns), tmp_path / "out")


def test_bad_arguments(images: Path, tmp_path: Path) -> None:
    table = csv_table(tmp_path, ROWS)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"images is .*nowhere, which is not a folder"):
        pack(tmp_path / "nowhere", table, out)
    with pytest.raises(ValueError, match=r"table is .*none\.csv, which is not a file"):
        pack(images, tmp_path / "none.csv", out)
    with pytest.raises(ValueError, match=r"its suffix must be \.csv, \.jsonl or \.parquet"):
        pack(images, images / "notes.txt", out)
    with pytest.raises(ValueError, match=r"pairs\.csv, which has no rows"):
        pack(images, csv_table(tmp_path, []), out)
    table.write_bytes(b"target,prompt\na.png,\xff\n")
    with pytest.raises(ValueError, match=r"pairs\.csv cannot be read as UTF-8"):
        pack(images, table, out)
    assert not out.exists()


def test_out_must_be_new_or_empty(images: Path, tmp_path: Path) -> None:
    table, out = csv_table(tmp_path, ROWS), tmp_path / "out"
    out.mkdir()
    pack(images, table, out)
    before = shard_bytes(out)
    with pytest.raises(ValueError, match=r"out is .*out, which exists and is not an empty folder"):
        pack(images, table, out)
    assert shard_bytes(out) == before


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
def test_failure_keeps_whole_shards_and_the_next_run_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    table = csv_table(tmp_path, ROWS)
    pack(images, table, tmp_path / "at once", samples_per_shard=1)
    written = list[str]()

    real = make_shards.sample_members

    def failing(row: Any, *arguments: Any) -> dict[str, bytes]:
        written.append(row["prompt"])
        if len(written) == 2:
            raise error
        return real(row, *arguments)

    monkeypatch.setattr(make_shards, "sample_members", failing)
    with pytest.raises(type(error), match=str(error) or None):
        pack(images, table, tmp_path / "out", samples_per_shard=1)
    assert not (tmp_path / "out").exists()
    assert shard_bytes(tmp_path / ".out.partial").keys() == {"shard-000000.tar"}

    assert pack(images, table, tmp_path / "out", samples_per_shard=1).samples == 3
    assert written == [ROWS[i][1] for i in (0, 1, 1, 2)]  # nothing again that was whole
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "at once")
    assert not (tmp_path / ".out.partial").exists()
    assert not any(path.name.startswith(".") for path in (tmp_path / "out").iterdir())


def test_failure_before_the_first_shard_leaves_nothing(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1: column target is 'x\.png'"):
        pack(images, csv_table(tmp_path, [["x.png", "p", "", ""]]), tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()


def test_only_what_changed_is_packed_again(images: Path, tmp_path: Path) -> None:
    rows = [*ROWS, ["x.png", "p", "", ""]]
    with pytest.raises(ValueError, match="row 4: "):
        pack(images, csv_table(tmp_path, rows), tmp_path / "out", samples_per_shard=1)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").glob("*.tar")}
    assert len(times) == 3
    rows[1][1] = "another prompt"
    report = pack(images, csv_table(tmp_path, rows[:2]), tmp_path / "out", samples_per_shard=1)
    assert report.samples == 2  # the third shard, of a row that the table no longer has, is gone
    again = {path.name for path in (tmp_path / "out").glob("*.tar") if path.stat().st_mtime_ns != times[path.name]}
    assert again == {"shard-000001.tar"}


def test_row_that_was_bad_is_looked_at_again(images: Path, tmp_path: Path) -> None:
    table = csv_table(tmp_path, [*ROWS, ["late.png", "p", "", ""]])
    with pytest.raises(ValueError, match=r"row 4: column target is 'late\.png'; there is no such file"):
        pack(images, table, tmp_path / "out", samples_per_shard=2)
    (images / "late.png").write_bytes((images / "a.png").read_bytes())
    assert pack(images, table, tmp_path / "out", samples_per_shard=2).samples == 4
    assert not (tmp_path / "out.bad_rows.jsonl").exists()


def test_tolerated_bad_rows_are_left_out_and_reported(images: Path, tmp_path: Path) -> None:
    rows = [ROWS[0], ["x.png", "p", "", ""], ROWS[1], ["empty.png", "p", "", ""]]
    table = csv_table(tmp_path, rows)
    with pytest.raises(ValueError, match="more than max_bad_rows = 1 rows are bad; all that were found are in "):
        pack(images, table, tmp_path / "out", max_bad_rows=1)
    assert pack(images, table, tmp_path / "out", max_bad_rows=2).samples == 2
    reader = SampleReader(ShardIndex.open(tmp_path / "out"), Transform(1 << 20, 16))
    assert [reader.read(i).key for i in range(2)] == ["00000000", "00000002"]  # keys stay row numbers
    lines = [json.loads(line) for line in (tmp_path / "out.bad_rows.jsonl").read_text().splitlines()]
    assert [(line["table"], line["row"], line["column"]) for line in lines] == [
        (str(table), 2, "target"),
        (str(table), 4, "target"),
    ]
    assert lines[0]["reason"].startswith("column target is 'x.png'; there is no such file in ")


def test_finished_shard_that_someone_removed_is_missed(images: Path, tmp_path: Path) -> None:
    rows = [*ROWS, ["x.png", "p", "", ""]]
    with pytest.raises(ValueError, match="row 4: "):
        pack(images, csv_table(tmp_path, rows), tmp_path / "out", samples_per_shard=1)
    (tmp_path / ".out.partial" / "shard-000001.tar").unlink()
    with pytest.raises(ValueError, match="was changed by something else while shards were made"):
        pack(images, csv_table(tmp_path, ROWS), tmp_path / "out", samples_per_shard=1)


def test_refused_run_leaves_the_report_of_the_good_one(images: Path, tmp_path: Path) -> None:
    table = csv_table(tmp_path, [ROWS[0], ["x.png", "p", "", ""]])
    pack(images, table, tmp_path / "out", max_bad_rows=1)
    with pytest.raises(ValueError, match="which exists and is not an empty folder"):
        pack(images, table, tmp_path / "out", max_bad_rows=1)
    assert (tmp_path / "out.bad_rows.jsonl").is_file()


def test_out_that_another_process_writes_is_refused(images: Path, tmp_path: Path) -> None:
    with (
        shard_writing.growing_folder(tmp_path / "out"),
        pytest.raises(ValueError, match=r"another process is writing .*out \(in .*\.out\.partial\)\. Wait for it"),
    ):
        pack(images, csv_table(tmp_path, ROWS), tmp_path / "out")


def test_processes_do_not_change_a_byte(images: Path, tmp_path: Path) -> None:
    table = csv_table(tmp_path, ROWS * 3)
    pack(images, table, tmp_path / "one", samples_per_shard=2)
    pack(images, table, tmp_path / "two", samples_per_shard=2, processes=2)
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")
    assert len(shard_bytes(tmp_path / "one")) == 5


def test_make_shards_command(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--images", str(images), "--table", str(csv_table(tmp_path, ROWS)), "--out", str(tmp_path / "out")]
    assert make_shards.main([*arguments, "--samples-per-shard", "1"]) == 0
    assert "3 samples in 3 shards, indexed" in capsys.readouterr().out
    assert make_shards.main(arguments) == 1
    assert "error: out is" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- index_shards


@pytest.fixture
def shards(images: Path, tmp_path: Path) -> Path:
    pack(images, csv_table(tmp_path, ROWS), tmp_path / "out", samples_per_shard=2)
    return tmp_path / "out"


def test_index_shards_command(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "index.arrow").unlink()
    assert index_shards.main([str(shards)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{shards}: 3 samples in 2 shards, 0 problems",
        "  target pixels  ≤256²: 3  |  contexts a sample  0: 1  1: 1  2: 1",
    ]
    assert len(ShardIndex.open(shards)) == 3


def test_histogram_edges(shards: Path) -> None:
    index = ShardIndex.open(shards)
    index.target_hw = np.array([[256, 256], [256, 257], [1, 512 * 512], [2048, 2048], [60_000, 60_000]], np.int32)
    line = index_shards.size_histogram(index)
    assert line.startswith("target pixels  ≤256²: 1  ≤512²: 2  ≤2048²: 1  >2048²: 1  |")


def test_index_shards_reports_problems_and_still_indexes(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(shards / "shard-000000.tar", 3000)
    (shards / "other.tar").write_bytes(b"")
    assert index_shards.main([str(shards), "--max-problems", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{shards}: 1 samples in 3 shards (1 known before), 2 problems"
    assert lines[2].startswith("  other.tar: not an uncompressed tar file")
    assert lines[3] == "  … and 1 more (--max-problems 2 shows all)"
    assert len(ShardIndex.open(shards)) == 1


def test_index_shards_goes_on_after_a_folder_without_shards(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none").mkdir()
    assert index_shards.main([str(tmp_path / "none"), str(shards)]) == 1
    captured = capsys.readouterr()
    assert f"error: {tmp_path / 'none'} has no shards" in captured.err
    assert "3 samples" in captured.out


def test_index_shards_where_everything_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    assert index_shards.main([str(tmp_path)]) == 1
    assert "0 samples in 1 shards, 1 problems" in capsys.readouterr().out


def test_index_shards_refuses_a_negative_limit(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        index_shards.main([str(shards), "--max-problems", "-1"])
    assert "--max-problems: it is -1; it must be 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["make_shards", "index_shards"])
def test_help_has_examples(tool: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", f"data_tools.{tool}", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    assert f"python -m data_tools.{tool} " in run.stdout.split("examples:")[1]
    assert "docs/data_format.md" in run.stdout
