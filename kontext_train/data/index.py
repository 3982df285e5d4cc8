"""The shard index: where the bytes of every sample are and how big its images are, known before a run starts.

`build_index` reads tar headers, image headers and the JSON of every sample once and writes `index.arrow` beside the
shards; `ShardIndex` maps that file into memory. The plan needs the sizes, the reader needs the offsets, nobody needs
to open a shard to know what is in it. The format of shards and index is described in docs/data_format.md.

Legend: n samples, c context images of all samples together. Sizes are (height, width) in pixels as an upright viewer
sees them, that is after EXIF orientation. Offsets and sizes of spans are bytes within a shard.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kontext_train.data.config import StorageConfig, is_url
from kontext_train.data.encoding import ENCODING_NAME, digest_of, parse_encoding
from kontext_train.data.index_file import INDEX_NAME, Columns, IndexWriter, map_index
from kontext_train.data.index_scan import Scan, scan_all
from kontext_train.data.shard import Problem, Span
from kontext_train.data.storage import ShardFile, read_whole, scratch_folder
from kontext_train.errors import StorageError

_PARTIAL_NAME = ".index.partial"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
_MAKE = "To make some: python -m data_tools.make_shards --help"


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


@dataclass(slots=True)
class IndexReport:
    """What `build_index` found: samples indexed, shards looked at, and everything that was left out."""

    samples: int
    shards: int
    problems: list[Problem]
    scanned: int  # shards that were read; the others are known from an earlier run


def build_index(
    folder: str | Path,
    *,
    shards: Sequence[str | Path] | None = None,
    out: Path | None = None,
    workers: int = 1,
    storage: StorageConfig | None = None,
    progress: bool = False,
) -> IndexReport:
    """Writes `folder/index.arrow`, replacing an older index in one step. Shards that it describes are not read again.

    Memory grows by a few kB a shard, not with samples. A job that was killed goes on where it was.

    Args:
        folder: where the shards are, and the index goes: a local folder or the URL of one.
        shards: the shards to index, in this order: files inside a local `folder`, or names below a URL. Default: every
            `*.tar` directly in it, by name; of a web server, those that its page for the folder links.
        out: a local folder for the index of a URL, which then names the URL; needed where nothing can be written
            (HTTP). Default: beside the shards.
        workers: shards that are read at once, each by a process.
        progress: shows a bar on a terminal.

    Returns:
        Counts, and the problems: samples and shards that are broken and therefore not in the index.

    Raises:
        ValueError: there are no shards, or one of `shards` is not a file inside `folder`.
        OSError: the storage failed. No index is written: it would lack good samples.
    """
    storage = storage or StorageConfig()
    if is_url(str(folder)):
        names = None if shards is None else [str(shard) for shard in shards]
        return _build_remote(str(folder).rstrip("/"), names, out, workers, storage, progress)
    if out is not None:
        raise ValueError(f"out is {out}, but {folder} is local. Its index goes beside the shards; leave out away")
    base = Path(os.path.abspath(folder))
    paths = _folder_shards(base) if shards is None else [_inside(base, Path(shard)) for shard in shards]
    if not paths:
        raise ValueError(f"{folder} has no shards: no *.tar (uncompressed) is directly in it. {_MAKE}")
    problems = [] if shards is not None else _compressed(sorted(path.name for path in base.iterdir()))
    described = {path.relative_to(base).as_posix(): ShardFile.local(path) for path in paths}
    header = {"base": None, "whole_folder": shards is None, "encoding": read_encoding(str(base), storage)}
    report = _build(described, base / INDEX_NAME, base / _PARTIAL_NAME, header, workers, storage, progress)
    report.problems[:0] = problems
    return report


def _build_remote(
    url: str, shards: list[str] | None, out: Path | None, workers: int, storage: StorageConfig, progress: bool
) -> IndexReport:
    from kontext_train.data.remote import RemoteShards

    if out is None and not url.startswith("s3://"):
        raise ValueError(f"{url} cannot be written to. Give --out, a local folder for its index")
    remote = RemoteShards(storage)
    names = remote.names(url) if shards is None else []
    chosen = [name for name in names if name.endswith(".tar") and name[0] != "."] if shards is None else shards
    if not chosen:
        raise ValueError(f"{url}/ has no shards: its listing shows no *.tar. Name them with --shards. {_MAKE}")
    described = remote.look([f"{url}/{name}" for name in chosen])
    place = out or scratch_folder(storage) / f"{_name_of(url)}.build"
    place.mkdir(parents=True, exist_ok=True)
    if out is None and INDEX_NAME in names and not (place / INDEX_NAME).exists():  # it does after a failed upload
        remote.download(remote.look([f"{url}/{INDEX_NAME}"])[0], place / INDEX_NAME)
    files = {file.path[len(url) + 1 :]: file for file in described}
    encoding = read_encoding(url, storage) if shards is not None or ENCODING_NAME in names else None
    header = {"base": url if out else None, "whole_folder": shards is None, "encoding": encoding}
    report = _build(files, place / INDEX_NAME, place / _PARTIAL_NAME, header, workers, storage, progress)
    report.problems[:0] = _compressed(names)
    if out is None:
        remote.upload(place / INDEX_NAME, f"{url}/{INDEX_NAME}")
        shutil.rmtree(place, ignore_errors=True)
    return report


def _build(
    files: dict[str, ShardFile],
    path: Path,
    partial: Path,
    header: dict[str, Any],
    workers: int,
    storage: StorageConfig,
    progress: bool,
) -> IndexReport:
    """Scans what neither the index at `path` nor a killed run knows, and writes the index. files: by name."""
    with _alone(path.parent):
        encoding = header["encoding"]
        digest = None if encoding is None else digest_of(encoding)
        known = _Known(path, encoding)
        partial.mkdir(exist_ok=True)
        scans = {name: Scan(file, name, partial, digest) for name, file in files.items() if not known.has(name, file)}
        todo = [scan for scan in scans.values() if not scan.done()]
        report = IndexReport(samples=0, shards=len(files), problems=[], scanned=len(todo))
        try:
            scan_all(todo, done=len(files) - len(todo), workers=workers, storage=storage, progress=progress)
            with closing(IndexWriter(partial)) as writer:
                for name, file in files.items():
                    columns, problems = scans[name].result() if name in scans else (known.columns(name), [])
                    writer.append(_described(name, file) | {"problems": len(problems)}, columns)
                    report.problems += problems
                report.samples = writer.finish(path, **header)
            shutil.rmtree(partial, ignore_errors=True)
        finally:
            with suppress(OSError):  # it holds results, which the next run uses
                partial.rmdir()
        return report


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for another process that indexes this folder; the system lets go of it however that ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class _Known:
    """What an older index says of shards that are as they were. Those with problems are read again, to report them."""

    def __init__(self, path: Path, encoding: dict[str, Any] | None) -> None:
        try:
            header, _, self._columns = map_index(path, "")
        except (FileNotFoundError, ValueError):
            header = {"shards": [], "encoding": encoding}
        if header.get("encoding") != encoding:
            header["shards"] = []
        self._shards, end = dict[str, dict[str, Any]](), 0
        try:
            for shard in header["shards"]:
                first, end = end, end + shard["samples"]
                if not shard["problems"]:
                    self._shards[shard["path"]] = shard | {"rows": (first, end)}
        except (KeyError, TypeError):  # damaged where it says what it holds
            self._shards = {}

    def has(self, name: str, file: ShardFile) -> bool:
        told_apart = file.mtime_ns is not None or file.etag is not None
        return told_apart and _described(name, file).items() <= self._shards.get(name, {}).items()

    def columns(self, name: str) -> Columns:
        return self._columns.rows(*self._shards[name]["rows"])


def _described(name: str, file: ShardFile) -> dict[str, Any]:
    """A shard as the index's metadata has it."""
    version = {"etag": file.etag} if is_url(file.path) else {"mtime_ns": file.mtime_ns}
    return {"path": name, "bytes": file.bytes} | version


