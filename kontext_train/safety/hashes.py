"""Images by their 64-bit perceptual hash (pHash), and lists of such hashes."""

import csv
import io
import re
from pathlib import Path

import imagehash
import numpy as np
import numpy.typing as npt
from PIL import Image

_SIDE = 32
_FLAT_RANGE = 2  # grey levels; what an image of one colour has after a JPEG
_HEX = re.compile(r"(?:0x)?([0-9a-fA-F]{16})")
_COLUMNS = ("phash", "hash")
_BITS_OF_BYTE = np.array([value.bit_count() for value in range(256)], np.uint8)


def perceptual_hash(image: Image.Image) -> int | None:
    """64 bits; None for an image of one colour, whose hash would be that of all others of one colour."""
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    if np.ptp(np.asarray(small)) <= _FLAT_RANGE:
        return None
    return int(np.packbits(imagehash.phash(small).hash).view(">u8")[0])


class HashList:
    """Hashes of images that are known: one of 16 hexadecimal digits a line, or CSV with a column `phash` or `hash`.

    The hashes must be imagehash's `phash` of 64 bits (what `check_shards` and Python tools make); PDQ and PhotoDNA are
    other functions, and longer. Lines that begin with # say nothing.
    """

    def __init__(self, path: Path) -> None:
        """ValueError, with the line, for what is no such hash, or an empty list."""
        lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        if not lines:
            raise ValueError(f"{path} holds no hashes. Give one of 16 hexadecimal digits a line")
        cells = _column(path, lines) if "," in lines[0] or lines[0].strip().lower() in _COLUMNS else lines
        hashes = []
        for cell in cells:
            match = _HEX.fullmatch(cell.strip())
            if match is None:
                raise ValueError(f"{path}: {cell.strip()[:40]!r} is no 64-bit hash of 16 hexadecimal digits")
            hashes.append(int(match[1], 16))
        self._hashes = np.array(hashes, np.uint64)

    def distance(self, image_hash: int) -> int:
        """Bits in which the nearest hash of the list differs."""
        return int(_bit_counts(self._hashes ^ np.uint64(image_hash)).min())


def _column(path: Path, lines: list[str]) -> list[str]:
    rows = csv.DictReader(io.StringIO("\n".join(lines)))
    names = {name.strip().lower(): name for name in rows.fieldnames or ()}
    column = next((names[name] for name in _COLUMNS if name in names), None)
    if column is None:
        raise ValueError(f"{path} has columns {list(names)}; one must be {' or '.join(_COLUMNS)}")
    return [row[column] or "" for row in rows]


def _bit_counts(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    return _BITS_OF_BYTE[values.view(np.uint8).reshape(-1, 8)].sum(axis=1, dtype=np.int64)
