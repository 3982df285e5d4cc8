"""One sample from its shard: range-read, then `transforms` or, of an encoded shard, `encoded`. No order, no batch.

Legend: H, W pixels after resizing; `hw` is (height, width) in pixels.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kontext_train.data.encoded import StoredText, from_bytes, read_empty_prompt
from kontext_train.data.index import ShardIndex
from kontext_train.data.shard import Span, parse_sample_json
from kontext_train.data.storage import shard_bytes
from kontext_train.data.transforms import Transform


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


class SampleReader:
    """Reads samples by number, in any order. Safe to pickle, to fork and to use from several threads."""

    def __init__(self, index: ShardIndex, transform: Transform) -> None:
        self.index, self.transform = index, transform
        self._bytes = shard_bytes(index.base, index.storage)

    def __reduce__(self) -> tuple[type["SampleReader"], tuple[ShardIndex, Transform]]:
        return SampleReader, (self.index, self.transform)

    def read(self, i: int, visit: int = 0) -> RawSample:
        """Sample i, its images at exactly the transform's sizes. visit: decides where a random crop lies.

        Raises:
            BadSample: its bytes do not decode or are not what the index says.
            OSError: the storage failed, the shard is gone or changed; that is no fault of the sample.
            IndexError: there is no sample i.
        """
        return self.decode(i, self.fetch([i])[0], visit)

    def fetch(self, samples: Iterable[int]) -> list[bytes]:
        """The encoded bytes of samples, for `decode`; remote ones many at once. Raises as `read` does."""
        locations = [self.index.location(int(i)) for i in samples]
        return self._bytes.read([(location.file, location.run()) for location in locations])

    def decode(self, i: int, raw: bytes, visit: int = 0) -> RawSample:
        """Sample i from its bytes. Raises as `read` does."""
        location = self.index.location(i)
        start = location.run().offset

        def content(span: Span) -> bytes:
            return raw[span.offset - start : span.offset - start + span.size]

        try:
            with _named("json"):
                metadata = parse_sample_json(content(location.json))
            prompt = metadata.pop("prompt")
            if self.index.encoding is None:
                encoded = [content(span) for span in (location.target, *location.contexts)]
                target, *contexts = self._pixels(i, encoded, visit)
                return RawSample(location.key, location.name, prompt, metadata, target, contexts)
            with _named("encoded"):
                moments, text = self._stored(i, content(location.target))
            return RawSample(location.key, location.name, prompt, metadata, moments[0], moments[1:], text)
        except ValueError as error:
            raise BadSample(f"{location.file.path}: {location.key}: {error}") from error

    def hole(self, i: int) -> RawSample:
        """What stands for sample i where it cannot be read: black images of its sizes and the empty prompt."""
        location = self.index.location(i)
        if self.index.encoding is None:
            shapes = [(h, w, 3) for h, w in self.transform.size(self._hw(i)).tolist()]
            target, *contexts = [np.zeros(shape, dtype=np.uint8) for shape in shapes]
            return RawSample(location.key, location.name, "", {}, target, contexts)
        moments = [torch.zeros(shape, dtype=self._dtype()) for shape in self._shapes(i)]
        return RawSample(location.key, location.name, "", {}, moments[0], moments[1:], self.empty_prompt)

    def _pixels(self, i: int, encoded: Sequence[bytes], visit: int) -> list[npt.NDArray[np.uint8]]:
        """Target and contexts, uint8 [H, W, 3]. Raises ValueError with name and reason."""
        centering = self.transform.centering(visit)
        images = []
        for number, (raw, hw) in enumerate(zip(encoded, self._hw(i), strict=True)):
            with _named(f"context.{number - 1}" if number else "target"):
                images.append(self.transform.apply(io.BytesIO(raw), centering, hw))
        return images

    def _stored(self, i: int, raw: bytes) -> tuple[list[Tensor], StoredText]:
        """Target and contexts, [2, C, h, w], and the prompt. Raises ValueError with the reason."""
        moments, text = from_bytes(raw)
        given, expected = [tuple(image.shape) for image in moments], self._shapes(i)
        if given != expected or any(image.dtype != self._dtype() for image in moments):
            raise ValueError(f"holds latents of {given} in {moments[0].dtype}, not of {expected} in {self._dtype()}")
        assert self.index.encoding is not None
        if (text.t5_LE is not None) != self.index.encoding["t5"]:
            raise ValueError("holds T5's tokens and should not, or the other way round")
        return moments, text

    def _hw(self, i: int) -> list[tuple[int, int]]:
        """Indexed (height, width) of target and contexts, pixels."""
        rows = slice(self.index.context_start[i], self.index.context_start[i + 1])
        return [(h, w) for h, w in (self.index.target_hw[i].tolist(), *self.index.context_hw[rows].tolist())]

    def _shapes(self, i: int) -> list[tuple[int, ...]]:
        """[2, C, h, w] of the latents of target and contexts."""
        assert self.index.encoding is not None
        channels, pixels = self.index.encoding["latent_channels"], self.transform.multiple // 2
        return [(2, channels, h // pixels, w // pixels) for h, w in self._hw(i)]

    def _dtype(self) -> torch.dtype:
        assert self.index.encoding is not None
        return getattr(torch, self.index.encoding["encoders.dtype"])

    @cached_property
    def empty_prompt(self) -> StoredText:
        """What stands in for a dropped prompt in encoded shards. Raises OSError or ValueError if it cannot be read."""
        return read_empty_prompt(self.index)


@contextmanager
def _named(part: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{part}: {error}") from error
