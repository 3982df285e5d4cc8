"""Shards are scanned by several processes, once: a killed job goes on, an old index is built upon."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kontext_train.data import index_scan
from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import build_index
from kontext_train.errors import StorageError
from tests.data.test_index import sample, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six shards; sample 3 is broken."""
    (tmp_path / "shards").mkdir()
    for i in range(6):
        members = sample(f"{i}-0", contexts=i % 3) + sample(f"{i}-1", contexts=1)
        write_tar(tmp_path / "shards" / f"{i}.tar", members if i != 3 else [*members, ("bad.json", b"[]")])
    return tmp_path / "shards"


def index_bytes(folder: Path) -> bytes:
    return (folder / "index.arrow").read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_processes_give_the_index_that_one_gives(folder: Path) -> None:
    alone = build_index(folder)
    expected = index_bytes(folder)
    (folder / "index.arrow").unlink()
    several = build_index(folder, workers=3)
    assert index_bytes(folder) == expected
    assert several == alone
    assert (several.samples, several.scanned, len(several.problems)) == (12, 6, 1)
    assert names(folder) == [*(f"{i}.tar" for i in range(6)), "index.arrow"]


def test_only_what_changed_is_read_again(folder: Path) -> None:
    build_index(folder)
    first = index_bytes(folder)
    again = build_index(folder)
    assert again.scanned == 1  # 3.tar has a problem, which is to be told again
    assert [problem.shard for problem in again.problems] == ["3.tar"]
    assert index_bytes(folder) == first

    write_tar(folder / "1.tar", sample("new", contexts=2))
    write_tar(folder / "9.tar", sample("added"))
    (folder / "2.tar").unlink()
    assert build_index(folder).scanned == 3  # 1, 9 and 3
    incremental = index_bytes(folder)
    (folder / "index.arrow").unlink()
    assert build_index(folder).scanned == 6
    assert index_bytes(folder) == incremental
    index = ShardIndex.open(folder)
    assert [index.location(i).key for i in range(len(index))][2:4] == ["new", "3-0"]


def test_a_new_time_alone_is_read_again(folder: Path) -> None:
    build_index(folder)
    os.utime(folder / "0.tar", ns=(0, 1))
    assert build_index(folder).scanned == 2


def test_a_damaged_or_older_index_is_built_anew(folder: Path) -> None:
    build_index(folder)
    expected = index_bytes(folder)
    os.truncate(folder / "index.arrow", 1000)
    assert build_index(folder).scanned == 6
    assert index_bytes(folder) == expected


def _build_slowly(folder: Path, workers: int) -> None:
    real = index_scan.scan_shard

    def slow(stream: object, name: str, *arguments: object) -> Iterator[object]:
        if name >= "4":
            time.sleep(60)
        return real(stream, name, *arguments)  # type: ignore[arg-type]

    index_scan.scan_shard = slow  # type: ignore[assignment]
    build_index(folder, workers=workers)


def _wait(condition: object) -> None:
    for _ in range(1000):
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.02)
    raise AssertionError("it never came")


@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_job_goes_on_where_it_was(folder: Path, tmp_path: Path, workers: int) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    build_index(tmp_path / "copy")
    job = multiprocessing.get_context("fork").Process(target=_build_slowly, args=(folder, workers))
    job.start()
    partial = folder / ".index.partial"
    _wait(lambda: len(list(partial.glob("*.arrow"))) == 4)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert len(children) == (workers if workers > 1 else 0)
    assert job.pid is not None
    os.kill(job.pid, signal.SIGKILL)
    job.join()
    _wait(lambda: not any(Path(f"/proc/{child}/cmdline").exists() for child in children))  # nor do they linger
    assert not (folder / "index.arrow").exists()

    newest = max(partial.glob("*.arrow"), key=lambda path: path.stat().st_mtime_ns)
    os.truncate(newest, 100)  # and one result was damaged
    write_tar(folder / "0.tar", sample("0-0", contexts=0) + sample("0-1", contexts=1))  # and one shard has a new time
    report = build_index(folder)
    assert report.scanned == 4
    assert (report.samples, len(report.problems)) == (12, 1)  # also of shards that were scanned before
    assert ShardIndex.open(folder).digest == ShardIndex.open(tmp_path / "copy").digest
    assert names(folder) == [*(f"{i}.tar" for i in range(6)), "index.arrow"]


def test_a_worker_that_is_killed_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(index_scan, "scan_shard", die)
    with pytest.raises(StorageError, match=r"a process that scans shards was killed, .*fewer processes"):
        build_index(folder, workers=2)


def test_a_shard_that_changes_while_it_is_read_stops_the_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = index_scan.scan_shard

    def change(stream: object, name: str, *arguments: object) -> Iterator[object]:
        os.utime(folder / name, ns=(0, 1))
        return real(stream, name, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(index_scan, "scan_shard", change)
    with pytest.raises(StorageError, match=r"0\.tar changed while it was read\. Run it again"):
        build_index(folder)
    assert not (folder / "index.arrow").exists()


def test_storage_that_fails_in_the_middle_of_an_image_is_no_bad_sample(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def __init__(self, stream: object) -> None:
            self.stream = stream

        def __getattr__(self, name: str) -> object:
            return getattr(self.stream, name)

        def read(self, size: int = -1) -> bytes:
            raw: bytes = self.stream.read(size)  # type: ignore[attr-defined]
            if b"PNG" in raw:
                raise OSError(5, "Input/output error")
            return raw

    real = index_scan.scan_shard
    monkeypatch.setattr(index_scan, "scan_shard", lambda stream, *arguments: real(Failing(stream), *arguments))  # type: ignore[arg-type]
    with pytest.raises(OSError, match="Input/output error"):
        build_index(folder)
