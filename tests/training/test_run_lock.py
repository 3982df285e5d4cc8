"""Two runs never write one run folder, and no lock outlives its owner."""

import errno
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kontext_train.distributed.config import ParallelConfig
from kontext_train.distributed.setup import process_group
from kontext_train.errors import ConfigError
from kontext_train.train import train
from kontext_train.training import run_lock as module
from kontext_train.training.run_lock import run_lock
from tests.runs import fork, in_processes, small_config, start


def hold(folder: Path, seconds: float, worker: bool = False) -> None:
    """A run of some seconds. worker: it forks a process that outlives it."""
    with process_group(ParallelConfig()), run_lock(str(folder), timeout_s=600):
        if worker and os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        (folder / "held").touch()
        time.sleep(seconds)


def once_held(folder: Path) -> None:
    end = time.monotonic() + 60
    while not (folder / "held").exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def refused(folder: Path, holder: int) -> None:
    """What a rank of a second run meets."""
    with (
        process_group(ParallelConfig()),
        pytest.raises(
            ConfigError, match=rf"run\.dir='.*': is being written by another run, process {holder} on .*SIGT"
        ),
        run_lock(str(folder), timeout_s=1),
    ):
        pytest.fail("two hold it")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_run_is_refused_on_every_rank_and_told_who_holds_the_folder(tmp_path: Path, ranks: int) -> None:
    first = fork(hold, tmp_path, 600)
    once_held(tmp_path)
    in_processes(ranks, refused, tmp_path, first.pid)
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == first.pid, "it still says who holds it"
    first.kill()


@pytest.mark.parametrize("worker", [False, True])
def test_a_killed_run_leaves_no_lock_even_if_its_workers_live_on(tmp_path: Path, worker: bool) -> None:
    first = fork(hold, tmp_path, 600, worker)
    once_held(tmp_path)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    in_processes(1, hold, tmp_path, 0)
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] != first.pid


def test_a_run_that_ends_late_is_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = fork(hold, tmp_path, 3)
    once_held(tmp_path)
    in_processes(1, hold, tmp_path, 0)
    assert f"is being written by process {first.pid} on " in capfd.readouterr().err
    first.join()
    assert first.exitcode == 0


def fails_with(number: int) -> Callable[..., None]:
    def lockf(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    return lockf


def test_a_file_system_without_locks_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "lockf", fails_with(errno.ENOLCK))
    hold(tmp_path, 0)
    assert "run.lock cannot be locked on its file system" in capsys.readouterr().err
    monkeypatch.setattr(fcntl, "lockf", fails_with(errno.EIO))
    with pytest.raises(ConfigError, match=r"run\.dir='.*': cannot be written to: .*Input/output error"):
        hold(tmp_path, 0)


def test_a_second_training_run_changes_nothing(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is refused before it writes; and the first goes on where it was when it is started again."""
    monkeypatch.setattr(module, "WAIT_S", 0.0)
    config = small_config(shards, tmp_path, "run.steps=1000000", "run.save_every_steps=1000000")
    first = start(1, train, config)[0]
    while not (tmp_path / "metrics.jsonl").exists():
        assert first.is_alive()
        time.sleep(0.05)
    with pytest.raises(ConfigError, match=rf"another run, process {first.pid} on "):
        train(config)
    assert [p.name for p in (tmp_path / "starts").iterdir()] == ["0001"]
    assert json.loads((tmp_path / "heartbeat.json").read_text())["pid"] == first.pid
    assert first.is_alive()
    first.kill()
    first.join()
    config.run.steps = 1
    train(config)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
