"""How samples of any size lie side by side in one packed sequence.

Legend of shapes: S samples; T text tokens; M target tokens; K context tokens; P padding tokens;
I = M + K + P image tokens; N = T + I tokens in all.

There are two orders. *Stream order* is how tokens are stored: all text tokens, then all targets, then all contexts,
then padding, each sample after sample. *Joint order* is how attention wants them: the tokens of one sample side by
side, samples of equal length next to each other (so that the CPU attention can batch them), padding last.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SampleShape:
    """Sizes of one sample, in tokens. No context means text-to-image."""

    txt: int
    target: tuple[int, int]  # rows, columns
    contexts: tuple[tuple[int, int], ...] = ()

    @property
    def target_tokens(self) -> int:
        return self.target[0] * self.target[1]

    @property
    def context_tokens(self) -> int:
        return sum(h * w for h, w in self.contexts)

    @property
    def tokens(self) -> int:
        return self.txt + self.target_tokens + self.context_tokens


@dataclass(eq=False)
class SequenceLayout:
    """Which token of a packed sequence belongs to which sample, and where it stands in that sample's picture."""

    shapes: tuple[SampleShape, ...]
    pad: int  # P, image tokens that belong to no sample; they attend only to each other and nothing reads them
    sample_of_txt_T: Tensor  # int64
    sample_of_img_I: Tensor  # int64; padding counts as sample 0
    sample_of_joint_N: Tensor
    ids_N3: Tensor  # float32 position ids (image number, row, column), joint order
    joint_N: Tensor  # int64: joint = stream[joint_N]
    stream_N: Tensor  # int64: stream = joint[stream_N]
    cu_seqlens: Tensor  # int32 [segments + 1]: segment i of the joint order is cu_seqlens[i]:cu_seqlens[i + 1]
    max_seqlen: int
    targets: int  # M, the first image tokens

    def to(self, device: torch.device | str) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @property
    def txt_tokens(self) -> int:
        return len(self.sample_of_txt_T)

    @property
    def target_lengths(self) -> list[int]:
        return [shape.target_tokens for shape in self.shapes]

    @property
    def target_in_joint_M(self) -> Tensor:
        """Where the target tokens stand in joint order."""
        return self.stream_N[self.txt_tokens : self.txt_tokens + self.targets]

    @property
    def sample_of_target_M(self) -> Tensor:
        return self.sample_of_img_I[: self.targets]

    def part(self, rank: int, ranks: int) -> "LayoutPart":
        """Every `ranks`-th token of the joint order, from `rank` on; padding is added until all parts are equal."""
        tokens = len(self.joint_N)
        whole = build_layout(self.shapes, pad_to=-(-tokens // ranks) * ranks if tokens % ranks or self.pad else None)
        joint_n = whole.joint_N[rank::ranks].contiguous()  # the tokens that are ours, in joint order
        stream_n = joint_n.sort().values  # and in stream order
        txt_t, img_i = stream_n[stream_n < whole.txt_tokens], stream_n[stream_n >= whole.txt_tokens] - whole.txt_tokens
        target_m = img_i[img_i < whole.targets]
        own = replace(
            whole,
            sample_of_txt_T=whole.sample_of_txt_T[txt_t],
            sample_of_img_I=whole.sample_of_img_I[img_i],
            sample_of_joint_N=whole.sample_of_joint_N[rank::ranks],
            ids_N3=whole.ids_N3[rank::ranks],
            joint_N=torch.searchsorted(stream_n, joint_n),
            stream_N=joint_n.argsort(),
            targets=len(target_m),
        )
        to = partial(torch.Tensor.to, device=self.joint_N.device, non_blocking=True)
        return LayoutPart(own.to(self.joint_N.device), to(txt_t), to(img_i), to(target_m), whole.pad - self.pad)


@dataclass(frozen=True, slots=True)
class LayoutPart:
    """What one of several ranks holds of a packed sequence."""

    layout: SequenceLayout  # of the part's tokens; cu_seqlens and max_seqlen are those of the whole sequence
    txt_T: Tensor  # int64 rows of the whole text stream
    img_I: Tensor  # int64 rows of the whole image stream with `added_padding` more tokens at its end
    target_M: Tensor  # int64 rows of all target tokens
    added_padding: int


def build_layout(shapes: Sequence[SampleShape], pad_to: int | None = None) -> SequenceLayout:
    """Lay out samples; with pad_to, add image tokens until the sequence has that many.

    Raises ValueError if the samples alone are longer than pad_to.
    """
    txt = np.array([s.txt for s in shapes])
    target = np.array([s.target_tokens for s in shapes])
    context = np.array([s.context_tokens for s in shapes])
    used = int((txt + target + context).sum())
    pad = 0 if pad_to is None else pad_to - used
    if pad < 0:
        raise ValueError(f"a pack of {used} tokens does not fit {pad_to}: the plan and the reader disagree on sizes")

    samples = np.arange(len(shapes))
    sample_of_stream = np.concatenate(
        [np.repeat(samples, txt), np.repeat(samples, target), np.repeat(samples, context), np.full(pad, len(shapes))]
    )
    ids = np.concatenate(
        [np.zeros((int(txt.sum()), 3))]
        + [_grid_ids(0, *s.target) for s in shapes]
        + [_grid_ids(i, *hw) for s in shapes for i, hw in enumerate(s.contexts, start=1)]
        + [np.zeros((pad, 3))]
    )
    # A stable sort by (length, sample) gathers each sample's tokens in stream order; padding sorts last.
    lengths = np.append(txt + target + context, np.iinfo(np.int64).max)
    joint = np.lexsort((sample_of_stream, lengths[sample_of_stream]))
    segments = np.sort(txt + target + context)
    segments = np.append(segments, pad) if pad else segments
    sample_of_stream[sample_of_stream == len(shapes)] = 0
    return SequenceLayout(
        shapes=tuple(shapes),
        pad=pad,
        sample_of_txt_T=torch.from_numpy(sample_of_stream[: txt.sum()]),
        sample_of_img_I=torch.from_numpy(sample_of_stream[txt.sum() :]),
        sample_of_joint_N=torch.from_numpy(sample_of_stream[joint]),
        ids_N3=torch.from_numpy(ids[joint]).float(),
        joint_N=torch.from_numpy(joint),
        stream_N=torch.from_numpy(np.argsort(joint)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(segments)]).astype(np.int32)),
        max_seqlen=int(segments.max()),
        targets=int(target.sum()),
    )


def _grid_ids(image: int, h: int, w: int) -> np.ndarray:
    """[h * w, 3] position ids of image number `image`: 0 is the target, 1, 2, ... the contexts."""
    rows, columns = np.divmod(np.arange(h * w), w)
    return np.stack([np.full(h * w, image), rows, columns], axis=1).astype(float)
