"""Scanning shards in several processes, so that what was scanned once is not scanned again.

The result of a shard is itself a small index file: its samples, and what is wrong with it. It is named by the shard's
path, size, time (or ETag) and encoding, so one that is there is right; a job that was killed goes on from those it
finished.
"""

import hashlib
import multiprocessing
import signal
from array import array
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from tqdm import tqdm

from kontext_train.data.config import StorageConfig, is_url
from kontext_train.data.index_file import Columns, map_index, write_index
from kontext_train.data.processes import end_with_parent
from kontext_train.data.shard import Problem, ScannedSample, scan_shard
from kontext_train.data.storage import ShardBytes, ShardFile, shard_bytes
from kontext_train.errors import StorageError


@dataclass(frozen=True, slots=True)
class Scan:
    """One shard to scan, and where its result goes."""

    file: ShardFile
    name: str  # the shard's path in the index
    folder: Path
    encoding: str | None  # digest of how its samples must be encoded

    @property
    def path(self) -> Path:
        return self.folder / f"{hashlib.sha256(repr((self.file, self.encoding)).encode()).hexdigest()[:32]}.arrow"

    def done(self) -> bool:
        try:
            self.result()
        except (FileNotFoundError, ValueError):  # not there, or damaged
            return False
        return True

    def result(self) -> tuple[Columns, list[Problem]]:
        """What was found. Raises FileNotFoundError or ValueError if the shard was not scanned yet."""
        header, _, columns = map_index(self.path, "")
        return columns, [Problem(*problem) for problem in header["problems"]]


class ScannedColumns:
    """Samples as they are found; machine integers, as Python's take five times the memory."""

    def __init__(self) -> None:
        self._key_start, self._key_utf8 = array("q", [0]), bytearray()
        self._json_offset, self._json_bytes = array("q"), array("i")
        self._target_offset, self._target_bytes, self._target_hw = array("q"), array("i"), array("i")
        self._context_start = array("q", [0])
        self._context_offset, self._context_bytes, self._context_hw = array("q"), array("i"), array("i")

    def append(self, sample: ScannedSample) -> None:
        self._key_utf8 += sample.key.encode()
        self._key_start.append(len(self._key_utf8))
        self._json_offset.append(sample.json.offset)
        self._json_bytes.append(sample.json.size)
        self._target_offset.append(sample.target.offset)
        self._target_bytes.append(sample.target.size)
        self._target_hw.extend(sample.target_hw)
        for span, hw in zip(sample.contexts, sample.context_hw, strict=True):
            self._context_offset.append(span.offset)
            self._context_bytes.append(span.size)
            self._context_hw.extend(hw)
        self._context_start.append(len(self._context_offset))

    def columns(self) -> Columns:
        return Columns(
            key_start=np.asarray(self._key_start),
            key_utf8=np.frombuffer(self._key_utf8, np.uint8),
            json_offset=np.asarray(self._json_offset),
            json_bytes=np.asarray(self._json_bytes),
            target_offset=np.asarray(self._target_offset),
            target_bytes=np.asarray(self._target_bytes),
            target_hw=np.asarray(self._target_hw).reshape(-1, 2),
            context_start=np.asarray(self._context_start),
            context_offset=np.asarray(self._context_offset),
            context_bytes=np.asarray(self._context_bytes),
            context_hw=np.asarray(self._context_hw).reshape(-1, 2),
        )


def scan_all(scans: Sequence[Scan], *, done: int, workers: int, storage: StorageConfig, progress: bool) -> None:
    """Scans shards, `workers` at once. Raises OSError if the storage failed; results that are complete stay.

    done: shards that need no scan, for the progress bar.
    """
    bar = tqdm(total=done + len(scans), initial=done, unit=" shards", disable=None if progress else True)
    settings = [storage] * len(scans)
    with bar:
        if workers == 1 or len(scans) <= 1:
            for scan in scans:
                _scan(scan, storage)
                bar.update()
            return
        # fork: starting costs nothing, and the pool starts all its processes before it starts any thread.
        fork = multiprocessing.get_context("fork")
        # SIG_IGN: Ctrl-C is the parent's to handle.
        with ProcessPoolExecutor(min(workers, len(scans)), fork, end_with_parent, (signal.SIG_IGN,)) as pool:
            try:
                for _ in pool.map(_scan, scans, settings):
                    bar.update()
            except BrokenProcessPool as error:
                hint = "perhaps for its memory. Run it again, with fewer processes: it goes on where it was"
                raise StorageError(f"a process that scans shards was killed, {hint}") from error


def _scan(scan: Scan, storage: StorageConfig) -> None:
    columns, problems = ScannedColumns(), list[Problem]()
    with _open(scan.file, storage) as stream:
        for found in scan_shard(stream, scan.name, scan.file.bytes, scan.encoding):
            if isinstance(found, Problem):
                problems.append(found)
            else:
                columns.append(found)
    if not is_url(scan.file.path) and ShardFile.local(Path(scan.file.path)) != scan.file:
        raise StorageError(f"{scan.file.path} changed while it was read. Run it again when nothing writes to it")
    found_all = columns.columns()
    write_index(scan.path, np.zeros(len(found_all), np.int32), found_all, [], problems=problems)


def _open(file: ShardFile, storage: StorageConfig) -> IO[bytes]:
    if not is_url(file.path):
        return open(file.path, "rb")
    from kontext_train.data.remote import RemoteFile

    return cast(IO[bytes], RemoteFile(_remote(astuple(storage)), file))


@lru_cache(maxsize=1)
def _remote(settings: tuple[Any, ...]) -> ShardBytes:
    """One set of connections for all shards that a process scans."""
    return shard_bytes("https://", StorageConfig(*settings))
