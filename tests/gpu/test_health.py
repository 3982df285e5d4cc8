"""What health measures by CUDA's own means: events in a stream, and the allocator's history."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kontext_train.distributed.memory import out_of_memory, record_history
from kontext_train.training.stragglers import PARTS, Stragglers


class SleepsBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cycles: int) -> Tensor:
        ctx.cycles = cycles
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        torch.cuda._sleep(ctx.cycles)
        return gradient, None


class Sleeper(nn.Module):
    """A block that keeps its stream busy for some cycles, forward and back, and the host for no time."""

    def forward(self, x: Tensor, cycles: int, back: int) -> Tensor:
        torch.cuda._sleep(cycles)
        return SleepsBack.apply(x, back)

    def blocks(self) -> Iterator[nn.Module]:
        yield self


def test_blocks_are_timed_on_the_device_forward_and_back() -> None:
    world: Any = SimpleNamespace(size=2, is_main=True, device=torch.device("cuda"))
    model = Sleeper()
    watched = Stragglers(1.5, world, [model])
    x = torch.zeros(1, device="cuda", requires_grad=True)
    seconds = []
    for cycles, back in ((10_000_000, 0), (100_000_000, 0), (0, 100_000_000)):
        with watched.within("train"):
            model(x, cycles, back).sum().backward()
        model(x, 100_000_000, 0)  # validation does not count
        seconds.append(dict(zip(PARTS, watched._seconds(), strict=True))["train"])
    assert 5 < seconds[1] / seconds[0] < 20
    assert 5 < seconds[2] / seconds[0] < 20


def test_a_snapshot_holds_what_was_allocated(tmp_path: Path) -> None:
    record_history(1000)
    try:
        kept = torch.empty(123 << 20, dtype=torch.uint8, device="cuda")
        told = out_of_memory(kept.device, tmp_path / "memory" / "rank_0000.pickle")
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    assert "Who holds what is in" in told
    snapshot = pickle.loads((tmp_path / "memory" / "rank_0000.pickle").read_bytes())
    sizes = [block["size"] for segment in snapshot["segments"] for block in segment["blocks"]]
    assert max(sizes) >= 123 << 20
