"""Small benchmarks and models for tests of this room."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kontext_train.data.transforms import Transform
from kontext_train.evaluation.benchmark import read_benchmark
from kontext_train.evaluation.config import MakingConfig
from kontext_train.evaluation.make_images import Made, make_images, settings_of
from kontext_train.flow.config import SamplerConfig
from kontext_train.generate import Request


def save_image(file: Path, seed: int, height: int = 32, width: int = 48) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file)


def line(number: int, category: str = "hats", **more: Any) -> dict[str, Any]:
    common = {"key": f"{number:04d}", "category": category, "instruction": f"add hat {number}"}
    return {**common, "file_name": f"images/{number:04d}.png", **more}


def benchmark(folder: Path, lines: Sequence[dict[str, Any]], chains: Sequence[dict[str, Any]] = ()) -> Path:
    """A benchmark of one's own with the files that its lines name."""
    counts: dict[str, int] = {}
    for row in lines:
        counts[row["category"]] = counts.get(row["category"], 0) + 1
    named = [row[name] for row in (*lines, *chains) for name in row if name.endswith("file_name") and row[name]]
    named += [file for row in (*lines, *chains) for name in row if name.endswith("file_names") for file in row[name]]
    for number, file in enumerate(dict.fromkeys(named)):
        save_image(folder / file, number)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    if chains:
        (folder / "chains.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chains))
    (folder / "benchmark.json").write_text(json.dumps({"name": "hats", "categories": counts}))
    return folder


class Inverter:
    """A model: the negative of its context, brighter by its seed's parity; it remembers what it was asked."""

    pixels_per_token, transform = 16, Transform(max_pixels=1 << 20, multiple=16)
    made_on = "paper"

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.calls = 0

    def generate(self, requests: Sequence[Request], sampler: SamplerConfig) -> list[Tensor]:
        self.calls += 1
        self.asked += requests
        grey = [torch.full((3, r.height, r.width), 128, dtype=torch.uint8) for r in requests]
        contexts = (r.contexts[0] if r.contexts else g for r, g in zip(requests, grey, strict=True))
        return [255 - context for context in contexts]


def make(
    model: Inverter,
    folder: Path,
    out: Path,
    making: MakingConfig | None = None,
    rank: int = 0,
    ranks: int = 1,
    **of: Any,
) -> Made:
    """What `kontext-evaluate run` does, with a stand-in. of: what the settings say of the model."""
    making, found = making or MakingConfig(at_once=4), read_benchmark(folder)
    settings = settings_of(of.pop("name", out.name), {"weights": "none", **of}, found, making)
    return make_images(lambda: model, found, out, settings, making, rank, ranks)