def _folder_shards(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("[!.]*.tar"))
    if strange := [path for path in paths if not path.is_file()]:  # opening a pipe would wait for ever
        raise ValueError(
            f"{strange[0]} is not a file, or a link to none. Remove it or give it another suffix than .tar"
        )
    return paths


def _compressed(names: Sequence[str]) -> list[Problem]:
    """Compressed shards, which cannot be read by offset. A user who has some should hear of it."""
    reason = "a compressed tar cannot be read by offset; decompress it to .tar and index again"
    return [Problem(name, "", reason) for name in names if name.endswith(_COMPRESSED)]


def _inside(folder: Path, shard: Path) -> Path:
    path = Path(os.path.abspath(shard))
    if not path.is_relative_to(folder) or not path.is_file():
        raise ValueError(f"shard {shard} is not a file inside {folder}. Give paths of shards in the indexed folder")
    return path


def _name_of(url: str) -> str:
    """A file name for a URL."""
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def read_encoding(folder: str, storage: StorageConfig | None = None) -> dict[str, Any] | None:
    """How the shards of a folder were encoded; None for shards of images. Raises ValueError if that is damaged."""
    path = f"{folder}/{ENCODING_NAME}"
    try:
        return parse_encoding(path, read_whole(path, storage))
    except FileNotFoundError:
        return None


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
            self._shards, self._whole_folder = header["shards"], header["whole_folder"]
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
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder. Give the folder that holds the shards (*.tar)")
        if not (folder / INDEX_NAME).is_file():
            if not _folder_shards(folder):
                raise ValueError(f"{folder} has no shards: no *.tar (uncompressed) is directly in it. {_MAKE}")
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
            if added := [path.name for path in _folder_shards(Path(self.folder)) if path.name not in known]:
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
    copy = scratch_folder(storage) / f"{_name_of(url)}-{_name_of(repr(file))}.arrow"
    with open(copy.parent / f"{_name_of(url)}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait for the one that copies it
        if not copy.exists():
            remote.download(file, copy)
        for older in copy.parent.glob(f"{_name_of(url)}-*.arrow"):
            if older != copy:
                older.unlink()  # whoever has mapped it keeps it
    return copy


def _run(folder: str) -> str:
    return f"run: python -m data_tools.index_shards {folder}"
