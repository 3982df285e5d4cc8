"""Which rank is slower than the others, and at what.

Ranks that train together wait for one another, so the time from step to step is the same on all of them. What tells
them apart is the time each takes for what it does alone:

    data      waiting for its own readers
    encode    the passes of the frozen encoders' blocks
    train     the forward and backward passes of all networks' blocks
    update    its own optimizer step (Muon's has an exchange in it)
    save      its part in saving; where a save waits for other ranks, their time is in it

A block's pass is timed from gathered weights to output, and back from the output's gradient (with weights gathered
again) to those of its inputs, before its own are summed over ranks. So nothing in it waits, but for the ranks that
share a sequence (context parallel).

On a GPU, encode, train and update are timed by events, read at a log step only.
"""

import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from kontext_train.distributed.parallelize import HasBlocks
from kontext_train.distributed.reduce import gather_over_ranks
from kontext_train.distributed.setup import World

PARTS = ("data", "encode", "train", "update", "save")
ON_DEVICE = ("encode", "train", "update")
PERSISTENT = 3  # log steps in a row
NOTICEABLE = 0.02  # of the time between log steps: what costs less slows nobody down

Mark = float | torch.cuda.Event


class Stragglers:
    def __init__(self, factor: float, world: World, models: Iterable[HasBlocks]) -> None:
        """factor: times the median that is slow; 0 measures nothing. models: all that encode and train."""
        self.factor, self.world = factor, world
        self.measures = factor > 0 and world.size > 1
        self.sums = dict.fromkeys(PARTS, 0.0)  # seconds since the last log step
        self.spans: deque[tuple[str, Mark, Mark]] = deque()  # those not in the sums yet
        self.part: str | None = None  # that blocks which run now belong to; None in validation
        self.entered: Mark = 0.0  # the block that runs
        self.slow_for: dict[tuple[str, int], int] = defaultdict(int)  # log steps in a row, by part and rank
        self.since = time.perf_counter()
        for block in (b for model in models if self.measures for b in model.blocks()):
            # FSDP's hooks are outside of the first two: weights are there before the one and freed after the other.
            # Its hook on the output is there before the third, so that it has gathered them again in backward.
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave, prepend=True)
            block.register_forward_hook(self._follow_back)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        if not self.measures:
            yield
            return
        started = self._mark(part)
        yield
        self._note(part, started)
        self._fold(lambda ended: isinstance(ended, float) or ended.query())

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Times the passes of blocks inside, and nothing else."""
        self.part = part
        try:
            yield
        finally:
            self.part = None

    def _enter(self, block: nn.Module, inputs: Any) -> None:
        if self.part is not None:
            self.entered = self._mark(self.part)

    def _leave(self, block: nn.Module, inputs: Any, output: Any) -> None:
        if self.part is not None:
            self._note(self.part, self.entered)

    def _follow_back(self, block: nn.Module, inputs: Any, output: Any) -> None:
        part, begun = self.part, list[Mark]()
        if part is None or not torch.is_grad_enabled():
            return

        def begin(gradient: Tensor) -> None:
            if not begun:  # the first of its outputs
                begun.append(self._mark(part))

        def end(gradient: Tensor) -> None:
            self._note(part, begun[0])

        for tensor in _with_gradients(output if isinstance(output, tuple) else (output,)):
            tensor.register_hook(begin)
        for tensor in _with_gradients(inputs)[:1]:  # one stands for all: FSDP has made them outputs of one node
            tensor.register_hook(end)

    def _mark(self, part: str) -> Mark:
        if part not in ON_DEVICE or self.world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _note(self, part: str, started: Mark) -> None:
        self.spans.append((part, started, self._mark(part)))

    def metrics(self) -> dict[str, float]:
        """Of each part since the last call: the slowest rank, its seconds and the median. Every rank must call it."""
        if not self.measures:
            return {}
        now = time.perf_counter()
        wall, self.since = now - self.since, now
        by_rank = gather_over_ranks(self._seconds())
        values: dict[str, float] = {}
        for part, seconds in zip(PARTS, zip(*by_rank, strict=True), strict=True):
            slowest, middle = max(range(len(seconds)), key=seconds.__getitem__), median(seconds)
            values |= {
                f"straggler/{part}/rank": float(slowest),
                f"straggler/{part}/seconds": seconds[slowest],
                f"straggler/{part}/median": middle,
            }
            for rank, own in enumerate(seconds):
                self._judge(part, rank, own, middle, wall)
        return values

    def _seconds(self) -> list[float]:
        """Of this rank in each part; forgets them."""
        self._fold(_waited_for)
        seconds, self.sums = list(self.sums.values()), dict.fromkeys(PARTS, 0.0)
        return seconds

    def _fold(self, is_over: Callable[[Mark], bool]) -> None:
        """Add the oldest spans to the sums, as far as they are over, so that few events are kept."""
        while self.spans and is_over(self.spans[0][2]):
            part, started, ended = self.spans.popleft()
            self.sums[part] += _between(started, ended)

    def _judge(self, part: str, rank: int, seconds: float, middle: float, wall: float) -> None:
        slow = seconds > self.factor * middle and seconds - middle > NOTICEABLE * wall
        self.slow_for[part, rank] = self.slow_for[part, rank] + 1 if slow else 0
        if self.slow_for[part, rank] == PERSISTENT and self.world.is_main:
            print(
                f"kontext-train: rank {rank} is slow at {part}: {seconds:.3g} s since the last log step, the median of "
                f"ranks is {middle:.3g} s, and so for {PERSISTENT} log steps (health.straggler_factor={self.factor:g})",
                file=sys.stderr,
            )


def _with_gradients(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad]


def _waited_for(mark: Mark) -> bool:
    """At a log step, which has waited for the device before."""
    if not isinstance(mark, float):
        mark.synchronize()
    return True


def _between(started: Mark, ended: Mark) -> float:
    if isinstance(started, float) and isinstance(ended, float):
        return ended - started
    assert isinstance(started, torch.cuda.Event)
    assert isinstance(ended, torch.cuda.Event)
    return started.elapsed_time(ended) / 1000
