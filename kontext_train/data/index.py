"""The shard index: where the bytes of every sample are and how big its images are, known before a run starts.

`build_index` reads tar headers, image headers and the JSON of every sample once and writes `index.arrow` beside the
shards; `ShardIndex` maps that file into memory. The plan needs the sizes, the reader needs the offsets, nobody needs
to open a shard to know what is in it. The format of shards and index is described in docs/data_format.md.

Legend: n samples, c context images of all samples together. Sizes are (height, width) in pixels as an upright viewer
sees them, that is after EXIF orientation. Offsets and sizes of spans are bytes within a shard.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kontext_train.data.shard import Problem, ScannedSample, Span, scan_shard

INDEX_NAME = "index.arrow"
FORMAT_VERSION = 1

_METADATA_KEY = b"kontext_train"
_SPAN = pa.list_(pa.int64(), 2)  # (offset, size)
_HW = pa.list_(pa.int32(), 2)  # (height, width)
_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.string()),
        ("json_span", _SPAN),
        ("target_span", _SPAN),
        ("target_hw", _HW),
        ("context_span", pa.large_list(_SPAN)),  # large: its offsets are int64, so `context_start` is a view of them
        ("context_hw", pa.large_list(_HW)),
    ]
)
_MAKE = "To make some: python -m data_tools.make_shards --help"


class SampleLocation(NamedTuple):
    """Where one sample's bytes are. `contexts` is in the order of the context images' numbers."""

    shard: Path
    key: str
    json: Span
    target: Span
    contexts: tuple[Span, ...]


@dataclass(slots=True)
class IndexReport:
    """What `build_index` found: samples indexed, shards looked at, and everything that was left out."""

    samples: int
    shards: int
    problems: list[Problem]


class _Columns:
    """The rows of the index while they are found; machine integers, as Python's take five times the memory."""

    def __init__(self) -> None:
        self.shard, self.key = array("i"), list[str]()
        self.json_span, self.target_span, self.target_hw = array("q"), array("q"), array("i")
        self.context_start, self.context_span, self.context_hw = array("q", [0]), array("q"), array("i")

    def append(self, shard: int, sample: ScannedSample) -> None:
        self.shard.append(shard)
        self.key.append(sample.key)
        self.json_span.extend(sample.json)
        self.target_span.extend(sample.target)
        self.target_hw.extend(sample.target_hw)
        for span, hw in zip(sample.contexts, sample.context_hw, strict=True):
            self.context_span.extend(span)
            self.context_hw.extend(hw)
        self.context_start.append(self.context_start[-1] + len(sample.contexts))

    def digest(self, shards: Sequence[dict[str, Any]]) -> str:
        """Names the samples and their order. Times are left out: a copy of the folder is the same data."""
        identity = hashlib.sha256(json.dumps([[shard["path"], shard["bytes"]] for shard in shards]).encode())
        identity.update(f"{len(self.key)}\n".encode() + "\0".join(self.key).encode())
        for column in (self.shard, self.json_span, self.target_span, self.target_hw):
            identity.update(column)
        for column in (self.context_start, self.context_span, self.context_hw):
            identity.update(column)
        return identity.hexdigest()

    def to_arrow(self) -> list[pa.Array]:
        def pairs(flat: "array[int]") -> pa.Array:
            return pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(flat)), 2)

        start = pa.array(np.asarray(self.context_start))
        return [
            pa.array(np.asarray(self.shard)),
            pa.array(self.key, pa.string()),
            pairs(self.json_span),
            pairs(self.target_span),
            pairs(self.target_hw),
            pa.LargeListArray.from_arrays(start, pairs(self.context_span)),
            pa.LargeListArray.from_arrays(start, pairs(self.context_hw)),
        ]


