"""Packs images and a table of samples into indexed shards, the form that training reads."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools import tables
from data_tools.command import add_out, add_processes, at_least, command_parser, exit_status
from data_tools.rows import CONTEXT_DEFAULTS, BadRow, Columns, check_columns, sample_members
from data_tools.shard_writing import Task, growing_folder, remove_others, replacing, run_tasks, write_shard
from data_tools.tables import Chunk, Table
from kontext_train.data.index_build import IndexReport, build_index

_EXAMPLES = """the table, as CSV (context images separated by ';', none for text-to-image):
  target,prompt,context,source
  after/1.png,make the car red,before/1.png,studio
  hats/2.jpg,the person wears the hat,people/2.jpg;hats/blue.jpg,studio
  cats/3.webp,a cat on a sofa,,web

or as JSON Lines (context a list, or a string as in CSV):
  {"target": "after/1.png", "prompt": "make the car red", "context": ["before/1.png"], "source": "studio"}

or as Parquet, whose image columns hold paths, bytes, or structs of both as Hugging Face datasets write them.

examples:
  python -m data_tools.make_shards --table pairs.csv --images photos --out /data/edits
  python -m data_tools.make_shards --table train-*.parquet --out /data/edits --target edited_image --context input_image
  python -m data_tools.make_shards --table pairs.jsonl --images photos --out /data/edits --keep source --max-bad-rows 9
  python -m data_tools.make_shards --imagefolder cats/train --out /data/cats --prompt text
  python -m data_tools.make_shards --instruct-pix2pix clip-filtered-dataset --out /data/ip2p --samples-per-shard 4000

