"""Bytes of shards, wherever they are: runs of bytes in, bytes out, or a shard refused by name.

A sample's members lie side by side in its shard, so a reader asks for one run of bytes a sample. Local shards are read
by `LocalShards`; `remote.py`, which is imported only when a folder is a URL, reads the others.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

from kontext_train.data.config import StorageConfig, is_url
from kontext_train.data.shard import Span
from kontext_train.errors import StorageError

OPEN_SHARDS = 32  # a process: samples of a step come from anywhere, and 1,024 open files is a common limit


class ShardFile(NamedTuple):
    """A shard as it was when it was indexed."""

    path: str  # a local path or a URL
    bytes: int
    mtime_ns: int | None = None  # of local files
    etag: str | None = None  # of remote ones: the ETag, or without one Last-Modified; None if the server says neither

    @classmethod
    def local(cls, path: Path) -> "ShardFile":
        state = path.stat()
        return cls(str(path), state.st_size, mtime_ns=state.st_mtime_ns)

    def refuse(self, what: str) -> StorageError:
        return StorageError(f"{self.path} {what}. An index must describe its shards exactly: index them again")


class ShardBytes(Protocol):
    """Reads shards. Safe to fork and to use from several threads."""

    def read(self, runs: Sequence[tuple[ShardFile, Span]]) -> list[bytes]:
        """The bytes of each run, all of them. Raises StorageError, or OSError where a local file cannot be read."""


def shard_bytes(folder: str, config: StorageConfig | None) -> ShardBytes:
    """The reader for shards below a local folder or a URL."""
    if not is_url(folder):
        return LocalShards()
    from kontext_train.data.remote import RemoteShards  # local training needs neither fsspec nor an event loop

    return RemoteShards(config or StorageConfig())


def read_whole(path: str, config: StorageConfig | None) -> bytes:
    """A small file beside shards, local or not. Raises FileNotFoundError if it is not there, OSError otherwise."""
    if not is_url(path):
        return Path(path).read_bytes()
    from kontext_train.data.remote import RemoteShards

    remote = RemoteShards(config or StorageConfig())
    (file,) = remote.look([path])
    return remote.read([(file, Span(0, file.bytes))])[0]


def scratch_folder(config: StorageConfig | None) -> Path:
    """Where this machine keeps copies of remote indexes; made if it is not there."""
    if config is not None and config.cache_dir is not None:
        folder = Path(config.cache_dir, "indexes")
    else:
        folder = Path(tempfile.gettempdir(), f"kontext_train-{os.getuid()}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class _OpenShard:
    """A file descriptor that closes when its last user lets go: the cache may drop it while a thread reads."""

    def __init__(self, path: str) -> None:
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


class LocalShards:
    def __init__(self) -> None:
        self._open = lru_cache(maxsize=OPEN_SHARDS)(_OpenShard)

    def read(self, runs: Sequence[tuple[ShardFile, Span]]) -> list[bytes]:
        return [self._read(file, span) for file, span in runs]

    def _read(self, file: ShardFile, span: Span) -> bytes:
        opened = self._open(file.path)
        raw, state = opened.read(span), os.fstat(opened.descriptor)  # in this order: a change meanwhile is seen
        if state.st_size != file.bytes:
            raise file.refuse(f"has {state.st_size} bytes, {file.bytes} when indexed")
        if state.st_mtime_ns != file.mtime_ns:
            raise file.refuse("was modified after it was indexed")
        assert len(raw) == span.size
        return raw
