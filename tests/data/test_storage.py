"""Remote shards give what local ones give, whatever the network does, or fail by name."""

import contextlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data_tools import index_shards
from kontext_train.data import cache as cache_module
from kontext_train.data.cache import RangeCache
from kontext_train.data.config import DataConfig, StorageConfig
from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import build_index
from kontext_train.data.loader import PackReader, train_batches
from kontext_train.data.plan import Planner, Position
from kontext_train.data.sample import SampleReader
from kontext_train.data.shard import Span
from kontext_train.data.sources import Mixture, Source
from kontext_train.data.storage import ShardFile
from kontext_train.data.transforms import Transform
from kontext_train.errors import ConfigError, StorageError
from tests.data.test_index import encoded, sample, write_tar
from tests.servers import BUCKET, FAULTS, FaultyServer, often, s3_server, web_server

FAST = {"timeout_s": 10.0, "retries": 8, "backoff_s": 0.001}


@pytest.fixture
def server(shards: Path, tmp_path: Path) -> Iterator[FaultyServer]:
    """The quickstart's shards, copied, on a web server."""
    shutil.copytree(shards, tmp_path / "www")
    with web_server(tmp_path / "www") as server:
        yield server


@pytest.fixture
def index(server: FaultyServer) -> ShardIndex:
    return indexed(server)


def indexed(server: FaultyServer, **settings: object) -> ShardIndex:
    """The index of a server's shards, in a local folder; requests counted from here."""
    out = server.folder.parent / "index"
    build_index(server.url, out=out, storage=StorageConfig(**FAST))  # type: ignore[arg-type]
    server.requests.clear()
    server.sent_bytes = server.most_at_once = 0
    return ShardIndex.open(out, StorageConfig(**FAST | settings))  # type: ignore[arg-type]


def fetch(index: ShardIndex, rows: object = None) -> list[bytes]:
    return SampleReader(index, Transform(1 << 20, 16)).fetch(range(len(index)) if rows is None else rows)  # type: ignore[arg-type]


def local_bytes(folder: Path) -> list[bytes]:
    return fetch(ShardIndex.open(folder))


# ---------------------------------------------------------------------------------------------------------------- HTTP


def test_a_whole_epoch_over_http_is_the_local_one_with_one_request_a_sample(
    server: FaultyServer, index: ShardIndex, shards: Path
) -> None:
    local = ShardIndex.open(shards)
    assert index.digest == local.digest  # the same data by another way
    assert fetch(index) == local_bytes(shards)
    assert len(server.requests) == len(index)
    ours, theirs = (SampleReader(i, Transform(1 << 20, 16)).read(7) for i in (index, local))
    assert (ours.key, ours.shard, ours.prompt) == (theirs.key, theirs.shard, theirs.prompt)
    assert np.array_equal(ours.target, theirs.target)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_that_fails_is_repeated(server: FaultyServer, index: ShardIndex, shards: Path, fault: str) -> None:
    server.fault = lambda number, path: fault if number < 3 else None
    rows = range(2)
    assert fetch(index, rows) == local_bytes(shards)[:2]
    assert len(server.requests) == len(rows) + 3


def test_a_slow_answer_is_asked_for_again(server: FaultyServer, shards: Path) -> None:
    index = indexed(server, timeout_s=0.2)
    server.fault = lambda number, path: "slow" if number == 0 else None
    assert fetch(index, [0]) == local_bytes(shards)[:1]
    assert len(server.requests) == 2


def test_nothing_is_lost_or_mixed_up_on_a_bad_network(server: FaultyServer, shards: Path) -> None:
    index = indexed(server, retries=20)
    server.fault = often(0.3)
    assert fetch(index) == local_bytes(shards)
    assert len(server.requests) > 1.2 * len(index)  # control: there were faults


def test_indexing_on_a_bad_network(server: FaultyServer, shards: Path) -> None:
    server.fault = often(0.3)
    assert indexed(server, retries=20).digest == ShardIndex.open(shards).digest


