"""What checkpointing keeps and what it computes again, counted by torch and in bytes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kontext_train.distributed.activation import checkpointed
from kontext_train.distributed.config import Checkpointing, ParallelConfig
from kontext_train.errors import ConfigError
from kontext_train.models.config import FluxConfig, block_linears
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import predict_velocity
from tests.models.flux_cases import SHAPES, TINY, pack, random_flux, random_sample

ALL_LINEARS = ["attn.qkv", "attn.proj", "mlp.0", "mlp.2", "linear1", "linear2"]


def with_policy(reference: Flux, policy: Checkpointing, keep: list[str] | None = None) -> Flux:
    model = Flux(reference.config)
    model.load_state_dict(reference.state_dict())
    config = ParallelConfig(activation_checkpointing=policy)
    config.keep_outputs = config.keep_outputs if keep is None else keep
    for block in model.blocks():
        block.forward = checkpointed(block.forward, block, config)
    return model


class Meter(TorchDispatchMode):
    """Storages that operators made and that are still alive, and how often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[func.name()] += 1
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def live_bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


@contextmanager
def step(model: Flux, packed: Any) -> Iterator[Meter]:
    """Live bytes between forward and backward are read inside; the backward pass follows."""
    with Meter() as meter:
        loss = predict_velocity(model, *packed).square().mean()
        yield meter
        loss.backward()


def linear_flops(config: FluxConfig, packed: Any, names: list[str]) -> int:
    """Of the named linears of all blocks, forward once. Text and image weights of one name are alike in shape."""
    d, mlp = config.hidden_size, config.mlp_hidden
    double = {"attn.qkv": 3 * d * d, "attn.proj": d * d, "mlp.0": d * mlp, "mlp.2": d * mlp}
    single = {"linear1": d * (3 * d + mlp), "linear2": (d + mlp) * d}
    tokens = len(packed[2].layout.joint_N)
    of_double, of_single = (sum(sizes.get(n, 0) for n in names) for sizes in (double, single))
    return 2 * tokens * (config.depth * of_double + config.depth_single_blocks * of_single)


@pytest.mark.parametrize("keep", [None, ["attention"], [], ["attention", *ALL_LINEARS]], ids=str)
def test_selective_gradients_are_bitwise_those_of_none(keep: list[str] | None) -> None:
    reference, packed = random_flux(), pack([random_sample(s) for s in SHAPES])
    model = with_policy(reference, Checkpointing.selective, keep)
    for m in (reference, model):
        predict_velocity(m, *packed).square().mean().backward()
    for name, parameter in reference.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad), name


@pytest.mark.parametrize("keep", [["attention", "mlp.2", "linear2"], ["attention"], ALL_LINEARS, ["attn.qkv"]], ids=str)
def test_only_what_is_not_kept_is_computed_again(keep: list[str]) -> None:
    """In matrix products, by torch's counter: one with a bias is a forward one."""
    reference, packed = random_flux(), pack([random_sample(s) for s in SHAPES])

    def forward_flops(model: Flux) -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter, step(model, packed) as meter:
            pass
        attentions = meter.calls["kontext_train::cpu_attention"]
        return counter.get_flop_counts()["Global"][torch.ops.aten.addmm], attentions

    once, attentions = forward_flops(with_policy(reference, Checkpointing.none))
    kept, kept_attentions = forward_flops(with_policy(reference, Checkpointing.selective, keep))
    full, full_attentions = forward_flops(with_policy(reference, Checkpointing.full))
    assert full - kept == linear_flops(TINY, packed, keep)
    assert full - once > linear_flops(TINY, packed, ALL_LINEARS)  # modulation is computed again too, always
    assert attentions == TINY.depth + TINY.depth_single_blocks
    assert full_attentions == 2 * attentions
    assert kept_attentions == (attentions if "attention" in keep else 2 * attentions)


@pytest.mark.parametrize("keep", [["attention", "mlp.2", "linear2"], ALL_LINEARS], ids=str)
def test_bytes_kept_are_the_outputs_named(keep: list[str]) -> None:
    reference, packed = random_flux(), pack([random_sample(s) for s in SHAPES])

    def live(policy: Checkpointing, keep: list[str] | None = None) -> int:
        model = with_policy(reference, policy, keep)
        with step(model, packed) as meter:
            return meter.live_bytes()

    none, full = live(Checkpointing.none), live(Checkpointing.full)
    tokens, d, mlp = len(packed[2].layout.joint_N), TINY.hidden_size, TINY.mlp_hidden
    widths = {"attn.qkv": 3 * d, "attn.proj": d, "mlp.0": mlp, "mlp.2": d}
    double = sum(widths.get(n, 0) for n in keep)
    single = sum({"linear1": 3 * d + mlp, "linear2": d}.get(n, 0) for n in keep)
    blocks = TINY.depth + TINY.depth_single_blocks
    attention = blocks * (d + TINY.num_heads) * ("attention" in keep)  # its output and log-sum-exp
    expected = 4 * tokens * (TINY.depth * double + TINY.depth_single_blocks * single + attention)
    assert live(Checkpointing.selective, keep) - full == expected
    assert full < full + expected < none


TINY_LINEARS = block_linears(TINY)


def test_linears_of_blocks_are_known_without_building_them() -> None:
    for block, expected in zip(
        (random_flux().double_blocks[0], random_flux().single_blocks[0]), TINY_LINEARS, strict=True
    ):
        linears = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        assert {n: (m.in_features, m.out_features) for n, m in linears.items()} == expected


def selective(keep: list[str]) -> ParallelConfig:
    return ParallelConfig(activation_checkpointing=Checkpointing.selective, keep_outputs=keep)


@pytest.mark.parametrize("name", ["attn.kqv", ""])
def test_a_name_that_fits_no_layer_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"parallel\.keep_outputs=.*'{name}' fits no layer.*img_attn\.qkv"):
        selective([name]).check_keep_outputs(TINY_LINEARS)
    selective(ALL_LINEARS).check_keep_outputs(TINY_LINEARS)


def test_layers_that_shape_cannot_tell_apart_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"mlp\.0 has the shape of a kept layer.*Name img_mlp\.0 too"):
        selective(["attn.qkv"]).check_keep_outputs(block_linears(replace(TINY, mlp_ratio=3.0)))


def test_names_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"keep_outputs.*no effect with activation_checkpointing=full"):
        ParallelConfig(activation_checkpointing=Checkpointing.full, keep_outputs=["attention"])
    with pytest.raises(ConfigError, match="all_to_all needs cp > 1"):
        selective(["all_to_all"])
