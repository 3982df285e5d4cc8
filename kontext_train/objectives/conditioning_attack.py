"""Gradient ascent on what a model is told: the inner problem of adversarial suppression, and the attack on the outcome.

Budgets are relative. A row (a text token, a pooled vector, a context token) may move by at most `budget` times its own
length, in any direction. That is the ball that Zhang et al. 2024 (arXiv 2405.15234, section 4) fill by rewriting the
prompt, taken where every rewriting ends up: in the encoders' output.

Legend: T text tokens, K context tokens, S samples, and a letter more for channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kontext_train.models.kontext import Conditioning
from kontext_train.randomness import VisitRandom

_STEP = 2.5  # a step is this times the radius over the number of steps: enough to cross the ball and turn back


@dataclass(frozen=True, slots=True)
class Budget:
    """How far rows may move, each relative to its own length. 0 leaves them as they are."""

    text: float
    pooled: float
    context: float


def attacked(
    loss_of: Callable[[Conditioning], Tensor],
    cond: Conditioning,
    budget: Budget,
    steps: int,
    random: VisitRandom,
    visits: Sequence[int],
) -> Conditioning:
    """Conditioning within `budget` of `cond`, from a random start `steps` normalised steps down `loss_of`, detached.

    loss_of: a scalar whose rows are independent between samples (a sum), so that samples do not disturb each other.
    random, visits: the start of a sample is a function of its visit. Weights get no gradient.
    """
    clean = (cond.txt_TE.detach(), cond.vec_SP.detach(), cond.context_KC.detach())
    allowed = (budget.text, budget.pooled, budget.context)
    radii = [share * rows.float().norm(dim=1, keepdim=True) for rows, share in zip(clean, allowed, strict=True)]
    moves = [_start(i, rows.shape[1], radii[i], cond, random, visits) for i, rows in enumerate(clean)]

    def told() -> Conditioning:
        txt_TE, vec_SP, context_KC = (rows + move.to(rows.dtype) for rows, move in zip(clean, moves, strict=True))
        return replace(cond, txt_TE=txt_TE, vec_SP=vec_SP, context_KC=context_KC)

    for _ in range(steps):
        # Of all parts, also what has no budget or no rows: ranks share a sharded model, and take the same passes.
        leaves = [move.requires_grad_() for move in moves]
        gradients = torch.autograd.grad(loss_of(told()), leaves, materialize_grads=True)
        moves = [_stepped(*each, share=_STEP / steps) for each in zip(moves, gradients, radii, strict=True)]
    return told()


def _start(
    part: int, channels: int, radius: Tensor, cond: Conditioning, random: VisitRandom, visits: Sequence[int]
) -> Tensor:
    """A random direction for each row, of any length up to its radius."""
    shapes = cond.layout.shapes
    counts = ([s.txt for s in shapes], [1] * len(shapes), [s.context_tokens for s in shapes])[part]
    normal = random.normal(f"attack {part}", visits, counts, channels + 1)
    share = normal[:, -1:].abs().clamp(max=1)
    return radius * share * torch.nn.functional.normalize(normal[:, :-1], dim=1)


def _stepped(move: Tensor, gradient: Tensor, radius: Tensor, *, share: float) -> Tensor:
    """Down the gradient by that share of the radius, and back into the ball."""
    move = move.detach() - share * radius * torch.nn.functional.normalize(gradient, dim=1)
    return move * (radius / move.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
