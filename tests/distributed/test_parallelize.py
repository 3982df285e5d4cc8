"""Every combination of sharding, checkpointing and compile computes what one plain module computes."""

import os
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from kontext_train.distributed.config import Checkpointing, ParallelConfig, Precision, Reshard
from kontext_train.distributed.context_parallel import split_sequence, ulysses
from kontext_train.distributed.parallelize import parallelize, reshard, shard
from kontext_train.distributed.setup import World, process_group
from kontext_train.models.attention import cpu_attention
from kontext_train.models.config import FluxConfig
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import predict_velocity
from kontext_train.models.weights import assign, initialise
from tests.models.flux_cases import SHAPES, TINY, pack, random_flux, random_sample
from tests.runs import ENCODERS, in_processes

FLOAT32 = {"param_dtype": Precision.float32}
FOUR_HEADS = replace(TINY, num_heads=4, axes_dim=[4, 4, 4])


def sharded_copy(reference: Flux, config: ParallelConfig, world: World, static_tokens: int | None = None) -> Flux:
    """As a run builds it: meta, parallelize, to_empty, fill."""
    attention = cpu_attention if world.cp_group is None else ulysses(cpu_attention, world.cp_group)
    with torch.device("meta"):
        model = Flux(reference.config, attention)
    if world.cp_group is not None:
        split_sequence(model, world.cp_group)
    parallelize(model, world.mesh, config, static_tokens)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        assign(parameter, reference.get_parameter(name))
    return model


def gradients(model: Flux, packed: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    v_MC = predict_velocity(model, *packed)
    v_MC.float().square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return v_MC, {k: g.full_tensor() if isinstance(g, DTensor) else g for k, g in grads.items() if g is not None}


def check_against_plain(config: ParallelConfig, tolerance: float, flux: FluxConfig = FOUR_HEADS) -> None:
    torch.manual_seed(0)
    reference = random_flux(flux)
    packed = pack([random_sample(s) for s in SHAPES])
    expected_v, expected = gradients(reference, packed)
    with process_group(config) as world:
        model = sharded_copy(reference, config, world)
        assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in model.parameters())
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in reference.named_parameters()]
        actual_v, actual = gradients(model, packed)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (2 if config.compile else 0)
    assert (actual_v - expected_v).norm() / expected_v.norm() <= tolerance
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        # Every data-parallel rank saw the same pack and gradients are summed.
        error = (actual[name] / world.dp_size - gradient).norm() / gradient.norm()
        assert error <= tolerance, (name, error)


MESHES = {
    "one": (1, {}),
    "fsdp": (2, {}),
    "hsdp": (4, {"dp_replicate": 2}),
    "cp": (2, {"cp": 2}),
    "cp4": (4, {"cp": 4}),
    "fsdp+cp": (4, {"cp": 2}),
    "hsdp+cp": (4, {"dp_replicate": 2, "cp": 2}),
}


