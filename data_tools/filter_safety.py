"""Writes new shards of the samples that a safety policy lets through, and says why the others are not there."""

import argparse
import io
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, Any

from PIL import Image

from data_tools.command import add_out, add_processes, command_parser, exit_status
from data_tools.expression import Clause, MissingField, parse_clauses
from data_tools.filter_shards import copy_runs, sample_run, sample_values
from data_tools.scanning import flat_rows, scan, shard_digest
from data_tools.shard_writing import Task, growing_folder, remove_others, replacing, run_tasks
from kontext_train.data.config import DataConfig
from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import build_index
from kontext_train.data.shard import Problem, ScannedSample, Span
from kontext_train.data.transforms import decode_image
from kontext_train.safety.rules import Kind, Policy, Rules, read_rules

_EXAMPLES = """examples:
  python -m data_tools.filter_safety /data/edits --rules policy.yaml --out /data/safe
  python -m data_tools.filter_safety /data/labelled --rules policy.yaml --labels "json.unsafe == 1" --out /data/measured

The rules look at the prompt, the target and every context image (docs/safety.md). A sample that a rule drops or
quarantines is not written; one that only a rule of policy `report` finds is. Beside the shards, which keep their names:
  audit.jsonl       every finding: shard, key, rule, part, score, threshold, policy, reason. Never an image or a prompt
  quarantine.jsonl  shard and key of what somebody should look at; a scorer that fails puts a sample here
  filter_safety.json  counts for each rule and, with --labels, what each threshold finds and misses
  safety.json       what data.require_safety_filter asks for
--out appears when all is done; until then .OUT.partial beside it grows, and the same command goes on from there."""

_AT_ONCE = 32  # samples judged in one go
_BACKGROUND = tuple(DataConfig().background)  # seen through transparency, as in training
REPORT_NAME, AUDIT_NAME, QUARANTINE_NAME = "filter_safety.json", "audit.jsonl", "quarantine.jsonl"


@dataclass(slots=True)
class _Shard:
    """What a process is given."""

    source: Path
    out: Path
    rules: Path
    digest: str  # of the rules; what is written is said to have passed it
    labels: str | None


def filter_safety(
    folder: Path,
    out: Path,
    rules: Path,
    *,
    labels: str | None = None,
    max_false_positives: float = 0.02,
    processes: int = 1,
) -> dict[str, Any]:
    """Writes to `out` the samples of `folder` that pass, and their index. Returns what OUT/filter_safety.json holds.

    Args:
        folder: indexed shards of images.
        rules: the policy.
        labels: an expression of `data_tools.expression` that holds for samples that should be found; it calibrates.
        max_false_positives: share of the other samples that a proposed threshold may find.

    Raises:
        ValueError: a bad policy or expression, one that changed meanwhile, no index, encoded shards, nothing is kept,
            `out` is not new.
        OSError: files could not be read or written.
    """
    from kontext_train.safety.judge import rules_digest  # torch

    policy = read_rules(rules)
    _metadata_clauses(policy)
    _judge(
        policy, digest := rules_digest(policy)
    )  # a model or list that does not do is refused before anything is read
    index = ShardIndex.open(folder)
    if index.encoding is not None:
        raise ValueError(f"{folder} holds encoded shards. Filter the images that they were made from, and encode again")
    shards = [folder / name for name, _ in flat_rows(index)]
    with growing_folder(out) as partial:
        tasks = []
        for shard in shards:
            given = _Shard(shard, partial / shard.name, rules, digest, labels)
            tasks.append(Task(shard.name, given, shard_digest(shard, digest, labels), 1))
        results = run_tasks(
            _filter, tasks, partial, processes=processes, total=len(tasks), label="filter", unit=" shards"
        )
        with closing(results):
            by_shard = {task.name: result for task, result in results}
        ordered = [by_shard[shard.name] | {"shard": shard.name} for shard in shards]
        kept = sum(result["kept"] for result in ordered)
        if not kept:
            raise ValueError(f"nothing is kept of {folder}: look at the policy's thresholds")
        written = [partial / result["shard"] for result in ordered if result["kept"]]
        remove_others(partial, [path.name for path in written])
        report = _report(policy, index, ordered, digest) | {"kept": kept}
        if labels is not None:
            report["calibration"] = _calibrations(ordered, labels, max_false_positives)
        _write_lists(partial, ordered)
        with replacing(partial / REPORT_NAME) as file:
            file.write(json.dumps(report, indent=2).encode())
        _read_unchanged(rules, digest)
        if build_index(partial, passed=report["policy"]).samples != kept:
            raise ValueError(f"{partial} was changed by something else meanwhile. Remove it, run again")
    return report


