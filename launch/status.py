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
from launch.slurm.submission import job_ids, queue

TELLING = re.compile(
    r"(\[rank\d+\]: )?((kontext-train|launch|srun|slurmstepd): |(?!torch\.distributed)[\w.]*(Error|Exception): )"
)
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
    known = job_ids(root)
    queued = queue(list(known.values()))
    newest = {_run_of(folder): folder for folder in known}  # later submissions replace earlier ones
    lines = []
    for run in sorted({*newest, *runs.runs_below(root.resolve())}):
        folder = newest.get(run)
        state = _state(run, queued.get(known[folder], "not queued") if folder else "not Slurm's")
        job = f"job {known[folder]}, " if folder else ""
        lines.append(f"{run}: {job}{state}")
        lines += [f"  {line}" for line in _progress(run) + (_errors(folder / "output.log") if folder else [])]
    return lines or [f"{root}: no run here"]


def _run_of(job_folder: Path) -> Path:
    """Where a job trains; a command's place is beside the stages."""
    told = job_folder / "run_dir"
    return Path(told.read_text().strip()) if told.is_file() else job_folder.parents[3] / job_folder.name


def _state(run: Path, queued: str) -> str:
    return "finished" if runs.read(run).finished and queued.startswith("not ") else queued


def _progress(run: Path) -> list[str]:
    if not runs.is_run(run):
        return []
    now = runs.read(run)
    loss = "".join(f", {k} {now.values[k]:.5g}" for k in ("loss", "validation/loss") if k in now.values)
    lines = [f"step {now.step} of {now.steps}{loss}"]
    if now.seconds_left:
        lines.append(f"{timedelta(seconds=round(now.seconds_left))} left at {now.seconds_per_step:.3g} s a step")
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
    telling = [line.strip() for line in lines if TELLING.match(line)]
    return [*telling[-SHOWN_ERRORS:], f"all of it: {output}"]


if __name__ == "__main__":
    main()
