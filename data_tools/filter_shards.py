"""Writes new shards of the samples that an expression and lists of keys let through."""

import argparse
import hashlib
import json
import shutil
import sys
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_tools.command import add_out, add_processes, command_parser, exit_status
from data_tools.expression import NAMES, Clause, MissingField, parse_clauses
from data_tools.scanning import flat_rows, scan, shard_digest
from data_tools.shard_writing import Task, growing_folder, remove_others, replacing, run_tasks
from kontext_train.data.encoding import ENCODING_NAME, digest_of
from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import build_index
from kontext_train.data.shard import Problem, ScannedSample, Span, parse_sample_json

_EXAMPLES = f"""an expression is a part of Python's:
  names             {", ".join(NAMES)}: width and height are the target's, upright, in pixels
  fields            json.FIELD or json['any name'], what make_shards --keep put into the sample
  operators         == != < <= > >= in, not in, and, or, not, + - * / %
  functions         len(x), lower(text), number(text), matches(text, 'regular expression'), has(json.FIELD)
A field that a sample lacks, or that is null, has no value: the clause that needs it does not hold, not even under not.
has(json.FIELD) asks first. Values from a CSV table are text: number(json.score) > 5.

examples:
  python -m data_tools.filter_shards /data/edits --out /data/big --where "width >= 512 and contexts == 1"
  python -m data_tools.filter_shards /data/edits --out /data/fine --where "json.aesthetic > 5 and 'ball' in prompt"
  python -m data_tools.filter_shards /data/edits --out /data/unique --drop-list report/duplicates.jsonl

A list has one JSON object a line with "shard" and "key", as check_shards writes them. Members are copied byte for byte,
shards keep their names, and those that nothing is left of are not written. OUT/filter.json says what was asked of which
index (its digest), and how many samples each clause dropped. --out appears when all is done; until then .OUT.partial
beside it grows, and the same command goes on from there if it was interrupted (format: docs/data_format.md)."""

REPORT_NAME = "filter.json"


@dataclass(slots=True)
class _Shard:
    """What a process is given."""

    source: Path
    out: Path
    where: list[str]
    drop: set[str]  # keys
    encoding: str | None  # digest of how its samples are encoded


def filter_shards(
    folder: Path, out: Path, where: Sequence[str] = (), drop_lists: Sequence[Path] = (), *, processes: int = 1
) -> dict[str, Any]:
    """Writes to `out` the samples of `folder` for which all of `where` hold and that are on no list, and their index.

    Samples are those of the folder's index: what that left out is left out here. Returns what OUT/filter.json holds.

    Raises:
        ValueError: a bad expression or list; a clause that cannot be worked out for a sample, named with shard and key;
            no index, or one that does not describe the shards; nothing is kept; `out` is not new.
        OSError: files could not be read or written.
    """
    if not where and not drop_lists:
        raise ValueError("there is neither an expression (--where) nor a list (--drop-list)")
    clauses = [clause.text for expression in where for clause in parse_clauses(expression)]
    index = ShardIndex.open(folder)
    shards = [folder / name for name, _ in flat_rows(index)]  # not all of the folder's: it may hold others
    encoding = None if index.encoding is None else digest_of(index.encoding)
    drop = _read_drop_lists(drop_lists, {shard.name for shard in shards})
    counts: dict[str, Any] = {"kept": 0, "listed": 0, "dropped": [0] * len(clauses), "missing": [0] * len(clauses)}
    with growing_folder(out) as partial:
        tasks = []
        for shard in shards:
            given = _Shard(shard, partial / shard.name, list(where), drop[shard.name], encoding)
            tasks.append(Task(shard.name, given, shard_digest(shard, where, sorted(given.drop), encoding), 1))
        results = run_tasks(
            _filter, tasks, partial, processes=processes, total=len(tasks), label="filter", unit=" shards"
        )
        written = []
        with closing(results):
            for task, result in results:
                _add(counts, result)
                if result["kept"]:
                    written.append(task.name)
        if not written:
            raise ValueError(f"nothing is kept of {folder}: {json.dumps(counts)}")
        remove_others(partial, written)
        report = {
            "source": {"folder": str(folder.absolute()), "digest": index.digest, "samples": len(index)},
            "where": list(where),
            "drop_lists": [{"path": str(path), "sha256": _sha256(path)} for path in drop_lists],
            "kept": counts["kept"],
            "listed": counts["listed"],
            "clauses": [
                {"clause": text, "dropped": dropped, "missing": missing}
                for text, dropped, missing in zip(clauses, counts["dropped"], counts["missing"], strict=True)
            ],
        }
        with replacing(partial / REPORT_NAME) as file:
            file.write(json.dumps(report, indent=2, ensure_ascii=False).encode())
        if encoding is not None:
            shutil.copyfile(folder / ENCODING_NAME, partial / ENCODING_NAME)
        if build_index(partial, passed=index.safety_filter).samples != counts["kept"]:
            raise ValueError(f"{partial} was changed by something else meanwhile. Remove it, run again")
    return report


