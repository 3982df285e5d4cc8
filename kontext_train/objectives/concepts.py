"""The concepts that a safety run suppresses: read from a list, encoded once, then packed beside ordinary samples.

Legend: L text tokens of a prompt, E, P, C channels of text, pooled vector and image tokens, K context tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kontext_train.data.config import Crop
from kontext_train.data.encode import Encoders, image_tokens
from kontext_train.data.transforms import Transform, load_image
from kontext_train.errors import ConfigError
from kontext_train.models.kontext import Conditioning
from kontext_train.models.sequence import SampleShape, build_layout
from kontext_train.objectives.concept_list import Concept
from kontext_train.randomness import VisitRandom, generator


@dataclass(slots=True, eq=False)
class EncodedConcept:
    """On the CPU, or a list of thousands would fill a GPU."""

    shape: SampleShape
    txt_2LE: Tensor  # of its prompt and of its anchor's, the empty prompt if it has none
    vec_2P: Tensor
    context_KC: Tensor
    turned: bool  # it has no anchor prompt


@dataclass(slots=True, eq=False)
class ConceptPack:
    """Concepts side by side. `concept` and `anchor` differ in their text alone."""

    concept: Conditioning
    anchor: Conditioning
    turned_S: Tensor  # bool
    visits: list[int]


class ConceptBank:
    def __init__(self, encoded: Sequence[EncodedConcept], device: torch.device) -> None:
        self.encoded, self.device = list(encoded), device

    def pack(self, visits: Sequence[int], random: VisitRandom) -> ConceptPack:
        """One concept for each visit, drawn by the visit: the same on every rank and at every world size."""
        drawn = [
            self.encoded[int(generator(random.seed, "concept", visit).integers(len(self.encoded)))] for visit in visits
        ]
        layout = build_layout([one.shape for one in drawn]).to(self.device)
        context_KC = torch.cat([one.context_KC for one in drawn]).to(self.device)

        def told(which: int) -> Conditioning:
            txt_TE = torch.cat([one.txt_2LE[which] for one in drawn]).to(self.device)
            vec_SP = torch.stack([one.vec_2P[which] for one in drawn]).to(self.device)
            return Conditioning(txt_TE, vec_SP, context_KC, layout)

        turned_S = torch.tensor([one.turned for one in drawn], device=self.device)
        return ConceptPack(told(0), told(1), turned_S, list(visits))


@torch.no_grad()
def encode_concepts(
    concepts: Sequence[Concept], encoders: Encoders, transform: Transform, device: torch.device
) -> ConceptBank:
    """transform: of context images, as the run has it, but cropped around the centre.

    Raises ConfigError if an image cannot be read, or a size is no whole number of tokens.
    """
    transform = replace(transform, crop=Crop.center)
    return ConceptBank([_encoded(concept, encoders, transform, device) for concept in concepts], device)


def _encoded(concept: Concept, encoders: Encoders, transform: Transform, device: torch.device) -> EncodedConcept:
    assert encoders.text is not None
    side, channels = transform.multiple, 4 * encoders.autoencoder.vae.config.latent_channels
    images = [_image(file, transform).to(device) for file in concept.context]
    height, width = concept.size or images[0].shape[1:]
    if height % side or width % side:
        rule = f"asks for {height} x {width} pixels, which must be multiples of {side}, the pixels of a token"
        raise ConfigError("objective.concepts", concept.prompt, rule, "Round them")
    tokens = image_tokens(images, encoders.autoencoder, None, [], "") if images else []
    txt_2LE, vec_2P = encoders.text([concept.prompt, concept.anchor or ""])
    assert vec_2P is not None
    shape = SampleShape(
        txt=txt_2LE.shape[1],
        target=(height // side, width // side),
        contexts=tuple((image.shape[1] // side, image.shape[2] // side) for image in images),
    )
    context_KC = torch.cat([*tokens, vec_2P.new_zeros(0, channels)])
    return EncodedConcept(shape, txt_2LE.cpu(), vec_2P.cpu(), context_KC.cpu(), concept.anchor is None)


def _image(file: Path, transform: Transform) -> Tensor:
    """[3, H, W] uint8."""
    try:
        return torch.from_numpy(load_image(str(file), transform)).permute(2, 0, 1)
    except (ValueError, OSError) as error:
        raise ConfigError("objective.concepts", str(file), f"cannot be read ({error})", "Correct the list") from error
