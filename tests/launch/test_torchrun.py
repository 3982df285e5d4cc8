"""launch/torchrun.sh on one host: ranks that die are started again, signals save, and the exit status tells which."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch import runs
from tests.launch.cluster import command_line, environment, kill, processes
from tests.launch.conftest import ROOT, Straight
from tests.launch.test_slurm import same, wait_for_step


@contextmanager
def torchrun(*arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A started launch/torchrun.sh; its output in `communicate()`, all its processes gone afterwards."""
    mark = f"test-{os.getpid()}-{id(arguments)}"
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), *arguments]
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "RUN_ID": mark} | variables
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        for pid in processes():
            if environment(pid).get("RUN_ID") == mark:
                kill(pid)
        process.wait()


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of the training ranks, by rank."""
    mark = environment(process.pid)["RUN_ID"]
    ours = [p for p in processes() if environment(p).get("RUN_ID") == mark and "RANK" in environment(p)]
    return {int(environment(p)["RANK"]): p for p in ours if "-m kontext_train.train" in command_line(p)}


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_the_run_ends_bitwise_the_same(straight: Straight, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with torchrun(*straight.slow, f"run.dir={run_dir}", RANKS="2", MAX_RESTARTS="1") as process:
        wait_for_step(run_dir, 7)
        kill(ranks_of(process)[1])
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "going on from" in output
    assert same(run_dir, straight.run_dir)


@pytest.mark.slow
def test_a_signal_saves_and_the_status_says_so(straight: Straight, tmp_path: Path) -> None:
    """It is no failure to start again after. (SIGUSR1, to every process, is what Slurm's preemption sends.)"""
    run_dir = tmp_path / "run"
    with torchrun(*straight.slow, f"run.dir={run_dir}", RANKS="1", MAX_RESTARTS="3") as process:
        wait_for_step(run_dir, 3)
        process.terminate()
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 75, output
    assert "stopped by SIGTERM after step" in output
    assert "going on from" not in output
    now = runs.read(run_dir)
    assert now.checkpoint is not None
    assert now.checkpoint.name == f"step_{now.step:08d}"


def test_more_nodes_need_a_head() -> None:
    with torchrun(NODES="2") as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "NODES=2 needs HEAD=HOST:PORT" in output
