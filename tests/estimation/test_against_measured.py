"""Estimated memory against what real processes hold: gloo, real tensors, the optimizer and EMA of a run."""

import weakref
from contextlib import nullcontext
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kontext_train.data.batch import PackedBatch
from kontext_train.distributed.config import Checkpointing
from kontext_train.distributed.context_parallel import split_sequence, ulysses
from kontext_train.distributed.parallelize import parallelize
from kontext_train.distributed.setup import process_group
from kontext_train.estimation.estimate import (
    Setup,
    moments_of_step,
    network_of,
    roles,
    sharding_of,
    traced,
    with_checkpointing,
)
from kontext_train.estimation.memory import Heads, PartCost, held, largest
from kontext_train.flow.config import ShiftConfig
from kontext_train.models.attention import cpu_attention
from kontext_train.models.config import BaseDtype, DiscriminatorConfig, LoraConfig
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import predict_velocity
from kontext_train.models.lora import adapt
from kontext_train.models.sequence import SampleShape
from kontext_train.models.weights import initialise, initialise_adapters
from kontext_train.objectives.config import LaddConfig
from kontext_train.objectives.ladd import Ladd
from kontext_train.randomness import VisitRandom
from kontext_train.training.ema import EMA
from kontext_train.training.networks import frozen_network, new_discriminator
from kontext_train.training.optimizer import PhaseOptimizer
from tests.estimation.cases import MODEL, PACK, estimated_peak, setup
from tests.models.flux_cases import pack, random_sample
from tests.runs import in_processes

FULL = Checkpointing.full
# Many small blocks and a long pack: what the policies keep must not drown in what they share.
LONG = (SampleShape(64, (24, 24), ((24, 24),)), SampleShape(64, (16, 32)))
MANY_BLOCKS = replace(MODEL, hidden_size=64, axes_dim=[8, 12, 12], depth=1, depth_single_blocks=8)


class LiveBytes(TorchDispatchMode):
    """Asks every storage that was ever seen for its size, after every operation. Slow, and nothing to get wrong."""

    def __init__(self, there_before: Any) -> None:
        super().__init__()
        self.seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak = 0
        self.see(there_before)

    def see(self, tree: Any) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor) and tensor.device.type != "meta":
                storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
                self.seen[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.see((args, kwargs, result))
        alive = {key: storage for key, ref in self.seen.items() if (storage := ref()) is not None}
        self.seen = {key: self.seen[key] for key in alive}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive.values()))
        return result


def measure(case: Setup, peaks: Any) -> None:
    """Two steps as a run makes them; rank 0 tells the peak of the second."""
    torch.manual_seed(0)
    with process_group(case.parallel) as world:
        attention = cpu_attention if world.cp_group is None else ulysses(cpu_attention, world.cp_group)
        with torch.device("meta"):
            student = Flux(case.model, attention)
        adapt(student, case.lora)
        if world.cp_group is not None:
            split_sequence(student, world.cp_group)
        parallelize(student, world.mesh, case.parallel)
        student.to_empty(device="cpu")
        initialise(student, case.model.init, seed=0)
        initialise_adapters(student, seed=0)
        optimizer = PhaseOptimizer(student, case.optimizer, seed=0)
        ema = EMA(student, half_life_images=100.0)
        packed = pack([random_sample(shape, case.model) for shape in case.mix.largest], guidance=True)

        def step() -> None:
            optimizer.zero()
            predict_velocity(student, *packed).float().square().mean().backward()
            optimizer.clip()
            optimizer.step(lr_factor=1.0)
            ema.update(1)

        step()
        optimizer.zero()
        states = [dict(state) for o in optimizer.optimizers for state in o.state.values()]
        held = [list(student.parameters()), states, ema.average, packed[:2], vars(packed[2].layout)]
        with LiveBytes(held) if world.is_main else nullcontext() as live:
            step()
        if live is not None:
            peaks.put(live.peak)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"activation_checkpointing": Checkpointing.none}),
        (2, {"activation_checkpointing": Checkpointing.selective}),
        (2, {"activation_checkpointing": Checkpointing.full}),
        (4, {"activation_checkpointing": Checkpointing.none, "dp_replicate": 2}),
        (4, {"activation_checkpointing": Checkpointing.full, "dp_replicate": 2}),
        (2, {"activation_checkpointing": Checkpointing.none, "cp": 2}),
    ],
    ids=str,
)
def test_estimated_memory_is_within_a_tenth_of_what_processes_hold(ranks: int, options: dict[str, object]) -> None:
    case = setup(MANY_BLOCKS, LONG, ema=True, **options)
    peaks = get_context("fork").SimpleQueue()
    in_processes(ranks, measure, case, peaks)
    measured = peaks.get()
    estimates = {p: estimated_peak(with_checkpointing(case, p), ranks, cpu_attention) for p in Checkpointing}
    ratios = {policy: estimated / measured for policy, estimated in estimates.items()}
    mine = case.parallel.activation_checkpointing
    assert 0.9 < ratios[mine] < 1.1, ratios
    wrong = [ratio for policy, ratio in ratios.items() if policy is not mine]
    assert not any(0.9 < ratio < 1.1 for ratio in wrong), ratios