Images are stored byte for byte. Keys of samples are row numbers, from 0. --out appears when all shards are complete and
indexed; until then .OUT.partial beside it grows, and the same command goes on from there if it was interrupted.
Bad rows are told with number, column and reason, all of them in OUT.bad_rows.jsonl (format: docs/data_format.md)."""

_SHOWN_ERRORS = 10


@dataclass(slots=True)
class _Shard:
    """What a process is given: rows that become the shard `path`, the first under key `first_key`."""

    path: Path
    chunk: Chunk
    first_key: int
    columns: Columns


def make_shards(
    sources: Sequence[Table],
    out: Path,
    columns: Columns | None = None,
    *,
    samples_per_shard: int = 1000,
    max_bad_rows: int = 0,
    processes: int = 1,
) -> IndexReport:
    """Writes shards and their index to `out`. What a killed run has done is in `.OUT.partial` and not done again.

    Args:
        sources: see `tables.table_files`, `tables.imagefolder` and `tables.instruct_pix2pix`.
        out: the new folder. It must not exist or be empty, and appears only when it is complete.
        columns: by default those of `Columns`.
        samples_per_shard: rows of one shard; one with bad rows has fewer samples.
        max_bad_rows: so many bad rows are left out; they are listed in OUT.bad_rows.jsonl.
        processes: how many pack shards at the same time. The shards are the same for any number.

    Raises:
        ValueError: a bad argument, or too many bad rows; the message names row number, column, value, rule and what to
            do, up to ten, and the report of all found. The job stops there; shards without bad rows are kept.
        OSError: files could not be read or written.
    """
    columns = columns or Columns()
    for table in sources:
        check_columns(table, columns)
    total = sum(tables.count_rows(table) for table in sources)
    if total == 0:
        raise ValueError(f"table is {', '.join(str(table.path) for table in sources)}, which has no rows")
    bad_rows_path = _bad_rows_path(out)
    with growing_folder(out) as partial:
        samples, bad_rows, names = 0, list[dict[str, Any]](), set[str]()
        tasks = _tasks(sources, partial, columns, samples_per_shard)
        results = run_tasks(
            _pack, tasks, partial, processes=processes, total=total, label="make shards", is_final=_has_no_bad_rows
        )
        with closing(results):
            for task, result in results:
                names.add(task.name)
                samples += result["samples"]
                bad_rows += result["bad_rows"]
                if len(bad_rows) > max_bad_rows:
                    break
        bad_rows.sort(key=lambda row: (row["table"], row["row"]))  # processes finish in any order
        _report_bad_rows(bad_rows_path, bad_rows, max_bad_rows)
        if samples == 0:
            raise ValueError(f"all {total:,} rows are bad; see {bad_rows_path}")
        remove_others(partial, names)
        report = build_index(partial)
        if report.problems or report.samples != samples:
            raise ValueError(f"{partial} was changed by something else while shards were made. Remove it, run again")
    return report


def _tasks(sources: Sequence[Table], partial: Path, columns: Columns, samples_per_shard: int) -> Iterator[Task]:
    number = first_key = 0
    for table in sources:
        for chunk in tables.chunks(table, samples_per_shard):
            shard = _Shard(partial / f"shard-{number:06d}.tar", chunk, first_key, columns)
            identity = json.dumps([chunk.digest(), first_key, asdict(columns)])
            yield Task(shard.path.name, shard, hashlib.sha256(identity.encode()).hexdigest(), chunk.count)
            number, first_key = number + 1, first_key + chunk.count


def _has_no_bad_rows(result: dict[str, Any]) -> bool:
    return not result["bad_rows"]  # a shard that has some is packed again: the user may have mended an image


def _report_bad_rows(path: Path, bad_rows: list[dict[str, Any]], max_bad_rows: int) -> None:
    if not bad_rows:
        path.unlink(missing_ok=True)  # of an earlier run
        return
    with replacing(path) as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in bad_rows)
    if len(bad_rows) > max_bad_rows:
        lines = [f"{row['table']}, row {row['row']}: {row['reason']}" for row in bad_rows[:_SHOWN_ERRORS]]
        if len(bad_rows) > _SHOWN_ERRORS:
            lines.append(f"… and {len(bad_rows) - _SHOWN_ERRORS} more bad rows")
        lines.append(f"more than max_bad_rows = {max_bad_rows} rows are bad; all that were found are in {path}")
        raise ValueError("\n".join(lines))


def _pack(shard: _Shard) -> dict[str, Any]:
    """Writes one shard of the good rows and returns how many there are, and the bad ones."""
    bad_rows: list[dict[str, Any]] = []

    def samples() -> Iterator[tuple[str, Mapping[str, bytes]]]:
        for number, row in enumerate(shard.chunk.read()):
            try:
                yield f"{shard.first_key + number:08d}", sample_members(row, shard.chunk.table.images, shard.columns)
            except ValueError as error:
                column = error.column if isinstance(error, BadRow) else None
                place = {"table": str(shard.chunk.table.path), "row": shard.chunk.first + number}
                bad_rows.append({**place, "column": column, "reason": str(error)})

    count = write_shard(shard.path, samples())
    if count == 0:
        shard.path.unlink()
    return {"samples": count, "bad_rows": bad_rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_parser("make_shards", __doc__, _EXAMPLES)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--table", metavar="FILE", type=Path, nargs="+", help=".csv, .jsonl or .parquet, one sample a row"
    )
    source.add_argument(
        "--imagefolder", metavar="DIR", type=Path, help="Hugging Face's layout: metadata files name images"
    )
    source.add_argument("--instruct-pix2pix", metavar="DIR", type=Path, help="the set as its authors released it")
    parser.add_argument(
        "--images", metavar="DIR", type=Path, help="where a table's paths start from (default: its folder)"
    )
    add_out(parser, "the folder of shards to make")
    defaults = Columns()
    for role, names in {"target": defaults.target, "prompt": defaults.prompt}.items():
        text = f"column of the {role} (default: {' or '.join(names)}, the first that there is)"
        parser.add_argument(f"--{role}", metavar="COLUMN", help=text)
    text = f"column of context images; repeat it for more (default: {' or '.join(CONTEXT_DEFAULTS)})"
    parser.add_argument("--context", metavar="COLUMN", action="append", default=[], help=text)
    text = "column that goes into the sample's JSON, for filter_shards; repeat it for more (default: all that are left)"
    parser.add_argument("--keep", metavar="COLUMN", action="append", help=text)
    parser.add_argument("--samples-per-shard", metavar="N", type=at_least(1), default=1000, help="(default: 1000)")
    parser.add_argument(
        "--max-bad-rows", metavar="N", type=at_least(0), default=0, help="leave out so many bad rows (default: 0)"
    )
    add_processes(parser)
    arguments = parser.parse_args(argv)
    if arguments.images is not None and arguments.table is None:
        parser.error("--images goes with --table")
    return exit_status(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    if arguments.table is not None:
        sources = tables.table_files(arguments.table, arguments.images)
    elif arguments.imagefolder is not None:
        sources = tables.imagefolder(arguments.imagefolder)
    else:
        sources = tables.instruct_pix2pix(arguments.instruct_pix2pix)
    report = make_shards(
        sources,
        arguments.out,
        _columns(arguments),
        samples_per_shard=arguments.samples_per_shard,
        max_bad_rows=arguments.max_bad_rows,
        processes=arguments.processes,
    )
    print(f"{arguments.out}: {report.samples:,} samples in {report.shards:,} shards, indexed")
    bad_rows = _bad_rows_path(arguments.out)
    if bad_rows.is_file():
        print(f"{len(bad_rows.read_bytes().splitlines()):,} bad rows were left out: {bad_rows}")
    return 0


def _columns(arguments: argparse.Namespace) -> Columns:
    columns = Columns(context=tuple(arguments.context))
    if arguments.target is not None:
        columns.target = (arguments.target,)
    if arguments.prompt is not None:
        columns.prompt = (arguments.prompt,)
    if arguments.keep is not None:
        columns.keep = tuple(arguments.keep)
    return columns


def _bad_rows_path(out: Path) -> Path:
    out = Path(os.path.abspath(out))  # "." has no name to derive another from
    return out.with_name(f"{out.name}.bad_rows.jsonl")


if __name__ == "__main__":
    sys.exit(main())
