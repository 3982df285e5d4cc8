"""Heads that tell real from made by what a frozen network's blocks say of it (Sauer et al. 2024, arXiv 2403.12015).

Each head looks at the target tokens of one block as the picture they are: 3 x 3 convolutions over the grids of all
samples of a pack, whatever their sizes. Its verdict on a token depends on the noise level and on the prompt through a
projection (Miyato & Koyama 2018, arXiv 1802.05637), as StyleGAN-T's heads do (Sauer et al. 2023, arXiv 2301.09515).

Legend: S samples, M target tokens, D hidden of the frozen network, C channels of a head, P pooled text, H heads.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from kontext_train.models.layers import MLPEmbedder, sinusoidal_embedding, to_tokens
from kontext_train.models.sequence import SampleShape


class Discriminator(nn.Module):
    def __init__(self, heads: int, hidden: int, channels: int, pooled: int) -> None:
        """heads: one for each block that is read. hidden: features of these. pooled: size of CLIP's vector."""
        super().__init__()
        self.time_in, self.vector_in = MLPEmbedder(256, channels), MLPEmbedder(pooled, channels)
        self.heads = nn.ModuleList([Head(hidden, channels) for _ in range(heads)])

    def blocks(self) -> Iterator[nn.Module]:
        yield from self.heads

    def forward(
        self, features: Sequence[Tensor], t_S: Tensor, vec_SP: Tensor, sample_of_target_M: Tensor, around_M9: Tensor
    ) -> Tensor:
        """[H, M] float32 logits, positive for real. features: [M, D] for each head. around_M9: `neighbours`."""
        dtype = self.time_in.in_layer.weight.dtype
        cond_SC = self.time_in(sinusoidal_embedding(t_S).to(dtype)) + self.vector_in(vec_SP.to(dtype))
        cond_MC = to_tokens(cond_SC, sample_of_target_M)
        logits = [head(x_MD.to(dtype), cond_MC, around_M9) for head, x_MD in zip(self.heads, features, strict=True)]
        return torch.stack(logits).float()


class Head(nn.Module):
    """Two convolutions with a residual path around them, then a linear verdict and one that the condition steers."""

    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__()
        self.read = nn.Linear(hidden, channels)
        self.conv1, self.conv2 = Convolution(channels), Convolution(channels)
        self.steer = nn.Linear(channels, channels)
        self.verdict = nn.Linear(channels, 1)

    def forward(self, x_MD: Tensor, cond_MC: Tensor, around_M9: Tensor) -> Tensor:
        """[M]."""
        x_MC = self.read(layer_norm(x_MD, x_MD.shape[-1:], eps=1e-6))
        change_MC = self.conv1(silu(x_MC), around_M9)
        x_MC = silu(x_MC + self.conv2(silu(change_MC), around_M9))
        steered_M = (x_MC * self.steer(silu(cond_MC))).sum(-1) / x_MC.shape[-1] ** 0.5
        return self.verdict(x_MC)[:, 0] + steered_M


class Convolution(nn.Module):
    """3 x 3, with zeros around each picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(9 * channels, channels)

    def forward(self, x_MC: Tensor, around_M9: Tensor) -> Tensor:
        padded = torch.cat([x_MC, x_MC.new_zeros(1, x_MC.shape[1])])  # -1 takes the zeros
        return self.linear(padded[around_M9].flatten(1))


def neighbours(shapes: Sequence[SampleShape]) -> Tensor:
    """[M, 9] int64: where the tokens around each target token stand, row by row, and -1 for those outside."""
    found, first = [], 0
    for h, w in (shape.target for shape in shapes):
        grid = torch.nn.functional.pad(torch.arange(first, first + h * w).view(h, w), (1, 1, 1, 1), value=-1)
        found.append(grid.unfold(0, 3, 1).unfold(1, 3, 1).reshape(h * w, 9))
        first += h * w
    return torch.cat(found)