@pytest.mark.parametrize(("ranks", "base"), [(2, BaseDtype.bfloat16), (1, BaseDtype.float8)], ids=str)
def test_estimated_memory_of_lora_is_within_a_tenth(ranks: int, base: BaseDtype) -> None:
    """And far below that of training all weights."""
    model = replace(MODEL, depth=1, depth_single_blocks=6)
    case = setup(model, PACK, ema=True, lora=LoraConfig(rank=8, base_dtype=base), activation_checkpointing=FULL)
    peaks = get_context("fork").SimpleQueue()
    in_processes(ranks, measure, case, peaks)
    measured = peaks.get()
    assert 0.9 < estimated_peak(case, ranks, cpu_attention) / measured < 1.1
    assert estimated_peak(replace(case, lora=LoraConfig()), ranks, cpu_attention) > 1.5 * measured


def measure_ladd(case: Setup, teacher: Path, peaks: Any) -> None:
    """The same of a student and of heads on a frozen teacher; rank 0 tells the peak of each turn of the second step."""
    assert isinstance(case.stage, LaddConfig)
    model, stage, parallel = case.model, case.stage, case.parallel
    torch.manual_seed(0)
    with process_group(parallel) as world:
        with torch.device("meta"):
            student = Flux(model, cpu_attention)
        parallelize(student, world.mesh, parallel)
        student.to_empty(device="cpu")
        initialise(student, model.init, seed=0)
        frozen = frozen_network("teacher", str(teacher), model, parallel, case.frozen_dtype, cpu_attention, world, None)
        heads = new_discriminator(stage.discriminator, model, parallel, world, seed=0)
        ladd = Ladd(stage, student, frozen, heads, ShiftConfig(), student_guidance=1.0)
        turns = {"student": case.optimizer, "discriminator": case.heads}
        optimizers = {phase: PhaseOptimizer(ladd.modules[phase], turns[phase], seed=0) for phase in ladd.phases}
        samples = len(case.mix.largest)
        x_MC, _, cond = pack([random_sample(shape, model) for shape in case.mix.largest], guidance=True)
        batch = PackedBatch(x_MC, cond, list(range(samples)), torch.ones(samples) / samples, [""] * samples)
        random = VisitRandom(0, world.device)

        def turn(phase: str) -> None:
            for optimizer in optimizers.values():
                optimizer.zero()
            ladd.loss(phase, batch, random, 0).value.backward()
            optimizers[phase].clip()
            optimizers[phase].step(lr_factor=1.0)

        for phase in ladd.phases:
            turn(phase)
        states = [dict(s) for turn in optimizers.values() for o in turn.optimizers for s in o.state.values()]
        weights = [list(module.parameters()) for module in (student, frozen, heads)]
        held = [*weights, states, x_MC, vars(cond.layout), cond.txt_TE, cond.vec_SP, cond.context_KC]
        measured = {}
        for phase in ladd.phases:
            for optimizer in optimizers.values():
                optimizer.zero()
            with LiveBytes(held) if world.is_main else nullcontext() as live:
                turn(phase)
            measured[phase] = live.peak if live is not None else 0
        if world.is_main:
            peaks.put(measured)


def test_estimated_memory_of_each_turn_of_ladd_is_within_a_tenth(tmp_path: Path) -> None:
    """Of the heads' own, and of the student's pass through them and the teacher; what heads keep is a good part."""
    stage = LaddConfig(discriminator=DiscriminatorConfig(channels=32))
    case = replace(setup(MANY_BLOCKS, LONG, activation_checkpointing=Checkpointing.selective), stage=stage)
    save_file(Flux(case.model).state_dict(), tmp_path / "teacher.safetensors")
    peaks = get_context("fork").SimpleQueue()
    in_processes(2, measure_ladd, case, tmp_path / "teacher.safetensors", peaks)
    measured = peaks.get()
    parts = traced(case, cpu_attention)
    network = network_of(case.model, case.parallel, 2, parts)
    sharding = sharding_of(case.model, case.parallel, 2)
    base = held(roles(case, network, sharding)[:3], parts.batch)
    nothing = PartCost(**dict.fromkeys((f.name for f in fields(PartCost)), 0))
    for heads, least, most in ((parts.heads, 0.9, 1.1), (Heads(0, nothing, nothing), 0.0, 0.85)):
        assert heads is not None
        own, *others = moments_of_step(base, network, sharding, heads, accumulating=False)
        assert own.name == "heads"
        assert least < own.memory.total / measured["discriminator"] < most
        assert least < largest(others).memory.total / measured["student"] < most
