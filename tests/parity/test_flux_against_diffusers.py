"""Our packed FLUX against diffusers' FluxTransformer2DModel, names mapped by diffusers' own converter."""

import inspect

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from torch import Tensor

from kontext_train.models.flux import Flux
from kontext_train.models.kontext import predict_velocity
from tests.models.flux_cases import SHAPES, TINY, Sample, pack, random_flux, random_sample

TOLERANCE = 1e-5


def to_diffusers(model: Flux) -> FluxTransformer2DModel:
    c = model.config
    theirs = FluxTransformer2DModel(
        in_channels=c.in_channels,
        num_layers=c.depth,
        num_single_layers=c.depth_single_blocks,
        attention_head_dim=c.head_dim,
        num_attention_heads=c.num_heads,
        joint_attention_dim=c.context_in_dim,
        pooled_projection_dim=c.vec_in_dim,
        guidance_embeds=c.guidance_embed,
        axes_dims_rope=tuple(c.axes_dim),
    )
    theirs.load_state_dict(released_names_to_diffusers(dict(model.state_dict())), strict=True)
    return theirs


def released_names_to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' own converter; it has the 12B's width written into it, so its source is run with ours instead."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert "inner_dim = 3072" in source, "diffusers changed its converter: check that this still swaps the width"
    namespace: dict[str, object] = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {tensors['img_in.bias'].shape[0]}"), namespace)
    convert = namespace["convert_flux_transformer_checkpoint_to_diffusers"]
    return convert({k: v.clone() for k, v in tensors.items()})  # type: ignore[operator]


def image_ids(sample: Sample) -> Tensor:
    """Position ids as the released pipelines make them: target 0, contexts 1, 2, ..."""
    grids = [sample.shape.target, *sample.shape.contexts]
    return torch.cat(
        [
            torch.cartesian_prod(torch.tensor([float(i)]), torch.arange(float(h)), torch.arange(float(w)))
            for i, (h, w) in enumerate(grids)
        ]
    )


def their_velocity(theirs: FluxTransformer2DModel, sample: Sample, guidance: bool, ids: Tensor | None = None) -> Tensor:
    """One sample alone, unpacked."""
    out = theirs(
        hidden_states=torch.cat([sample.z, *sample.contexts])[None],
        encoder_hidden_states=sample.txt[None],
        pooled_projections=sample.vec[None],
        timestep=sample.t[None],
        guidance=sample.guidance[None] if guidance else None,
        img_ids=image_ids(sample) if ids is None else ids,
        txt_ids=torch.zeros(len(sample.txt), 3),
    ).sample[0]
    return out[: len(sample.z)]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("which", [[0], [1], [2], [0, 1, 2, 3]], ids=["no_context", "one", "two", "pack_of_all"])
def test_output_and_every_gradient(which: list[int], guidance: bool) -> None:
    ours = random_flux(guidance_embed=guidance)
    theirs = to_diffusers(ours)
    samples = [random_sample(SHAPES[i]) for i in which]
    upstream = [torch.randn_like(s.z) for s in samples]

    expected = [their_velocity(theirs, s, guidance) for s in samples]
    torch.autograd.backward(expected, upstream)
    out = predict_velocity(ours, *pack(samples, guidance))
    out.backward(torch.cat(upstream))

    assert relative_error(out, torch.cat(expected)) <= TOLERANCE
    our_grads = released_names_to_diffusers({k: p.grad for k, p in ours.named_parameters()})
    assert set(our_grads) == {name for name, _ in theirs.named_parameters()}
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:  # the last double block's text output is read by no one in a model without singles
            raise AssertionError(f"{name} has no gradient in the reference")
        assert relative_error(our_grads[name], parameter.grad) <= TOLERANCE, name


def test_one_shifted_position_id_is_seen() -> None:
    """Negative control: the tolerance is far below what one wrong position changes."""
    ours = random_flux()
    sample = random_sample(SHAPES[1])
    shifted = image_ids(sample)
    shifted[-1, 2] += 1
    expected = their_velocity(to_diffusers(ours), sample, guidance=False, ids=shifted)
    assert relative_error(predict_velocity(ours, *pack([sample])), expected) > 100 * TOLERANCE


def test_seeing_another_sample_is_seen() -> None:
    """Negative control: joining two samples into one segment must show."""
    ours = random_flux()
    samples = [random_sample(SHAPES[0]), random_sample(SHAPES[3])]
    z, t, cond = pack(samples)
    apart = predict_velocity(ours, z, t, cond)
    cond.layout.cu_seqlens = cond.layout.cu_seqlens[[0, 2]]
    assert relative_error(predict_velocity(ours, z, t, cond), apart) > 100 * TOLERANCE


def test_the_tiny_config_reaches_every_parameter() -> None:
    """The gradient comparison above means nothing for a parameter whose gradient is zero."""
    ours = random_flux(TINY, guidance_embed=True)
    predict_velocity(ours, *pack([random_sample(s) for s in SHAPES], guidance=True)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-6 for p in ours.parameters())
