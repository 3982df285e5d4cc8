"""What one forward pass is made of, before and after the encoders.

Legend: S samples, M target tokens, C channels of a token.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kontext_train.data.encoded import StoredText
from kontext_train.data.plan import Pack, Position
from kontext_train.data.sample import BadSample, RawSample, SampleReader
from kontext_train.data.sources import Mixture
from kontext_train.models.kontext import Conditioning
from kontext_train.models.sequence import SequenceLayout, build_layout


@dataclass(frozen=True, slots=True)
class BadSampleNote:
    """A sample that could not be read, and why. visit names the time, shard and key the sample."""

    visit: int
    shard: str
    key: str
    reason: str


@dataclass(slots=True, eq=False)
class PixelBatch:
    """Samples as read: images of any size, prompts as text. Everything is on the CPU.

    Of encoded shards the images are latents, and `text` is what the encoders made of the prompts. All images lie in one
    tensor, since each tensor that a worker process hands over costs a file descriptor.
    """

    keys: list[str]  # source:shard:key of each sample, for error messages
    prompts: list[str]
    images: Tensor  # one dimension: targets, then contexts, sample after sample
    image_shapes: list[torch.Size]  # of each of them: [H, W, 3] uint8, or [2, C, h, w] mean and log-variance
    text: StoredText | None  # [S, ...]; None: the text encoders have all to do
    layout: SequenceLayout
    visits: list[int]
    weight_S: Tensor  # float32: 1 / planned samples of the whole step; 0 for filler and holes
    samples_in_step: int  # that count, over all ranks and microbatches
    position: Position  # where the run stands once this pack's step is done
    bad: list[BadSampleNote]  # its samples that could not be read

    def _images(self) -> list[Tensor]:
        parts = self.images.split([math.prod(shape) for shape in self.image_shapes])
        images = [part.view(shape) for part, shape in zip(parts, self.image_shapes, strict=True)]
        return [image.permute(2, 0, 1) for image in images] if self.images.dtype == torch.uint8 else images

    @property
    def targets(self) -> list[Tensor]:
        """[3, H, W] uint8 of each sample, or [2, C, h, w]."""
        return self._images()[: len(self.keys)]

    @property
    def contexts(self) -> list[Tensor]:
        """[3, H, W] uint8 of each context image, or [2, C, h, w], sample after sample."""
        return self._images()[len(self.keys) :]


@dataclass(slots=True, eq=False)
class PackedBatch:
    """Samples as the objective sees them."""

    x_MC: Tensor  # float32 clean target tokens
    cond: Conditioning
    visits: list[int]
    weight_S: Tensor
    keys: list[str]

    @property
    def layout(self) -> SequenceLayout:
        return self.cond.layout

    def token_weight_M(self) -> Tensor:
        """Weights that make a sum over target tokens the mean over the step's samples of each sample's token mean."""
        lengths_S = torch.tensor(self.layout.target_lengths, device=self.weight_S.device)
        return (self.weight_S / lengths_S)[self.layout.sample_of_target_M]


def read_pack(
    pack: Pack, readers: Sequence[SampleReader], mixture: Mixture, *, holes: bool, pad_to: int | None
) -> PixelBatch:
    """Read and decode a planned pack. pad_to: tokens of the sequence with padding; None adds none.

    A sample that cannot be decoded leaves a hole if `holes`: `SampleReader.hole`, of weight 0. So every pack keeps its
    layout and every step its number of samples, and no rank has to tell the others. Otherwise it raises BadSample,
    which names shard and key.
    """
    where = [mixture.locate(i) for i in pack.samples.tolist()]
    raws, bad = list[RawSample](), list[BadSampleNote]()
    for (number, row), visit, raw in zip(where, pack.visits.tolist(), _fetch(where, readers), strict=True):
        reader = readers[number]
        try:
            raws.append(reader.decode(row, raw, visit))
        except BadSample as error:
            if not holes:
                raise
            raws.append(reader.hole(row))
            location = reader.index.location(row)
            bad.append(BadSampleNote(visit, location.file.path, location.key, str(error)))
    lost = {note.visit for note in bad}
    counts = pack.counts & np.array([visit not in lost for visit in pack.visits.tolist()])
    images = [raw.target for raw in raws]
    images += [c for raw, drop in zip(raws, pack.drop_context, strict=True) if not drop for c in raw.contexts]
    tensors = [torch.as_tensor(image) for image in images]
    texts = [
        readers[number].empty_prompt if drop and raw.text is not None else raw.text
        for (number, _), raw, drop in zip(where, raws, pack.drop_prompt, strict=True)
    ]
    shapes = [mixture.shape(int(i), bool(drop)) for i, drop in zip(pack.samples, pack.drop_context, strict=True)]
    return PixelBatch(
        keys=[f"{mixture.sources[number].key}:{r.shard}:{r.key}" for (number, _), r in zip(where, raws, strict=True)],
        prompts=["" if drop else raw.prompt for raw, drop in zip(raws, pack.drop_prompt, strict=True)],
        images=torch.cat([tensor.ravel() for tensor in tensors]),
        image_shapes=[tensor.shape for tensor in tensors],
        text=_stacked(texts),
        layout=build_layout(shapes, pad_to),
        visits=pack.visits.tolist(),
        weight_S=torch.from_numpy(counts.astype("float32")) / pack.samples_in_step,
        samples_in_step=pack.samples_in_step,
        position=pack.position,
        bad=bad,
    )


def _fetch(where: Sequence[tuple[int, int]], readers: Sequence[SampleReader]) -> list[bytes]:
    """The encoded bytes of samples, in their order. where: (source, row) of each. Those of a source are read at once.

    What goes wrong here is the storage's fault and ends the run; a hole is for a sample that was read and is bad.
    """
    rows_of = defaultdict[int, list[int]](list)
    for number, row in where:
        rows_of[number].append(row)
    fetched = {number: iter(readers[number].fetch(rows)) for number, rows in rows_of.items()}
    return [next(fetched[number]) for number, _ in where]


def _stacked(texts: list[StoredText | None]) -> StoredText | None:
    """[S, ...] of samples that all have the same; None of samples of images."""
    stored = [text for text in texts if text is not None]
    if not stored:
        return None
    t5 = [text.t5_LE for text in stored if text.t5_LE is not None]
    return StoredText(torch.stack([text.clip_P for text in stored]), torch.stack(t5) if t5 else None)
