"""Float8 matrix products in the blocks, by torchao (Micikevicius et al. 2022, arXiv 2209.05433).

Activations, weights and gradients are scaled and cast just before each product; weights are kept as they were, under
the names that they had. torchao is imported only when a run asks for float8.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kontext_train.distributed.config import Float8, ParallelConfig
from kontext_train.errors import ConfigError

CAPABILITY = {Float8.tensorwise: (8, 9), Float8.rowwise: (9, 0), Float8.mxfp8: (10, 0)}
MULTIPLE = {Float8.tensorwise: 16, Float8.rowwise: 16, Float8.mxfp8: 32}  # sides that the kernels take


def check_hardware(config: ParallelConfig) -> None:
    """ConfigError unless torchao is here and the device computes in this float8, or emulates it."""
    if config.float8 is Float8.none:
        return
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        rule = "needs torchao, which is not installed"
        hint = "pip install kontext-train[float8], or parallel.float8=none"
        raise ConfigError("parallel.float8", config.float8.value, rule, hint) from error
    if config.float8_emulate:
        return
    wanted = CAPABILITY[config.float8]
    has = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if has is None or has < wanted:
        here = f"this one has {has[0]}.{has[1]}" if has else "there is none here"
        rule = f"needs a GPU of compute capability {wanted[0]}.{wanted[1]} or newer; {here}"
        hint = "Use parallel.float8=none, or parallel.float8_emulate=true to try it slowly"
        raise ConfigError("parallel.float8", config.float8.value, rule, hint)


def converted_linears(model: nn.Module, config: ParallelConfig) -> list[str]:
    """Names of the linears that `convert` changes: of the model's `token_linears()`, those whose two sides fit and pay.

    The model names the linears of its blocks that multiply every token; one that names none is left as it is.
    They fit if both are multiples of 16 (of 32 for mxfp8). They pay if both are at least float8_min_features: torchao
    measures 0.80 x the speed of bfloat16 on an H100 for 1024 tokens of 2048 -> 1024 and 1.39 x for 4096 of
    8192 -> 16384 (torchao/float8/README.md), and its own filter leaves out sides up to 2048 (float8_linear_utils.py,
    _auto_filter_for_rowwise).
    """
    multiple, least = MULTIPLE[config.float8], config.float8_min_features
    asked = {id(m) for m in model.token_linears()} if hasattr(model, "token_linears") else set()  # type: ignore[operator]
    return [
        name
        for name, module in model.named_modules()
        if id(module) in asked
        and isinstance(module, nn.Linear)
        and all(side % multiple == 0 and side >= least for side in module.weight.shape)
    ]


def convert(model: nn.Module, config: ParallelConfig) -> None:
    """Exchange linears for their float8 kind, in place; parameters keep their names. Before compile and fully_shard."""
    check_hardware(config)
    if config.float8 is Float8.none:
        return
    for name in converted_linears(model, config):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, _mxfp8(linear, config) if config.float8 is Float8.mxfp8 else _float8(linear, config))


def _float8(linear: nn.Linear, config: ParallelConfig) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    recipe = replace(
        Float8LinearConfig.from_recipe_name(config.float8.value),
        emulate=config.float8_emulate,
        enable_fsdp_float8_all_gather=config.float8 is Float8.tensorwise,
        pad_inner_dim=True,  # gradients of weights sum over tokens, and packs are of any length
    )
    return convert_to_float8_training(linear, config=recipe)


def _mxfp8(linear: nn.Linear, config: ParallelConfig) -> nn.Module:
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    preference = KernelPreference.EMULATED if config.float8_emulate else KernelPreference.AUTO
    with torch.device("meta"):
        made = _padded_mxfp8_linear()(linear.in_features, linear.out_features, kernel_preference=preference)
    made.weight, made.bias = linear.weight, linear.bias
    return made


@cache  # one class, so that compiled blocks share one graph
def _padded_mxfp8_linear() -> Callable[..., nn.Linear]:
    from torchao.prototype.moe_training.mxfp8_linear import MXFP8Linear

    class PaddedMXFP8Linear(MXFP8Linear):
        def forward(self, x: Tensor) -> Tensor:
            """Whole blocks of 32 tokens, since gradients of weights are scaled along tokens. Zeros add nothing."""
            return super().forward(nn.functional.pad(x, (0, 0, 0, -len(x) % 32)))[: len(x)]

    return PaddedMXFP8Linear


def refresh_scales(model: nn.Module) -> None:
    """Take the scales of float8-gathered weights anew, in one collective: after every change of the weights.

    Without it a gather would scale by weights of the past. Does nothing to a model without such weights.
    """
    if any(_wrapped(p) for p in model.parameters()):
        from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

        precompute_float8_dynamic_scale_for_fsdp(model)


def plain(parameter: Tensor) -> Tensor:
    """The parameter without torchao's wrapper, in the same memory: for checkpoints, averages and optimizers."""
    if not _wrapped(parameter):
        return parameter.detach()
    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    inner = cast(Any, parameter.to_local())._tensor
    return DTensor.from_local(inner.detach(), mesh, placements, shape=parameter.shape, stride=parameter.stride())


def _wrapped(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) and is_traceable_wrapper_subclass(parameter.to_local())
