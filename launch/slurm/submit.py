"""Submits runs to Slurm: python -m launch.slurm.submit [options] key=value ...   (kontext-train's options)

    one run       --nodes 4 --gpus 8 experiment=kontext_finetune data.train=... run.dir=outputs/first
    a sweep       -m optimizer.lr=1e-5,3e-5 ...          an array: each member in its own folder below run.dir
    a chain       --chain stages.yaml ...                launch/slurm/chain.py says what is in it

Everything is composed and checked here, with the number of processes it will have: a typo never queues. Code and config
are copied into run.dir/launch. The same command again resumes what is not finished.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from kontext_train.config import (
    TrainConfig,
    check,
    check_weights,
    defaults_of,
    plain,
    register_schemas,
    typed,
    with_absolute_paths,
)
from kontext_train.data.config import DataConfig, is_url
from kontext_train.errors import ConfigError
from kontext_train.train import member_name
from launch.slurm.chain import Stage, read_chain
from launch.slurm.submission import COMPLETE, ROOT, Job, checkpoints_of, create, job_of, queue

OWN = ("--nodes", "--time", "--array", "--output", "--signal", "--parsable")  # of sbatch's, and --ntasks*, --gpus*
SHORT = {"-N": "--nodes", "-t": "--time", "-a": "--array", "-o": "--output", "-n": "--ntasks", "-G": "--gpus"}


@dataclass(slots=True)
class Request:
    """The command line."""

    overrides: list[str]
    multirun: bool
    chain: Path | None
    nodes: int
    gpus: int
    cpu_ranks: int | None
    time: str
    save_s: int
    at_once: int | None
    max_restarts: int
    env: Path | None
    sbatch: list[str]
    dry_run: bool

    @property
    def ranks(self) -> int:
        """On each node."""
        return self.cpu_ranks or self.gpus


def main() -> None:
    try:
        submit(Request(**vars(parser().parse_intermixed_args())))
    except HydraException as error:
        cause = f": {str(error.__cause__).splitlines()[0]}" if error.__cause__ else ""
        print(f"submit: {str(error).splitlines()[0]}{cause}. Nothing was queued", file=sys.stderr)
        sys.exit(2)
    except ConfigError as error:
        print(f"submit: {error}. Nothing was queued", file=sys.stderr)
        sys.exit(2)
    except subprocess.CalledProcessError as error:
        print(f"submit: {error.stderr.strip()}", file=sys.stderr)
        sys.exit(1)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("overrides", nargs="*", metavar="key=value")
    made.add_argument("-m", "--multirun", action="store_true", help="comma-separated values are members of a sweep")
    made.add_argument("--chain", type=Path, help="YAML file of stages")
    made.add_argument("--nodes", type=int, default=1)
    made.add_argument("--gpus", type=int, default=8, help="on each node, a rank for each (default 8)")
    made.add_argument("--cpu-ranks", type=int, help="on each node, without GPUs")
    made.add_argument("--time", default="24:00:00", help="after which a job is queued again and resumes (24:00:00)")
    made.add_argument("--save-s", type=int, default=300, help="seconds before that in which it saves (300)")
    made.add_argument("--at-once", type=int, help="members of a sweep that run at once")
    made.add_argument("--max-restarts", type=int, default=2, help="of failed ranks within a job (2)")
    made.add_argument("--env", type=Path, help="modules, containers, network: launch/env/*.sh")
    made.add_argument("--sbatch", action="append", default=[], metavar="--OPTION", help="one more option of sbatch's")
    made.add_argument("--dry-run", action="store_true", help="check and show, write and queue nothing")
    return made


def submit(request: Request) -> None:
    _check_request(request)
    register_schemas()
    with initialize_config_module("kontext_train.conf", version_base="1.3"):
        root, jobs = _jobs(request)
    if root == ROOT:
        rule = "is the checkout, of which each submission keeps a copy below run.dir"
        raise ConfigError("run.dir", str(root), rule, "Give a folder of its own, as outputs/NAME")
    if request.env is not None and not request.env.is_file():
        raise ConfigError("--env", str(request.env), "must be a file", "launch/env has examples")
    _refuse_shared(jobs)
    _refuse_busy(jobs)
    if not request.chain:  # a chain's stages wait for one another: all go, and a finished one ends at once
        jobs = [job for job in jobs if job.unfinished]
    for job in jobs:
        if job.config:
            _check_resumable(job)
    _check_data(jobs)
    if not jobs:
        print(f"submit: all that {root} asks for is trained")
        return
    for job in jobs:
        print(f"submit: {job.run_dir if not job.command else job.command}")
    if request.dry_run:
        return
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "PATH", os.environ.get("PATH"), "has no sbatch", "Submit on a login node; --dry-run needs none"
        )
    settings = {"PYTHON": sys.executable, "RANKS": str(request.ranks), "MAX_RESTARTS": str(request.max_restarts)}
    settings["GPUS"] = str(request.gpus if request.cpu_ranks is None else 0)
    submission = create(root, jobs, settings, request.env)
    if request.multirun:
        _submit_array(submission, jobs, request)
    else:
        _submit_in_turn(submission, jobs, request)
    print(f"submit: see python -m launch.status {root}")


def _check_request(request: Request) -> None:
    for option, number, least in (
        ("--nodes", request.nodes, 1),
        ("--gpus", request.gpus, 1),
        ("--cpu-ranks", request.cpu_ranks, 1),
        ("--at-once", request.at_once, 1),
        ("--max-restarts", request.max_restarts, 0),
        ("--save-s", request.save_s, 1),
    ):
        if number is not None and number < least:
            raise ConfigError(option, number, f"must be at least {least}", "Correct it, or leave it out")
    if request.at_once is not None and not request.multirun:
        raise ConfigError("--at-once", request.at_once, "is of a sweep's members", "Add -m, or leave it out")
    limit_s = _seconds(request.time)
    if limit_s is not None and not request.save_s < limit_s:
        raise ConfigError("--save-s", request.save_s, f"must be below --time={request.time}", "Lower it")
    for option in request.sbatch:
        name = SHORT.get(option[:2], option.split("=")[0])
        if any(own.startswith(name) for own in OWN) or name.startswith(("--ntasks", "--gpus")):
            raise ConfigError("--sbatch", option, "is set by submit itself", "Use its own options (--help)")


def _seconds(time: str) -> int | None:
    """Of Slurm's [days-]hours:minutes:seconds, minutes:seconds, minutes, days-hours or days-hours:minutes."""
    days, dash, clock = time.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        return None  # UNLIMITED; sbatch refuses the others
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))


