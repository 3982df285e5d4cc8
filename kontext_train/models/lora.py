"""Adapters of low rank on a frozen network (Hu et al. 2021, arXiv 2106.09685): y = W x + b + alpha / rank * U D^T x.

The frozen network is kept in bfloat16 or, the matrices of its blocks, in float8; adapters are float32. FSDP lets frozen
parameters of other dtypes share a group with trained ones, and gathers all of them in the dtype that is computed in.

Legend: N tokens (or samples), X input features, Y output features, R rank.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kontext_train.errors import ConfigError
from kontext_train.models.config import BaseDtype, LoraConfig, lora_targets
from kontext_train.models.flux import Flux
from kontext_train.models.safetensors_files import StoredTensors

FLOAT8 = torch.float8_e4m3fn
DOWN, UP = ".lora_down", ".lora_up"


class FrozenLinear(nn.Linear):
    """A linear that does not train, perhaps kept in float8, perhaps with an adapter beside it that does.

    Both matrices of an adapter have the rank as their second dimension: FSDP shares out the first one, and it is long.
    """

    def __init__(self, linear: nn.Linear, *, float8: bool, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        y, x = linear.weight.shape
        device = linear.weight.device
        self.in_features, self.out_features = x, y
        self.weight, self.bias = linear.weight, linear.bias
        self.weight_scale = self.lora_down = self.lora_up = None
        if float8:
            self.weight = nn.Parameter(torch.empty(y, x, dtype=FLOAT8, device=device), requires_grad=False)
            scales_Y = torch.empty(y, dtype=torch.float32, device=device)
            self.weight_scale = nn.Parameter(scales_Y, requires_grad=False)
        if rank:
            self.lora_down = nn.Parameter(torch.empty(x, rank, dtype=torch.float32, device=device))
            self.lora_up = nn.Parameter(torch.empty(y, rank, dtype=torch.float32, device=device))
        self.scale = scale

    def forward(self, x_NX: Tensor) -> Tensor:
        if self.weight_scale is None:
            y_NY = nn.functional.linear(x_NX, self.weight, self.bias)
        else:  # scaled after the product, so that backward keeps no second copy of the weight
            y_NY = nn.functional.linear(x_NX, self.weight) * self.weight_scale
            y_NY = y_NY if self.bias is None else y_NY + self.bias
        if self.lora_down is None or self.lora_up is None:
            return y_NY
        return torch.addmm(y_NY, x_NX @ self.lora_down, self.lora_up.t(), alpha=self.scale)


def adapt(model: Flux, config: LoraConfig) -> None:
    """Freeze a FLUX network in place, in lora.base_dtype, and give its targets adapters. Rank 0 changes nothing.

    Parameters of the network keep their names. Before `parallelize`; on the meta device too.
    """
    if config.rank == 0:
        return
    model.requires_grad_(False)
    if config.base_dtype is not BaseDtype.float32:
        model.to(torch.bfloat16)
    exchange_linears(model, config)


def exchange_linears(model: Flux, config: LoraConfig) -> None:
    """The targets for linears with adapters, and all in the blocks for such that are kept in float8, if they are."""
    targets, float8 = set(lora_targets(config, model.config)), config.base_dtype is BaseDtype.float8
    in_blocks = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "_blocks." in n]
    for name in in_blocks:
        if float8 or name in targets:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            rank = config.rank if name in targets else 0
            model.set_submodule(name, FrozenLinear(linear, float8=float8, rank=rank, scale=config.scale))


def is_adapter(name: str) -> bool:
    return name.endswith((DOWN, UP))


def base_names(parameters: Mapping[str, Tensor]) -> list[str]:
    """Those that files of the network hold."""
    return [name for name in parameters if not (is_adapter(name) or name.endswith(".weight_scale"))]


def as_kept(name: str, value: Tensor, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What a tensor of a file becomes in the network: itself, or float8 and the scales of its rows."""
    if parameters[name].dtype is not FLOAT8:
        yield name, value
        return
    value, scale_Y = float8_rows(value)
    yield name, value
    yield f"{name}_scale", scale_Y


def float8_rows(weight_YX: Tensor) -> tuple[Tensor, Tensor]:
    """(float8 values, float32 scale of each row): the smallest power of two by which the row stays within 448, or its
    double.

    Scaling by a power of two is exact in any dtype, and float8 has the same relative precision wherever it is normal.
    """
    weight_YX = weight_YX.float()
    smallest_Y = weight_YX.abs().amax(1) / torch.finfo(FLOAT8).max
    _, exponent_Y = torch.frexp(smallest_Y)
    scale_Y = torch.ldexp(torch.ones_like(smallest_Y), exponent_Y)
    return (weight_YX / scale_Y[:, None]).to(FLOAT8), scale_Y


def initial_adapter(name: str, shape: torch.Size, random: np.random.Generator) -> Tensor:
    """U is zero, so that the network starts as it was; D as PEFT draws it, uniform within 1 / sqrt(inputs)."""
    if name.endswith(UP):
        return torch.zeros(shape)
    bound = shape[0] ** -0.5
    return torch.from_numpy(random.random(shape, dtype=np.float32)) * (2 * bound) - bound


def empty_adapters(model: Flux, config: LoraConfig) -> dict[str, Tensor]:
    """Tensors for the adapters of an unadapted network, by the names that they have in an adapted one."""
    adapters = {}
    for name in lora_targets(config, model.config):
        y, x = model.get_parameter(f"{name}.weight").shape
        adapters[name + DOWN], adapters[name + UP] = torch.empty(x, config.rank), torch.empty(y, config.rank)
    return adapters


@torch.no_grad()
def merged(name: str, value: Tensor, adapters: Mapping[str, Tensor], config: LoraConfig) -> Tensor:
    """A parameter of an unadapted network; W + alpha / rank * U D^T if it is a matrix that has an adapter."""
    linear = name.removesuffix(".weight")
    if linear + UP not in adapters:
        return value
    return torch.addmm(value, adapters[linear + UP], adapters[linear + DOWN].t(), alpha=config.scale)


def base_digest(path: str | Path, key: str = "weights.student") -> str:
    """Of the weights that a frozen network comes from: names, shapes, and the first rows of every tensor.

    Reads some 0.1 % of a 12B file. A change that leaves the first rows of every tensor as they were goes unseen.
    ConfigError naming `key` if there are none.
    """
    try:
        stored = StoredTensors(path)
    except ValueError as error:
        raise ConfigError(key, str(path), "must be the weights of a network", str(error)) from error
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(stored.names()):
        shape = stored.shape(name)
        digest.update(json.dumps([name, shape]).encode())
        if shape:
            rows = stored.rows(name, 0, min(4, shape[0]))
            digest.update(rows.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