def build_index(folder: Path, *, shards: list[Path] | None = None) -> IndexReport:
    """Reads every shard once and writes `folder/index.arrow`, replacing an older index in one step.

    Args:
        folder: where the index goes; paths of shards are kept relative to it.
        shards: the shards to index, in this order, all inside `folder`. Default: every `*.tar` directly in it, by name.

    Returns:
        Counts, and the problems: samples and shards that are broken and therefore not in the index.

    Raises:
        ValueError: there are no shards, or one of `shards` is not a file inside `folder`.
        OSError: the storage failed. No index is written: it would lack good samples.
    """
    paths = _folder_shards(folder) if shards is None else [_inside(folder, path) for path in shards]
    if not paths:
        raise ValueError(f"{folder} has no shards: no *.tar (uncompressed) is directly in it. {_MAKE}")
    problems = [] if shards is not None else _unreadable_shards(folder)
    columns, described = _Columns(), []
    for number, path in enumerate(paths):
        name, state = path.relative_to(folder).as_posix(), path.stat()
        described.append({"path": name, "bytes": state.st_size, "mtime_ns": state.st_mtime_ns})
        for found in scan_shard(path, name, state.st_size):
            if isinstance(found, Problem):
                problems.append(found)
            else:
                columns.append(number, found)
    header = {
        "format_version": FORMAT_VERSION,
        "digest": columns.digest(described),
        "whole_folder": shards is None,
        "shards": described,
    }
    schema = _SCHEMA.with_metadata({_METADATA_KEY: json.dumps(header)})
    # One batch, so that every column is one run of memory and numpy can look at it without a copy.
    _write_replacing(folder / INDEX_NAME, pa.record_batch(columns.to_arrow(), schema=schema))
    return IndexReport(samples=len(columns.key), shards=len(paths), problems=problems)


def _write_replacing(path: Path, batch: pa.RecordBatch) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            with pa.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the new name on an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _folder_shards(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("[!.]*.tar"))
    if strange := [path for path in paths if not path.is_file()]:  # opening a pipe would wait for ever
        raise ValueError(
            f"{strange[0]} is not a file, or a link to none. Remove it or give it another suffix than .tar"
        )
    return paths


def _unreadable_shards(folder: Path) -> list[Problem]:
    """Compressed shards, which cannot be read by offset. A user who has some should hear of it."""
    reason = "a compressed tar cannot be read by offset; decompress it to .tar and index again"
    return [
        Problem(path.name, "", reason)
        for path in sorted(folder.iterdir())
        if path.name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4"))
    ]


def _inside(folder: Path, shard: Path) -> Path:
    path = Path(os.path.abspath(shard))
    if not path.is_relative_to(os.path.abspath(folder)) or not path.is_file():
        raise ValueError(f"shard {shard} is not a file inside {folder}. Give paths of shards in the indexed folder")
    return folder / path.relative_to(os.path.abspath(folder))


