"""Optimizers on sharded weights, with compact states, and with weights in bfloat16: against torch's and torchao's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torchao.optim import AdamW8bit
from torchao.optim.quant_utils import create_dynamic_map

from kontext_train.distributed.config import Float8, ParallelConfig, Precision
from kontext_train.distributed.setup import process_group
from kontext_train.errors import ConfigError
from kontext_train.training import checkpoint, muon
from kontext_train.training.checkpoint_saver import Saver
from kontext_train.training.compact_adamw import CompactAdamW, dynamic_levels
from kontext_train.training.config import CheckpointConfig, MomentDtype, OptimizerConfig, OptimizerName
from kontext_train.training.ema import EMA
from kontext_train.training.optimizer import PhaseOptimizer
from kontext_train.training.rounding import StochasticRounding, local, stochastic_bfloat16
from tests.distributed.test_float8 import EMULATED, WIDE
from tests.distributed.test_parallelize import sharded_copy
from tests.models.flux_cases import random_flux
from tests.runs import in_processes

CPU = torch.device("cpu")
INT8 = {"moments": MomentDtype.int8}
ROUNDED = {"stochastic_rounding": True}


# -- 8-bit moments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_those_of_torchao(signed: bool) -> None:
    torch.testing.assert_close(dynamic_levels(signed), torch.tensor(create_dynamic_map(signed)), rtol=1e-6, atol=0)


def test_int8_moments_follow_torchaos() -> None:
    """Rows of whole blocks, so that torchao's blocks are ours; a small matrix that both keep in float32."""
    torch.compiler.set_stance("force_eager")  # torchao compiles its update, which takes half a minute here
    weights = [torch.randn(24, 512), torch.randn(40, 256), torch.randn(24, 8)]
    ours, theirs, exact = ([nn.Parameter(w.clone()) for w in weights] for _ in range(3))
    options: Any = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizers: list[torch.optim.Optimizer] = [
        CompactAdamW(ours, **options, int8=True, rounding=StochasticRounding(0, CPU)),
        AdamW8bit(theirs, **options, weight_decay=0.0),
        torch.optim.AdamW(exact, **options, weight_decay=0.0),
    ]
    for _ in range(10):
        for parameters in zip(ours, theirs, exact, strict=True):
            gradient = torch.randn_like(parameters[0])
            for parameter in parameters:
                parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.compiler.set_stance("default")
    for p, q, r in zip(ours[:2], theirs[:2], exact[:2], strict=True):
        # A value halfway between two levels may fall to either side: then that weight differs, and few do.
        assert (p - q).norm() <= 0.1 * (p - r).norm()
        assert ((p - q).abs() > 1e-5).float().mean() < 0.01
        assert ((p - r).abs() > 1e-5).float().mean() > 0.5, "8 bits are coarser than 32"
    assert torch.allclose(ours[2], exact[2], atol=1e-6), "rows that are not whole blocks keep float32"
    assert optimizers[0].state[ours[0]]["exp_avg"].dtype is torch.uint8


# -- sharded equals whole ----------------------------------------------------------------------------------------------


def meshes(world: Any) -> dict[str, tuple[DeviceMesh, list[Any]]]:
    """A shard mesh; copies of shards; and shards over two joined dimensions, as context parallelism makes them."""
    made = {"shard": (init_device_mesh("cpu", (world.size,)), [Shard(0)])}
    if world.size == 4:
        made["hsdp"] = (init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")), [Replicate(), Shard(0)])
        joined = init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "y"))["x", "y"]._flatten("x_y")
        made["joined"] = (joined, [Shard(0)])
    return made


def muon_steps(weights: list[Tensor], shard: Any) -> list[Tensor]:
    """Five Muon steps with fixed gradients on weights that `shard` distributes; returns them whole."""
    drawn = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(shard(w)) for w in weights]
    optimizer = muon.Muon(parameters, 0.02, 0.95, 0.1, StochasticRounding(0, CPU))
    for _ in range(5):
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.grad = shard(torch.randn(weight.shape, generator=drawn))
        optimizer.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in parameters]


