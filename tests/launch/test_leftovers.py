"""A session of tests that is killed leaves nothing for long: the next one ends what it started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import leftovers
from tests.launch.cluster import until
from tests.launch.conftest import ROOT, needs

KILLED = """
import os, subprocess, sys
from tests.launch import leftovers
leftovers.PLACE = leftovers.Path(sys.argv[1])
with leftovers.session() as folder:
    sleep = {"args": ["sleep", "600"], "stdout": subprocess.DEVNULL, "start_new_session": True}
    noted = subprocess.Popen(**sleep)
    leftovers.started(folder, noted.pid)
    env = os.environ | {leftovers.MARK: str(folder)}
    marked = subprocess.Popen(**sleep, env=env)
    print(folder, noted.pid, marked.pid, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_the_next_session_ends_what_a_killed_one_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "PLACE", tmp_path)
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, text=True, check=False)
    folder, *pids = killed.stdout.split()
    left = [leftovers.identity(int(pid)) for pid in pids]
    assert [leftovers.is_alive(name) for name in left] == [True, True]
    foreign = subprocess.Popen(["sleep", "600"])
    try:
        with (Path(folder) / "started").open("a") as file:  # a number that another process has by now
            file.write(f"{foreign.pid}.1\n")
        with leftovers.session():
            until(lambda: not any(map(leftovers.is_alive, left)), 10, "they are alive")
            assert not Path(folder).exists()
            leftovers.clean_up()
            assert (tmp_path / leftovers.identity(os.getpid())).is_dir(), "this session is alive"
        assert foreign.poll() is None
    finally:
        foreign.kill()
        foreign.wait()
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_skips_and_under_the_projects_test_command_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "export KONTEXT_TRAIN_TEST_ALL=${KONTEXT_TRAIN_TEST_ALL:-1}" in (ROOT / "launch" / "test.sh").read_text()
    monkeypatch.setenv("KONTEXT_TRAIN_TEST_ALL", "1")
    with pytest.raises(AssertionError, match=r"no Slurm: slurmd is not installed\. KONTEXT_TRAIN_TEST_ALL=0 skips"):
        needs("no Slurm", "slurmd is not installed")
    monkeypatch.delenv("KONTEXT_TRAIN_TEST_ALL")
    with pytest.raises(pytest.skip.Exception, match="no Slurm: slurmd is not installed"):
        needs("no Slurm", "slurmd is not installed")
