"""From pixels (or stored latents) and prompts to latents and text tokens, on the device that trains."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kontext_train.data.batch import PackedBatch, PixelBatch
from kontext_train.data.encoded import StoredText
from kontext_train.data.sample import SampleReader
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
    text: TextEncoders | None  # None: every prompt comes encoded
    sample_latents: bool = True

    def blocks(self) -> Iterator[nn.Module]:
        """What computes alone on a rank, be the encoders sharded or not."""
        yield self.autoencoder.vae.encoder
        if self.text is not None:
            yield from self.text.blocks()


def load_encoders(config: EncodersConfig, device: torch.device, *, text: bool = True) -> Encoders:
    """The encoders of a folder in the released layout, frozen, on a device. text: whether to load those of text."""
    dtype = getattr(torch, config.dtype.value)
    autoencoder = Autoencoder(Path(config.path) / "vae", dtype).to(device)
    text_encoders = TextEncoders(config.path, config.t5_tokens, dtype).to(device) if text else None
    return Encoders(autoencoder, text_encoders, config.sample_latents)


@torch.no_grad()
def encode(batch: PixelBatch, encoders: Encoders, random: VisitRandom) -> PackedBatch:
    """Latents, text tokens and pooled vectors of a batch; posterior noise is keyed by visit like all other noise."""
    noise = random if encoders.sample_latents else None
    x_MC = torch.cat(image_tokens(batch.targets, encoders.autoencoder, noise, batch.visits, "target"))
    owners = [v for v, s in zip(batch.visits, batch.layout.shapes, strict=True) for _ in s.contexts]
    places = [i for s in batch.layout.shapes for i in range(len(s.contexts))]
    visits = [(v << 8) + i for v, i in zip(owners, places, strict=True)]  # each context image draws its own noise
    context = image_tokens(batch.contexts, encoders.autoencoder, noise, visits, "context") if batch.contexts else []
    cond = conditioning(batch.prompts, context, batch.layout, encoders, x_MC, batch.text)
    return PackedBatch(x_MC, cond, batch.visits, batch.weight_S.to(x_MC.device), batch.keys)


def conditioning(
    prompts: Sequence[str],
    context_tokens: Sequence[Tensor],
    layout: SequenceLayout,
    encoders: Encoders,
    like: Tensor,
    stored: StoredText | None = None,
) -> Conditioning:
    """Text and context tokens of a pack. like: any [*, C] tensor of image tokens on the right device.

    stored: what the text encoders made of the prompts earlier.
    """
    txt_STE, vec_SP = _text(prompts, encoders.text, stored, like.device)
    return Conditioning(
        txt_TE=txt_STE.flatten(0, 1),
        vec_SP=vec_SP,
        context_KC=torch.cat([*context_tokens, like[:0]]),
        layout=layout.to(like.device),
    )


def _text(
    prompts: Sequence[str], encoders: TextEncoders | None, stored: StoredText | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """[S, L, E] and [S, P] float32."""
    if stored is not None and stored.t5_LE is not None:
        return stored.t5_LE.to(device).float(), stored.clip_P.to(device)
    assert encoders is not None  # train.py loads them unless all text is stored
    if stored is None:
        return encoders(prompts)
    return encoders(prompts, pooled=False)[0], stored.clip_P.to(device)


def encode_empty_prompt(encoders: Encoders, reader: SampleReader, device: torch.device) -> tuple[Tensor, Tensor]:
    """Text tokens [L, E] and pooled vector [P], float32: from the encoders, or as stored beside a source's shards."""
    stored = None
    if encoders.text is None:
        text = reader.empty_prompt
        assert text.t5_LE is not None
        stored = StoredText(text.clip_P[None], text.t5_LE[None])
    txt_1LE, vec_1P = _text([""], encoders.text, stored, device)
    return txt_1LE[0], vec_1P[0]


def image_tokens(
    images: Sequence[Tensor], autoencoder: Autoencoder, random: VisitRandom | None, visits: Sequence[int], purpose: str
) -> list[Tensor]:
    """[tokens, C] float32 for each image, [3, H, W] uint8 or stored moments [2, C, h, w].

    random: None takes the posterior's mean.
    """

    def posterior(stacked: Tensor) -> Tensor:
        return autoencoder.posterior(autoencoder.moments(stacked) if stacked.dtype == torch.uint8 else stacked)

    latents = map_by_size(images, posterior)
    if random is None:
        return [tokens_from_latent(mean) for mean, _ in latents]
    noise = random.normal(f"autoencoder {purpose}", visits, [pair[0].numel() for pair in latents], 1)
    parts = noise.split([pair[0].numel() for pair in latents])
    return [tokens_from_latent(mean + std * n.view_as(mean)) for (mean, std), n in zip(latents, parts, strict=True)]


def as_pixels(images: Sequence[Tensor], autoencoder: Autoencoder) -> list[Tensor]:
    """[3, H, W] uint8 on the CPU of images of a batch, which stored moments are decoded to."""

    def decoded(stacked: Tensor) -> Tensor:
        return stacked if stacked.dtype == torch.uint8 else autoencoder.decode(autoencoder.posterior(stacked)[:, 0])

    return [image.cpu() for image in map_by_size(images, decoded)]


def map_by_size(images: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """function on batches of equal size; results in the order of `images`."""
    by_size: dict[torch.Size, list[int]] = defaultdict(list)
    for i, image in enumerate(images):
        by_size[image.shape].append(i)
    results: dict[int, Tensor] = {}
    for rows in by_size.values():
        results |= dict(zip(rows, function(torch.stack([images[i] for i in rows])), strict=True))
    return [results[i] for i in range(len(images))]
