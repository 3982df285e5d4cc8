"""Exponential moving average of weights, sharded as they are, in float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    def __init__(self, model: nn.Module, half_life_images: float) -> None:
        self.model = model
        self.half_life_images = half_life_images
        self.average: dict[str, Tensor] = {
            n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
        }

    def _weights(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self, images: int) -> None:
        """Move towards the weights as far as `images` more training images tell."""
        keep = 0.5 ** (images / self.half_life_images)
        torch._foreach_lerp_(list(self.average.values()), self._weights(), 1 - keep)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model runs with the averaged weights inside; its own are back afterwards, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in zip(self.average.values(), self._weights(), strict=True):
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)
