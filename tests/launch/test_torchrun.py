"""launch/torchrun.sh on one host: signals save, the exit status tells which, and a frozen torchrun is ended."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kontext_train.config import TrainConfig
from kontext_train.errors import ConfigError
from kontext_train.train import INTERRUPTED, start
from launch import end_frozen, runs
from tests.launch import leftovers
from tests.launch.conftest import ROOT, wait_for_step
from tests.runs import SMALL


@contextmanager
def torchrun(session: Path, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A started launch/torchrun.sh; its output in `communicate()`, all its processes gone afterwards."""
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), *arguments]
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), leftovers.MARK: str(session)} | variables
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    leftovers.started(session, process.pid)
    try:
        yield process
    finally:
        leftovers.end_marked(session)
        process.wait()


@pytest.mark.slow
def test_a_signal_saves_and_the_status_says_so(session: Path, shards: Path, tmp_path: Path) -> None:
    """It is no failure to start again after. (SIGUSR1, to every process, is what Slurm's preemption sends.)"""
    run_dir = tmp_path / "run"
    options = (*SMALL, f"data.train={shards}", "run.steps=100000", f"run.dir={run_dir}")
    with torchrun(session, *options, RANKS="1", MAX_RESTARTS="3") as process:
        wait_for_step(run_dir, 3)
        process.terminate()
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 75, output
    assert "stopped by SIGTERM after step" in output
    assert "going on from" not in output
    now = runs.read(run_dir)
    assert now.checkpoint is not None
    assert now.checkpoint.name == f"step_{now.step:08d}"


def test_an_interruption_is_forgotten_when_ranks_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what fails later would pass for stopped, and be queued again for ever."""
    told_by = tmp_path / "interrupted"
    told_by.touch()
    monkeypatch.setenv(INTERRUPTED, str(told_by))

    def fails() -> TrainConfig:
        raise ConfigError("run.steps", 0, "must be at least 1", "Use 1")

    with pytest.raises(SystemExit, match="2"):
        start(fails)
    assert not told_by.exists()


def test_more_nodes_need_a_head(session: Path) -> None:
    with torchrun(session, NODES="2") as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "NODES=2 needs HEAD=HOST:PORT" in output


def test_a_torchrun_is_ended_if_all_its_ranks_are_zombies_and_only_then() -> None:
    """Stand-ins that start ranks and never look at them: all ended, one alive, none yet."""
    ranks = {"frozen": ["true", "true"], "ending": ["true", "sleep 60"], "waiting": []}
    never_looks = "import subprocess as s, sys, time; r = [s.Popen(a.split()) for a in sys.argv[1:]]; time.sleep(60)"
    torchruns = {name: subprocess.Popen([sys.executable, "-c", never_looks, *own]) for name, own in ranks.items()}
    command = [sys.executable, end_frozen.__file__]
    watchers = {
        name: subprocess.Popen([*command, str(p.pid), "1"], stderr=subprocess.PIPE, text=True)
        for name, p in torchruns.items()
    }
    try:
        _, said = watchers["frozen"].communicate(timeout=30)
        assert torchruns["frozen"].wait(timeout=10) == -9
        assert "all ranks of this host ended 1 s ago and torchrun has not noticed" in said
        for name in ("ending", "waiting"):
            with pytest.raises(subprocess.TimeoutExpired, match="timed out"):
                watchers[name].wait(timeout=2)
            assert torchruns[name].poll() is None
            torchruns[name].kill()
            torchruns[name].wait()
            assert watchers[name].wait(timeout=10) == 0, "it ends with torchrun"
    finally:
        for process in (*torchruns.values(), *watchers.values()):
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
