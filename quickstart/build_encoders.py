"""Make the quickstart's tiny encoders: `python -m quickstart.build_encoders --out DIR` (about 6 CPU minutes).

They come in the layout of the released FLUX.1 repositories and load with the same calls, so nothing in the trainer
knows that they are small: `tokenizer/` (CLIPTokenizer), `text_encoder/` (CLIPTextModel), `tokenizer_2/`
(T5TokenizerFast), `text_encoder_2/` (T5EncoderModel) and `vae/` (diffusers AutoencoderKL). The finished weights are
kept in the repository; this file says where they come from.

Shapes: B = batch; L = text tokens; D = 64 text channels; C = 3 (RGB); Z = 16 latent channels; H, W = px; h, w =
latents (8 px each).
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (  # type: ignore[attr-defined]  # mypy cannot see T5TokenizerFast
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from quickstart import scenes
from quickstart.scenes import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Example, Kind, Split

TEXT_CHANNELS = 64
TEXT_BATCH = 128
VAE_CHANNELS = 32
VAE_BATCH = 16
LATENT_CHANNELS = 16
LATENT_NOISE = 0.3  # highest std of the noise the decoder learns to bear; latents have unit std
POSTERIOR_STD = 0.02
NEGATIVES, PIN, GAIN = 14, 32.0, 0.25  # see `_fit_encoder`; 16 latents + 14 negatives + 2 pins = 32 channels


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the quickstart's VAE, T5 and CLIP")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--text-steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=("vae", "t5", "clip"), default=("vae", "t5", "clip"))
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    if "vae" in arguments.only:
        build_vae(arguments.vae_steps, arguments.seed).save_pretrained(arguments.out / "vae")
    if "t5" in arguments.only:
        build_t5(arguments.out, arguments.text_steps, arguments.seed)
    if "clip" in arguments.only:
        build_clip(arguments.out, arguments.text_steps, arguments.seed)


# Autoencoder --------------------------------------------------------------------------------------------------------


def build_vae(steps: int, seed: int) -> Any:
    """An AutoencoderKL, 8 px a latent: encoder in closed form, decoder trained on noisy latents with L1 + L2."""
    vae = new_vae()
    _fit_encoder(vae, seed)
    vae.encoder.requires_grad_(False)
    matrices = [p for p in vae.decoder.parameters() if p.shape[:2] == (VAE_CHANNELS, VAE_CHANNELS)]
    others = [p for p in vae.decoder.parameters() if p.shape[:2] != (VAE_CHANNELS, VAE_CHANNELS)]
    momenta = [torch.zeros_like(matrix) for matrix in matrices]
    optimizer = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.99))
    warmed = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps))
    for step in range(steps):
        image_BCHW = _pictures(seed, step, VAE_BATCH, columns=scenes.COLUMNS[step % 2])
        error_BCHW = _decode_noisy(vae, image_BCHW) - image_BCHW
        loss = error_BCHW.abs().mean() + 2 * error_BCHW.square().mean()
        vae.decoder.zero_grad()
        _update(optimizer, loss, "vae", step, steps)
        _muon_step(matrices, momenta, lr=0.02 * _schedule(step, steps))
        warmed.step()
    _set_moments(vae, seed, steps)
    return vae.eval()


@torch.no_grad()
def _muon_step(matrices: list[Tensor], momenta: list[Tensor], lr: float) -> None:
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum, then all singular values brought near 1.

    torch.optim.Muon refuses convolutions; these, all of one shape, are taken as [out, in * 9]. With AdamW the decoder
    needs several times as many steps before it tells a circle from a square.
    """
    nesterov = []
    for matrix, momentum in zip(matrices, momenta, strict=True):
        assert matrix.grad is not None
        momentum.mul_(0.95).add_(matrix.grad)
        nesterov.append((matrix.grad + 0.95 * momentum).flatten(1))
    x_MOI = torch.stack(nesterov).bfloat16()
    x_MOI = x_MOI / (x_MOI.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a_MOO = x_MOI @ x_MOI.mT
        x_MOI = 3.4445 * x_MOI + (-4.7750 * a_MOO + 2.0315 * a_MOO @ a_MOO) @ x_MOI
    for matrix, x_OI in zip(matrices, x_MOI.float(), strict=True):
        matrix.sub_(x_OI.view_as(matrix), alpha=lr)


def _decode_noisy(vae: Any, image_BCHW: Tensor) -> Tensor:
    """Pictures from their latents plus noise, of a std drawn for each, as a flow model's errors would leave them."""
    with torch.autocast("cpu", torch.bfloat16):
        latent_BZhw = vae.encode(image_BCHW).latent_dist.mean
        std_B111 = LATENT_NOISE * torch.rand(len(image_BCHW), 1, 1, 1)
        return vae.decode(latent_BZhw + std_B111 * torch.randn(latent_BZhw.shape)).sample.float()


def new_vae() -> Any:
    """Untrained: no residual blocks in the encoder's levels, one in the decoder's; about 0.2 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(VAE_CHANNELS,) * 4,
        layers_per_block=0,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=32,
        scaling_factor=1.0,  # these two are measured after training
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def _fit_encoder(vae: Any, seed: int) -> None:
    """Make the encoder the whitened principal components of 8 x 8 px patches, up to a slight curve.

    Such latents are almost linear in the pixels, and an edit changes those of the edited cell alone: convolutions use
    only the taps inside their patch. GroupNorm sees the whole picture; two channels of +-PIN pin its variance, and the
    negatives of the first components its mean, so what it does is nearly constant. The last SiLU is undone by
    silu(y) - silu(-y) = y where the negative is at hand, else by silu(y) = y / 2 for small y.
    """
    encoder = vae.encoder
    for parameter in encoder.parameters():
        parameter.zero_()  # the residual blocks stay so: the identity
    image_BCHW = _pictures(seed, -1, 3000, columns=2)
    encoder.conv_in.weight[:3, :, 1, 1] = torch.eye(3)
    map_BCHW = encoder.conv_in(image_BCHW)
    first, second, third = (block.downsamplers[0] for block in encoder.down_blocks[:3])
    first.conv.weight[:12, :3, :2, :2] = torch.eye(12).reshape(12, 3, 2, 2)
    map_BCHW = first(map_BCHW)
    component_OI, _, _ = _principal_components(map_BCHW)
    second.conv.weight[:, :, :2, :2] = component_OI[:VAE_CHANNELS].unflatten(1, (VAE_CHANNELS, 2, 2))
    component_OI, mean_I, std_O = _principal_components(second(map_BCHW))
    white_ZI = component_OI[:LATENT_CHANNELS] / std_O[:LATENT_CHANNELS, None]
    signed_OI = torch.cat([white_ZI, -white_ZI[:NEGATIVES]])
    channels = len(signed_OI)
    third.conv.weight[:channels, :, :2, :2] = signed_OI.unflatten(1, (VAE_CHANNELS, 2, 2))
    third.conv.bias[:channels] = -signed_OI @ mean_I
    third.conv.bias[channels:] = torch.tensor([PIN, -PIN])
    norm_std = ((2 * PIN**2 + channels) / VAE_CHANNELS) ** 0.5
    encoder.conv_norm_out.weight[:channels] = GAIN * norm_std
    for z in range(LATENT_CHANNELS):
        encoder.conv_out.weight[z, z, 1, 1] = 1 / GAIN if z < NEGATIVES else 2 / GAIN
        if z < NEGATIVES:
            encoder.conv_out.weight[z, LATENT_CHANNELS + z, 1, 1] = -1 / GAIN
    encoder.conv_out.bias[LATENT_CHANNELS:] = 2 * math.log(POSTERIOR_STD)


def _principal_components(map_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(directions [O, I], mean [I], std along each [O]) of 2 x 2 patches, I = O = 4 C in a convolution's order."""
    patch_NI = F.unfold(map_BCHW, 2, stride=2).transpose(1, 2).flatten(0, 1)
    mean_I = patch_NI.mean(0)
    variance_O, direction_IO = torch.linalg.eigh(torch.cov(patch_NI.T))
    return direction_IO.flip(1).T, mean_I, variance_O.flip(0).clamp(min=0).sqrt()


def _pictures(seed: int, step: int, count: int, columns: int) -> Tensor:
    """Outcomes of training examples, all kinds: [B, 3, 32, 16 * columns] in [-1, 1]."""
    rng = np.random.default_rng([seed, 2, abs(step), step < 0])
    kinds = list(Kind)
    targets = [scenes.sample_example(rng, Split.TRAIN, kinds[i % len(kinds)], columns).target for i in range(count)]
    return to_tensor([scenes.draw(target) for target in targets])


def to_tensor(images: list[np.ndarray]) -> Tensor:
    """uint8 [H, W, 3] pictures of one size -> [B, 3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(image_BCHW: Tensor) -> list[np.ndarray]:
    """[B, 3, H, W] in [-1, 1] -> uint8 [H, W, 3] pictures; inverts `to_tensor`."""
    return list(((image_BCHW.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())


@torch.no_grad()
def _set_moments(vae: Any, seed: int, step: int) -> None:
    """Write shift_factor and scaling_factor: over pictures (latent - shift) * scale has zero mean and unit std."""
    latents = [vae.encode(_pictures(seed, step + i, 512, scenes.COLUMNS[i])).latent_dist.mean.flatten() for i in (0, 1)]
    std, mean = torch.std_mean(torch.cat(latents))
    vae.register_to_config(shift_factor=round(mean.item(), 4), scaling_factor=round(1 / std.item(), 4))


def _schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: 50 steps up, then cosine to 0."""
    return min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / steps)))


