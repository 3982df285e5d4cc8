"""From a plain module to a sharded one, applied from outside in one order: checkpointing, compile, fully_shard."""

from collections.abc import Iterator
from functools import partial
from typing import Protocol, cast

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
    match config.activation_checkpointing:
        case Checkpointing.none:
            pass
        case Checkpointing.full:
            for block in blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        case _:
            raise AssertionError(config.activation_checkpointing)
    if config.compile:
        for block in blocks:
            # The split between text and image tokens changes from pack to pack, so lengths are symbolic from the start.
            block.compile(fullgraph=True, dynamic=True)
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
