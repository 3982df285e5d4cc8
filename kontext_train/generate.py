"""Images from prompts and context images. One packed sequence serves requests of any sizes at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kontext_train.data.encode import Encoders, conditioning, image_tokens, map_by_size
from kontext_train.flow.config import SamplerConfig, ShiftConfig
from kontext_train.flow.guidance import guided
from kontext_train.flow.sampler import euler, stochastic
from kontext_train.flow.timesteps import mu_for_tokens, sampling_schedule
from kontext_train.models.kontext import Conditioning, latent_from_tokens, predict_velocity
from kontext_train.models.sequence import SampleShape, build_layout
from kontext_train.randomness import VisitRandom


@dataclass(slots=True)
class Request:
    """One image to make. Images are [3, H, W] uint8 with sides that are whole tokens."""

    prompt: str
    contexts: Sequence[Tensor]
    height: int  # pixels
    width: int
    seed: int = 0


@torch.no_grad()
def generate(
    model: nn.Module,
    encoders: Encoders,
    requests: Sequence[Request],
    sampler: SamplerConfig,
    shift: ShiftConfig,
    *,
    pixels_per_token: int,
    guidance_embed: bool,
    device: torch.device,
) -> list[Tensor]:
    """[3, H, W] uint8 images on the CPU. A request's result does not depend on its neighbours or on the batch."""
    assert encoders.text is not None
    side = pixels_per_token
    contexts = [image for r in requests for image in r.contexts]
    shapes = [
        SampleShape(
            txt=encoders.text.t5_tokens,
            target=(r.height // side, r.width // side),
            contexts=tuple((c.shape[1] // side, c.shape[2] // side) for c in r.contexts),
        )
        for r in requests
    ]
    layout = build_layout(shapes)
    context_tokens = image_tokens(contexts, encoders.autoencoder, None, [], "") if contexts else []
    channels = 4 * encoders.autoencoder.vae.config.latent_channels

    def noise(step: int) -> Tensor:
        purpose = f"sample {step}" if step else "sample"
        return VisitRandom(0, device).normal(purpose, [r.seed for r in requests], layout.target_lengths, channels)

    noise_MC = noise(0)

    def told(prompts: Sequence[str]) -> Conditioning:
        cond = conditioning(prompts, context_tokens, layout, encoders, noise_MC)
        if guidance_embed:
            cond.guidance_S = torch.full((len(requests),), sampler.embedded_guidance, device=device)
        return cond

    cond = told([r.prompt for r in requests])
    uncond = told([""] * len(requests)) if sampler.guidance != 1 else None

    def velocity(z_MC: Tensor, t_S: Tensor) -> Tensor:
        v = predict_velocity(model, z_MC, t_S, cond).float()
        return v if uncond is None else guided(v, predict_velocity(model, z_MC, t_S, uncond).float(), sampler.guidance)

    mu_S = mu_for_tokens(torch.tensor(layout.target_lengths, dtype=torch.float32, device=device), shift)
    schedule = sampling_schedule(sampler.steps, mu_S)
    if sampler.stochastic:
        x_MC = stochastic(velocity, noise, schedule, cond.layout.sample_of_target_M)
    else:
        x_MC = euler(velocity, noise_MC, schedule, cond.layout.sample_of_target_M)
    latents = [latent_from_tokens(x, *s.target) for x, s in zip(x_MC.split(layout.target_lengths), shapes, strict=True)]
    return [image.cpu() for image in map_by_size(latents, encoders.autoencoder.decode)]
