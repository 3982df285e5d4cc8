"""One sample from its shard: range-read, then `transforms` or, of an encoded shard, `encoded`. No order, no batch.

Legend: H, W pixels after resizing; `hw` is (height, width) in pixels.
"""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kontext_train.data.encoded import StoredText, from_bytes, read_empty_prompt
from kontext_train.data.index import SampleLocation, ShardIndex
from kontext_train.data.shard import Span, parse_sample_json
from kontext_train.data.transforms import Transform

OPEN_SHARDS = 32  # a process: samples of a step come from anywhere, and 1,024 open files is a common limit


class BadSample(ValueError):
    """A sample whose bytes are not what its index says. The message carries shard, key and reason.

    It takes one string and nothing else, so that a DataLoader worker can hand it to the parent unchanged.
    """


@dataclass(slots=True)
class RawSample:
    """A sample as read. H, W (h, w) differ from image to image.

    `target` and each of `contexts`: uint8 [H, W, 3], RGB; of an encoded shard a tensor [2, C, h, w], the mean and the
    log-variance of its latents, and then `text` is its prompt as encoded.
    """

    key: str
    shard: str
    prompt: str
    metadata: dict[str, Any]  # the sample's JSON without its prompt
    target: npt.NDArray[np.uint8] | Tensor
    contexts: Sequence[npt.NDArray[np.uint8] | Tensor]
    text: StoredText | None = None


class _OpenShard:
    """A file descriptor that closes when its last user lets go: the cache may drop it while a thread reads."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "descriptor"):
            close(self.descriptor)

    def read(self, span: Span) -> bytes:
        """The bytes of a span; fewer where the file ends before. pread has no file position for processes to share."""
        parts, offset, end = list[bytes](), span.offset, span.offset + span.size
        while offset < end and (part := os.pread(self.descriptor, end - offset, offset)):
            parts.append(part)
            offset += len(part)
        return b"".join(parts)


class SampleReader:
    """Reads samples by number, in any order. Safe to pickle, to fork and to use from several threads."""

    def __init__(self, index: ShardIndex, transform: Transform) -> None:
        self.index, self.transform = index, transform
        self._open = lru_cache(maxsize=OPEN_SHARDS)(_OpenShard)

    def __reduce__(self) -> tuple[type["SampleReader"], tuple[ShardIndex, Transform]]:
        return SampleReader, (self.index, self.transform)

    def read(self, i: int, visit: int = 0) -> RawSample:
        """Sample i, its images at exactly the transform's sizes. visit: decides where a random crop lies.

        Raises:
            BadSample: its bytes do not decode or are not what the index says.
            OSError: the storage failed or the shard is gone; that is no fault of the sample.
            IndexError: there is no sample i.
        """
        location = self.index.location(i)
        file = self._open(location.shard)
        try:
            with _named("json"):
                metadata = parse_sample_json(_whole(file, location.json))
            images: Sequence[npt.NDArray[np.uint8] | Tensor]
            if self.index.encoding is None:
                images, text = self._images(i, file, location, visit), None
            else:
                with _named("encoded"):
                    images, text = self._encoded(i, _whole(file, location.target))
        except ValueError as error:
            raise BadSample(f"{location.shard}: {location.key}: {error}") from error
        return RawSample(
            key=location.key,
            shard=location.shard.relative_to(self.index.folder).as_posix(),
            prompt=metadata.pop("prompt"),
            metadata=metadata,
            target=images[0],
            contexts=images[1:],
            text=text,
        )

    def _images(self, i: int, file: _OpenShard, location: SampleLocation, visit: int) -> list[npt.NDArray[np.uint8]]:
        """Target and contexts, uint8 [H, W, 3]. Raises ValueError with name and reason."""
        centering = self.transform.centering(visit)
        images = []
        for number, (span, hw) in enumerate(zip((location.target, *location.contexts), self._hw(i), strict=True)):
            with _named(f"context.{number - 1}" if number else "target"):
                images.append(self.transform.apply(io.BytesIO(_whole(file, span)), centering, hw))
        return images

    def _encoded(self, i: int, raw: bytes) -> tuple[list[Tensor], StoredText]:
        """Target and contexts, [2, C, h, w], and the prompt. Raises ValueError with the reason."""
        moments, text = from_bytes(raw)
        indexed, pixels = self._hw(i), self.transform.multiple // 2
        given = [(image.shape[-2] * pixels, image.shape[-1] * pixels) for image in moments]
        if given != indexed:
            raise ValueError(f"holds latents of {given}, the index says images of {indexed} (height×width)")
        assert self.index.encoding is not None
        if (text.t5_LE is not None) != self.index.encoding["t5"]:
            raise ValueError("holds T5's tokens and should not, or the other way round")
        return moments, text

    def _hw(self, i: int) -> list[tuple[int, int]]:
        """Indexed (height, width) of target and contexts, pixels."""
        rows = slice(self.index.context_start[i], self.index.context_start[i + 1])
        return [(h, w) for h, w in (self.index.target_hw[i].tolist(), *self.index.context_hw[rows].tolist())]

    @cached_property
    def empty_prompt(self) -> StoredText:
        """What stands in for a dropped prompt in encoded shards."""
        return read_empty_prompt(self.index.folder)


@contextmanager
def _named(part: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{part}: {error}") from error


def _whole(file: _OpenShard, span: Span) -> bytes:
    raw = file.read(span)
    if len(raw) != span.size:
        raise ValueError(f"the shard ends {span.size - len(raw)} bytes too soon: it was cut after it was indexed")
    return raw
