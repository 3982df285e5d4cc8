"""What encoded shards say of themselves: sizes in every sample's header, and how all of a folder was encoded.

Torch-free, for the index reads it. The tensors are in `encoded`; the format is described in docs/data_format.md.
"""

import hashlib
import io
import json
from typing import IO, Any, NamedTuple

ENCODING_NAME = "encoding.safetensors"  # beside the shards
METADATA_KEY = "kontext_train"  # one entry of JSON: the order of several would differ from file to file
_MOST_HEADER_BYTES = 1 << 20


class EncodedHeader(NamedTuple):
    """Sizes are (height, width) in pixels. encoding: `digest_of` what the sample was made with."""

    target_hw: tuple[int, int]
    context_hw: list[tuple[int, int]]
    encoding: str


def read_encoded_header(file: IO[bytes], size: int) -> EncodedHeader:
    """What the header of a KEY.encoded.safetensors of `size` bytes says. Raises ValueError with the reason."""
    header = _safetensors_header(file, size)
    try:
        about = json.loads(header["__metadata__"][METADATA_KEY])
        shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
        pixels = int(about["pixels_per_latent"])
        names = ["target", *(f"context.{i}" for i in range(sum(name.startswith("context.") for name in shapes)))]
        target_hw, *context_hw = [_image_hw(shapes[name], pixels) for name in names]
        return EncodedHeader(target_hw, context_hw, str(about["encoding"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not written by encode_shards ({type(error).__name__}: {error})") from error


def _image_hw(shape: list[int], pixels_per_latent: int) -> tuple[int, int]:
    two, _, h, w = shape
    if two != 2 or h < 1 or w < 1 or pixels_per_latent < 1:
        raise ValueError(f"moments of shape {shape} at {pixels_per_latent} pixels a latent")
    return h * pixels_per_latent, w * pixels_per_latent


def _safetensors_header(file: IO[bytes], size: int) -> dict[str, Any]:
    """The JSON header of a safetensors file, after checking that the file is as long as it says."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size - 8, _MOST_HEADER_BYTES):
        raise ValueError("no safetensors file, or a truncated one: its header does not fit it")
    try:
        header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"no safetensors file: its header cannot be parsed ({error})") from error
    if 8 + length + max(ends, default=0) != size:
        raise ValueError(f"truncated: it has {size} bytes, its header says {8 + length + max(ends, default=0)}")
    return header


def parse_encoding(path: str, raw: bytes) -> dict[str, Any]:
    """How the shards beside an `encoding.safetensors` were encoded. Raises ValueError, with path, if it is damaged."""
    try:
        return json.loads(_safetensors_header(io.BytesIO(raw), len(raw))["__metadata__"][METADATA_KEY])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}). Copy it again") from error


def digest_of(encoding: dict[str, Any]) -> str:
    """Names an encoding; every sample of a folder carries it."""
    return hashlib.sha256(json.dumps(encoding, sort_keys=True).encode()).hexdigest()[:32]
