"""The concepts that a safety run suppresses: read from a list, encoded once, then packed beside ordinary samples.

Legend: L text tokens of a prompt, E, P, C channels of text, pooled vector and image tokens, K context tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kontext_train.data.config import Crop
from kontext_train.data.encode import Encoders, image_tokens
from kontext_train.data.transforms import Transform, load_image
from kontext_train.errors import ConfigError
from kontext_train.models.flops import ForwardFlops
from kontext_train.models.kontext import Conditioning
from kontext_train.models.sequence import SampleShape, build_layout
from kontext_train.objectives.concept_list import Concept
from kontext_train.randomness import VisitRandom, generator

AT_ONCE = 16  # concepts whose texts are encoded in one go


@dataclass(slots=True, eq=False)
class EncodedConcept:
    """On the CPU, or a list of thousands would fill a GPU."""

    shape: SampleShape
    txt_3LE: Tensor  # of its prompt, of its anchor's, which is the empty prompt if it has none, and of its goal's
    vec_3P: Tensor
    context_KC: Tensor
    turned: bool  # it has no anchor prompt


@dataclass(slots=True, eq=False)
class ConceptPack:
    """Concepts side by side. `concept`, `anchor` and `goal` differ in their text alone."""

    concept: Conditioning
    anchor: Conditioning
    goal: Conditioning
    turned_S: Tensor  # bool
    visits: list[int]


class ConceptBank:
    def __init__(self, encoded: Sequence[EncodedConcept], device: torch.device) -> None:
        self.encoded, self.device = list(encoded), device

    def mean_flops(self, forward: ForwardFlops) -> float:
        """Of a forward pass of one concept."""
        return forward.samples(one.shape for one in self.encoded) / len(self.encoded)

    def pack(self, visits: Sequence[int], random: VisitRandom) -> ConceptPack:
        """One concept for each visit, drawn by the visit: the same on every rank and at every world size."""
        drawn = [
            self.encoded[int(generator(random.seed, "concept", visit).integers(len(self.encoded)))] for visit in visits
        ]
        layout = build_layout([one.shape for one in drawn]).to(self.device)
        context_KC = torch.cat([one.context_KC for one in drawn]).to(self.device)

        def told(which: int) -> Conditioning:
            txt_TE = torch.cat([one.txt_3LE[which] for one in drawn]).to(self.device)
            vec_SP = torch.stack([one.vec_3P[which] for one in drawn]).to(self.device)
            return Conditioning(txt_TE, vec_SP, context_KC, layout)

        turned_S = torch.tensor([one.turned for one in drawn], device=self.device)
        return ConceptPack(told(0), told(1), told(2), turned_S, list(visits))


@torch.no_grad()
def encode_concepts(
    concepts: Sequence[Concept], encoders: Encoders, transform: Transform, device: torch.device
) -> ConceptBank:
    """transform: of context images, as the run has it, but cropped around the centre.

    Raises ConfigError if an image cannot be read, or a size is no whole number of tokens.
    """
    transform = replace(transform, crop=Crop.center)
    encoded = list[EncodedConcept]()
    for first in range(0, len(concepts), AT_ONCE):
        encoded += _encoded(concepts[first : first + AT_ONCE], encoders, transform, device)
    return ConceptBank(encoded, device)


def _encoded(
    concepts: Sequence[Concept], encoders: Encoders, transform: Transform, device: torch.device
) -> Iterator[EncodedConcept]:
    assert encoders.text is not None
    texts = [text for c in concepts for text in (c.prompt, c.anchor or "", c.prompt if c.goal is None else c.goal)]
    txt_NLE, vec_NP = encoders.text(texts)
    assert vec_NP is not None
    none_KC = vec_NP.new_zeros(0, 4 * encoders.autoencoder.vae.config.latent_channels)
    for i, concept in enumerate(concepts):
        images = [_image(file, transform).to(device) for file in concept.context]
        shape = _shape(concept, images, transform.multiple, txt_NLE.shape[1])
        context_KC = torch.cat([none_KC, *(image_tokens(images, encoders.autoencoder, None, [], "") if images else [])])
        txt_3LE, vec_3P = (rows[3 * i : 3 * i + 3].cpu() for rows in (txt_NLE, vec_NP))
        yield EncodedConcept(shape, txt_3LE, vec_3P, context_KC.cpu(), concept.anchor is None)


def _shape(concept: Concept, images: Sequence[Tensor], side: int, txt: int) -> SampleShape:
    height, width = concept.size or images[0].shape[1:]
    if height % side or width % side:
        rule = f"asks for {height} x {width} pixels, which must be multiples of {side}, the pixels of a token"
        raise ConfigError("objective.concepts", concept.prompt, rule, "Round them")
    grids = tuple((image.shape[1] // side, image.shape[2] // side) for image in images)
    return SampleShape(txt=txt, target=(height // side, width // side), contexts=grids)


def _image(file: Path, transform: Transform) -> Tensor:
    """[3, H, W] uint8."""
    try:
        return torch.from_numpy(load_image(str(file), transform)).permute(2, 0, 1)
    except (ValueError, OSError) as error:
        raise ConfigError("objective.concepts", str(file), f"cannot be read ({error})", "Correct the list") from error
