"""Ranks that die, hang, raise or run out of memory: every survivor ends and says which rank, in which step and phase."""

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kontext_train.distributed.config import ParallelConfig
from kontext_train.distributed.setup import process_group
from kontext_train.distributed.watchdog import watchdog
from tests.runs import start

TIMEOUT_S = 8  # a heartbeat is 0.4 s


def outputs(folder: Path, processes: int, function: Callable[..., None], *arguments: object) -> list[tuple[Any, str]]:
    """(exit code, stderr) of each rank. A code of None: the last of all that did not end, as a stopped one cannot."""
    ranks = start(processes, _written_to, folder, function, *arguments)
    deadline = time.monotonic() + 60
    while sum(process.is_alive() for process in ranks) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in ranks:
        process.join(timeout=1)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return [(code, (folder / f"stderr.{rank}").read_text()) for rank, code in enumerate(codes)]


def _written_to(folder: Path, function: Callable[..., None], *arguments: object) -> None:
    file = os.open(folder / f"stderr.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    function(*arguments)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    time.sleep(1000)


def wrong() -> None:
    raise KeyError("no such tensor")


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def really_out_of_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
    torch.empty(2**40, dtype=torch.uint8).fill_(1)


def loop(breaking: Callable[[], None], broken_rank: int, steps: int = 50) -> None:
    """A loop as the trainer's, of which one rank breaks with three updates made."""
    config = ParallelConfig(timeout_s=TIMEOUT_S)
    with process_group(config) as world, watchdog(world, config) as watch:
        for step in range(steps):
            watch.at(step, "data")
            if step == 3 and world.rank == broken_rank:
                time.sleep(0.5)  # that a heartbeat tells of this place
                breaking()
            watch.at(step, "update")
            dist.all_reduce(torch.ones(8))


@pytest.mark.parametrize(
    ("breaking", "rank", "said"),
    [
        (kill, 1, r"rank 1, step 3, phase data \(.*\): no sign of life for 1\.\d* s"),
        (kill, 0, r"rank 0, step 3, phase data \(.*\): its process, with the store .* is gone"),
        (freeze, 1, "rank 1, step 3, phase data (.*): no sign of life for 4.8 s"),
        (freeze, 0, "rank 0, step 3, phase data (.*): its process, with the store of all ranks .* is gone"),
        (
            hang,
            1,
            "rank 1, step 3, phase data (.* in hang): has not moved for 8 s .* while rank 0, step 3, phase update",
        ),
        (
            hang,
            0,
            "rank 0, step 3, phase data (.* in hang): has not moved for 8 s .* while rank 1, step 3, phase update",
        ),
        (wrong, 1, "rank 1, step 3, phase data: KeyError: 'no such tensor'"),
        (wrong, 0, "rank 0, step 3, phase data: KeyError: 'no such tensor'"),
        (out_of_memory, 1, "rank 1, step 3, phase data: OutOfMemoryError: .* Out of memory: .* GiB peak"),
        (really_out_of_memory, 1, "rank 1, step 3, phase data: RuntimeError: .*DefaultCPUAllocator.* Out of memory"),
    ],
)
def test_survivors(tmp_path: Path, breaking: Callable[[], None], rank: int, said: str) -> None:
    t = time.time()
    for code, text in outputs(tmp_path, 3, loop, breaking, rank):
        print(code, text)
    print(time.time() - t)
    assert 0
