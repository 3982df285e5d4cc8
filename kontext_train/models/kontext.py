"""In-context image generation with FLUX: a target is denoised beside its text and any number of context images.

Context tokens stand after the target's and differ from it only in the first position axis (Batifol et al. 2025, arXiv
2506.15742, section 3.1). No weights are added, so a text-to-image checkpoint is a Kontext checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from kontext_train.models.flux import Flux
from kontext_train.models.sequence import SequenceLayout


@dataclass(slots=True, eq=False)
class Conditioning:
    """All that the model is told besides the noisy target and its time. T text tokens, K context tokens, S samples."""

    txt_TE: Tensor
    vec_SP: Tensor
    context_KC: Tensor
    layout: SequenceLayout
    guidance_S: Tensor | None = None


def predict_velocity(model: nn.Module, z_MC: Tensor, t_S: Tensor, cond: Conditioning) -> Tensor:
    """v [M, C] of noisy target tokens z at times t_S (float32, 1 is noise). dtype: the model's compute dtype."""
    return model(_image_stream(z_MC, cond), cond.txt_TE, cond.vec_SP, t_S, cond.layout, cond.guidance_S)


def block_features(model: Flux, z_MC: Tensor, t_S: Tensor, cond: Conditioning, blocks: Sequence[int]) -> list[Tensor]:
    """[M, D] of noisy target tokens after each of `blocks`: see `Flux.features`."""
    img_IC = _image_stream(z_MC, cond)
    return model.features(img_IC, cond.txt_TE, cond.vec_SP, t_S, cond.layout, cond.guidance_S, blocks)


def _image_stream(z_MC: Tensor, cond: Conditioning) -> Tensor:
    """[I, C]: targets, contexts, padding."""
    padding_PC = z_MC.new_zeros(cond.layout.pad, z_MC.shape[1])
    return torch.cat([z_MC, cond.context_KC.to(z_MC.dtype), padding_PC])


def tokens_from_latent(latent_CHW: Tensor) -> Tensor:
    """[(H/2)(W/2), 4C]: each 2 x 2 patch of latents becomes one token."""
    return rearrange(latent_CHW, "c (h ph) (w pw) -> (h w) (c ph pw)", ph=2, pw=2)


def latent_from_tokens(tokens_NC: Tensor, h: int, w: int) -> Tensor:
    """Inverse of `tokens_from_latent` for a grid of h x w tokens."""
    return rearrange(tokens_NC, "(h w) (c ph pw) -> c (h ph) (w pw)", h=h, w=w, ph=2, pw=2)
