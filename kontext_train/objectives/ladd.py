"""Latent adversarial diffusion distillation (Sauer et al. 2024, arXiv 2403.12015): a student of few steps, no guidance.

The student makes a picture in one step from one of a few times. Made and real pictures are noised again, the frozen
teacher reads them, and heads on its blocks say which is which. No pixel is ever compared with another, so where many
pictures are right the student may choose one; a regression would give their mean.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from kontext_train.data.batch import PackedBatch
from kontext_train.flow.config import ShiftConfig
from kontext_train.flow.path import interpolate
from kontext_train.flow.timesteps import mu_for_tokens, shift
from kontext_train.models.discriminator import neighbours
from kontext_train.models.flops import ForwardFlops
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import block_features, predict_velocity
from kontext_train.models.sequence import SampleShape
from kontext_train.objectives.base import Loss
from kontext_train.objectives.config import LaddConfig
from kontext_train.randomness import VisitRandom

HEADS_LEARN_BY = 100  # steps; against a student that stood still they had an accuracy of 0.71 after 90


class Ladd:
    """Phase discriminator: hinge. Phase student: minus the logits of what it makes."""

    phases: tuple[str, ...] = ("discriminator", "student")

    def __init__(
        self,
        config: LaddConfig,
        student: nn.Module,
        teacher: Flux,
        discriminator: nn.Module,
        shift: ShiftConfig,
        student_guidance: float | None,
    ) -> None:
        """student_guidance: told to a student with a guidance embedding; None for one without."""
        self.modules: dict[str, nn.Module] = {"student": student, "discriminator": discriminator}
        self.config, self.teacher, self.shift = config, teacher, shift
        self.student_guidance = student_guidance
        self.blocks = config.discriminator.blocks_of(teacher.config)

    def loss(self, phase: str, batch: PackedBatch, random: VisitRandom, step: int) -> Loss:
        match phase:
            case "discriminator":
                return self.discriminator_loss(batch, random, step)
            case "student":
                return self.student_loss(batch, random, step)
        raise AssertionError(phase)

    def discriminator_loss(self, batch: PackedBatch, random: VisitRandom, step: int) -> Loss:
        with torch.no_grad():
            first_MC = self.first_pictures("discriminator", batch, random, step)
            made_MC = self.make("discriminator", batch, random, step, first_MC)
            t_S = self.renoise_times("discriminator", batch, random)
            # With one noise: it is in both gradients and largely cancels; what is left is made against real.
            made = self.read("discriminator", made_MC, t_S, batch, random)
            real = self.read("discriminator", batch.x_MC, t_S, batch, random)
        views = [made, real]
        if self.config.gradient_penalty:
            views.append(self.nudged(real, batch, random))
        logits_made_HM, logits_real_HM, *logits_nudged = self.judge(views, t_S, batch)
        weight_M = batch.token_weight_M()
        hinge_HM = relu(1 + logits_made_HM) + relu(1 - logits_real_HM)
        value = hinge = (hinge_HM.mean(0) * weight_M).sum()
        metrics = {
            "discriminator/hinge": hinge,
            "discriminator/logit_made": (logits_made_HM.mean(0) * weight_M).sum(),
            "discriminator/logit_real": (logits_real_HM.mean(0) * weight_M).sum(),
        }
        for logits_HM in logits_nudged:
            slope_HM = (logits_HM - logits_real_HM) / self.config.gradient_penalty_std
            penalty = (slope_HM.square().mean(0) * weight_M).sum()
            value = value + self.config.gradient_penalty * penalty
            metrics["discriminator/gradient_penalty"] = penalty
        right_HM = ((logits_made_HM < 0).float() + (logits_real_HM > 0).float()) / 2
        for block, right_M in zip(self.blocks, right_HM, strict=True):
            metrics[f"discriminator/accuracy_block_{block}"] = (right_M * weight_M).sum()
        metrics["discriminator/accuracy"] = (right_HM.mean(0) * weight_M).sum()
        return Loss(value, {name: metric.detach() for name, metric in metrics.items()})

    def student_loss(self, batch: PackedBatch, random: VisitRandom, step: int) -> Loss:
        first_MC = self.first_pictures("student", batch, random, step)
        made_MC = self.make("student", batch, random, step, first_MC)
        t_S = self.renoise_times("student", batch, random)
        (logits_HM,) = self.judge([self.read("student", made_MC, t_S, batch, random)], t_S, batch)
        weight_M = batch.token_weight_M()
        value = -(logits_HM.mean(0) * weight_M).sum()
        start_S = self.student_times("student", batch, random, step)
        metrics = {
            "loss": value.detach(),
            "diversity_made": diversity(made_MC.detach(), start_S, batch),
            "diversity_real": diversity(batch.x_MC, start_S, batch),
            "samples_judged": (batch.weight_S > 0).sum(),
        }
        if first_MC is not None:
            metrics["diversity_noise"] = between_noises(made_MC.detach(), first_MC, start_S, batch)
        return Loss(value, metrics)

    def flops(self, shapes: Sequence[SampleShape], forward: ForwardFlops, student: float) -> float:
        return (student + self.config.extra_passes()) * forward.samples(shapes)

    def warning(self, step: int, means: Mapping[str, float]) -> str | None:
        """means: metrics since the last log step."""
        made, real, accuracy = means["diversity_made"], means["diversity_real"], means["discriminator/accuracy"]
        if means["samples_judged"] < 2:
            return (
                "each hinge is over one sample, which has collapsed elsewhere. "
                "Raise run.microbatches or data.tokens_per_pack"
            )
        if real > 0 and not 0.5 < made / real < 2:  # 0: no two samples that can be held against each other
            return (
                f"the student's pictures differ {made / real:.2f} times as much from each other as real ones do "
                "(diversity_made over diversity_real): it is collapsing, or still makes the mean of many from noise. "
                "If it does not rise, go back to an earlier checkpoint with a lower optimizer.lr, or with more samples "
                "in a step"
            )
        if accuracy > 0.98:
            return (
                f"the discriminator is right about {accuracy:.1%} of tokens and teaches little. "
                "Lower discriminator_optimizer.lr, or raise objective.gradient_penalty or renoise_mean"
            )
        if step >= HEADS_LEARN_BY and abs(accuracy - 0.5) < 0.005 and means["discriminator/hinge"] > 1.99:
            return (
                f"the heads tell nothing apart (accuracy {accuracy:.3f}, hinge {means['discriminator/hinge']:.3f}), so "
                "the student learns nothing: it outruns them, or has arrived. Lower optimizer.lr, or lower "
                "objective.gradient_penalty or renoise_mean, and judge pictures"
            )
        return None

    # -- pictures ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def first_pictures(self, phase: str, batch: PackedBatch, random: VisitRandom, step: int) -> Tensor | None:
        """[M, C] of the student's own, from noise: what the second of its steps meets when it samples, where real
        pictures would not show it the first one's mistakes (Yin et al. 2024, arXiv 2405.14867, section 4.4). None
        where there is no backward simulation.
        """
        if not self.config.backward_simulation or step < self.config.warmup_steps:
            return None
        t_S = torch.ones(len(batch.visits), device=batch.x_MC.device)
        return self.one_step(self._noise(f"{phase} first", batch, random), t_S, batch)

    def make(self, phase: str, batch: PackedBatch, random: VisitRandom, step: int, first_MC: Tensor | None) -> Tensor:
        """[M, C] pictures that the student makes in one step, at one of its times, of noised ones. first_MC: its own
        first pictures, which stand in for real ones in some samples.
        """
        t_S = self.student_times(phase, batch, random, step)
        x_MC, own = batch.x_MC, batch.layout.sample_of_target_M
        if first_MC is not None:
            uniform_S = torch.special.ndtr(random.normal_per_visit(f"{phase} own", batch.visits))
            x_MC = torch.where((uniform_S < self.config.backward_simulation)[own][:, None], first_MC, x_MC)
        noise_MC = self._noise(f"{phase} start", batch, random)
        return self.one_step(interpolate(x_MC, noise_MC, t_S[own][:, None]), t_S, batch)

    def one_step(self, z_MC: Tensor, t_S: Tensor, batch: PackedBatch) -> Tensor:
        told = None if self.student_guidance is None else torch.full_like(t_S, self.student_guidance)
        v_MC = predict_velocity(self.modules["student"], z_MC, t_S, replace(batch.cond, guidance_S=told))
        return z_MC - t_S[batch.layout.sample_of_target_M][:, None] * v_MC.float()

    def student_times(self, phase: str, batch: PackedBatch, random: VisitRandom, step: int) -> Tensor:
        """[S], drawn from the few that a sampler of so many steps meets: shifted as its schedule is."""
        config = self.config
        probabilities = config.warmup_probabilities if step < config.warmup_steps else config.probabilities
        device = batch.x_MC.device
        below = torch.tensor(probabilities, device=device).cumsum(0)[:-1]
        uniform_S = torch.special.ndtr(random.normal_per_visit(f"{phase} time", batch.visits))
        t_S = torch.tensor(config.times, device=device)[torch.bucketize(uniform_S, below, right=True)]
        return shift(t_S, mu_for_tokens(torch.tensor(batch.layout.target_lengths, device=device).float(), self.shift))

    def renoise_times(self, phase: str, batch: PackedBatch, random: VisitRandom) -> Tensor:
        """[S] logit-normal (section 3.2): high noise shows the teacher structure, low noise texture."""
        normal_S = random.normal_per_visit(f"{phase} renoise time", batch.visits)
        return torch.sigmoid(self.config.renoise_mean + self.config.renoise_std * normal_S)

    # -- verdicts ------------------------------------------------------------------------------------------------

    def read(self, what: str, x_MC: Tensor, t_S: Tensor, batch: PackedBatch, random: VisitRandom) -> list[Tensor]:
        """[M, D] of each block: what the teacher sees in pictures that are noised to t."""
        noise_MC = self._noise(f"{what} renoise", batch, random)
        z_MC = interpolate(x_MC, noise_MC, t_S[batch.layout.sample_of_target_M][:, None])
        told = torch.full_like(t_S, self.config.teacher_guidance) if self.teacher.config.guidance_embed else None
        return block_features(self.teacher, z_MC, t_S, replace(batch.cond, guidance_S=told), self.blocks)

    def judge(self, views: list[list[Tensor]], t_S: Tensor, batch: PackedBatch) -> list[Tensor]:
        """[H, M] logits of each whole set of target tokens in the views, through the heads in one pass."""
        tokens, samples = len(batch.x_MC), len(t_S)
        features = [torch.cat(parts) for parts in zip(*views, strict=True)]
        times = len(features[0]) // tokens
        layout = batch.layout
        own = torch.cat([layout.sample_of_target_M + i * samples for i in range(times)])
        logits = self.modules["discriminator"](
            features,
            t_S.repeat(times),
            batch.cond.vec_SP.repeat(times, 1),
            own,
            neighbours(layout.shapes * times).to(own.device),
        )
        return list(logits.split(tokens, dim=1))

    def nudged(self, features: list[Tensor], batch: PackedBatch, random: VisitRandom) -> list[Tensor]:
        """Features with noise of gradient_penalty_std of their size: the heads' slope along it is the penalty, on the
        heads' inputs as ADD's R1 is (Sauer et al. 2023, arXiv 2311.17042). A second derivative FSDP could not take.
        They are float32: bfloat16 would round so small a step.
        """
        lengths, found = batch.layout.target_lengths, []
        for block, x_MD in zip(self.blocks, features, strict=True):
            noise_MD = random.normal(f"nudge {block}", batch.visits, lengths, x_MD.shape[1])
            size_M1 = x_MD.float().square().mean(-1, keepdim=True).sqrt()
            found.append(x_MD + self.config.gradient_penalty_std * size_M1 * noise_MD)
        return found

    def _noise(self, purpose: str, batch: PackedBatch, random: VisitRandom) -> Tensor:
        return random.normal(purpose, batch.visits, batch.layout.target_lengths, batch.x_MC.shape[1])


def diversity(x_MC: Tensor, start_S: Tensor, batch: PackedBatch) -> Tensor:
    """How far pictures of a pack are from each other at equal places: a mean over samples, like a loss's.

    Each is held against the next of its size, if both were made from the same time start_S: from little noise any
    student makes many pictures. A sample without such a neighbour counts 0, in made pictures as in real ones.
    """
    pictures, total = x_MC.split(batch.layout.target_lengths), x_MC.new_zeros(())
    of_size = defaultdict[tuple[int, int], list[int]](list)
    for number, shape in enumerate(batch.layout.shapes):
        of_size[shape.target].append(number)
    for numbers in of_size.values():
        x_SLC, t_S = torch.stack([pictures[i] for i in numbers]), start_S[numbers]
        apart_S = (x_SLC - x_SLC.roll(1, 0)).abs().mean((1, 2)) * (t_S == t_S.roll(1))
        total = total + (apart_S * batch.weight_S[numbers]).sum()
    return total


def between_noises(made_MC: Tensor, first_MC: Tensor, start_S: Tensor, batch: PackedBatch) -> Tensor:
    """How far two pictures of one prompt are from each other that were made of two noises: a mean over the samples of a
    pack that started from noise alone. 0 where none did.
    """
    lengths = batch.layout.target_lengths
    apart = [(a - b).abs().mean() for a, b in zip(made_MC.split(lengths), first_MC.split(lengths), strict=True)]
    weight_S = batch.weight_S * (start_S == 1)
    share = batch.weight_S.sum() / weight_S.sum().clamp(min=1e-9)
    return (torch.stack(apart) * weight_S).sum() * share
