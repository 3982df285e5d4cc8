"""Optimizers over a sharded model: AdamW, or Muon for the matrices of the blocks with AdamW for the rest."""

from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import AdamW, Optimizer

from kontext_train.distributed.parallelize import HasBlocks
from kontext_train.training.config import OptimizerConfig, OptimizerName
from kontext_train.training.muon import Muon


class PhaseOptimizer:
    """One phase's turn: clip, then update with a share of the peak rate. All its rates come from the config alone."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.model, self.config = model, config
        matrices, rest = _share_out(model, config.name)
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        self.optimizers: list[Optimizer] = [
            AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True),
        ]
        if matrices:
            self.optimizers.append(
                Muon(matrices, lr=config.muon_lr, momentum=config.muon_momentum, weight_decay=config.weight_decay)
            )

    def state(self) -> dict[str, Any]:
        """States of all optimizers, sharded, by parameter name."""
        return get_optimizer_state_dict(self.model, self.optimizers)

    def load(self, state: dict[str, Any]) -> None:
        """Take over momenta; options stay as this run's config has them."""
        options = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in self.optimizers]
        set_optimizer_state_dict(self.model, self.optimizers, state)
        for optimizer, groups in zip(self.optimizers, options, strict=True):
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update(values)

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