@pytest.mark.parametrize("fault", [*FAULTS, "slow"])
def test_the_end_of_patience_names_url_range_and_attempts(server: FaultyServer, fault: str) -> None:
    index = indexed(server, retries=2, timeout_s=0.1)
    server.fault = lambda number, path: fault
    location = index.location(3)
    first, last = location.run().offset, location.run().offset + location.run().size - 1
    name = re.escape(f"{server.url}/{location.name} bytes {first}-{last}")
    with pytest.raises(StorageError, match=f"^{name}: gave up after 3 attempts; the last one: "):
        fetch(index, [3])
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "reason"), [("403", "HTTP 403"), ("whole", r"the server sends whole files only; it must answer range")]
)
def test_what_asking_again_does_not_mend_fails_at_once(
    server: FaultyServer, index: ShardIndex, fault: str, reason: str
) -> None:
    server.fault = lambda number, path: fault
    with pytest.raises(StorageError, match=reason):
        fetch(index, [0])
    assert len(server.requests) == 1


def test_changed_and_lost_shards_are_refused_by_name(server: FaultyServer, index: ShardIndex) -> None:
    name = index.location(0).name
    shard, url = server.folder / name, re.escape(f"{server.url}/{name}")
    os.utime(shard, ns=(0, 1))
    with pytest.raises(StorageError, match=rf"{url} was modified after it was indexed \(ETag .*index them again"):
        fetch(index, [0])
    with open(shard, "ab") as file:
        file.write(b"more")
    with pytest.raises(StorageError, match=rf"{url} has \d+ bytes, \d+ when indexed"):
        fetch(index, [0])
    os.truncate(shard, 100)
    with pytest.raises(StorageError, match=rf"{url} has 100 bytes, \d+ when indexed"):
        fetch(index, [3])
    shard.unlink()
    with pytest.raises(StorageError, match=rf"{url} bytes .*HTTP 404"):
        fetch(index, [0])
    assert len(server.requests) == 4  # none was repeated


def test_requests_at_once_are_bounded(server: FaultyServer) -> None:
    index = indexed(server, concurrency=3)
    server.delay_s = 0.02
    fetch(index, range(20))
    assert server.most_at_once == 3


