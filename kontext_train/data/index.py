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
import re
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import ExifTags, Image

INDEX_NAME = "index.arrow"
FORMAT_VERSION = 1
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")  # an allow-list: Pillow would otherwise hand a file named .png to any decoder
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")

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
# WebDataset's rule: the key ends at the first dot of the base name, whatever dots the folders have.
_MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
_IMAGE_ROLE = re.compile(rf"(target|context\.(?:0|[1-9][0-9]*))\.(?:{'|'.join(IMAGE_SUFFIXES)})")
_TAIL_BYTES = 1 << 16
_MAKE = "To make some: python -m data_tools.make_shards --help"


class Span(NamedTuple):
    """A run of bytes in a shard."""

    offset: int
    size: int


class SampleLocation(NamedTuple):
    """Where one sample's bytes are. `contexts` is in the order of the context images' numbers."""

    shard: Path
    key: str
    json: Span
    target: Span
    contexts: tuple[Span, ...]


class Problem(NamedTuple):
    """Something in a shard that no run will see. `key` is empty where the trouble is not one sample's."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}" if self.key else f"{self.shard}: {self.reason}"


@dataclass(slots=True)
class IndexReport:
    """What `build_index` found: samples indexed, shards looked at, and everything that was left out."""

    samples: int
    shards: int
    problems: list[Problem]


# ---------------------------------------------------------------------------------------------------- reading samples


def read_image_hw(file: IO[bytes]) -> tuple[int, int]:
    """(height, width) of an encoded image after EXIF orientation, from its header alone.

    Raises:
        ValueError: the bytes are not a PNG, JPEG or WebP image that Pillow can open.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            # Not image.getexif(): for a PNG that would decode the pixels to look for EXIF after them.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
            width, height = image.size
    except Exception as error:  # Pillow raises a dozen kinds on bad bytes, SyntaxError and struct.error among them
        raise ValueError(f"not a readable PNG, JPEG or WebP image ({type(error).__name__}: {error})") from error
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def parse_sample_json(raw: bytes) -> dict[str, Any]:
    """The object in a sample's JSON member; its "prompt" is a string (which may be empty).

    Raises:
        ValueError: it is not UTF-8 JSON, not an object, or has no prompt that can be encoded again as UTF-8.
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json cannot be parsed ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"json is a {type(value).__name__}; it must be an object with a string 'prompt'")
    if not isinstance(value.get("prompt"), str):
        given = f"prompt is {value['prompt']!r}" if "prompt" in value else "it has no prompt"
        raise ValueError(f"json must have a string 'prompt'; {given}")
    try:
        value["prompt"].encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell and no tokenizer takes
        raise ValueError(f"json has a prompt that is not valid Unicode ({error})") from error
    return value


@dataclass(slots=True)
class _Sample:
    key: str
    json: Span
    target: Span
    target_hw: tuple[int, int]
    contexts: list[Span] = field(default_factory=list)
    context_hw: list[tuple[int, int]] = field(default_factory=list)


def _role(suffix: str) -> str:
    """What a member is to its sample: "json", "target" or "context.N"."""
    if suffix == "json":
        return suffix
    if match := _IMAGE_ROLE.fullmatch(suffix):
        return match[1]
    raise ValueError(
        f"member .{suffix} is not part of the format: expected .json, .target.EXT and .context.N.EXT "
        f"with EXT one of {', '.join(IMAGE_SUFFIXES)} and N = 0, 1, 2, …"
    )


def _roles(members: Sequence[tuple[str, tarfile.TarInfo]]) -> dict[str, tarfile.TarInfo]:
    """Members of one sample by role. Raises ValueError if they do not make up a sample."""
    roles: dict[str, tarfile.TarInfo] = {}
    for suffix, member in members:
        role = _role(suffix)
        if role in roles:
            raise ValueError(f"has two members for {role}")
        if not member.isreg() or member.issparse():
            raise ValueError(f"{role} is a link or a sparse or special file; members must be plain files")
        if member.size == 0:
            raise ValueError(f"{role} is empty (0 bytes)")
        roles[role] = member
    for role in ("target", "json"):
        if role not in roles:
            raise ValueError(f"{role} is missing")
    numbers = sorted(int(role.removeprefix("context.")) for role in roles if role.startswith("context."))
    if numbers != list(range(len(numbers))):
        raise ValueError(f"context images must be numbered 0, 1, 2, … without a gap; found {numbers}")
    return roles


def _read_sample(tar: tarfile.TarFile, key: str, members: Sequence[tuple[str, tarfile.TarInfo]]) -> _Sample:
    """Checks one sample and measures its images. Raises ValueError with the reason if it is broken."""
    roles = _roles(members)

    def content(role: str) -> IO[bytes]:
        file = tar.extractfile(roles[role])
        assert file is not None  # _roles lets plain files through only
        return file

    def image(role: str) -> tuple[Span, tuple[int, int]]:
        try:
            return _span(roles[role]), read_image_hw(content(role))
        except ValueError as error:
            raise ValueError(f"{role} is {error}") from error

    parse_sample_json(content("json").read())
    target, target_hw = image("target")
    sample = _Sample(key, _span(roles["json"]), target, target_hw)
    for number in range(len(roles) - 2):
        span, hw = image(f"context.{number}")
        sample.contexts.append(span)
        sample.context_hw.append(hw)
    return sample


def _span(member: tarfile.TarInfo) -> Span:
    return Span(member.offset_data, member.size)


# ----------------------------------------------------------------------------------------------------- reading shards


def _members(tar: tarfile.TarFile, shard_bytes: int) -> Iterator[tarfile.TarInfo]:
    """Yields the members and raises tarfile.ReadError at a break, also at those that tarfile takes for the end."""
    while (member := tar.next()) is not None:
        yield member  # also where its content is cut: its name tells that the sample before is whole
        if member.isreg() and member.offset_data + member.size > shard_bytes:
            raise tarfile.ReadError(f"the shard is truncated: it ends at byte {shard_bytes}, inside {member.name!r}")
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    marker = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(marker) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"the shard is truncated: it ends at byte {shard_bytes} without tar's end marker")
    if any(marker):
        raise tarfile.ReadError(f"the tar header at byte {tar.offset} is damaged; what follows cannot be read")


def _data_after_end(tar: tarfile.TarFile) -> bool:
    """Whether tar's end marker, which was just read, is followed by more than padding."""
    assert tar.fileobj is not None
    return any(tar.fileobj.read(_TAIL_BYTES))


