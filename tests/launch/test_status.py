"""Progress, errors and results read from run folders that no one writes any more."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from launch import runs
from launch.status import report
from launch.sweep import as_text, draw, table


def written_run(folder: Path, steps: int, losses: list[float], saved: int | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(f"run: {{steps: {steps}}}\n")
    lines = [json.dumps({"step": 10 * (i + 1), "loss": loss, "seconds": 5.0}) for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines) + '{"step": 999, "lo')
    if saved is not None:
        (folder / "checkpoints" / f"step_{saved:08d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step_{saved:08d}" / "COMPLETE").touch()
    return folder


def test_progress_is_the_last_whole_line_and_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", 100, [3.0, 2.0, 1.0], saved=20)
    (run / "checkpoints" / "step_00000030").mkdir()  # not complete
    now = runs.read(run)
    assert (now.step, now.steps, now.values["loss"], now.finished) == (30, 100, 1.0, False)
    assert now.seconds_left == 70 * 0.5
    assert report(run) == [
        f"{run}: not Slurm's",
        "  step 30 of 100, loss 1",
        "  0:00:35 left at 0.5 s a step",
        "  newest checkpoint step_00000020, 0:00:00 old",
    ]


def test_a_sweep_below_a_run_is_found(tmp_path: Path) -> None:
    for name in (".", "seed=2", "seed=1"):
        written_run(tmp_path / "run" / name, 10, [1.0], saved=10)
    assert [run.name for run in runs.runs_below(tmp_path / "run")] == ["run", "seed=1", "seed=2"]


def test_a_long_metrics_file_is_read_from_its_end(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {i}}}\n' for i in range(1000)))
    assert runs.metrics(file, 100)[-1] == {"step": 999}
    assert 5 < len(runs.metrics(file, 100)) < 9
    assert len(runs.metrics(file, 10**9)) == 1000


def submitted_job(run: Path, number: int, said: list[str]) -> Path:
    job = run / "launch" / "0001" / "jobs" / "0"
    job.mkdir(parents=True)
    (job / "run_dir").write_text(f"{run}\n")
    (run / "job").write_text(f"{job}\n")
    (job / "job_id").write_text(f"{number}\n")
    (job / "output.log").write_text("\n".join(said))
    return job


def test_what_a_job_said_of_its_failure_is_shown(tmp_path: Path) -> None:
    """Of its last start, each thing once, and nothing that is no error."""
    run = written_run(tmp_path / "run", 100, [1.0])
    start = "launch: job 17 on n[1-2], start {}, 2026-01-01T00:00:00: starts from scratch"
    said = [start.format(1), "ValueError: of an earlier start", start.format(2), "a warning"]
    said += ["kontext-train: attention by cpu", "launch: n2: warning: NCCL_P2P_DISABLE=1 makes NCCL slow"]
    said += [f"kontext-train: step {i}: left out a bad sample: x" for i in range(9)]
    said += ["torch.distributed.elastic.ChildFailedError: x"]
    said += ["kontext_train.training.stability.Unstable: step 3: no update"]
    said += [f"kontext-train: rank 9, step 3, phase data: no sign of life. So rank {i} ends" for i in range(8)]
    said += [f"[rank{i}]: RuntimeError: of all ranks" for i in range(8)]
    said += [
        "srun: error: n2: task 1: Exited",
        "launch: job 17 on n[1-2], start 2, 2026-01-01T00:01:00: ends with status 1",
    ]
    job = submitted_job(run, 17, said)
    (job / "ended").write_text("1\n")
    lines = report(run)
    assert lines[0] == f"{run}: job 17, FAILED (status 1)"
    assert lines[3:] == [
        "  kontext_train.training.stability.Unstable: step 3: no update",
        "  kontext-train: rank 9, step 3, phase data: no sign of life. So rank 0 ends",
        "  [rank0]: RuntimeError: of all ranks",
        f"  all of it: {job}/output.log",
    ]
    (job / "output.log").write_text("slurmstepd: error: *** JOB 17 CANCELLED DUE TO TIME LIMIT ***")
    (job / "ended").unlink()
    lines = report(tmp_path)  # from above: the run itself tells whose job it is
    assert lines[0] == f"{run}: job 17, ended by force: cancelled, past its time limit, or its node is gone"
    assert lines[3] == "  slurmstepd: error: *** JOB 17 CANCELLED DUE TO TIME LIMIT ***"


def test_states_are_slurms_own_where_it_remembers_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller forgets a job after minutes; accounting, where there is some, does not."""
    jobs = {
        name: submitted_job(written_run(tmp_path / name, 10, [1.0], saved=10), 20 + i, [])
        for i, name in enumerate("abc")
    }
    (jobs["c"] / "ended").write_text("3\n")
    for name, prints in {"squeue": "20|TIMEOUT|TimeLimit", "sacct": "21|CANCELLED by 1000\n20|COMPLETED"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{prints}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    told = [line.partition(", ")[2] for line in report(tmp_path) if not line.startswith(" ")]
    assert told == ["TIMEOUT (TimeLimit)", "CANCELLED by 1000", "FAILED (status 3)"]


def test_checkpoints_are_found_where_the_run_keeps_them(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", 10, [1.0])
    written_run(tmp_path / "saved", 10, [], saved=10)
    (run / "config.yaml").write_text(f"run: {{steps: 10}}\ncheckpoint: {{folder: {tmp_path}/saved/checkpoints}}\n")
    assert runs.read(run).finished
    (run / "config.yaml").write_text("run: {steps: 10}\ncheckpoint: {folder: 's3://bucket/run'}\n")
    assert report(run)[2:] == ["  checkpoints are in s3://bucket/run"]


def test_results_have_the_best_first_and_every_member(tmp_path: Path) -> None:
    for name, losses in (("lr=1", [2.0, 1.5]), ("lr=2", [2.0, 1.0]), ("lr=3", [])):
        written_run(tmp_path / name, 20, losses, saved=20 if losses else None)
    members = runs.runs_below(tmp_path)
    assert [row["member"] for row in table(members)] == ["lr=2", "lr=1", "lr=3"]
    assert as_text(table(members)).splitlines()[1].split() == ["lr=2", "20", "20", "yes", "nan", "1"]
    draw(members, tmp_path / "results.png")
    assert Image.open(tmp_path / "results.png").size == (960, 600)
