"""What the training loop asks of a stage, and nothing more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from kontext_train.data.batch import PackedBatch
from kontext_train.models.flops import ForwardFlops
from kontext_train.models.sequence import SampleShape
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

    def loss(self, phase: str, batch: PackedBatch, random: VisitRandom, step: int) -> Loss:
        """step: updates made before this one.

        Other roles than `phase` run without gradients, or let them pass: the loop drops what they leave there.
        (Turning `requires_grad` off and on is not for FSDP, which notes what trains when it first runs.)
        """
        ...

    def flops(self, shapes: Sequence[SampleShape], forward: ForwardFlops, student: float) -> float:
        """Of a pack of such samples, in all phases, without recomputation.

        student: what its forward and backward pass cost, in forward passes.
        """
        ...

    def warning(self, step: int, means: Mapping[str, float]) -> str | None:
        """What is wrong with a run whose metrics since the last log step have these means, and what to do; or None.

        step: updates made.
        """
        ...
