"""The shard index: where the bytes of every sample are and how big its images are, known before a run starts.

`index_build.build_index` reads tar headers, image headers and the JSON of every sample once and writes `index.arrow`
beside the shards; `ShardIndex` maps that file into memory. The plan needs the sizes, the reader needs the offsets,
nobody needs to open a shard to know what is in it. The format of shards and index is described in docs/data_format.md.

Legend: n samples, c context images of all samples together. Sizes are (height, width) in pixels as an upright viewer
sees them, that is after EXIF orientation. Offsets and sizes of spans are bytes within a shard.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kontext_train.data.config import StorageConfig, is_url
from kontext_train.data.encoding import ENCODING_NAME, parse_encoding
from kontext_train.data.index_file import INDEX_NAME, map_index
from kontext_train.data.safety_filter import SAFETY_NAME, FilterRecord
from kontext_train.data.shard import Span
from kontext_train.data.storage import ShardFile, read_whole, scratch_folder
from kontext_train.errors import StorageError

HOW_TO_MAKE = "To make some: python -m data_tools.make_shards --help"


class SampleLocation(NamedTuple):
    """Where one sample's bytes are. `contexts` is in the order of the context images' numbers."""

    file: ShardFile
    name: str  # the shard's path below the indexed folder
    key: str
    json: Span
    target: Span
    contexts: tuple[Span, ...]

    @property
    def shard(self) -> Path:
        """The file of a local shard."""
        return Path(self.file.path)

    def run(self) -> Span:
        """The bytes from the sample's first member to its last: they lie side by side."""
        spans = (self.json, self.target, *self.contexts)
        first = min(span.offset for span in spans)
        return Span(first, max(span.offset + span.size for span in spans) - first)


