"""Small values agreed on by all ranks, in one collective."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def from_main(value: Value) -> Value:
    """Rank 0's value, on every rank. It is pickled."""
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


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
