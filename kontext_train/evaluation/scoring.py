"""Measures the images of a result folder, and sums up.

What is measured is kept as it is found, scores/METRIC.jsonl, a line an image: a stop of any kind loses nothing, and a
later call measures only what is new or failed, unless the metric's model is another. sets/METRIC.json is of all images
together (`sets.py`). summary.json holds every number by category with its interval, and names what is missing.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kontext_train.evaluation import bootstrap
from kontext_train.evaluation.benchmark import ALL, Case, some
from kontext_train.evaluation.metrics.base import LeftOut, Metric, SetMetric, Shown, Unmeasured
from kontext_train.evaluation.progress import bar
from kontext_train.evaluation.results import (
    SUMMARY,
    UNSEEN,
    Results,
    image_id,
    latencies,
    not_made,
    write_json,
    write_text,
)
from kontext_train.evaluation.sets import compare, read_sets

YES_NO = ("face_found", "text_found", "right")  # numbers that are 1 or 0 of an image; the last is the quickstart's


@dataclass(slots=True)
class Scores:
    """What one metric found, by image. Every image that is there is in values, failed or left_out."""

    about: str
    numbers: dict[str, str]  # which way is better
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # reasons
    left_out: dict[str, str] = field(default_factory=dict)  # why the metric has nothing to say there
    needs: dict[str, str] = field(default_factory=dict)  # of numbers: what an image without one lacks
    of: dict[str, str] = field(default_factory=dict)  # which file of which case was measured

    def forget(self, images: Iterable[str]) -> None:
        for image in images:
            for found in (self.values, self.failed, self.left_out, self.of):
                found.pop(image, None)

    def left_out_of(self, number: str) -> dict[str, str]:
        """Why each image that has no such number has none."""
        lacks = f"has not {self.needs.get(number, 'what it needs')}"
        return self.left_out | {image: lacks for image, values in self.values.items() if number not in values}


def score(
    results: Results,
    metrics: Sequence[Metric],
    set_metrics: Sequence[SetMetric] = (),
    references: str | None = None,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure what is new, write summary.json and return it. progress: show it on stderr."""
    missing = not_made(results)
    for metric in metrics:
        _measure(results, metric, missing, progress)
    for set_metric in set_metrics:
        compare(results, set_metric, missing, references, progress)
    summary = summarise(results)
    write_json(results.folder / SUMMARY, summary)
    return summary


def scores_file(results: Results, name: str) -> Path:
    return results.folder / "scores" / f"{name}.jsonl"


def read_scores(results: Results) -> dict[str, Scores]:
    """What was measured of the images that are there now, by metric. An image that no score has seen has failed."""
    missing = not_made(results)
    images = {image_id(case.key, seed): (case, seed) for case, seed in results.images()}
    there = {name: image for name, image in images.items() if name not in missing}
    found = {}
    for file in sorted((results.folder / "scores").glob("*.jsonl")):
        kept = _read(file)
        if kept is None:
            continue
        there_now = {name: _of(results, case, seed) for name, (case, seed) in there.items()}
        kept.forget([name for name, of in kept.of.items() if of != there_now.get(name)])
        known = kept.values.keys() | kept.left_out.keys()
        found[file.stem] = Scores(
            kept.about,
            kept.numbers,
            {name: kept.values[name] for name in there if name in kept.values},
            {name: kept.failed.get(name, UNSEEN) for name in there if name not in known},
            {name: kept.left_out[name] for name in there if name in kept.left_out},
            kept.needs,
            kept.of,
        )
    return found


def _of(results: Results, case: Case, seed: int) -> str:
    """Says whether what was measured is what is there: another image, mask or target is measured anew."""
    state = results.image(case.key, seed).stat()
    return f"{state.st_size} {state.st_mtime_ns} {case.inputs} {case.truth}"


def _read(file: Path) -> Scores | None:
    """None of a file whose first line was not written whole. A later line of an image takes the place of an earlier."""
    scores = None
    for raw in file.read_bytes().split(b"\n"):  # not splitlines: reasons may hold other line ends
        try:
            line = json.loads(raw)
        except ValueError:
            break  # torn by a kill, or the end
        if scores is None:
            scores = Scores(line["about"], line["numbers"], needs=line.get("needs", {}))
            continue
        scores.forget([line["image"]])
        getattr(scores, line["kind"])[line["image"]] = line["found"]
        scores.of[line["image"]] = line.get("of", "")
    return scores


def _measure(results: Results, metric: Metric, missing: dict[str, str], progress: bool) -> None:
    file = scores_file(results, metric.name)
    before = _read(file) if file.is_file() else None
    ids = {image_id(case.key, seed): (case, seed) for case, seed in results.images()}
    now = {name: _of(results, *image) for name, image in ids.items() if name not in missing}
    kept: list[dict[str, Any]] = []
    if before is not None and before.about == metric.about:
        known: dict[str, dict[str, Any]] = {"values": {**before.values}, "left_out": {**before.left_out}}
        kept = [
            _line(name, kind, found[name], before.of[name])
            for kind, found in known.items()  # no failures: again
            for name in found
            if name in now and before.of[name] == now[name]
        ]
    have = {line["image"] for line in kept}
    todo = [name for name in now if name not in have]
    numbers = {number: better.value for number, better in metric.numbers.items()}
    head = {"about": metric.about, "numbers": numbers, "needs": {**metric.needs}}
    _write_lines(file, [head, *kept])

    def attempt(name: str) -> dict[str, Any]:
        case, seed = ids[name]
        try:
            found = metric.measure(Shown(case, seed, results.image(case.key, seed)))
        except LeftOut as reason:
            return _line(name, "left_out", str(reason), now[name])
        except Unmeasured as error:
            return _line(name, "failed", str(error), now[name])
        except Exception as error:  # a library's own, such as CUDA's that memory is out: one image's, not the run's
            return _line(name, "failed", f"{type(error).__name__}: {error}", now[name])
        if infinite := [number for number, value in found.items() if not np.isfinite(value)]:
            return _line(name, "failed", f"{', '.join(infinite)} is not finite", now[name])
        return _line(name, "values", found, now[name])

    with file.open("a", encoding="utf-8") as lines:
        for line in in_threads(attempt, todo, metric.workers, metric.name, progress):
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            lines.flush()  # what a judge was paid for is not lost


