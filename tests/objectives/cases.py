"""A packed batch of small pictures, and networks that are formulas."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kontext_train.data.batch import PackedBatch
from kontext_train.models.config import FluxConfig
from kontext_train.models.kontext import Conditioning
from kontext_train.models.sequence import SampleShape, build_layout

CHANNELS, TEXT, POOLED = 8, 6, 5
TINY = FluxConfig(
    in_channels=CHANNELS,
    vec_in_dim=POOLED,
    context_in_dim=TEXT,
    hidden_size=16,
    num_heads=2,
    depth=1,
    depth_single_blocks=2,
    axes_dim=[2, 2, 4],
)


def packed(samples: int, sizes: Sequence[tuple[int, int]] = ((2, 3), (1, 2)), seed: int = 0) -> PackedBatch:
    """Samples with one context each, of these sizes in turn; they weigh equally."""
    random = torch.Generator().manual_seed(seed)
    shapes = [SampleShape(3, sizes[i % len(sizes)], ((2, 2),)) for i in range(samples)]
    layout = build_layout(shapes)

    def drawn(rows: int, channels: int) -> Tensor:
        return torch.randn(rows, channels, generator=random)

    cond = Conditioning(drawn(3 * samples, TEXT), drawn(samples, POOLED), drawn(4 * samples, CHANNELS), layout)
    visits = list(range(samples))
    weight_S = torch.full((samples,), 1 / samples)
    return PackedBatch(drawn(layout.targets, CHANNELS), cond, visits, weight_S, [str(v) for v in visits])


class Formula(nn.Module):
    """A velocity [M, C] that is a function of what a FLUX network is given; notes the guidance it was told."""

    def __init__(self, formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """formula: of noisy targets [M, C], of each token's time [M, 1] and of its prompt's pooled vector [M, P]."""
        super().__init__()
        self.formula, self.scale = formula, nn.Parameter(torch.ones(()))
        self.told: Tensor | None = None

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, t: Tensor, layout: object, guidance: Tensor | None
    ) -> Tensor:
        self.told = guidance
        own = layout.sample_of_target_M
        return self.scale * self.formula(img[: len(own)], t[own][:, None], vec[own])