def _refuse_shared(jobs: list[Job]) -> None:
    """Two jobs with one folder would resume and remove each other's checkpoints."""
    for key, folders in {
        "run.dir": [job.run_dir for job in jobs if job.config],
        "checkpoint.folder": [job.checkpoints for job in jobs if job.config],
    }.items():
        for folder in folders:
            if folders.count(folder) > 1:
                raise ConfigError(key, str(folder), "is the folder of two jobs", "Let it name what varies")


def _refuse_busy(jobs: list[Job]) -> None:
    earlier = {job.run_dir: known[1] for job in jobs if job.config and (known := job_of(job.run_dir))}
    queued = queue(list(earlier.values()))
    for run_dir, number in earlier.items():
        if number in queued:
            rule = f"is written by job {number}, {queued[number]}"
            raise ConfigError("run.dir", str(run_dir), rule, "Wait, scancel it, or use another run.dir")


def _check_data(jobs: list[Job]) -> None:
    """Opens what jobs train on. What is remote is left to them, and so is what a command of a chain may yet write."""
    from kontext_train.data.sources import open_sources

    opened: list[DataConfig] = []
    for job in jobs:
        if job.config is None:
            return
        config = job.config
        if config.data not in opened and not any(is_url(s.path) for s in config.data.of_sources().values()):
            open_sources(config.data, config.encoders.pixels_per_token(), config.run.seed)
            opened.append(config.data)


