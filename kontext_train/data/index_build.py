"""Making an index: every shard is read once, in parallel, and again only if it changed."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kontext_train.data.config import StorageConfig, is_url
from kontext_train.data.encoding import ENCODING_NAME, digest_of
from kontext_train.data.index import HOW_TO_MAKE, file_name_of, folder_shards, read_encoding, read_filter
from kontext_train.data.index_file import INDEX_NAME, Columns, IndexWriter, map_index
from kontext_train.data.index_scan import Scan, scan_all
from kontext_train.data.safety_filter import SAFETY_NAME, FilterRecord
from kontext_train.data.shard import Problem
from kontext_train.data.storage import ShardFile, scratch_folder

_PARTIAL_NAME = ".index.partial"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")


@dataclass(slots=True)
class IndexReport:
    """What `build_index` found: samples indexed, shards looked at, and everything that was left out."""

    samples: int
    shards: int
    problems: list[Problem]
    scanned: int  # shards that were read; the others are known from an earlier run
    tables: dict[str, str]  # `Columns.digest` of each shard by name


def build_index(
    folder: str | Path,
    *,
    shards: Sequence[str | Path] | None = None,
    out: Path | None = None,
    workers: int = 1,
    storage: StorageConfig | None = None,
    progress: bool = False,
    passed: dict[str, Any] | None = None,
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
        passed: the safety filter that local shards passed (`FilterRecord.passed`), which is recorded beside them.
            Default: what a record that is there says, if the shards are as it has them.

    Returns:
        Counts, and the problems: samples and shards that are broken and therefore not in the index.

    Raises:
        ValueError: there are no shards, one of `shards` is not a file inside `folder`, or one is not as the safety
            filter left it.
        OSError: the storage failed. No index is written: it would lack good samples.
    """
    storage = storage or StorageConfig()
    assert passed is None or not is_url(str(folder))
    if is_url(str(folder)):
        names = None if shards is None else [str(shard) for shard in shards]
        return _build_remote(str(folder).rstrip("/"), names, out, workers, storage, progress)
    if out is not None:
        raise ValueError(f"out is {out}, but {folder} is local. Its index goes beside the shards; leave out away")
    base = Path(os.path.abspath(folder))
    paths = folder_shards(base) if shards is None else [_inside(base, Path(shard)) for shard in shards]
    if not paths:
        raise ValueError(f"shards is empty. Name shards in {folder}, or leave it away to index all of them")
    problems = [] if shards is not None else _compressed(sorted(path.name for path in base.iterdir()))
    described = {path.relative_to(base).as_posix(): ShardFile.local(path) for path in paths}
    sizes = {name: file.bytes for name, file in described.items()}
    encoding = read_encoding(str(base), storage)
    record = read_filter(str(base), sizes, storage) if passed is None else None
    known = passed if record is None else record.passed
    header = {"base": None, "whole_folder": shards is None, "encoding": encoding, "safety_filter": known}
    report = _build(described, base / INDEX_NAME, base / _PARTIAL_NAME, header, record, workers, storage, progress)
    if passed is not None:
        tables = {name: (sizes[name], table) for name, table in report.tables.items()}
        FilterRecord(str(base / SAFETY_NAME), passed, tables).write()
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
        raise ValueError(f"{url}/ has no shards: its listing shows no *.tar. Name them with --shards. {HOW_TO_MAKE}")
    described = remote.look([f"{url}/{name}" for name in chosen])
    place = out or scratch_folder(storage) / f"{file_name_of(url)}.build"
    place.mkdir(parents=True, exist_ok=True)
    if out is None and INDEX_NAME in names and not (place / INDEX_NAME).exists():  # it does after a failed upload
        remote.download(remote.look([f"{url}/{INDEX_NAME}"])[0], place / INDEX_NAME)
    files = {file.path[len(url) + 1 :]: file for file in described}
    encoding = read_encoding(url, storage) if shards is not None or ENCODING_NAME in names else None
    sizes = {name: file.bytes for name, file in files.items()}
    record = read_filter(url, sizes, storage) if shards is not None or SAFETY_NAME in names else None
    passed = None if record is None else record.passed
    base = url if out else None
    header = {"base": base, "whole_folder": shards is None, "encoding": encoding, "safety_filter": passed}
    report = _build(files, place / INDEX_NAME, place / _PARTIAL_NAME, header, record, workers, storage, progress)
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
    record: FilterRecord | None,
    workers: int,
    storage: StorageConfig,
    progress: bool,
) -> IndexReport:
    """Scans what neither the index at `path` nor a killed run knows, and writes the index. files: by name.

    record: what shards must be as, if they passed a safety filter.
    """
    with _alone(path.parent):
        encoding = header["encoding"]
        digest = None if encoding is None else digest_of(encoding)
        known = _Known(path, encoding)
        partial.mkdir(exist_ok=True)
        scans = {name: Scan(file, name, partial, digest) for name, file in files.items() if not known.has(name, file)}
        todo = [scan for scan in scans.values() if not scan.done()]
        report = IndexReport(samples=0, shards=len(files), problems=[], scanned=len(todo), tables={})
        try:
            scan_all(todo, done=len(files) - len(todo), workers=workers, storage=storage, progress=progress)
            with closing(IndexWriter(partial)) as writer:
                for name, file in files.items():
                    columns, problems = scans[name].result() if name in scans else (known.columns(name), [])
                    report.tables[name] = columns.digest()
                    if record is not None:
                        record.check_table(name, report.tables[name])
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


def _compressed(names: Sequence[str]) -> list[Problem]:
    """Compressed shards, which cannot be read by offset. A user who has some should hear of it."""
    reason = "a compressed tar cannot be read by offset; decompress it to .tar and index again"
    return [Problem(name, "", reason) for name in names if name.endswith(_COMPRESSED)]


def _inside(folder: Path, shard: Path) -> Path:
    path = Path(os.path.abspath(shard))
    if not path.is_relative_to(folder) or not path.is_file():
        raise ValueError(f"shard {shard} is not a file inside {folder}. Give paths of shards in the indexed folder")
    return path
