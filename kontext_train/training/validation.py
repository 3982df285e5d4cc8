"""A deterministic validation: the mean velocity loss at eight fixed times, and a grid of sampled pictures.

The loss is MLPerf Training's FLUX.1 test (mean over t = 0, 1/8, ..., 7/8) with noise that never changes, so two runs,
or two steps of one, differ only by their weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kontext_train.data.batch import PackedBatch, PixelBatch
from kontext_train.data.encode import Encoders, as_pixels, encode
from kontext_train.flow.config import ShiftConfig
from kontext_train.generate import Request, generate
from kontext_train.objectives.flow_matching import velocity_error
from kontext_train.randomness import VisitRandom
from kontext_train.training.config import ValidationConfig
from kontext_train.training.pictures import save_grid

TIMES = 8


class Benchmark(Protocol):
    """What else a validation makes and measures: evaluation/in_training.py, which lies above this room."""

    def measure(self, model: nn.Module, step: int) -> dict[str, float]:
        """Numbers by name, the same on every rank. Every rank calls it."""
        ...

    def picture(self, step: int) -> Path: ...


class Validation:
    def __init__(
        self,
        batches: list[PixelBatch],
        pictured: list[PixelBatch],
        encoders: Encoders,
        config: ValidationConfig,
        shift: ShiftConfig,
        *,
        pixels_per_token: int,
        guidance: float | None,
        device: torch.device,
        holders: int,
        benchmark: Benchmark | None = None,
    ) -> None:
        """batches: this rank's share of the fixed samples, equally many on every rank. pictured: the same on all.

        holders: how many ranks have the same share as this one (context parallel).
        """
        self.holders, self.benchmark = holders, benchmark
        self.encoders, self.config, self.shift, self.device = encoders, config, shift, device
        self.pixels_per_token, self.guidance = pixels_per_token, guidance
        self.random = VisitRandom(0, device)
        self.pictured = pictured
        self.batches = [self._encoded(b) for b in batches]

    def _encoded(self, batch: PixelBatch) -> PackedBatch:
        packed = encode(batch, self.encoders, self.random)
        packed.weight_S = (packed.weight_S > 0).float() / self.config.samples / self.holders
        return packed

    @torch.no_grad()
    def losses(self, model: nn.Module) -> dict[str, float]:
        """validation/loss and validation/loss_t0 ... loss_t7, the same on every rank."""
        sums = torch.zeros(TIMES, dtype=torch.float64, device=self.device)
        for batch in self.batches:
            noise = self.random.normal("noise", batch.visits, batch.layout.target_lengths, batch.x_MC.shape[1])
            weight = batch.token_weight_M()
            for i in range(TIMES):
                t_S = torch.full((len(batch.visits),), i / TIMES, device=self.device)
                guidance_S = None if self.guidance is None else torch.full_like(t_S, self.guidance)
                sums[i] += (velocity_error(model, batch, t_S, noise, guidance_S) * weight).sum()
        dist.all_reduce(sums)
        by_time = {f"validation/loss_t{i}": value for i, value in enumerate(sums.tolist())}
        return {"validation/loss": sums.mean().item(), **by_time}

    def draw(self, model: nn.Module, file: Path) -> None:
        """Writes contexts | result | truth of the first pictures. Every rank takes part, for the model is sharded."""
        rows: list[tuple[str, list[Tensor]]] = []
        for batch in self.pictured:
            contexts, truths = (as_pixels(i, self.encoders.autoencoder) for i in (batch.contexts, batch.targets))
            requests = _requests(batch, contexts, truths, first_seed=len(rows))
            results = generate(
                model,
                self.encoders,
                requests,
                self.config.sampler,
                self.shift,
                pixels_per_token=self.pixels_per_token,
                guidance_embed=self.guidance is not None,
                device=self.device,
            )
            for request, result, truth in zip(requests, results, truths, strict=True):
                rows.append((request.prompt, [*request.contexts, result, truth]))
        if dist.get_rank() == 0:
            save_grid(file, rows, scale=max(1, 128 // max(image.shape[1] for _, row in rows for image in row)))


def _requests(
    batch: PixelBatch, contexts: Sequence[Tensor], truths: Sequence[Tensor], first_seed: int
) -> list[Request]:
    rest = iter(contexts)
    return [
        Request(prompt, [next(rest) for _ in shape.contexts], truth.shape[1], truth.shape[2], first_seed + i)
        for i, (prompt, truth, shape) in enumerate(zip(batch.prompts, truths, batch.layout.shapes, strict=True))
    ]