# Text: prompts and what they say ------------------------------------------------------------------------------------

NOTHING = ""
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": tuple(kind.value for kind in Kind),
    "shape": (NOTHING, *SHAPES),
    "colour": (NOTHING, *COLOURS),
    "argument": (NOTHING, *COLOURS, *DIRECTIONS, *BACKGROUNDS),
}
OPTIONS = [len(options) for options in ATTRIBUTES.values()]
PAIRS = [(shape, colour) for shape in SHAPES for colour in COLOURS]


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts and what they say: `attribute_BA` indexes ATTRIBUTES, `thing_BP` marks the PAIRS a description lists."""

    prompts: list[str]
    attribute_BA: Tensor
    thing_BP: Tensor


def meaning(example: Example) -> tuple[list[int], list[float]]:
    """(index into each of ATTRIBUTES, for each of the 24 things whether the description lists it)."""
    edit, is_description = example.edit, example.edit.kind is Kind.DESCRIBE
    words = (edit.kind.value, edit.shape, edit.colour, example.target.background if is_description else edit.argument)
    listed = {(thing.shape, thing.colour) for thing in example.target.things} if is_description else set()
    indices = [options.index(word) for options, word in zip(ATTRIBUTES.values(), words, strict=True)]
    return indices, [float(pair in listed) for pair in PAIRS]


def sample_prompts(seed: int, step: int, count: int, split: Split = Split.TRAIN) -> PromptBatch:
    """Prompts of a split, every kind equally often; training batches hold no held-out combination."""
    rng = np.random.default_rng([seed, 1, step])
    kinds = scenes.COMBINATION_KINDS if split is Split.HELDOUT_COMBINATIONS else list(Kind)
    examples = [scenes.sample_example(rng, split, kinds[i % len(kinds)]) for i in range(count)]
    attributes, things = zip(*(meaning(example) for example in examples), strict=True)
    return PromptBatch([example.prompt for example in examples], torch.tensor(attributes), torch.tensor(things))


def grammar_words() -> list[str]:
    """Every word and mark that a prompt can hold, sorted."""
    templates = " ".join(wording for wordings in scenes.WORDINGS.values() for wording in wordings)
    words = {word for word in templates.split() if not word.startswith("{")} | {"a", "and", "on"}
    return sorted(words | {*SHAPES, *COLOURS, *DIRECTIONS, *BACKGROUNDS})


class Readers(nn.Module):
    """Linear readers of what a prompt says; they are thrown away, the encoder keeps what they needed."""

    def __init__(self) -> None:
        super().__init__()
        self.attributes = nn.Linear(TEXT_CHANNELS, sum(OPTIONS))
        self.things = nn.Linear(TEXT_CHANNELS, len(PAIRS))

    def loss(self, output_BD: Tensor, batch: PromptBatch) -> Tensor:
        logits = self.attributes(output_BD).split(OPTIONS, dim=1)
        attributes = [F.cross_entropy(logit_BO, batch.attribute_BA[:, a]) for a, logit_BO in enumerate(logits)]
        things = F.binary_cross_entropy_with_logits(self.things(output_BD), batch.thing_BP)
        return torch.stack(attributes).sum() + 4 * things


# T5 -----------------------------------------------------------------------------------------------------------------


def build_t5(out: Path, steps: int, seed: int) -> None:
    """Train and save tokenizer_2/ and text_encoder_2/.

    FLUX gives text tokens no positions and attends to padding, so each token's output must say what the prompt says.
    Losses: masked and plain tokens named at their place; the prompt's meaning read linearly from the mean and from
    every token, padding too; and from a thing's words, which thing they name (else a description's colours and shapes
    would be two loose bags).
    """
    tokenizer = new_t5_tokenizer()
    model = new_t5(tokenizer)
    read_mean, read_token = Readers(), Readers()
    read_word, read_thing = nn.Linear(TEXT_CHANNELS, len(tokenizer)), nn.Linear(TEXT_CHANNELS, len(PAIRS))
    trained = nn.ModuleList([model, read_mean, read_token, read_word, read_thing])
    for step, optimizer in _text_steps(trained, steps):
        batch = sample_prompts(seed, step, TEXT_BATCH)
        length = scenes.MAX_PROMPT_TOKENS + 4 * (step % 2)  # padding is seen, so train on more than one amount of it
        id_BL = tokenizer(batch.prompts, padding="max_length", max_length=length, return_tensors="pt").input_ids
        output_BLD = model(id_BL).last_hidden_state
        hidden_BL = torch.where(torch.rand(id_BL.shape) < 0.2, tokenizer.unk_token_id, id_BL)
        rebuilt_BLD = model(hidden_BL).last_hidden_state
        loss = read_mean.loss(output_BLD.mean(1), batch) + read_token.loss(*_every_token(output_BLD, batch))
        for tokens in (output_BLD, rebuilt_BLD):
            loss = loss + F.cross_entropy(read_word(tokens).flatten(0, 1), id_BL.flatten())
        thing_BL = _named_things(tokenizer, id_BL)
        loss = loss + F.cross_entropy(read_thing(output_BLD).flatten(0, 1), thing_BL.flatten(), ignore_index=-1)
        _update(optimizer, loss, "t5", step, steps)
    _scale_to_unit(model.encoder.final_layer_norm, output_BLD)
    tokenizer.save_pretrained(out / "tokenizer_2")
    model.save_pretrained(out / "text_encoder_2")


def new_t5_tokenizer() -> T5TokenizerFast:
    """One token a word or mark; unknown words become <unk>."""
    words = [(f"▁{word}", -2.0) for word in grammar_words()]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), (",", -2.0), *words]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=16)


def new_t5(tokenizer: PreTrainedTokenizerBase) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_CHANNELS,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def _every_token(output_BLD: Tensor, batch: PromptBatch) -> tuple[Tensor, PromptBatch]:
    """Each token as if it were a prompt's output of its own."""
    length = output_BLD.shape[1]
    attribute, thing = batch.attribute_BA.repeat_interleave(length, 0), batch.thing_BP.repeat_interleave(length, 0)
    return output_BLD.flatten(0, 1), PromptBatch([], attribute, thing)


