"""Shards on HTTP(S) and S3: range requests through fsspec, many at once, repeated when they fail.

Every answer is checked before it is used: it must be the range that was asked for, whole, of a file that has the size
and ETag that were indexed. An answer that is not is a failed request or, where the file changed, the end of the run.

fsspec runs its requests on an event loop in a thread. Neither survives a fork, so each process makes its own.
"""

import asyncio
import io
import os
import re
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from random import SystemRandom
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec.asyn import sync

from kontext_train.data.cache import RangeCache
from kontext_train.data.config import URL_SCHEMES, StorageConfig
from kontext_train.data.shard import Span
from kontext_train.data.storage import ShardBytes, ShardFile
from kontext_train.errors import MissingFile, StorageError

T = TypeVar("T")

_PART_BYTES = 16 << 20  # large files come in parts, so that a time-out means the same for all
_PARTS_AT_ONCE = 4
_LONGEST_WAIT_S = 60.0
_HOPELESS = (400, 401, 405)  # HTTP statuses that asking again does not mend
_MISSING = (403, 404, 410)  # nor these; 403 is S3's answer where one may not list what there is
_AHEAD_BYTES = 16 << 10  # nearly every image says its size within this
_BLOCKS = 64  # a sample is measured when all its headers were seen; more context images than this cost requests
_UNKNOWN = -1  # bytes of a file that was not looked at yet
_jitter = SystemRandom()  # DataLoader gives the workers of all ranks the same seeds; they would wait in step


class _Answer(NamedTuple):
    """What a server sent for a range request; nothing, where the file ends before the range."""

    raw: bytes
    first: int
    file_bytes: int
    etag: str | None


class _Refused(Exception):
    """A request that will not succeed when it is repeated."""


