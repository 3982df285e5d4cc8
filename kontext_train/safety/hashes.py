"""Images by their 64-bit perceptual hash (pHash), files by their digest, and lists of either."""

import csv
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import imagehash
import numpy as np
import numpy.typing as npt
from PIL import Image

_SIDE = 32
_FLAT_RANGE = 2  # grey levels; what an image of one colour has after a JPEG
_HEX = re.compile(r"(?:0x)?([0-9a-fA-F]{16})")
_COLUMNS = ("phash", "hash")
_DIGESTS = {32: "md5", 40: "sha1", 64: "sha256"}  # by hexadecimal digits
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
        hashes = []
        for where, cells in _entries(path, _COLUMNS):
            match = _HEX.fullmatch(cells[0])
            if match is None:
                raise ValueError(f"{where}: {cells[0][:40]!r} is no 64-bit hash of 16 hexadecimal digits")
            hashes.append(int(match[1], 16))
        if not hashes:
            raise ValueError(f"{path} holds no hashes. Give one of 16 hexadecimal digits a line")
        self._hashes = np.array(hashes, np.uint64)

    def distance(self, image_hash: int) -> int:
        """Bits in which the nearest hash of the list differs."""
        return int(_bit_counts(self._hashes ^ np.uint64(image_hash)).min())


class DigestList:
    """Digests of files that are known: MD5, SHA-1 or SHA-256, as hexadecimal digits whose number tells which.

    One a line, where a file name may follow as `sha256sum` writes it, or CSV with columns `md5`, `sha1` or `sha256`, of
    which each row fills one at least. Lines that begin with # say nothing.
    """

    def __init__(self, path: Path) -> None:
        """ValueError, with the line, for what is no such digest, or an empty list."""
        self._known: dict[str, set[bytes]] = {name: set() for name in _DIGESTS.values()}
        for where, cells in _entries(path, tuple(_DIGESTS.values())):
            for digest in [word for cell in cells for word in cell.split()[:1]] or [""]:
                name = _DIGESTS.get(len(digest))
                if name is None or not re.fullmatch("[0-9a-fA-F]+", digest):
                    rule = "is no MD5, SHA-1 or SHA-256 of 32, 40 or 64 hexadecimal digits"
                    raise ValueError(f"{where}: {digest[:80]!r} {rule}")
                self._known[name].add(bytes.fromhex(digest))
        if not any(self._known.values()):
            raise ValueError(f"{path} holds no digests. Give one of 32, 40 or 64 hexadecimal digits a line")

    def holds(self, content: bytes) -> bool:
        """Whether a file of these bytes is listed."""
        return any(known and _digest(name, content) in known for name, known in self._known.items())


def _entries(path: Path, columns: Sequence[str]) -> list[tuple[str, list[str]]]:
    """What a list says, each entry with its file and line: a line, or the cells of a CSV row below `columns`."""
    lines = list(enumerate(path.read_text("utf-8-sig").splitlines(), start=1))
    lines = [(number, line.strip()) for number, line in lines if line.strip() and not line.startswith("#")]
    names = [name.strip().lower() for name in next(csv.reader([lines[0][1]]))] if lines else []
    used = [names.index(name) for name in columns if name in names]
    if not used and (not lines or "," not in lines[0][1].split()[0]):
        return [(f"{path}, line {number}", [line]) for number, line in lines]
    if not used:
        raise ValueError(f"{path} has columns {names}; one must be {' or '.join(columns)}")
    rows = csv.reader(line for _, line in lines[1:])
    return [
        (f"{path}, line {lines[rows.line_num][0]}", [row[i].strip() if i < len(row) else "" for i in used])
        for row in rows
    ]


def _digest(name: str, content: bytes) -> bytes:
    return hashlib.new(name, content, usedforsecurity=False).digest()  # machines that forbid MD5 for signatures have it


def _bit_counts(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    return _BITS_OF_BYTE[values.view(np.uint8).reshape(-1, 8)].sum(axis=1, dtype=np.int64)
