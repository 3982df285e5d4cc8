"""What is in a shard: tar headers, image headers and JSON become samples, or problems that name what is wrong.

The format is described in docs/data_format.md. Sizes are (height, width) in pixels as an upright viewer sees them, that
is after EXIF orientation. Offsets and sizes of spans are bytes within a shard.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from PIL import ExifTags, Image, UnidentifiedImageError

from kontext_train.data.encoding import read_encoded_header
from kontext_train.errors import StorageError

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")  # an allow-list: Pillow would otherwise hand a file named .png to any decoder
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
# WebDataset's rule: the key ends at the first dot of the base name, whatever dots the folders have.
_MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
_IMAGE_ROLE = re.compile(rf"(target|context\.(?:0|[1-9][0-9]*))\.(?:{'|'.join(IMAGE_SUFFIXES)})")
_ENCODED = "encoded.safetensors"  # in the place of all images of a sample
_TAIL_BYTES = 1 << 16
_MOST_BYTES = 2**31 - 1  # what the index has room for


class Span(NamedTuple):
    """A run of bytes in a shard."""

    offset: int
    size: int


class Problem(NamedTuple):
    """Something in a shard that no run will see. `key` is empty where the trouble is not one sample's."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}" if self.key else f"{self.shard}: {self.reason}"


def read_image_hw(file: IO[bytes]) -> tuple[int, int]:
    """(height, width) of an encoded image after EXIF orientation, from its header alone.

    Raises:
        ValueError: the bytes are not a PNG, JPEG or WebP image that Pillow can open.
        OSError: the storage failed.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            return upright_hw(image)
    except UnidentifiedImageError as error:  # its message is the address of `file` in memory
        raise ValueError("not a readable PNG, JPEG or WebP image") from error
    except Exception as error:  # Pillow raises a dozen kinds on bad bytes, SyntaxError and struct.error among them
        if isinstance(error, StorageError) or getattr(error, "errno", None) is not None:
            raise  # Pillow's own OSErrors have no number
        raise ValueError(f"not a readable PNG, JPEG or WebP image ({type(error).__name__}: {error})") from error


def upright_hw(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an opened image after EXIF orientation, as far as its header tells."""
    # Not image.getexif(): for a PNG that would decode the pixels to look for EXIF after them.
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    width, height = image.size
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
class ScannedSample:
    key: str
    json: Span
    target: Span
    target_hw: tuple[int, int]
    contexts: list[Span] = field(default_factory=list)
    context_hw: list[tuple[int, int]] = field(default_factory=list)
    encoding: str | None = None  # of an encoded sample, whose spans are all that of KEY.encoded.safetensors
    header_offset: int = 0  # where the headers of its first member begin: its members are consecutive


def _role(suffix: str) -> str:
    """What a member is to its sample: "json", "target", "context.N" or, of an encoded sample, all of its images."""
    if suffix in ("json", _ENCODED):
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
        if member.size > _MOST_BYTES:
            raise ValueError(f"{role} has {member.size} bytes; members have at most {_MOST_BYTES}")
        roles[role] = member
    if _ENCODED in roles and len(roles) > 2:
        raise ValueError(f"has images beside .{_ENCODED}, which stands for all of them")
    for role in ("target", "json"):
        if role not in roles and not (role == "target" and _ENCODED in roles):
            raise ValueError(f"{role} is missing")
    numbers = sorted(int(role.removeprefix("context.")) for role in roles if role.startswith("context."))
    if numbers != list(range(len(numbers))):
        raise ValueError(f"context images must be numbered 0, 1, 2, … without a gap; found {numbers}")
    return roles


def _read_sample(tar: tarfile.TarFile, key: str, members: Sequence[tuple[str, tarfile.TarInfo]]) -> ScannedSample:
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
    if (encoded := roles.get(_ENCODED)) is not None:
        return _encoded_sample(key, _span(roles["json"]), _span(encoded), content(_ENCODED))
    target, target_hw = image("target")
    sample = ScannedSample(key, _span(roles["json"]), target, target_hw)
    for number in range(len(roles) - 2):
        span, hw = image(f"context.{number}")
        sample.contexts.append(span)
        sample.context_hw.append(hw)
    return sample