def _named_things(tokenizer: PreTrainedTokenizerBase, id_BL: Tensor) -> Tensor:
    """For the two words of "red circle" the index of that thing in PAIRS, elsewhere -1: [B, L]."""
    thing_BL = torch.full_like(id_BL, -1)
    for index, (shape, colour) in enumerate(PAIRS):
        pair = torch.tensor(tokenizer.convert_tokens_to_ids([f"▁{colour}", f"▁{shape}"]))
        named = (id_BL.unfold(1, 2, 1) == pair).all(-1)
        thing_BL[:, :-1][named] = index
        thing_BL[:, 1:][named] = index
    return thing_BL


# CLIP ---------------------------------------------------------------------------------------------------------------


def build_clip(out: Path, steps: int, seed: int) -> None:
    """Train and save tokenizer/ and text_encoder/.

    Losses: the prompt's meaning read linearly from the pooled output, and matched with it among the batch's meanings.
    """
    tokenizer = new_clip_tokenizer(out / "tokenizer")
    model = new_clip(tokenizer)
    readers = Readers()
    embed_meaning = nn.Linear(sum(OPTIONS) + len(PAIRS), TEXT_CHANNELS)
    for step, optimizer in _text_steps(nn.ModuleList([model, readers, embed_meaning]), steps):
        batch = sample_prompts(seed, step, TEXT_BATCH)
        tokens = tokenizer(batch.prompts, padding=True, return_tensors="pt")
        pooled_BD = model(**tokens).pooler_output
        one_hot = [F.one_hot(batch.attribute_BA[:, a], size) for a, size in enumerate(OPTIONS)]
        meaning_BA = torch.cat([*one_hot, batch.thing_BP], dim=1)
        loss = readers.loss(pooled_BD, batch) + 0.2 * _contrast(pooled_BD, embed_meaning(meaning_BA), meaning_BA)
        _update(optimizer, loss, "clip", step, steps)
    _scale_to_unit(model.final_layer_norm, pooled_BD)
    model.save_pretrained(out / "text_encoder")


