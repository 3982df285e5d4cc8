"""The straight path from data to noise and its velocity (Liu et al. 2022, arXiv 2209.03003)."""

from torch import Tensor


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) x + t noise. t broadcasts against x."""
    return (1 - t) * x + t * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """dz/dt = noise - x, the same at every t."""
    return noise - x