def _check_resumable(job: Job) -> None:
    """Whether a job's options fit the checkpoint that its run will go on from, as the run will ask itself."""
    assert job.config is not None
    config = job.config
    if config.run.resume == "auto" and not any(job.checkpoints.glob(COMPLETE)):
        return  # and torch need not be imported
    from kontext_train.data.plan import plan_digest
    from kontext_train.data.sources import Mixture, open_sources
    from kontext_train.training.changes import check_resumable
    from kontext_train.training.checkpoint import find_resume, newest_readable, read_record

    newest = newest_readable(find_resume(config.run.resume, job.checkpoints))
    if newest is None:
        return
    saved = read_record(newest)
    now = saved | {"config": plain(config)}  # what weights and remote shards hold is left to the run
    if not any(is_url(source.path) for source in config.data.of_sources().values()):
        sources = open_sources(config.data, config.encoders.pixels_per_token(), config.run.seed)
        now["plan"] = plan_digest(Mixture(sources, config.encoders.t5_tokens), config.data, config.run.seed)
    check_resumable(newest, saved, now, defaults_of(config))


# -- what to run ---------------------------------------------------------------------------------------------------


def _jobs(request: Request) -> tuple[Path, list[Job]]:
    """The folder of all and the jobs, each checked."""
    for override in request.overrides:
        if "\n" in override:
            raise ConfigError("overrides", override, "must be one line", "Write lists as [a,b]")
    if request.chain:
        return _chain_jobs(request, read_chain(request.chain))
    if request.multirun:
        return _sweep_jobs(request)
    config = _checked(request, request.overrides)
    run_dir = Path(config.run.dir).resolve()
    return run_dir, [Job("0", run_dir, [*request.overrides, _path("run.dir", run_dir)], config)]


