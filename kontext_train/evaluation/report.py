"""Several models side by side on one page that opens from disk: index.html, its script and style, and the images.

Python gathers (`gathered`), pages/report.js draws. Nothing is loaded from elsewhere, nothing is served.
"""

import json
import os
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kontext_train.errors import ConfigError
from kontext_train.evaluation import bootstrap
from kontext_train.evaluation.benchmark import ALL, Case
from kontext_train.evaluation.results import Results, image_id, not_made
from kontext_train.evaluation.scoring import read_scores, summarise

PAGES = files("kontext_train.evaluation") / "pages"


def write_report(models: Sequence[Results], out: Path) -> Path:
    """Writes out/index.html and what it shows; returns that file. ConfigError if the models cannot be compared."""
    names = check_comparable(models)
    (out / "images").mkdir(parents=True, exist_ok=True)
    data = gathered(models, names, out)
    for name in ("report.js", "report.css"):
        (out / name).write_text((PAGES / name).read_text(encoding="utf-8"), encoding="utf-8")
    # A page opened from disk may not fetch a file, but it may run a script. "<" could end that script.
    told = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    (out / "data.js").write_text(f"const DATA = {told};\n", encoding="utf-8")
    page = out / "index.html"
    page.write_text((PAGES / "report.html").read_text(encoding="utf-8"), encoding="utf-8")
    return page


def check_comparable(models: Sequence[Results]) -> list[str]:
    """The models' names, all different, all of one benchmark."""
    first = models[0]
    for other in models[1:]:
        if other.benchmark.digest != first.benchmark.digest:
            rule = f"are of two benchmarks: {first.benchmark.folder} and {other.benchmark.folder}"
            raise ConfigError("results", [str(m.folder) for m in models], rule, "Compare results of one")
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        rule = f"need names that differ; they are {', '.join(names)}"
        raise ConfigError("results", [str(m.folder) for m in models], rule, "Run again with name=...: no image is made")
    return names


def gathered(models: Sequence[Results], names: Sequence[str], out: Path) -> dict[str, Any]:
    """All that the page shows, as JSON. Images are put below `out`."""
    for model in models:
        _check_measured(model)
    summaries = [summarise(model) for model in models]  # not summary.json: images may have come or gone since
    values, missing = [_values(model) for model in models], [not_made(model) for model in models]
    cases = {
        image_id(case.key, seed): (case, seed, model.benchmark.folder)
        for model in models
        for case, seed in model.images()
    }
    return {
        "benchmark": models[0].benchmark.name,
        "models": [
            {
                "name": name,
                "settings": summary["settings"],
                "latency": summary["latency"],
                "asked": summary["asked"],
                "not_made": summary["not_made"],
                "numbers": summary["numbers"],
            }
            for name, summary in zip(names, summaries, strict=True)
        ],
        "differences": _differences(models, summaries, values),
        "images": [_image(models, values, missing, *case, out) for case in cases.values()],
    }


def _check_measured(model: Results) -> None:
    if not any(model.folder.glob("scores/*.jsonl")) and not any(model.folder.glob("sets/*.json")):
        rule = "was not measured: it has no scores"
        raise ConfigError("results", str(model.folder), rule, f"kontext-evaluate score results={model.folder}")


def _values(model: Results) -> dict[str, dict[str, float]]:
    """Numbers by image."""
    found: dict[str, dict[str, float]] = {}
    for scores in read_scores(model).values():
        for image, numbers in scores.values.items():
            found.setdefault(image, {}).update(numbers)
    return found


def _differences(
    models: Sequence[Results], summaries: Sequence[dict[str, Any]], values: Sequence[dict[str, dict[str, float]]]
) -> list[dict[str, Any]]:
    """Of each model to the first, over the pairs that both have: an interval without 0 tells them apart.

    By category and over all; none where they share no pair, or where two models of a metric gave the numbers.
    """
    bases = {image_id(case.key, seed): case for model in models for case, seed in model.images() if not case.turn}
    found = []
    for own, summary in zip(values, summaries, strict=True):
        differences: dict[str, dict[str, Any]] = {}
        for number, first in summaries[0]["numbers"].items():
            if summary["numbers"].get(number, first)["about"] != first["about"]:
                continue  # by two models of a metric: the page names both
            pairs: dict[str, list[tuple[str, float]]] = {}
            for image, case in bases.items():
                if number in own.get(image, {}) and number in values[0].get(image, {}):
                    difference = own[image][number] - values[0][image][number]
                    for category in (case.category, ALL):
                        pairs.setdefault(category, []).append((case.base, difference))
            estimates = {category: bootstrap.mean(found) for category, found in pairs.items()}
            differences[number] = {category: e.as_json() for category, e in estimates.items() if e is not None}
        found.append(differences)
    return found


def _image(
    models: Sequence[Results],
    values: Sequence[dict[str, dict[str, float]]],
    missing: Sequence[dict[str, str]],
    case: Case,
    seed: int,
    folder: Path,
    out: Path,
) -> dict[str, Any]:
    """folder: of the benchmark that the case is of: another model's may be a copy elsewhere."""
    name, made = image_id(case.key, seed), []
    for number, model in enumerate(models):
        file = model.image(case.key, seed)
        error = missing[number].get(name) or (None if file.is_file() else "was not asked for")
        shown = _placed(file, out, f"model_{number}/seed_{seed}/{file.name}") if error is None else None
        made.append({"file": shown, "error": error, "values": values[number].get(name, {})})
    return {
        "id": name,
        "key": case.key,
        "seed": seed,
        "category": case.category,
        "turn": case.turn,
        "instruction": case.instruction,
        "contexts": [_placed(f, out, f"benchmark/{f.relative_to(folder)}") for f in case.contexts],
        "target": None
        if case.target is None
        else _placed(case.target, out, f"benchmark/{case.target.relative_to(folder)}"),
        "made": made,
    }


def _placed(file: Path, out: Path, name: str) -> str:
    """Put an image into the report: a hard link where the disk has them, a copy elsewhere."""
    place = out / "images" / name
    if not place.exists() or not os.path.samefile(place, file):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        try:
            os.link(file, place)
        except OSError:
            shutil.copyfile(file, place)
    return f"images/{quote(name)}"  # a key may have "#", "?" or "%"
