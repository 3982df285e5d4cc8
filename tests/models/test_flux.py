"""What the packed transformer promises, beyond parity."""

from itertools import pairwise

import pytest
import torch

from kontext_train.errors import ConfigError
from kontext_train.models.config import FluxConfig
from kontext_train.models.flux import Flux, initial_tensor
from kontext_train.models.kontext import latent_from_tokens, predict_velocity, tokens_from_latent
from kontext_train.models.sequence import SampleShape, build_layout
from kontext_train.randomness import generator
from tests.models.flux_cases import SHAPES, pack, random_flux, random_sample


def test_flux_12b_has_the_released_number_of_parameters() -> None:
    with torch.device("meta"):
        model = Flux(FluxConfig(guidance_embed=True))
    assert sum(p.numel() for p in model.parameters()) == 11_901_408_320  # FLUX.1-dev, as counted in its safetensors


def test_padding_changes_nothing() -> None:
    model = random_flux()
    samples = [random_sample(s) for s in SHAPES]
    plain = predict_velocity(model, *pack(samples))
    padded = predict_velocity(model, *pack(samples, pad_to=200))
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-6)


def test_order_in_the_pack_changes_nothing() -> None:
    model = random_flux()
    samples = [random_sample(s) for s in SHAPES]
    forward = predict_velocity(model, *pack(samples)).split([len(s.z) for s in samples])
    backward = predict_velocity(model, *pack(samples[::-1])).split([len(s.z) for s in samples[::-1]])
    for a, b in zip(forward, backward[::-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_pack_larger_than_its_padding_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit 10"):
        build_layout([SampleShape(txt=5, target=(3, 4))], pad_to=10)


def test_joint_order_keeps_samples_apart() -> None:
    layout = build_layout(SHAPES, pad_to=120)
    bounds = layout.cu_seqlens.tolist()
    owners = [set(layout.sample_of_joint_N[a:b].tolist()) for a, b in pairwise(bounds[:-1])]
    assert all(len(owner) == 1 for owner in owners)
    assert sorted(s for owner in owners for s in owner) == [0, 1, 2, 3]
    assert bounds[-1] == 120
    torch.testing.assert_close(layout.joint_N[layout.stream_N], torch.arange(120))


@pytest.mark.parametrize("given", [None, 3.5])
def test_guidance_must_match_the_model(given: float | None) -> None:
    sample = random_sample(SHAPES[0])
    model = random_flux(guidance_embed=given is None)
    with pytest.raises(ValueError, match="guidance_embed"):
        predict_velocity(model, *pack([sample], guidance=given is not None))


def test_a_block_compiles_once_without_graph_breaks_for_every_packing() -> None:
    torch._dynamo.reset()
    model, reference = random_flux(), random_flux()
    reference.load_state_dict(model.state_dict())
    for block in model.blocks():
        block.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for chosen in ([0, 1, 2], [2, 2], [1, 0, 3, 2, 1]):
        packed = pack([random_sample(SHAPES[i]) for i in chosen])
        out, expected = predict_velocity(model, *packed), predict_velocity(reference, *packed)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        grad, expected_grad = (
            torch.autograd.grad(v.square().sum(), m.double_blocks[0].img_attn.qkv.weight)[0]
            for v, m in ((out, model), (expected, reference))
        )
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one for each kind of block


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"num_heads": 5}, "model.num_heads"),
        ({"axes_dim": [4, 4, 4]}, "model.axes_dim"),
        ({"axes_dim": [5, 9, 10]}, "model.axes_dim"),
        ({"depth": 0, "depth_single_blocks": 0}, "model.depth"),
        ({"hidden_size": 0}, "model.hidden_size"),
    ],
)
def test_impossible_shapes_are_refused_by_key(change: dict[str, object], key: str) -> None:
    shape: dict[str, object] = {"hidden_size": 48, "num_heads": 2, "axes_dim": [4, 10, 10]}
    with pytest.raises(ConfigError, match=key):
        FluxConfig(**(shape | change))  # type: ignore[arg-type]


def test_fresh_weights_give_zero_velocity_and_open_gates_only_when_asked() -> None:
    model = random_flux()
    with torch.no_grad():
        for name, p in model.named_parameters():
            model.config.init.gate = 1.0
            p.copy_(initial_tensor(name, p.shape, model.config.init, generator(0, name)))
    assert predict_velocity(model, *pack([random_sample(SHAPES[1])])).abs().max() == 0
    d = model.config.hidden_size
    assert model.double_blocks[0].img_mod.lin.bias.view(2, 3, d)[:, 2].min() == 1
    assert model.double_blocks[0].img_mod.lin.bias.view(2, 3, d)[:, :2].abs().max() == 0


def test_patches_round_trip() -> None:
    latent = torch.randn(16, 6, 10)
    torch.testing.assert_close(latent_from_tokens(tokens_from_latent(latent), 3, 5), latent)