def _contrast(pooled_BD: Tensor, embedded_BD: Tensor, meaning_BA: Tensor) -> Tensor:
    """Radford et al. 2021 (arXiv 2103.00020, figure 3), temperature 0.07; prompts of one meaning share the target."""
    same_BB = (torch.cdist(meaning_BA, meaning_BA) < 0.5).float()
    target_BB = same_BB / same_BB.sum(1, keepdim=True)
    logit_BB = F.normalize(pooled_BD, dim=1) @ F.normalize(embedded_BD, dim=1).T / 0.07
    return 0.5 * (F.cross_entropy(logit_BB, target_BB) + F.cross_entropy(logit_BB.T, target_BB))


def new_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-pair encoding in which each word of the grammar is one token, saved in `folder` and loaded from there."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = _byte_pair_merges(grammar_words())
    pieces = ["<|startoftext|>", "<|endoftext|>", ",</w>", *letters, *(f"{letter}</w>" for letter in letters)]
    pieces += dict.fromkeys(first + second for first, second in merges)  # "an" + "d</w>" and "a" + "nd</w>" may both be
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=16)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merge the commonest pair until every word is one piece; ties by alphabet (the library breaks them at random)."""
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while counts := Counter(pair for pieces in spelled for pair in pairwise(pieces)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for pieces in spelled:
            for i in reversed(range(len(pieces) - 1)):
                if tuple(pieces[i : i + 2]) == best:
                    pieces[i : i + 2] = ["".join(best)]
    return merges


def new_clip(tokenizer: PreTrainedTokenizerBase) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_CHANNELS,
        intermediate_size=128,
        projection_dim=TEXT_CHANNELS,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,  # as released; prompts here use at most 13
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


@torch.no_grad()
def _scale_to_unit(norm: Any, output: Tensor) -> None:
    """Divide an encoder's last norm by the std of its outputs."""
    for parameter in norm.parameters():
        parameter.div_(output.std())


def _text_steps(trained: nn.Module, steps: int) -> Iterator[tuple[int, torch.optim.Optimizer]]:
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.01)
    warmed = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps))
    for step in range(steps):
        yield step, optimizer
        warmed.step()


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, name: str, step: int, steps: int) -> None:
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the {name} loss is {loss.item()} at step {step}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 200 == 0 or step == steps - 1:
        print(f"{name} {step}/{steps} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
