"""Small FLUX networks and packed inputs that several tests share."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kontext_train.models.config import FluxConfig
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import Conditioning
from kontext_train.models.sequence import SampleShape, build_layout

TINY = FluxConfig(
    in_channels=16,
    vec_in_dim=12,
    context_in_dim=20,
    hidden_size=48,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=[4, 10, 10],
)

# Text-to-image, one context, two contexts of other sizes than the target, and a neighbour of equal length.
SHAPES = (
    SampleShape(txt=5, target=(3, 4)),
    SampleShape(txt=5, target=(2, 3), contexts=((4, 2),)),
    SampleShape(txt=5, target=(4, 4), contexts=((2, 2), (3, 5))),
    SampleShape(txt=5, target=(4, 3)),
)


def random_flux(config: FluxConfig = TINY, **changes: object) -> Flux:
    """A network whose every parameter is random, biases and norms too: a zero anywhere would hide an error."""
    model = Flux(replace(config, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else parameter.shape[1] ** -0.5))
            if name.endswith(".scale"):
                parameter.add_(1.0)
    return model


@dataclass
class Sample:
    shape: SampleShape
    z: Tensor
    contexts: list[Tensor]
    txt: Tensor
    vec: Tensor
    t: Tensor
    guidance: Tensor


def random_sample(shape: SampleShape, config: FluxConfig = TINY) -> Sample:
    def tokens(hw: tuple[int, int]) -> Tensor:
        return torch.randn(hw[0] * hw[1], config.in_channels)

    return Sample(
        shape=shape,
        z=tokens(shape.target),
        contexts=[tokens(hw) for hw in shape.contexts],
        txt=torch.randn(shape.txt, config.context_in_dim),
        vec=torch.randn(config.vec_in_dim),
        t=torch.rand(()),
        guidance=1 + 5 * torch.rand(()),
    )


def pack(
    samples: list[Sample], guidance: bool = False, pad_to: int | None = None
) -> tuple[Tensor, Tensor, Conditioning]:
    """z_MC, t_S and the conditioning of samples packed side by side."""
    contexts = [c for s in samples for c in s.contexts]
    cond = Conditioning(
        txt_TE=torch.cat([s.txt for s in samples]),
        vec_SP=torch.stack([s.vec for s in samples]),
        context_KC=torch.cat([*contexts, samples[0].z[:0]]),
        layout=build_layout([s.shape for s in samples], pad_to),
        guidance_S=torch.stack([s.guidance for s in samples]) if guidance else None,
    )
    return torch.cat([s.z for s in samples]), torch.stack([s.t for s in samples]), cond