def _add(counts: dict[str, Any], result: dict[str, Any]) -> None:
    for name in ("kept", "listed"):
        counts[name] += result[name]
    for name in ("dropped", "missing"):
        counts[name] = [a + b for a, b in zip(counts[name], result[name], strict=True)]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_drop_lists(paths: Sequence[Path], shards: set[str]) -> defaultdict[str, set[str]]:
    """Keys to drop by shard. Raises ValueError for a line without shard and key, or with a shard that is not there."""
    drop = defaultdict[str, set[str]](set)
    for path in paths:
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                entry = json.loads(line)
                shard, key = entry["shard"], entry["key"]
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                rule = 'it must be a JSON object with "shard" and "key"'
                raise ValueError(f"{path}, line {number}: {line[:80]!r}; {rule}") from error
            if shard not in shards:
                raise ValueError(
                    f"{path}, line {number}: shard is {shard!r}, which is not in the folder that is filtered"
                )
            drop[shard].add(key)
    return drop


def _filter(given: _Shard) -> dict[str, Any]:
    """Writes one shard, if anything of it is kept, and returns counts."""
    clauses = [clause for expression in given.where for clause in parse_clauses(expression)]
    result: dict[str, Any] = {"kept": 0, "listed": 0, "dropped": [0] * len(clauses), "missing": [0] * len(clauses)}
    runs = []
    with open(given.source, "rb") as file:
        for found in scan(given.source, given.encoding):
            if isinstance(found, Problem):
                continue  # it is not in the index either
            if found.key in given.drop:
                result["listed"] += 1
            elif _passes(sample_values(found, given.source.name, file), clauses, result):
                runs.append(sample_run(found))
        result["kept"] = len(runs)
        if runs:
            with replacing(given.out) as out:
                copy_runs(file, runs, out)
    return result


def sample_values(sample: ScannedSample, shard: str, file: IO[bytes]) -> dict[str, Any]:
    """A value for each of `NAMES`."""
    file.seek(sample.json.offset)
    fields = parse_sample_json(file.read(sample.json.size))
    height, width = sample.target_hw
    contexts = len(sample.contexts)
    values = {"key": sample.key, "shard": shard, "prompt": fields["prompt"], "json": fields}
    return {**values, "width": width, "height": height, "contexts": contexts}


def _passes(values: dict[str, Any], clauses: list[Clause], result: dict[str, Any]) -> bool:
    """Whether all clauses hold; the first that does not is counted."""
    for number, clause in enumerate(clauses):
        try:
            if clause.holds(values):
                continue
        except MissingField:
            result["missing"][number] += 1
        except ValueError as error:
            raise ValueError(f"{values['shard']}: {values['key']}: {error}") from error
        result["dropped"][number] += 1
        return False
    return True


def sample_run(sample: ScannedSample) -> Span:
    """The bytes of all its members with their headers."""
    end = max(span.offset + span.size for span in (sample.json, sample.target, *sample.contexts))
    padding = -end % tarfile.BLOCKSIZE
    return Span(sample.header_offset, end + padding - sample.header_offset)


def copy_runs(file: IO[bytes], runs: list[Span], out: IO[bytes]) -> None:
    for run in runs:
        file.seek(run.offset)
        out.write(file.read(run.size).ljust(run.size, b"\0"))
    end_marker = 2 * tarfile.BLOCKSIZE
    out.write(bytes(end_marker + -(out.tell() + end_marker) % tarfile.RECORDSIZE))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_parser("filter_shards", __doc__, _EXAMPLES)
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder of shards (*.tar) with their index")
    add_out(parser, "the folder of shards to make")
    parser.add_argument(
        "--where", metavar="EXPRESSION", action="append", default=[], help="repeat it for more: all must hold"
    )
    parser.add_argument(
        "--drop-list", metavar="FILE", type=Path, action="append", default=[], help="repeat it for more"
    )
    add_processes(parser)
    arguments = parser.parse_args(argv)
    return exit_status(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    report = filter_shards(
        arguments.folder, arguments.out, arguments.where, arguments.drop_list, processes=arguments.processes
    )
    print(f"{arguments.out}: {report['kept']:,} of {report['source']['samples']:,} samples kept, indexed")
    if report["drop_lists"]:
        print(f"  dropped {report['listed']:>12,}  by lists")
    for clause in report["clauses"]:
        lacking = f"  ({clause['missing']:,} of them lack a field)" if clause["missing"] else ""
        print(f"  dropped {clause['dropped']:>12,}  not {clause['clause']}{lacking}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
