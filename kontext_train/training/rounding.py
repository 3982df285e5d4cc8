"""Results of float32 arithmetic into weights that are kept in bfloat16, without losing what is small.

bfloat16 has 8 significant bits: rounded to nearest, a weight of 1 never moves by updates below 0.002, however many
come. Rounded up or down with probabilities by distance, it moves as it should on average (Gupta et al. 2015,
arXiv 1502.02551, section 3).
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kontext_train.randomness import key_of


class StochasticRounding:
    """Draws are a function of (seed, step, parameter), so that no generator state is part of a checkpoint.

    Every rank draws the same numbers: copies of a shard on other ranks (HSDP) must round alike, or they would part.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.generator = torch.Generator(device)

    def store(self, weight: Tensor, value: Tensor, *key: int | str) -> None:
        """Write float32 `value` into a local `weight`: rounded by the draws of `key` if it is bfloat16, else exact."""
        if weight.dtype is torch.bfloat16:
            self.generator.manual_seed(key_of(self.seed, "rounding", *key) % 2**63)
            value = stochastic_bfloat16(value, self.generator)
        weight.copy_(value)


def stochastic_bfloat16(value: Tensor, generator: torch.Generator) -> Tensor:
    """A neighbour in bfloat16 of each finite float32; the mean over draws is the value.

    bfloat16 is the upper half of a float32. Adding a random lower half carries into the upper with just the
    probability that is wanted, away from zero for both signs.
    """
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    return ((value.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
