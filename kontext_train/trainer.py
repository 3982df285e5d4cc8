"""The loop. Every stage runs through it: step -> phases -> microbatches -> clip -> update -> EMA, then what is due."""

import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kontext_train.data.batch import PackedBatch, PixelBatch
from kontext_train.data.encode import Encoders, encode
from kontext_train.data.plan import Position
from kontext_train.distributed.float8 import plain, refresh_scales
from kontext_train.distributed.parallelize import reshard
from kontext_train.distributed.recompiles import Recompiles
from kontext_train.distributed.reduce import sum_counts, sum_over_ranks
from kontext_train.distributed.setup import World
from kontext_train.distributed.watchdog import Watch
from kontext_train.errors import ConfigError, StorageError
from kontext_train.models.flops import ForwardFlops
from kontext_train.objectives.base import Objective
from kontext_train.randomness import VisitRandom
from kontext_train.training import checkpoint
from kontext_train.training.bad_samples import BadSamples
from kontext_train.training.checkpoint_saver import VALIDATED, Saver
from kontext_train.training.config import RunConfig, ScheduleConfig
from kontext_train.training.ema import EMA
from kontext_train.training.health import Health
from kontext_train.training.metrics import RunLog, peak_tflops
from kontext_train.training.optimizer import PhaseOptimizer
from kontext_train.training.schedule import lr_factor
from kontext_train.training.signals import StopRequest
from kontext_train.training.stability import Unstable
from kontext_train.training.validation import Validation

WARN_EVERY_LOGS = 10  # a warning that stays is printed at every so many log steps, and not at each
SETTLE_S = 60.0  # that a failing run waits for the save under way, while its other ranks wait for it


class Interrupted(Exception):
    """A signal asked the run to stop; it has saved and can be resumed."""


@dataclass(slots=True)
class Window:
    """What happened since the last log step. Tensors stay on the device until then."""

    started: float
    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    flops: int = 0
    waited: float = 0.0  # seconds for data
    paused: float = 0.0  # seconds in validation and saving, which no speed counts

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.double()


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """By name. A frozen base is in no checkpoint: it comes from weights.* again."""
    return {name: plain(p) for name, p in module.named_parameters() if p.requires_grad}