class RemoteShards:
    """Reads runs of bytes of remote shards, through a cache on local disk if there is one."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        self._cache = RangeCache(Path(config.cache_dir), int(config.cache_gib * 2**30)) if config.cache_dir else None
        # By process. Those of a parent are kept: a child that drops them would close the parent's connections.
        self._systems: dict[tuple[int, str], Any] = {}

    def read(self, runs: Sequence[tuple[ShardFile, Span]]) -> list[bytes]:
        """All runs, one request each, at most `concurrency` at once. Raises StorageError when one fails for good."""
        if self._cache is None:
            return self._fetch(runs)
        found = [self._cache.get(*run) for run in runs]
        missing = [run for run, raw in zip(runs, found, strict=True) if raw is None]
        fetched = self._fetch(missing)
        for run, raw in zip(missing, fetched, strict=True):
            self._cache.put(*run, raw)
        rest = iter(fetched)
        return [next(rest) if raw is None else raw for raw in found]

    def look(self, urls: Sequence[str]) -> list[ShardFile]:
        """Size and ETag of each file, from a request for its first byte."""
        answers = self._gather([(ShardFile(url, _UNKNOWN), Span(0, 1)) for url in urls])
        return [ShardFile(url, a.file_bytes, etag=a.etag) for url, a in zip(urls, answers, strict=True)]

    def names(self, folder: str) -> list[str]:
        """Names of the files directly in a folder, sorted: S3's listing, or the links of a web server's page."""
        system, is_s3 = self._system(folder), folder.startswith("s3://")

        async def entries() -> list[str]:
            return await system._ls(folder if is_s3 else f"{folder}/", detail=False)

        found = sync(system.loop, self._persist, entries, f"{folder}/: listing the folder")
        urls = [f"s3://{url}" if is_s3 else url for url in found]
        names = {url[len(folder) + 1 :] for url in urls if url.startswith(f"{folder}/")}
        return sorted(name for name in names if name and not re.search(r"[/?#]", name))

    def download(self, file: ShardFile, path: Path) -> None:
        """A whole file to local disk. `path` appears when it is complete."""
        parts = [(file, Span(at, min(_PART_BYTES, file.bytes - at))) for at in range(0, file.bytes, _PART_BYTES)]
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as out:
                for first in range(0, len(parts), _PARTS_AT_ONCE):
                    out.writelines(self._fetch(parts[first : first + _PARTS_AT_ONCE]))
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def upload(self, path: Path, url: str) -> None:
        """A local file to S3, where it appears when it is complete."""
        try:
            fsspec.filesystem("s3", skip_instance_cache=True).put_file(str(path), url)  # in parts, with its own retries
        except Exception as error:  # see `_persist`
            raise StorageError(f"{url} cannot be written ({error}). {path} is what it should hold") from error

    def _fetch(self, runs: Sequence[tuple[ShardFile, Span]]) -> list[bytes]:
        return [answer.raw for answer in self._gather(runs)]

    def _gather(self, runs: Sequence[tuple[ShardFile, Span]]) -> list[_Answer]:
        if not runs:
            return []
        system = self._system(runs[0][0].path)
        return sync(system.loop, self._gather_on_loop, system, runs)

    async def _gather_on_loop(self, system: Any, runs: Sequence[tuple[ShardFile, Span]]) -> list[_Answer]:
        gate = asyncio.Semaphore(self.config.concurrency)

        async def one(file: ShardFile, span: Span) -> _Answer:
            get = _get_s3 if file.path.startswith("s3://") else _get_http

            async def request() -> _Answer:
                return _checked(await get(system, file.path, span), file, span)

            async with gate:
                return await self._persist(request, f"{file.path} bytes {span.offset}-{span.offset + span.size - 1}")

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(*run)) for run in runs]
        except ExceptionGroup as failures:  # the first failure ended the others
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _persist(self, request: Callable[[], Awaitable[T]], what: str) -> T:
        """The answer to a request that is repeated while it fails in ways that may mend. `what` names it in errors."""
        for attempt in range(self.config.retries + 1):
            if attempt:
                wait_s = min(self.config.backoff_s * 2 ** (attempt - 1), _LONGEST_WAIT_S)
                await asyncio.sleep(wait_s * _jitter.uniform(0.5, 1.5))
            try:
                async with asyncio.timeout(self.config.timeout_s):
                    return await request()
            except StorageError:
                raise
            except FileNotFoundError as error:
                raise MissingFile(f"{what}: {error}") from error
            except (_Refused, PermissionError) as error:
                raise StorageError(f"{what}: {error}") from error
            except TimeoutError:
                reason = f"no complete answer within data.storage.timeout_s={self.config.timeout_s:g}"
            except Exception as error:  # clients raise dozens of kinds for what goes wrong on a network
                reason = f"{type(error).__name__}: {error}"
        raise StorageError(f"{what}: gave up after {self.config.retries + 1} attempts; the last one: {reason}")

    def _system(self, url: str) -> Any:
        """This process's fsspec file system for a URL."""
        scheme = url.partition("://")[0]
        if scheme not in URL_SCHEMES:
            raise StorageError(f"{url}: {scheme}:// cannot be read, only {', '.join(URL_SCHEMES)}")
        key = os.getpid(), scheme
        if key not in self._systems:
            extra = scheme.removesuffix("s")
            try:
                self._systems[key] = _open_system(extra, self.config)
            except ImportError as error:
                hint = f"pip install 'kontext-train[{extra}]'"
                raise StorageError(f"{url}: {scheme}:// needs a package that is missing ({error}): {hint}") from error
        return self._systems[key]


def _open_system(kind: str, config: StorageConfig) -> Any:
    """A fresh file system. Its own retries are off: one request here is one request on the wire."""
    if kind == "http":
        # trust_env: proxies and ~/.netrc, as other programs have them. The time-out is `_persist`'s.
        client: dict[str, Any] = {"trust_env": True, "timeout": None}
        return fsspec.filesystem("http", client_kwargs=client, skip_instance_cache=True, use_listings_cache=False)
    options = {"retries": {"total_max_attempts": 1}, "max_pool_connections": max(10, config.concurrency)}
    system = fsspec.filesystem("s3", config_kwargs=options, skip_instance_cache=True, use_listings_cache=False)
    system.retries = 1
    return system


