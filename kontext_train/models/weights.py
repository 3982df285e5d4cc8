"""Weights into a network and out of it, sharded or not. Released names, strict both ways."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from kontext_train.models.config import InitConfig
from kontext_train.models.flux import initial_tensor
from kontext_train.randomness import generator


@torch.no_grad()
def assign(parameter: Tensor, full: Tensor) -> None:
    """Copy a full tensor into a parameter; of a sharded one, each rank copies its own part, without communication."""
    if parameter.shape != full.shape:
        raise ValueError(f"shape {tuple(full.shape)} does not fit a parameter of shape {tuple(parameter.shape)}")
    if isinstance(parameter, DTensor):
        full = full.to(parameter.device, parameter.dtype)
        part = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())
    else:
        parameter.copy_(full)


def initialise(model: nn.Module, config: InitConfig, seed: int) -> None:
    """Fill every parameter from its name and the seed alone: the same network at every world size."""
    for name, parameter in model.named_parameters():
        assign(parameter, initial_tensor(name, parameter.shape, config, generator(seed, "init", name)))


def load(model: nn.Module, path: str | Path) -> None:
    """Fill every parameter from safetensors with released names: one file, or a folder of them.

    Tensors are read one at a time from memory-mapped files. Raises ValueError naming what is missing, what is left
    over, or which shape differs; nothing is loaded by halves in silence.
    """
    files = _safetensors_files(Path(path))
    where = {name: file for file in files for name in _names(file)}
    wanted = dict(model.named_parameters())
    _check_names(path, wanted, where)
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                try:
                    assign(wanted[name], opened.get_tensor(name))
                except ValueError as error:
                    raise ValueError(f"{file}: {name}: {error}") from error


def save(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write full tensors as one safetensors file, whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"format": "pt", **metadata})
    partial.replace(target)


def _safetensors_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"{path}: no safetensors file there. Give a .safetensors file or a folder of them")
    return files


def _names(file: Path) -> Iterable[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _check_names(path: str | Path, wanted: Mapping[str, Tensor], found: Mapping[str, Path]) -> None:
    missing, left_over = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if not missing and not left_over:
        return
    hint = "Check model.depth, model.depth_single_blocks and model.guidance_embed against the file"
    if any(name.startswith("transformer_blocks.") for name in left_over):
        hint = "These are diffusers' names; give the released single file, such as flux1-dev.safetensors"
    elif len(set(found.values())) > 1 and any(name.startswith("decoder.") for name in left_over):
        hint = "The folder holds an autoencoder too; give the transformer's file, such as flux1-dev.safetensors"
    lists = "; ".join(
        f"{len(names)} {what}, first {names[:3]}"
        for what, names in (("missing", missing), ("left over", left_over))
        if names
    )
    raise ValueError(f"{path}: parameter names do not match the model: {lists}. {hint}")
