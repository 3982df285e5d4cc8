"""Exponential moving average of weights, sharded as they are, in float32 whatever they are kept in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kontext_train.distributed.float8 import plain, refresh_scales


class EMA:
    def __init__(self, model: nn.Module, half_life_images: float) -> None:
        self.model = model
        self.half_life_images = half_life_images
        names = (n for n, p in model.named_parameters() if p.requires_grad)
        self.average: dict[str, Tensor] = {
            n: weight.to(torch.float32, copy=True) for n, weight in zip(names, self._weights(), strict=True)
        }

    def _weights(self) -> list[Tensor]:
        return [plain(p) for p in self.model.parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self, images: int) -> None:
        """Move towards the weights as far as `images` more training images tell."""
        keep = 0.5 ** (images / self.half_life_images)
        averages, weights = list(self.average.values()), self._weights()
        if all(weight.dtype is torch.float32 for weight in weights):
            torch._foreach_lerp_(averages, weights, 1 - keep)
        else:  # one by one: all at once would hold a float32 copy of every weight
            for average, weight in zip(averages, weights, strict=True):
                average.lerp_(weight.float(), 1 - keep)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model runs with the averaged weights inside; its own are back afterwards, bit for bit."""
        held = [weight.clone() for weight in self._weights()]
        self._set(list(self.average.values()))
        try:
            yield
        finally:
            self._set(held)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for weight, value in zip(self._weights(), values, strict=True):
            weight.copy_(value)
        refresh_scales(self.model)