async def _get_http(system: Any, url: str, span: Span) -> _Answer:
    session = await system.set_session()
    # identity: offsets are those of the file, not of a compressed copy of it.
    headers = {"Range": _range(span), "Accept-Encoding": "identity"}
    async with session.get(system.encode_url(url), headers=headers) as answer:
        content_range = answer.headers.get("Content-Range", "")
        etag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if answer.status == 416 and (match := re.fullmatch(r"bytes \*/(\d+)", content_range)):
            return _Answer(b"", span.offset, int(match[1]), etag)
        if answer.status == 200:
            raise _Refused("the server sends whole files only; it must answer range requests (HTTP 206)")
        _check_status(answer.status, answer.reason)
        first, file_bytes = _parse(content_range)
        return _Answer(await answer.read(), first, file_bytes, etag)


async def _get_s3(system: Any, url: str, span: Span) -> _Answer:
    from botocore.exceptions import ClientError, NoCredentialsError

    bucket, key, _ = system.split_path(url)
    await system.set_session()
    client = await system.get_s3(bucket)
    try:
        answer = await client.get_object(Bucket=bucket, Key=key, Range=_range(span), **system.req_kw)
    except NoCredentialsError as error:
        raise _Refused(f"{error}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE") from error
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status == 416:
            head = await client.head_object(Bucket=bucket, Key=key, **system.req_kw)
            return _Answer(b"", span.offset, head["ContentLength"], head.get("ETag"))
        _check_status(status, str(error))
        raise
    async with answer["Body"] as body:
        raw = await body.read()
    first, file_bytes = _parse(answer.get("ContentRange", ""))
    return _Answer(raw, first, file_bytes, answer.get("ETag"))


def _range(span: Span) -> str:
    return f"bytes={span.offset}-{span.offset + span.size - 1}"


def _check_status(status: int, reason: str | None) -> None:
    if status in _MISSING:
        raise FileNotFoundError(f"HTTP {status} {reason}")
    if status in _HOPELESS:
        raise _Refused(f"HTTP {status} {reason}")
    if status != 206:
        raise ConnectionError(f"HTTP {status} {reason}")


def _parse(content_range: str) -> tuple[int, int]:
    """(first byte, bytes of the whole file) of a Content-Range header (RFC 9110, 14.4)."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", content_range)
    if match is None:
        raise ConnectionError(f"the answer's Content-Range is {content_range!r}")
    return int(match[1]), int(match[2])


def _checked(answer: _Answer, file: ShardFile, span: Span) -> _Answer:
    """The answer if it is the one asked for. Raises StorageError if the file changed."""
    if file.bytes != _UNKNOWN:
        if answer.file_bytes != file.bytes:
            raise file.refuse(f"has {answer.file_bytes} bytes, {file.bytes} when indexed")
        if answer.etag != file.etag:
            raise file.refuse(f"was modified after it was indexed (ETag {answer.etag}, {file.etag} when indexed)")
    size = max(0, min(span.size, answer.file_bytes - span.offset))
    if (answer.first, len(answer.raw)) != (span.offset, size):
        raise ConnectionError(f"the answer holds {len(answer.raw)} bytes from {answer.first}")
    return answer


class RemoteFile(io.RawIOBase):
    """A remote file for a scan of headers: it reads ahead a little and remembers it, and skips what is not asked for.

    A member's tar header and the header of the image after it are one request.
    """

    def __init__(self, shards: ShardBytes, file: ShardFile) -> None:
        self._shards, self._file, self._position = shards, file, 0
        self._blocks = deque[tuple[int, bytes]](maxlen=_BLOCKS)  # (offset, bytes)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.bytes}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._file.bytes - self._position))
        buffer[:size] = self._bytes(size)
        self._position += size
        return size

    def _bytes(self, size: int) -> bytes:
        if size == 0:
            return b""
        for first, block in self._blocks:
            if first <= self._position and self._position + size <= first + len(block):
                return block[self._position - first : self._position - first + size]
        ahead = min(max(size, _AHEAD_BYTES), self._file.bytes - self._position)
        self._blocks.append((self._position, self._shards.read([(self._file, Span(self._position, ahead))])[0]))
        return self._blocks[-1][1][:size]
