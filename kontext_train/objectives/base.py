"""What the training loop asks of a stage, and nothing more."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from kontext_train.data.batch import PackedBatch
from kontext_train.randomness import VisitRandom


@dataclass(slots=True)
class Loss:
    """Of one pack on one rank.

    value: this pack's share of the step's mean over samples; shares of all packs and ranks add up to that mean.
    metrics: named scalars that add up in the same way.
    """

    value: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """A training stage. Frozen roles (teacher, reference) are its own business; `modules` are those that train."""

    modules: dict[str, nn.Module]  # role -> sharded module
    phases: tuple[str, ...]  # roles, in the order in which they take their turn within a step
    extra_passes: float  # cost of a step beside the student's forward and backward, in forward passes of the student

    def loss(self, phase: str, batch: PackedBatch, random: VisitRandom) -> Loss: ...
