"""Muon on sharded matrices (Jordan et al. 2024): torch's update, with each matrix made orthogonal on one rank.

torch.optim.Muon runs on sharded tensors too, but redistributes them at every product of its iteration: hundreds of
collectives for a few matrices. Here the momentum stays sharded. Matrices are taken in rounds of as many as there are
ranks that share a copy: one exchange brings each rank a whole matrix, it is made orthogonal there, and one exchange
takes the result back. Sorted by cost, the matrices of a round are alike, so that no rank waits long.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from kontext_train.distributed.float8 import plain
from kontext_train.training.rounding import StochasticRounding, local

NEWTON_SCHULZ_STEPS, COEFFICIENTS, EPS = 5, (3.4445, -4.7750, 2.0315), 1e-7  # as torch.optim.Muon has them


class Muon(Optimizer):
    """torch.optim.Muon's update: Nesterov momentum, five Newton-Schulz steps, its "original" lr adjustment. Where both
    iterate in bfloat16 it is the same to the last bit.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float, rounding: StochasticRounding
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.rounding = rounding

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            matrices = [(number, p) for number, p in enumerate(group["params"]) if p.grad is not None]
            matrices.sort(key=lambda item: _cost(item[1]), reverse=True)  # stable: the same order on every rank
            group_of_ranks = _sharing(matrices[0][1]) if matrices else None
            ranks = dist.get_world_size(group_of_ranks) if group_of_ranks is not None else 1
            for first in range(0, len(matrices), ranks):
                self._round(matrices[first : first + ranks], group["lr"], group["momentum"], group["weight_decay"])

    def _round(self, matrices: list[tuple[int, Tensor]], lr: float, momentum: float, weight_decay: float) -> None:
        """Update as many matrices as there are ranks, the i-th of them made orthogonal on rank i."""
        parameters = [parameter for _, parameter in matrices]
        changes = _orthogonalised_together([self._momentum(p, momentum) for p in parameters], parameters, lr)
        for (number, parameter), change in zip(matrices, changes, strict=True):
            weight, state = local(plain(parameter)), self.state[parameter]
            value = (weight.float() * (1 - lr * weight_decay)).add_(change)
            self.rounding.store(weight, value, "muon", int(state["step"]), number)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """This rank's part of the Nesterov momentum, after this step's gradient has been added to the buffer."""
        state = self.state[parameter]
        if not state:
            zeros = torch.zeros_like(plain(parameter), dtype=torch.float32)
            state |= {"step": torch.tensor(0.0), "momentum_buffer": zeros}
        state["step"] += 1
        assert parameter.grad is not None
        gradient, buffer = local(parameter.grad).float(), local(state["momentum_buffer"])
        buffer.lerp_(gradient, 1 - momentum)
        return torch.lerp(gradient, buffer, momentum)


def _cost(matrix: Tensor) -> int:
    """Newton-Schulz multiplies the matrix by its smaller square."""
    return matrix.numel() * min(matrix.shape)


def _orthogonalised(momentum: Tensor, lr: float) -> Tensor:
    """What torch's Muon adds to a matrix for this momentum, in float32."""
    x = momentum.to(_iteration_dtype(momentum.device))
    x = x.T if len(x) > x.shape[1] else x
    x = x / x.norm().clamp(min=EPS)
    a, b, c = COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x if x.shape == momentum.shape else x.T
    return x.float() * (-lr * max(1.0, len(momentum) / momentum.shape[1]) ** 0.5)


def _iteration_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, as torch does it, but where that is no faster: a CPU without matrix units for it takes 2.5 times as
    long as for float32 (`python -m benchmarks.muon`).
    """
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _orthogonalised_together(parts: list[Tensor], parameters: Sequence[Tensor], lr: float) -> list[Tensor]:
    """This rank's parts of the changes, for its `parts` of the momenta of at most as many matrices as ranks share them.

    Momenta travel in the type that they are made orthogonal in, so nothing is lost.
    """
    group = _sharing(parameters[0])
    if group is None:
        return [_orthogonalised(part, lr) for part in parts]
    assert all(_sharing(p) == group for p in parameters), "all matrices must be sharded over the same ranks"
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = parameters[rank] if rank < len(parameters) else None  # the matrix that this rank makes orthogonal
    sizes = [part.numel() for part in parts] + [0] * (ranks - len(parts))  # what this rank has of each rank's matrix
    sizes_of_mine = [0 if mine is None else _rows(mine, r, ranks) * mine.shape[1] for r in range(ranks)]

    dtype = _iteration_dtype(parts[0].device)
    change = _exchange(torch.cat([part.flatten().to(dtype) for part in parts]), sizes, sizes_of_mine, group).float()
    if mine is not None:
        change = _orthogonalised(change.view(mine.shape), lr).flatten()
    changes = _exchange(change, sizes_of_mine, sizes, group).split(sizes)
    return [flat.view_as(part) for flat, part in zip(changes, parts, strict=False)]


def _exchange(sent: Tensor, to_each: list[int], from_each: list[int], group: dist.ProcessGroup) -> Tensor:
    received = sent.new_empty(sum(from_each))
    dist.all_to_all_single(received, sent, from_each, to_each, group)
    return received


def _sharing(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks that share one copy of a parameter, or None if each has it whole."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    sharded = [d for d, placement in enumerate(parameter.placements) if placement.is_shard() and mesh.size(d) > 1]
    if not sharded:
        return None
    (dimension,) = sharded
    assert parameter.placements[dimension] == Shard(0), "FSDP shards rows"
    return mesh.get_group(dimension)


def _rows(parameter: Tensor, rank: int, ranks: int) -> int:
    """Rows of a parameter on a rank: equal chunks, of which the last may be shorter or empty."""
    chunk = -(-len(parameter) // ranks)
    return min(max(len(parameter) - rank * chunk, 0), chunk)
