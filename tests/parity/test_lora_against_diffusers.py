"""Our adapters, exported, in diffusers' own network, loaded by diffusers' own pipeline and PEFT."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline
from safetensors.torch import save_file
from torch import Tensor

from kontext_train.models.config import LoraConfig
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import predict_velocity
from kontext_train.models.lora import empty_adapters, merged
from kontext_train.models.lora_format import to_peft
from tests.models.flux_cases import SHAPES, TINY, pack, random_flux, random_sample
from tests.parity.test_flux_against_diffusers import TOLERANCE, relative_error, their_velocity, to_diffusers

ALL = LoraConfig(rank=4, alpha=6.0, targets=["*"])


def random_adapters(model: Flux, config: LoraConfig) -> dict[str, Tensor]:
    return {name: torch.randn_like(t) * len(t) ** -0.5 for name, t in empty_adapters(model, config).items()}


def adapted(model: Flux, adapters: dict[str, Tensor], config: LoraConfig) -> Flux:
    result = Flux(TINY)
    result.load_state_dict({n: merged(n, p, adapters, config) for n, p in model.state_dict().items()})
    return result


def pipeline(model: Flux) -> FluxKontextPipeline:
    """Of diffusers, with our weights in its transformer and nothing else in it."""
    empty = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    return FluxKontextPipeline(transformer=to_diffusers(model), **dict.fromkeys(empty))


@pytest.mark.parametrize("targets", [["*"], ["*_attn.qkv", "single_blocks.1.linear1"], ["*.linear2"]], ids=str)
def test_an_exported_adapter_gives_the_same_velocity(tmp_path: Path, targets: list[str]) -> None:
    ours, config = random_flux(), LoraConfig(rank=4, alpha=6.0, targets=targets)
    adapters = random_adapters(ours, config)
    theirs = pipeline(ours)
    tensors = to_peft(adapters, config, TINY.hidden_size)
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "lora.safetensors", {"some": "metadata"})
    theirs.load_lora_weights(tmp_path / "lora.safetensors")
    sample = random_sample(SHAPES[2])
    before = predict_velocity(ours, *pack([sample]))
    after = predict_velocity(adapted(ours, adapters, config), *pack([sample]))
    assert relative_error(their_velocity(theirs.transformer, sample, guidance=False), after) <= TOLERANCE
    assert relative_error(before, after) > 1e-2, "the adapter does nothing"


def test_every_exported_tensor_is_taken(tmp_path: Path) -> None:
    """Loading ignores names that it does not know: none may be lost, in either direction."""
    ours = random_flux()
    theirs = pipeline(ours)
    tensors = to_peft(random_adapters(ours, ALL), ALL, TINY.hidden_size)
    theirs.load_lora_weights(dict(tensors), adapter_name="mine")
    held = {n.replace(".mine.", "."): p for n, p in theirs.transformer.named_parameters() if ".mine." in n}
    assert {f"transformer.{n}" for n in held} == tensors.keys()
    assert all(torch.equal(held[n.removeprefix("transformer.")], t) for n, t in tensors.items())


def test_a_wrong_scale_or_a_swapped_part_is_seen(tmp_path: Path) -> None:
    """Negative control."""
    ours = random_flux()
    adapters = random_adapters(ours, ALL)
    tensors = to_peft(adapters, ALL, TINY.hidden_size)
    q, k = (f"transformer.single_transformer_blocks.0.attn.to_{part}.lora_B.weight" for part in "qk")
    swapped = tensors | {q: tensors[k], k: tensors[q]}
    sample = random_sample(SHAPES[1])
    expected = predict_velocity(adapted(ours, adapters, ALL), *pack([sample]))
    for wrong in (swapped, to_peft(adapters, LoraConfig(rank=4, alpha=6.1), TINY.hidden_size)):
        theirs = pipeline(ours)
        theirs.load_lora_weights(wrong)
        assert relative_error(their_velocity(theirs.transformer, sample, guidance=False), expected) > 10 * TOLERANCE
