"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""

from torch import Tensor


def guided(v_cond: Tensor, v_uncond: Tensor, scale: float | Tensor) -> Tensor:
    """v_uncond + scale (v_cond - v_uncond): scale 1 is the conditional velocity, 0 the unconditional one."""
    return v_uncond + scale * (v_cond - v_uncond)