def check_muon(weights: list[Tensor], dtype: torch.dtype) -> None:
    """Bit-equal to one process, with every matrix made orthogonal once in its copy. dtype: as on a GPU, or a CPU."""
    muon._iteration_dtype = lambda device: dtype
    expected = muon_steps(weights, lambda w: w.clone())
    calls: list[torch.Size] = []
    made = muon._orthogonalised
    muon._orthogonalised = lambda momentum, lr: (calls.append(momentum.shape), made(momentum, lr))[1]  # type: ignore[func-returns-value]
    with process_group(ParallelConfig()) as world:
        for name, (mesh, placements) in meshes(world).items():
            calls.clear()
            actual = muon_steps(weights, lambda w, m=mesh, p=placements: distribute_tensor(w, m, p))
            for a, b in zip(actual, expected, strict=True):
                assert torch.equal(a, b), (name, a.shape)
            counts = [torch.zeros(1) for _ in range(world.size)]
            torch.distributed.all_gather(counts, torch.tensor([len(calls) / 5]))
            sharing = 2 if name == "hsdp" else world.size
            shares = sorted(int(c) for c in counts)
            assert sum(shares) == len(weights) * (world.size // sharing), name
            assert shares[-1] == -(-len(weights) // sharing), (name, shares)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_muon_shares_its_work_and_equals_one_process(ranks: int, dtype: torch.dtype) -> None:
    """Uneven shards, shards of no rows, and more matrices than ranks and fewer."""
    weights = [torch.randn(s) for s in ((24, 16), (7, 40), (3, 5), (1, 8), (32, 32))]
    in_processes(ranks, check_muon, weights, dtype)
    in_processes(ranks, check_muon, weights[:1], dtype)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)])
