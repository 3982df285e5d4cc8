"""Frozen weights in float8, and the names of what adapts them."""

import pytest
import torch

from kontext_train.errors import ConfigError
from kontext_train.models.config import LoraConfig, lora_targets
from kontext_train.models.flux import Flux
from kontext_train.models.lora import adapt, float8_rows
from tests.models.flux_cases import TINY, random_flux


def test_rows_fill_the_range_and_scales_are_exact_in_bfloat16() -> None:
    weight = torch.randn(64, 48) * torch.logspace(-6, 3, 64)[:, None]
    weight[5] = 0
    weight[6] = 448 * 2.0**-7  # just fits
    values, scale = float8_rows(weight)
    assert torch.equal(scale.bfloat16().float(), scale)
    largest = values.float().abs().amax(1)
    assert largest[5] == 0
    assert ((largest > 208) & (largest <= 448))[torch.arange(64) != 5].all()
    error = (values.float() * scale[:, None] - weight).abs()
    normal = weight.abs() >= scale[:, None] * 2.0**-6
    assert (error[normal] <= weight.abs()[normal] * 2.0**-4).all()  # three bits after the first
    assert (error[normal] > 0).any()


def test_only_adapters_train_and_they_are_float32() -> None:
    model = random_flux()
    names = set(dict(model.named_parameters()))
    adapt(model, LoraConfig(rank=4))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n and p.dtype is torch.float32 for n, p in trained.items())
    assert {n for n, _ in model.named_parameters()} == names | trained.keys()
    assert all(p.dtype is torch.bfloat16 for n, p in model.named_parameters() if n not in trained)


def test_targets_are_named_by_pattern() -> None:
    assert lora_targets(LoraConfig(rank=1, targets=["double_blocks.1.*_attn.qkv", "*.0.linear2"]), TINY) == [
        "double_blocks.1.img_attn.qkv",
        "double_blocks.1.txt_attn.qkv",
        "single_blocks.0.linear2",
    ]
    default = {n.split(".", 2)[2] for n in lora_targets(LoraConfig(rank=1), TINY)}
    model = Flux(TINY)
    of_tokens = set(model.token_linears())
    assert default == {n.split(".", 2)[2] for n, m in model.named_modules() if m in of_tokens}
    with pytest.raises(ConfigError, match=r"lora\.targets=.*fits no linear of the blocks: \*\.proj_mlp"):
        lora_targets(LoraConfig(rank=1, targets=["*.proj_mlp", "*.linear1"]), TINY)


def test_impossible_values_are_refused() -> None:
    for key, value in (("rank", -1), ("alpha", 0.0), ("alpha", float("inf"))):
        with pytest.raises(ConfigError, match=rf"lora\.{key}="):
            LoraConfig(**{key: value})
    with pytest.raises(ConfigError, match=r"lora\.targets="):
        LoraConfig(rank=1, targets=[])
