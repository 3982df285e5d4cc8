"""Packs image files and a table of pairs into indexed shards, the form that training reads."""

import argparse
import csv
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset import ShardWriter

from kontext_train.data.index import IndexReport, build_index
from kontext_train.data.shard import IMAGE_SUFFIXES, parse_sample_json, read_image_hw

_EXAMPLES = """the table, as CSV (context images separated by ';', none for text-to-image):
  target,prompt,context,source
  after/1.png,make the car red,before/1.png,studio
  hats/2.jpg,the person wears the hat,people/2.jpg;hats/blue.jpg,studio
  cats/3.webp,a cat on a sofa,,web

or as JSON Lines (context a list, or a string as in CSV):
  {"target": "after/1.png", "prompt": "make the car red", "context": ["before/1.png"], "source": "studio"}

examples:
  python -m data_tools.make_shards --images photos --table pairs.csv --out /data/edits
  python -m data_tools.make_shards --images photos --table pairs.jsonl --out /data/edits --samples-per-shard 4000

Image files are stored byte for byte. Other columns become metadata of the sample. Sample keys are row numbers, from 0.
DIR of --out must not exist or be empty; it appears when all shards are complete (format: docs/data_format.md)."""

_SHOWN_ERRORS = 10


@dataclass(slots=True)
class _Row:
    number: int  # of the data rows, from 1
    images: dict[str, Path]  # member name, such as "target.png", to file
    json: bytes


