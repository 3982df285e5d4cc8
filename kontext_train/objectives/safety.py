"""Adversarial concept suppression for in-context models, after AdvUnlearn (Zhang et al. 2024, arXiv 2405.15234).

Outer: min_θ  retain(θ) + w E ‖v_θ(z_t, t, c + δ*) − v_benign‖²
Inner: δ* = argmin over the budget of ‖v_θ(z_t, t, c + δ) − v_ref(z_t, t, c)‖², what would revive concept c in the student.

v_ref is a frozen copy. v_benign is v_ref(z_t, t, anchor prompt), or where a concept has no anchor prompt the concept turned
round, v_ref(∅) − η (v_ref(c) − v_ref(∅)) (ESD, Gandikota et al. 2023, arXiv 2303.07345, eq. 5). retain is
‖v_θ − v_ref‖² on ordinary triplets.

Legend: S samples of a pack, B concepts beside it, M target tokens, C channels.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from kontext_train.data.batch import PackedBatch
from kontext_train.flow.config import ShiftConfig
from kontext_train.flow.path import interpolate
from kontext_train.flow.timesteps import logit_normal, mu_for_tokens
from kontext_train.models.kontext import Conditioning, predict_velocity
from kontext_train.objectives.base import Loss
from kontext_train.objectives.concepts import ConceptBank, ConceptPack
from kontext_train.objectives.conditioning_attack import Budget, attacked
from kontext_train.objectives.config import SafetyConfig
from kontext_train.randomness import VisitRandom


class Safety:
    phases: tuple[str, ...] = ("student",)

    def __init__(
        self,
        student: nn.Module,
        reference: nn.Module,
        concepts: ConceptBank,
        config: SafetyConfig,
        shift: ShiftConfig,
        guidance: float | None,
    ) -> None:
        """reference: frozen. guidance: told to models with a guidance embedding; None for those without."""
        self.modules: dict[str, nn.Module] = {"student": student}
        self.reference, self.concepts, self.config, self.shift = reference, concepts, config, shift
        self.guidance = guidance
        self.budget = Budget(config.text_budget, config.pooled_budget, config.context_budget)

    def loss(self, phase: str, batch: PackedBatch, random: VisitRandom) -> Loss:
        retain = self._retain(batch, random)
        suppress, metrics = self._suppress(batch, random)
        value = retain + self.config.suppress_weight * suppress
        metrics |= {"loss": value, "retain": retain, "suppress": suppress}
        return Loss(value, {name: metric.detach() for name, metric in metrics.items()})

    def _retain(self, batch: PackedBatch, random: VisitRandom) -> Tensor:
        """This pack's share of the mean over the step's samples."""
        lengths = batch.layout.target_lengths
        cond = self._told(batch.cond)
        t_S, noise_MC = self._times_and_noise(cond, "", batch.visits, batch.x_MC.shape[1], random)
        z_MC = interpolate(batch.x_MC, noise_MC, t_S[cond.layout.sample_of_target_M][:, None])
        assert len(z_MC) == sum(lengths)
        error_M = (self._student(z_MC, t_S, cond) - self._frozen(z_MC, t_S, cond)).square().mean(dim=1)
        return (error_M * batch.token_weight_M()).sum()

    def _suppress(self, batch: PackedBatch, random: VisitRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """This pack's share of the mean over all concepts of the step, each pack weighing as much as its samples do."""
        pack = self.concepts.pack(batch.visits[: self.config.concepts_per_pack], random)
        weight_M = self._concept_weight_M(pack, batch.weight_S.sum())
        cond, anchor = self._told(pack.concept), self._told(pack.anchor)
        t_S, noise_MC = self._times_and_noise(cond, "concept ", pack.visits, batch.x_MC.shape[1], random)
        # Where the student must be right is where it will be: on the way to what the anchor gives, seen from pure noise.
        ones_S = torch.ones_like(t_S)
        x_MC = noise_MC - self._frozen(noise_MC, ones_S, anchor)
        z_MC = interpolate(x_MC, noise_MC, t_S[cond.layout.sample_of_target_M][:, None])
        revived_MC = self._frozen(z_MC, t_S, cond)
        benign_MC = self._frozen(z_MC, t_S, anchor)
        turned_M1 = pack.turned_S[cond.layout.sample_of_target_M][:, None]
        benign_MC = torch.where(
            turned_M1, benign_MC - self.config.negative_guidance * (revived_MC - benign_MC), benign_MC
        )

        def far_from_revived(told: Conditioning) -> Tensor:
            return (self._student(z_MC, t_S, told) - revived_MC).square().mean(dim=1).sum()

        if self.config.attack_steps:
            cond = attacked(far_from_revived, cond, self.budget, self.config.attack_steps, random, pack.visits)
        v_MC = self._student(z_MC, t_S, cond)
        suppress = ((v_MC - benign_MC).square().mean(dim=1) * weight_M).sum()
        # 0: as the reference answers the concept; 1: as far from it as the anchor is. What the attack leaves of the safety.
        left = ((v_MC - revived_MC).square().mean(dim=1) * weight_M).sum()
        between = ((benign_MC - revived_MC).square().mean(dim=1) * weight_M).sum()
        return suppress, {"from_concept": left, "anchor_from_concept": between}

    def _concept_weight_M(self, pack: ConceptPack, of_pack: Tensor) -> Tensor:
        lengths = pack.concept.layout.target_lengths
        per_token_S = torch.tensor([1 / (n * len(lengths)) for n in lengths], device=of_pack.device)
        return (per_token_S * of_pack)[pack.concept.layout.sample_of_target_M]

    def _times_and_noise(
        self, cond: Conditioning, purpose: str, visits: list[int], channels: int, random: VisitRandom
    ) -> tuple[Tensor, Tensor]:
        lengths = cond.layout.target_lengths
        mu_S = mu_for_tokens(torch.tensor(lengths, dtype=torch.float32, device=random.device), self.shift)
        t_S = logit_normal(random.normal_per_visit(f"{purpose}t", visits), mu_S)
        return t_S, random.normal(f"{purpose}noise", visits, lengths, channels)

    def _told(self, cond: Conditioning) -> Conditioning:
        samples = len(cond.layout.shapes)
        guidance_S = None if self.guidance is None else cond.vec_SP.new_full((samples,), self.guidance)
        return replace(cond, guidance_S=guidance_S)

    def _student(self, z_MC: Tensor, t_S: Tensor, cond: Conditioning) -> Tensor:
        return predict_velocity(self.modules["student"], z_MC, t_S, cond).float()

    @torch.no_grad()
    def _frozen(self, z_MC: Tensor, t_S: Tensor, cond: Conditioning) -> Tensor:
        return predict_velocity(self.reference, z_MC, t_S, cond).float()
