"""Files of a checkpoint, on a local disk, a shared one or behind an fsspec URL: written with checksums, judged by them.

A remote folder is a `UPath` (universal_pathlib), which does what a `Path` does; it is called Path here. Renaming is not
atomic on an object store, and nothing relies on it: what counts is that COMPLETE is put there last, and removed first.
"""

import json
import os
import shutil
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Any, NamedTuple, cast

from torch.distributed.checkpoint._fsspec_filesystem import FileSystem as RemoteFileSystem
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter

from kontext_train.errors import ConfigError

COMPLETE, CHECKSUMS, RECORD = "COMPLETE", "checksums.json", "record.json"
_BLOCK_BYTES = 8 << 20


class Checksum(NamedTuple):
    bytes: int
    crc32: int


def place(path: str, key: str = "checkpoint.folder") -> Path:
    """A local path or an fsspec URL. ConfigError, naming `key`, if a URL needs a package that is missing."""
    if "://" not in path:
        return Path(path)
    try:
        from upath import UPath

        # Listings are asked for anew: other processes write there too.
        options: dict[str, Any] = {"use_listings_cache": False} if path.startswith("s3://") else {}
        return cast(Path, UPath(path, **options))
    except (ImportError, ValueError) as error:
        hint = "pip install 'kontext-train[s3]', or what fsspec needs for this kind of URL"
        raise ConfigError(key, path, f"cannot be used ({error})", hint) from error


def is_local(path: Path) -> bool:
    return isinstance(path, Path)


class _Checked:
    """A file being written, of which size and checksum are taken on the way."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.sum = stream, Checksum(0, 0)
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = self.stream.write(data)
        except OSError as error:
            self.failed = error
            raise
        assert written == memoryview(data).nbytes, "buffered streams write all or raise"
        self.sum = Checksum(self.sum.bytes + written, zlib.crc32(data, self.sum.crc32))
        return written

    def tell(self) -> int:
        return self.sum.bytes

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        self.stream.flush()  # torch syncs .metadata without
        return self.stream.fileno()

    def close(self) -> None:
        self.stream.close()


class _WithChecksums:
    """Over one of torch's file systems: keeps the checksum of every file written through it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.checksums: dict[str, Checksum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        with super().create_stream(path, mode) as stream:  # type: ignore[misc]
            checked = _Checked(stream)
            try:
                yield checked
            except Exception as error:
                if checked.failed is None:
                    raise
                raise checked.failed from error  # torch's archive writer says "unexpected pos" of a full disk
        self.checksums[PurePath(path).name] = checked.sum

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)  # type: ignore[misc]
        self.checksums[PurePath(new_path).name] = self.checksums.pop(PurePath(path).name)


class _LocalWithChecksums(_WithChecksums, FileSystem):
    pass


class _RemoteWithChecksums(_WithChecksums, RemoteFileSystem):
    pass


def storage_writer(path: Path) -> tuple[FileSystemWriter, dict[str, Checksum]]:
    """A writer for torch.distributed.checkpoint, and the checksums of what it writes on this rank, as it does.

    Local files are synced to disk. Nothing is copied ahead: that is for tensors on a GPU, and would put a stream of
    GPU 0 on every rank's background thread.
    """
    if is_local(path):
        writer, local = FileSystemWriter(path, per_thread_copy_ahead=0), _LocalWithChecksums()
        writer.fs = local
        return writer, local.checksums
    writer, remote = FsspecWriter(str(path), sync_files=False, per_thread_copy_ahead=0), _RemoteWithChecksums()
    remote.init_path(str(path))
    cast(Any, writer).fs = remote
    return writer, remote.checksums


def storage_reader(path: Path) -> FileSystemReader:
    return FileSystemReader(path) if is_local(path) else FsspecReader(str(path))


def complete(path: Path, record: Mapping[str, Any], checksums: Mapping[str, Checksum]) -> None:
    """Write what is left of a checkpoint, COMPLETE last. checksums: of all ranks' files, which must be there."""
    for name, written in checksums.items():
        if (path / name).stat().st_size != written.bytes:
            raise OSError(f"{path / name} has {(path / name).stat().st_size} bytes, not the {written.bytes} written")
    raw = json.dumps(record, indent=2).encode()
    put(path / RECORD, raw)
    listed = {**checksums, RECORD: Checksum(len(raw), zlib.crc32(raw))}
    raw = json.dumps({name: written._asdict() for name, written in listed.items()}, indent=2).encode()
    put(path / CHECKSUMS, raw)
    put(path / COMPLETE, f"{zlib.crc32(raw):08x}\n".encode())


def put(path: Path, raw: bytes) -> None:
    """Write a small file, so that it is there whole or not at all, and for good."""
    if not is_local(path):
        path.write_bytes(raw)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    for folder in (path.parent, path.parent.parent):  # the name, and in a new folder that one's
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a checkpoint or what there is of one; killed half-way, it leaves nothing that looks complete."""
    (path / COMPLETE).unlink(missing_ok=True)
    if is_local(path):
        shutil.rmtree(path)
    else:
        cast(Any, path).rmdir(recursive=True)


def damage(path: Path, share: int = 0, shares: int = 1) -> list[str]:
    """How the files of a complete checkpoint differ from what was written, each by name; [] if they do not.

    Reads every `shares`-th file from number `share` on. In the order of the ranks that wrote them, so at the same
    world size a rank reads what it is about to load.
    """
    try:
        listed = _listed(path)
    except ValueError as error:
        return [str(error)]
    found = {name: _damage(path / name, listed[name]) for name in list(listed)[share::shares]}
    return [f"{name} {how}" for name, how in found.items() if how]


def record_is_whole(path: Path) -> bool:
    """Whether the record of a complete checkpoint is as it was written, whatever became of the tensors."""
    try:
        return not _damage(path / RECORD, _listed(path)[RECORD])
    except ValueError:
        return False


def _listed(path: Path) -> dict[str, Checksum]:
    """Of the files of a complete checkpoint. Raises ValueError if the list itself is damaged."""
    try:
        raw = (path / CHECKSUMS).read_bytes()
        if f"{zlib.crc32(raw):08x}\n".encode() == (path / COMPLETE).read_bytes():
            return {name: Checksum(**written) for name, written in json.loads(raw).items()}
    except (OSError, ValueError) as error:
        raise ValueError(f"{CHECKSUMS} cannot be read ({error})") from error
    raise ValueError(f"{CHECKSUMS} is not what {COMPLETE} was written for")


def _damage(file: Path, written: Checksum) -> str:
    size = crc32 = 0
    try:
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK_BYTES):
                size, crc32 = size + len(block), zlib.crc32(block, crc32)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error})"
    if size != written.bytes:
        return f"has {size} bytes, {written.bytes} when written"
    return "has other bytes than were written" if crc32 != written.crc32 else ""
