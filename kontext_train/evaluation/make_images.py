"""Makes a benchmark's images with a model: a process's share of them, each with its exact settings beside it.

An image that is there is not made again, so the same command goes on after a stop, with any number of processes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kontext_train.data.config import Crop, Resize
from kontext_train.data.transforms import Transform, load_image
from kontext_train.errors import ConfigError
from kontext_train.evaluation.benchmark import Benchmark, Case
from kontext_train.evaluation.config import MakingConfig, Resolution
from kontext_train.evaluation.progress import bar
from kontext_train.evaluation.results import check_settings, claim, image_file, part_of, read_record, write_json
from kontext_train.flow.config import SamplerConfig
from kontext_train.generate import Request
from kontext_train.randomness import key_of


class Model(Protocol):
    """What makes images: `Trained`, or a stand-in for it."""

    pixels_per_token: int
    transform: Transform  # of context images

    @property
    def made_on(self) -> str:
        """Device, dtype and version of torch, in words: latency is told for each."""
        ...

    def generate(self, requests: Sequence[Request], sampler: SamplerConfig) -> list[Tensor]: ...


@dataclass(slots=True)
class Made:
    """What a process did."""

    new: int = 0
    kept: int = 0  # were there
    failed: dict[str, str] = field(default_factory=dict)  # reasons by key@seed


@dataclass(slots=True)
class _Job:
    case: Case
    seed: int
    before: Path | None  # the image that a turn edits, if not its case's context


def settings_of(name: str, model: dict[str, Any], benchmark: Benchmark, making: MakingConfig) -> dict[str, Any]:
    """All that decides pixels, as JSON-able values."""
    return {
        "name": name,
        "model": model,
        "benchmark": {
            "name": benchmark.name,
            "folder": str(benchmark.folder.resolve()),
            "digest": benchmark.digest,
        },
        "resolution": making.resolution.value,
        "no_context_size": [making.height, making.width],
        "sampler": asdict(making.sampler),
    }


def make_images(
    load: Callable[[], Model],
    benchmark: Benchmark,
    out: Path,
    settings: dict[str, Any],
    making: MakingConfig,
    rank: int = 0,
    ranks: int = 1,
    *,
    progress: bool = False,
) -> Made:
    """Make this rank's share of the images that are not in `out` yet. load: gives the model, called if one is needed.

    Raises ConfigError if `out` holds images of other settings. A context that cannot be decoded fails its images: they
    are named in the result and in their records, and tried again next time. progress: show it on stderr.
    """
    check_settings(out, settings)
    if making.per_category is not None:
        benchmark = benchmark.first(making.per_category)
    seeds, asked = range(making.seeds), {"seeds": making.seeds, "per_category": making.per_category}
    singles = [_Job(case, seed, None) for seed in seeds for case in benchmark.pairs]
    chains = [(chain, seed) for seed in seeds for chain in benchmark.chains][rank::ranks]
    rounds = [singles[rank::ranks]]  # turns of one chain come one after the other
    for turn in range(max((len(chain) for chain, _ in chains), default=0)):
        current = [(chain, seed) for chain, seed in chains if turn < len(chain)]
        rounds.append(
            [
                _Job(chain[turn], seed, image_file(out, chain[turn - 1].key, seed) if turn else None)
                for chain, seed in current
            ]
        )
    made, maker = Made(), None
    shown = bar("images", sum(map(len, rounds)), progress)
    for jobs in rounds:
        todo = [job for job in jobs if not _is_there(out, job)]
        made.kept += len(jobs) - len(todo)
        shown.update(len(jobs) - len(todo))
        if todo and maker is None:
            model = load()
            _check_sizes(benchmark, making, model.pixels_per_token)
            claim(out, settings, asked)  # not before: sizes that are refused must not be the folder's
            maker = _Maker(model, out, settings["model"], making, made, shown.update)
        if todo and maker is not None:
            maker.make(todo)
    if maker is None:
        claim(out, settings, asked)
    shown.close()
    return made


def _is_there(out: Path, job: _Job) -> bool:
    record = read_record(out, job.case.key, job.seed)
    if record is None or record["error"] is not None or record.get("inputs") != job.case.inputs:
        return False
    return image_file(out, job.case.key, job.seed).is_file()


def _check_sizes(benchmark: Benchmark, making: MakingConfig, side: int) -> None:
    """Before the first image is made, of all that are asked for."""
    for case in benchmark:
        height, width = case.height, case.width
        if not case.contexts:
            height, width = height or making.height, width or making.width
        if (height or 0) % side or (width or 0) % side:
            rule = f"of {case.key} must be multiples of {side}, the pixels of a token"
            raise ConfigError("height, width", (height, width), rule, "Round them")


class _Maker:
    def __init__(
        self,
        model: Model,
        out: Path,
        described: dict[str, Any],
        making: MakingConfig,
        made: Made,
        count: Callable[[], object],
    ) -> None:
        """described: the model, for records. count: called for every image that is made or failed."""
        self.described = described
        self.model, self.out, self.making, self.made, self.count = model, out, making, made, count
        self.transform = replace(model.transform, crop=Crop.center)
        if making.resolution is Resolution.kontext:  # released inference enlarges too
            self.transform = replace(self.transform, resize=Resize.kontext, max_upscale=64.0)
        self.warm = making.at_once > 1  # the first image of a process pays for what is set up once

    def make(self, jobs: list[_Job]) -> None:
        ready: list[tuple[_Job, Request]] = []
        for job in jobs:
            try:
                ready.append((job, self._request(job)))
            except (ValueError, FileNotFoundError) as error:
                if isinstance(error, ConfigError):
                    raise
                self._fail(job, str(error))
            if len(ready) == self.making.at_once:
                self._generate(ready)
                ready = []
        if ready:
            self._generate(ready)

    def _request(self, job: _Job) -> Request:
        files = job.case.contexts if job.before is None else (job.before,)
        if job.before is not None and not job.before.is_file():
            raise FileNotFoundError(f"the turn before, {job.before.name}, was not made")
        contexts = [torch.from_numpy(load_image(file, self.transform)).permute(2, 0, 1) for file in files]
        case, making = job.case, self.making
        height, width = contexts[0].shape[1:] if contexts else (making.height, making.width)
        height, width = case.height or height, case.width or width
        return Request(case.instruction, contexts, height, width, request_seed(case.key, job.seed))

    def _generate(self, ready: list[tuple[_Job, Request]]) -> None:
        requests = [request for _, request in ready]
        if not self.warm:
            self.model.generate(requests, self.making.sampler)
            self.warm = True
        started = time.perf_counter()
        images = self.model.generate(requests, self.making.sampler)  # on the CPU: nothing is left to be computed
        latency_s = time.perf_counter() - started if self.making.at_once == 1 else None
        for (job, request), image in zip(ready, images, strict=True):
            file = image_file(self.out, job.case.key, job.seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            part = part_of(file)
            pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
            Image.fromarray(pixels).save(part, "PNG")
            part.replace(file)
            self._record(job, request, latency_s, None)
            self.made.new += 1

    def _fail(self, job: _Job, reason: str) -> None:
        self.made.failed[f"{job.case.key}@{job.seed}"] = reason
        self._record(job, None, None, reason)

    def _record(self, job: _Job, request: Request | None, latency_s: float | None, error: str | None) -> None:
        case = job.case
        record: dict[str, Any] = {
            "key": case.key,
            "category": case.category,
            "instruction": case.instruction,
            "seed": job.seed,
            "inputs": case.inputs,
            "contexts": [str(file) for file in (case.contexts if job.before is None else (job.before,))],
            "resolution": self.making.resolution.value,
            "sampler": asdict(self.making.sampler),
            "model": self.described,
            "made_on": self.model.made_on,
            "latency_s": latency_s,
            "error": error,
        }
        if request is not None:
            record |= {
                "request_seed": request.seed,
                "height": request.height,
                "width": request.width,
                "context_sizes": [list(context.shape[1:]) for context in request.contexts],
            }
        write_json(image_file(self.out, case.key, job.seed).with_suffix(".json"), record)
        self.count()


def request_seed(key: str, seed: int) -> int:
    """Another noise for every pair and seed, the same in every run."""
    return key_of("evaluation", key, seed) & 0x7FFFFFFF
