"""A result folder: what one model made of a benchmark.

settings.json                  model, benchmark, resolution, sampler: one folder's for ever
asked.json                     seeds and pairs of the last run: what a score expects to find
images/seed_0/KEY.png          and KEY.json: its exact settings and latency, or why it was not made
scores/METRIC.jsonl            what `scoring.py` measured; sets/ and features/: what `sets.py` did
summary.json
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from kontext_train.errors import ConfigError
from kontext_train.evaluation.benchmark import Benchmark, Case, read_benchmark

SETTINGS, ASKED, SUMMARY = "settings.json", "asked.json", "summary.json"
CHANGED = "its instruction or context has changed since it was made; run again"
UNSEEN = "was not measured yet; score again"
PLACES = (
    "name",
    "model.checkpoint",
    "model.encoders.path",
    "benchmark.folder",
    "benchmark.digest",
)  # settings that decide no pixel: each image's record says what it was made from


@dataclass(frozen=True, slots=True)
class Results:
    """A result folder, its benchmark, and which images it should hold."""

    folder: Path
    settings: dict[str, Any]
    benchmark: Benchmark
    seeds: int

    @property
    def name(self) -> str:
        return self.settings["name"]

    @property
    def settings_digest(self) -> str:
        """Of all settings that decide a pixel, but for the benchmark: each image's record says its inputs."""
        told = {key: value for key, value in _flat(self.settings).items() if key not in PLACES}
        return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()

    def images(self) -> list[tuple[Case, int]]:
        """Every image that was asked for, made or not."""
        return [(case, seed) for seed in range(self.seeds) for case in self.benchmark]

    def image(self, key: str, seed: int) -> Path:
        return image_file(self.folder, key, seed)

    def record(self, key: str, seed: int) -> dict[str, Any] | None:
        """An image's settings, with `error` where it could not be made; None where nobody tried."""
        return read_record(self.folder, key, seed)


def image_file(folder: Path, key: str, seed: int) -> Path:
    return folder / "images" / f"seed_{seed}" / f"{key}.png"


def read_record(folder: Path, key: str, seed: int) -> dict[str, Any] | None:
    file = image_file(folder, key, seed).with_suffix(".json")
    return json.loads(file.read_text()) if file.is_file() else None


def image_id(key: str, seed: int) -> str:
    return f"{key}@{seed}"


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """ConfigError names what differs, where a folder is already that of other settings."""
    file = folder / SETTINGS
    if file.is_file():
        before, now = (_flat(s) for s in (json.loads(file.read_text()), settings))
        differ = [k for k in now | before if before.get(k) != now.get(k) and k not in PLACES]
        changed = [f"{k} (was {before.get(k)!r}, now {now.get(k)!r})" for k in differ]
        if changed:
            rule = f"holds images of other settings: {', '.join(changed)}"
            raise ConfigError("out", str(folder), rule, "Give another folder, or the settings it has")


def claim(folder: Path, settings: dict[str, Any], asked: dict[str, Any]) -> None:
    """Make a folder that of these settings, or see that it is. ConfigError names what differs."""
    check_settings(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ASKED, asked)  # all ranks may do so: they write the same
    write_json(folder / SETTINGS, settings)  # last: where it is, the other is


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()}


def open_results(folder: str | Path, key: str = "results") -> Results:
    folder = Path(folder)
    if not (folder / SETTINGS).is_file():
        rule = f"is no result folder: it has no {SETTINGS}"
        raise ConfigError(key, str(folder), rule, "kontext-evaluate run writes one")
    settings, asked = (json.loads((folder / name).read_text()) for name in (SETTINGS, ASKED))
    benchmark = read_benchmark(settings["benchmark"]["folder"], partial=True, key=key)
    if asked["per_category"] is not None:
        benchmark = benchmark.first(asked["per_category"])
    return Results(folder, settings, benchmark, asked["seeds"])


def write_json(file: Path, value: Any) -> None:
    """Whole or not at all. Several processes may write the same file."""
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(file)
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def part_of(file: Path) -> Path:
    """A name beside a file, to write what is to take its place. No other process has it, on this machine or another."""
    return file.with_name(f".{file.name}.{uuid4().hex}")


def not_made(results: Results) -> dict[str, str]:
    """Why each image that is not there is not, by its id."""
    reasons = {}
    for case, seed in results.images():
        record = results.record(case.key, seed)
        if record is None:
            reasons[image_id(case.key, seed)] = "was not made yet"
        elif record["error"] is not None:
            reasons[image_id(case.key, seed)] = record["error"]
        elif not results.image(case.key, seed).is_file():
            reasons[image_id(case.key, seed)] = "its file is gone"
        elif record.get("inputs") != case.inputs:
            reasons[image_id(case.key, seed)] = CHANGED
    return reasons


def latencies(results: Results) -> dict[str, list[float | None]]:
    """Seconds an image, by what it was made on; None of images that were made several at once."""
    found: dict[str, list[float | None]] = {}
    for record in (results.record(case.key, seed) for case, seed in results.images()):
        if record is not None and record["error"] is None:
            found.setdefault(record.get("made_on", "a machine that was not noted"), []).append(record["latency_s"])
    return found
