"""`index.arrow` as a file: its columns, writing them in bounded memory, mapping them.

The format is described in docs/data_format.md. Legend: n samples, c context images of all samples together.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

INDEX_NAME = "index.arrow"
FORMAT_VERSION = 2

_METADATA_KEY = b"kontext_train"
_HW = pa.list_(pa.int32(), 2)  # (height, width)
_CONTEXT = pa.struct([("offset", pa.int64()), ("bytes", pa.int32()), ("hw", _HW)])
_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.large_string()),  # large: 2 GiB of keys are some 100 million samples
        ("json_offset", pa.int64()),
        ("json_bytes", pa.int32()),
        ("target_offset", pa.int64()),
        ("target_bytes", pa.int32()),
        ("target_hw", _HW),
        ("contexts", pa.large_list(_CONTEXT)),  # large: its offsets are int64, so `context_start` is a view of them
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Samples as plain arrays, whether in memory or in a mapped file.

    `key_start` and `context_start` have one entry more than there are samples and count from 0: sample i has the bytes
    key_start[i]:key_start[i + 1] of `key_utf8`, and likewise its context images.
    """

    key_start: npt.NDArray[np.int64]
    key_utf8: npt.NDArray[np.uint8]
    json_offset: npt.NDArray[np.int64]
    json_bytes: npt.NDArray[np.int32]
    target_offset: npt.NDArray[np.int64]
    target_bytes: npt.NDArray[np.int32]
    target_hw: npt.NDArray[np.int32]  # [n, 2]
    context_start: npt.NDArray[np.int64]
    context_offset: npt.NDArray[np.int64]  # [c]
    context_bytes: npt.NDArray[np.int32]  # [c]
    context_hw: npt.NDArray[np.int32]  # [c, 2]

    def __len__(self) -> int:
        return len(self.json_offset)

    def digest(self) -> str:
        """Names keys, order, places and sizes of members, and sizes of images. What members hold is not in it."""
        whole = hashlib.sha256()
        for column in fields(self):
            values = getattr(self, column.name)
            whole.update(f"{column.name} {values.size} ".encode())
            whole.update(np.ascontiguousarray(values).tobytes())
        return whole.hexdigest()

    def rows(self, first: int, last: int) -> "Columns":
        """The samples first, …, last - 1."""
        key = slice(int(self.key_start[first]), int(self.key_start[last]))
        context = slice(int(self.context_start[first]), int(self.context_start[last]))
        one = slice(first, last)
        return Columns(
            key_start=self.key_start[first : last + 1] - key.start,
            key_utf8=self.key_utf8[key],
            json_offset=self.json_offset[one],
            json_bytes=self.json_bytes[one],
            target_offset=self.target_offset[one],
            target_bytes=self.target_bytes[one],
            target_hw=self.target_hw[one],
            context_start=self.context_start[first : last + 1] - context.start,
            context_offset=self.context_offset[context],
            context_bytes=self.context_bytes[context],
            context_hw=self.context_hw[context],
        )


_NAMES = ("shard", *(field.name for field in fields(Columns)))
_STARTS = ("key_start", "context_start")
_DTYPES = {
    name: np.uint8 if name == "key_utf8" else np.int64 if name.endswith(("_start", "_offset")) else np.int32
    for name in _NAMES
}