class ShardIndex:
    """A memory-mapped `index.arrow`. Arrays are read-only views of the file, so many processes share one copy.

    Attributes:
        folder: the folder that was indexed.
        target_hw: int32 [n, 2], (height, width) of each target image, pixels.
        context_start: int64 [n + 1]; context images of sample i are rows context_start[i]:context_start[i + 1].
        context_hw: int32 [c, 2], (height, width) of each context image, pixels.
        digest: names the samples and their order; the same for a copy of the folder and for an index built again.
    """

    folder: Path
    target_hw: npt.NDArray[np.int32]
    context_start: npt.NDArray[np.int64]
    context_hw: npt.NDArray[np.int32]
    digest: str

    def __init__(self, folder: Path) -> None:
        """Maps the index without looking at the shards; `ShardIndex.open` is the way in."""
        self.folder = folder
        self._shards, self.digest, self._whole_folder, batch = _map_index(folder)
        self._key = batch.column("key")
        self._shard = batch.column("shard").to_numpy()
        self._json_span, self._target_span = _pairs(batch.column("json_span")), _pairs(batch.column("target_span"))
        self.target_hw = _pairs(batch.column("target_hw"))
        self._context_span = _pairs(batch.column("context_span").values)
        self.context_hw = _pairs(batch.column("context_hw").values)
        self.context_start = batch.column("context_hw").offsets.to_numpy()

    @classmethod
    def open(cls, folder: str | Path) -> "ShardIndex":
        """Maps the index of `folder` after checking that it still describes the shards there.

        Raises:
            ValueError: there are no shards, no index, an index that is damaged, empty or of another format version, or
                a shard that is missing, changed or was added since. The message names the folder and what to do.
        """
        folder = Path(os.path.abspath(folder))  # a worker may have another working directory
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder. Give the folder that holds the shards (*.tar)")
        if not (folder / INDEX_NAME).is_file():
            if not _folder_shards(folder):
                raise ValueError(f"{folder} has no shards: no *.tar (uncompressed) is directly in it. {_MAKE}")
            raise ValueError(f"{folder} has shards but no {INDEX_NAME}. {_run(folder)}")
        index = cls(folder)
        index._check_shards()
        if len(index) == 0:
            raise ValueError(f"the index of {folder} holds no samples: all are broken. To see why, {_run(folder)}")
        return index

    def _check_shards(self) -> None:
        def refuse(what: str) -> ValueError:
            return ValueError(f"{self.folder}: {what}. An index must describe its shards exactly. {_run(self.folder)}")

        for shard in self._shards:
            try:
                state = (self.folder / shard["path"]).stat()
            except FileNotFoundError as error:
                raise refuse(f"shard {shard['path']} is missing") from error
            if state.st_size != shard["bytes"]:
                raise refuse(f"shard {shard['path']} has {state.st_size} bytes, {shard['bytes']} when indexed")
            if state.st_mtime_ns != shard["mtime_ns"]:
                raise refuse(f"shard {shard['path']} was modified after it was indexed")
        if self._whole_folder:
            known = {shard["path"] for shard in self._shards}
            if added := [path.name for path in _folder_shards(self.folder) if path.name not in known]:
                raise refuse(f"shard {added[0]} was added after the folder was indexed ({len(added)} in all)")

    def __len__(self) -> int:
        return len(self._shard)

    def location(self, i: int) -> SampleLocation:
        """Where the bytes of sample i are, 0 <= i < len(self). Raises IndexError outside of that."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of an index of {len(self)} samples")
        contexts = self._context_span[self.context_start[i] : self.context_start[i + 1]]
        return SampleLocation(
            shard=self.folder / self._shards[self._shard[i]]["path"],
            key=self._key[int(i)].as_py(),
            json=Span(*self._json_span[i].tolist()),
            target=Span(*self._target_span[i].tolist()),
            contexts=tuple(Span(*span) for span in contexts.tolist()),
        )

    def __reduce__(self) -> tuple[Callable[[Path, str], "ShardIndex"], tuple[Path, str]]:
        return _reopen, (self.folder, self.digest)


def _reopen(folder: Path, digest: str) -> ShardIndex:
    """Maps the file in a worker. The parent has looked at the shards; the digest says that this is the same index."""
    index = ShardIndex(folder)
    if index.digest != digest:
        raise ValueError(f"the index of {folder} was replaced while it was in use. Start the run again")
    return index


def _map_index(folder: Path) -> tuple[list[dict[str, Any]], str, bool, pa.RecordBatch]:
    path = folder / INDEX_NAME
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        header = json.loads(reader.schema.metadata[_METADATA_KEY])
        version = header["format_version"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a shard index or is damaged ({error}). {_run(folder)}") from error
    if version != FORMAT_VERSION:
        newer = " (it was written by a newer kontext_train: update)" if version > FORMAT_VERSION else ""
        raise ValueError(
            f"{path} has format version {version}{newer}, this program reads {FORMAT_VERSION}. {_run(folder)}"
        )
    if reader.num_record_batches != 1 or not reader.schema.equals(_SCHEMA):
        raise ValueError(f"{path} has other columns than format version {version} has. {_run(folder)}")
    return header["shards"], header["digest"], header["whole_folder"], reader.get_batch(0)


def _run(folder: Path) -> str:
    return f"run: python -m data_tools.index_shards {folder}"


def _pairs(column: pa.FixedSizeListArray) -> npt.NDArray[Any]:
    return column.values.to_numpy(zero_copy_only=True).reshape(-1, 2)
