"""Tokens, position ids, latents and text features against the released pipelines' own functions, on tiny encoders."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxKontextPipeline
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from kontext_train.models.autoencoder import Autoencoder
from kontext_train.models.kontext import tokens_from_latent
from kontext_train.models.sequence import SampleShape, build_layout
from kontext_train.models.text_encoders import TextEncoders
from quickstart import scenes
from tests.runs import ENCODERS


def picture(columns: int = 2) -> torch.Tensor:
    rng = scenes.example_rng(0, scenes.Split.TRAIN, columns)
    return torch.from_numpy(scenes.draw(scenes.sample_scene(rng, columns))).permute(2, 0, 1)


def test_tokens_are_the_pipelines() -> None:
    latent = torch.randn(16, 8, 12)
    theirs = FluxKontextPipeline._pack_latents(latent[None], 1, 16, 8, 12)[0]
    torch.testing.assert_close(tokens_from_latent(latent), theirs, rtol=0, atol=0)


def test_position_ids_are_the_pipelines() -> None:
    layout = build_layout([SampleShape(txt=3, target=(4, 6), contexts=((2, 3),))])
    target = FluxKontextPipeline._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
    context = FluxKontextPipeline._prepare_latent_image_ids(1, 2, 3, "cpu", torch.float32)
    context[:, 0] = 1  # as FluxKontextPipeline.prepare_latents marks them
    torch.testing.assert_close(layout.ids_N3, torch.cat([torch.zeros(3, 3), target, context]))


def test_latents_are_the_autoencoders_shifted_and_scaled() -> None:
    vae = AutoencoderKL.from_pretrained(ENCODERS / "vae")
    ours = Autoencoder(ENCODERS / "vae", torch.float32)
    image = picture()
    posterior = vae.encode(image[None].float() / 127.5 - 1).latent_dist
    mean, std = ours.encode(image[None])
    torch.testing.assert_close(
        mean, (posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(std, posterior.std * vae.config.scaling_factor, atol=1e-5, rtol=1e-5)
    assert mean.std() == pytest.approx(1.0, abs=0.4)


def test_decoding_what_was_encoded_gives_the_picture_back() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ours = Autoencoder(ENCODERS / "vae", dtype)
        image = picture(3)
        decoded = ours.decode(ours.encode(image[None])[0])[0]
        assert decoded.shape == image.shape
        assert (decoded.float() - image.float()).abs().mean() / 255 < 0.02


def test_an_autoencoder_without_shift_is_refused(tmp_path: Path) -> None:
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, shift_factor=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no shift_factor: this is not a FLUX\.1 autoencoder"):
        Autoencoder(tmp_path, torch.float32)


def test_text_features_are_the_pipelines() -> None:
    ours = TextEncoders(ENCODERS, t5_tokens=12, dtype=torch.float32)
    pipeline = FluxKontextPipeline(
        scheduler=None,
        vae=None,
        text_encoder=CLIPTextModel.from_pretrained(ENCODERS / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(ENCODERS / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(ENCODERS / "text_encoder_2"),
        tokenizer_2=T5TokenizerFast.from_pretrained(ENCODERS / "tokenizer_2"),
        transformer=None,
    )
    pipeline.tokenizer_max_length = ours.clip_tokens
    prompts = ["recolour the red circle to blue", "erase the green square", ""]
    txt, vec = ours(prompts)
    torch.testing.assert_close(
        txt, pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=12).float(), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(vec, pipeline._get_clip_prompt_embeds(prompts).float(), atol=1e-5, rtol=1e-5)
    assert (txt[0] - txt[1]).abs().max() > 0.1
