"""Checkpoints of a run: where they are, which of them are complete and whole, and how to go on from one.

    run.dir/checkpoints/step_00001000/   *.distcp, .metadata   tensors, sharded by rank, readable at any world size
                                         record.json           step, position in the data, composed config, digests
                                         checksums.json        size and CRC-32 of every file above
                                         COMPLETE              written last: the CRC-32 of checksums.json

A folder without COMPLETE is nothing: a save in progress, or what a kill left of one, which the next save removes. No
generator and no schedule is saved: both are functions of the step. checkpoint_saver.py writes what is read here.
"""

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from kontext_train.distributed.reduce import from_main
from kontext_train.errors import ConfigError
from kontext_train.training.checkpoint_files import COMPLETE, RECORD, damage, place, record_is_whole, storage_reader


def checkpoints_folder(run_dir: Path, given: str | None) -> Path:
    """Where a run keeps its checkpoints. given: checkpoint.folder."""
    return place(given) if given is not None else run_dir / "checkpoints"


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    return sorted(marker.parent for marker in folder.glob(f"step_????????/{COMPLETE}"))


def find_resume(resume: str, folder: Path) -> list[Path]:
    """The checkpoints to go on from, newest first: the next is for when one turns out to be damaged. [] starts afresh.

    resume: `auto` takes the complete checkpoints of `folder`; `none` insists on a folder without any; a step folder of
    another run is where a run begins, and once the run has checkpoints of its own it goes on from those, so that a
    requeued job does not begin again.
    """
    existing = complete_checkpoints(folder)[::-1]
    if resume == "none" and existing:
        rule = f"but {folder} holds checkpoints of an earlier run, which it would replace"
        raise ConfigError("run.resume", resume, rule, "Use run.resume=auto, or another run.dir")
    if resume in ("auto", "none"):
        return existing
    named = place(resume)
    if named.resolve().parent == folder.resolve():
        rule = "is one of the run's own checkpoints, which it would have gone beyond when it is started again"
        raise ConfigError(
            "run.resume", resume, rule, "Use auto for the newest; to go back, first remove the newer ones"
        )
    if existing:
        return existing
    read_record(named, key="run.resume")
    return [named]


def read_record(path: Path, key: str = "checkpoint") -> dict[str, Any]:
    """The record of a checkpoint. ConfigError, naming `key`, if the folder is not a complete checkpoint."""
    if not (path / COMPLETE).is_file():
        rule = f"is not a complete checkpoint (it has no {COMPLETE} file)"
        raise ConfigError(key, str(path), rule, "Give a step_N folder that has one")
    try:
        return json.loads((path / RECORD).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(key, str(path), f"is damaged: {RECORD}: {error}", "Use another checkpoint") from error


def newest_readable(paths: Sequence[Path]) -> Path | None:
    """The first of `paths` whose record is whole: enough to judge a configuration by, before the ranks meet."""
    return next((path for path in paths if record_is_whole(path)), None)


def newest_whole(resume: str, paths: Sequence[Path]) -> Path | None:
    """The first of rank 0's `paths` of which every file is as it was written, or None if there are no paths.

    All ranks call it; each reads its share of the files. What is damaged is named on stderr.
    Raises ConfigError if nothing is whole, as when `resume` names a folder that is damaged.
    """
    rank, ranks, found = dist.get_rank(), dist.get_world_size(), ""
    seen = from_main("\n".join(map(str, paths))) or ""  # file systems may show ranks different things
    for path in map(place, seen.splitlines()):
        problems: list[Any] = [None] * ranks
        dist.all_gather_object(problems, damage(path, rank, ranks))
        named = list(dict.fromkeys(problem for own in problems for problem in own))
        if not named:
            return path
        found = f"{path} is damaged: {'; '.join(named[:4])}" + (f" and {len(named) - 4} more" * (len(named) > 4))
        if rank == 0:
            print(f"kontext-train: {found}", file=sys.stderr)
    if found:
        raise ConfigError("run.resume", resume, found, "Restore it, or remove it and resume from another")
    return None


def load(path: Path, state: dict[str, Any]) -> None:
    """Fill the tensors of `state` in place; works at any world size, and in one process without a process group.

    Raises RuntimeError naming the checkpoint if it cannot be read.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: that is meant
        try:
            dcp.load(state, storage_reader=storage_reader(path), no_dist=not dist.is_initialized())
        except CheckpointException as error:  # derives from BaseException
            reasons = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
            raise RuntimeError(f"{path} cannot be read: {reasons}. Remove it to resume from the one before") from error
