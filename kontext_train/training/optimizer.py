"""Optimizers over a sharded model: AdamW, or Muon for the matrices of the blocks with AdamW for the rest."""

from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import AdamW, Optimizer

from kontext_train.distributed.float8 import refresh_scales
from kontext_train.distributed.parallelize import HasBlocks
from kontext_train.training.compact_adamw import CompactAdamW
from kontext_train.training.config import MomentDtype, OptimizerConfig, OptimizerName
from kontext_train.training.muon import Muon
from kontext_train.training.rounding import StochasticRounding


class PhaseOptimizer:
    """One phase's turn: clip, then update with a share of the peak rate. All its rates come from the config alone."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, seed: int) -> None:
        self.model, self.config = model, config
        matrices, rest = _share_out(model, config.name)
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        rounding = StochasticRounding(seed, rest[0].device)
        int8 = config.moments is MomentDtype.int8
        kind = partial(CompactAdamW, int8=int8, rounding=rounding) if int8 or config.stochastic_rounding else _fused
        self.optimizers: list[Optimizer] = [kind(groups, lr=config.lr, betas=config.betas, eps=config.eps)]
        if matrices:
            self.optimizers.append(Muon(matrices, config.muon_lr, config.muon_momentum, config.weight_decay, rounding))

    def state(self) -> dict[str, Any]:
        """States of all optimizers, sharded, by parameter name.

        The tensors are the optimizers' own: what is read into them in place is taken over. Options are not; they stay
        as this run's config has them.
        """
        return get_optimizer_state_dict(self.model, self.optimizers)

    def zero(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def clip(self) -> Tensor:
        """Scale gradients to a global norm of at most max_grad_norm; returns the norm before, on the device."""
        gradients = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(gradients, self.config.max_grad_norm, foreach=True)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def step(self, lr_factor: float) -> None:
        for optimizer in self.optimizers:
            peak = self.config.muon_lr if isinstance(optimizer, Muon) else self.config.lr
            for group in optimizer.param_groups:
                group["lr"] = peak * lr_factor
            optimizer.step()
        refresh_scales(self.model)


_fused = partial(AdamW, fused=True)


def _share_out(model: nn.Module, name: OptimizerName) -> tuple[list[Tensor], list[Tensor]]:
    """(parameters for Muon, parameters for AdamW)."""
    trained: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    match name:
        case OptimizerName.adamw:
            return [], trained
        case OptimizerName.muon:
            in_blocks = {id(p) for block in cast(HasBlocks, model).blocks() for p in block.parameters() if p.ndim == 2}
            return [p for p in trained if id(p) in in_blocks], [p for p in trained if id(p) not in in_blocks]
    raise AssertionError(name)
