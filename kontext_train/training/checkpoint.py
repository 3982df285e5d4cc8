"""Checkpoints: a torch.distributed.checkpoint folder for each kept step, complete or not there.

    run.dir/checkpoints/step_00001000/   *.distcp, .metadata   tensors, sharded by rank, readable at any world size
                                         record.json           step, position in the data, composed config, digests
                                         COMPLETE              written last

A folder is written as `step_N.partial` and renamed when every rank is done, so a kill at any moment leaves either the
whole checkpoint or none. No generator and no schedule is saved: both are functions of the step.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from kontext_train.errors import ConfigError

COMPLETE = "COMPLETE"


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    return sorted(marker.parent for marker in folder.glob(f"step_????????/{COMPLETE}"))


def save(folder: Path, step: int, state: dict[str, Any], record: dict[str, Any], keep: int) -> Path:
    """Save on all ranks; returns the folder. Older complete checkpoints beyond `keep` are removed afterwards."""
    final = checkpoint_path(folder, step)
    assert not (final / COMPLETE).exists(), f"{final} was saved before"
    partial = final.with_suffix(".partial")
    main = dist.get_rank() == 0
    if main:
        for left in folder.glob("step_*.partial"):  # by a kill during an earlier save
            shutil.rmtree(left)
        shutil.rmtree(final, ignore_errors=True)  # renamed but killed before COMPLETE
        partial.mkdir(parents=True)
    dist.barrier()
    dcp.save(state, checkpoint_id=partial)
    if main:
        (partial / "record.json").write_text(json.dumps(record, indent=2))
        partial.rename(final)
        (final / COMPLETE).touch()
        for old in complete_checkpoints(folder)[:-keep]:
            gone = old.with_suffix(".partial")  # first, so that a kill here leaves nothing that looks whole
            old.rename(gone)
            shutil.rmtree(gone)
    dist.barrier()
    return final


def find_resume(resume: str, folder: Path) -> Path | None:
    """The checkpoint to go on from, or None to start afresh.

    resume: `auto` takes the newest complete checkpoint of `folder`; `none` insists on a folder without any; a step
    folder is where a run begins, and once the run has a checkpoint of its own it goes on from that, so that a requeued
    job does not begin again.
    """
    existing = complete_checkpoints(folder)
    if resume == "none" and existing:
        rule = f"but {folder} holds checkpoints of an earlier run, which it would replace"
        raise ConfigError("run.resume", resume, rule, "Use run.resume=auto, or another run.dir")
    if resume in ("auto", "none"):
        return existing[-1] if existing else None
    inside = Path(resume).resolve().parent == folder.resolve()
    if existing and not inside:
        return existing[-1]
    read_record(Path(resume), key="run.resume")
    if existing and Path(resume).resolve() != existing[-1].resolve():
        rule = f"but {existing[-1].name} is newer and the two would mix"
        raise ConfigError("run.resume", resume, rule, "Remove the newer ones, or use another run.dir")
    return Path(resume)


def read_record(path: Path, key: str = "checkpoint") -> dict[str, Any]:
    """The record of a checkpoint. ConfigError, naming `key`, if the folder is not a complete checkpoint."""
    if not (path / COMPLETE).is_file():
        rule = f"is not a complete checkpoint (it has no {COMPLETE} file)"
        raise ConfigError(key, str(path), rule, "Give a step_N folder that has one")
    return json.loads((path / "record.json").read_text())


def check_resumable(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """ConfigError unless a checkpoint's record fits the run that resumes it: the same tensors and the same plan."""
    if saved["plan"] != now["plan"]:
        rule = f"but {path} was planned with other data settings (shards, run.seed, data.*, encoders.t5_tokens)"
        hint = "Samples would be lost or repeated. Restore them, or start a new run.dir with weights.student"
        raise ConfigError("run.resume", str(path), rule, hint)
    was, wants = _what_decides_tensors(saved["config"]), _what_decides_tensors(now["config"])
    for key in wants:
        if was.get(key) != wants[key]:
            rule = f"but {path} was saved with {was.get(key)!r}"
            raise ConfigError(key, wants[key], rule, "Restore it, or start a new run.dir with weights.student")
    if saved.get("base") != now.get("base"):
        rule = f"holds other weights than those that {path} adapts"
        given = now["config"]["weights"]["student"]
        raise ConfigError("weights.student", given, rule, "Give the file that the run began with, wherever it is now")


def _what_decides_tensors(config: dict[str, Any]) -> dict[str, Any]:
    model = {f"model.{k}": v for k, v in config["model"].items() if k not in ("attention", "init")}
    averaged = {"ema.half_life_images > 0": config["ema"]["half_life_images"] > 0}
    moments = config["optimizer"].get("moments", "float32")  # older checkpoints had no other
    lora = config.get("lora", {"rank": 0})
    adapters = {f"lora.{k}": lora[k] for k in (lora if lora["rank"] else ("rank",))}
    return model | adapters | averaged | {"optimizer.name": config["optimizer"]["name"], "optimizer.moments": moments}


def load(path: Path, state: dict[str, Any]) -> None:
    """Fill the tensors of `state` in place; works at any world size, and in one process without a process group.

    Raises RuntimeError naming the checkpoint if it cannot be read.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: that is meant
        try:
            dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
        except CheckpointException as error:  # derives from BaseException
            reasons = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
            raise RuntimeError(f"{path} cannot be read: {reasons}. Remove it to resume from the one before") from error