def trained_share(module: nn.Module) -> float:
    """Of all parameters: 1, or the little that adapters add to a frozen base."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(size for size, trains in sizes if trains) / sum(size for size, _ in sizes)


class Trainer:
    def __init__(
        self,
        config: RunConfig,
        schedules: dict[str, ScheduleConfig],  # by phase, as the optimizers
        world: World,
        watch: Watch,
        objective: Objective,
        optimizers: dict[str, PhaseOptimizer],
        ema: EMA | None,
        encoders: Encoders,
        flops: ForwardFlops,
        bad: BadSamples,
        health: Health,
        saver: Saver,
        record: dict[str, Any],
    ) -> None:
        """record: what every checkpoint notes besides step and position (composed config, digests)."""
        self.config, self.schedules, self.world, self.watch = config, schedules, world, watch
        self.objective, self.optimizers, self.ema = objective, optimizers, ema
        self.encoders, self.flops, self.bad, self.record = encoders, flops, bad, record
        self.health, self.saver = health, saver
        self.recompiles = Recompiles()
        self.random = VisitRandom(config.seed, world.device)
        self.step, self.position = 0, Position()
        self.silent_until = 0  # a step: no warning is printed before it
        # of the student: forward, gradients of inputs and of weights
        self.passes = 2 + trained_share(objective.modules["student"])

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self, batches: Iterator[PixelBatch], validation: Validation | None, log: RunLog, stop: StopRequest) -> None:
        """Train to config.steps. Raises Interrupted after saving if any rank got a signal."""
        try:
            self.loop(batches, validation, log, stop)
        except Interrupted:
            raise
        except BaseException as error:
            if isinstance(error, Exception):
                self.settle()
            self.watch.fail(error)  # here, where torchrun's SIGTERM does not cut the reason off
            raise
        finally:
            self.health.profiler.close()

    def settle(self) -> None:
        """Let the save under way become complete, if it can soon. If not, the next save removes what there is of it."""
        with suppress(Exception):  # the run has an error of its own
            self.saver.finish(min(SETTLE_S, self.watch.timeout_s / 2))

    def loop(
        self, batches: Iterator[PixelBatch], validation: Validation | None, log: RunLog, stop: StopRequest
    ) -> None:
        peak = peak_tflops(self.world.device)
        window = Window(time.perf_counter())
        self.health.profiler.start(self.step)
        while self.step < self.config.steps:
            self.at("data")
            asked = time.perf_counter()
            with self.health.stragglers.timed("data"):
                pixels = [next(batches) for _ in range(self.config.microbatches)]
            window.waited += time.perf_counter() - asked
            try:
                window.add(self.train_step(pixels))
            except Unstable as error:
                self.note_bad(pixels)
                self.roll_back(error, pixels[-1].position, log)
                window = Window(time.perf_counter())
                continue
            self.count(window, pixels)
            log.advance()
            self.at("stop check")
            self.saver.check()
            stopping = self.agree_to_stop(stop, pixels)
            last = self.step == self.config.steps
            if self.due(self.config.log_every_steps) or last or stopping:
                self.at("log")
                means = self.summary(window, peak)
                self.warn(self.objective.warning(self.step, means))
                log.write(self.step, means | self.recompiles.metrics() | self.health.metrics())
                window = Window(time.perf_counter())
            paused, validated = time.perf_counter(), None
            if validation is not None and (self.due(self.config.validate_every_steps) or last):
                self.at("validation")
                validated = self.validate(validation, log)
            if self.due(self.config.save_every_steps) or last or stopping:
                self.at("save")
                with self.health.stragglers.timed("save"):
                    self.save(validated, last or stopping)
                log.write(self.step, self.saver.metrics())
            window.paused += time.perf_counter() - paused
            self.health.profiler.step()
            if self.bad.too_many():
                raise self.bad.error()
            if stopping and not last:
                log.write(self.step, {"seconds": time.perf_counter() - window.started})
                raise Interrupted(f"stopped by {stop.name or 'another rank'} after step {self.step}")
        log.write(self.step, {"seconds": time.perf_counter() - window.started})

    def warn(self, warning: str | None) -> None:
        if warning is not None and self.step >= self.silent_until:
            self.silent_until = self.step + WARN_EVERY_LOGS * self.config.log_every_steps
            if self.world.is_main:
                print(f"kontext-train: step {self.step}: {warning}", file=sys.stderr)

    def agree_to_stop(self, stop: StopRequest, pixels: list[PixelBatch]) -> bool:
        """Whether a rank got a signal, or too many samples were bad: the same on every rank."""
        (stops,) = self.note_bad(pixels, stop.name is not None)
        return stops > 0 or self.bad.too_many()

    def note_bad(self, pixels: list[PixelBatch], *counts: int) -> list[int]:
        """Count a step's bad samples on all ranks, and tell them; `counts` are summed over ranks by the way."""
        own = [note for batch in pixels for note in batch.bad]
        self.bad.seen += pixels[0].samples_in_step
        bad, *sums = sum_counts([len(own), *counts])
        if bad:
            self.bad.note(self.step, own)
        return sums

    def at(self, phase: str) -> None:
        """Where this rank is, for all who watch. All ranks come to the same places."""
        self.watch.at(self.step, phase)
        self.health.at(self.step, phase)

    def due(self, every: int) -> bool:
        return self.step % every == 0

    def train_step(self, pixels: list[PixelBatch]) -> dict[str, Tensor]:
        """One update of every phase; returns this rank's share of the step's metrics."""
        self.at("encode")
        with self.health.stragglers.within("encode"):
            batches = [encode(p, self.encoders, self.random) for p in pixels]
        metrics: dict[str, Tensor] = {}
        for phase in self.objective.phases:
            metrics |= self.train_phase(phase, batches)
        if self.ema is not None:
            self.ema.update(pixels[0].samples_in_step)
        self.step += 1
        self.position = pixels[-1].position
        return metrics

    def train_phase(self, phase: str, batches: list[PackedBatch]) -> dict[str, Tensor]:
        optimizer = self.optimizers[phase]
        self.at(f"{phase} forward and backward")
        self.zero_gradients()
        metrics: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        with self.health.stragglers.within("train"):
            for batch in batches:
                loss = self.objective.loss(phase, batch, self.random, self.step)
                loss.value.backward()
                losses.append(loss.value.detach())
                metrics = {k: metrics.get(k, 0) + v for k, v in loss.metrics.items()}
        self.at(f"{phase} update")
        norm = optimizer.clip()
        if self.health.stability.accepts(self.step, phase, losses, norm, [batch.keys for batch in batches]):
            with self.health.stragglers.timed("update"):
                optimizer.step(lr_factor(self.step, self.config.steps, self.schedules[phase]))
        return metrics | {f"{phase}/grad_norm": norm.detach() / self.world.dp_size}  # summed over packs: the norm

    def zero_gradients(self) -> None:
        """Of all roles: gradients that reached one through another's phase are not its own."""
        for optimizer in self.optimizers.values():
            optimizer.zero()

    # -- seeing --------------------------------------------------------------------------------------------------

    def count(self, window: Window, pixels: list[PixelBatch]) -> None:
        packs = [p.layout.shapes for p in pixels]
        window.steps += 1
        window.samples += pixels[0].samples_in_step
        window.tokens += sum(shape.tokens for shapes in packs for shape in shapes)
        window.flops += round(sum(self.objective.flops(shapes, self.flops, self.passes) for shapes in packs))

    def summary(self, window: Window, peak: float) -> dict[str, float]:
        """Means over steps and ranks; samples and tokens a second are of all ranks, the rest is a rank's mean."""
        wall = time.perf_counter() - window.started
        seconds = wall - window.paused
        shares = {"tokens": window.tokens, "tflop": window.flops / 1e12, "waited": window.waited}
        local = {k: torch.tensor(v) for k, v in shares.items()}
        everywhere = sum_over_ranks(window.sums | local, self.world.device)
        total = {k: v / self.world.cp for k, v in everywhere.items()}  # ranks of one cp group had the same packs
        losses = {k: total[k] / window.steps for k in window.sums}
        factors = {p: lr_factor(self.step - 1, self.config.steps, schedule) for p, schedule in self.schedules.items()}
        return losses | {
            **{"lr_factor" if phase == "student" else f"{phase}/lr_factor": f for phase, f in factors.items()},
            "samples": float(window.samples),
            "bad_samples": float(self.bad.count),
            "seconds": wall,
            "speed/samples_per_s": window.samples / seconds,
            "speed/tokens_per_s": total["tokens"] / seconds,
            "speed/data_wait": total["waited"] / self.world.dp_size / seconds,
            "speed/tflops": total["tflop"] / self.world.size / seconds,
            "speed/mfu": total["tflop"] / self.world.size / seconds / peak,
        }

    def validate(self, validation: Validation, log: RunLog) -> dict[str, float]:
        """Returns all that was measured, the same on every rank."""
        student = self.objective.modules["student"]
        picture = Path(self.config.dir) / "samples" / f"step_{self.step:08d}.png"
        with self.ema.applied() if self.ema is not None else nullcontext():
            numbers = validation.losses(student)
            if validation.benchmark is not None:
                numbers |= validation.benchmark.measure(student, self.step)
                log.picture(self.step, "benchmark", validation.benchmark.picture(self.step))
            log.write(self.step, numbers)
            if validation.config.pictures:
                validation.draw(student, picture)
                log.picture(self.step, "samples", picture)
            reshard(student)
        return numbers

    # -- keeping -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All tensors of a checkpoint. This list is the whole of it."""
        modules = self.objective.modules
        return {
            "modules": {role: trained_tensors(m) for role, m in modules.items()},
            "optimizers": {phase: optimizer.state() for phase, optimizer in self.optimizers.items()},
            "ema": self.ema.average if self.ema is not None else {},
        }

    def save(self, validated: dict[str, float] | None, wait: bool) -> None:
        """wait: until the checkpoint is complete, and not only copied to host memory."""
        place = {"step": self.step, "position": asdict(self.position), "bad_samples": self.bad.state()}
        place |= {"stability": self.health.stability.state(), VALIDATED: validated}
        self.saver.save(self.step, self.state(), self.record | place, wait)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, at any world size."""
        record = self.restore(path)
        legs = tuple((int(packs), int(steps)) for packs, steps in record["position"]["legs"])
        self.position = Position(record["position"]["window"], record["position"]["pack"], legs)
        self.bad.load(record["bad_samples"], self.step)

    def restore(self, path: Path) -> dict[str, Any]:
        """All of a checkpoint but its place in the data; returns its record."""
        record = checkpoint.read_record(path)
        checkpoint.load(path, self.state())  # fills modules, optimizers and EMA in place
        for module in self.objective.modules.values():
            refresh_scales(module)
        self.step = record["step"]
        self.health.stability.load(record["stability"])
        return record

    def roll_back(self, error: Unstable, position: Position, log: RunLog) -> None:
        """To the newest checkpoint, and on with the data behind the bad step's; raises `error` where none is allowed.

        position: where the data goes on. Nothing is read again: what was trained on since the checkpoint is left out,
        for whatever led here came with it.
        """
        if not self.health.stability.may_roll_back():
            raise error
        self.at("roll back")
        try:
            self.saver.finish()
            path = checkpoint.newest_whole("auto", checkpoint.find_resume("auto", self.saver.folder))
        except (StorageError, ConfigError) as other:
            error.add_note(f"kontext-train: no rollback: {other}")
            raise error from other
        if path is None:
            where = self.saver.folder
            error.add_note(f"kontext-train: no rollback (health.max_rollbacks), {where} has no checkpoint yet")
            raise error
        failed_at = self.step
        self.zero_gradients()
        self.restore(path)
        self.position = position
        self.health.stability.rolled_back(failed_at, self.step)
        log.rewind(self.step)
