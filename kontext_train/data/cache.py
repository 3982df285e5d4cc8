"""Ranges of remote files on local disk: bounded, shared by processes, and never trusted without its checksum.

An entry is a file of its own, named by what it holds and put in place whole, so a process that is killed leaves at most
a stray temporary file, which is evicted like any other. One small file holds the bytes in use; whoever changes it
holds its lock, which the kernel takes back from a process that dies.
"""

import fcntl
import hashlib
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kontext_train.data.shard import Span
from kontext_train.data.storage import ShardFile

_CHECKSUM_BYTES = 16
_KEEP = 0.9  # of the limit, after entries were evicted: room for the next ones, so that it is done rarely


class RangeCache:
    """Evicts what was not used for longest. Safe to fork and to use from several processes and threads."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._entries, self._in_use, self._limit_bytes = folder / "ranges", folder / "bytes_in_use", limit_bytes
        self._entries.mkdir(parents=True, exist_ok=True)

    def get(self, file: ShardFile, span: Span) -> bytes | None:
        """The bytes if they are here and sound."""
        path = self._path(file, span)
        try:
            entry = path.read_bytes()
            os.utime(path)  # its last use, which eviction goes by
        except OSError:  # it is not here, or the disk fails
            return None
        raw = entry[:-_CHECKSUM_BYTES]
        if len(raw) != span.size or _checksum(raw) != entry[-_CHECKSUM_BYTES:]:
            warnings.warn(f"{path} is damaged; its bytes are read again from {file.path}", stacklevel=2)
            path.unlink(missing_ok=True)
            return None
        return raw

    def put(self, file: ShardFile, span: Span, raw: bytes) -> None:
        """Keeps the bytes. A disk that fails costs the cache, not the run; it is said once."""
        size = len(raw) + _CHECKSUM_BYTES
        if size > _KEEP * self._limit_bytes:
            return
        path = self._path(file, span)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            self._reserve(size)
            path.parent.mkdir(exist_ok=True)
            with open(temporary, "wb") as out:
                out.write(raw)
                out.write(_checksum(raw))
            os.replace(temporary, path)
        except FileNotFoundError:
            pass  # another process needed the room and evicted the temporary file
        except OSError as error:
            temporary.unlink(missing_ok=True)
            warnings.warn(f"data.storage.cache_dir cannot keep what is read: {error}", stacklevel=2)

    def _path(self, file: ShardFile, span: Span) -> Path:
        name = hashlib.sha256(repr((file.path, file.bytes, file.etag, *span)).encode()).hexdigest()
        return self._entries / name[:2] / name[2:]

    def _reserve(self, size: int) -> None:
        """Counts bytes that are about to be written, and makes room for them."""
        with self._locked() as counter:
            text = os.pread(counter, 20, 0)
            in_use = int(text) if text.isdigit() else sum(entry.st_size for _, entry in self._files())
            if in_use + size > self._limit_bytes:
                in_use = self._evict(int(_KEEP * self._limit_bytes) - size)
            os.pwrite(counter, b"%020d" % (in_use + size), 0)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        # Opened anew each time: processes forked with an open file would share its lock.
        counter = os.open(self._in_use, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(counter, fcntl.LOCK_EX)
            yield counter
        finally:
            os.close(counter)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._entries.glob("*/*"):
            try:
                yield path, path.stat()
            except FileNotFoundError:  # a process put it in place or removed it meanwhile
                continue

    def _evict(self, target: int) -> int:
        """Removes the entries unused for longest until at most `target` bytes are left. Returns the bytes left."""
        files = sorted(self._files(), key=lambda found: found[1].st_mtime_ns)
        in_use = sum(state.st_size for _, state in files)
        for path, state in files:
            if in_use <= target:
                break
            path.unlink(missing_ok=True)
            in_use -= state.st_size
        return in_use


def _checksum(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=_CHECKSUM_BYTES).digest()
