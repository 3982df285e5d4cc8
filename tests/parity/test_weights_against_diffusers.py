"""Names, cuts and files of weights against diffusers: its converter, its save_pretrained, its network."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from kontext_train.models.config import GuidanceIn
from kontext_train.models.diffusers_format import to_diffusers, transformer_config
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import predict_velocity
from kontext_train.models.weights import load
from tests.models.flux_cases import SHAPES, TINY, pack, random_flux, random_sample
from tests.parity import test_flux_against_diffusers as parity


def saved_by_diffusers(folder: Path, guidance: bool = False) -> FluxTransformer2DModel:
    """A text-to-image network in files as diffusers writes them: several, with an index."""
    torch.manual_seed(1)
    theirs = parity.to_diffusers(random_flux(guidance_embed=guidance))
    theirs.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return theirs


@pytest.mark.parametrize("guidance", [False, True])
def test_every_tensor_is_where_their_converter_puts_it(guidance: bool) -> None:
    released = dict(random_flux(guidance_embed=guidance).state_dict())
    expected = parity.released_names_to_diffusers(released)
    ours = {n: t for name, tensor in released.items() for n, t in to_diffusers(name, tensor, TINY.hidden_size).items()}
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("whole_pipeline", [False, True])
def test_without_contexts_we_are_the_text_to_image_model(tmp_path: Path, guidance: bool, whole_pipeline: bool) -> None:
    """Their files fill every parameter of a network that takes contexts: none is new. Beside an edit, too."""
    theirs = saved_by_diffusers(tmp_path / "transformer", guidance)
    ours = random_flux(guidance_embed=guidance)
    load(ours, tmp_path if whole_pipeline else tmp_path / "transformer")
    for samples in ([random_sample(SHAPES[0])], [random_sample(SHAPES[3]), random_sample(SHAPES[2])]):
        assert not samples[0].contexts
        expected = parity.their_velocity(theirs, samples[0], guidance)
        out = predict_velocity(ours, *pack(samples, guidance))[: len(expected)]
        assert parity.relative_error(out, expected) <= parity.TOLERANCE


def test_swapped_scale_and_shift_are_seen(tmp_path: Path) -> None:
    """Negative control of the test above: the one layer whose halves change places."""
    theirs = saved_by_diffusers(tmp_path)
    ours = random_flux()
    load(ours, tmp_path)
    last = ours.final_layer.adaLN_modulation[1]
    with torch.no_grad():
        last.weight.copy_(last.weight.roll(TINY.hidden_size, 0))
    sample = random_sample(SHAPES[0])
    out = predict_velocity(ours, *pack([sample]))
    assert parity.relative_error(out, parity.their_velocity(theirs, sample, False)) > 100 * parity.TOLERANCE


def test_dropping_the_guidance_embedding_reads_the_rest(tmp_path: Path) -> None:
    theirs = saved_by_diffusers(tmp_path, guidance=True)
    ours = Flux(TINY)
    load(ours, tmp_path, GuidanceIn.drop)
    converted = {
        n: t for name, p in ours.named_parameters() for n, t in to_diffusers(name, p, TINY.hidden_size).items()
    }
    kept = {n: p for n, p in theirs.named_parameters() if "guidance_embedder" not in n}
    assert converted.keys() == kept.keys()
    assert all(torch.equal(converted[n], p) for n, p in kept.items())


def test_a_file_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    saved_by_diffusers(tmp_path)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=rf"{gone.name} is missing, which diffusion_pytorch_model.*names"):
        load(random_flux(), tmp_path)


def test_a_foreign_depth_is_named_by_their_names(tmp_path: Path) -> None:
    saved_by_diffusers(tmp_path)
    with pytest.raises(ValueError, match=r"left over, first \['single_transformer_blocks\.1\.attn.*model\.depth"):
        load(random_flux(depth_single_blocks=1), tmp_path)


@pytest.mark.parametrize("guidance", [False, True])
def test_the_config_makes_their_network(guidance: bool) -> None:
    model = random_flux(guidance_embed=guidance)
    theirs = FluxTransformer2DModel.from_config(transformer_config(model.config))
    expected = parity.to_diffusers(model)
    assert {n: p.shape for n, p in theirs.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
    assert tuple(theirs.config.axes_dims_rope) == expected.config.axes_dims_rope
