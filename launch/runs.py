"""What a run folder says of its run, read without torch, so that it answers at once."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

TAIL_BYTES = 1 << 18  # of a metrics file: enough for some hundred lines, however long the run


@dataclass(slots=True)
class Progress:
    step: int  # last one logged
    steps: int  # to make; 0 if unknown
    seconds_per_step: float | None
    values: dict[str, float]  # the newest of each metric
    checkpoint: Path | None  # newest complete one, if they are in a folder
    elsewhere: str | None  # the URL where they are, if they are not

    @property
    def finished(self) -> bool:
        return self.checkpoint is not None and 0 < self.steps <= int(self.checkpoint.name.removeprefix("step_"))

    @property
    def seconds_left(self) -> float | None:
        return None if self.seconds_per_step is None else (self.steps - self.step) * self.seconds_per_step


def read(run: Path) -> Progress:
    lines = metrics(run / "metrics.jsonl", TAIL_BYTES)
    values: dict[str, float] = {}
    for line in lines:
        values |= line
    logged = [line for line in lines if "loss" in line and "seconds" in line]
    pairs = list(pairwise(logged))[-10:]
    steps = sum(b["step"] - a["step"] for a, b in pairs)
    pace = sum(b["seconds"] for _, b in pairs) / steps if steps else None
    config = _config(run)
    folder = config.get("checkpoint", {}).get("folder") or str(run / "checkpoints")
    elsewhere = folder if "://" in folder else None
    whole = [] if elsewhere else sorted(m.parent for m in Path(folder).glob("step_????????/COMPLETE"))
    newest = whole[-1] if whole else None
    return Progress(int(values.pop("step", 0)), config.get("run", {}).get("steps", 0), pace, values, newest, elsewhere)


def metrics(file: Path, tail_bytes: int) -> list[dict[str, Any]]:
    """The whole lines among the last bytes of a metrics file; its last one may be torn."""
    if not file.is_file():
        return []
    with file.open("rb") as opened:
        start = max(0, opened.seek(0, 2) - tail_bytes)
        opened.seek(start)
        lines = opened.read().split(b"\n")[1 if start else 0 : -1]
    return [json.loads(line) for line in lines if line]


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / "metrics.jsonl").is_file()


def runs_below(folder: Path) -> list[Path]:
    """The folder itself if it is a run's, and those in it: a sweep may lie below a run."""
    below = sorted(p for p in folder.iterdir() if p.is_dir() and is_run(p))
    return [folder, *below] if is_run(folder) else below


def _config(run: Path) -> dict[str, Any]:
    file = run / "config.yaml"
    read = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
    assert isinstance(read, dict)
    return cast(dict[str, Any], read)
