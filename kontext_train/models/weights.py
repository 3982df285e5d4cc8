"""Weights into a network, sharded or not: released names or diffusers', strict both ways, own rows only."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kontext_train.models.config import GuidanceIn, InitConfig
from kontext_train.models.diffusers_format import Rows, is_diffusers, stored_rows
from kontext_train.models.flux import Flux, initial_tensor
from kontext_train.models.lora import as_kept, base_names, initial_adapter, is_adapter
from kontext_train.models.safetensors_files import StoredTensors
from kontext_train.randomness import generator

# Matrices stored in float8 may have a scale beside them, LAYER.scale_weight, by which they are multiplied, and the
# file a tensor of this name that says so: as ComfyUI's `convert_old_quants` (comfy/utils.py) reads them.
SCALED_FLOAT8 = "scaled_fp8"
SCALE = "scale_weight"


@torch.no_grad()
def assign(parameter: Tensor, full: Tensor) -> None:
    """Copy a full tensor into a parameter; of a sharded one, each rank copies its own rows, without communication."""
    if parameter.shape != full.shape:
        raise ValueError(f"shape {tuple(full.shape)} does not fit a parameter of shape {tuple(parameter.shape)}")
    start, stop = own_rows(parameter)
    _local(parameter).copy_(full[start:stop])


def own_rows(parameter: Tensor) -> tuple[int, int]:
    """Rows [start, stop) of a parameter that this rank holds: a share of torch.chunk, as FSDP2 cuts; all, if whole."""
    rows = parameter.shape[0]
    if not isinstance(parameter, DTensor):
        return 0, rows
    start, stop = 0, rows
    for dim, placement in enumerate(parameter.placements):  # one shards, the others hold copies
        if placement.is_replicate():
            continue
        assert placement.is_shard(0), f"cut by {parameter.placements}, not by FSDP2"
        share = -(-rows // parameter.device_mesh.size(dim))
        rank = parameter.device_mesh.get_local_rank(dim)
        start, stop = min(rank * share, rows), min((rank + 1) * share, rows)
    assert parameter.to_local().shape[0] == stop - start
    return start, stop


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def initialise(model: nn.Module, config: InitConfig, seed: int) -> None:
    """Fill every parameter from its name and the seed alone: the same network at every world size."""
    parameters = dict(model.named_parameters())
    for name in base_names(parameters):
        full = initial_tensor(name, parameters[name].shape, config, generator(seed, "init", name))
        for kept_name, value in as_kept(name, full, parameters):
            assign(parameters[kept_name], value)


def initialise_adapters(model: nn.Module, seed: int) -> None:
    """Fill the adapters of a network that has any, in the same way."""
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            assign(parameter, initial_adapter(name, parameter.shape, generator(seed, "init", name)))


@torch.no_grad()
def load(model: Flux, path: str | Path, guidance_in: GuidanceIn = GuidanceIn.require, seed: int = 0) -> None:
    """Fill every parameter but adapters from safetensors. Each rank reads the rows that it holds, a tensor at a time.

    path, guidance_in and what is raised before anything is filled: as for `StoredParameters`. seed: of what
    guidance_in=add draws.
    """
    stored = StoredParameters(model, path, guidance_in)
    parameters = dict(model.named_parameters())
    for name in base_names(parameters):
        if name in stored.added:
            _fill_added(name, parameters[name], model.config.init, seed)
            continue
        start, stop = own_rows(parameters[name])
        if start < stop:
            for kept_name, rows in as_kept(name, stored.rows(name, start, stop), parameters):
                _local(parameters[kept_name]).copy_(rows)


class StoredParameters:
    """A network's parameters under their own names, whatever names, cuts and dtypes the files have.

    path: a released file, a diffusers folder (`transformer/`, or the pipeline that holds it), an export of ours, or a
    folder with the parts of one of these. model: may be on the meta device. added: parameters that the file has not
    and need not have. Raises ValueError naming what is missing, what is left over, or which shape differs.
    """

    def __init__(self, model: Flux, path: str | Path, guidance_in: GuidanceIn = GuidanceIn.require) -> None:
        self._stored = StoredTensors(path)
        names = self._stored.names()
        embedder = _embedder(names)
        _check_guidance(path, guidance_in, in_file=bool(embedder), in_model=model.guidance_in is not None)
        parameters = dict(model.named_parameters())
        wanted = {name: parameters[name] for name in base_names(parameters)}
        self.added: set[str] = set()
        match guidance_in:
            case GuidanceIn.require:
                pass
            case GuidanceIn.add:
                self.added = {name for name in wanted if name.startswith("guidance_in.")}
            case GuidanceIn.drop:
                names -= embedder
        theirs, hidden = is_diffusers(names), model.config.hidden_size
        self._recipe = {
            name: stored_rows(name, len(parameter), hidden) if theirs else [Rows(name, 0, len(parameter))]
            for name, parameter in wanted.items()
            if name not in self.added
        }
        _check_names(path, self._recipe.values(), names)
        _check_tensors(path, self._recipe, wanted, self._stored)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a parameter, at least one: a view of the file, or a new tensor if there are several
        parts or a scale.
        """
        parts = [self._read(piece) for piece in _overlap(self._recipe[name], start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, piece: Rows) -> Tensor:
        rows = self._stored.rows(piece.name, piece.start, piece.stop)
        scale = scale_name(piece.name)
        return rows.float() * self._stored.scalar(scale) if scale in self._stored else rows


def embeds_guidance(path: str | Path) -> bool:
    """Whether the file's network has a guidance embedding. Raises ValueError if there are no weights."""
    return bool(_embedder(StoredTensors(path).names()))


def _embedder(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(("guidance_in.", "time_text_embed.guidance_embedder."))}


def _check_guidance(path: str | Path, choice: GuidanceIn, *, in_file: bool, in_model: bool) -> None:
    """The weights of a guidance embedding appear and vanish only where the config says so."""
    expected = {
        GuidanceIn.require: in_file == in_model,
        GuidanceIn.add: in_model and not in_file,
        GuidanceIn.drop: in_file and not in_model,
    }
    if expected[choice]:
        return
    here = f"it has {'' if in_file else 'no '}guidance_in and model.guidance_embed={str(in_model).lower()}"
    match in_file, in_model:
        case True, False:
            hint = "weights.guidance_in=drop leaves it out, model.guidance_embed=true uses it"
        case False, True:
            hint = "weights.guidance_in=add adds one that says nothing at first, model.guidance_embed=false needs none"
        case _:
            hint = "They agree: use weights.guidance_in=require"
    raise ValueError(f"{path}: {here}, which weights.guidance_in={choice.value} does not allow. {hint}")


def _fill_added(name: str, parameter: Tensor, config: InitConfig, seed: int) -> None:
    """A guidance embedding whose last layer is zero: no output changes at first, and every weight can learn."""
    if name.startswith("guidance_in.out_layer."):
        _local(parameter).zero_()
    else:
        assign(parameter, initial_tensor(name, parameter.shape, config, generator(seed, "init", name)))


def _overlap(pieces: list[Rows], start: int, stop: int) -> list[Rows]:
    """Of pieces one above the other, what lies in rows [start, stop) of the whole."""
    found, top = [], 0
    for piece in pieces:
        height = piece.stop - piece.start
        first, last = max(start - top, 0), min(stop - top, height)
        if first < last:
            found.append(Rows(piece.name, piece.start + first, piece.start + last))
        top += height
    return found


def scale_name(stored_weight: str) -> str:
    """The name that the scale of a stored matrix would have; "" for what is none."""
    return f"{stored_weight.rpartition('.')[0]}.{SCALE}" if stored_weight.endswith(".weight") else ""


def _check_names(path: str | Path, recipes: Iterable[list[Rows]], found: set[str]) -> None:
    wanted = {piece.name for pieces in recipes for piece in pieces}
    scales = {scale_name(name) for name in wanted} | {SCALED_FLOAT8}
    missing, left_over = sorted(wanted - found), sorted(found - wanted - scales)
    if not missing and not left_over:
        return
    hint = "Check model.depth, model.depth_single_blocks and the other shapes of model against the file"
    if any(name.startswith("decoder.") for name in left_over):
        hint = "An autoencoder is among them; give the transformer's file, such as flux1-dev.safetensors"
    elif any(".lora_" in name for name in left_over):
        hint = "This is a LoRA, which is no network by itself; give the full weights"
    lists = "; ".join(
        f"{len(names)} {what}, first {names[:3]}"
        for what, names in (("missing", missing), ("left over", left_over))
        if names
    )
    raise ValueError(f"{path}: parameter names do not match the model: {lists}. {hint}")


def _check_tensors(
    path: str | Path, recipe: Mapping[str, list[Rows]], wanted: Mapping[str, Tensor], stored: StoredTensors
) -> None:
    for name, pieces in recipe.items():
        heights = {piece.name: 0 for piece in pieces}
        for piece in pieces:
            heights[piece.name] = max(heights[piece.name], piece.stop)
        for stored_name, height in heights.items():
            fits, has = (height, *wanted[name].shape[1:]), stored.shape(stored_name)
            if has != fits:
                raise ValueError(f"{path}: {stored_name}: shape {has} does not fit, the model's is {fits}")
            if not stored.is_float(stored_name):
                raise ValueError(f"{path}: {stored_name}: holds integers. Give weights that are not quantised to them")
