"""Rectified-flow matching on ⟨context, image, prompt⟩ triplets (Batifol et al. 2025, arXiv 2506.15742, eq. 1)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kontext_train.data.batch import PackedBatch
from kontext_train.flow.config import ShiftConfig
from kontext_train.flow.path import interpolate, velocity
from kontext_train.flow.timesteps import logit_normal, mu_for_tokens
from kontext_train.models.flops import ForwardFlops
from kontext_train.models.kontext import predict_velocity
from kontext_train.models.sequence import SampleShape
from kontext_train.objectives.base import Loss
from kontext_train.randomness import VisitRandom


class FlowMatching:
    """loss = E ‖v_θ(z_t, t, context, text) − (ε − x)‖², the mean over samples of each sample's mean over its tokens."""

    phases: tuple[str, ...] = ("student",)

    def __init__(self, student: nn.Module, shift: ShiftConfig, guidance: float | None) -> None:
        """guidance: told to a student with a guidance embedding; None for one without."""
        self.modules: dict[str, nn.Module] = {"student": student}
        self.shift = shift
        self.guidance = guidance

    def loss(self, phase: str, batch: PackedBatch, random: VisitRandom, step: int) -> Loss:
        lengths = batch.layout.target_lengths
        mu_S = mu_for_tokens(torch.tensor(lengths, dtype=torch.float32, device=batch.x_MC.device), self.shift)
        t_S = logit_normal(random.normal_per_visit("t", batch.visits), mu_S)
        noise_MC = random.normal("noise", batch.visits, lengths, batch.x_MC.shape[1])
        guidance_S = None if self.guidance is None else torch.full_like(t_S, self.guidance)
        error_M = velocity_error(self.modules["student"], batch, t_S, noise_MC, guidance_S)
        value = (error_M * batch.token_weight_M()).sum()
        return Loss(value, {"loss": value.detach()})

    def flops(self, shapes: Sequence[SampleShape], forward: ForwardFlops, student: float) -> float:
        return student * forward.samples(shapes)

    def warning(self, step: int, means: Mapping[str, float]) -> str | None:
        return None


def velocity_error(
    model: nn.Module, batch: PackedBatch, t_S: Tensor, noise_MC: Tensor, guidance_S: Tensor | None
) -> Tensor:
    """[M] mean over channels of the squared velocity error at given times and noise."""
    z_MC = interpolate(batch.x_MC, noise_MC, t_S[batch.layout.sample_of_target_M][:, None])
    v_MC = predict_velocity(model, z_MC, t_S, replace(batch.cond, guidance_S=guidance_S))
    return (v_MC.float() - velocity(batch.x_MC, noise_MC)).square().mean(dim=-1)
