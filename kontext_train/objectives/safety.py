"""Adversarial concept suppression for in-context models, after AdvUnlearn (Zhang et al. 2024, arXiv 2405.15234).

Outer: min_θ  retain(θ) + w E ‖v_θ(z_t, t, c + δ*) − v_benign‖²
Inner: δ* = argmin over the budget of ‖v_θ(z_t, t, c + δ) − v_ref(z_t, t, g)‖², which revives the concept in the student

v_ref is the frozen reference. c is a way to ask for the concept and g, the goal, one that the reference understands: of
an odd rewording, v_ref(c) does not show what the attack is after. v_benign is v_ref(z_t, t, anchor prompt); where a
concept has no anchor prompt it is the goal turned round, v_ref(∅) − η (v_ref(g) − v_ref(∅)) (ESD, Gandikota et al.
2023, arXiv 2303.07345, eq. 5). retain is ‖v_θ − v_ref‖² on ordinary triplets.

Legend: S samples of a pack, or concepts beside it; M target tokens; C channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kontext_train.data.batch import PackedBatch
from kontext_train.flow.config import ShiftConfig
from kontext_train.flow.guidance import guided
from kontext_train.flow.path import interpolate
from kontext_train.flow.sampler import euler
from kontext_train.flow.timesteps import logit_normal, mu_for_tokens, sampling_schedule
from kontext_train.models.flops import ForwardFlops
from kontext_train.models.kontext import Conditioning, predict_velocity
from kontext_train.models.sequence import SampleShape, SequenceLayout
from kontext_train.objectives.base import Loss
from kontext_train.objectives.concepts import ConceptBank, ConceptPack
from kontext_train.objectives.conditioning_attack import Budget, attacked
from kontext_train.objectives.config import ROLLOUT_STEPS, SafetyConfig
from kontext_train.randomness import VisitRandom


@dataclass(slots=True)
class _Revival:
    """Concepts under attack at some noise: what the student is told, what it must answer and what it must not."""

    z_MC: Tensor
    t_S: Tensor
    cond: Conditioning
    benign_MC: Tensor
    revived_MC: Tensor


class Safety:
    phases: tuple[str, ...] = ("student",)

    def __init__(
        self, student: nn.Module, reference: nn.Module, concepts: ConceptBank, config: SafetyConfig, shift: ShiftConfig
    ) -> None:
        """reference: frozen."""
        self.modules: dict[str, nn.Module] = {"student": student}
        self.reference, self.concepts, self.config, self.shift = reference, concepts, config, shift
        self.budget = Budget(config.text_budget, config.pooled_budget, config.context_budget)

    def loss(self, phase: str, batch: PackedBatch, random: VisitRandom, step: int) -> Loss:
        revival = self._revive(batch, random)  # first: no graph of the loss waits while the attack goes back and forth
        weight_M = _mean_weight_M(revival.cond.layout, batch.weight_S.sum())
        v_MC = self._student(revival.z_MC, revival.t_S, revival.cond)
        suppress = (_square_M(v_MC - revival.benign_MC) * weight_M).sum()
        retain = self._retain(batch, random)
        value = retain + self.config.suppress_weight * suppress
        # The attack wins where the student comes nearer to the concept than the anchor is.
        to_concept = (_square_M(v_MC - revival.revived_MC) * weight_M).sum()
        apart = (_square_M(revival.benign_MC - revival.revived_MC) * weight_M).sum()
        metrics = {"loss": value, "retain": retain, "suppress": suppress}
        metrics |= {"distance_to_concept": to_concept, "distance_of_anchor": apart}
        return Loss(value, {name: metric.detach() for name, metric in metrics.items()})

    def flops(self, shapes: Sequence[SampleShape], forward: ForwardFlops, student: float) -> float:
        """Concepts as large as they are on average."""
        beside = min(self.config.concepts_per_pack, len(shapes)) * self.concepts.mean_flops(forward)
        pack = (student + self.config.extra_passes()) * forward.samples(shapes)
        return pack + (student + self.config.extra_passes_beside()) * beside

    def warning(self, step: int, means: Mapping[str, float]) -> str | None:
        return None

    def _retain(self, batch: PackedBatch, random: VisitRandom) -> Tensor:
        """This pack's share of the mean over the step's samples."""
        layout = batch.layout
        t_S, noise_MC = self._times_and_noise("", layout, batch.visits, batch.x_MC.shape[1], random)
        z_MC = interpolate(batch.x_MC, noise_MC, t_S[layout.sample_of_target_M][:, None])
        error_MC = self._student(z_MC, t_S, batch.cond) - self._frozen(z_MC, t_S, batch.cond)
        return (_square_M(error_MC) * batch.token_weight_M()).sum()

    def _revive(self, batch: PackedBatch, random: VisitRandom) -> _Revival:
        """Concepts drawn by the pack's first visits: the same for the same packs, whatever rank has them."""
        pack = self.concepts.pack(batch.visits[: self.config.concepts_per_pack], random)
        cond, anchor, layout = pack.concept, pack.anchor, pack.concept.layout
        t_S, noise_MC = self._times_and_noise("concept ", layout, pack.visits, batch.x_MC.shape[1], random)
        z_MC = self._on_the_way(pack, t_S, noise_MC, random)
        revived_MC, benign_MC = self._frozen(z_MC, t_S, pack.goal), self._frozen(z_MC, t_S, anchor)
        turned_MC = guided(revived_MC, benign_MC, -self.config.negative_guidance)
        benign_MC = torch.where(pack.turned_S[layout.sample_of_target_M][:, None], turned_MC, benign_MC)

        def distance(told: Conditioning) -> Tensor:
            return _square_M(self._student(z_MC, t_S, told) - revived_MC).sum()

        if self.config.attack_steps:
            cond = attacked(distance, cond, self.budget, self.config.attack_steps, random, pack.visits)
        return _Revival(z_MC, t_S, cond, benign_MC, revived_MC)

    def _on_the_way(self, pack: ConceptPack, t_S: Tensor, noise_MC: Tensor, random: VisitRandom) -> Tensor:
        """Where the student will be at t: between noise and what the reference makes of the anchor or, for half of the
        visits, of the goal: an attack that half succeeds leads there.
        """
        layout = pack.concept.layout
        to_goal_S = random.normal_per_visit("concept way", pack.visits) > 0
        to_goal_T = to_goal_S.repeat_interleave(torch.tensor([shape.txt for shape in layout.shapes], device=t_S.device))
        txt_TE = torch.where(to_goal_T[:, None], pack.goal.txt_TE, pack.anchor.txt_TE)
        vec_SP = torch.where(to_goal_S[:, None], pack.goal.vec_SP, pack.anchor.vec_SP)
        told = replace(pack.anchor, txt_TE=txt_TE, vec_SP=vec_SP)
        mu_S = mu_for_tokens(torch.tensor(layout.target_lengths, dtype=torch.float32, device=t_S.device), self.shift)
        schedule = sampling_schedule(ROLLOUT_STEPS, mu_S)
        x_MC = euler(lambda z, t: self._frozen(z, t, told), noise_MC, schedule, layout.sample_of_target_M)
        return interpolate(x_MC, noise_MC, t_S[layout.sample_of_target_M][:, None])

    def _times_and_noise(
        self, purpose: str, layout: SequenceLayout, visits: list[int], channels: int, random: VisitRandom
    ) -> tuple[Tensor, Tensor]:
        lengths = layout.target_lengths
        mu_S = mu_for_tokens(torch.tensor(lengths, dtype=torch.float32, device=random.device), self.shift)
        t_S = logit_normal(random.normal_per_visit(f"{purpose}t", visits), mu_S)
        return t_S, random.normal(f"{purpose}noise", visits, lengths, channels)

    def _student(self, z_MC: Tensor, t_S: Tensor, cond: Conditioning) -> Tensor:
        return self._velocity(self.modules["student"], z_MC, t_S, cond)

    @torch.no_grad()
    def _frozen(self, z_MC: Tensor, t_S: Tensor, cond: Conditioning) -> Tensor:
        return self._velocity(self.reference, z_MC, t_S, cond)

    def _velocity(self, model: nn.Module, z_MC: Tensor, t_S: Tensor, cond: Conditioning) -> Tensor:
        guidance_S = torch.full_like(t_S, self.config.guidance) if model.guidance_in is not None else None
        return predict_velocity(model, z_MC, t_S, replace(cond, guidance_S=guidance_S)).float()


def _square_M(error_MC: Tensor) -> Tensor:
    return error_MC.square().mean(dim=1)


def _mean_weight_M(layout: SequenceLayout, total: Tensor) -> Tensor:
    """Weights that make a sum over target tokens `total` times the mean over samples of each one's token mean."""
    lengths_S = torch.tensor(layout.target_lengths, device=total.device)
    return (total / (len(lengths_S) * lengths_S))[layout.sample_of_target_M]
