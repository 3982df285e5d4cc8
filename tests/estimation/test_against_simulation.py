"""Formulas against the project's own model, parallelize and loss, run whole on fake tensors."""

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from kontext_train.distributed.config import Checkpointing, Precision, Reshard
from kontext_train.distributed.parallelize import parallelize
from kontext_train.distributed.setup import forget_meshes
from kontext_train.estimation import simulation
from kontext_train.estimation.estimate import Setup, traced
from kontext_train.estimation.memory import largest
from kontext_train.estimation.simulation import SimulatedStep, fused_attention, simulate_step
from kontext_train.estimation.traffic import collectives
from kontext_train.models.config import FluxConfig
from kontext_train.models.flux import Flux
from kontext_train.models.layers import rope
from kontext_train.models.sequence import SampleShape, build_layout
from tests.estimation.cases import MODEL, PACK, setup, student_moments


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
    costs = [part.cost for part in (network.ends, *network.blocks)]
    assert sum(c.forward_flops + c.backward_flops for c in costs) == pytest.approx(step.flops, rel=0.01)


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


def test_the_simulated_peak_is_the_one_of_torchs_own_tracker() -> None:
    """Without checkpointing, with which that tracker's hooks keep alive what a real process frees."""
    case, world = setup(), 8
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp_replicate", "dp_shard"))
        with FakeTensorMode() as fake:
            with torch.device("meta"):
                network = Flux(case.model, fused_attention)
            parallelize(network, mesh, case.parallel)
            network.to_empty(device="cpu")
            layout, _ = simulation._faked(fake, *simulation._layouts(PACK, None, cp=1))
            with FSDPMemTracker(network) as tracker:
                simulation._loss(network, simulation._fake_batch(case.model, layout)).backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    finally:
        dist.destroy_process_group()
        forget_meshes()
    assert simulated(case, world).peak == pytest.approx(peak["Total"], rel=0.03)


def test_traced_flops_equal_torchs_counter_and_recomputation_adds_a_forward() -> None:
    forward = {}
    for policy in (Checkpointing.none, Checkpointing.selective, Checkpointing.full):
        block = traced(setup(activation_checkpointing=policy)).single
        forward[policy] = block.forward_flops, block.backward_flops
    plain = Flux(MODEL, attention=lambda q, k, v, *_: v).single_blocks[0]
    tokens = sum(shape.tokens for shape in PACK)
    layout = build_layout(PACK)
    x_ND, vec_SD = torch.randn(tokens, 256, requires_grad=True), torch.randn(2, 256, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        plain(x_ND, vec_SD, rope(layout.ids_N3, MODEL.axes_dim, MODEL.theta), layout).sum().backward()
    attention = 12 * 256 * sum(shape.tokens**2 for shape in PACK)  # q k^T and p v, forward and twice backward
    once, twice = forward[Checkpointing.none]
    assert once + twice == pytest.approx(counter.get_total_flops() + attention, rel=0.001)
    assert forward[Checkpointing.full] == (once, once + twice)
    assert twice < forward[Checkpointing.selective][1] < once + twice


@pytest.mark.slow  # about a minute
def test_the_12b_on_64_gpus() -> None:
    edit = SampleShape(512, (64, 64), ((64, 64),))
    case = setup(FluxConfig(guidance_embed=True), (edit,), activation_checkpointing=Checkpointing.selective)
    check(case, 64, tolerance=0.03)
