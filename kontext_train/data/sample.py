"""One sample from its shard: range-read, decode, resize. No order, no batch, no model.

`fit_size` is the one rule for the size that an image is trained at. The plan calls it on the sizes in the index, the
reader calls it on the image it decoded, and both must agree to the pixel; so it is integer arithmetic throughout.

Legend: H, W pixels after resizing; `hw` is (height, width) in pixels.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from kontext_train.data.index import ShardIndex
from kontext_train.data.shard import IMAGE_FORMATS, Span, parse_sample_json
from kontext_train.data.storage import shard_bytes


class BadSample(ValueError):
    """A sample whose bytes are not what its index says. The message carries shard, key and reason.

    It takes one string and nothing else, so that a DataLoader worker can hand it to the parent unchanged.
    """


@dataclass(slots=True)
class RawSample:
    """A decoded sample. `target` and each of `contexts`: uint8 [H, W, 3], RGB; H, W differ from image to image."""

    key: str
    shard: str
    prompt: str
    metadata: dict[str, Any]  # the sample's JSON without its prompt
    target: npt.NDArray[np.uint8]
    contexts: list[npt.NDArray[np.uint8]]


def fit_size(hw: npt.ArrayLike, max_pixels: int, multiple: int) -> npt.NDArray[np.int64]:
    """The size an image is trained at: its aspect ratio, at most `max_pixels`, each side a multiple of `multiple`.

    An image is scaled down, never up, then each side is floored to a multiple, but to one multiple at least. Where
    that minimum widens a very thin image, its long side gives way, so height * width <= max_pixels holds always.

    Args:
        hw: integers [..., 2], (height, width) in pixels, at least 1.
        max_pixels: the largest height * width.
        multiple: what both sides are divisible by, pixels.

    Returns:
        int64 [..., 2], (height, width) in pixels.

    Raises:
        ValueError: `multiple` is below 1, or `max_pixels` has no room for a square of one multiple.
    """
    if multiple < 1:
        raise ValueError(f"multiple is {multiple}; it must be at least 1 pixel")
    if max_pixels < multiple**2:
        raise ValueError(f"max_pixels is {max_pixels}; it must be at least multiple ** 2 = {multiple**2}")
    size = np.asarray(hw, dtype=np.int64)
    assert size.shape[-1:] == (2,)
    assert (size >= 1).all()
    # Scaled by s = sqrt(max_pixels / (h w)), h becomes sqrt(max_pixels h / w): an integer square root, no rounding.
    scaled = _isqrt(max_pixels * size // size[..., ::-1])
    size = np.where(size.prod(axis=-1, keepdims=True) > max_pixels, scaled, size)
    size = np.maximum(size // multiple, 1) * multiple
    room = max_pixels // size[..., ::-1] // multiple * multiple  # what the other side leaves
    return np.minimum(size, np.maximum(room, multiple))


def _isqrt(x: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """floor(sqrt(x)) exactly, 0 <= x < 2**62. Above 2**52 the float root of k² - 1 rounds up to k, never down."""
    root = np.sqrt(x.astype(np.float64)).astype(np.int64)
    return root - (root * root > x)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of an image in any mode that PNG, JPEG and WebP decode to; transparency shows white."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit greys at 255, which turns a photograph white.
        grey = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _decode(file: str | Path | IO[bytes]) -> Image.Image:
    """An upright RGB image. Raises ValueError with the reason."""
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as encoded:
            return _to_rgb(ImageOps.exif_transpose(encoded))
    except Exception as error:  # Pillow raises a dozen kinds on bad bytes, SyntaxError and struct.error among them
        raise ValueError(f"cannot be decoded ({type(error).__name__}: {error})") from error


def _fit(image: Image.Image, max_pixels: int, multiple: int) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] at `fit_size`."""
    height, width = fit_size((image.height, image.width), max_pixels, multiple).tolist()
    # fit = the largest centred box of the wanted aspect ratio, resampled with antialiasing: resize to cover, then
    # crop, in one pass. An image that has the size already comes through untouched.
    return np.array(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


class SampleReader:
    """Reads samples by number, in any order. Safe to pickle, to fork and to use from several threads."""

    def __init__(self, index: ShardIndex, max_pixels: int, multiple: int) -> None:
        """`max_pixels` and `multiple` as in `fit_size`. Raises ValueError if they do not fit each other."""
        fit_size((1, 1), max_pixels, multiple)  # refuse bad values here, not in a worker
        self.index, self.max_pixels, self.multiple = index, max_pixels, multiple
        self._bytes = shard_bytes(index.base, index.storage)

    def __reduce__(self) -> tuple[type["SampleReader"], tuple[ShardIndex, int, int]]:
        return SampleReader, (self.index, self.max_pixels, self.multiple)

    def read(self, i: int) -> RawSample:
        """Sample i, its images at exactly `fit_size` of their sizes in the index.

        Raises:
            BadSample: its bytes do not decode or are not what the index says.
            OSError: the storage failed, the shard is gone or changed; that is no fault of the sample.
            IndexError: there is no sample i.
        """
        return self.decode(i, self.fetch([i])[0])

    def fetch(self, samples: Iterable[int]) -> list[bytes]:
        """The encoded bytes of samples, for `decode`; remote ones many at once. Raises as `read` does."""
        locations = [self.index.location(int(i)) for i in samples]
        return self._bytes.read([(location.file, location.run()) for location in locations])

    def decode(self, i: int, raw: bytes) -> RawSample:
        """Sample i from its bytes. Raises as `read` does."""
        location = self.index.location(i)
        start = location.run().offset
        rows = slice(self.index.context_start[i], self.index.context_start[i + 1])

        def content(span: Span) -> bytes:
            return raw[span.offset - start : span.offset - start + span.size]

        part = "json"
        try:
            metadata = parse_sample_json(content(location.json))
            part = "target"
            target = self._image(content(location.target), self.index.target_hw[i])
            contexts = []
            for number, (span, hw) in enumerate(zip(location.contexts, self.index.context_hw[rows], strict=True)):
                part = f"context.{number}"
                contexts.append(self._image(content(span), hw))
        except ValueError as error:
            raise BadSample(f"{location.file.path}: {location.key}: {part}: {error}") from error
        return RawSample(
            key=location.key,
            shard=location.name,
            prompt=metadata.pop("prompt"),
            metadata=metadata,
            target=target,
            contexts=contexts,
        )

    def _image(self, raw: bytes, indexed_hw: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        """Decodes to uint8 [H, W, 3]. Raises ValueError with the reason."""
        image = _decode(io.BytesIO(raw))
        if (image.height, image.width) != tuple(indexed_hw):
            height, width = indexed_hw
            raise ValueError(f"decodes to {image.height}×{image.width}, the index says {height}×{width} (height×width)")
        return _fit(image, self.max_pixels, self.multiple)


def load_image(path: str | Path, max_pixels: int, multiple: int) -> npt.NDArray[np.uint8]:
    """An image file as training sees images: uint8 [H, W, 3] at `fit_size`. Raises ValueError if it is no image."""
    try:
        return _fit(_decode(path), max_pixels, multiple)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
