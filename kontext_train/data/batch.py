"""What one forward pass is made of, before and after the encoders.

Legend: S samples, M target tokens, C channels of a token.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kontext_train.data.index import SampleLocation
from kontext_train.data.plan import Pack, Position
from kontext_train.data.sample import BadSample, RawSample, SampleReader
from kontext_train.data.sources import Mixture
from kontext_train.models.kontext import Conditioning
from kontext_train.models.sequence import SampleShape, SequenceLayout, build_layout


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

    All pixels lie in one tensor, since each tensor that a worker process hands over costs a file descriptor.
    """

    keys: list[str]  # shard:key of each sample, for error messages
    prompts: list[str]
    pixels: Tensor  # uint8, one dimension: targets, then contexts, sample after sample, each [H, W, 3]
    image_hw: list[tuple[int, int]]  # of each of them
    layout: SequenceLayout
    visits: list[int]
    weight_S: Tensor  # float32: 1 / planned samples of the whole step; 0 for filler and holes
    samples_in_step: int  # that count, over all ranks and microbatches
    position: Position  # where the run stands once this pack's step is done
    bad: list[BadSampleNote]  # its samples that could not be read

    def _images(self) -> list[Tensor]:
        parts = self.pixels.split([3 * h * w for h, w in self.image_hw])
        return [part.view(h, w, 3).permute(2, 0, 1) for part, (h, w) in zip(parts, self.image_hw, strict=True)]

    @property
    def targets(self) -> list[Tensor]:
        """[3, H, W] uint8 of each sample."""
        return self._images()[: len(self.keys)]

    @property
    def contexts(self) -> list[Tensor]:
        """[3, H, W] uint8 of each context image, sample after sample."""
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

    A sample that cannot be read leaves a hole if `holes`: black images of the planned sizes, the empty prompt, weight
    0. So every pack keeps its layout and every step its number of samples, and no rank has to tell the others.
    Otherwise it raises BadSample, which names shard and key.
    """
    where = [mixture.locate(i) for i in pack.samples.tolist()]
    shapes = [mixture.shape(int(i), bool(drop)) for i, drop in zip(pack.samples, pack.drop_context, strict=True)]
    encoded = _fetch(where, readers)
    raws, bad = list[RawSample](), list[BadSampleNote]()
    for (number, row), visit, shape, raw in zip(where, pack.visits.tolist(), shapes, encoded, strict=True):
        try:
            raws.append(readers[number].decode(row, raw))
        except BadSample as error:
            if not holes:
                raise
            location = readers[number].index.location(row)
            raws.append(_hole(location, shape, mixture.pixels_per_token))
            bad.append(BadSampleNote(visit, location.file.path, location.key, str(error)))
    lost = {note.visit for note in bad}
    counts = pack.counts & np.array([visit not in lost for visit in pack.visits.tolist()])
    images = [raw.target for raw in raws]
    images += [c for raw, drop in zip(raws, pack.drop_context, strict=True) if not drop for c in raw.contexts]
    return PixelBatch(
        keys=[f"{raw.shard}:{raw.key}" for raw in raws],
        prompts=["" if drop else raw.prompt for raw, drop in zip(raws, pack.drop_prompt, strict=True)],
        pixels=torch.from_numpy(np.concatenate([image.ravel() for image in images])),
        image_hw=[image.shape[:2] for image in images],
        layout=build_layout(shapes, pad_to),
        visits=pack.visits.tolist(),
        weight_S=torch.from_numpy(counts.astype("float32")) / pack.samples_in_step,
        samples_in_step=pack.samples_in_step,
        position=pack.position,
        bad=bad,
    )


def _fetch(where: Sequence[tuple[int, int]], readers: Sequence[SampleReader]) -> list[bytes]:
    """The encoded bytes of samples, in their order. where: (source, row) of each. Those of a source are read at once.

    What goes wrong here is the storage's fault and ends the run: a hole is for a sample that is bad wherever it is read.
    """
    rows_of = defaultdict[int, list[int]](list)
    for number, row in where:
        rows_of[number].append(row)
    fetched = {number: iter(readers[number].fetch(rows)) for number, rows in rows_of.items()}
    return [next(fetched[number]) for number, _ in where]


def _hole(location: SampleLocation, shape: SampleShape, pixels_per_token: int) -> RawSample:
    """What stands where a sample could not be read."""

    def black(grid: tuple[int, int]) -> npt.NDArray[np.uint8]:
        return np.zeros((grid[0] * pixels_per_token, grid[1] * pixels_per_token, 3), dtype=np.uint8)

    return RawSample(
        location.key, location.name, "", {}, black(shape.target), [black(context) for context in shape.contexts]
    )