def _report(policy: Rules, index: ShardIndex, results: Sequence[dict[str, Any]], digest: str) -> dict[str, Any]:
    found = Counter[str]()  # samples, not parts
    for result in results:
        for finding in {(line["key"], line["rule"], line["score"] is None) for line in result["audit"]}:
            found[f"{finding[1]}{' failed' if finding[2] else ''}"] += 1
    return {
        "policy": {"name": policy.name, "digest": digest, "reports_only": policy.reports_only},
        "source": {"folder": index.folder, "digest": index.digest, "samples": len(index)},
        "rules": [
            {
                "rule": rule.name,
                "policy": rule.policy.value,
                "found": found[rule.name],
                "failed": found[f"{rule.name} failed"],
            }
            for rule in policy.rules
        ],
        "unreadable": found["unreadable failed"],
        "dropped": sum(result["dropped"] for result in results),
        "quarantined": sum(len(result["quarantined"]) for result in results),
    }


def _calibrations(results: Sequence[dict[str, Any]], labels: str, max_false_positives: float) -> dict[str, Any]:
    """For each rule with scores: its operating points, or null without any; and what the policy as a whole finds."""
    samples = [sample for result in results for sample in result["scores"]]
    names = sorted({name for sample in samples for name in sample["scores"]})
    made: dict[str, Any] = {"labels": labels}
    for name in names:
        scored = [s for s in samples if name in s["scores"]]
        scores, with_label = [s["scores"][name] for s in scored], [s["label"] for s in scored]
        made[name] = _calibration(scores, with_label, max_false_positives)
    found, positive = [s["found"] for s in samples], [s["label"] for s in samples]
    hits = sum(f and p for f, p in zip(found, positive, strict=True))
    made["policy"] = {
        "recall": hits / max(sum(positive), 1),
        "precision": hits / max(sum(found), 1),
        "false_positives": (sum(found) - hits) / max(len(samples) - sum(positive), 1),
    }
    return made


def _calibration(scores: list[float], labels: list[bool], max_false_positives: float) -> dict[str, Any] | None:
    from kontext_train.safety.heads import calibration

    try:
        return calibration(scores, labels, max_false_positives)
    except ValueError:  # what the rule sees is all of one class, or it tells nothing: no reason to lose the shards
        return None


def _write_lists(partial: Path, results: Sequence[dict[str, Any]]) -> None:
    for name, part in ((AUDIT_NAME, "audit"), (QUARANTINE_NAME, "quarantined")):
        with replacing(partial / name) as file:
            for result in results:
                lines = [{"shard": result["shard"], **line} for line in result[part]]
                file.writelines(json.dumps(line).encode() + b"\n" for line in lines)


def _filter(given: _Shard) -> dict[str, Any]:
    """Judges one shard, writes what is kept of it, and returns findings and counts."""
    policy = _read_unchanged(given.rules, given.digest)
    clauses = _metadata_clauses(policy)
    judge = _judge(policy, given.digest)
    label = None if given.labels is None else parse_clauses(given.labels)
    result: dict[str, Any] = {"kept": 0, "dropped": 0, "quarantined": [], "audit": [], "scores": []}
    runs: list[Span] = []
    with open(given.source, "rb") as file:
        samples = (
            found for found in scan(given.source) if not isinstance(found, Problem)
        )  # nor are those in the index
        while chunk := list(islice(samples, _AT_ONCE)):
            values = [sample_values(sample, given.source.name, file) for sample in chunk]
            subjects, unreadable = _subjects(chunk, values, file)
            for sample, value, verdict, reason in zip(chunk, values, judge.judge(subjects), unreadable, strict=True):
                _add_metadata(policy, clauses, value, verdict)
                _note(sample, value, verdict, reason, label, result)
                if verdict.blocking() is None and reason is None:
                    runs.append(sample_run(sample))
        result["kept"] = len(runs)
        if runs:
            with replacing(given.out) as out:
                copy_runs(file, runs, out)
    return result


def _subjects(
    chunk: Sequence[ScannedSample], values: Sequence[dict[str, Any]], file: IO[bytes]
) -> tuple[list[Any], list[str | None]]:
    """What to judge of each sample, and why it could not be read: then its prompt is judged all the same."""
    from kontext_train.safety.judge import Subject

    subjects, unreadable = [], list[str | None]()
    for sample, value in zip(chunk, values, strict=True):
        reason, images, files = None, {}, {}
        spans = {"target": sample.target} | {f"context.{i}": span for i, span in enumerate(sample.contexts)}
        for part, span in spans.items():
            files[part] = _content(file, span)
            try:
                images[part] = decode_image(io.BytesIO(files[part]), _BACKGROUND)
            except Exception as error:  # Pillow raises a dozen kinds on bad bytes
                reason = f"{part} cannot be decoded ({type(error).__name__})"
        subjects.append(Subject(value["prompt"], images, files))
        unreadable.append(reason)
    return subjects, unreadable


def decoded(file: IO[bytes], span: Span) -> Image.Image:
    return decode_image(io.BytesIO(_content(file, span)), _BACKGROUND)


def _content(file: IO[bytes], span: Span) -> bytes:
    file.seek(span.offset)
    return file.read(span.size)