def folder_shards(folder: Path) -> list[Path]:
    """Every *.tar directly in a local folder, by name. Raises ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Give the folder that holds the shards (*.tar)")
    paths = sorted(folder.glob("[!.]*.tar"))
    if not paths:
        raise ValueError(f"{folder} has no shards: no *.tar (uncompressed) is directly in it. {HOW_TO_MAKE}")
    if strange := [path for path in paths if not path.is_file()]:  # opening a pipe would wait for ever
        raise ValueError(
            f"{strange[0]} is not a file, or a link to none. Remove it or give it another suffix than .tar"
        )
    return paths


def file_name_of(url: str) -> str:
    """A file name for a URL."""
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def read_encoding(folder: str, storage: StorageConfig | None = None) -> dict[str, Any] | None:
    """How the shards of a folder were encoded; None for shards of images. Raises ValueError if that is damaged."""
    path = f"{folder}/{ENCODING_NAME}"
    try:
        return parse_encoding(path, read_whole(path, storage))
    except FileNotFoundError:
        return None


def read_filter(folder: str, sizes: Mapping[str, int], storage: StorageConfig | None = None) -> FilterRecord | None:
    """The record of the safety filter that the shards of a folder passed; None without one.

    sizes: bytes of each shard by name. Raises ValueError if a shard is not one that the filter wrote.
    """
    path = f"{folder}/{SAFETY_NAME}"
    try:
        record = FilterRecord.parse(path, read_whole(path, storage))
    except FileNotFoundError:
        return None
    for name, size in sizes.items():
        record.check_size(name, size)
    return record


class ShardIndex:
    """A memory-mapped `index.arrow`. Arrays are read-only views of the file: processes share one copy, and each touches
    only the pages of what it looks at.

    Attributes:
        folder: what was opened: a local folder, absolute, or a URL.
        storage: how its shards are read if they are remote.
        target_hw: int32 [n, 2], (height, width) of each target image, pixels.
        context_start: int64 [n + 1]; context images of sample i are rows context_start[i]:context_start[i + 1].
        context_hw: int32 [c, 2], (height, width) of each context image, pixels.
        samples_by_contexts: how many samples have 0, 1, 2, … context images; the last entry is not 0.
        base: what shards' names start from: `folder`, or the URL that an index in a local folder was made of.
        digest: names the samples and their order; the same for a copy of the folder and for an index built again.
        encoding: how encoded shards were made (`encoded.describe_encoding`); None for shards of images.
        safety_filter: the policy that they passed (`FilterRecord.passed`); None if they passed none.
    """

    def __init__(self, folder: str, file: Path, storage: StorageConfig | None = None) -> None:
        """Maps an index file without looking at the shards; `ShardIndex.open` is the way in."""
        self.folder, self.storage, self._file = folder, storage, file
        header, self._shard, self._columns = map_index(file, _run(folder))
        try:
            self.base: str = header["base"] or folder
            self.digest: str = header["digest"]
            self.encoding: dict[str, Any] | None = header["encoding"]
            self.samples_by_contexts: list[int] = header["samples_by_contexts"]
            self.safety_filter: dict[str, Any] | None = header.get("safety_filter")
            self._shards, self._whole_folder = header["shards"], header["whole_folder"]
            for shard in self._shards:
                known = itemgetter("path", "bytes", "etag" if "etag" in shard else "mtime_ns")
                known(shard)
        except KeyError as error:
            raise ValueError(f"{file} is damaged: its metadata lacks {error}. {_run(folder)}") from error
        self.target_hw: npt.NDArray[np.int32] = self._columns.target_hw
        self.context_start: npt.NDArray[np.int64] = self._columns.context_start
        self.context_hw: npt.NDArray[np.int32] = self._columns.context_hw

    @classmethod
    def open(cls, folder: str | Path, storage: StorageConfig | None = None) -> "ShardIndex":
        """Maps the index of a local folder, or of a URL after copying it to this machine.

        Local shards are checked at once; remote ones when they are read.

        Raises:
            ValueError: there are no shards, no index, an index that is damaged, empty or of another format version, or
                a local shard that is missing, changed or was added since. The message names the folder and what to do.
            StorageError: the index of a URL could not be read.
        """
        if is_url(str(folder)):
            url = str(folder).rstrip("/")
            index = cls(url, _local_copy(url, storage), storage)
            if any("etag" not in shard for shard in index._shards):
                what = "was made of local files and cannot tell whether these are the same"
                raise ValueError(f"the index of {url} {what}. {_run(url)}")
        else:
            index = cls._open_local(Path(os.path.abspath(folder)), storage)  # a worker may be in another folder
        if len(index) == 0:
            raise ValueError(f"the index of {folder} holds no samples: all are broken. To see why, {_run(index.base)}")
        return index

    @classmethod
    def _open_local(cls, folder: Path, storage: StorageConfig | None) -> "ShardIndex":
        if not (folder / INDEX_NAME).is_file():
            folder_shards(folder)
            raise ValueError(f"{folder} has shards but no {INDEX_NAME}. {_run(str(folder))}")
        index = cls(str(folder), folder / INDEX_NAME, storage)
        if not is_url(index.base):
            index._check_shards()
        return index

    def _check_shards(self) -> None:
        def refuse(what: str) -> ValueError:
            return ValueError(f"{self.folder}: {what}. An index must describe its shards exactly. {_run(self.folder)}")

        for shard in self._shards:
            try:
                state = os.stat(os.path.join(self.folder, shard["path"]))
            except FileNotFoundError as error:
                raise refuse(f"shard {shard['path']} is missing") from error
            if state.st_size != shard["bytes"]:
                raise refuse(f"shard {shard['path']} has {state.st_size} bytes, {shard['bytes']} when indexed")
            if state.st_mtime_ns != shard["mtime_ns"]:
                raise refuse(f"shard {shard['path']} was modified after it was indexed")
        if self._whole_folder:
            known = {shard["path"] for shard in self._shards}
            if added := [path.name for path in folder_shards(Path(self.folder)) if path.name not in known]:
                raise refuse(f"shard {added[0]} was added after the folder was indexed ({len(added)} in all)")

    def __len__(self) -> int:
        return len(self._shard)

    def shard_rows(self) -> list[tuple[str, range]]:
        """(path within the folder, samples) of each shard, in order; together all samples."""
        ends = accumulate((shard["samples"] for shard in self._shards), initial=0)
        return [(s["path"], range(*rows)) for s, rows in zip(self._shards, pairwise(ends), strict=True)]

    def location(self, i: int) -> SampleLocation:
        """Where the bytes of sample i are, 0 <= i < len(self). Raises IndexError outside of that."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of an index of {len(self)} samples")
        try:
            return self._location(i)
        except (IndexError, ValueError) as error:
            raise ValueError(f"{self._file} is damaged at sample {i} ({error}). {_run(self.base)}") from error

    def _location(self, i: int) -> SampleLocation:
        """Raises IndexError or ValueError if the row says what cannot be."""
        shard, columns = self._shards[self._shard[i]], self._columns
        key = columns.key_utf8[columns.key_start[i] : columns.key_start[i + 1]]
        rows = slice(columns.context_start[i], columns.context_start[i + 1])
        contexts = zip(columns.context_offset[rows].tolist(), columns.context_bytes[rows].tolist(), strict=True)
        path = f"{self.base}/{shard['path']}"
        location = SampleLocation(
            file=ShardFile(path, shard["bytes"], shard.get("mtime_ns"), shard.get("etag")),
            name=shard["path"],
            key=key.tobytes().decode(),
            json=Span(int(columns.json_offset[i]), int(columns.json_bytes[i])),
            target=Span(int(columns.target_offset[i]), int(columns.target_bytes[i])),
            contexts=tuple(Span(*span) for span in contexts),
        )
        for span in (location.json, location.target, *location.contexts):
            if span.offset < 0 or span.size < 0 or span.offset + span.size > location.file.bytes:
                raise ValueError(f"bytes {span.offset} to {span.offset + span.size} are not in {location.name}")
        return location

    def __reduce__(self) -> tuple[Callable[..., "ShardIndex"], tuple[str, Path, str, StorageConfig | None]]:
        return _reopen, (self.folder, self._file, self.digest, self.storage)


def _reopen(folder: str, file: Path, digest: str, storage: StorageConfig | None) -> ShardIndex:
    """Maps the file in a worker. The parent has looked at the shards; the digest says that this is the same index."""
    index = ShardIndex(folder, file, storage)
    if index.digest != digest:
        raise ValueError(f"the index of {folder} was replaced while it was in use. Start the run again")
    return index


def _local_copy(url: str, storage: StorageConfig | None) -> Path:
    """The index of a URL on this machine's disk; all its processes use one copy."""
    from kontext_train.data.remote import RemoteShards

    remote = RemoteShards(storage or StorageConfig())
    try:
        (file,) = remote.look([f"{url}/{INDEX_NAME}"])
    except StorageError as error:
        raise StorageError(f"{error}. If there is no index yet, {_run(url)}") from error
    copy = scratch_folder(storage) / f"{file_name_of(url)}-{file_name_of(repr(file))}.arrow"
    with open(copy.parent / f"{file_name_of(url)}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait for the one that copies it
        if not copy.exists():
            remote.download(file, copy)
        for older in copy.parent.glob(f"{file_name_of(url)}-*.arrow"):
            if older != copy:
                older.unlink()  # whoever has mapped it keeps it
    return copy


def _run(folder: str) -> str:
    return f"run: python -m data_tools.index_shards {folder}"
