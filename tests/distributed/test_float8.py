"""Float8 linears: which they are, how near they compute, what travels, and where they are refused."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kontext_train.distributed.config import Checkpointing, Float8, ParallelConfig, Precision, Reshard
from kontext_train.distributed.float8 import check_hardware, convert, converted_linears, plain, refresh_scales
from kontext_train.distributed.setup import process_group
from kontext_train.errors import ConfigError
from kontext_train.models.config import FluxConfig
from kontext_train.models.flux import Flux
from tests.distributed.test_parallelize import WireSpy, sharded_copy
from tests.distributed.test_parallelize import gradients as outputs_and_gradients
from tests.models.flux_cases import SHAPES, TINY, pack, random_flux, random_sample
from tests.runs import in_processes

WIDE = replace(TINY, hidden_size=64, axes_dim=[4, 14, 14], depth=1, depth_single_blocks=1)  # sides are multiples of 32
EMULATED = {"float8_emulate": True, "float8_min_features": 32}
RECIPES = [Float8.tensorwise, Float8.rowwise, Float8.mxfp8]

OF_A_DOUBLE_BLOCK = ["attn.qkv", "attn.proj", "mlp.0", "mlp.2"]
CONVERTED = [f"double_blocks.0.{stream}_{name}" for stream in ("img", "txt") for name in OF_A_DOUBLE_BLOCK]


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        (2048, [*CONVERTED, "single_blocks.0.linear1", "single_blocks.0.linear2"]),
        (3073, []),  # every matrix of the 12B has a side of 3072
    ],
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_at_12b_the_linears_of_tokens_are_converted_and_no_other(
    recipe: Float8, least: int, expected: list[str]
) -> None:
    with torch.device("meta"):
        model = Flux(FluxConfig(depth=1, depth_single_blocks=1, guidance_embed=True))
    config = ParallelConfig(float8=recipe, float8_emulate=True, float8_min_features=least)
    assert converted_linears(model, config) == expected
    if not expected:
        with pytest.raises(ConfigError, match=r"parallel\.float8=.*fits no linear of this model.*3073 leaves none"):
            convert(model, config)
        return
    names = [n for n, _ in model.named_parameters()]
    convert(model, config)
    assert [n for n, m in model.named_modules() if "Float8" in type(m).__name__ or "MXFP8" in type(m).__name__] == (
        expected
    )
    assert [n for n, _ in model.named_parameters()] == names


def test_sides_that_the_kernels_do_not_take_are_left() -> None:
    """TINY's sides are multiples of 16 (48, 144, 192), not all of 32."""
    model = random_flux()
    assert len(converted_linears(model, ParallelConfig(float8=Float8.tensorwise, float8_min_features=16))) == 20
    assert converted_linears(model, ParallelConfig(float8=Float8.mxfp8, float8_min_features=16)) == []


def gradients(model: Flux, packed: Any) -> dict[str, torch.Tensor]:
    return outputs_and_gradients(model, packed)[1]


def keep_gradients(config: ParallelConfig, file: Path) -> None:
    torch.manual_seed(0)
    reference, packed = random_flux(WIDE), pack([random_sample(s, WIDE) for s in SHAPES])
    with process_group(config) as world:
        model = sharded_copy(reference, config, world)
        grads = {k: g / world.dp_size for k, g in gradients(model, packed).items()}
        if world.is_main:
            torch.save(grads, file)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of a gradient."""
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).norm() / b[k].norm()).item() for k in a)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_near_float32s_and_the_same_on_two_processes(recipe: Float8, tmp_path: Path) -> None:
    """Packs of 5 to 20 tokens a sample, so no length suits the kernels."""
    exact = ParallelConfig(param_dtype=Precision.float32)
    in_processes(1, keep_gradients, exact, tmp_path / "float32")
    for processes in (1, 2):
        config = replace(exact, float8=recipe, **EMULATED)
        in_processes(processes, keep_gradients, config, tmp_path / str(processes))
    expected, one, two = (torch.load(tmp_path / name) for name in ("float32", "1", "2"))
    assert 0.02 < distance(one, expected) < 0.2, "near, and not float32 by another name"
    assert distance(two, one) <= 1e-6


@pytest.mark.parametrize("recipe", RECIPES)
def test_with_context_parallelism_gradients_are_as_near(recipe: Float8, tmp_path: Path) -> None:
    """As near as without, but not the same: scales are those of each rank's own tokens."""
    exact = ParallelConfig(param_dtype=Precision.float32)
    in_processes(1, keep_gradients, exact, tmp_path / "float32")
    in_processes(2, keep_gradients, replace(exact, cp=2, float8=recipe, **EMULATED), tmp_path / "cp")
    expected, cp = (torch.load(tmp_path / name) for name in ("float32", "cp"))
    assert 0.02 < distance(cp, expected) < 0.2


def keep_bytes(config: ParallelConfig, file: Path) -> None:
    class Bytes(WireSpy):
        gathered = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "allgather" in str(func):
                self.gathered += args[0].nbytes
            return super().__torch_dispatch__(func, types, args, kwargs)

    torch.manual_seed(0)
    reference, packed = random_flux(WIDE), pack([random_sample(s, WIDE) for s in SHAPES])
    with process_group(config) as world:
        model = sharded_copy(reference, config, world)
        with Bytes() as spy:
            gradients(model, packed)
        if world.is_main:
            names = converted_linears(reference, config)
            weights = sum(reference.get_parameter(f"{n}.weight").numel() for n in names)
            torch.save((spy.gathered, spy.seen, weights), file)


