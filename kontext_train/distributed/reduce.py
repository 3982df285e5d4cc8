"""Small values agreed on by all ranks, in one collective."""

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(values: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """Sums of scalars over ranks; every rank must give the same names in the same order."""
    stacked = torch.stack([v.detach().double().to(device) for v in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, stacked.tolist(), strict=True))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on some rank."""
    seen = torch.tensor([flag], dtype=torch.int32, device=device)
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    return bool(seen.item())
