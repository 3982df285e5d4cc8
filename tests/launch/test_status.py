"""Progress, errors and results read from run folders that no one writes any more."""

import json
from pathlib import Path

from PIL import Image

from launch import runs
from launch.status import report
from launch.sweep import as_text, draw, table


def written_run(folder: Path, steps: int, losses: list[float], saved: int | None = None) -> Path:
    folder.mkdir(parents=True)
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


def test_a_long_metrics_file_is_read_from_its_end(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {i}}}\n' for i in range(1000)))
    assert runs.metrics(file, 100)[-1] == {"step": 999}
    assert 5 < len(runs.metrics(file, 100)) < 9
    assert len(runs.metrics(file, 10**9)) == 1000


def test_what_a_job_said_of_its_failure_is_shown(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", 100, [1.0])
    job = run / "launch" / "0001" / "jobs" / "0"
    job.mkdir(parents=True)
    (job / "run_dir").write_text(f"{run}\n")
    (job / "job_id").write_text("17\n")
    said = ["a warning", "torch.distributed.elastic.ChildFailedError: x"]
    telling = ["FloatingPointError: step 3: no update", "srun: error: n2: task 1: Exited"]
    (job / "output.log").write_text("\n".join(said + telling))
    lines = report(run)
    assert lines[0] == f"{run}: job 17, not queued"
    assert lines[3:] == [*(f"  {line}" for line in telling), f"  all of it: {job}/output.log"]


def test_results_have_the_best_first_and_every_member(tmp_path: Path) -> None:
    for name, losses in (("lr=1", [2.0, 1.5]), ("lr=2", [2.0, 1.0]), ("lr=3", [])):
        written_run(tmp_path / name, 20, losses, saved=20 if losses else None)
    members = runs.runs_below(tmp_path)
    assert [row["member"] for row in table(members)] == ["lr=2", "lr=1", "lr=3"]
    assert as_text(table(members)).splitlines()[1].split() == ["lr=2", "20", "20", "yes", "nan", "1"]
    draw(members, tmp_path / "results.png")
    assert Image.open(tmp_path / "results.png").size == (960, 600)
