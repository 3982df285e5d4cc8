"""AdamW for weights that are kept in bfloat16, and with moments that are kept in 8 bits.

8-bit moments follow Dettmers et al. 2021 (arXiv 2110.02861): blocks of 256 values share a scale, and each value is a
code of a dynamic 8-bit type (sections 1.3 and 2.1), the first moment signed, the second not. torchao's AdamW8bit is
the same arithmetic on the same blocks, and tests hold ours to it. It is not used because it cuts each rank's shard
into blocks: which moments have 8 bits then depends on the number of ranks (pytorch/ao issue 4912), and so does what a
checkpoint holds. Here blocks lie within rows, shards of rows never cut one, and a checkpoint loads at any world size.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from kontext_train.distributed.float8 import plain
from kontext_train.training.rounding import StochasticRounding, local

BLOCK = 256  # values that share a scale


class CompactAdamW(Optimizer):
    """torch's AdamW in float32 arithmetic (Loshchilov & Hutter 2019, arXiv 1711.05101), whatever is kept.

    Moments are float32, or with `int8` codes and scales. Vectors and matrices whose rows are not whole blocks keep
    float32 moments: few values, and biases are sensitive.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        *,
        int8: bool,
        rounding: StochasticRounding,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.int8, self.rounding = int8, rounding

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for number, (group, parameter) in enumerate((g, p) for g in self.param_groups for p in g["params"]):
            if parameter.grad is not None:
                self._update(number, parameter, group)

    def _update(self, number: int, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for moment in ("exp_avg", "exp_avg_sq"):
                state |= _zeros(moment, parameter, self.int8)
        state["step"] += 1
        step, lr, (beta1, beta2) = int(state["step"]), group["lr"], group["betas"]
        assert parameter.grad is not None
        gradient = local(parameter.grad).float()
        first = _read(state, "exp_avg").lerp_(gradient, 1 - beta1)
        second = _read(state, "exp_avg_sq").lerp_(gradient.square(), 1 - beta2)
        _write(state, "exp_avg", first)
        _write(state, "exp_avg_sq", second)
        denominator = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
        weight = local(plain(parameter))
        value = weight.float() * (1 - lr * group["weight_decay"])
        value.addcdiv_(first, denominator, value=-lr / (1 - beta1**step))
        self.rounding.store(weight, value, "adamw", step, number)


def _zeros(moment: str, parameter: Tensor, int8: bool) -> dict[str, Tensor]:
    """One moment's part of a parameter's state, all zero."""
    weight = plain(parameter)
    if not (int8 and weight.ndim == 2 and weight.shape[1] % BLOCK == 0):
        return {moment: torch.zeros_like(weight, dtype=torch.float32)}
    part = local(weight)
    assert part.shape[1] == weight.shape[1], "shards must be of rows"
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    scales = torch.zeros(len(part), part.shape[1] // BLOCK, device=part.device)  # times any level: zero
    return {moment: codes, f"{moment}_scale": _sharded_as(scales, weight)}


def _sharded_as(part: Tensor, weight: Tensor) -> Tensor:
    """A matrix of which this rank holds `part`, with its rows sharded as the weight's."""
    if not isinstance(weight, DTensor):
        return part
    shape = torch.Size((len(weight), part.shape[1]))
    return DTensor.from_local(part, weight.device_mesh, weight.placements, shape=shape, stride=(part.shape[1], 1))


def _read(state: dict[str, Tensor], moment: str) -> Tensor:
    """This rank's part of a moment as a new float32 tensor, or as the state itself where that is float32."""
    kept = local(state[moment])
    if kept.dtype is torch.float32:
        return kept
    scales = local(state[f"{moment}_scale"])
    values = _levels(moment, kept.device)[kept.int()]
    return (values.unflatten(1, (-1, BLOCK)) * scales[:, :, None]).flatten(1)


def _write(state: dict[str, Tensor], moment: str, values: Tensor) -> None:
    """Keep a moment: each value as the nearest level of its block, whose largest magnitude is the scale."""
    kept = local(state[moment])
    if kept.dtype is torch.float32:
        kept.copy_(values)
        return
    blocks = values.unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(dim=2).clamp_(min=1e-12)
    levels = _levels(moment, kept.device)
    middles = (levels[1:] + levels[:-1]) / 2
    kept.copy_(torch.bucketize((blocks / scales[:, :, None]).flatten(1), middles, out_int32=True, right=True))
    local(state[f"{moment}_scale"]).copy_(scales)


@cache
def _levels(moment: str, device: torch.device) -> Tensor:
    return dynamic_levels(signed=moment == "exp_avg").to(device)


def dynamic_levels(signed: bool) -> Tensor:
    """[256] float32, ascending: what the codes of the dynamic 8-bit type stand for, from 0 or -1 to 1.

    Seven decades below 1, each cut finer than the one below it: 1, 2, ... 64 levels and their negatives, or twice as
    many without; with 0 and 1 they are 256.
    """
    levels = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middles = 10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2
        levels += [middles, -middles] if signed else [middles]
    return torch.cat(levels).sort().values
