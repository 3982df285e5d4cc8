"""Writing that can be interrupted: files, shards and folders are whole under their name, or not there.

A job is a list of tasks, mostly one shard each. Its output grows in `.OUT.partial`; a task that is done leaves a record
there, with a digest of all that it depends on, so that the same command goes on where a killed one stopped and does
again only what changed. The folder takes its name OUT when everything is in it.
"""

import fcntl
import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from kontext_train.data.processes import end_with_parent

SCRATCH = (
    ".done"  # in the growing folder: records of tasks, and what only the job itself needs. Not in the finished one
)
_LOCK = ".lock"


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the name `path` when the block ends well, in one step. Otherwise `path` stays as it was."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the new name on an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Writes (key, {suffix: content}) as a shard, in one step, and returns the number of samples.

    The same samples make the same shard, bit for bit. A suffix is what follows the key: "json", "target.png".
    """
    count = 0
    with replacing(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for key, members in samples:
            for suffix, content in sorted(members.items()):
                member = tarfile.TarInfo(f"{key}.{suffix}")  # of time 0 and no owner
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            count += 1
    return count


@contextmanager
def growing_folder(out: Path) -> Iterator[Path]:
    """`.OUT.partial`, with what a killed run left there. It becomes `out` when the block ends well.

    Raises:
        ValueError: `out` exists and is not an empty folder, or another process is writing it.
    """
    if (out / SCRATCH).is_dir():  # a run was killed when all was done but this
        _clean_up(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out is {out}, which exists and is not an empty folder. Remove it or give another one")
    out = Path(os.path.abspath(out))  # "." has no name to derive another from
    partial = out.with_name(f".{out.name}.partial")
    (partial / SCRATCH).mkdir(parents=True, exist_ok=True)
    with open(partial / _LOCK, "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it however the process ends
        except BlockingIOError as error:
            raise ValueError(
                f"another process is writing {out} (in {partial}). Wait for it or give another one"
            ) from error
        for left_over in partial.rglob(".*.tmp"):
            left_over.unlink()
        try:
            yield partial
        except BaseException:
            if not any((partial / SCRATCH).glob("*.json")):
                shutil.rmtree(partial)  # nothing is lost
            raise
        os.replace(partial, out)
    _clean_up(out)


def _clean_up(out: Path) -> None:
    (out / _LOCK).unlink(missing_ok=True)
    shutil.rmtree(out / SCRATCH, ignore_errors=True)


def remove_others(partial: Path, names: Iterable[str]) -> None:
    """Removes shards that are not among `names`: left by a job that was killed and then started otherwise."""
    kept = set(names)
    for path in partial.glob("*.tar"):
        if path.name not in kept:
            path.unlink()


@dataclass(slots=True)
class Task:
    """One piece of a job. `digest` covers all that its result depends on; `size` is for the progress bar."""

    name: str
    given: Any  # what the job's function is called with; it goes to another process
    digest: str
    size: int


def run_tasks(
    work: Callable[[Any], dict[str, Any]],
    tasks: Iterable[Task],
    partial: Path,
    *,
    processes: int,
    total: int,
    label: str,
    unit: str = " samples",
    is_final: Callable[[dict[str, Any]], bool] = lambda result: True,
) -> Generator[tuple[Task, dict[str, Any]], None, None]:
    """Yields every task with its result: from its record if an earlier run did it, else from `work(task.given)`.

    Args:
        work: a function of a module, that returns what JSON can hold. What it writes must be whole or not there.
        tasks: may be a generator; only as many are taken ahead as keep the processes busy.
        partial: the folder of `growing_folder`.
        processes: 1 works in this process.
        total: the size of all tasks together, in `unit`.
        is_final: whether a result is recorded. One that is not is worked out again by the next run.

    Raises:
        OSError: a process died. What `work` raises comes through.
    """
    # smoothing=0: tasks are few and big, so the average says most. disable=None: no bar where nobody looks.
    with tqdm(total=total, desc=label, unit=unit, unit_scale=True, smoothing=0, disable=None) as bar:

        def missing() -> Iterator[Task]:
            for task in tasks:
                if (result := _recorded(partial, task)) is None:
                    _record_path(partial, task).unlink(missing_ok=True)  # what it speaks of is about to be replaced
                    yield task
                else:
                    finished.append((task, result))
                    bar.total -= task.size  # the bar is about what is left to do

        finished = list[tuple[Task, dict[str, Any]]]()
        for task, result in _worked(work, missing(), processes):
            if is_final(result):
                with replacing(_record_path(partial, task)) as file:
                    file.write(json.dumps({"digest": task.digest, "result": result}).encode())
            bar.update(task.size)
            yield task, result
        yield from finished


def _record_path(partial: Path, task: Task) -> Path:
    return partial / SCRATCH / f"{task.name}.json"


def _recorded(partial: Path, task: Task) -> dict[str, Any] | None:
    path = _record_path(partial, task)
    record = json.loads(path.read_bytes()) if path.is_file() else {}
    return record["result"] if record.get("digest") == task.digest else None


def _worked(
    work: Callable[[Any], dict[str, Any]], tasks: Iterator[Task], processes: int
) -> Iterator[tuple[Task, dict[str, Any]]]:
    if processes == 1:
        for task in tasks:
            yield task, work(task.given)
        return
    running: dict[Future[dict[str, Any]], Task] = {}
    with _pool(processes) as pool:
        try:
            for task in tasks:
                with _interrupts_held():
                    running[pool.submit(work, task.given)] = task
                if len(running) >= 2 * processes:
                    yield from _first_done(running)
            while running:
                yield from _first_done(running)
        except BrokenProcessPool as error:
            names = ", ".join(sorted(task.name for task in running.values()))
            raise OSError(
                f"a process died, perhaps for lack of memory, at one of {names}. What is done is kept; "
                "run the same command again, with fewer --processes"
            ) from error


def _first_done(running: dict[Future[dict[str, Any]], Task]) -> list[tuple[Task, dict[str, Any]]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    results = [(running[future], future.result()) for future in done]
    for future in done:
        del running[future]
    return results


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """A process that `submit` starts inherits this: Ctrl-C while it still imports waits for `end_with_parent`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that die at once when the block is left by an error or Ctrl-C: their tasks are whole or not there."""
    others = set(multiprocessing.active_children())
    # spawn: a fork would copy threads' locks (pyarrow has threads) in whatever state they are.
    # SIG_DFL: Ctrl-C ends them without a traceback.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, end_with_parent, (signal.SIG_DFL,))
    try:
        yield pool
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
