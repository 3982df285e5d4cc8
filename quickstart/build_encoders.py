"""Make the quickstart's tiny encoders: `python -m quickstart.build_encoders --out quickstart/encoders` (about 10 CPU
minutes).

They come in the layout of the released FLUX.1 repositories and load with the same calls, so nothing in the trainer
knows that they are small: `tokenizer/` (CLIPTokenizer), `text_encoder/` (CLIPTextModel), `tokenizer_2/`
(T5TokenizerFast), `text_encoder_2/` (T5EncoderModel) and `vae/` (diffusers AutoencoderKL). The finished weights are
kept in the repository; this file says where they come from.

Shapes: B = batch; L = text tokens; D = 64 text channels; C = 3 (RGB); Z = 16 latent channels; H, W = px; h, w =
latents (8 px each).
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
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
VAE_BATCH = 32
LATENT_CHANNELS = 16
LATENT_NOISE = 0.3  # highest std of the noise the decoder learns to bear; latents have unit std
NORM_OFFSET = 4.0  # see `_make_local`


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the quickstart's VAE, T5 and CLIP")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--text-steps", type=int, default=2000)
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


def build_vae(steps: int, seed: int) -> AutoencoderKL:
    """An AutoencoderKL, 8 px a latent, whose latents depend on little but their own 8 x 8 px, with scale and shift
    measured.

    Loss: L1 + L2 of the picture decoded from noisy latents, a tiny KL, unit moments per channel, and locality: a
    picture shuffled cell by cell must have the shuffled latents.
    """
    vae = new_vae()
    keep = _make_local(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    warmed = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps))
    for step in range(steps):
        image_BCHW = _pictures(seed, step, VAE_BATCH, columns=scenes.COLUMNS[step % 2])
        with torch.autocast("cpu", torch.bfloat16):
            loss, report = _vae_loss(vae, image_BCHW)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the VAE's loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        warmed.step()
        for weight, mask in keep:
            weight.data.mul_(mask)
        if step % 200 == 0 or step == steps - 1:
            print(
                f"vae {step}/{steps} " + " ".join(f"{name} {value:.4f}" for name, value in report.items()), flush=True
            )
    _set_moments(vae, seed, steps)
    return vae.eval()


def new_vae() -> AutoencoderKL:
    """Untrained: no residual blocks in the encoder's levels, one in the decoder's; about 0.2 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(VAE_CHANNELS,) * 4,
        layers_per_block=0,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def _make_local(vae: AutoencoderKL) -> list[tuple[Tensor, Tensor]]:
    """Confine the encoder to its own 8 x 8 px; returns the (weight, mask) pairs to be held during training.

    An edit should change the tokens of the edited cell and no others. So stride-1 convolutions keep their centre tap,
    and stride-2 ones the 2 x 2 taps inside their patch. What is left is GroupNorm, which sees the whole picture: large
    fixed offsets of alternating sign before the first norm make its statistics almost constant (they start near 0 and
    NORM_OFFSET).
    """
    keep = []
    for module in vae.encoder.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            mask = torch.zeros(3, 3)
            mask[1, 1] = 1.0
            if module.stride == (2, 2):
                mask = torch.zeros(3, 3)
                mask[:2, :2] = 1.0
            fan_in = module.in_channels * mask.sum().item()
            module.weight.data.normal_(0, fan_in**-0.5).mul_(mask)
            nn.init.zeros_(module.bias)
            keep.append((module.weight, mask))
    vae.encoder.conv_out.bias.data[LATENT_CHANNELS:] = 2 * math.log(0.05)  # a small posterior std from the start
    sign = torch.tensor([1.0, -1.0]).repeat(VAE_CHANNELS // 2)
    vae.encoder.down_blocks[2].downsamplers[0].conv.bias.data = NORM_OFFSET * sign
    for resnet in vae.encoder.mid_block.resnets:
        resnet.conv1.bias.data = NORM_OFFSET * sign
        resnet.conv2.weight.data.mul_(0.3)
    for module in vae.encoder.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.data.fill_(NORM_OFFSET)
            module.bias.data = -NORM_OFFSET * sign
    return keep


def _vae_loss(vae: AutoencoderKL, image_BCHW: Tensor) -> tuple[Tensor, dict[str, float]]:
    posterior = vae.encode(image_BCHW).latent_dist
    mean_BZhw = posterior.mean.float()
    noise_std_B = LATENT_NOISE * torch.rand(len(image_BCHW), 1, 1, 1)
    std_BZhw = (posterior.std.float() ** 2 + noise_std_B**2).sqrt()
    picture_BCHW = vae.decode(mean_BZhw + std_BZhw * torch.randn_like(mean_BZhw)).sample.float()
    error_BCHW = picture_BCHW - image_BCHW
    pixels = error_BCHW.abs().mean() + 4 * error_BCHW.square().mean()
    kl = posterior.kl().mean() / mean_BZhw[0].numel()
    white = _whiteness(mean_BZhw.transpose(0, 1).flatten(1))
    order = torch.randperm(len(image_BCHW) * image_BCHW.shape[2] * image_BCHW.shape[3] // scenes.CELL_PX**2)
    moved_BZhw = vae.encode(_shuffle_cells(image_BCHW, order, scenes.CELL_PX)).latent_dist.mean.float()
    leak = (moved_BZhw - _shuffle_cells(mean_BZhw, order, scenes.CELL_PX // 8)).square().mean()
    loss = pixels + 1e-5 * kl + 0.1 * white + 0.5 * leak
    report = {
        "mae": error_BCHW.abs().mean().item() / 2,
        "kl": kl.item(),
        "white": white.item(),
        "leak": leak.item(),
    }
    return loss, report | {"posterior_std": posterior.std.mean().item()}


def _whiteness(latent_ZN: Tensor) -> Tensor:
    """Squared distance of the channels' mean from 0 and covariance from 1, a channel. Else most would repeat the background."""
    covariance_ZZ = torch.cov(latent_ZN)
    return ((covariance_ZZ - torch.eye(len(latent_ZN))).square().sum() + latent_ZN.mean(1).square().sum()) / len(latent_ZN)


def _shuffle_cells(map_BCHW: Tensor, order: Tensor, size: int) -> Tensor:
    """Put the `size` x `size` cells of a whole batch in another order."""
    batch, channels, height, width = map_BCHW.shape
    grid = map_BCHW.reshape(batch, channels, height // size, size, width // size, size).permute(0, 2, 4, 1, 3, 5)
    cells = grid.reshape(-1, channels, size, size)[order].reshape(grid.shape)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(map_BCHW.shape)


def _pictures(seed: int, step: int, count: int, columns: int) -> Tensor:
    """Outcomes of training examples, all kinds: [B, 3, 32, 16 * columns] in [-1, 1]."""
    rng = np.random.default_rng([seed, step])
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
def _set_moments(vae: AutoencoderKL, seed: int, step: int) -> None:
    """Write shift_factor and scaling_factor such that (latent - shift) * scale has zero mean and unit std over pictures."""
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
PAIRS = [(shape, colour) for shape in SHAPES for colour in COLOURS]


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts and their meaning: `attribute_BA` indices into ATTRIBUTES, `thing_BP` which of the 24 things a description lists."""

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
        self.attributes = nn.ModuleList(nn.Linear(TEXT_CHANNELS, len(options)) for options in ATTRIBUTES.values())
        self.things = nn.Linear(TEXT_CHANNELS, len(PAIRS))

    def loss(self, output_BD: Tensor, batch: PromptBatch) -> Tensor:
        attributes = [
            F.cross_entropy(reader(output_BD), batch.attribute_BA[:, a]) for a, reader in enumerate(self.attributes)
        ]
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
    heads = nn.ModuleDict(
        {
            "mean": Readers(),
            "token": Readers(),
            "word": nn.Linear(TEXT_CHANNELS, len(tokenizer)),
            "thing": nn.Linear(TEXT_CHANNELS, len(PAIRS)),
        }
    )
    for step, optimizer in _text_steps([*model.parameters(), *heads.parameters()], steps):
        batch = sample_prompts(seed, step, TEXT_BATCH)
        length = scenes.MAX_PROMPT_TOKENS + 4 * (step % 2)  # padding is seen, so train on more than one amount of it
        id_BL = tokenizer(batch.prompts, padding="max_length", max_length=length, return_tensors="pt").input_ids
        output_BLD = model(id_BL).last_hidden_state
        hidden_BL = torch.where(torch.rand(id_BL.shape) < 0.2, tokenizer.unk_token_id, id_BL)
        rebuilt_BLD = model(hidden_BL).last_hidden_state
        loss = heads["mean"].loss(output_BLD.mean(1), batch) + heads["token"].loss(*_every_token(output_BLD, batch))
        for tokens in (output_BLD, rebuilt_BLD):
            loss = loss + F.cross_entropy(heads["word"](tokens).flatten(0, 1), id_BL.flatten())
        thing_BL = _named_things(tokenizer, id_BL)
        loss = loss + F.cross_entropy(heads["thing"](output_BLD).flatten(0, 1), thing_BL.flatten(), ignore_index=-1)
        _update(optimizer, loss, "t5", step, steps)
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
        shape_id, colour_id = tokenizer.convert_tokens_to_ids([f"▁{shape}", f"▁{colour}"])
        named = (id_BL[:, :-1] == colour_id) & (id_BL[:, 1:] == shape_id)
        thing_BL[:, :-1][named] = index
        thing_BL[:, 1:][named] = index
    return thing_BL


# CLIP ---------------------------------------------------------------------------------------------------------------


def build_clip(out: Path, steps: int, seed: int) -> None:
    """Train and save tokenizer/ and text_encoder/: meaning read linearly from the pooled output, and matched to its own in a batch."""
    tokenizer = new_clip_tokenizer(out / "tokenizer")
    model = new_clip(tokenizer)
    readers = Readers()
    size = sum(len(options) for options in ATTRIBUTES.values()) + len(PAIRS)
    embed_meaning = nn.Linear(size, TEXT_CHANNELS)
    for step, optimizer in _text_steps(
        [*model.parameters(), *readers.parameters(), *embed_meaning.parameters()], steps
    ):
        batch = sample_prompts(seed, step, TEXT_BATCH)
        tokens = tokenizer(batch.prompts, padding=True, return_tensors="pt")
        pooled_BD = model(**tokens).pooler_output
        one_hot = [F.one_hot(batch.attribute_BA[:, a], len(o)).float() for a, o in enumerate(ATTRIBUTES.values())]
        meaning_BA = torch.cat([*one_hot, batch.thing_BP], dim=1)
        loss = readers.loss(pooled_BD, batch) + 0.2 * _contrast(pooled_BD, embed_meaning(meaning_BA), meaning_BA)
        _update(optimizer, loss, "clip", step, steps)
    model.save_pretrained(out / "text_encoder")


def _contrast(pooled_BD: Tensor, embedded_BD: Tensor, meaning_BA: Tensor) -> Tensor:
    """Radford et al. 2021 (arXiv 2103.00020, figure 3), temperature 0.07; prompts of one meaning share the target."""
    same_BB = (torch.cdist(meaning_BA, meaning_BA) < 0.5).float()
    target_BB = same_BB / same_BB.sum(1, keepdim=True)
    logit_BB = F.normalize(pooled_BD, dim=1) @ F.normalize(embedded_BD, dim=1).T / 0.07
    return 0.5 * (F.cross_entropy(logit_BB, target_BB) + F.cross_entropy(logit_BB.T, target_BB))


def new_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-pair encoding in which each word of the grammar is one token, saved in `folder` and loaded from there."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    specials = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        show_progress=False,
        special_tokens=specials,
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
    )
    bpe.train_from_iterator([*grammar_words(), ",", *letters], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))  # vocab.json and merges.txt
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=16)
    tokenizer.save_pretrained(folder)
    return tokenizer


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


def _text_steps(parameters: list[nn.Parameter], steps: int) -> Iterator[tuple[int, torch.optim.Optimizer]]:
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.01)
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
