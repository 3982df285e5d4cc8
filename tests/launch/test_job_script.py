"""When train.sbatch queues its job again, with stand-ins for srun and scontrol; test_slurm.py has real ones."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT

SAVES = 'mkdir -p "$RUN_DIR/checkpoints/step_00000009" && touch "$RUN_DIR/checkpoints/step_00000009/COMPLETE"\n'

EXPORTS = 'case "$*" in *"kontext_train.export checkpoint="*) ;; *) exit 0 ;; esac; {}\n'


def program(file: Path, text: str) -> None:
    file.write_text(f"#!/usr/bin/env bash\n{text}")
    file.chmod(0o755)


@pytest.mark.parametrize(
    ("srun", "status", "again"),
    [
        ("exit 0", 0, False),
        ("exit 75", 75, True),
        ("kill -TERM $PPID; sleep 0.2; exit 75", 75, False),  # scancel, or Slurm queues it again itself
        ("exit 1", 1, False),
        (f"{SAVES} exit 1", 75, True),  # it got further than the start before
        (f"{SAVES} kill -TERM $PPID; sleep 0.2; exit 1", 1, False),
        (EXPORTS.format("exit 0"), 0, False),
        (EXPORTS.format("exit 3"), 3, False),
        (EXPORTS.format("kill -USR1 $PPID; sleep 0.2; exit 0"), 75, True),  # no time left for it
    ],
)
def test_a_job_is_queued_again_if_it_was_stopped_or_got_further(
    tmp_path: Path, srun: str, status: int, again: bool
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    done, record = ran(tmp_path, srun)
    assert done.returncode == status, done.stdout + done.stderr
    assert record == f"{status}\n"
    assert (tmp_path / "asked").exists() == again
    if again:
        assert (tmp_path / "asked").read_text() == "requeue 15_3\n"


def ran(
    tmp_path: Path, srun: str, settings: str = "", script: str = "train.sbatch", nodes: int = 1
) -> tuple[subprocess.CompletedProcess[str], str]:
    """A job script with stand-ins for Slurm; what it left as its record."""
    job = tmp_path / "submission" / "jobs" / "3"
    job.mkdir(parents=True)
    (job / "run_dir").write_text(f"{tmp_path}\n")
    (job / "checkpoints").write_text(f"{tmp_path}/checkpoints\n")
    (job / "overrides").write_text("run.steps=1\n")
    (job / "ended").write_text("0\n")  # of a start before
    if "export checkpoint=" in srun:
        (job / "export").touch()
    own = f"PYTHON=python3 RANKS=1 GPUS=0 MAX_RESTARTS=0\n{settings}"
    (tmp_path / "submission" / "settings.sh").write_text(own)
    program(tmp_path / "srun", srun)
    program(tmp_path / "scontrol", f'echo "$@" >"{tmp_path}/asked"; exit 1')  # a real one would end the job here
    program(tmp_path / "scancel", f'echo "$@" >"{tmp_path}/sent"')
    slurm = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "3"}
    node = {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": "n1"}
    env = os.environ | slurm | node | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN_DIR": str(tmp_path)}
    command = ["bash", str(ROOT / "launch" / "slurm" / script), str(tmp_path / "submission"), "3"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=30)
    return done, (job / "ended").read_text()


def test_a_head_of_the_environment_file_reaches_the_ranks(tmp_path: Path) -> None:
    """And so does all else where sbatch was told --export=NONE, which srun would take over."""
    done, _ = ran(tmp_path, 'echo "$HEAD, GPUs $GPUS: $1"', "HEAD=10.0.0.1:29400\n", nodes=2)
    assert "10.0.0.1:29400, GPUs 0: --export=ALL\n" in done.stdout, done.stderr


@pytest.mark.parametrize("script", ["train.sbatch", "command.sbatch"])
def test_an_environment_file_may_use_what_is_not_set_and_its_failure_is_recorded(tmp_path: Path, script: str) -> None:
    done, record = ran(tmp_path, "exit 0", "OPTIONS=$OF_NO_ONE\n", script)
    assert (done.returncode, record) == (0, "0\n"), done.stderr
    shutil.rmtree(tmp_path / "submission")
    done, record = ran(tmp_path, "exit 0", "module_of_no_site load cuda\n", script)
    assert (done.returncode, record) == (2, "2\n")
    assert "the environment file (--env) ended with status 127" in done.stderr


def test_a_signal_before_the_ranks_start_is_handed_on(tmp_path: Path) -> None:
    """As a preemption sends it while modules are loaded."""
    waits = f'for _ in {{1..100}}; do [ ! -e "{tmp_path}/sent" ] || exit 75; sleep 0.1; done; exit 1'
    done, _ = ran(tmp_path, waits, "kill -USR1 $$\n")
    assert done.returncode == 75, done.stdout + done.stderr
    assert (tmp_path / "sent").read_text() == "--signal=USR1 15_3\n"
