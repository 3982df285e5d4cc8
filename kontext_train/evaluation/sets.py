"""Distances between sets of images: what was made against real images, edits and text-to-image each for itself.

sets/METRIC.json holds the numbers and which images they are of; features/METRIC/ one vector an image, kept as it is
found, so that a later call goes on.

Legend: N made images; M real ones; D features.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kontext_train.errors import ConfigError
from kontext_train.evaluation import bootstrap
from kontext_train.evaluation.benchmark import ALL, Case
from kontext_train.evaluation.metrics.base import SetMetric, Unmeasured, open_rgb
from kontext_train.evaluation.progress import bar
from kontext_train.evaluation.results import UNSEEN, Results, image_id, not_made, part_of, write_json

EDITS, TEXT_TO_IMAGE = "edits", "text_to_image"
GROUPS = 20  # of base images, each left out once: a set metric is a matrix decomposition
LEAST = 2  # images on each side
IMAGES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(slots=True)
class _Side:
    """The made images of one kind that could be decoded, and those that could not."""

    cases: list[Case] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def compare(
    results: Results, metric: SetMetric, missing: dict[str, str], references: str | None, progress: bool = False
) -> None:
    """Writes sets/METRIC.json: each number for edits and for text-to-image, over all of them and by category.

    references: a folder of real images; None takes the targets of the same cases. ConfigError if there is nothing to
    compare at all, or a real image cannot be decoded.
    """
    pairs = [
        (case, seed) for case, seed in results.images() if not case.turn and image_id(case.key, seed) not in missing
    ]
    if references is not None and not Path(references).is_dir():
        raise ConfigError("metrics.references", references, "is no folder", "Give a folder of real images")
    given = None if references is None else sorted(f for f in Path(references).iterdir() if f.suffix.lower() in IMAGES)
    real_count = len({case.target for case, _ in pairs if case.target}) if given is None else len(given)
    if real_count < LEAST or len(pairs) < LEAST:
        rule = f"needs two real images and two made ones at least, and there are {real_count} and {len(pairs)}"
        hint = f"Give a folder of images, or leave out {metric.name}"
        raise ConfigError("metrics.references", references, rule, hint)
    features = _Features(metric, results.folder / "features" / metric.name, progress)
    numbers: dict[str, Any] = {}
    for kind in (EDITS, TEXT_TO_IMAGE):
        own = [(case, seed) for case, seed in pairs if bool(case.contexts) == (kind == EDITS)]
        if own:
            found = _compared(results, metric, features, own, given)
            numbers |= {f"{number}_{kind}": about for number, about in found.items()}
    features.bar.close()
    of = [image_id(case.key, seed) for case, seed in pairs]
    write_json(results.folder / "sets" / f"{metric.name}.json", {"of": of, "numbers": numbers})


def read_sets(results: Results) -> dict[str, dict[str, Any]]:
    """Every number; one that is of other images than those that are there now has failed on what it has not seen."""
    missing = not_made(results)
    names = (image_id(case.key, seed) for case, seed in results.images() if not case.turn)
    now = [name for name in names if name not in missing]
    found: dict[str, dict[str, Any]] = {}
    for file in sorted((results.folder / "sets").glob("*.json")):
        measured = json.loads(file.read_text())
        if measured["of"] != now:
            unseen = dict.fromkeys(sorted(set(now) - set(measured["of"])) or now, UNSEEN)
            for number in measured["numbers"].values():
                number |= {"categories": {}, "left_out": {}, "failed": unseen}
        found |= measured["numbers"]
    return found


def _compared(
    results: Results,
    metric: SetMetric,
    features: "_Features",
    pairs: Sequence[tuple[Case, int]],
    given: Sequence[Path] | None,
) -> dict[str, dict[str, Any]]:
    """Every number of one kind of images."""
    side = _Side()
    for case, seed in pairs:
        try:
            side.features.append(features.of(results.image(case.key, seed)))
            side.cases.append(case)
        except Unmeasured as error:
            side.failed[image_id(case.key, seed)] = str(error)
        except Exception as error:  # a library's own
            side.failed[image_id(case.key, seed)] = f"{type(error).__name__}: {error}"
    by_category: dict[str, dict[str, dict[str, Any]]] = {number: {} for number in metric.numbers}
    left_out: dict[str, str] = {}
    about = metric.about
    categories = sorted({case.category for case, _ in pairs})
    for category in (ALL, *(categories if len(categories) > 1 else ())):
        inside = np.array([category in (ALL, case.category) for case in side.cases], bool)
        cases = [case for case, is_in in zip(side.cases, inside, strict=True) if is_in]
        real = list(given) if given is not None else sorted({case.target for case in cases if case.target is not None})
        if len(cases) < LEAST or len(real) < LEAST:
            reason = f"{len(cases)} made and {len(real)} real images; at least {LEAST} of each are needed"
            if category == ALL:
                side.failed |= {image_id(case.key, seed): reason for case, seed in pairs}
                break
            left_out[f"category {category}"] = reason
            continue
        made_ND = np.stack([x for x, is_in in zip(side.features, inside, strict=True) if is_in])
        real_MD = features.real(real)
        if category == ALL:  # what was measured against other images is not comparable
            own = hashlib.blake2b(real_MD.tobytes(), digest_size=4).hexdigest()
            about = f"{metric.about}; against {len(real)} real images {own}"
        for number, estimate in _estimates(metric, made_ND, cases, real_MD).items():
            by_category[number][category] = estimate.as_json() | {"real": len(real)}
    return {
        number: {
            "metric": metric.name,
            "about": about,
            "better": metric.numbers[number].value,
            "failed": side.failed,
            "left_out": left_out,
            "categories": estimates,
        }
        for number, estimates in by_category.items()
    }


def _estimates(
    metric: SetMetric, made_ND: np.ndarray, cases: Sequence[Case], real_MD: np.ndarray
) -> dict[str, bootstrap.Estimate]:
    group = {base: i % GROUPS for i, base in enumerate(dict.fromkeys(case.base for case in cases))}
    group_N = np.array([group[case.base] for case in cases])
    rests = [made_ND[group_N != left_out] for left_out in sorted(set(group.values()))]
    parts = [metric.compare(rest_ND, real_MD) for rest_ND in rests if len(rest_ND) >= LEAST]
    return {
        number: bootstrap.jackknife(value, [part[number] for part in parts], len(made_ND))
        for number, value in metric.compare(made_ND, real_MD).items()
    }


class _Features:
    """A metric's vectors of image files, each computed once and kept in a folder."""

    def __init__(self, metric: SetMetric, folder: Path, progress: bool) -> None:
        self.metric, self.folder, self.known = metric, folder, dict[Path, np.ndarray]()
        self.bar = bar(metric.name, None, progress)
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, file: Path) -> np.ndarray:
        """[D] float64. Raises Unmeasured."""
        if file not in self.known:
            self.known[file] = self._kept(file)
            self.bar.update()
        return self.known[file]

    def _kept(self, file: Path) -> np.ndarray:
        state = file.stat()
        name = repr((self.metric.about, str(file.resolve()), state.st_size, state.st_mtime_ns))
        kept = self.folder / f"{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.npy"
        if not kept.is_file():
            part = part_of(kept)
            with part.open("wb") as raw:
                np.save(raw, self.metric.feature(open_rgb(file)).astype(np.float32))
            part.replace(kept)
        return np.load(kept).astype(np.float64)

    def real(self, files: Sequence[Path]) -> np.ndarray:
        """[M, D]. ConfigError names a file that cannot be decoded."""
        try:
            return np.stack([self.of(file) for file in files])
        except Unmeasured as error:
            raise ConfigError("metrics.references", str(files[0].parent), str(error), "Remove or replace it") from error