def _scan_shard(path: Path, name: str, shard_bytes: int) -> Iterator[_Sample | Problem]:
    """Yields each sample of a shard, or the problem that keeps it out. OSError of the storage is not a problem."""
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            yield from _scan_members(tar, name, shard_bytes)
    except tarfile.ReadError as error:  # the very first header
        yield Problem(name, "", f"not an uncompressed tar file ({error})")


def _scan_members(tar: tarfile.TarFile, name: str, shard_bytes: int) -> Iterator[_Sample | Problem]:
    finished: set[str] = set()
    key, group = "", list[tuple[str, tarfile.TarInfo]]()

    def finish() -> Iterator[_Sample | Problem]:
        if not group:
            return
        if key in finished:
            yield Problem(name, key, "this key was used before in the shard: members of a sample must be consecutive")
            return
        finished.add(key)
        try:
            yield _read_sample(tar, key, group)
        except ValueError as error:
            yield Problem(name, key, str(error))

    try:
        for member in _members(tar, shard_bytes):
            if member.isdir():  # holds no bytes: nothing is lost
                continue
            match = _MEMBER_NAME.fullmatch(member.name)
            if match is None or not _is_unicode(member.name):
                yield Problem(name, "", f"member {member.name!r} has no key: names are UTF-8, like KEY.target.png")
                continue
            if match[1] != key:
                yield from finish()
                key, group = match[1], []
            group.append((match[2].lower(), member))
        joined = _data_after_end(tar)  # before finish(), which moves the file position
        yield from finish()
        if joined:
            yield Problem(name, "", f"data follows tar's end marker at byte {tar.offset} (shards joined with cat?)")
    except tarfile.ReadError as error:
        # The sample in progress may lack context images that came after the break: it would train as another task.
        yield Problem(name, key if group else "", f"{error}; this sample and all after it are left out")


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # tarfile spells undecodable bytes as lone surrogates
        return False
    return True


# --------------------------------------------------------------------------------------------------- writing the index


class _Columns:
    """The rows of the index while they are found; machine integers, as Python's take five times the memory."""

    def __init__(self) -> None:
        self.shard, self.key = array("i"), list[str]()
        self.json_span, self.target_span, self.target_hw = array("q"), array("q"), array("i")
        self.context_start, self.context_span, self.context_hw = array("q", [0]), array("q"), array("i")

    def append(self, shard: int, sample: _Sample) -> None:
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
        for found in _scan_shard(path, name, state.st_size):
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
    return sorted(folder.glob("[!.]*.tar"))


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


# --------------------------------------------------------------------------------------------------- reading the index


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
