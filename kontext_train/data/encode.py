"""From pixels and prompts to latents and text tokens, on the device that trains."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kontext_train.data.batch import PackedBatch, PixelBatch
from kontext_train.models.autoencoder import Autoencoder
from kontext_train.models.config import EncodersConfig
from kontext_train.models.kontext import Conditioning, tokens_from_latent
from kontext_train.models.sequence import SequenceLayout
from kontext_train.models.text_encoders import TextEncoders
from kontext_train.randomness import VisitRandom


@dataclass(slots=True)
class Encoders:
    """The frozen encoders of a run."""

    autoencoder: Autoencoder
    text: TextEncoders
    sample_latents: bool = True


def load_encoders(config: EncodersConfig, device: torch.device) -> Encoders:
    """The encoders of a folder in the released layout, frozen, on a device."""
    dtype = getattr(torch, config.dtype.value)
    autoencoder = Autoencoder(Path(config.path) / "vae", dtype).to(device)
    return Encoders(autoencoder, TextEncoders(config.path, config.t5_tokens, dtype).to(device), config.sample_latents)


@torch.no_grad()
def encode(batch: PixelBatch, encoders: Encoders, random: VisitRandom) -> PackedBatch:
    """Latents, text tokens and pooled vectors of a batch; posterior noise is keyed by visit like all other noise."""
    noise = random if encoders.sample_latents else None
    x_MC = torch.cat(image_tokens(batch.targets, encoders.autoencoder, noise, batch.visits, "target"))
    owners = [v for v, s in zip(batch.visits, batch.layout.shapes, strict=True) for _ in s.contexts]
    places = [i for s in batch.layout.shapes for i in range(len(s.contexts))]
    visits = [(v << 8) + i for v, i in zip(owners, places, strict=True)]  # each context image draws its own noise
    context = image_tokens(batch.contexts, encoders.autoencoder, noise, visits, "context") if batch.contexts else []
    cond = conditioning(batch.prompts, context, batch.layout, encoders, x_MC)
    return PackedBatch(x_MC, cond, batch.visits, batch.weight_S.to(x_MC.device), batch.keys)


def conditioning(
    prompts: Sequence[str], context_tokens: Sequence[Tensor], layout: SequenceLayout, encoders: Encoders, like: Tensor
) -> Conditioning:
    """Text and context tokens of a pack. like: any [*, C] tensor of image tokens on the right device."""
    txt_STE, vec_SP = encoders.text(prompts)
    return Conditioning(
        txt_TE=txt_STE.flatten(0, 1),
        vec_SP=vec_SP,
        context_KC=torch.cat([*context_tokens, like[:0]]),
        layout=layout.to(like.device),
    )


def image_tokens(
    images: Sequence[Tensor], autoencoder: Autoencoder, random: VisitRandom | None, visits: Sequence[int], purpose: str
) -> list[Tensor]:
    """[tokens, C] float32 for each [3, H, W] uint8 image. random: None takes the posterior's mean."""
    latents = map_by_size(images, lambda stacked: torch.stack(autoencoder.encode(stacked), dim=1))
    if random is None:
        return [tokens_from_latent(mean) for mean, _ in latents]
    noise = random.normal(f"autoencoder {purpose}", visits, [pair[0].numel() for pair in latents], 1)
    parts = noise.split([pair[0].numel() for pair in latents])
    return [tokens_from_latent(mean + std * n.view_as(mean)) for (mean, std), n in zip(latents, parts, strict=True)]


def map_by_size(images: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """function on batches of equal size; results in the order of `images`."""
    by_size: dict[torch.Size, list[int]] = defaultdict(list)
    for i, image in enumerate(images):
        by_size[image.shape].append(i)
    results: dict[int, Tensor] = {}
    for rows in by_size.values():
        results |= dict(zip(rows, function(torch.stack([images[i] for i in rows])), strict=True))
    return [results[i] for i in range(len(images))]
