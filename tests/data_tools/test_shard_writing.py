"""Jobs that are interrupted, for real, and go on; and a worker that dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools import shard_writing
from data_tools.shard_writing import Task, growing_folder, replacing, run_tasks, write_shard


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """100 rows, of 40 pictures that take a moment to read."""
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    rows = [{"target": f"{i % 40}.png", "prompt": f"p{i}", "context": [f"{(i + 1) % 40}.png"]} for i in range(100)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "t.jsonl"


def started(table: Path, out: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "data_tools.make_shards", "--table", str(table), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--samples-per-shard", "1", "--processes", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, as a terminal gives it
    )


def wait_for_shards(partial: Path, process: "subprocess.Popen[str]", count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list((partial / ".done").glob("*.json"))) < count:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


def shard_state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.tar")}


@pytest.mark.parametrize("how", ["Ctrl-C", "kill -9 of the parent alone"])
def test_interrupted_job_goes_on_where_it_was(table: Path, tmp_path: Path, how: str) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    job = started(table, out)
    wait_for_shards(partial, job, 5)
    if how == "Ctrl-C":
        os.killpg(job.pid, signal.SIGINT)
    else:
        os.kill(job.pid, signal.SIGKILL)
    _, said = job.communicate(timeout=60)  # its processes hold the other end of the pipe: they are gone too
    if how == "Ctrl-C":
        assert job.returncode == 130
        assert said.splitlines() == ["interrupted. What is done is kept: the same command goes on from here"]
    assert not out.exists()
    records = {path.name.removesuffix(".json") for path in (partial / ".done").glob("*.json")}
    before = {name: state for name, state in shard_state(partial).items() if name in records}
    assert 5 <= len(before) < 100

    again = started(table, out)
    assert again.wait(timeout=200) == 0, again.communicate()
    after = shard_state(out)
    assert len(after) == 100
    assert {name: after[name] for name in before} == before  # not written again: the times are the same
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def _die(given: Any) -> dict[str, Any]:
    if given == "c":
        os.kill(os.getpid(), signal.SIGKILL)  # what the kernel does for lack of memory
    return {"given": given}


def _fail(given: Any) -> dict[str, Any]:
    raise ValueError(f"{given} is bad")


def tasks(names: str) -> Iterator[Task]:
    return (Task(name, name, name, 1) for name in names)


def test_dead_process_is_told_with_what_it_worked_on(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"a process died, perhaps for lack of memory, at one of .*c.*fewer --processes"),
        growing_folder(tmp_path / "out") as partial,
    ):
        list(run_tasks(_die, tasks("abc"), partial, processes=2, total=3, label=""))


def test_error_in_a_process_comes_through(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a is bad"), growing_folder(tmp_path / "out") as partial:
        list(run_tasks(_fail, tasks("a"), partial, processes=2, total=1, label=""))


def test_record_counts_only_for_the_same_task(tmp_path: Path) -> None:
    calls = list[str]()

    def work(given: str) -> dict[str, Any]:
        calls.append(given)
        if given == "bad":
            raise RuntimeError("after it replaced what it writes")
        return {"given": given}

    def run(digest: str, partial: Path) -> list[dict[str, Any]]:
        results = run_tasks(work, [Task("a", digest, digest, 1)], partial, processes=1, total=1, label="")
        return [result for _, result in results]

    with growing_folder(tmp_path / "out") as partial:
        for digest in ("1", "1", "2", "2"):
            assert run(digest, partial) == [{"given": digest}]
        with pytest.raises(RuntimeError, match="after it replaced"):
            run("bad", partial)
        assert run("2", partial) == [{"given": "2"}]
    assert calls == ["1", "2", "bad", "2"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_kill_while_the_finished_folder_is_tidied_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(out: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shard_writing, "_clean_up", killed)
        with pytest.raises(KeyboardInterrupt), growing_folder(tmp_path / "out") as partial:
            (partial / "a.tar").touch()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.tar", ".done", ".lock"}
    with pytest.raises(ValueError, match="out, which exists"), growing_folder(tmp_path / "out"):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.tar"]


def test_file_is_whole_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(TypeError, match="bytes-like"), replacing(tmp_path / "a") as file:
        file.writelines([b"half", "text"])  # type: ignore[list-item]
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert write_shard(tmp_path / "s.tar", [("k", {"json": b"{}"})]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "s.tar"]