def _add_metadata(policy: Rules, clauses: dict[str, list[Clause]], values: dict[str, Any], verdict: Any) -> None:
    """A rule on metadata finds a sample of which all its clauses hold, and quarantines one that it says nothing of."""
    from kontext_train.safety.judge import Finding

    for rule in policy.rules:
        if rule.kind is not Kind.metadata:
            continue
        try:
            holds = all(clause.holds(values) for clause in clauses[rule.name])
        except MissingField as error:
            reason = f"the sample lacks {error}; has() asks for it"
            verdict.findings.append(Finding(rule.name, Policy.quarantine, "sample", None, 1.0, reason))
            continue
        except ValueError as error:  # its text may quote the prompt
            reason = f"cannot be worked out ({type(error.__cause__ or error).__name__})"
            verdict.findings.append(Finding(rule.name, Policy.quarantine, "sample", None, 1.0, reason))
            continue
        if holds:
            verdict.findings.append(Finding(rule.name, rule.policy, "sample", 1.0, 1.0))


def _note(
    sample: ScannedSample,
    values: dict[str, Any],
    verdict: Any,
    unreadable: str | None,
    label: list[Clause] | None,
    result: dict[str, Any],
) -> None:
    lines = [finding.line() for finding in verdict.findings]
    if unreadable is not None:
        policy = Policy.quarantine.value
        lines.append({"rule": "unreadable", "policy": policy, "part": "sample", "score": None, "reason": unreadable})
    result["audit"] += [{"key": sample.key, **line} for line in lines]
    policies = {line["policy"] for line in lines}
    if Policy.drop.value in policies:
        result["dropped"] += 1
    elif Policy.quarantine.value in policies:
        rules = sorted({line["rule"] for line in lines})
        result["quarantined"].append({"key": sample.key, "rules": rules})
    if label is not None:
        scores = {rule: max(parts.values()) for rule, parts in verdict.scores.items() if parts}
        left_out = bool(policies & {Policy.drop.value, Policy.quarantine.value})
        result["scores"].append({"label": has_label(label, values), "scores": scores, "found": left_out})


def has_label(label: Sequence[Clause], values: dict[str, Any]) -> bool:
    """Raises ValueError, with shard and key, for a sample that the expression says nothing of."""
    try:
        return all(clause.holds(values) for clause in label)
    except (MissingField, ValueError) as error:
        raise ValueError(f"{values['shard']}: {values['key']}: has no label ({error})") from error


def _metadata_clauses(policy: Rules) -> dict[str, list[Clause]]:
    return {rule.name: parse_clauses(rule.where) for rule in policy.rules if rule.kind is Kind.metadata}


def _read_unchanged(rules: Path, digest: str) -> Rules:
    """The policy. ValueError unless it is the one that the run began with, which the index will name."""
    from kontext_train.safety.judge import rules_digest

    policy = read_rules(rules)
    if rules_digest(policy) != digest:
        hint = "Leave them as they are and run the same command again: all shards are filtered anew"
        raise ValueError(f"{rules}: it, or a list, head or model that it names, changed while the filter ran. {hint}")
    return policy


@lru_cache(maxsize=1)
def _judge(policy: Rules, digest: str) -> Any:
    """Loaded once in each process. digest: of the policy, so that a changed one is not taken for it."""
    import torch

    from kontext_train.safety.judge import Judge

    judge = Judge(policy, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    _read_unchanged(policy.source, digest)  # lists are read after the digest is made
    return judge


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_parser("filter_safety", __doc__, _EXAMPLES)
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="a folder of shards of images (*.tar) with their index"
    )
    parser.add_argument("--rules", metavar="FILE", type=Path, required=True, help="the policy: docs/safety.md")
    add_out(parser, "the folder of shards to make")
    parser.add_argument("--labels", metavar="EXPRESSION", help="holds for samples that should be found; calibrates")
    parser.add_argument(
        "--max-false-positives",
        metavar="SHARE",
        type=float,
        default=0.02,
        help="of a proposed threshold (default: 0.02)",
    )
    add_processes(parser)
    arguments = parser.parse_args(argv)
    return exit_status(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    report = filter_safety(
        arguments.folder,
        arguments.out,
        arguments.rules,
        labels=arguments.labels,
        max_false_positives=arguments.max_false_positives,
        processes=arguments.processes,
    )
    policy = report["policy"]
    print(f"{arguments.out}: {report['kept']:,} of {report['source']['samples']:,} samples kept, indexed")
    if policy["reports_only"]:
        print("  the policy only reports: data.require_safety_filter does not take these shards")
    else:
        print(f"  data.require_safety_filter={policy['name']}@{policy['digest'][:12]}")
    print(f"  dropped {report['dropped']:,}, quarantined {report['quarantined']:,}")
    for rule in report["rules"]:
        failed = f", failed on {rule['failed']:,}" if rule["failed"] else ""
        print(f"  {rule['rule']:24} {rule['policy']:10} found {rule['found']:>10,}{failed}")
    for name, made in report.get("calibration", {}).items():
        point = made.get("chosen") if isinstance(made, dict) else None
        if point:
            told = f"recall {point['recall']:.3f} precision {point['precision']:.3f}"
            print(f"  {name}: threshold {point['threshold']:.4f} has {told}")
        elif made is None:
            print(f"  {name}: no threshold, for no useful one was found on these labels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
