"""Formulas against the project's own model, parallelize and loss, run whole on fake tensors."""

import pytest

from kontext_train.distributed.config import Checkpointing, Precision, Reshard
from kontext_train.estimation.estimate import Setup, traced
from kontext_train.estimation.memory import largest
from kontext_train.estimation.simulation import SimulatedStep, fused_attention, simulate_step
from kontext_train.estimation.traffic import collectives
from tests.estimation.cases import setup, student_moments


def simulated(case: Setup, world: int) -> SimulatedStep:
    return simulate_step(case.model, case.optimizer, case.parallel, case.mix.largest, world, fused_attention)


def check(case: Setup, world: int, tolerance: float) -> None:
    step = simulated(case, world)
    when, network, sharding, base = student_moments(case, world)
    forward_and_backward = largest(when[:-1]).memory
    assert forward_and_backward.total - base.optimizer == pytest.approx(step.peak, rel=tolerance)
    # Padding of rows to whole shards is the only difference; torch frees none of it.
    assert base.parameters == pytest.approx(step.parameters, rel=0.02)
    assert base.gradients == pytest.approx(step.gradients, rel=0.02)
    assert base.optimizer == pytest.approx(step.optimizer, rel=0.02)
    ours = {(c.kind, c.ranks): c.whole for c in collectives(network, sharding, case.parallel.cp, packs=1)}
    small = {k: v for k, v in step.sent.items() if k in ours}
    assert small == pytest.approx(ours, rel=0.02)
    parts = traced(case)
    costs = [(parts.double, case.model.depth), (parts.single, case.model.depth_single_blocks), (parts.ends, 1)]
    assert sum(n * (c.forward_flops + c.backward_flops) for c, n in costs) == pytest.approx(step.flops, rel=0.01)


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (1, {}),
        (8, {}),
        (8, {"activation_checkpointing": Checkpointing.selective}),
        (8, {"activation_checkpointing": Checkpointing.full, "reshard_after_forward": Reshard.always}),
        (4, {"dp_replicate": 2, "reshard_after_forward": Reshard.never}),
        (8, {"dp_replicate": 2, "cp": 2, "activation_checkpointing": Checkpointing.full}),
        (4, {"cp": 2, "activation_checkpointing": Checkpointing.selective}),
        (8, {"prefetch_forward": 2, "prefetch_backward": 2, "param_dtype": Precision.float32}),
    ],
    ids=str,
)
def test_formulas_equal_a_simulated_step(world: int, options: dict[str, object]) -> None:
    check(setup(**options), world, tolerance=0.06)