def test_indexing_reads_headers_and_not_images(tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    big = encoded(300, 300)  # noise: 270 kB each
    members = [m for k in range(5) for m in ((f"{k}.json", b'{"prompt": ""}'), (f"{k}.target.png", big))]
    size = write_tar(tmp_path / "www" / "a.tar", members).stat().st_size
    with web_server(tmp_path / "www") as server:
        report = build_index(server.url, out=tmp_path / "index")
        assert (report.samples, report.problems) == (5, [])
        assert server.sent_bytes < 0.15 * size
        assert len(server.requests) < 20
        index = ShardIndex.open(tmp_path / "index")
        fetch(index)
        assert server.sent_bytes > 0.95 * size  # control: that is what images weigh


def test_problems_of_remote_shards_are_reported(tmp_path: Path) -> None:
    www = tmp_path / "www"
    www.mkdir()
    write_tar(www / "a.tar", [*sample("0"), ("1.json", b"{prompt"), *sample("1")[1:], *sample("2")])
    (www / "b.tar").write_bytes(b"")
    (www / "c.tar.gz").write_bytes(b"x")
    with web_server(www) as server:
        report = build_index(server.url, out=tmp_path / "index")
        local = build_index(www)
    assert report.problems == local.problems
    assert [problem.shard for problem in report.problems] == ["c.tar.gz", "a.tar", "b.tar"]


def test_an_index_on_the_server_is_copied_once_and_again_when_it_changed(server: FaultyServer, tmp_path: Path) -> None:
    build_index(server.url, out=tmp_path / "index")
    shutil.copy(tmp_path / "index" / "index.arrow", server.folder / "index.arrow")
    config = StorageConfig(**FAST, cache_dir=str(tmp_path / "cache"))  # type: ignore[arg-type]
    server.requests.clear()
    index = ShardIndex.open(f"{server.url}/", config)
    assert fetch(index, [0]) == local_bytes(server.folder)[:1]
    before = len(server.requests)
    ShardIndex.open(server.url, config)
    assert len(server.requests) == before + 1  # a look at its ETag
    os.utime(server.folder / "index.arrow", ns=(0, 1))
    ShardIndex.open(server.url, config)
    assert len(server.requests) == before + 3
    (server.folder / "index.arrow").unlink()
    with pytest.raises(StorageError, match=r"index\.arrow .*HTTP 404.*run: python -m data_tools\.index_shards http"):
        ShardIndex.open(server.url, config)


def test_http_cannot_be_written_to(server: FaultyServer, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert index_shards.main([server.url]) == 1
    assert "cannot be written to. Give --out" in capsys.readouterr().err
    assert index_shards.main([server.url, "--out", str(tmp_path / "index"), "--processes", "2"]) == 0
    assert f"{server.url}: 200 samples in " in capsys.readouterr().out


def test_shards_can_be_named(server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = sorted(path.name for path in server.folder.glob("*.tar"))[0]
    (tmp_path / "names.txt").write_text(f"{name}\n")
    arguments = [server.url, "--out", str(tmp_path / "index"), "--shards", str(tmp_path / "names.txt")]
    assert index_shards.main(arguments) == 0
    assert "in 1 shards" in capsys.readouterr().out
    index = ShardIndex.open(tmp_path / "index")
    assert {index.location(i).name for i in range(len(index))} == {name}


def test_an_index_of_local_files_is_not_one_of_their_copies(server: FaultyServer, tmp_path: Path) -> None:
    config = StorageConfig(cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"was made of local files .*run: python -m data_tools\.index_shards http://"):
        ShardIndex.open(server.url, config)


def test_a_local_index_goes_beside_its_shards(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"out is {tmp_path}, but {shards} is local"):
        build_index(shards, out=tmp_path)


def test_worker_processes_read_after_their_parent_did(server: FaultyServer, index: ShardIndex, shards: Path) -> None:
    """An event loop or a connection that was made before the fork must not be used after it."""
    fetch(index, [0])
    server.fault = often(0.1)
    ours, theirs = (_first_batches(i) for i in (index, ShardIndex.open(shards)))
    assert len(ours) == 4
    for (keys, pixels), (other_keys, other_pixels) in zip(ours, theirs, strict=True):
        assert keys == other_keys
        assert np.array_equal(pixels, other_pixels)
    fetch(index, [1])  # and the parent still can


def _first_batches(index: ShardIndex) -> list[tuple[list[str], np.ndarray]]:
    config = DataConfig(tokens_per_pack=128, window_samples=64, workers=2)
    source = Source("train", index, Fraction(1), Transform(config.max_pixels, 16), 0.0, 0.0)
    mixture = Mixture([source], 12)
    planner = Planner(mixture, config, 0, lambda text, target, context: text + target + context)
    reader = PackReader(mixture, holes=False)
    with contextlib.closing(
        train_batches(planner, reader, config, Position(), rank=0, ranks=1, microbatches=1)
    ) as all_:
        return [(batch.keys, batch.images.numpy().copy()) for batch, _ in zip(all_, range(4), strict=False)]


# ------------------------------------------------------------------------------------------------------------------ S3


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        import boto3

        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield


def upload(folder: Path, prefix: str) -> str:
    import boto3

    for shard in folder.glob("*.tar"):
        boto3.client("s3").upload_file(str(shard), BUCKET, f"{prefix}/{shard.name}")
    return f"s3://{BUCKET}/{prefix}"


def test_a_whole_epoch_over_s3_is_the_local_one(
    s3: None, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = upload(shards, "epoch")
    assert index_shards.main([url, "--processes", "2"]) == 0  # the index goes beside the shards
    assert "200 samples" in capsys.readouterr().out
    index = ShardIndex.open(url, StorageConfig(**FAST, cache_dir=str(tmp_path)))  # type: ignore[arg-type]
    assert index.digest == ShardIndex.open(shards).digest
    assert fetch(index) == local_bytes(shards)
    assert fetch(index) == local_bytes(shards)  # from the cache
    assert index_shards.main([url]) == 0
    assert "(" in capsys.readouterr().out.splitlines()[0]  # nothing had to be read again


def test_changed_and_lost_objects_are_refused_by_name(s3: None, tmp_path: Path) -> None:
    import boto3

    write_tar(tmp_path / "a.tar", sample("0") + sample("1"))
    url = upload(tmp_path, "changed")
    build_index(url, storage=StorageConfig(**FAST))  # type: ignore[arg-type]
    index = ShardIndex.open(url, StorageConfig(**FAST, cache_dir=str(tmp_path)))  # type: ignore[arg-type]
    raw = bytearray((tmp_path / "a.tar").read_bytes())
    raw[600] ^= 1
    client = boto3.client("s3")
    client.put_object(Bucket=BUCKET, Key="changed/a.tar", Body=bytes(raw))
    with pytest.raises(StorageError, match=rf"{url}/a\.tar was modified after it was indexed \(ETag"):
        fetch(index, [0])
    client.put_object(Bucket=BUCKET, Key="changed/a.tar", Body=bytes(raw) + bytes(512))
    with pytest.raises(StorageError, match=rf"{url}/a\.tar has \d+ bytes, \d+ when indexed"):
        fetch(index, [0])
    client.put_object(Bucket=BUCKET, Key="changed/a.tar", Body=b"short")
    with pytest.raises(StorageError, match=rf"{url}/a\.tar has 5 bytes, \d+ when indexed"):
        fetch(index, [1])
    client.delete_object(Bucket=BUCKET, Key="changed/a.tar")
    with pytest.raises(StorageError, match=rf"{url}/a\.tar bytes .*HTTP 404"):
        fetch(index, [0])


def test_an_index_that_could_not_be_uploaded_is_not_made_again(
    s3: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "a.tar", sample("0"))
    (tmp_path / "empty.tar").write_bytes(b"")
    url, config = upload(tmp_path, "upload"), StorageConfig(**FAST, cache_dir=str(tmp_path))  # type: ignore[arg-type]

    async def refuse(*arguments: object) -> None:
        raise PermissionError("Access Denied")

    with monkeypatch.context() as patch:
        patch.setattr("s3fs.S3FileSystem._put_file", refuse)
        with pytest.raises(StorageError, match=rf"{url}/index\.arrow cannot be written \(Access Denied\)"):
            build_index(url, storage=config)
    report = build_index(url, storage=config)
    assert report.scanned == 1  # the empty one, whose problem is told again
    assert [problem.shard for problem in report.problems] == ["empty.tar"]
    assert len(ShardIndex.open(url, config)) == 1


def test_storage_that_does_not_answer(s3: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # discard: nobody listens
    with pytest.raises(
        StorageError, match=r"s3://bucket/x/index\.arrow bytes 0-0: gave up after 2 attempts; .*Connect"
    ):
        ShardIndex.open("s3://bucket/x", StorageConfig(retries=1, backoff_s=0.001))


# --------------------------------------------------------------------------------------------------------------- cache


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.glob("ranges/*/*") if path.is_file()]


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in entries(folder))


FILE = ShardFile("https://host/a.tar", 1 << 30, etag='"1"')


def content(i: int, size: int = 1000) -> bytes:
    return np.random.default_rng(i).bytes(size)


def test_a_second_epoch_comes_from_the_cache(server: FaultyServer, tmp_path: Path, shards: Path) -> None:
    index = indexed(server, cache_dir=str(tmp_path / "cache"))
    assert fetch(index) == local_bytes(shards)
    assert len(server.requests) == len(index)
    assert fetch(index) == local_bytes(shards)
    assert len(server.requests) == len(index)


def test_a_damaged_entry_is_noticed_and_read_again(server: FaultyServer, tmp_path: Path, shards: Path) -> None:
    index = indexed(server, cache_dir=str(tmp_path / "cache"))
    fetch(index, range(5))
    for path in entries(tmp_path / "cache")[:2]:
        raw = bytearray(path.read_bytes())
        raw[100] ^= 1
        path.write_bytes(raw)
    path.write_bytes(raw[:50])
    server.requests.clear()
    with pytest.warns(UserWarning, match="is damaged; its bytes are read again from http"):
        assert fetch(index, range(5)) == local_bytes(shards)[:5]
    assert len(server.requests) == 2
    fetch(index, range(5))
    assert len(server.requests) == 2  # whole again


def test_an_entry_is_that_version_of_the_file_only(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 10_000)
    cache.put(FILE, Span(0, 1000), content(0))
    assert cache.get(FILE, Span(0, 1000)) == content(0)
    assert cache.get(FILE._replace(etag='"2"'), Span(0, 1000)) is None
    assert cache.get(FILE._replace(bytes=5), Span(0, 1000)) is None
    assert cache.get(FILE, Span(1, 1000)) is None


def test_the_cache_is_bounded_and_forgets_what_was_unused_for_longest(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 20_000)
    for i in range(100):
        cache.put(FILE, Span(i, 1000), content(i))
        assert used(tmp_path) <= 20_000
        assert cache.get(FILE, Span(0, 1000)) == content(0)  # in use all the time
        os.utime(cache._path(FILE, Span(0, 1000)), ns=(time.time_ns() + i, time.time_ns() + i))
    assert cache.get(FILE, Span(99, 1000)) == content(99)
    assert cache.get(FILE, Span(1, 1000)) is None
    assert used(tmp_path) > 10_000
    cache.put(FILE, Span(0, 30_000), content(0, 30_000))  # larger than all of it
    assert cache.get(FILE, Span(0, 30_000)) is None


def _hammer(folder: Path, seed: int, results: "multiprocessing.Queue[tuple[int, int]]") -> None:
    cache, rng = RangeCache(folder, 30_000), np.random.default_rng(seed)
    hits = wrong = 0
    for i in rng.integers(0, 60, 600).tolist():
        raw = cache.get(FILE, Span(i, 1000))
        if raw is None:
            cache.put(FILE, Span(i, 1000), content(i))
        else:
            hits, wrong = hits + 1, wrong + (raw != content(i))
    results.put((hits, wrong))


def test_processes_share_a_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=_hammer, args=(tmp_path, seed, results)) for seed in range(3)]
    for child in children:
        child.start()
    most = 0
    while any(child.is_alive() for child in children):
        with contextlib.suppress(FileNotFoundError):
            most = max(most, used(tmp_path))
    found = [results.get(timeout=10) for _ in children]
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert all(hits > 100 and wrong == 0 for hits, wrong in found), found
    assert 20_000 < most <= 30_000 + 2 * 1016  # what others are about to write when one counts anew
    assert used(tmp_path) <= 30_000


def _killed_at(call: str, folder: Path) -> None:
    def die(*arguments: object) -> None:
        os.kill(os.getpid(), 9)

    setattr(cache_module.os, call, die)
    RangeCache(folder, 20_000).put(FILE, Span(0, 1000), content(0))


@pytest.mark.parametrize("call", ["pwrite", "replace"], ids=["while it holds the lock", "before the entry is in place"])
def test_the_cache_survives_kill_9(tmp_path: Path, call: str) -> None:
    child = multiprocessing.get_context("fork").Process(target=_killed_at, args=(call, tmp_path))
    child.start()
    child.join(10)
    assert child.exitcode == -9
    assert len(list(tmp_path.glob("ranges/*/*.tmp"))) == (call == "replace")
    cache = RangeCache(tmp_path, 20_000)
    assert cache.get(FILE, Span(0, 1000)) is None
    for i in range(40):
        cache.put(FILE, Span(i, 1000), content(i))
        assert used(tmp_path) <= 20_000
        assert cache.get(FILE, Span(i, 1000)) == content(i)
    assert list(tmp_path.glob("ranges/*/*.tmp")) == []  # evicted with the rest


def test_a_disk_that_fails_costs_the_cache_and_not_the_run(
    server: FaultyServer, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    index = indexed(server, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(cache_module.os, "replace", full)
    with pytest.warns(UserWarning, match="cache_dir cannot keep what is read: .*No space left"):
        assert fetch(index, range(3)) == local_bytes(shards)[:3]


# ------------------------------------------------------------------------------------------------------------- options


def test_local_data_imports_no_remote_storage() -> None:
    code = (
        "import sys, kontext_train.data.loader, data_tools.index_shards; "
        "print(sorted({'fsspec', 's3fs', 'aiohttp', 'botocore'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(("module", "url", "extra"), [("s3fs", "s3://b/x", "s3"), ("aiohttp", "https://h/x", "http")])
def test_missing_packages_are_named(module: str, url: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; from kontext_train.data.index import *; ShardIndex.open({url!r})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert f"StorageError: {url}" in run.stderr
    assert "needs a package that is missing" in run.stderr
    assert f"pip install 'kontext-train[{extra}]'" in run.stderr


def test_options_are_checked() -> None:
    for key, value in [("timeout_s", 0), ("retries", -1), ("backoff_s", -0.1), ("concurrency", 0), ("cache_gib", 0)]:
        with pytest.raises(ConfigError, match=rf"data\.storage\.{key}={value}: must be"):
            StorageConfig(**{key: value})
    with pytest.raises(ConfigError, match=r"data\.train='ftp://host/x': is neither a local folder nor one of http://"):
        DataConfig(train="ftp://host/x")
    DataConfig(train="s3://bucket/x", validation="https://host/x")