class IndexWriter:
    """Writes an index of any length in bounded memory: each column grows in a file of its own until all are known."""

    def __init__(self, folder: Path) -> None:
        """folder: where the columns grow; it needs room for the index a second time."""
        self._folder = Path(tempfile.mkdtemp(prefix="columns-", dir=folder))
        self._files = {name: open(self._folder / name, "wb") for name in _NAMES}  # noqa: SIM115
        self._hashes = {name: hashlib.sha256() for name in _NAMES}
        self._ends = dict.fromkeys(_STARTS, 0)
        self._shards = list[dict[str, Any]]()
        self._samples_by_contexts = np.zeros(1, np.int64)
        for name in _STARTS:
            self._write(name, np.zeros(1, np.int64))

    def append(self, shard: dict[str, Any], columns: Columns) -> None:
        """The next shard, as the index's metadata describes it, and its samples."""
        self._write("shard", np.full(len(columns), len(self._shards), np.int32))
        for name in _NAMES[1:]:
            values = getattr(columns, name)
            if name in _STARTS:
                values = values[1:] + self._ends[name]
                self._ends[name] = int(values[-1]) if len(values) else self._ends[name]
            self._write(name, values)
        counts = np.bincount(np.diff(columns.context_start), minlength=len(self._samples_by_contexts))
        counts[: len(self._samples_by_contexts)] += self._samples_by_contexts
        self._samples_by_contexts = counts
        self._shards.append(shard | {"samples": len(columns)})

    def finish(self, path: Path, encoding: dict[str, Any] | None, **header: Any) -> int:
        """Writes the index, replacing an older one in one step. Returns its number of samples.

        encoding: how the samples were encoded, which is part of the digest; None for images.
        """
        for file in self._files.values():
            file.close()
        counts = self._samples_by_contexts.tolist()
        header |= {"digest": self._digest(encoding), "encoding": encoding}
        header |= {"samples": sum(counts), "samples_by_contexts": counts}
        write_index(path, self._mapped("shard"), Columns(*map(self._mapped, _NAMES[1:])), self._shards, **header)
        return sum(counts)

    def close(self) -> None:
        """Removes the grown columns, whether the index was finished or not."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, name: str, values: npt.NDArray[Any]) -> None:
        raw = np.ascontiguousarray(values).data.cast("B") if values.size else b""
        self._files[name].write(raw)
        self._hashes[name].update(raw)

    def _mapped(self, name: str) -> npt.NDArray[Any]:
        dtype, shape = _DTYPES[name], (-1, 2) if name.endswith("_hw") else (-1,)
        path = self._folder / name
        empty = path.stat().st_size == 0  # which cannot be mapped
        return (np.empty(0, dtype) if empty else np.memmap(path, dtype, "r")).reshape(shape)

    def _digest(self, encoding: dict[str, Any] | None) -> str:
        """Names the samples and their order. Times and places are left out: a copy of the folder is the same data."""
        described = [encoding, [[shard["path"], shard["bytes"]] for shard in self._shards]]
        identity = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for name in _NAMES:
            identity.update(self._hashes[name].digest())
        return identity.hexdigest()


def write_index(
    path: Path, shard: npt.NDArray[Any], columns: Columns, shards: Sequence[dict[str, Any]], **header: Any
) -> None:
    """An index file of columns that are known, replacing an older one in one step.

    One record batch, so that every column is one run of memory and numpy can look at it without a copy.
    """
    header |= {"format_version": FORMAT_VERSION, "shards": shards}
    schema = _SCHEMA.with_metadata({_METADATA_KEY: json.dumps(header)})
    batch = pa.record_batch(_to_arrow(shard, columns), schema=schema)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the new name on an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _to_arrow(shard: npt.NDArray[Any], columns: Columns) -> list[pa.Array]:
    def plain(values: npt.NDArray[Any]) -> pa.Array:
        flat = values.reshape(-1)
        return pa.Array.from_buffers(pa.from_numpy_dtype(flat.dtype), len(flat), [None, pa.py_buffer(flat)])

    def pairs(values: npt.NDArray[Any]) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(plain(values), 2)

    key = [None, pa.py_buffer(columns.key_start), pa.py_buffer(columns.key_utf8)]
    context = [plain(columns.context_offset), plain(columns.context_bytes), pairs(columns.context_hw)]
    return [
        plain(shard),
        pa.Array.from_buffers(pa.large_string(), len(columns), key),
        plain(columns.json_offset),
        plain(columns.json_bytes),
        plain(columns.target_offset),
        plain(columns.target_bytes),
        pairs(columns.target_hw),
        pa.LargeListArray.from_arrays(
            plain(columns.context_start), pa.StructArray.from_arrays(context, fields=list(_CONTEXT))
        ),
    ]


def map_index(path: Path, hint: str) -> tuple[dict[str, Any], npt.NDArray[np.int32], Columns]:
    """Metadata, shard column and the other columns of an index: read-only views of the mapped file, of which only the
    schema is read. Raises ValueError, which ends in `hint`, if it is no index or of another version.
    """
    damaged = f"{path} is not a shard index or is damaged"
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        header = json.loads(reader.schema.metadata[_METADATA_KEY])
        version = header["format_version"]
    except FileNotFoundError:
        raise
    except Exception as error:  # damage makes Arrow raise errors of many kinds
        raise ValueError(f"{damaged} ({error}). {hint}") from error
    if version != FORMAT_VERSION:
        newer = " (it was written by a newer kontext_train: update)" if version > FORMAT_VERSION else ""
        raise ValueError(f"{path} has format version {version}{newer}, this program reads {FORMAT_VERSION}. {hint}")
    if reader.num_record_batches != 1 or not reader.schema.equals(_SCHEMA):
        raise ValueError(f"{path} has other columns than format version {version} has. {hint}")
    try:
        batch = reader.get_batch(0)
        batch.validate()  # of lengths alone, not of what is in the columns; Arrow aborts the process at some bad ones
        return header, _values(batch.column("shard")), _from_arrow(batch)
    except Exception as error:
        raise ValueError(f"{damaged} ({error}). {hint}") from error


def _from_arrow(batch: pa.RecordBatch) -> Columns:
    key, contexts = batch.column("key"), batch.column("contexts")
    _, key_start, key_utf8 = key.buffers()
    context = contexts.values
    return Columns(
        key_start=np.frombuffer(key_start, np.int64, len(batch) + 1) if len(batch) else np.zeros(1, np.int64),
        key_utf8=np.frombuffer(key_utf8 or b"", np.uint8),
        json_offset=_values(batch.column("json_offset")),
        json_bytes=_values(batch.column("json_bytes")),
        target_offset=_values(batch.column("target_offset")),
        target_bytes=_values(batch.column("target_bytes")),
        target_hw=_values(batch.column("target_hw").values).reshape(-1, 2),
        context_start=_values(contexts.offsets),
        context_offset=_values(context.field("offset")),
        context_bytes=_values(context.field("bytes")),
        context_hw=_values(context.field("hw").values).reshape(-1, 2),
    )


def _values(column: pa.Array) -> npt.NDArray[Any]:
    return column.to_numpy(zero_copy_only=True)
