"""Small values agreed on by all ranks, in one collective."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from kontext_train.distributed.setup import World

ASKED_EVERY_S = 0.2
Value = TypeVar("Value")


def from_main(value: Value) -> Value:
    """Rank 0's value, on every rank. It is pickled."""
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def made_by_main(name: str, make: Callable[[], str], world: World) -> str:
    """Rank 0's value, on every rank, however long it takes to make: the others ask a store and wait in no collective.

    name: of this value alone, the same on all ranks. A rank 0 that fails or dies ends the others by the watchdog.
    """
    if world.size == 1:
        return make()
    store: Any = _get_default_store()
    key = f"made by main/{name}"
    if world.is_main:
        value = make()
        store.set(key, value)
        return value
    while not store.check([key]):
        time.sleep(ASKED_EVERY_S)
    return store.get(key).decode()


def sum_over_ranks(values: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """Sums of scalars over ranks; every rank must give the same names in the same order."""
    stacked = torch.stack([v.detach().double().to(device) for v in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, stacked.tolist(), strict=True))


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on some rank. Goes over the CPU's group, so it waits for no device."""
    return sum_counts([flag])[0] > 0


def sum_counts(counts: list[int]) -> list[int]:
    """Sums of counts over ranks. Goes over the CPU's group, so it waits for no device."""
    sums = torch.tensor(counts, dtype=torch.int64)
    dist.all_reduce(sums)
    return sums.tolist()


def gather_over_ranks(values: list[float]) -> list[list[float]]:
    """Each rank's values, equally many, in the order of ranks. Goes over the CPU's group, so it waits for no device."""
    table = torch.zeros(dist.get_world_size(), len(values), dtype=torch.float64)
    table[dist.get_rank()] = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(table)
    return table.tolist()