def compile_with(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code generation would take minutes. eager: captured as one graph. aot_eager: its derivative and its saved tensors
    are traced too, at three times the time.
    """
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: plain(f, backend=backend, **k))


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with("eager", monkeypatch)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", list(Checkpointing))
@pytest.mark.parametrize("mesh", ["fsdp", "hsdp", "cp"])
def test_parallel_gradients_equal_plain(
    mesh: str, checkpointing: Checkpointing, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, sizes = MESHES[mesh]
    # What differs between the meshes lies outside the graphs, but for the exchanges of cp.
    derivatives_traced = mesh == "fsdp" or (mesh, checkpointing) == ("cp", Checkpointing.selective)
    compile_with("aot_eager" if derivatives_traced else "eager", monkeypatch)
    config = ParallelConfig(**FLOAT32, **sizes, activation_checkpointing=checkpointing, compile=compiled)
    in_processes(ranks, check_against_plain, config, 1e-5, TINY)  # of two heads: with cp=2, one for each rank


@pytest.mark.parametrize("mesh", ["one", "cp4", "fsdp+cp", "hsdp+cp"])
def test_every_mesh_equals_plain(mesh: str) -> None:
    ranks, sizes = MESHES[mesh]
    config = ParallelConfig(**FLOAT32, **sizes, activation_checkpointing=Checkpointing.selective)
    in_processes(ranks, check_against_plain, config, 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"cpu_offload": True},
        {"prefetch_forward": 2, "prefetch_backward": 2},
        *({"reshard_after_forward": r} for r in Reshard),
    ],
    ids=str,
)
def test_memory_and_prefetch_options_change_no_number(options: dict[str, Any]) -> None:
    in_processes(2, check_against_plain, ParallelConfig(**FLOAT32, **options), 1e-5)


def check_reshard() -> None:
    config = ParallelConfig(reshard_after_forward=Reshard.never)
    with process_group(config) as world:
        model = sharded_copy(random_flux(), config, world)
        with torch.no_grad():
            predict_velocity(model, *pack([random_sample(SHAPES[0])]))
        gathered = [p for p in model.parameters() if not isinstance(p, DTensor)]
        assert gathered, "nothing stayed gathered, so this test shows nothing"
        reshard(model)
        assert all(isinstance(p, DTensor) for p in model.parameters())


def test_weights_that_stay_gathered_can_be_put_back() -> None:
    in_processes(2, check_reshard)


def test_bfloat16_is_near_and_not_equal() -> None:
    """Negative control of the tolerance above, and the sanity of mixed precision."""
    in_processes(1, check_against_plain, ParallelConfig(), 0.1)
    with pytest.raises(AssertionError, match="exit codes"):
        in_processes(1, check_against_plain, ParallelConfig(), 1e-5)


class WireSpy(TorchDispatchMode):
    """dtypes of what collectives move, and the order of gathers and attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, torch.dtype]] = Counter()
        self.order: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "allgather" in name or "reduce_scatter" in name:
            tensor = next(a for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, torch.Tensor))
            self.seen[("gather" if "gather" in name else "reduce", tensor.dtype)] += 1
        self.order += ["gather"] * ("allgather" in name) + ["attention"] * (name == "kontext_train::cpu_attention")
        return func(*args, **(kwargs or {}))


def check_wire(config: ParallelConfig, gathered: torch.dtype) -> None:
    torch.manual_seed(0)
    with process_group(config) as world:
        model = sharded_copy(random_flux(), config, world)
        with WireSpy() as spy:
            predict_velocity(model, *pack([random_sample(s) for s in SHAPES])).float().square().mean().backward()
    dtypes = {kind: {d for k, d in spy.seen if k == kind} for kind in ("gather", "reduce")}
    assert dtypes == {"gather": {gathered}, "reduce": {torch.float32}}, spy.seen


@pytest.mark.parametrize("gathered", [Precision.bfloat16, Precision.float32])
def test_weights_travel_in_param_dtype_and_gradients_in_float32(gathered: Precision) -> None:
    in_processes(2, check_wire, ParallelConfig(param_dtype=gathered), getattr(torch, gathered.value))


def check_gathered_ahead(config: ParallelConfig, before_first_block: int) -> None:
    with process_group(config) as world:
        model = sharded_copy(random_flux(), config, world)
        with WireSpy() as spy:
            predict_velocity(model, *pack([random_sample(s) for s in SHAPES]))
    assert spy.order[: before_first_block + 1] == ["gather"] * before_first_block + ["attention"]


@pytest.mark.parametrize("depth", [0, 2])
def test_prefetch_gathers_so_many_blocks_ahead(depth: int) -> None:
    """Before the first block computes: the root's weights, its own, and those of `depth` more."""
    in_processes(2, check_gathered_ahead, ParallelConfig(**FLOAT32, prefetch_forward=depth), 2 + depth)