def in_threads(
    work: Callable[[str], dict[str, Any]], names: Sequence[str], workers: int, what: str, shown: bool
) -> Iterator[dict[str, Any]]:
    """What `work` gives for each name, as it comes. what: names the bar."""
    pool = ThreadPoolExecutor(workers)
    done = bar(what, len(names), shown)
    try:
        for future in as_completed([pool.submit(work, name) for name in names]):
            done.update()
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error nobody is asked any more
        done.close()


def _line(image: str, kind: str, found: object, of: str) -> dict[str, Any]:
    """kind: a field of `Scores`."""
    return {"image": image, "kind": kind, "found": found, "of": of}


def _write_lines(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def summarise(results: Results) -> dict[str, Any]:
    """Every number by category, and over all pairs ("all"). Turns of chains are categories of their own."""
    cases = {image_id(case.key, seed): case for case, seed in results.images()}
    numbers: dict[str, Any] = {}
    for name, scores in read_scores(results).items():
        for number, better in scores.numbers.items():
            by_category: dict[str, list[tuple[str, float]]] = {}
            for image, values in scores.values.items():
                if number not in values:
                    continue
                case = cases[image]
                for category in (case.category,) if case.turn else (case.category, ALL):
                    by_category.setdefault(category, []).append((case.base, values[number]))
            yes_no = number in YES_NO
            estimates = {c: bootstrap.mean(found, yes_no=yes_no) for c, found in by_category.items()}
            numbers[number] = {
                "metric": name,
                "about": scores.about,
                "better": better,
                "failed": scores.failed,
                "left_out": scores.left_out_of(number),
                "categories": {category: e.as_json() for category, e in estimates.items() if e is not None},
            }
    numbers |= read_sets(results)
    asked = Counter(case.category for case in cases.values()) | {ALL: sum(not case.turn for case in cases.values())}
    for found in numbers.values():
        for category, estimate in found["categories"].items():
            estimate["of"] = asked[category]  # images, whether the number applies to them or not
    told = ("categories", "failed", "left_out")
    return {
        "name": results.name,
        "settings": results.settings,
        "asked": len(cases),
        "not_made": not_made(results),
        "numbers": {number: found for number, found in numbers.items() if any(found[key] for key in told)},
        "latency": latency(results),
    }


def latency(results: Results) -> dict[str, dict[str, Any]]:
    """By what images were made on: how many, and of those made one at a time the median and 95th percentile of seconds;
    None where there are none.
    """
    found: dict[str, dict[str, Any]] = {}
    for made_on, images in latencies(results).items():
        seconds = [value for value in images if value is not None]
        median = bootstrap.quantile(seconds, 0.5)
        p95 = bootstrap.quantile(seconds, 0.95)
        quantiles = {"median_s": median, "p95_s": p95}
        found[made_on] = {name: e.as_json() if e is not None else None for name, e in quantiles.items()}
        found[made_on]["images"] = len(images)
    return found


def complete(summary: dict[str, Any]) -> bool:
    """Whether every image was made and every metric measured every image that it applies to."""
    return not summary["not_made"] and not any(found["failed"] for found in summary["numbers"].values())


def table(summary: dict[str, Any]) -> str:
    """What a summary says over all pairs and by turn, as lines of text."""
    lines = [f"{summary['name']}: {summary['asked'] - len(summary['not_made'])} of {summary['asked']} images"]
    for number, found in summary["numbers"].items():
        if ALL in found["categories"]:
            estimate = found["categories"][ALL]
            lines.append(f"  {number:24} {shown(estimate)}  n={estimate['n']} of {estimate['of']}")
        turns = [e for category, e in found["categories"].items() if category.startswith("turn ")]
        if turns:
            lines.append(f"  {number:24} by turn: {', '.join(map(shown, turns))}")
        for told, what in (("failed", "failed on"), ("left_out", "does not apply to")):
            if found[told]:
                lines.append(f"  {number:24} {what} {len(found[told])}: {some(list(found[told]))}")
    for made_on, found in summary["latency"].items():
        lines.append(f"  {found['images']} images on {made_on}")
        for name in ("median_s", "p95_s"):
            if (estimate := found[name]) is not None:
                lines.append(f"  latency {name:16} {shown(estimate)}  n={estimate['n']}")
    if summary["not_made"]:
        lines.append(f"  not made: {len(summary['not_made'])}: {some(list(summary['not_made']))}")
    return "\n".join(lines)


def shown(estimate: dict[str, Any]) -> str:
    """A number with its interval."""
    if estimate["low"] is None:
        return f"{estimate['value']:.4g}"
    return f"{estimate['value']:.4g} [{estimate['low']:.4g}, {estimate['high']:.4g}]"
