"""Saves checkpoints while training goes on: copied to host memory at once, written by a thread of each rank.

The threads talk over a gloo group of their own, so that they meet each other and never the loop's collectives. Ranks
write their shards; when all are done, rank 0 puts record, checksums and, last, COMPLETE. Only then do older checkpoints
go. One save is under way at a time.
"""

import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from kontext_train.errors import ConfigError, StorageError
from kontext_train.training.checkpoint import checkpoint_path, complete_checkpoints, read_record, step_of
from kontext_train.training.checkpoint_files import Checksum, complete, put, record_is_whole, remove, storage_writer
from kontext_train.training.config import Best, CheckpointConfig

_WRITE_TIMEOUT = timedelta(days=1)  # a slow disk is no hang: the watchdog sees ranks that die or freeze
VALIDATED = "validated"  # in a record: the numbers of validation, if there was one when the weights were saved


class Saver:
    """Saves the checkpoints of one run. All ranks make one, and call its methods at the same steps."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        """Raises ConfigError if the folder cannot be written to, on the rank where it cannot."""
        self.folder, self.config, self.main = folder, config, dist.get_rank() == 0
        _check_writable(folder, config)
        self.group = dist.new_group(backend="gloo", timeout=_WRITE_TIMEOUT)
        self.copies = HostCopies() if config.asynchronous else None
        torch.serialization.set_crc32_options(False)  # torch's own sums would hold up Python, and we take some anyway
        self.writing: Future[float] | None = None
        self.step, self.waits, self.stall_s, self.write_s = 0, 0, 0.0, 0.0

    def save(self, step: int, state: dict[str, Any], record: Mapping[str, Any], wait: bool) -> None:
        """Save `state`, which may change as soon as this returns. wait: until it is complete.

        A save under way is waited for first. Raises what went wrong with either.
        """
        started = time.perf_counter()
        if self.writing is not None and not self.writing.done():
            self.waits += 1
            if self.main:
                why = "saves come faster than they are written" if not wait else "the last one waits for it"
                print(f"kontext-train: step {step} waits for the save of step {self.step}: {why}", file=sys.stderr)
        self.finish()
        if self.copies is not None:
            state = self.copies.of(state)
        self.step, self.writing = step, Future()
        work = (self.writing, self.folder, step, state, record, self.config, self.group)
        # A daemon, so that a process that ends by an error does not wait for ranks that may be gone.
        self.thread = threading.Thread(target=_work, args=work, name=f"save-{step}", daemon=True)
        self.thread.start()
        if wait or self.copies is None:
            self.finish()
        self.stall_s = time.perf_counter() - started

    def check(self) -> None:
        """Raise what a save in the background failed with, if it did by now."""
        if self.writing is not None and self.writing.done():
            self.finish()

    def finish(self, timeout_s: float | None = None) -> None:
        """Wait for the save under way, if there is one. Raises what went wrong, TimeoutError if it takes too long."""
        if self.writing is not None:
            self.write_s = self.writing.result(timeout_s)
            self.thread.join()  # it has let go of the group, which may end with the process group now
            self.writing = None

    def metrics(self) -> dict[str, float]:
        """How long the loop stood still for the last save, how long the last complete one took to write, and how often
        a save had to wait for the one before.
        """
        return {
            "checkpoint/stall_s": self.stall_s,
            "checkpoint/write_s": self.write_s,
            "checkpoint/waits": float(self.waits),
        }


class HostCopies:
    """Copies of a state in host memory, pinned where there is a GPU. The memory is taken once and used at every save.

    torch's DefaultStager does the same with a deep copy of every DTensor's description, in a millisecond each.
    """

    def __init__(self) -> None:
        self.pinned, self.buffers = torch.cuda.is_available(), dict[str, Tensor]()

    @torch.no_grad()
    def of(self, state: dict[str, Any]) -> dict[str, Any]:
        """The same nested dict with tensors in host memory; what is no tensor is taken as it is."""
        copied = {key: self._copy(f"{key}", value) for key, value in state.items()}
        if self.pinned:
            torch.cuda.synchronize()  # copies were only queued
        return copied

    def _copy(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._copy(f"{name}.{key}", inner) for key, inner in value.items()}
        if isinstance(value, DTensor):  # from_local would move the copy to the mesh's device
            return DTensor(self._copy(name, value.to_local()), value._spec, requires_grad=False)
        if not isinstance(value, Tensor):
            return value
        if name not in self.buffers:
            self.buffers[name] = torch.empty_like(value, device="cpu", pin_memory=self.pinned, requires_grad=False)
        return self.buffers[name].copy_(value, non_blocking=True)


def _check_writable(folder: Path, config: CheckpointConfig) -> None:
    probe = folder / f".probe.{dist.get_rank()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        put(probe, b"")
        probe.unlink()
    except OSError as error:
        key, rule = "checkpoint.folder", f"rank {dist.get_rank()} cannot write to {folder}: {error}"
        raise ConfigError(key, config.folder, rule, "Give a folder that all ranks share and may write to") from error


def _work(done: Future[float], *arguments: Any) -> None:
    started = time.perf_counter()
    try:
        write(*arguments)
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(time.perf_counter() - started)


def write(
    folder: Path,
    step: int,
    state: dict[str, Any],
    record: Mapping[str, Any],
    config: CheckpointConfig,
    group: dist.ProcessGroup,
) -> None:
    """Write a checkpoint on all ranks of a group, then remove those that `config` does not keep.

    Raises StorageError on every rank, naming the checkpoint and the ranks that failed; the others are as they were.
    """
    path = checkpoint_path(folder, step)
    _on_main(group, path, lambda: _make_room(folder, path))
    writer, checksums = storage_writer(path)
    try:
        dcp.save(state, storage_writer=writer, process_group=group)
    except CheckpointException as error:  # derives from BaseException; raised on all ranks
        if dist.get_rank() == 0:
            with suppress(OSError):
                remove(path)  # gives back what room it took
        failed = (f"rank {rank}: {_named(failure[0])}" for rank, failure in error.failures.items())
        raise _not_written(path, "; ".join(failed)) from error
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, checksums, group)
    written = {name: own for rank in gathered for name, own in rank.items()}

    def finish() -> None:
        try:
            complete(path, record, _shards_first(written))
        except BaseException:
            with suppress(OSError):
                remove(path)
            raise
        try:
            _prune(folder, step, config)
        except (OSError, ConfigError) as error:  # the checkpoint is there; a run does not end for an old one
            print(f"kontext-train: an old checkpoint in {folder} could not be removed: {error}", file=sys.stderr)

    _on_main(group, path, finish)


def _on_main(group: dist.ProcessGroup, path: Path, work: Callable[[], None]) -> None:
    """Rank 0 does it while the others wait; what goes wrong is raised on all."""
    failed: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except Exception as error:
            failed = [f"rank 0: {_named(error)}"]
    dist.broadcast_object_list(failed, group=group, device=torch.device("cpu"))
    if failed[0] is not None:
        raise _not_written(path, failed[0])


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}"


def _not_written(path: Path, reasons: str) -> StorageError:
    return StorageError(f"{path} could not be written ({reasons}). Earlier checkpoints are as they were")


def _make_room(folder: Path, path: Path) -> None:
    """Remove what kills during earlier saves left, and this step's own folder if a damaged one was gone back behind."""
    whole = complete_checkpoints(folder)
    for left in folder.glob("step_????????"):
        if left == path or left not in whole:
            remove(left)


