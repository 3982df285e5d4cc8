"""What the sections share: the unit, the timer, and races in which a contender may fail and the others go on."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from statistics import median
from typing import Any

import torch

from kontext_train.models.config import FluxConfig
from kontext_train.models.sequence import SampleShape

PEAK_TFLOPS = 989.0  # dense bfloat16 of an H100 or H200 SXM, NVIDIA's data sheet: what MFU is measured against
TRIPLET_TFLOP = 496.0  # forward and backward of one 1024 x 1024 edit triplet through the 12B, nothing recomputed
TRIPLET = SampleShape(txt=512, target=(64, 64), contexts=((64, 64),))  # 8,704 tokens
GIB = 2**30

Step = Callable[[], torch.Tensor | None]  # returns a loss if it has one, which must be finite


@dataclass(frozen=True, slots=True)
class Setting:
    """What a section runs with."""

    device: torch.device
    tiny: bool  # sizes for a CPU: the same code in seconds, numbers that mean nothing
    deadline: float  # time.monotonic() after which nothing new is begun
    emit: Callable[[dict[str, Any]], None]  # takes one row of the results

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def model(self) -> FluxConfig:
        """The shape of the 12B, or of a toy."""
        if not self.tiny:
            return FluxConfig()
        return FluxConfig(
            in_channels=16, vec_in_dim=16, context_in_dim=16, hidden_size=64, num_heads=4, axes_dim=[4, 6, 6]
        )  # fmt: skip

    @property
    def triplet(self) -> SampleShape:
        return SampleShape(txt=8, target=(4, 4), contexts=((4, 4),)) if self.tiny else TRIPLET


@dataclass(slots=True)
class Result:
    ms: float  # median of the timed runs
    spread: float  # (longest - shortest) / median
    first_s: float  # building and first run, compilation included
    gib: float | None  # device memory of this contender alone at its peak


def race(
    builders: Mapping[str, Callable[[], Step]], setting: Setting, rounds: int = 7
) -> dict[str, Result | BaseException]:
    """Build and warm up all, then let them take turns, so that a drift of the clocks meets all alike."""
    results: dict[str, Result | BaseException] = {}
    steps: dict[str, Step] = {}
    for name, build in builders.items():
        try:
            steps[name], results[name] = _warmed_up(build, setting)
        except Exception as error:  # whatever it is, it is reported and the others go on
            results[name] = error.with_traceback(None)  # whose frames hold tensors
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(2 if setting.tiny else rounds):
        for name, step in steps.items():
            times[name].append(_ms(step, setting.device))
        if time.monotonic() > setting.deadline:
            break
    for name, values in times.items():
        result = results[name]
        assert isinstance(result, Result)
        result.ms = median(values)
        result.spread = (max(values) - min(values)) / result.ms
    return results


def _warmed_up(build: Callable[[], Step], setting: Setting) -> tuple[Step, Result]:
    if time.monotonic() > setting.deadline:
        raise TimeoutError("no time is left in this section's share")
    cuda = setting.device.type == "cuda"
    start, before = time.monotonic(), torch.cuda.memory_allocated() if cuda else 0
    step = build()
    loss = step()
    if loss is not None and not torch.isfinite(loss):
        raise FloatingPointError(f"loss {loss.item()}")
    del loss
    if not cuda:
        return step, Result(0.0, 0.0, time.monotonic() - start, None)
    torch.cuda.synchronize()
    first_s = time.monotonic() - start
    own = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return step, Result(0.0, 0.0, first_s, (own + torch.cuda.max_memory_allocated() - resting) / GIB)


def _ms(step: Step, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def row(section: str, name: str, result: Result | BaseException, tflop: float, **more: Any) -> dict[str, Any]:
    """One line of the results. tflop: useful work of one run."""
    if isinstance(result, BaseException):
        first_line = (str(result).strip() or "no message").splitlines()[0]
        return {"section": section, "name": name, "error": f"{type(result).__name__}: {first_line}", **more}
    tflops = tflop / result.ms * 1e3
    values = {"ms": result.ms, "spread": result.spread, "tflops": tflops, "mfu": tflops / PEAK_TFLOPS}
    return {"section": section, "name": name, **values, "gib": result.gib, "first_s": result.first_s, **more}


def options(kind: type, **values: Any) -> Any:
    """A room's config dataclass from names and plain values; ValueError for an option that this version lacks."""
    known = {f.name: f for f in fields(kind)}
    typed = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{kind.__name__} has no option {name}")
        default = known[name].default
        typed[name] = type(default)(value) if isinstance(default, Enum) else value
    return kind(**typed)