def test_tensorwise_gathers_a_byte_a_weight(tmp_path: Path) -> None:
    """gloo and FSDP move them as uint8, beside biases in bfloat16. Rowwise gathers bfloat16."""
    results = {}
    for recipe in (Float8.tensorwise, Float8.rowwise):
        config = ParallelConfig(float8=recipe, reshard_after_forward=Reshard.always, **EMULATED)
        in_processes(2, keep_bytes, config, tmp_path / recipe.value)
        results[recipe] = torch.load(tmp_path / recipe.value, weights_only=False)
    (less, seen, weights), (more, seen_rowwise, _) = results[Float8.tensorwise], results[Float8.rowwise]
    assert {d for k, d in seen if k == "gather"} == {torch.uint8, torch.bfloat16}  # the ends are not in blocks
    assert {d for k, d in seen_rowwise if k == "gather"} == {torch.bfloat16}
    assert {d for k, d in seen if k == "reduce"} == {torch.float32}
    assert more - less == pytest.approx(2 * weights, rel=0.01), "a byte less for forward and for backward"


def check_scales(dp_replicate: int) -> None:
    config = ParallelConfig(
        dp_replicate=dp_replicate, param_dtype=Precision.float32, float8=Float8.tensorwise, **EMULATED
    )
    torch.manual_seed(0)
    reference, packed = random_flux(WIDE), pack([random_sample(s, WIDE) for s in SHAPES])
    with process_group(config) as world:
        model = sharded_copy(reference, config, world)

        def now() -> dict[str, torch.Tensor]:
            for parameter in model.parameters():
                parameter.grad = None
            return gradients(model, packed)

        at_first = now()
        refresh_scales(model)
        assert distance(now(), at_first) == 0, "taken at once or at every gather: the same scales"
        with torch.no_grad():
            for parameter in model.parameters():
                plain(parameter).mul_(8)
        stale = now()
        refresh_scales(model)
        fresh = now()
        for parameter in model.parameters():
            if hasattr(inner := parameter.to_local(), "_precomputed_scale"):
                inner._precomputed_scale = None  # back to a scale at every gather
        assert distance(fresh, now()) == 0
        assert distance(stale, fresh) > 0.2, "scales of the past saturate"


@pytest.mark.parametrize(("processes", "dp_replicate"), [(1, 1), (2, 1), (4, 2)])
def test_scales_follow_the_weights_when_refreshed(processes: int, dp_replicate: int) -> None:
    in_processes(processes, check_scales, dp_replicate)


def check_checkpointed() -> None:
    torch.manual_seed(0)
    reference, packed = random_flux(WIDE), pack([random_sample(s, WIDE) for s in SHAPES])
    none = ParallelConfig(param_dtype=Precision.float32, float8=Float8.tensorwise, **EMULATED)
    with process_group(none) as world:
        for policy in (Checkpointing.selective, Checkpointing.full):
            configs = (none, replace(none, activation_checkpointing=policy))
            kept, recomputed = (gradients(sharded_copy(reference, c, world), packed) for c in configs)
            assert distance(recomputed, kept) == 0, policy


def test_recomputed_float8_is_the_same() -> None:
    in_processes(2, check_checkpointed)


def check_compiled() -> None:
    plain_compile = torch.compile
    torch.compile = lambda f, **k: plain_compile(f, backend="aot_eager", **k)  # type: ignore[assignment]
    torch.manual_seed(0)
    shape = replace(WIDE, depth=0, depth_single_blocks=2)
    reference, packed = random_flux(shape), pack([random_sample(s, shape) for s in SHAPES])
    eager = ParallelConfig(param_dtype=Precision.float32, float8=Float8.tensorwise, **EMULATED)
    compiled = replace(eager, compile=True, activation_checkpointing=Checkpointing.full)
    with process_group(eager) as world:
        results = [gradients(sharded_copy(reference, config, world), packed) for config in (eager, compiled)]
    assert distance(results[1], results[0]) <= 0.05  # a value on the edge between two float8 may fall to either side
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_compiled_and_recomputed_blocks_share_one_graph() -> None:
    in_processes(1, check_compiled)


@pytest.mark.parametrize(
    ("capability", "recipe", "message"),
    [
        (
            None,
            Float8.tensorwise,
            r"parallel\.float8='tensorwise': needs a GPU of compute capability 8\.9 .* none here",
        ),
        (
            (8, 0),
            Float8.tensorwise,
            r"'tensorwise': needs a GPU of compute capability 8\.9 or newer; this one has 8\.0",
        ),
        ((8, 9), Float8.rowwise, r"'rowwise': needs a GPU of compute capability 9\.0"),
        ((9, 0), Float8.mxfp8, r"'mxfp8': needs a GPU of compute capability 10\.0 or newer; this one has 9\.0"),
    ],
)
def test_hardware_without_float8_is_refused(
    capability: tuple[int, int] | None, recipe: Float8, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(ConfigError, match=message):
        check_hardware(ParallelConfig(float8=recipe))
    check_hardware(ParallelConfig(float8=recipe, float8_emulate=True))
    check_hardware(ParallelConfig())


def test_hardware_with_float8_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    for recipe in RECIPES:
        check_hardware(ParallelConfig(float8=recipe))


def test_a_missing_torchao_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"parallel\.float8='rowwise': needs torchao.*pip install kontext-train"):
        check_hardware(ParallelConfig(float8=Float8.rowwise, float8_emulate=True))
    check_hardware(ParallelConfig())