def test_muon_is_torchs(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit where both iterate in bfloat16, and near to it in float32. One step less is not: the control."""

    def changes(optimizer: torch.optim.Optimizer, weight: Tensor) -> Tensor:
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        optimizer.step()
        return weight.detach()

    theirs, *ours = (nn.Parameter(torch.zeros(shape)) for _ in range(4))
    expected = changes(torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1), theirs)
    options = (0.02, 0.95, 0.1, StochasticRounding(0, CPU))
    near = changes(muon.Muon([ours[0]], *options), ours[0])
    assert 1e-4 < (near - expected).norm() / expected.norm() < 2e-2
    with monkeypatch.context() as patch:
        patch.setattr(muon, "NEWTON_SCHULZ_STEPS", 4)
        fewer = changes(muon.Muon([ours[1]], *options), ours[1])
    assert (fewer - expected).norm() / expected.norm() > 5e-2
    monkeypatch.setattr(muon, "_iteration_dtype", lambda device: torch.bfloat16)
    torch.testing.assert_close(changes(muon.Muon([ours[2]], *options), ours[2]), expected, rtol=1e-6, atol=0)


def gradient_of(name: str, step: int, like: Tensor) -> Tensor:
    drawn = torch.Generator().manual_seed(sum(name.encode()) + 1000 * step)
    return torch.randn(like.shape, generator=drawn)


def train_steps(model: nn.Module, optimizer: PhaseOptimizer, steps: range) -> None:
    """Updates from gradients that depend on name and step alone, clipped by their global norm."""
    for step in steps:
        for name, parameter in model.named_parameters():
            full = gradient_of(name, step, parameter).to(parameter.dtype)
            parameter.grad = (
                distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
                if isinstance(parameter, DTensor)
                else full
            )
        assert optimizer.clip() > 1
        optimizer.step(1.0)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for k, t in tensors.items()}


def check_optimizer(config: OptimizerConfig, parallel: ParallelConfig, folder: Path) -> None:
    """Four steps in one process, sharded, and sharded with a checkpoint and new objects halfway: the same."""
    torch.manual_seed(0)
    reference = random_flux(WIDE)
    start = random_flux(WIDE)
    start.load_state_dict(reference.state_dict())
    train_steps(reference, PhaseOptimizer(reference, config, seed=0), range(4))
    with process_group(parallel) as world:
        model = sharded_copy(start, parallel, world)
        optimizer = PhaseOptimizer(model, config, seed=0)
        train_steps(model, optimizer, range(2))
        state = {"m": dict(model.named_parameters()), "o": optimizer.state()}
        Saver(folder, CheckpointConfig()).save(2, state, {}, wait=True)
        train_steps(model, optimizer, range(2, 4))
        resumed = sharded_copy(start, parallel, world)
        again = PhaseOptimizer(resumed, config, seed=0)
        state = {"m": dict(resumed.named_parameters()), "o": again.state()}
        checkpoint.load(checkpoint.checkpoint_path(folder, 2), state)
        train_steps(resumed, again, range(2, 4))
        expected, straight, joined = (whole(dict(m.named_parameters())) for m in (reference, model, resumed))
    # Norms of sharded gradients differ in the last bit; Muon's bfloat16 iteration carries it on.
    tolerance = 5e-5 if config.name is OptimizerName.muon else 1e-6
    for name, weight in expected.items():
        torch.testing.assert_close(straight[name], weight, rtol=1e-5, atol=tolerance)
        assert (weight - start.get_parameter(name)).abs().max() > 1e-4
        assert torch.equal(joined[name], straight[name]), name


@pytest.mark.parametrize(
    "config",
    [OptimizerConfig(lr=1e-2), OptimizerConfig(name=OptimizerName.muon, lr=1e-2), OptimizerConfig(lr=1e-2, **INT8)],
    ids=["adamw", "muon", "int8"],
)
def test_sharded_and_resumed_equals_one_process(config: OptimizerConfig, tmp_path: Path) -> None:
    in_processes(2, check_optimizer, config, ParallelConfig(), tmp_path)


def test_replicated_shards_equal_one_process(tmp_path: Path) -> None:
    config = OptimizerConfig(name=OptimizerName.muon, lr=1e-2)
    in_processes(4, check_optimizer, config, ParallelConfig(dp_replicate=2), tmp_path)


def step_from_checkpoint(config: OptimizerConfig, folder: Path, save: bool) -> None:
    """Two steps and a checkpoint, or a checkpoint and one step: at any number of processes the same step."""
    torch.manual_seed(0)
    with process_group(ParallelConfig()) as world:
        model = sharded_copy(random_flux(WIDE), ParallelConfig(), world)
        optimizer = PhaseOptimizer(model, config, seed=0)
        if save:
            train_steps(model, optimizer, range(2))
        state = {"m": dict(model.named_parameters()), "o": optimizer.state()}
        if save:
            Saver(folder, CheckpointConfig()).save(2, state, {}, wait=True)
        else:
            checkpoint.load(checkpoint.checkpoint_path(folder, 2), state)
        train_steps(model, optimizer, range(2, 3))
        after = whole(dict(model.named_parameters()))
        if world.is_main:
            torch.save(after, folder / f"after_{world.size}")


def test_int8_moments_resume_at_another_world_size(tmp_path: Path) -> None:
    config = OptimizerConfig(lr=1e-2, **INT8)
    in_processes(2, step_from_checkpoint, config, tmp_path, True)
    in_processes(3, step_from_checkpoint, config, tmp_path, False)
    in_processes(1, step_from_checkpoint, config, tmp_path, False)
    one, two, three = (torch.load(tmp_path / f"after_{ranks}") for ranks in (1, 2, 3))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(three[name], one[name], rtol=1e-6, atol=1e-6)


# -- weights in bfloat16 -----------------------------------------------------------------------------------------------


def test_stochastic_rounding_is_right_on_average_and_to_a_neighbour() -> None:
    value = torch.tensor([1.0 + 2**-10, -(1.0 + 2**-10), 3e-5, -7.3, 0.0, 1.0]).repeat(100_000, 1)
    rounded = stochastic_bfloat16(value, torch.Generator().manual_seed(0)).float()
    spacing = torch.tensor([2**-7, 2**-7, 2**-23, 2**-5, 0.0, 0.0])
    assert ((rounded - value).abs() <= spacing).all()
    assert torch.equal(rounded[:, 4:], value[:, 4:]), "what bfloat16 can say is kept"
    error = (rounded.double().mean(0) - value[0]).abs()
    assert (error <= 4 * spacing / 2 / 100_000**0.5 + 1e-12).all()
    assert (value.bfloat16().float().mean(0) - value[0])[0].abs() > 9e-4, "to nearest, 2^-10 is lost"


@pytest.mark.parametrize("name", list(OptimizerName))
def test_small_updates_are_kept_in_expectation_and_lost_to_nearest(name: OptimizerName) -> None:
    """50 updates of some 2e-4 on weights of 1, whose spacing in bfloat16 is 4e-3 below and 8e-3 above."""

    class OneBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64, bias=False)

        def blocks(self) -> list[nn.Module]:
            return [self.linear]

    def moved(dtype: torch.dtype, rounded: bool) -> float:
        model = OneBlock().to(dtype)
        model.register_parameter("other", nn.Parameter(torch.ones(8, dtype=dtype)))  # AdamW's, when Muon has the matrix
        nn.init.ones_(model.linear.weight)
        config = OptimizerConfig(name=name, lr=2e-4, muon_lr=2e-3, stochastic_rounding=rounded)
        optimizer = PhaseOptimizer(model, config, seed=0)
        direction = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0].contiguous()
        for _ in range(50):
            for parameter in model.parameters():
                parameter.grad = direction.to(dtype) if parameter.ndim == 2 else torch.ones_like(parameter)
            optimizer.step(1.0)
        return -((model.linear.weight.detach().float() - 1) * direction.sign()).mean().item()

    exact = moved(torch.float32, rounded=False)
    assert exact > 5e-3
    assert moved(torch.bfloat16, rounded=True) == pytest.approx(exact, rel=0.1)
    if name is OptimizerName.adamw:  # Muon has no path without it
        assert moved(torch.bfloat16, rounded=False) == 0.0


def check_replicas(config: OptimizerConfig) -> None:
    """Copies of a shard round alike."""
    parallel = ParallelConfig(dp_replicate=2, master_dtype=Precision.bfloat16)
    torch.manual_seed(0)
    with process_group(parallel) as world:
        model = sharded_copy(random_flux(), parallel, world)
        train_steps(model, PhaseOptimizer(model, config, seed=0), range(3))
        for name, parameter in model.named_parameters():
            part = local(parameter).float()
            copies = [torch.empty_like(part) for _ in range(2)]
            torch.distributed.all_gather(copies, part, world.mesh.get_group("dp_replicate"))
            assert torch.equal(copies[0], copies[1]), name


def test_copies_of_bfloat16_shards_stay_the_same() -> None:
    in_processes(2, check_replicas, OptimizerConfig(lr=1e-3, **ROUNDED))


def check_average() -> None:
    """The average of bfloat16 weights in float8's wrapper is plain float32, and lending it out does not change it."""
    parallel = ParallelConfig(master_dtype=Precision.bfloat16, float8=Float8.tensorwise, **EMULATED)
    torch.manual_seed(0)
    with process_group(parallel) as world:
        model = sharded_copy(random_flux(WIDE), parallel, world)
        ema = EMA(model, half_life_images=100)
        start = whole(ema.average)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        weights = {n: local(p).clone() for n, p in model.named_parameters()}
        moved = {n: p.full_tensor().float() for n, p in model.named_parameters()}
        for _ in range(10):
            ema.update(images=10)
        average = whole(ema.average)
        for name in start:
            assert average[name].dtype is torch.float32
            assert type(local(ema.average[name])) is torch.Tensor
            torch.testing.assert_close(average[name], (start[name] + moved[name]) / 2, rtol=1e-5, atol=1e-6)
        with ema.applied():
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter.full_tensor().float(), average[name].bfloat16().float()), name
        assert all(torch.equal(average[n], a) for n, a in whole(ema.average).items())
        for name, parameter in model.named_parameters():
            assert torch.equal(local(parameter).float(), weights[name].float()), name


