"""Activation checkpointing as a policy: which outputs of a block are kept for backward and which are computed again."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kontext_train.distributed.config import Checkpointing, ParallelConfig

# Operators that are kept by name. Every attention backend has one of these words in its operator's name.
_OPERATORS = {"attention": re.compile("attention|attn"), "all_to_all": re.compile("all_to_all")}
# Where a matrix product's weight stands among its arguments; a linear layer hands it over as [in, out].
_WEIGHT = {"aten::addmm": 2, "aten::mm": 1, "aten::_scaled_mm": 1}


def checkpointed(forward: Callable[..., Any], block: nn.Module, config: ParallelConfig) -> Callable[..., Any]:
    """A block's forward that keeps for backward what the config says and computes the rest again."""
    match config.activation_checkpointing:
        case Checkpointing.none:
            return forward
        case Checkpointing.full:
            options: dict[str, Any] = {}
        case Checkpointing.selective:
            policy = partial(_policy, frozenset(config.keep_outputs), _kept_shapes(block, config.keep_outputs))
            options = {"context_fn": partial(create_selective_checkpoint_contexts, policy)}
        case other:
            raise AssertionError(other)

    def run(*inputs: Any) -> Any:
        # Nothing in a block is random, so there is no generator state to stash.
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options)

    return run


def _kept_shapes(block: nn.Module, keep: list[str]) -> frozenset[tuple[int, int]]:
    """Inside a block, a linear layer is known by the shape of its weight: ParallelConfig.check_keep_outputs."""
    linears = ((name, m) for name, m in block.named_modules() if isinstance(m, nn.Linear))
    return frozenset((m.in_features, m.out_features) for name, m in linears if name.endswith(tuple(keep)))


def _policy(
    keep: frozenset[str], shapes: frozenset[tuple[int, int]], ctx: Any, operator: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    name = operator.name().split(".")[0]
    for word, pattern in _OPERATORS.items():
        if pattern.search(name):
            return CheckpointPolicy.MUST_SAVE if word in keep else CheckpointPolicy.PREFER_RECOMPUTE
    if name in _WEIGHT:
        weight = args[_WEIGHT[name]]
        assert isinstance(weight, Tensor)
        if tuple(weight.shape) in shapes:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