def _shards_first(checksums: dict[str, Checksum]) -> dict[str, Checksum]:
    """In the order of the ranks, and .metadata at the end."""
    return dict(sorted(checksums.items(), key=lambda item: item[0].startswith(".")))


def _prune(folder: Path, now: int, config: CheckpointConfig) -> None:
    found = {step_of(path): path for path in complete_checkpoints(folder)}
    numbers = {step: _number(path, config.best_by) for step, path in found.items()} if config.keep_best else {}
    for step in found.keys() - kept(list(found), numbers, now, config):
        remove(found[step])


def _number(path: Path, name: str) -> float | None:
    """Of a checkpoint's validation; None of one that had none, or whose record is damaged."""
    return (read_record(path).get(VALIDATED) or {}).get(name) if record_is_whole(path) else None


def kept(steps: list[int], numbers: Mapping[int, float | None], now: int, config: CheckpointConfig) -> set[int]:
    """Which checkpoints stay once that of step `now` is complete. numbers: config.best_by, by step.

    What is newer than `now` goes: the run went back behind it, because it was damaged.
    """
    past = sorted(step for step in steps if step <= now)
    sign = -1 if config.best_is is Best.highest else 1
    known = ((step, number) for step in past if (number := numbers.get(step)) is not None)
    judged = sorted((sign * number, step) for step, number in known if math.isfinite(number))
    best = {step for _, step in judged[: config.keep_best]}
    milestones = {step for step in past if config.keep_every_steps and step % config.keep_every_steps == 0}
    return set(past[-config.keep_last :]) | best | milestones
