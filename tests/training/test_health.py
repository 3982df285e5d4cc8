"""Parts of a run's health alone: limits, slow ranks, heartbeat, memory snapshots, git."""

import json
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kontext_train.distributed import memory
from kontext_train.distributed.config import ParallelConfig
from kontext_train.distributed.memory import out_of_memory
from kontext_train.distributed.watchdog import Watch
from kontext_train.errors import ConfigError
from kontext_train.training import run_folder, stragglers
from kontext_train.training.config import HealthConfig, ProfilerConfig
from kontext_train.training.heartbeat import Heartbeat, heartbeat
from kontext_train.training.run_folder import git_state, is_told
from kontext_train.training.stability import threshold
from kontext_train.training.stragglers import PERSISTENT, Stragglers

CPU = torch.device("cpu")
WORLD: Any = SimpleNamespace(rank=0, size=3, is_main=True, device=CPU)


def test_a_limit_is_the_median_and_so_many_median_deviations() -> None:
    """One value far out moves it little; the mean and the standard deviation it would drag along."""
    assert threshold([1.0, 2.0, 3.0, 4.0, 5.0], mads=10) == 3 + 10 * 1
    assert threshold([1.0, 2.0, 3.0, 4.0, 1000.0], mads=10) == 3 + 10 * 1
    assert threshold([2.0, 2.0, 2.0, 2.0], mads=10) == 2


# -- stragglers ------------------------------------------------------------------------------------------------


def reported(tables: list[list[list[float]]], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What rank 0 of three would log, given all ranks' seconds in each part; a second passes between log steps."""
    clock, given = iter(range(100)), iter(tables)
    monkeypatch.setattr(stragglers.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(stragglers, "gather_over_ranks", lambda own: next(given))
    watched = Stragglers(1.5, WORLD, [])
    return [watched.metrics() for _ in tables]


EVEN = [[0.1, 0.2, 0.5, 0.05, 0.0]] * 3
SLOW = [*EVEN[:2], [0.1, 0.2, 0.8, 0.05, 0.0]]  # rank 2 at train


def test_a_rank_is_named_once_it_is_slow_at_several_log_steps_in_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = reported([SLOW] * 5, monkeypatch)
    assert values[0]["straggler/train/rank"] == 2
    assert values[0]["straggler/train/seconds"] == 0.8
    assert values[0]["straggler/train/median"] == 0.5
    assert capsys.readouterr().err.count("rank 2 is slow at train: 0.8 s") == 1


def test_a_rank_that_recovers_or_loses_little_is_not_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reported([*[SLOW] * (PERSISTENT - 1), EVEN, *[SLOW] * (PERSISTENT - 1)], monkeypatch)
    little = [*EVEN[:2], [0.1, 0.2, 0.5, 0.065, 0.0]]  # 1.3 times at update
    reported([little] * 5, monkeypatch)
    brief = [[first, 0.2, 0.5, 0.05, 0.0] for first in (0.001, 0.001, 0.011)]  # 11 times, but 10 ms
    reported([brief] * 5, monkeypatch)
    assert capsys.readouterr().err == ""


# -- heartbeat -------------------------------------------------------------------------------------------------


def beat(file: Path) -> tuple[int, str]:
    read = json.loads(file.read_text())
    assert read["written"] >= read["entered"] > 0
    return read["step"], read["phase"]


def test_the_heartbeat_is_rare_however_often_the_loop_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, written = tmp_path / "heartbeat.json", []
    write = Heartbeat._write
    monkeypatch.setattr(Heartbeat, "_write", lambda self: (written.append(self.here[:2]), write(self)))
    with heartbeat(file, every_s=1000) as beats:
        while not file.is_file():
            pass
        assert beat(file) == (0, "start")
        for step in range(1000):
            beats.at(step, "data")
    assert beat(file) == (999, "end")
    assert written == [(0, "start"), (999, "end")]


@pytest.mark.parametrize(("error", "phase"), [(SystemExit(75), "stopped"), (RuntimeError("lost"), "failed")])
def test_the_last_beat_says_how_it_ended(tmp_path: Path, error: BaseException, phase: str) -> None:
    def ends() -> None:
        with heartbeat(tmp_path / "beat.json") as beats:
            beats.at(7, "data")
            raise error

    with pytest.raises(type(error), match=str(error)):
        ends()
    assert beat(tmp_path / "beat.json") == (7, phase)


def test_a_reader_never_meets_half_a_beat(tmp_path: Path) -> None:
    file = tmp_path / "heartbeat.json"
    with heartbeat(file, every_s=1e-4) as beats:
        while not file.is_file():
            pass
        step, seen = 0, set[int]()
        while step < 2000 or len(seen) < 10:
            step += 1
            beats.at(step, "data" * 100)
            seen.add(beat(file)[0])
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())


def test_a_heartbeat_that_cannot_be_written_is_told_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with heartbeat(tmp_path / "file" / "heartbeat.json", every_s=1e-3) as beats:
        for step in range(1000):
            beats.at(step, "data")
    assert capsys.readouterr().err.count("heartbeat.json cannot be written") == 1


# -- memory ----------------------------------------------------------------------------------------------------


def test_out_of_memory_names_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch writes one on a GPU only; here something else does."""
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda file: Path(file).write_bytes(b"blocks"))
    watch = Watch(SimpleNamespace(rank=3, size=1, device=CPU), ParallelConfig())  # type: ignore[arg-type]
    watch.snapshot = tmp_path / "memory" / "rank_0003.pickle"
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    watch.fail(error)
    assert watch.snapshot.read_bytes() == b"blocks"
    (note,) = error.__notes__
    assert f"Who holds what is in {watch.snapshot}" in note
    assert "Out of memory: " in note
    other = RuntimeError("no such tensor")
    watch.fail(other)
    assert "Who holds" not in other.__notes__[0]


def test_a_snapshot_that_fails_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    told = out_of_memory(CPU, tmp_path / "rank_0000.pickle")
    assert "No snapshot could be written: OSError: [Errno 28] No space left on device. Use parallel." in told
    assert "snapshot" not in out_of_memory(CPU, None)


def test_history_is_recorded_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda max_entries: asked.append(max_entries))
    memory.record_history(100)
    assert asked == [100]


# -- git and variables -----------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package in a repository with one commit."""
    package = tmp_path / "repository" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("one\n")
    git(package.parent, "init", "--quiet")
    git(package, "add", ".")
    git(package, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "first")
    return package


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True).stdout