def test_average_of_bfloat16_and_float8_weights() -> None:
    in_processes(2, check_average)


# -- what it costs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        (torch.float32, {}, 16),  # weight 4, gradient 4, moments 8
        (torch.float32, {"name": OptimizerName.muon}, 12),  # momentum 4
        (torch.float32, INT8, 10 + 8 / 256),  # moments 1 + 1, and 4 for the scale of each 256, twice
        (torch.bfloat16, ROUNDED, 12),
        (torch.bfloat16, ROUNDED | {"name": OptimizerName.muon}, 8),
        (torch.bfloat16, ROUNDED | INT8, 6 + 8 / 256),
    ],
)
def test_bytes_a_parameter(dtype: torch.dtype, options: dict[str, Any], expected: float) -> None:
    class Matrices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(512, 256, bias=False) for _ in range(2)])
            self.end = nn.Linear(256, 1)

        def blocks(self) -> list[nn.Module]:
            return list(self.layers)

    model = Matrices().to(dtype)
    optimizer = PhaseOptimizer(model, OptimizerConfig(**options), seed=0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1.0)
    tensors = [t for layer in model.layers for p in layer.parameters() for t in (p, p.grad)]
    states = [o.state[p] for o in optimizer.optimizers for p in o.state if p.ndim == 2 and p.shape[1] == 512]
    tensors += [t for state in states for name, t in state.items() if name != "step"]
    assert len(states) == 2
    assert sum(t.nbytes for t in tensors) / (2 * 512 * 256) == expected


def test_what_muon_cannot_keep_in_8_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.moments='int8': is for AdamW"):
        OptimizerConfig(name=OptimizerName.muon, moments=MomentDtype.int8)
