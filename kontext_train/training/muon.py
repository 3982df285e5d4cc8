"""Muon on sharded matrices (Jordan et al. 2024): torch's own arithmetic, with each matrix gathered once.

torch.optim.Muon runs on sharded tensors too, but redistributes them at every product of its iteration: hundreds of
collectives for a few matrices. Here the momentum stays sharded and only the update is gathered.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


class Muon(Optimizer):
    """Same update as torch.optim.Muon (Nesterov momentum, five Newton-Schulz steps, its "original" lr adjustment)."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, parameter: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient, buffer = _local(parameter.grad), _local(state["momentum_buffer"])
        buffer.lerp_(gradient, 1 - momentum)
        change = _orthogonalised(_full(torch.lerp(gradient, buffer, momentum), parameter), lr)
        _local(parameter).mul_(1 - lr * weight_decay).add_(_part(change, parameter))


def _orthogonalised(momentum: Tensor, lr: float) -> Tensor:
    """What torch's Muon adds to a matrix for this momentum: found by letting it update a matrix of zeros."""
    change = nn.Parameter(torch.zeros_like(momentum))
    change.grad = momentum
    torch.optim.Muon([change], lr=lr, momentum=0.0, nesterov=False, weight_decay=0.0).step()
    return change.detach()


def _local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _full(local: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor that is sharded like `like`."""
    if not isinstance(like, DTensor):
        return local
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(local, mesh, placements, shape=like.shape, stride=like.stride()).full_tensor()


def _part(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a full tensor, of `like`'s dtype."""
    full = full.to(like.dtype)
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()