def check_static_and_symbolic_graphs(static_tokens: int | None, graphs: int) -> None:
    config = ParallelConfig(**FLOAT32, compile=True)
    with process_group(config) as world:
        reference = random_flux()
        model = sharded_copy(reference, config, world, static_tokens)
        for chosen, pad_to in (
            ([0, 1, 2], 120),
            ([2, 2, 1, 0], 120),
            ([1, 0, 3], 120),
            ([3, 2], 140),
            ([1, 2, 0], 150),
        ):
            packed = pack([random_sample(SHAPES[i]) for i in chosen], pad_to=pad_to)
            v_MC = predict_velocity(model, *packed)
            torch.testing.assert_close(v_MC, predict_velocity(reference, *packed), rtol=1e-4, atol=1e-5)
            v_MC.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize(("static_tokens", "graphs"), [(None, 2), (120, 4)])
def test_a_padded_length_has_a_graph_of_its_own_and_all_others_share_one(
    static_tokens: int | None, graphs: int
) -> None:
    """For each of the two kinds of block, whatever the samples in a pack and however many blocks there are."""
    in_processes(1, check_static_and_symbolic_graphs, static_tokens, graphs)


def check_roles_and_phases(checkpointing: Checkpointing) -> None:
    """A student that learns and samples, a frozen teacher that is asked and differentiated through, packs that vary."""
    config = ParallelConfig(**FLOAT32, compile=True, activation_checkpointing=checkpointing)
    with process_group(config) as world:
        student, teacher = (sharded_copy(random_flux(), config, world, static_tokens=120) for _ in range(2))
        teacher.requires_grad_(False)
        graphs = []
        for chosen in ([0, 1, 2], [2, 1, 3], [1, 0, 3, 3], [3, 3, 0], [0, 0, 1, 2]):
            z_MC, t_S, cond = pack([random_sample(SHAPES[i]) for i in chosen], pad_to=120)
            predict_velocity(student, z_MC, t_S, cond).sum().backward()
            with torch.no_grad():
                predict_velocity(student, z_MC, t_S, cond)
                predict_velocity(teacher, z_MC, t_S, cond)
            predict_velocity(teacher, z_MC.requires_grad_(), t_S, cond).sum().backward()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] <= 12, graphs
    assert graphs[0] == graphs[-1], graphs


@pytest.mark.slow
@pytest.mark.usefixtures("captured")
def test_roles_and_phases_cause_no_recompiles_after_the_first_round() -> None:
    in_processes(1, check_roles_and_phases, Checkpointing.selective)


def check_text_encoders() -> None:
    from kontext_train.models.text_encoders import TextEncoders

    plain, sharded = (TextEncoders(ENCODERS, 12, torch.float32) for _ in range(2))
    prompts = ["paint it red", "", "a blue square"]
    with process_group(ParallelConfig()) as world:
        shard(sharded, world.mesh, ParallelConfig(reshard_after_forward=Reshard.always))
        expected, actual = plain(prompts), sharded(prompts)
        assert all(isinstance(p, DTensor) for p in sharded.parameters()), "some are still gathered"
        held = sum(p.to_local().numel() for p in sharded.parameters())
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    total = sum(p.numel() for p in plain.parameters())
    assert held <= 0.52 * total, "every parameter is sharded, up to uneven ends"
    assert not any(p.requires_grad for p in sharded.parameters())


def test_frozen_text_encoders_are_shared_out_and_say_the_same() -> None:
    in_processes(2, check_text_encoders)


def check_initialised() -> None:
    """A sharded network starts with the numbers that a plain one starts with."""
    reference = random_flux()
    initialise(reference, reference.config.init, seed=3)
    with process_group(ParallelConfig()) as world:
        model = sharded_copy(random_flux(), ParallelConfig(), world)
        initialise(model, model.config.init, seed=3)
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            assert torch.equal(parameter.full_tensor(), reference.get_parameter(name)), name
        assert dist.get_world_size() == int(os.environ["WORLD_SIZE"])


def test_initial_weights_do_not_depend_on_the_number_of_processes() -> None:
    in_processes(2, check_initialised)
