"""The loop. Every stage runs through it: step -> phases -> microbatches -> clip -> update -> EMA, then what is due."""

import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kontext_train.data.batch import PackedBatch, PixelBatch
from kontext_train.data.encode import Encoders, encode
from kontext_train.data.plan import Position
from kontext_train.distributed.float8 import plain
from kontext_train.distributed.parallelize import reshard
from kontext_train.distributed.recompiles import Recompiles
from kontext_train.distributed.reduce import sum_counts, sum_over_ranks
from kontext_train.distributed.setup import World
from kontext_train.distributed.watchdog import Watch
from kontext_train.models.flops import ForwardFlops
from kontext_train.objectives.base import Objective
from kontext_train.randomness import VisitRandom
from kontext_train.training import checkpoint
from kontext_train.training.bad_samples import BadSamples
from kontext_train.training.checkpoint_saver import LOSS, Saver
from kontext_train.training.config import RunConfig, ScheduleConfig
from kontext_train.training.ema import EMA
from kontext_train.training.metrics import RunLog, peak_tflops
from kontext_train.training.optimizer import PhaseOptimizer
from kontext_train.training.schedule import lr_factor
from kontext_train.training.signals import StopRequest, stop_on_signals
from kontext_train.training.validation import Validation

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


class Trainer:
    def __init__(
        self,
        config: RunConfig,
        schedule: ScheduleConfig,
        world: World,
        watch: Watch,
        objective: Objective,
        optimizers: dict[str, PhaseOptimizer],  # by phase
        ema: EMA | None,
        encoders: Encoders,
        flops: ForwardFlops,
        bad: BadSamples,
        saver: Saver,
        record: dict[str, Any],
    ) -> None:
        """record: what every checkpoint notes besides step and position (composed config, digests)."""
        self.config, self.schedule, self.world, self.watch = config, schedule, world, watch
        self.objective, self.optimizers, self.ema = objective, optimizers, ema
        self.encoders, self.flops, self.bad, self.saver, self.record = encoders, flops, bad, saver, record
        self.recompiles = Recompiles()
        self.random = VisitRandom(config.seed, world.device)
        self.step, self.position = 0, Position()

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self, batches: Iterator[PixelBatch], validation: Validation | None, log: RunLog) -> None:
        """Train to config.steps. Raises Interrupted after saving if any rank got a signal."""
        with stop_on_signals() as stop:
            try:
                self.loop(batches, validation, log, stop)
            except Interrupted:
                raise
            except BaseException as error:
                if isinstance(error, Exception):
                    self.settle()
                self.watch.fail(error)  # here, where torchrun's SIGTERM does not cut the reason off
                raise

    def settle(self) -> None:
        """Let the save under way become complete, if it can soon. If not, the next save removes what there is of it."""
        with suppress(Exception):  # the run has an error of its own
            self.saver.finish(min(SETTLE_S, self.watch.timeout_s / 2))

    def loop(
        self, batches: Iterator[PixelBatch], validation: Validation | None, log: RunLog, stop: StopRequest
    ) -> None:
        peak = peak_tflops(self.world.device)
        window = Window(time.perf_counter())
        while self.step < self.config.steps:
            self.at("data")
            asked = time.perf_counter()
            pixels = [next(batches) for _ in range(self.config.microbatches)]
            window.waited += time.perf_counter() - asked
            window.add(self.train_step(pixels))
            self.count(window, pixels)
            log.advance()
            self.at("stop check")
            self.saver.check()
            stopping = self.agree_to_stop(stop, pixels)
            last = self.step == self.config.steps
            if self.due(self.config.log_every_steps) or last or stopping:
                self.at("log")
                log.write(self.step, self.summary(window, peak) | self.recompiles.metrics())
                window = Window(time.perf_counter())
            paused, loss = time.perf_counter(), None
            if validation is not None and (self.due(self.config.validate_every_steps) or last):
                self.at("validation")
                loss = self.validate(validation, log)
            if self.due(self.config.save_every_steps) or last or stopping:
                self.at("save")
                self.save(loss, last or stopping)
                log.write(self.step, self.saver.metrics())
            window.paused += time.perf_counter() - paused
            if self.bad.too_many():
                raise self.bad.error()
            if stopping and not last:
                log.write(self.step, {"seconds": time.perf_counter() - window.started})
                raise Interrupted(f"stopped by {stop.name or 'another rank'} after step {self.step}")
        log.write(self.step, {"seconds": time.perf_counter() - window.started})

    def agree_to_stop(self, stop: StopRequest, pixels: list[PixelBatch]) -> bool:
        """Whether a rank got a signal, or too many samples were bad: the same on every rank."""
        own = [note for batch in pixels for note in batch.bad]
        self.bad.seen += pixels[0].samples_in_step
        stops, bad = sum_counts([stop.name is not None, len(own)])
        if bad:
            self.bad.note(self.step, own)
        return stops > 0 or self.bad.too_many()

    def at(self, phase: str) -> None:
        """Where this rank is, for the watchdog. All ranks come to the same places."""
        self.watch.at(self.step, phase)

    def due(self, every: int) -> bool:
        return self.step % every == 0

    def train_step(self, pixels: list[PixelBatch]) -> dict[str, Tensor]:
        """One update of every phase; returns this rank's share of the step's metrics."""
        self.at("encode")
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
        optimizer.zero()
        metrics: dict[str, Tensor] = {}
        for batch in batches:
            loss = self.objective.loss(phase, batch, self.random)
            loss.value.backward()
            metrics = {k: metrics.get(k, 0) + v for k, v in loss.metrics.items()}
        self.at(f"{phase} update")
        norm = optimizer.clip()
        # The one wait for the device in a step: a bad update must be stopped before it is made.
        if not torch.isfinite(norm):
            keys = ", ".join(key for batch in batches for key in batch.keys)
            raise FloatingPointError(
                f"step {self.step}, phase {phase}, rank {self.world.rank}: gradient norm is {norm.item()}, no "
                f"update was made. This rank's samples: {keys}. Resume from the last checkpoint with a lower "
                "optimizer.lr, or look at these samples"
            )
        optimizer.step(lr_factor(self.step, self.config.steps, self.schedule))
        return metrics | {f"{phase}/grad_norm": norm.detach() / self.world.dp_size}  # summed over packs: the norm

    # -- seeing --------------------------------------------------------------------------------------------------

    def count(self, window: Window, pixels: list[PixelBatch]) -> None:
        shapes = [shape for p in pixels for shape in p.layout.shapes]
        window.steps += 1
        window.samples += pixels[0].samples_in_step
        window.tokens += sum(shape.tokens for shape in shapes)
        window.flops += 3 * sum(self.flops.sample(shape) for shape in shapes)  # backward is twice forward

    def summary(self, window: Window, peak: float) -> dict[str, float]:
        """Means over steps and ranks; samples and tokens a second are of all ranks, the rest is a rank's mean."""
        wall = time.perf_counter() - window.started
        seconds = wall - window.paused
        shares = {"tokens": window.tokens, "tflop": window.flops / 1e12, "waited": window.waited}
        local = {k: torch.tensor(v) for k, v in shares.items()}
        everywhere = sum_over_ranks(window.sums | local, self.world.device)
        total = {k: v / self.world.cp for k, v in everywhere.items()}  # ranks of one cp group had the same packs
        losses = {k: total[k] / window.steps for k in window.sums}
        return losses | {
            "lr_factor": lr_factor(self.step - 1, self.config.steps, self.schedule),
            "samples": float(window.samples),
            "bad_samples": float(self.bad.count),
            "seconds": wall,
            "speed/samples_per_s": window.samples / seconds,
            "speed/tokens_per_s": total["tokens"] / seconds,
            "speed/data_wait": total["waited"] / self.world.dp_size / seconds,
            "speed/tflops": total["tflop"] / self.world.size / seconds,
            "speed/mfu": total["tflop"] / self.world.size / seconds / peak,
        }

    def validate(self, validation: Validation, log: RunLog) -> float:
        """Returns the loss, the same on every rank."""
        student = self.objective.modules["student"]
        picture = Path(self.config.dir) / "samples" / f"step_{self.step:08d}.png"
        with self.ema.applied() if self.ema is not None else nullcontext():
            losses = validation.losses(student)
            log.write(self.step, losses)
            if validation.config.pictures:
                validation.draw(student, picture)
                log.picture(self.step, "samples", picture)
            reshard(student)
        return losses["validation/loss"]

    # -- keeping -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All tensors of a checkpoint. This list is the whole of it."""
        modules = self.objective.modules
        return {
            "modules": {role: {n: plain(p) for n, p in m.named_parameters()} for role, m in modules.items()},
            "optimizers": {phase: optimizer.state() for phase, optimizer in self.optimizers.items()},
            "ema": self.ema.average if self.ema is not None else {},
        }

    def save(self, validation_loss: float | None, wait: bool) -> None:
        """wait: until the checkpoint is complete, and not only copied to host memory."""
        place = {"step": self.step, "position": asdict(self.position), "bad_samples": self.bad.state()}
        self.saver.save(self.step, self.state(), self.record | place | {LOSS: validation_loss}, wait)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, at any world size."""
        record = checkpoint.read_record(path)
        checkpoint.load(path, self.state())  # fills modules, optimizers and EMA in place
        legs = tuple((int(packs), int(steps)) for packs, steps in record["position"]["legs"])
        self.position = Position(record["position"]["window"], record["position"]["pack"], legs)
        self.step = record["step"]
        self.bad.load(record["bad_samples"], self.step)
