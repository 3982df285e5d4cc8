"""A small part of a benchmark, made and measured while a model trains, into run.dir/benchmark/step_N.

All ranks make images, each its share, because the model is sharded over them; rank 0 writes and measures, while the
others wait in no collective: a judge may take longer than one is allowed to.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from kontext_train.data.encode import Encoders
from kontext_train.data.transforms import Transform, load_image
from kontext_train.distributed.reduce import made_by_main
from kontext_train.distributed.setup import World
from kontext_train.errors import ConfigError
from kontext_train.evaluation.benchmark import ALL, Benchmark, Case, files_of, read_benchmark
from kontext_train.evaluation.config import InTrainingConfig, MakingConfig
from kontext_train.evaluation.make_images import request_seed, settings_of
from kontext_train.evaluation.metrics.base import LeftOut, Metric, Shown, Unmeasured
from kontext_train.evaluation.metrics.build import build_metrics
from kontext_train.evaluation.results import claim, image_file, open_results, write_json
from kontext_train.evaluation.scoring import score
from kontext_train.evaluation.trained import machine
from kontext_train.flow.config import SamplerConfig, ShiftConfig
from kontext_train.generate import Request, generate
from kontext_train.training.pictures import save_grid

GRID = "grid.png"
SCALED_TO = 128  # pixels: smaller pictures are enlarged in the grid


class BenchmarkSlice:
    """All ranks make one, and call `measure` at the same steps."""

    def __init__(
        self,
        config: InTrainingConfig,
        encoders: Encoders,
        sampler: SamplerConfig,
        shift: ShiftConfig,
        transform: Transform,
        *,
        best_by: str,
        guidance_embed: bool,
        world: World,
        run_dir: Path,
    ) -> None:
        """best_by: checkpoint.best_by. ConfigError if the benchmark, or on rank 0 a metric, is not as it should."""
        assert config.benchmark is not None
        full = read_benchmark(config.benchmark, partial=True, key="evaluation.benchmark")
        self.benchmark = full.first(config.per_category)
        self.making = MakingConfig(per_category=config.per_category, sampler=sampler)
        _check_images(self.benchmark, transform)
        self.metrics: list[Metric] = []
        self.measured = 0  # slices: names what rank 0 tells the others
        self.best_by, self.world = best_by, world
        made_by_main("benchmark/metrics", lambda: self._build(config), world)
        self.encoders, self.shift, self.transform = encoders, shift, transform
        self.guidance_embed, self.folder = guidance_embed, run_dir / "benchmark"

    def _build(self, config: InTrainingConfig) -> str:
        self.metrics, sets = build_metrics(config.metrics)
        if sets:
            rule = "compare large sets, which a slice is not"
            raise ConfigError("evaluation.metrics", [s.name for s in sets], rule, "Leave them to kontext-evaluate")
        if self.best_by.startswith("benchmark/"):
            _check_best_by(self.best_by, self.metrics, self.benchmark)
        return ""

    def measure(self, model: nn.Module, step: int) -> dict[str, float]:
        """benchmark/NUMBER and benchmark/NUMBER/turn_N, the same on every rank. Every rank takes part."""
        self.made_on = machine(self.world.device, next(model.parameters()).dtype)
        images = self._make(model)
        self.measured += 1
        name = f"benchmark/{self.measured}"  # not the step: a run may go back to one
        told = made_by_main(name, lambda: json.dumps(self._score(images, step)), self.world)
        found: dict[str, float] = json.loads(told)
        return found

    def picture(self, step: int) -> Path:
        return self._place(step) / GRID

    def _place(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _make(self, model: nn.Module) -> dict[str, Tensor]:
        """Every image, [3, H, W] uint8 on the CPU, by key. A turn edits what the turn before made."""
        images: dict[str, Tensor] = {}
        chains = self.benchmark.chains
        longest = max(map(len, chains), default=0)
        turns = [[chain[turn] for chain in chains if turn < len(chain)] for turn in range(longest)]
        for cases in ([*self.benchmark.pairs], *turns):
            requests = [self._request(case, images) for case in cases]
            images |= zip((case.key for case in cases), self._share_out(model, requests), strict=True)
        return images

    def _request(self, case: Case, images: dict[str, Tensor]) -> Request:
        contexts = [images[case.before]] if case.turn > 1 else [_pixels(f, self.transform) for f in case.contexts]
        height, width = contexts[0].shape[1:] if contexts else (self.making.height, self.making.width)
        seed = request_seed(case.key, 0)
        return Request(case.instruction, contexts, case.height or height, case.width or width, seed)

    def _share_out(self, model: nn.Module, requests: Sequence[Request]) -> list[Tensor]:
        """The images of all requests, made by all ranks. Each makes equally many, as a sharded model needs it."""
        if not requests:
            return []
        ranks, rank = self.world.dp_size, self.world.dp_rank
        each = -(-len(requests) // ranks)
        own = [requests[(rank + i * ranks) % len(requests)] for i in range(each)]
        made = [
            generate(
                model,
                self.encoders,
                [request],
                self.making.sampler,
                self.shift,
                pixels_per_token=self.transform.multiple,
                guidance_embed=self.guidance_embed,
                device=self.world.device,
            )[0]
            for request in own
        ]
        gathered: list[Any] = [None] * self.world.size
        dist.all_gather_object(gathered, [image.numpy() for image in made])
        by_dp_rank = gathered[:: self.world.cp]  # ranks of one cp group made the same
        return [torch.from_numpy(by_dp_rank[i % ranks][i // ranks]) for i in range(len(requests))]

    def _score(self, images: dict[str, Tensor], step: int) -> dict[str, float]:
        out = self._place(step)
        self._write(images, out, step)
        found = {}
        for number, estimates in score(open_results(out), self.metrics)["numbers"].items():
            for category, estimate in estimates["categories"].items():
                if f"benchmark/{number}" == self.best_by.partition("/turn_")[0] and estimates["failed"]:
                    continue  # a mean of what did not fail competes with no whole one
                if category == ALL:
                    found[f"benchmark/{number}"] = estimate["value"]
                elif category.startswith("turn "):
                    found[f"benchmark/{number}/{category.replace(' ', '_')}"] = estimate["value"]
            for what in ("failed", "left_out"):
                if estimates[what]:
                    found[f"benchmark/{number}/{what}"] = float(len(estimates[what]))
        return found

    def _write(self, images: dict[str, Tensor], out: Path, step: int) -> None:
        """A result folder, and all its images as one picture."""
        shutil.rmtree(out, ignore_errors=True)  # of a run that went back behind this step
        model = {"run": str(self.folder.parent), "step": step}
        settings = settings_of(out.name, model, self.benchmark, self.making)
        claim(out, settings, {"seeds": 1, "per_category": self.making.per_category})
        rows = []
        for case in self.benchmark:
            file = image_file(out, case.key, 0)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(images[case.key].permute(1, 2, 0).numpy())).save(file)
            record = {"key": case.key, "category": case.category, "instruction": case.instruction, "seed": 0}
            record |= {"inputs": case.inputs, "contexts": [str(file) for file in case.contexts]}
            record |= {"request_seed": request_seed(case.key, 0), "sampler": asdict(self.making.sampler)}
            record |= {"model": model, "made_on": self.made_on, "latency_s": None, "error": None}
            write_json(file.with_suffix(".json"), record)
            truth = [] if case.target is None else [case.target]
            contexts, truths = ([_pixels(f, self.transform) for f in files] for files in (case.contexts, truth))
            rows.append((f"{case.key}: {case.instruction}", [*contexts, images[case.key], *truths]))
        tallest = max(image.shape[1] for image in images.values())
        save_grid(out / GRID, rows, scale=max(1, SCALED_TO // tallest))


def _pixels(file: Path, transform: Transform) -> Tensor:
    """[3, H, W] uint8, as the run sees images."""
    return torch.from_numpy(load_image(file, transform)).permute(2, 0, 1)


def _check_best_by(best_by: str, metrics: Sequence[Metric], benchmark: Benchmark) -> None:
    """Masks, captions, faces and turns decide what a benchmark has numbers for, so its metric is tried on it."""
    number, _, turn = best_by.removeprefix("benchmark/").partition("/turn_")
    metric = next((metric for metric in metrics if number in metric.numbers), None)
    if metric is None:
        known = [f"benchmark/{number}" for metric in metrics for number in metric.numbers]
        rule = f"is not measured on evaluation.benchmark. Known: {', '.join(known)}"
        raise ConfigError("checkpoint.best_by", best_by, rule, "Use one of them, or validation/loss")
    cases = [case for case in benchmark if turn == (str(case.turn) if case.turn else "")]
    if not any(_gives(metric, number, case) for case in cases):
        what = f"turns {turn}" if turn else "pairs"
        rule = f"would never be known: of the {len(cases)} {what} in the slice, none has what {number} needs"
        raise ConfigError(
            "checkpoint.best_by", best_by, rule, "Use another number; docs/evaluation.md says their needs"
        )


def _gives(metric: Metric, number: str, case: Case) -> bool:
    """Whether a made image of this case would have the number. The context stands in for it."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "grey.png"
        Image.new("RGB", (SCALED_TO, SCALED_TO), "grey").save(file)
        known = [*case.contexts, *([case.target] if case.target is not None else []), file]
        try:
            return number in metric.measure(Shown(case, 0, known[0]))
        except Unmeasured as error:
            rule = f"cannot be measured: {metric.name} fails on {known[0].name}: {error}"
            raise ConfigError("checkpoint.best_by", f"benchmark/{number}", rule, "Mend that first") from error
        except LeftOut:
            return False


def _check_images(benchmark: Benchmark, transform: Transform) -> None:
    """Before training, what a validation would stop at."""
    for file in sorted(files_of(benchmark)):
        try:
            load_image(file, transform)
        except ValueError as error:
            raise ConfigError(
                "evaluation.benchmark", str(file), str(error), "Replace it, or remove its line"
            ) from error
    for case in benchmark:
        if (case.height or 0) % transform.multiple or (case.width or 0) % transform.multiple:
            rule = f"has sides that are no multiples of {transform.multiple}, the pixels of a token"
            raise ConfigError("evaluation.benchmark", case.key, rule, "Round its height and width")
