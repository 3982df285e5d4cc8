"""One run at a time writes a run folder: two would take each other's checkpoints for what a kill left over.

Rank 0 holds a lock on run.dir/run.lock, which says who that is. The system lets go of it however the process ends, so
that none is ever left behind; and it is the process's alone (POSIX), not also that of workers forked from it, which
may outlive it by seconds.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

import torch.distributed as dist

from kontext_train.distributed.reduce import from_main
from kontext_train.errors import ConfigError

WAIT_S = 60.0  # for ranks of the start before to end: torchrun gives them 30 s, a failing run's last save takes as long
POLL_S = 0.5
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of file systems that have none, or whose service is down


@contextmanager
def run_lock(run_dir: str, timeout_s: float) -> Iterator[None]:
    """The run folder is this run's inside. Every rank must call it.

    timeout_s: that a rank may keep others waiting (parallel.timeout_s).
    Raises ConfigError on every rank if the folder cannot be written to, or is another run's and stays so.
    """
    file, refusal = None, None
    if dist.get_rank() == 0:
        try:
            file = _locked(run_dir, time.monotonic() + min(WAIT_S, timeout_s / 2))
        except ConfigError as error:
            refusal = error
    refused = from_main(refusal)
    if refused is not None:
        raise refused
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _locked(run_dir: str, until: float) -> IO[str]:
    """The lock's open file; the lock is gone when it is closed."""
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        file = Path(run_dir, "run.lock").open("a+")  # noqa: SIM115 - as long as the run
        _wait_for(file, run_dir, until)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}))
        file.flush()
    except OSError as error:
        raise cannot_be_written(run_dir, error) from error
    return file


def _wait_for(file: IO[str], run_dir: str, until: float) -> None:
    told = False
    while not _is_ours(file):
        if time.monotonic() >= until:
            hint = "Let it end, or stop it (SIGTERM: it saves), and start this again; or give another run.dir"
            raise ConfigError("run.dir", run_dir, f"is being written by another run, {_holder(file)}", hint)
        if not told:
            waiting = f"waiting up to {until - time.monotonic():.0f} s for it to end"
            print(f"kontext-train: {run_dir} is being written by {_holder(file)}: {waiting}", file=sys.stderr)
        told = True
        time.sleep(POLL_S)


def _is_ours(file: IO[str]) -> bool:
    """Whether nobody else has the lock now: this process has it, or there are no locks here."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of them, POSIX leaves open
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warning = f"cannot be locked on its file system ({error}): nothing keeps a second run out of the folder"
        print(f"kontext-train: {file.name} {warning}", file=sys.stderr)
    return True


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        written = json.loads(file.read())
        return f"process {written['pid']} on {written['host']} since {written['since']}"
    except (ValueError, KeyError, TypeError):  # it is just writing that
        return "a process that has not said which"


def cannot_be_written(run_dir: str, error: OSError) -> ConfigError:
    hint = "Give a folder on a disk with room, which all ranks share and may write to"
    return ConfigError("run.dir", run_dir, f"cannot be written to: {error}", hint)
