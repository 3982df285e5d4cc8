"""When train.sbatch queues its job again, with stand-ins for srun and scontrol; test_slurm.py has real ones."""

import os
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
    job = tmp_path / "submission" / "jobs" / "3"
    job.mkdir(parents=True)
    (job / "run_dir").write_text(f"{tmp_path}\n")
    (job / "checkpoints").write_text(f"{tmp_path}/checkpoints\n")
    (job / "overrides").write_text("run.steps=1\n")
    (job / "ended").write_text("0\n")  # of a start before
    if "export" in srun:
        (job / "export").touch()
    (tmp_path / "submission" / "settings.sh").write_text("PYTHON=python3 RANKS=1 MAX_RESTARTS=0\n")
    program(tmp_path / "srun", srun)
    program(tmp_path / "scontrol", f'echo "$@" >"{tmp_path}/asked"; exit 1')  # a real one would end the job here
    slurm = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "3"}
    node = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
    env = os.environ | slurm | node | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN_DIR": str(tmp_path)}
    script = ["bash", str(ROOT / "launch" / "slurm" / "train.sbatch"), str(tmp_path / "submission")]
    done = subprocess.run(script, env=env, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == status, done.stdout + done.stderr
    assert (job / "ended").read_text() == f"{status}\n"
    assert (tmp_path / "asked").exists() == again
    if again:
        assert (tmp_path / "asked").read_text() == "requeue 15_3\n"
