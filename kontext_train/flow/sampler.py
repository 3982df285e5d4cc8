"""Euler steps along the learned velocity, from noise to data."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

VelocityFunction = Callable[[Tensor, Tensor], Tensor]  # z [M, C], t [S] -> v [M, C]


def euler(velocity: VelocityFunction, noise_MC: Tensor, schedule: Tensor, sample_of_token_M: Tensor) -> Tensor:
    """x [M, C] float32 from noise. schedule: [steps + 1, S] times from 1 to 0, one column a sample of the pack."""
    z = noise_MC.float()
    for t, t_next in pairwise(schedule):
        v = velocity(z, t).float()
        z = z + (t_next - t)[sample_of_token_M][:, None] * v
    return z