def test_a_patch_makes_the_commit_what_ran(checkout: Path) -> None:
    state, patch = git_state(checkout)
    assert state is not None
    assert (state["commit"], state["changed"], patch) == (git(checkout, "rev-parse", "HEAD").strip(), [], b"")
    (checkout / "__init__.py").write_text("two\n")
    (checkout / "new.py").write_text("not in git\n")
    state, patch = git_state(checkout)
    assert state is not None
    assert state["changed"] == [" M package/__init__.py", "?? package/new.py"]
    git(checkout, "stash", "--quiet")
    (checkout.parent / "uncommitted.patch").write_bytes(patch)
    git(checkout.parent, "apply", "uncommitted.patch")
    assert (checkout / "__init__.py").read_text() == "two\n"


def test_a_large_patch_is_cut_and_says_so(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "__init__.py").write_text("two\n" * 1000)
    monkeypatch.setattr(run_folder, "PATCH_BYTES", 100)
    state, patch = git_state(checkout)
    assert state is not None
    assert (state["patch_was_cut"], len(patch)) == (True, 100)


def test_outside_of_a_checkout_there_is_no_git_state(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = checkout / "venv" / "package"  # inside a checkout that does not track it
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    assert git_state(installed) == (None, b"")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == (None, b"")
    monkeypatch.setenv("PATH", "")
    assert git_state(checkout) == (None, b"")


@pytest.mark.parametrize(
    ("variable", "told"),
    [
        ("NCCL_DEBUG", True),
        ("SLURM_JOB_ID", True),
        ("CUDA_VISIBLE_DEVICES", True),
        ("HF_TOKEN", False),
        ("WANDB_API_KEY", False),
        ("SLURM_JWT_Secret", False),
        ("NVIDIA_PASSWORD", False),
        ("AWS_PROFILE", False),
    ],
)
def test_variables_that_steer_are_told_and_secrets_never(variable: str, told: bool) -> None:
    assert is_told(variable) == told


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: HealthConfig(spike_mads=0.5), r"health\.spike_mads=0\.5: must be at least 1, or 0"),
        (lambda: HealthConfig(spike_window=3), r"health\.spike_window=3: must be at least 4"),
        (lambda: HealthConfig(max_skips=0), r"health\.max_skips=0: must be at least 1"),
        (lambda: HealthConfig(max_rollbacks=-1), r"health\.max_rollbacks=-1"),
        (lambda: HealthConfig(straggler_factor=1), r"health\.straggler_factor=1: must be above 1"),
        (lambda: HealthConfig(memory_history=-1), r"health\.memory_history=-1"),
        (lambda: ProfilerConfig(steps=-1), r"profiler\.steps=-1: must not be negative"),
    ],
)
def test_bad_values_are_refused_by_key(make: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        make()
