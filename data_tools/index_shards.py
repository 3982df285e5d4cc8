"""Indexes folders of shards, and tells what is in them and what is wrong with them."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.command import at_least, command_parser, exit_status
from kontext_train.data.config import is_url
from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import IndexReport, build_index

_EXAMPLES = """examples:
  python -m data_tools.index_shards /data/edits
  python -m data_tools.index_shards /data/edits /data/text_to_image --processes 16 --max-problems 1000
  python -m data_tools.index_shards s3://bucket/edits
  python -m data_tools.index_shards https://host/edits --shards names.txt --out /data/edits_index
  python -m data_tools.index_shards https://host/edits --out /data/edits_index     # then data.train=/data/edits_index

Writes DIR/index.arrow from every *.tar directly in DIR (format: docs/data_format.md; URLs: docs/storage.md). Run it
again whenever a shard was added, changed, moved or copied with a new time: it reads those alone. After it was killed it
goes on where it was. Exit status: 0 all samples are good; 1 some shards or samples have problems (the index is
written without them) or a folder could not be indexed."""

_REMOTE_PROCESSES = 32  # they wait for answers, not for the processor

_SIDES = (256, 512, 768, 1024, 1536, 2048)  # histogram edges: the side of a square of as many pixels


def size_histogram(index: ShardIndex) -> str:
    """One line: how many targets have at most 256², 512², … pixels, and how many samples have 0, 1, … contexts."""
    pixels = index.target_hw.astype(np.int64).prod(axis=1)
    bins = np.searchsorted([side**2 for side in _SIDES], pixels)
    labels = [f"≤{side}²" for side in _SIDES] + [f">{_SIDES[-1]}²"]
    targets = [f"{labels[number]}: {count:,}" for number, count in enumerate(np.bincount(bins)) if count]
    contexts = [f"{n}: {count:,}" for n, count in enumerate(index.samples_by_contexts) if count]
    return f"target pixels  {'  '.join(targets)}  |  contexts a sample  {'  '.join(contexts)}"


def print_report(folder: str, index: str, report: IndexReport, max_problems: int) -> None:
    """Prints what `build_index` found; problems one a line, at most `max_problems` of them and then how many more.
    index: the folder or URL that holds the index.
    """
    known = f" ({report.shards - report.scanned:,} known before)" if report.scanned < report.shards else ""
    print(f"{folder}: {report.samples:,} samples in {report.shards:,} shards{known}, {len(report.problems):,} problems")
    if report.samples:
        print(f"  {size_histogram(ShardIndex.open(index))}")
    for problem in report.problems[:max_problems]:
        print(f"  {problem}")
    if len(report.problems) > max_problems:
        print(f"  … and {len(report.problems) - max_problems:,} more (--max-problems {len(report.problems)} shows all)")


def _named(folder: str, names: Path) -> Sequence[str | Path]:
    given = [line.strip() for line in names.read_text().splitlines() if line.strip()]
    return given if is_url(folder) else [Path(folder, name) for name in given]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_parser("index_shards", __doc__, _EXAMPLES)
    parser.add_argument("folders", metavar="DIR", nargs="+", help="a folder of shards (*.tar), or its URL")
    parser.add_argument("--out", metavar="DIR", type=Path, help="the index of one URL goes to this local folder")
    parser.add_argument(
        "--processes", metavar="N", type=at_least(1), help="work in parallel (default: the cores; 32 for a URL)"
    )
    parser.add_argument("--shards", metavar="FILE", type=Path, help="index these alone: one name in DIR a line")
    parser.add_argument(
        "--max-problems", metavar="N", type=at_least(0), default=50, help="print N a folder (default: 50)"
    )
    arguments = parser.parse_args(argv)
    if (arguments.out or arguments.shards) and len(arguments.folders) > 1:
        parser.error(f"--out and --shards are for one DIR; {len(arguments.folders)} were given")
    return exit_status(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    status = 0
    for folder in arguments.folders:
        processes = arguments.processes or (_REMOTE_PROCESSES if is_url(folder) else len(os.sched_getaffinity(0)))
        try:
            shards = None if arguments.shards is None else _named(folder, arguments.shards)
            report = build_index(folder, shards=shards, out=arguments.out, workers=processes, progress=True)
            print_report(folder, str(arguments.out or folder), report, arguments.max_problems)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1  # the other folders are still worth indexing
        else:
            status = max(status, int(bool(report.problems)))
    return status


if __name__ == "__main__":
    sys.exit(main())