def _sweep_jobs(request: Request) -> tuple[Path, list[Job]]:
    parsed = OverridesParser.create().parse_overrides(request.overrides)
    (members,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    jobs = []
    for number, overrides in enumerate(members):
        base = typed(compose("train", overrides=overrides)).run.dir
        run_dir = Path(base, member_name(request.overrides, overrides, number)).resolve()
        own = [*overrides, _path("run.dir", run_dir)]
        jobs.append(Job(str(number), run_dir, own, _checked(request, own)))
    return Path(os.path.commonpath([job.run_dir.parent for job in jobs])), jobs


def _chain_jobs(request: Request, stages: list[Stage]) -> tuple[Path, list[Job]]:
    if request.multirun:
        raise ConfigError("--chain", str(request.chain), "has no sweeps", "Leave out -m")
    root = Path(typed(compose("train", overrides=request.overrides)).run.dir).resolve()
    jobs: list[Job] = []
    last: Path | None = None
    for stage in stages:
        if stage.command:
            command = stage.command
            for name, path in {"export": f"{last}/export.safetensors", "run": last, "root": root}.items():
                command = command.replace(f"{{{name}}}", shlex.quote(str(path)))
            jobs.append(Job(stage.name, root / stage.name, [], command=command))
            continue
        export = None if last is None else last / "export.safetensors"
        roles = _roles(stage, request) if export is not None else []
        given = request.overrides
        if "student" in roles:  # what the command line says of guidance_in is of the file that the first stage reads
            given = [override for override in given if not override.startswith("weights.guidance_in=")]
        overrides = [*given, *stage.overrides, _path("run.dir", root / stage.name)]
        # The weights are not there yet; a folder that exists stands in for them.
        config = _checked(request, overrides + [_path(f"weights.{role}", Path.cwd()) for role in roles])
        for role in roles:
            setattr(config.weights, role, str(export))
        overrides += [_path(f"weights.{role}", export) for role in roles if export is not None]
        last = root / stage.name
        jobs.append(Job(stage.name, last, overrides, config, export=True))
    return root, jobs


def _roles(stage: Stage, request: Request) -> list[str]:
    """Of weights.*, those that a stage takes from the export before it: what the chain says, or all that it needs."""
    if stage.weights is not None:
        return stage.weights
    objective = typed(compose("train", overrides=[*request.overrides, *stage.overrides])).objective
    own = {override.lstrip("+").split("=")[0] for override in stage.overrides}
    return [role for role in ("student", *objective.frozen) if f"weights.{role}" not in own]


def _checked(request: Request, overrides: list[str]) -> TrainConfig:
    config = with_absolute_paths(typed(compose("train", overrides=overrides)))
    check(config, request.nodes * request.ranks)
    if config.run.resume == "none":
        raise ConfigError("run.resume", "none", "would end a job that is queued again", "Leave it at auto")
    if config.run.resume != "auto" and Path(config.run.resume).resolve().is_relative_to(Path(config.run.dir).resolve()):
        rule = "is one of the run's own checkpoints, which a job that is queued again has gone beyond"
        raise ConfigError("run.resume", config.run.resume, rule, "Remove the newer ones, and leave it at auto")
    if config.checkpoint.folder is not None and "://" in config.checkpoint.folder:
        rule = "is a URL, which job scripts cannot look into: they queue a failed job again if it has saved anew"
        raise ConfigError("checkpoint.folder", config.checkpoint.folder, rule, "Give a folder that nodes share")
    if not any(checkpoints_of(config).glob(COMPLETE)):  # a run that goes on does not read them
        check_weights(config)
    return config


def _path(key: str, path: Path) -> str:
    """key='path', as Hydra reads any path whole."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


# -- sbatch --------------------------------------------------------------------------------------------------------


def _submit_array(submission: Path, jobs: list[Job], request: Request) -> None:
    tasks = ",".join(job.name for job in jobs) + (f"%{request.at_once}" if request.at_once else "")
    output = submission / "jobs" / "%a" / "output.log"
    number = _sbatch(submission, "train.sbatch", output, [f"--array={tasks}", *_training(request)], [])
    for job in jobs:
        (submission / "jobs" / job.name / "job_id").write_text(f"{number}_{job.name}\n")


def _submit_in_turn(submission: Path, jobs: list[Job], request: Request) -> None:
    """Each after the one before has succeeded; all that follow a failed one are cancelled. All are queued, or none."""
    taken: list[str] = []
    for job in jobs:
        folder = submission / "jobs" / job.name
        script = "command.sbatch" if job.command else "train.sbatch"
        options = _resources(request, 1) if job.command else _training(request)
        if taken:  # a dependency that the user gives is the first one's: sbatch takes only one
            options = [option for option in options if not option.startswith(("--dep", "-d"))]
            options += [f"--dependency=afterok:{taken[-1]}", "--kill-on-invalid-dep=yes"]
        try:
            taken.append(_sbatch(submission, script, folder / "output.log", options, [job.name]))
        except subprocess.CalledProcessError:
            if taken:
                print(f"submit: sbatch refused a job. Cancelling {', '.join(taken)}, queued before", file=sys.stderr)
                subprocess.run(["scancel", *taken], check=False)  # says itself if it cannot
            raise
        (folder / "job_id").write_text(f"{taken[-1]}\n")


def _training(request: Request) -> list[str]:
    return [f"--signal=B:USR1@{request.save_s}", *_resources(request, request.nodes)]


def _resources(request: Request, nodes: int) -> list[str]:
    """The user's own options come last: the later of two counts."""
    gpus = [f"--gpus-per-node={request.gpus}"] if request.cpu_ranks is None else []
    return [f"--nodes={nodes}", f"--time={request.time}", *gpus, *request.sbatch]


def _sbatch(submission: Path, script: str, output: Path, options: list[str], arguments: list[str]) -> str:
    """Queue one job or array; returns its id."""
    name, file = submission.parents[1].name, submission / "code" / "launch" / "slurm" / script
    command = ["sbatch", "--parsable", f"--job-name={name}", f"--output={output}", *options, str(file)]
    command += [str(submission), *arguments]
    print(f"submit: {shlex.join(command)}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(";")[0]


if __name__ == "__main__":
    main()
