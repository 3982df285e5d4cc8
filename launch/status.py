"""How runs are doing: python -m launch.status RUN_DIR ...   (a run, a sweep or a chain; started in any way)

For each run: its state in Slurm if it has one, last step, time left, newest checkpoint, and the last lines of its
output that tell of an error.
"""

import re
import sys
import time
from datetime import timedelta
from pathlib import Path

from launch import runs
from launch.slurm.submission import job_of, jobs_of, states

TELLING = re.compile(
    r"(\[rank\d+\]: )?("
    r"kontext-\w+: (?!attention by|going on from|stopped by|step \d+[:, ])"  # of a step: a warning
    r"|launch: (?!\S+ warning: |job .*: (starts from|ends with) |job .*; queued again)"
    r"|(?!torch\.distributed)[\w.]*(Error|Exception|Unstable): "
    r"|\S+: line \d+: )"  # bash's
)
SLURMS = re.compile(r"(srun|slurmstepd): error: ")  # say that something ended, and seldom why
START = re.compile(r"launch: job \S+ on .*: starts from ")
ECHO = re.compile(r"^\[rank\d+\]: |\. So rank \d+ ends$")  # each rank says the same
TAIL_BYTES = 1 << 16  # of an output
SHOWN_ERRORS = 5


def main() -> None:
    if len(sys.argv) < 2 or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    for folder in map(Path, sys.argv[1:]):
        if not folder.is_dir():
            print(f"status: {folder} is no folder", file=sys.stderr)
            sys.exit(2)
        print("\n".join(report(folder)))


def report(root: Path) -> list[str]:
    """Lines for all runs of a folder."""
    root = root.resolve()
    known = jobs_of(root).items()
    newest = {_run_of(folder): (folder, number) for folder, number in known}  # later submissions replace earlier ones
    newest |= {run: job for run in runs.runs_below(root) if (job := job_of(run))}
    told = states([number for _, number in newest.values()])
    lines = []
    for run in sorted({*newest, *runs.runs_below(root)}):
        if run not in newest:
            lines += [f"{run}: not Slurm's", *(f"  {line}" for line in _progress(run))]
            continue
        folder, number = newest[run]
        lines.append(f"{run}: job {number}, {_state(run, folder, told.get(number))}")
        lines += [f"  {line}" for line in _progress(run) + _errors(folder / "output.log")]
    return lines or [f"{root}: no run here"]


def _run_of(job_folder: Path) -> Path:
    """Where a job trains; a command's place is beside the stages."""
    told = job_folder / "run_dir"
    return Path(told.read_text().strip()) if told.is_file() else job_folder.parents[3] / job_folder.name


def _state(run: Path, folder: Path, slurms: str | None) -> str:
    """slurms: what Slurm says; None where it has forgotten the job, or is not here. The job's own record is next."""
    record = folder / "ended"
    status = int(record.read_text()) if record.is_file() else None
    if slurms is None and status is None:
        started = (folder / "output.log").is_file()
        slurms = "ended by force: cancelled, past its time limit, or its node is gone" if started else "not queued"
    elif slurms is None:
        slurms = f"FAILED (status {status})" if status else "COMPLETED"
    done = slurms == "COMPLETED" and (runs.read(run).finished or not runs.is_run(run))
    return "finished" if done else slurms


def _progress(run: Path) -> list[str]:
    if not runs.is_run(run):
        return []
    now = runs.read(run)
    loss = "".join(f", {k} {now.values[k]:.5g}" for k in ("loss", "validation/loss") if k in now.values)
    lines = [f"step {now.step} of {now.steps}{loss}"]
    if now.seconds_left:
        lines.append(f"{timedelta(seconds=round(now.seconds_left))} left at {now.seconds_per_step:.3g} s a step")
    if now.elsewhere is not None:
        return [*lines, f"checkpoints are in {now.elsewhere}"]
    if now.checkpoint is None:
        return [*lines, "no checkpoint yet"]
    age = timedelta(seconds=round(time.time() - (now.checkpoint / "COMPLETE").stat().st_mtime))
    return [*lines, f"newest checkpoint {now.checkpoint.name}, {age} old"]


def _errors(output: Path) -> list[str]:
    if not output.is_file():
        return []
    with output.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    starts = [number for number, line in enumerate(lines) if START.match(line)]
    lines = [line.strip() for line in lines[starts[-1] if starts else 0 :]]
    telling = [line for line in lines if TELLING.match(line)] or [line for line in lines if SLURMS.match(line)]
    distinct = {ECHO.sub("", line): line for line in reversed(telling)}  # of each, the first
    return [*list(distinct.values())[:SHOWN_ERRORS][::-1], f"all of it: {output}"]


if __name__ == "__main__":
    main()
