"""Measures the images of a result folder, and sums up.

What is measured is kept, scores/METRIC.json, by image; a later call measures only what is new or failed, unless the
metric's model is another. sets/METRIC.json is of all images together. summary.json holds every number by category with
its interval, and names what is missing.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from kontext_train.errors import ConfigError
from kontext_train.evaluation import bootstrap
from kontext_train.evaluation.benchmark import ALL, some
from kontext_train.evaluation.metrics.base import Metric, SetMetric, Shown, Unmeasured, open_rgb
from kontext_train.evaluation.results import SUMMARY, Results, image_id, latencies, not_made, write_json

UNSEEN = "was not measured yet; score again"
SET_GROUPS = 20  # of base images, each left out once: a set metric is a matrix decomposition
IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def score(
    results: Results, metrics: Sequence[Metric], set_metrics: Sequence[SetMetric] = (), references: str | None = None
) -> dict[str, Any]:
    """Measure what is new, write summary.json and return it."""
    missing = not_made(results)
    for metric in metrics:
        _measure(results, metric, missing)
    for set_metric in set_metrics:
        numbers = _compare(results, set_metric, missing, references)
        write_json(
            results.folder / "sets" / f"{set_metric.name}.json", {"of": _made(results, missing), "numbers": numbers}
        )
    summary = summarise(results)
    write_json(results.folder / SUMMARY, summary)
    return summary


def scores_file(results: Results, name: str) -> Path:
    return results.folder / "scores" / f"{name}.json"


def read_scores(results: Results) -> dict[str, dict[str, Any]]:
    """What was measured of the images that are there now, by metric. An image that no score has seen has failed."""
    missing = not_made(results)
    there = [name for case, seed in results.images() if (name := image_id(case.key, seed)) not in missing]
    found = {}
    for file in sorted((results.folder / "scores").glob("*.json")):
        scores = json.loads(file.read_text())
        values, failed = scores["values"], scores["failed"]
        found[file.stem] = scores | {
            "values": {name: values[name] for name in there if name in values},
            "failed": {name: failed.get(name, UNSEEN) for name in there if name not in values},
        }
    return found


def _made(results: Results, missing: dict[str, str]) -> list[str]:
    """What sets are of: all single edits that are there, not turns of chains."""
    names = (image_id(case.key, seed) for case, seed in results.images() if not case.turn)
    return [name for name in names if name not in missing]


def _read_sets(results: Results) -> dict[str, dict[str, Any]]:
    """Comparisons of sets, of the images that are there now."""
    now = _made(results, not_made(results))
    found: dict[str, dict[str, Any]] = {}
    for file in sorted((results.folder / "sets").glob("*.json")):
        measured = json.loads(file.read_text())
        if measured["of"] == now:
            found |= measured["numbers"]
    return found


def _measure(results: Results, metric: Metric, missing: dict[str, str]) -> None:
    file = scores_file(results, metric.name)
    kept: dict[str, dict[str, float]] = {}
    if file.is_file():
        before = json.loads(file.read_text())
        if before["about"] == metric.about:
            kept = before["values"]
    ids = {image_id(case.key, seed): (case, seed) for case, seed in results.images()}
    values = {name: kept[name] for name in ids if name in kept and name not in missing}
    todo = [name for name in ids if name not in values and name not in missing]
    failed: dict[str, str] = {}

    def attempt(name: str) -> dict[str, float] | str:
        case, seed = ids[name]
        try:
            found = metric.measure(Shown(case, seed, results.image(case.key, seed)))
        except Unmeasured as error:
            return str(error)
        infinite = [number for number, value in found.items() if not np.isfinite(value)]
        return f"{', '.join(infinite)} is not finite" if infinite else found

    try:
        with ThreadPoolExecutor(metric.workers) as pool:
            for name, found in zip(todo, pool.map(attempt, todo), strict=True):
                if isinstance(found, str):
                    failed[name] = found
                else:
                    values[name] = found
    finally:  # what a judge was paid for is not lost
        numbers = {number: better.value for number, better in metric.numbers.items()}
        write_json(file, {"about": metric.about, "numbers": numbers, "values": values, "failed": failed})


def _compare(
    results: Results, metric: SetMetric, missing: dict[str, str], references: str | None
) -> dict[str, dict[str, Any]]:
    wanted = set(_made(results, missing))
    pairs = [(case, seed) for case, seed in results.images() if image_id(case.key, seed) in wanted]
    if references is not None:
        real_files = sorted(f for f in Path(references).iterdir() if f.suffix.lower() in IMAGES)
    else:
        real_files = sorted({case.target for case, _ in pairs if case.target is not None})
    if len(real_files) < 2 or len(pairs) < 2:
        rule = f"needs two real images and two made ones at least, and there are {len(real_files)} and {len(pairs)}"
        raise ConfigError(
            "metrics.references", references, rule, f"Give a folder of images, or leave out {metric.name}"
        )
    failed: dict[str, str] = {}
    group = {base: i % SET_GROUPS for i, base in enumerate(dict.fromkeys(case.base for case, _ in pairs))}
    made, groups = [], []
    for case, seed in pairs:
        try:
            made.append(metric.feature(open_rgb(results.image(case.key, seed))))
            groups.append(group[case.base])
        except Unmeasured as error:
            failed[image_id(case.key, seed)] = str(error)
    try:
        real_MD = np.stack([metric.feature(open_rgb(file)) for file in real_files])
    except Unmeasured as error:
        raise ConfigError("metrics.references", references, str(error), "Remove or replace it") from error
    made_ND = np.stack(made)
    values = metric.compare(made_ND, real_MD)
    group_N = np.array(groups)
    rests = [made_ND[group_N != left_out] for left_out in sorted(set(groups))]
    parts = [metric.compare(rest_ND, real_MD) for rest_ND in rests if len(rest_ND) > 1]
    found = {}
    for number, value in values.items():
        estimate = bootstrap.jackknife(value, [part[number] for part in parts], len(made))
        found[number] = {
            "metric": metric.name,
            "about": f"{metric.about}; against {len(real_MD)} real images",
            "better": metric.numbers[number].value,
            "failed": failed,
            "categories": {ALL: estimate.as_json()},
        }
    return found


def summarise(results: Results) -> dict[str, Any]:
    """Every number by category, and over all pairs ("all"). Turns of chains are categories of their own."""
    cases = {image_id(case.key, seed): case for case, seed in results.images()}
    numbers: dict[str, Any] = {}
    for name, scores in read_scores(results).items():
        for number, better in scores["numbers"].items():
            by_category: dict[str, list[tuple[str, float]]] = {}
            for image, values in scores["values"].items():
                if number not in values:
                    continue
                case = cases[image]
                for category in (case.category,) if case.turn else (case.category, ALL):
                    by_category.setdefault(category, []).append((case.base, values[number]))
            estimates = {category: bootstrap.mean(found) for category, found in by_category.items()}
            numbers[number] = {
                "metric": name,
                "about": scores["about"],
                "better": better,
                "failed": scores["failed"],
                "categories": {category: e.as_json() for category, e in estimates.items() if e is not None},
            }
    numbers |= _read_sets(results)
    return {
        "name": results.name,
        "settings": results.settings,
        "asked": len(cases),
        "not_made": not_made(results),
        "numbers": {number: found for number, found in numbers.items() if found["categories"] or found["failed"]},
        "latency": latency(results),
    }


def latency(results: Results) -> dict[str, Any] | None:
    """Seconds an image: median and 95th percentile. None where images were made several at once."""
    seconds = latencies(results)
    median = bootstrap.of_sample(seconds, np.median)
    p95 = bootstrap.of_sample(seconds, lambda values, axis: np.percentile(values, 95, axis=axis))
    return None if median is None or p95 is None else {"median_s": median.as_json(), "p95_s": p95.as_json()}


def table(summary: dict[str, Any]) -> str:
    """What a summary says over all pairs and by turn, as lines of text."""
    lines = [f"{summary['name']}: {summary['asked'] - len(summary['not_made'])} of {summary['asked']} images"]
    for number, found in summary["numbers"].items():
        if ALL in found["categories"]:
            estimate = found["categories"][ALL]
            lines.append(f"  {number:24} {shown(estimate)}  n={estimate['n']}")
        turns = [e for category, e in found["categories"].items() if category.startswith("turn ")]
        if turns:
            lines.append(f"  {number:24} by turn: {' '.join(format(e['value'], '.4g') for e in turns)}")
        if found["failed"]:
            lines.append(f"  {number:24} failed on {len(found['failed'])}: {some(list(found['failed']))}")
    if summary["latency"] is not None:
        lines += [f"  latency {name:16} {shown(estimate)}" for name, estimate in summary["latency"].items()]
    if summary["not_made"]:
        lines.append(f"  not made: {len(summary['not_made'])}: {some(list(summary['not_made']))}")
    return "\n".join(lines)


def shown(estimate: dict[str, Any]) -> str:
    """A number with its interval."""
    if estimate["low"] is None:
        return f"{estimate['value']:.4g}"
    return f"{estimate['value']:.4g} [{estimate['low']:.4g}, {estimate['high']:.4g}]"
