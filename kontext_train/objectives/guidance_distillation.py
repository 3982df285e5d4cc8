"""Guidance distillation: a student that is told the scale does in one pass what guidance does in two.

Meng et al. 2023 (arXiv 2210.03142, section 3.1), for a velocity: v_student(z_t, t, w) = v_0 + w (v_c - v_0).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kontext_train.data.batch import PackedBatch
from kontext_train.flow.config import ShiftConfig
from kontext_train.flow.guidance import guided
from kontext_train.flow.path import interpolate
from kontext_train.flow.timesteps import logit_normal, mu_for_tokens
from kontext_train.models.flops import ForwardFlops
from kontext_train.models.kontext import Conditioning, predict_velocity
from kontext_train.models.sequence import SampleShape
from kontext_train.objectives.base import Loss
from kontext_train.objectives.config import GuidanceDistillationConfig
from kontext_train.randomness import VisitRandom


class GuidanceDistillation:
    """loss = E ‖v_student(z_t, t, w) − v_teacher^w(z_t, t)‖² / max(w, 1)², w uniform in a range.

    What there is to learn, w (v_c - v_0), grows with w: without the weight the highest scales have most of the loss.
    """

    phases: tuple[str, ...] = ("student",)

    def __init__(
        self,
        config: GuidanceDistillationConfig,
        student: nn.Module,
        teacher: nn.Module,
        shift: ShiftConfig,
        empty_prompt: tuple[Tensor, Tensor],
    ) -> None:
        """empty_prompt: its text tokens [L, E] and pooled vector [P]."""
        self.modules: dict[str, nn.Module] = {"student": student}
        self.config, self.teacher, self.shift, self.empty_prompt = config, teacher, shift, empty_prompt

    def loss(self, phase: str, batch: PackedBatch, random: VisitRandom, step: int) -> Loss:
        lengths = batch.layout.target_lengths
        mu_S = mu_for_tokens(torch.tensor(lengths, dtype=torch.float32, device=batch.x_MC.device), self.shift)
        t_S = logit_normal(random.normal_per_visit("t", batch.visits), mu_S)
        w_S = self.scales(random.normal_per_visit("guidance", batch.visits))
        noise_MC = random.normal("noise", batch.visits, lengths, batch.x_MC.shape[1])
        z_MC = interpolate(batch.x_MC, noise_MC, t_S[batch.layout.sample_of_target_M][:, None])
        goal_MC = self.guided_velocity(z_MC, t_S, w_S, batch.cond)
        v_MC = predict_velocity(self.modules["student"], z_MC, t_S, replace(batch.cond, guidance_S=w_S))
        weight_S = w_S.clamp(min=1) ** -2
        error_M = (v_MC.float() - goal_MC).square().mean(dim=-1) * weight_S[batch.layout.sample_of_target_M]
        value = (error_M * batch.token_weight_M()).sum()
        return Loss(value, {"loss": value.detach()})

    def flops(self, shapes: Sequence[SampleShape], forward: ForwardFlops, student: float) -> float:
        return (student + self.config.extra_passes()) * forward.samples(shapes)

    def warning(self, step: int, means: Mapping[str, float]) -> str | None:
        return None

    def scales(self, normal_S: Tensor) -> Tensor:
        """Guidance scales, uniform in the range, from standard normals."""
        low, high = self.config.guidance
        return low + (high - low) * torch.special.ndtr(normal_S)

    @torch.no_grad()
    def guided_velocity(self, z_MC: Tensor, t_S: Tensor, w_S: Tensor, cond: Conditioning) -> Tensor:
        """[M, C] float32 of the teacher, guided away from the empty prompt. The contexts are kept in both passes."""
        low, high = self.config.interval  # Kynkäänniemi et al. 2024, arXiv 2404.07724
        w_S = torch.where((t_S >= low) & (t_S <= high), w_S, torch.ones_like(w_S))
        v_MC = predict_velocity(self.teacher, z_MC, t_S, cond).float()
        txt_LE, vec_P = self.empty_prompt
        samples = len(t_S)
        empty = replace(cond, txt_TE=txt_LE.repeat(samples, 1), vec_SP=vec_P.expand(samples, -1))
        v_empty_MC = predict_velocity(self.teacher, z_MC, t_S, empty).float()
        return guided(v_MC, v_empty_MC, w_S[cond.layout.sample_of_target_M][:, None])
