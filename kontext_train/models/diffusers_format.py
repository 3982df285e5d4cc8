"""diffusers' form of the same network (FluxTransformer2DModel): its names, where its rows stand, its config.json.

A released matrix is one of diffusers' or several of them, one above the other: q, k, v (and the MLP) are apart there.
The final modulation is (shift, scale) as released and (scale, shift) there. Nothing else differs but names.
"""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from kontext_train.errors import ConfigError
from kontext_train.models.config import FluxConfig

_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
    "linear2": ("proj_out",),
}


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [start, stop) of a stored tensor."""

    name: str
    start: int
    stop: int


def is_diffusers(names: set[str]) -> bool:
    return any(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in names)


def stored_rows(name: str, rows: int, hidden_size: int) -> list[Rows]:
    """Which rows of diffusers' tensors, one above the other, are the released parameter `name` of `rows` rows."""
    layer, _, kind = name.rpartition(".")
    kind = "weight" if kind == "scale" else kind
    names = [f"{n}.{kind}" for n in _layers(layer)]
    if layer == "final_layer.adaLN_modulation.1":
        return [Rows(names[0], rows // 2, rows), Rows(names[0], 0, rows // 2)]
    apart = [hidden_size] * (len(names) - 1)  # q, k, v before what is last
    heights = [*apart, rows - sum(apart)]
    return [Rows(n, 0, height) for n, height in zip(names, heights, strict=True)]


def _layers(released: str) -> tuple[str, ...]:
    kind, _, rest = released.partition(".")
    match kind:
        case "double_blocks":
            number, _, layer = rest.partition(".")
            return tuple(f"transformer_blocks.{number}.{n}" for n in _DOUBLE[layer])
        case "single_blocks":
            number, _, layer = rest.partition(".")
            return tuple(f"single_transformer_blocks.{number}.{n}" for n in _SINGLE[layer])
        case _:
            return (_OUTER[released],)


def to_diffusers(name: str, tensor: Tensor, hidden_size: int) -> dict[str, Tensor]:
    """A released parameter as diffusers' tensors, by name."""
    pieces: dict[str, dict[int, Tensor]] = {}
    begin = 0
    for rows in stored_rows(name, tensor.shape[0], hidden_size):
        end = begin + rows.stop - rows.start
        pieces.setdefault(rows.name, {})[rows.start] = tensor[begin:end]
        begin = end
    return {stored: torch.cat([piece for _, piece in sorted(parts.items())]) for stored, parts in pieces.items()}


def transformer_config(config: FluxConfig) -> dict[str, Any]:
    """config.json of diffusers' network. ConfigError where it has no option for what this model is."""
    for key, only in (("theta", 10_000), ("mlp_ratio", 4.0), ("qkv_bias", True)):
        if getattr(config, key) != only:
            rule = f"cannot be told to diffusers' FluxTransformer2DModel, which has {only} built in"
            raise ConfigError(f"model.{key}", getattr(config, key), rule, "Export it with format=bfl")
    return {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": version("diffusers"),
        "attention_head_dim": config.head_dim,
        "axes_dims_rope": list(config.axes_dim),
        "guidance_embeds": config.guidance_embed,
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context_in_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "out_channels": None,
        "patch_size": 1,
        "pooled_projection_dim": config.vec_in_dim,
    }
