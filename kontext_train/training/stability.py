"""Whether an update is made: judged by its loss and gradient norm before it is made, alike on every rank.

What is not finite is never made. With `health.spike_mads`, neither is what lies far above the updates before it: above
median + spike_mads x MAD (median absolute deviation) of the last `spike_window` accepted ones of its phase. The state
is those values and the steps that were skipped. Checkpoints hold it, so a resumed run judges as the first would have.

Whatever was refused is in run.dir/health.jsonl with the samples of all ranks. The file is only ever added to: a run
that is killed and resumed writes again what it sees again.
"""

import json
import math
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kontext_train.distributed.reduce import sum_over_ranks
from kontext_train.distributed.setup import World
from kontext_train.training.config import HealthConfig

TOLD_SAMPLES = 16  # in an error; the file has all
NO_UPDATE = "no update was made"


class Unstable(FloatingPointError):
    """The run cannot go on from here: an update is not finite, or too many were skipped. Raised on every rank."""


def threshold(values: Sequence[float], mads: float) -> float:
    """median + mads x median absolute deviation."""
    middle = median(values)
    return middle + mads * median(abs(value - middle) for value in values)


class Stability:
    """accepted: the last losses and gradient norms by name, oldest first. skips: steps of late without an update."""

    def __init__(self, config: HealthConfig, folder: Path, world: World) -> None:
        self.config, self.world, self.file = config, world, folder / "health.jsonl"
        self.accepted: dict[str, deque[float]] = defaultdict(partial(deque, maxlen=config.spike_window))
        self.skips: list[int] = []
        self.skipped = self.rollbacks = 0

    def accepts(
        self, step: int, phase: str, losses: Sequence[Tensor], norm: Tensor, samples: Sequence[Sequence[str]]
    ) -> bool:
        """Whether to make an update; False is a skip, noted. step: updates before it.

        losses: this rank's share of the loss, of each of its packs. norm: of the gradient of all ranks. samples: keys
        of each pack. Raises Unstable, naming phase, step, ranks and samples.
        """
        # The one wait for the device in a step: a bad update must be stopped before it is made.
        if not self.config.spike_mads and torch.isfinite(norm):
            return True
        shares = {"loss": torch.stack(list(losses)).sum() / self.world.cp, "grad_norm": norm / self.world.size}
        values = sum_over_ranks(shares, self.world.device)  # with which ranks cannot but agree
        if not all(map(math.isfinite, values.values())):
            packs = self._note("not finite", step, phase, values, losses, samples)
            raise Unstable(self._not_finite(step, phase, values, packs))
        limits = self._limits(phase)
        if all(values[name] <= limit for name, limit in limits.items()):
            for name, value in values.items():
                self.accepted[f"{phase}/{name}"].append(value)
            return True
        self._note("skipped", step, phase, values | {f"{n}_limit": v for n, v in limits.items()}, losses, samples)
        self._count_skip(step, phase, values, limits)
        return False

    def _limits(self, phase: str) -> dict[str, float]:
        """What loss and gradient norm may be; nothing until the window is full."""
        history = {name: self.accepted[f"{phase}/{name}"] for name in ("loss", "grad_norm")}
        full = {name: values for name, values in history.items() if len(values) == self.config.spike_window}
        return {name: threshold(values, self.config.spike_mads) for name, values in full.items()}

    def _count_skip(self, step: int, phase: str, values: dict[str, float], limits: dict[str, float]) -> None:
        self.skipped += 1
        self.skips = [s for s in self.skips if s > step - self.config.spike_window] + [step]
        told = ", ".join(f"{name} {values[name]:.4g} (limit {limit:.4g})" for name, limit in limits.items())
        if self.world.is_main:
            print(f"kontext-train: step {step}, phase {phase}: a spike, {NO_UPDATE}: {told}", file=sys.stderr)
        if len(self.skips) > self.config.max_skips:
            raise Unstable(
                f"step {step}, phase {phase}: {len(self.skips)} updates of the last {self.config.spike_window} steps "
                f"were skipped, health.max_skips={self.config.max_skips} are allowed. The last: {told}. {self.file} "
                "names the samples. Lower optimizer.lr, or raise health.spike_mads, max_skips or "
                "max_rollbacks"
            )

    def _note(
        self,
        event: str,
        step: int,
        phase: str,
        values: dict[str, float],
        losses: Sequence[Tensor],
        samples: Sequence[Sequence[str]],
    ) -> list[dict[str, Any]]:
        """Write an event down; returns the packs of all ranks, those with a loss that is not finite first."""
        own = [
            {"rank": self.world.rank, "loss": loss.item(), "samples": list(keys)}
            for loss, keys in zip(losses, samples, strict=True)
        ]
        gathered: list[list[dict[str, Any]]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(gathered, own)
        packs = sorted((p for packs in gathered for p in packs), key=lambda pack: math.isfinite(pack["loss"]))
        self._write({"event": event, "step": step, "phase": phase} | values | {"packs": packs})
        return packs

    def _not_finite(self, step: int, phase: str, values: dict[str, float], packs: list[dict[str, Any]]) -> str:
        to_blame = [pack for pack in packs if not math.isfinite(pack["loss"])]
        ranks = sorted({pack["rank"] for pack in to_blame})
        if to_blame:
            keys = dict.fromkeys(key for pack in to_blame for key in pack["samples"])  # cp's ranks share packs
            blamed = f"The loss is not finite on {_ranks(ranks)}, for the packs of these samples: {_listed(keys)}"
        else:
            blamed = "The loss is finite on all ranks, only its gradient is not"
        own = [key for pack in packs if pack["rank"] == self.world.rank for key in pack["samples"]]
        return (
            f"step {step}, phase {phase}, rank {self.world.rank}: gradient norm is {values['grad_norm']}, loss "
            f"{values['loss']}, {NO_UPDATE}. {blamed}. This rank's samples: {_listed(own)}. Those of all ranks are in "
            f"{self.file}. Resume from the last checkpoint with a lower optimizer.lr, look at these samples, or "
            "raise health.max_rollbacks"
        )

    def may_roll_back(self) -> bool:
        return self.rollbacks < self.config.max_rollbacks

    def rolled_back(self, step: int, to_step: int) -> None:
        """Count a rollback from `step` to the updates of a checkpoint, whose state has been loaded."""
        self.rollbacks += 1
        left_out = step + 1 - to_step
        self._write({"event": "rolled back", "step": step, "to_step": to_step, "steps_of_data_left_out": left_out})
        if self.world.is_main:
            allowed = f"rollback {self.rollbacks} of at most {self.config.max_rollbacks}"
            text = f"step {step}: back to step {to_step}, leaving out the data of {left_out} steps ({allowed})"
            print(f"kontext-train: {text}", file=sys.stderr)

    def metrics(self) -> dict[str, float]:
        if not (self.config.spike_mads or self.config.max_rollbacks):
            return {}
        return {"health/skipped": float(self.skipped), "health/rollbacks": float(self.rollbacks)}

    def _write(self, event: dict[str, Any]) -> None:
        if self.world.is_main:
            with self.file.open("a") as file:
                file.write(json.dumps({"time": time.time()} | _strict(event)) + "\n")

    def state(self) -> dict[str, Any]:
        accepted = {name: list(values) for name, values in self.accepted.items()}
        return {"accepted": accepted, "skips": self.skips, "skipped": self.skipped, "rollbacks": self.rollbacks}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, with no fewer rollbacks than were made since it."""
        self.accepted.clear()
        for name, values in state["accepted"].items():
            self.accepted[name].extend(values)
        self.skips, self.skipped = state["skips"], state["skipped"]
        self.rollbacks = max(self.rollbacks, state["rollbacks"])


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_listed(map(str, ranks))}"


def _listed(things: Iterable[str]) -> str:
    things = list(things)
    more = len(things) - TOLD_SAMPLES
    return ", ".join(things[:TOLD_SAMPLES]) + (f" and {more} more" if more > 0 else "")


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: as strings."""
    if isinstance(value, dict):
        return {k: _strict(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_strict(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
