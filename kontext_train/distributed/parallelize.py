"""From a plain module to a sharded one, applied from outside in one order: checkpointing, compile, fully_shard."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from kontext_train.distributed.activation import check_keep_outputs, checkpointed
from kontext_train.distributed.config import Checkpointing, ParallelConfig, Precision, Reshard
from kontext_train.distributed.float8 import convert
from kontext_train.distributed.recompiles import GRAPHS_PER_FUNCTION, explained


class HasBlocks(Protocol):
    """All that is asked of a model: its repeated parts, in the order they run."""

    def blocks(self) -> Iterator[nn.Module]: ...


def parallelize(model: nn.Module, mesh: DeviceMesh, config: ParallelConfig, static_tokens: int | None = None) -> None:
    """Checkpoint, compile and shard `model` in place over a ("dp_replicate", "dp_shard") mesh; on the meta device too.

    Gradients are summed over ranks, not averaged: the loss already carries the global mean (PackedBatch.weight_S).
    static_tokens: a length that sequences (nearly) always have, for which compiled blocks are specialised; any other
    length shares one more graph. Raises ConfigError for a parallel.keep_outputs that fits no layer.
    """
    if config.master_dtype is Precision.bfloat16:
        model.to(torch.bfloat16)
    convert(model, config)
    blocks = list(cast(HasBlocks, model).blocks())
    if config.activation_checkpointing is Checkpointing.selective:
        check_keep_outputs(blocks, config)
    for block in blocks:
        forward = checkpointed(block.forward, block, config)
        block.forward = _compiled(forward, type(block).__name__, static_tokens) if config.compile else forward
    shard(model, mesh, config, compute_dtype=config.param_dtype)


def shard(model: nn.Module, mesh: DeviceMesh, config: ParallelConfig, compute_dtype: Precision | None = None) -> None:
    """Only fully_shard, block by block: all that a frozen network needs. compute_dtype: None leaves it as stored."""
    blocks = list(cast(HasBlocks, model).blocks())
    dtype = None if compute_dtype is None else getattr(torch, compute_dtype.value)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=getattr(torch, config.reduce_dtype.value),
        cast_forward_inputs=False,  # times and positions stay float32; the model casts what it computes with
    )
    pin_memory = torch.cuda.is_available()
    offload = CPUOffloadPolicy(pin_memory=pin_memory) if config.cpu_offload else OffloadPolicy()
    shard_mesh = mesh if mesh["dp_replicate"].size() > 1 else mesh["dp_shard"]
    for part in (*blocks, model):
        stays = {Reshard.always: False, Reshard.all_but_last: part in (blocks[-1], model), Reshard.never: True}
        fully_shard(
            part,
            mesh=shard_mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=not stays[config.reshard_after_forward],
        )
    for sharded in _sharded(model):
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # a plain sum: gloo has no other, and it is exact
    _prefetch(cast(list[FSDPModule], blocks), config)


def reshard(model: nn.Module) -> None:
    """Free gathered weights: without a backward pass after it, a forward may leave them gathered."""
    for part in _sharded(model):
        part.reshard()


def _sharded(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _prefetch(blocks: list[FSDPModule], config: ParallelConfig) -> None:
    """Gather ahead by name; where a depth is 0, FSDP gathers one block ahead by itself."""
    for i, block in enumerate(blocks):
        if config.prefetch_forward:
            block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + config.prefetch_forward])
        if config.prefetch_backward:
            block.set_modules_to_backward_prefetch(blocks[max(0, i - config.prefetch_backward) : i][::-1])


def _compiled(forward: Callable[..., Any], name: str, static_tokens: int | None) -> Callable[..., Any]:
    """A block's forward, compiled with symbolic lengths: the split between text and image changes from pack to pack.

    The function is compiled, not the module, so that FSDP's hooks stay outside; blocks of one kind share its code and
    with it one graph. A checkpoint inside of it is compiled with it.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS_PER_FUNCTION)
    compiled = explained(torch.compile(forward, fullgraph=True, dynamic=True), name)

    def run(*inputs: Any) -> Any:
        for tensor in _tensors(inputs):
            if tensor.shape[0] == static_tokens:
                torch._dynamo.mark_static(tensor, 0)
        return compiled(*inputs)

    return compiled if static_tokens is None else run


def _tensors(inputs: Iterable[Any]) -> Iterator[Tensor]:
    """Those in tuples and dataclasses too."""
    for value in inputs:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)
        elif is_dataclass(value):
            yield from _tensors(getattr(value, f.name) for f in fields(value))
