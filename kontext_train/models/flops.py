"""Floating-point operations of a FLUX forward pass, from sizes alone. A multiply-add is two operations.

Attention is bidirectional: every token of a sample reads every other, so there is no causal half.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kontext_train.models.config import FluxConfig
from kontext_train.models.sequence import SampleShape

Tokens = TypeVar("Tokens", int, npt.NDArray[np.int64])


@dataclass(frozen=True, slots=True)
class ForwardFlops:
    """FLOPs of one sample: per_token * tokens + per_token_pair * tokens^2 + per_sample + the ends of the network."""

    per_token: int
    per_token_pair: int
    per_sample: int
    per_txt_token: int
    per_img_token: int
    per_target_token: int

    def of_tokens(self, txt: int, target: Tokens, context: Tokens) -> Tokens:
        """FLOPs of a sample, or of many: target and context tokens are integers or int64 arrays."""
        tokens = txt + target + context
        return (
            self.per_sample
            + self.per_token * tokens
            + self.per_token_pair * tokens**2
            + self.per_txt_token * txt
            + self.per_img_token * (target + context)
            + self.per_target_token * target
        )

    def sample(self, shape: SampleShape) -> int:
        return self.of_tokens(shape.txt, shape.target_tokens, shape.context_tokens)

    def samples(self, shapes: Iterable[SampleShape]) -> int:
        return sum(map(self.sample, shapes))


def forward_flops(config: FluxConfig) -> ForwardFlops:
    """Matrix products only, as torch's FlopCounterMode counts them."""
    d, mlp = config.hidden_size, config.mlp_hidden
    double = 4 * d * d + 2 * d * mlp  # qkv, proj, and the two matrices of the MLP: the same for text and image
    single = d * (3 * d + mlp) + (d + mlp) * d
    modulation = config.depth * 2 * 6 * d * d + config.depth_single_blocks * 3 * d * d + 2 * d * d
    embedders = 256 * d + d * d + config.vec_in_dim * d + d * d + (256 * d + d * d) * config.guidance_embed
    return ForwardFlops(
        per_token=2 * (config.depth * double + config.depth_single_blocks * single),
        per_token_pair=2 * (config.depth + config.depth_single_blocks) * 2 * d,  # q k^T and p v
        per_sample=2 * (modulation + embedders),
        per_txt_token=2 * config.context_in_dim * d,
        per_img_token=2 * config.in_channels * d,
        per_target_token=2 * d * config.in_channels,
    )
