"""The network on a GPU against the same network on the CPU; compiled, checkpointed and in float8 against plain."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.gpu.measure import options
from kontext_train.distributed.config import ParallelConfig
from kontext_train.distributed.parallelize import parallelize
from kontext_train.distributed.setup import World, process_group
from kontext_train.models.attention import attention_function, cpu_attention, usable_backend
from kontext_train.models.config import AttentionBackend, FluxConfig
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import Conditioning, predict_velocity
from kontext_train.models.sequence import SampleShape
from kontext_train.models.weights import assign
from tests.models.flux_cases import pack, random_flux, random_sample

DEVICE = "cuda"
# Heads of 128 as in the 12B; every matrix and the number of tokens are multiples of 16, as float8 needs.
CONFIG = FluxConfig(
    in_channels=16, vec_in_dim=32, context_in_dim=64, hidden_size=256, num_heads=2, depth=1, depth_single_blocks=2
)  # fmt: skip
SHAPES = (
    SampleShape(txt=16, target=(8, 8)),
    SampleShape(txt=16, target=(8, 8), contexts=((8, 12),)),
    SampleShape(txt=16, target=(12, 8), contexts=((8, 8), (4, 8))),
)
Inputs = tuple[Tensor, Tensor, Conditioning]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_group(ParallelConfig()) as world:
        yield world


@pytest.fixture
def inputs() -> Inputs:
    return pack([random_sample(shape, CONFIG) for shape in SHAPES], pad_to=608)


@pytest.fixture
def reference() -> Flux:
    return random_flux(CONFIG)


def on_device(inputs: Inputs) -> Inputs:
    z_MC, t_S, cond = inputs
    moved = {k: getattr(cond, k).to(DEVICE) for k in ("txt_TE", "vec_SP", "context_KC", "layout")}
    return z_MC.to(DEVICE), t_S.to(DEVICE), replace(cond, **moved)


def sharded(reference: Flux, world: World, **chosen: Any) -> Flux:
    config = options(ParallelConfig, **chosen)
    dtype = getattr(torch, config.param_dtype.value)
    backend = usable_backend(AttentionBackend.auto, DEVICE, dtype, CONFIG.head_dim)
    with torch.device("meta"):
        model = Flux(CONFIG, attention_function(backend))
    parallelize(model, world.mesh, config, static_tokens=608)
    model.to_empty(device=DEVICE)
    for name, parameter in model.named_parameters():
        assign(parameter, reference.get_parameter(name))
    return model


def gradients(model: Flux, inputs: Inputs) -> dict[str, Tensor]:
    """The output and every gradient, on the CPU."""
    out = predict_velocity(model, *inputs)
    out.float().square().mean().backward()
    found = {"out": out.detach()} | {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).cpu().float() for k, v in found.items()}


def error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all gradients as one vector: a bias with a tiny gradient is not asked for more than it can give."""
    assert actual.keys() == expected.keys()
    difference = sum((actual[k] - expected[k]).square().sum() for k in expected if k != "out")
    size = sum(expected[k].square().sum() for k in expected if k != "out")
    gradient = float(difference / size) ** 0.5
    return max(gradient, ((actual["out"] - expected["out"]).norm() / expected["out"].norm()).item())


@pytest.mark.parametrize(("dtype", "least", "most"), [("float32", 0.0, 1e-4), ("bfloat16", 1e-4, 5e-2)])
def test_equals_the_cpu(reference: Flux, inputs: Inputs, world: World, dtype: str, least: float, most: float) -> None:
    """bfloat16 must also differ: else it was not what ran."""
    assert reference.double_blocks[0].attention is cpu_attention
    expected = gradients(reference, inputs)
    found = error(gradients(sharded(reference, world, param_dtype=dtype), on_device(inputs)), expected)
    assert least <= found <= most


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_compiled_and_checkpointed_equals_eager(
    reference: Flux, inputs: Inputs, world: World, checkpointing: str, dtype: str, most: float
) -> None:
    expected = gradients(sharded(reference, world, param_dtype=dtype), on_device(inputs))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = sharded(reference, world, param_dtype=dtype, compile=True, activation_checkpointing=checkpointing)
    assert error(gradients(model, on_device(inputs)), expected) <= most
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one for each kind of block"


@pytest.mark.parametrize("float8", ["tensorwise", "rowwise"])
def test_float8_is_near_bfloat16_and_not_equal(reference: Flux, inputs: Inputs, world: World, float8: str) -> None:
    expected = gradients(sharded(reference, world), on_device(inputs))
    torch._dynamo.reset()
    model = sharded(reference, world, compile=True, float8=float8, float8_min_features=256)
    assert 5e-3 <= error(gradients(model, on_device(inputs)), expected) <= 0.2