def _encoded_sample(key: str, about: Span, span: Span, file: IO[bytes]) -> ScannedSample:
    try:
        header = read_encoded_header(file, span.size)
    except ValueError as error:
        raise ValueError(f".{_ENCODED} is {error}") from error
    contexts = [span] * len(header.context_hw)
    return ScannedSample(key, about, span, header.target_hw, contexts, header.context_hw, header.encoding)


def _span(member: tarfile.TarInfo) -> Span:
    return Span(member.offset_data, member.size)


def _members(tar: tarfile.TarFile, shard_bytes: int) -> Iterator[tarfile.TarInfo]:
    """Yields the members and raises tarfile.ReadError at a break, also at those that tarfile takes for the end."""
    while (member := _next_member(tar)) is not None:
        yield member  # also where its content is cut: its name tells that the sample before is whole
        is_cut = member.isreg() and member.offset_data + member.size > shard_bytes
        if is_cut or tar.offset > shard_bytes + tarfile.BLOCKSIZE:  # not even of a special file: none can seek there
            raise tarfile.ReadError(f"the shard is truncated: it ends at byte {shard_bytes}, inside {member.name!r}")
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    marker = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(marker) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"the shard is truncated: it ends at byte {shard_bytes} without tar's end marker")
    if any(marker):
        raise tarfile.ReadError(f"the tar header at byte {tar.offset} is damaged; what follows cannot be read")


def _next_member(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    with _parsing():
        member = tar.next()
    # A pax header may give any size; with one below zero tarfile would go back and read the same member for ever.
    if member is not None and (member.size < 0 or tar.offset <= member.offset):
        raise tarfile.ReadError(f"the tar header at byte {member.offset} is damaged: it gives {member.size} bytes")
    return member


@contextmanager
def _parsing() -> Iterator[None]:
    """Bad headers make tarfile raise ValueError (of numbers), RecursionError (of headers of headers) and others."""
    try:
        yield
    except (tarfile.ReadError, OSError):
        raise
    except Exception as error:
        raise tarfile.ReadError(f"a tar header cannot be parsed ({type(error).__name__}: {error})") from error


def _data_after_end(tar: tarfile.TarFile) -> bool:
    """Whether tar's end marker, which was just read, is followed by more than padding."""
    assert tar.fileobj is not None
    return any(tar.fileobj.read(_TAIL_BYTES))


def scan_shard(
    file: IO[bytes], name: str, shard_bytes: int, encoding: str | None = None
) -> Iterator[ScannedSample | Problem]:
    """Yields each sample of a shard, or the problem that keeps it out. OSError of the storage is not a problem.

    encoding: digest of what all samples must have been encoded with; None for shards of images.
    """
    try:
        with _parsing():
            tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8")  # noqa: SIM115 (it is closed below)
        with tar:
            yield from _scan_members(tar, name, shard_bytes, encoding)
    except tarfile.ReadError as error:  # the very first header
        yield Problem(name, "", f"not an uncompressed tar file ({error})")


def _scan_members(
    tar: tarfile.TarFile, name: str, shard_bytes: int, encoding: str | None
) -> Iterator[ScannedSample | Problem]:
    finished: set[str] = set()
    key, group = "", list[tuple[str, tarfile.TarInfo]]()

    def finish() -> Iterator[ScannedSample | Problem]:
        if not group:
            return
        if key in finished:
            yield Problem(name, key, "this key was used before in the shard: members of a sample must be consecutive")
            return
        finished.add(key)
        try:
            sample = _read_sample(tar, key, group)
            if sample.encoding != encoding:
                raise ValueError("not encoded as encoding.safetensors says: a folder holds one encoding, or images")
            sample.header_offset = group[0][1].offset
            yield sample
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
