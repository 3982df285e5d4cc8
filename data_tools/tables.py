"""Tables of samples: CSV, JSON Lines and Parquet files, Hugging Face imagefolders, the released InstructPix2Pix set.

All become rows, dictionaries of column and value, in chunks of one shard each. A chunk of text rows carries them; one
of a Parquet file, whose images may be inside, says only where its rows are: the process that packs them reads them.
"""

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any] | ValueError  # an unreadable row is its error, so that the others are seen


@dataclass(slots=True)
class Table:
    """`path`: a file, or the folder of an InstructPix2Pix set. `images`: where the paths in it start from."""

    path: Path
    images: Path


@dataclass(slots=True)
class Chunk:
    """`count` rows of a table from row `first` on, counted from 1. `rows` is None where the table is a Parquet file."""

    table: Table
    first: int
    count: int
    rows: list[Row] | None

    def read(self) -> Iterator[Row]:
        return iter(self.rows) if self.rows is not None else _parquet_rows(self.table.path, self.first - 1, self.count)

    def digest(self) -> str:
        """Names the rows, and for Parquet the file as it is now."""
        content: Any = self.rows
        if content is None:
            state = self.table.path.stat()
            content = [state.st_size, state.st_mtime_ns]
        identity = [str(self.table.path), str(self.table.images), self.first, self.count, content]
        return hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()


def table_files(paths: Sequence[Path], images: Path | None) -> list[Table]:
    """Tables from files; paths of images in them start from `images`, or else from the folder of each."""
    if images is not None and not images.is_dir():
        raise ValueError(f"images is {images}, which is not a folder. Give the one that the table's paths start from")
    for path in paths:
        if not path.is_file():
            raise ValueError(f"table is {path}, which is not a file. Give a .csv, .jsonl or .parquet file")
        if path.suffix.lower() not in (".csv", ".jsonl", ".parquet"):
            raise ValueError(f"table is {path}; its suffix must be .csv, .jsonl or .parquet. Rename or convert it")
    return [Table(path, path.parent if images is None else images) for path in paths]


def imagefolder(folder: Path) -> list[Table]:
    """The metadata files of a Hugging Face imagefolder, in all splits; paths start from the folder of each.

    Source: https://huggingface.co/docs/datasets/image_dataset
    """
    names = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
    paths = sorted(path for path in folder.rglob("metadata.*") if path.name in names)
    if not paths:
        raise ValueError(
            f"imagefolder is {folder}; none of {', '.join(names)} is in it or below. Give a folder with one"
        )
    return table_files(paths, None)


def instruct_pix2pix(folder: Path) -> list[Table]:
    """The set as released: PROMPT/prompt.json with "edit", pairs PROMPT/SEED_0.jpg (before) and SEED_1.jpg (after), and
    PROMPT/metadata.jsonl with scores by seed.

    Source: dataset_creation/generate_img_dataset.py and edit_dataset.py of https://github.com/timothybrooks/instruct-pix2pix
    """
    if not any(folder.glob("*/prompt.json")):
        raise ValueError(f"instruct-pix2pix is {folder}; no folder in it has a prompt.json. Give the set's top folder")
    return [Table(folder, folder)]


def count_rows(table: Table) -> int:
    """Raises ValueError if the table cannot be read."""
    if table.path.suffix.lower() == ".parquet":
        return _open_parquet(table.path).metadata.num_rows
    return sum(1 for _ in _text_rows(table.path))


def columns(table: Table) -> list[str] | None:
    """Column names, where a table says them once and for all rows."""
    match table.path.suffix.lower():
        case ".csv":
            with _readable(table.path), open(table.path, newline="", encoding="utf-8-sig") as file:
                return list(next(csv.reader(file), []))
        case ".parquet":
            return _open_parquet(table.path).schema_arrow.names
        case _:
            return None


def chunks(table: Table, size: int) -> Iterator[Chunk]:
    """The table in runs of `size` rows; the last has what is left."""
    if table.path.suffix.lower() == ".parquet":
        total = count_rows(table)
        for start in range(0, total, size):
            yield Chunk(table, start + 1, min(size, total - start), None)
        return
    rows, first = _text_rows(table.path), 1
    while part := list(islice(rows, size)):
        yield Chunk(table, first, len(part), part)
        first += len(part)


def _text_rows(path: Path) -> Iterator[Row]:
    with _readable(path):
        if path.is_dir():
            yield from _instruct_pix2pix_rows(path)
        elif path.suffix.lower() == ".csv":
            yield from _csv_rows(path)
        else:
            yield from _jsonl_rows(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Names the file that its library cannot read."""
    try:
        yield
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path} cannot be read as UTF-8 text in that format ({error}). Save it again as such"
        ) from error
    except pa.ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}). Write it again") from error


def _csv_rows(path: Path) -> Iterator[Row]:
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets like to put a byte order mark first
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        if len(set(names)) != len(names):
            raise ValueError(f"{path}: columns are {names}; two have one name. Rename one")
        for row in reader:
            if None in row or None in row.values():  # DictReader's marks for too many and too few
                yield ValueError(f"it must have {len(names)} values, one a column. Quote values that have commas")
            else:
                yield row


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8") as file:
        for line in filter(str.strip, file):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            wrong = ValueError(f"line is {line.strip()[:80]!r}; every line must be a JSON object. Correct it")
            yield row if isinstance(row, dict) else wrong


def _instruct_pix2pix_rows(folder: Path) -> Iterator[Row]:
    for prompt in sorted(folder.glob("*/prompt.json")):
        name = prompt.parent.name
        seeds = sorted(path.name.removesuffix("_0.jpg") for path in prompt.parent.glob("*_0.jpg"))
        try:
            texts = json.loads(prompt.read_bytes())
            scores = _scores(prompt.with_name("metadata.jsonl"))
            edit = texts.pop("edit")
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            wrong = ValueError(f"{name}/prompt.json or metadata.jsonl cannot be used ({error!r}). Correct it")
            yield from [wrong] * len(seeds)
            continue
        for seed in seeds:
            pair = {"target": f"{name}/{seed}_1.jpg", "context": [f"{name}/{seed}_0.jpg"]}
            yield {**texts, **scores.get(seed, {}), "seed": seed, **pair, "prompt": edit}


def _scores(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    return {str(line["seed"]): line for line in map(json.loads, path.read_bytes().splitlines())}


def _open_parquet(path: Path) -> pq.ParquetFile:
    with _readable(path):
        return pq.ParquetFile(path)


def _parquet_rows(path: Path, start: int, count: int) -> Iterator[Row]:
    """Reads only the row groups that rows start … start + count - 1 are in, 64 rows at a time: they may hold images."""
    file, position = _open_parquet(path), 0
    for group in range(file.num_row_groups):
        group_end = position + file.metadata.row_group(group).num_rows
        if group_end <= start or position >= start + count:
            position = group_end
            continue
        with _readable(path):
            for batch in file.iter_batches(batch_size=64, row_groups=[group]):
                first, last = max(start - position, 0), min(start + count - position, len(batch))
                if first < last:
                    yield from batch.slice(first, last - first).to_pylist()
                position += len(batch)