def make_shards(images: Path, table: Path, out: Path, *, samples_per_shard: int = 1000) -> IndexReport:
    """Writes shards and their index to `out`. Every row is checked before the first shard is written.

    Args:
        images: the folder that the paths in the table start from; they may not leave it.
        table: .csv (UTF-8, with a header) or .jsonl, one sample a row: `target`, `prompt`, `context` and metadata.
        out: the new folder. It must not exist or be empty, and appears only when it is complete.
        samples_per_shard: a shard is closed at this number of samples, or at 3 GB.

    Raises:
        ValueError: a bad argument, or bad rows; the message names row number, column, value, rule and what to do.
        OSError: files could not be read or written. `out` is then as it was before.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
    if not images.is_dir():
        raise ValueError(f"images is {images}, which is not a folder. Give the one that the table's paths start from")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out is {out}, which exists and is not an empty folder. Remove it or give another one")
    rows = _checked_rows(images, table)
    out = Path(os.path.abspath(out))  # "." has no name to derive another from
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise ValueError(
            f"{partial} exists: another make_shards writes to {out}, or one was killed. Remove it if none is running"
        ) from error
    try:
        _write_shards(partial, rows, samples_per_shard)
        report = build_index(partial)
        if report.problems:  # the rows were good a moment ago
            raise ValueError(f"an image in {images} changed while shards were made: {report.problems[0]}. Run it again")
        os.replace(partial, out)  # shards and index in one step: a half-written folder never has this name
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _write_shards(folder: Path, rows: Sequence[_Row], samples_per_shard: int) -> None:
    # The writer formats its pattern with %, and a user's folder may have one in its name.
    pattern = f"{os.path.abspath(folder)}/".replace("%", "%%") + "shard-%06d.tar"
    # encoder=False: bytes go in as they are. mtime=0: the same rows make the same shards, bit for bit.
    with ShardWriter(pattern, maxcount=samples_per_shard, verbose=0, encoder=False, mtime=0) as writer:
        for row in rows:
            members = {name: path.read_bytes() for name, path in row.images.items()}
            writer.write({"__key__": f"{row.number - 1:08d}", "json": row.json, **members})


def _checked_rows(images: Path, table: Path) -> list[_Row]:
    """All rows of the table, their images opened and checked. Raises ValueError that lists the first bad rows."""
    rows, errors = list[_Row](), list[str]()
    for number, record in enumerate(_records(table), start=1):
        try:
            rows.append(_row(number, record, images))
        except ValueError as error:
            errors.append(f"{table}, row {number}: {error}")
    if errors:
        more = f"\n… and {len(errors) - _SHOWN_ERRORS} more bad rows" if len(errors) > _SHOWN_ERRORS else ""
        raise ValueError("\n".join(errors[:_SHOWN_ERRORS]) + more)
    if not rows:
        raise ValueError(f"table is {table}, which has no rows. It needs one row a sample")
    return rows


def _records(table: Path) -> Iterator[dict[str, Any] | ValueError]:
    """The rows of a table as they are; a row that cannot be read is yielded as its error, so that others are seen."""
    if not table.is_file():
        raise ValueError(f"table is {table}, which is not a file. Give a .csv or .jsonl file")
    try:
        match table.suffix.lower():
            case ".csv":
                yield from _csv_records(table)
            case ".jsonl":
                yield from _jsonl_records(table)
            case suffix:
                raise ValueError(f"table is {table}; its suffix must be .csv or .jsonl, not {suffix!r}. Rename it")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{table} cannot be read as UTF-8 text in that format ({error}). Save it again as such"
        ) from error


def _csv_records(table: Path) -> Iterator[dict[str, Any] | ValueError]:
    with open(table, newline="", encoding="utf-8-sig") as file:  # spreadsheets like to put a byte order mark first
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        for column in ("target", "prompt"):
            if columns.count(column) != 1:
                raise ValueError(f"{table}: columns are {columns}; exactly one must be {column!r}. Correct the header")
        if len(set(columns)) != len(columns):
            raise ValueError(f"{table}: columns are {columns}; two have one name. Rename one")
        for record in reader:
            if None in record or None in record.values():  # DictReader's marks for too many and too few
                yield ValueError(f"it must have {len(columns)} values, one a column. Quote values that have commas")
            else:
                yield record


def _jsonl_records(table: Path) -> Iterator[dict[str, Any] | ValueError]:
    with open(table, encoding="utf-8") as file:
        for line in filter(str.strip, file):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            wrong = ValueError(f"line is {line.strip()[:80]!r}; every line must be a JSON object. Correct it")
            yield record if isinstance(record, dict) else wrong


def _row(number: int, record: dict[str, Any] | ValueError, images: Path) -> _Row:
    """Checks one row. Raises ValueError that names column, value, rule and what to do."""
    if isinstance(record, ValueError):
        raise record
    rest = {column: value for column, value in record.items() if column not in ("target", "context")}
    if not isinstance(rest.get("prompt"), str):
        raise ValueError(f"column prompt is {rest.get('prompt')!r}; it must be a string. Write '' for an empty prompt")
    raw = json.dumps(rest).encode()
    try:
        parse_sample_json(raw)
    except ValueError as error:
        raise ValueError(f"column prompt is {rest['prompt']!r}; {error}. Correct the text") from error
    members = {}
    for name, column, value in [("target", "target", record.get("target")), *_contexts(record.get("context"))]:
        path = _checked_image(images, column, value)
        members[f"{name}.{path.suffix[1:].lower()}"] = path
    return _Row(number, members, raw)


def _contexts(value: Any) -> Iterator[tuple[str, str, Any]]:
    """(member name, column, path) of each context image."""
    match value:
        case None | "":
            return
        case str():
            paths: list[Any] = [path.strip() for path in value.split(";")]
        case list():
            paths = value
        case _:
            raise ValueError(f"column context is {value!r}; it must be a list of paths, or a string of paths with ';'")
    for number, path in enumerate(paths):
        yield f"context.{number}", "context", path


def _checked_image(images: Path, column: str, value: Any) -> Path:
    given = f"column {column} is {value!r}"
    if not isinstance(value, str) or not value:
        raise ValueError(f"{given}; it must be the path of an image. Fill it in")
    path = Path(os.path.abspath(images / value))
    if not path.is_relative_to(os.path.abspath(images)):
        raise ValueError(f"{given}; it must stay inside {images}. Move the file there or give a higher --images folder")
    if path.suffix[1:].lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"{given}; it must end in {', '.join(IMAGE_SUFFIXES)}. Convert the image")
    if not path.is_file():
        raise ValueError(f"{given}; there is no such file in {images}. Correct the path or remove the row")
    try:
        with open(path, "rb") as file:
            read_image_hw(file)
    except ValueError as error:
        raise ValueError(f"{given}; it is {error}. Replace the file or remove the row") from error
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.make_shards",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", metavar="DIR", type=Path, required=True, help="where the table's paths start from")
    parser.add_argument("--table", metavar="FILE", type=Path, required=True, help=".csv or .jsonl, one sample a row")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to make")
    parser.add_argument("--samples-per-shard", metavar="N", type=int, default=1000, help="(default: 1000)")
    arguments = parser.parse_args(argv)
    try:
        report = make_shards(
            arguments.images, arguments.table, arguments.out, samples_per_shard=arguments.samples_per_shard
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: {report.samples:,} samples in {report.shards:,} shards, indexed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
