"""From a plain module to a sharded one, applied from outside in one order: compile, checkpointing, fully_shard."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from kontext_train.distributed.config import Checkpointing, ParallelConfig


class HasBlocks(Protocol):
    """All that is asked of a model: its repeated parts, in the order they run."""

    def blocks(self) -> Iterator[nn.Module]: ...


def parallelize(model: nn.Module, mesh: DeviceMesh, config: ParallelConfig) -> None:
    """Shard `model` in place over a ("dp_replicate", "dp_shard") mesh. Works on the meta device.

    Gradients are summed over ranks, not averaged: the loss already carries the global mean (PackedBatch.weight_S).
    """
    blocks = list(cast(HasBlocks, model).blocks())
    for block in blocks:
        block.forward = _block_forward(block.forward, config)
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.param_dtype.value),
        reduce_dtype=getattr(torch, config.reduce_dtype.value),
        cast_forward_inputs=False,  # times and positions stay float32; the model casts what it computes with
    )
    replicated = mesh["dp_replicate"].size() > 1
    shard_mesh = mesh if replicated else mesh["dp_shard"]
    for part in (*blocks, model):
        fully_shard(part, mesh=shard_mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a plain sum: gloo has no other, and it is exact


def reshard(model: nn.Module) -> None:
    """Free gathered weights: without a backward pass after it, a forward may leave them gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _block_forward(forward: Callable[..., Any], config: ParallelConfig) -> Callable[..., Any]:
    """A block's forward, compiled and recomputed as the config says.

    The function is compiled, not the module, so that FSDP's hooks stay outside; blocks of one kind share its code and
    with it one graph.
    """
    if config.compile:
        # The split between text and image tokens changes from pack to pack: lengths are symbolic from the start.
        forward = torch.compile(forward, fullgraph=True, dynamic=True)
    match config.activation_checkpointing:
        case Checkpointing.none:
            return forward
        case Checkpointing.full:
            return partial(checkpoint, forward, use_reentrant=False)
    raise AssertionError(config.activation_checkpointing)
