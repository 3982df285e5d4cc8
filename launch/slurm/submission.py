"""What a submission leaves in the run folder, so that its jobs depend on nothing that changes after it.

run.dir/launch/0001/   code/                the packages as they were
                       commit.txt           of git, and what differed from it
                       settings.sh          ranks, GPUs, restarts, Python; then the environment file
                       jobs/NAME/           one for each job of Slurm's
                           run_dir          where it trains
                           checkpoints      where it saves
                           overrides        kontext-train's options, one a line
                           config.yaml      the config they compose, for people
                           export           if there, it ends with RUN/export.safetensors
                           command          instead of these five: a script
                           job_id           written when sbatch took it
                           output.log       of all its starts
                           ended            exit status, once it has ended by itself
run.dir/job            the newest of these folders that trains here, whichever folder was submitted for
"""

import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from kontext_train.config import TrainConfig, plain

ROOT = Path(__file__).parents[2]
COMPLETE = "step_????????/COMPLETE"  # of checkpoints, in their folder
PACKAGES = ("kontext_train", "data_tools", "quickstart", "launch")


@dataclass(slots=True)
class Job:
    """One job of a submission, or one task of its array. It trains, or runs a command."""

    name: str
    run_dir: Path
    overrides: list[str]
    config: TrainConfig | None = None
    export: bool = False
    command: str = ""

    @property
    def checkpoints(self) -> Path:
        assert self.config is not None
        return checkpoints_of(self.config)

    @property
    def unfinished(self) -> bool:
        """Whether the run has not saved its last step."""
        assert self.config is not None
        return not (self.checkpoints / f"step_{self.config.run.steps:08d}" / "COMPLETE").is_file()


def checkpoints_of(config: TrainConfig) -> Path:
    return Path(config.checkpoint.folder or Path(config.run.dir, "checkpoints")).absolute()


def create(root: Path, jobs: list[Job], settings: dict[str, str], environment: Path | None) -> Path:
    """Writes the next submission of a run folder; returns it."""
    folder = root / "launch"
    number = max((int(p.name) for p in folder.glob("[0-9]*")), default=0) + 1
    submission = (folder / f"{number:04d}").resolve()
    submission.mkdir(parents=True)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, submission / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    (submission / "commit.txt").write_text(_commit())
    lines = [f"{key}={shlex.quote(value)}\n" for key, value in settings.items()]
    (submission / "settings.sh").write_text("".join(lines) + (environment.read_text() if environment else ""))
    for job in jobs:
        _write_job(submission / "jobs" / job.name, job)
    return submission


def _write_job(folder: Path, job: Job) -> None:
    folder.mkdir(parents=True)
    if job.command:
        (folder / "command").write_text(job.command + "\n")
        return
    assert job.config is not None
    (folder / "run_dir").write_text(f"{job.run_dir}\n")
    (folder / "checkpoints").write_text(f"{job.checkpoints}\n")
    job.run_dir.mkdir(parents=True, exist_ok=True)
    (job.run_dir / "job").write_text(f"{folder}\n")
    (folder / "overrides").write_text("".join(f"{o}\n" for o in job.overrides))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain(job.config))))
    if job.export:
        (folder / "export").touch()


def _commit() -> str:
    """HEAD and its differences; "" where the code lies in no git checkout."""
    shown = [["git", "rev-parse", "HEAD"], ["git", "status", "--short"], ["git", "diff", "HEAD"]]
    try:
        return "".join(subprocess.run(c, cwd=ROOT, capture_output=True, text=True, check=True).stdout for c in shown)
    except (OSError, subprocess.CalledProcessError):
        return ""


def jobs_of(root: Path) -> dict[Path, str]:
    """Slurm's id of each job ever submitted for a run folder, by its folder; an array's task is ID_TASK."""
    return {p.parent: p.read_text().strip() for p in sorted(root.glob("launch/[0-9]*/jobs/*/job_id"))}


def job_of(run_dir: Path) -> tuple[Path, str] | None:
    """Folder and Slurm's id of the last job that was submitted to train in a folder."""
    told = run_dir / "job"
    folder = Path(told.read_text().strip()) if told.is_file() else run_dir
    number = folder / "job_id"
    return (folder, number.read_text().strip()) if number.is_file() else None


def queue(ids: list[str]) -> dict[str, str]:
    """State and reason of those that wait or run, by id: {"12_3": "PENDING (Resources)"}. Empty without Slurm.

    subprocess.CalledProcessError if Slurm does not answer.
    """
    return _squeue(ids, [], check=True)


def states(ids: list[str]) -> dict[str, str]:
    """As `queue`, and how those ended that Slurm remembers: slurmctld for some minutes, accounting for good."""
    known = _squeue(ids, ["--states=all"], check=False)
    older = [i for i in ids if i not in known]
    asked = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", f"--jobs={','.join(older)}"]
    lines = _lines(asked, check=False) if older else []
    return known | {i: state for i, state in (line.split("|") for line in lines) if i in older}


def _squeue(ids: list[str], options: list[str], *, check: bool) -> dict[str, str]:
    asked = ["squeue", "--noheader", "--array", "--me", "--format=%i|%T|%r", *options]
    lines = _lines(asked, check=check) if ids else []
    found = {i: (state, reason) for i, state, reason in (line.split("|", 2) for line in lines)}
    return {i: state if reason == "None" else f"{state} ({reason})" for i, (state, reason) in found.items() if i in ids}


def _lines(command: list[str], *, check: bool) -> list[str]:
    """What a program of Slurm's prints; [] where there is none, or, unless `check`, it cannot tell."""
    if shutil.which(command[0]) is None:
        return []
    return subprocess.run(command, capture_output=True, text=True, check=check).stdout.splitlines()
