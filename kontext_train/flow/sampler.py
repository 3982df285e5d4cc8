"""From noise to data along the learned velocity."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from kontext_train.flow.path import interpolate

VelocityFunction = Callable[[Tensor, Tensor], Tensor]  # z [M, C], t [S] -> v [M, C]


def euler(velocity: VelocityFunction, noise_MC: Tensor, schedule: Tensor, sample_of_token_M: Tensor) -> Tensor:
    """x [M, C] float32 from noise. schedule: [steps + 1, S] times from 1 to 0, one column a sample of the pack."""
    z = noise_MC.float()
    for t, t_next in pairwise(schedule):
        v = velocity(z, t).float()
        z = z + (t_next - t)[sample_of_token_M][:, None] * v
    return z


def stochastic(
    velocity: VelocityFunction, noise: Callable[[int], Tensor], schedule: Tensor, sample_of_token_M: Tensor
) -> Tensor:
    """As `euler`, but each step goes all the way to data, and from there back to the next time with new noise: the
    multistep sampling of consistency models (Song et al. 2023, arXiv 2303.01469, algorithm 1), on a straight path.

    What a step got wrong is drawn again, where Euler keeps the noise that led to it. For students of few steps, which
    were trained on data noised afresh.

    noise: of a step, [M, C]; step 0 begins with it.
    """
    z = noise(0).float()
    for step, (t, t_next) in enumerate(pairwise(schedule)):
        x = z - t[sample_of_token_M][:, None] * velocity(z, t).float()
        z = interpolate(x, noise(step + 1), t_next[sample_of_token_M][:, None])
    return z
