"""Ranks that die, hang, raise or run out of memory: all survivors end and say which rank, in which step and phase."""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kontext_train.config import TrainConfig
from kontext_train.distributed.config import ParallelConfig
from kontext_train.distributed.setup import process_group
from kontext_train.distributed.verdict import PATIENT, QUICK, Beat, judge
from kontext_train.distributed.watchdog import watchdog
from kontext_train.train import train
from kontext_train.trainer import Trainer
from kontext_train.training.metrics import read_metrics
from tests.runs import SMALL, small_config, start

TIMEOUT_S = 10  # a heartbeat is half a second
SILENT = r"no sign of life for [\d.]+ s"
STORE_GONE = "its process, which keeps the store of all ranks at .*, is gone or frozen"


# -- the rules -------------------------------------------------------------------------------------------------


def verdict(beats: list[Beat], missed: dict[int, int] | None = None) -> tuple[list[int], str] | None:
    silent = dict.fromkeys(range(len(beats)), 0) | (missed or {})
    found = judge(dict(enumerate(beats)), silent, beat_s=5, timeout_s=600)
    return (found.ranks, found.text) if found is not None else None


def at(moves: int, stood: int, **others: Any) -> Beat:
    return Beat(moves=moves, step=moves, phase=f"place {moves}", stood=stood, **others)


def test_a_rank_is_silent_after_patience_or_sooner_once_a_collective_failed() -> None:
    beats = [at(7, 1), at(7, 1), at(6, 1)]
    assert verdict(beats, {2: PATIENT - 1}) is None
    ranks, text = verdict(beats, {2: PATIENT}) or ([], "")
    assert ranks == [2]
    assert re.search(r"rank 2, step 6, phase place 6: no sign of life for 60 s.*rank 0, step 7.* is alive", text)
    beats[0].failed = "Connection closed by peer"
    assert verdict(beats, {2: QUICK - 1}) is None
    assert verdict(beats, {2: QUICK}) is not None
    assert verdict([at(7, 1), at(7, 1, left=True)], {1: 1000}) is None


def test_a_rank_is_behind_only_if_it_and_one_ahead_have_stood_for_the_timeout() -> None:
    behind, ahead = at(6, 121), at(7, 121)
    ranks, text = verdict([ahead, behind, ahead]) or ([], "")
    assert ranks == [1]
    assert re.search(r"rank 1, step 6.*not moved for 605 s.* while rank 0, step 7.*waits \(2 in all\)", text)
    assert verdict([at(7, 119), behind]) is None, "it keeps nobody waiting so long"
    assert verdict([ahead, at(6, 119)]) is None, "it has moved since"
    assert verdict([behind, behind]) is None, "a long pause of all ranks: compiling, saving, validation"
    assert verdict([at(7, 1000, left=True), behind]) is None, "who is done does not wait"


def test_ranks_that_saw_no_collective_fail_took_no_part() -> None:
    failed = "RuntimeError: Timed out"
    assert verdict([at(7, 2 * QUICK - 1, failed=failed), at(7, 130)]) is None
    ranks, text = verdict([at(7, 2 * QUICK, failed=failed), at(7, 130), at(8, 1)]) or ([], "")
    assert ranks == [1]
    assert re.search(r"rank 1, step 7.*took no part in a collective, which failed on rank 0.*Timed out", text)
    ranks, text = verdict([at(7, 2 * QUICK, failed=failed)] * 2) or ([0], "")
    assert ranks == []
    assert re.search(r"rank 0, step 7.*Timed out. No rank is dead or behind", text)


# -- real processes --------------------------------------------------------------------------------------------


def written(
    folder: Path, processes: int, function: Callable[..., None], *arguments: object
) -> tuple[Path, list[BaseProcess]]:
    """Started ranks whose stderr goes to files in a folder. Rank 0 keeps the store, as where torchrun does not."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return folder, start(processes, _written_to, folder, port, function, *arguments)


def _written_to(folder: Path, port: int, function: Callable[..., None], *arguments: object) -> None:
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    os.environ["MASTER_PORT"] = str(port)
    os.dup2(os.open(folder / f"stderr.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    function(*arguments)


def outputs(folder: Path, ranks: list[BaseProcess], broken: int) -> list[tuple[Any, str]]:
    """(exit code, stderr) of each rank. Rank `broken` has a code of None if it outlives the others, as a frozen one."""
    for rank, process in enumerate(ranks):
        process.join(timeout=100 if rank != broken else 0)
    ranks[broken].join(timeout=4)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return [(code, (folder / f"stderr.{rank}").read_text()) for rank, code in enumerate(codes)]


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
    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
    torch.empty(2**35, dtype=torch.uint8)


def really_out_of_python_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
    bytearray(2**35)


def loop(breaking: Callable[[], None], broken_rank: int) -> None:
    """A loop as the trainer's, of which one rank breaks with three updates made."""
    config = ParallelConfig(timeout_s=TIMEOUT_S)
    with process_group(config) as world, watchdog(world, config) as watch:
        for step in range(6):
            watch.at(step, "data")
            if step == 3 and world.rank == broken_rank:
                time.sleep(1.5)  # all hear of this place
                breaking()
            watch.at(step, "update")
            dist.all_reduce(torch.ones(8))


def slow_but_healthy() -> None:
    """Each pause of one rank is half the timeout, that of all is longer than it."""
    config = ParallelConfig(timeout_s=TIMEOUT_S)
    with process_group(config) as world, watchdog(world, config) as watch:
        for step in range(2):
            watch.at(step, "data")
            if world.rank == step:
                time.sleep(TIMEOUT_S / 2)
            watch.at(step, "update")
            dist.all_reduce(torch.ones(8))
        watch.at(2, "save")
        time.sleep(TIMEOUT_S + 2)
        dist.barrier()
        if world.rank == 1:
            time.sleep(2)  # closing what it holds, after the last collective, while rank 0 keeps the store


def wait_in_a_group_of_the_mesh() -> None:
    """A replica's rank 0 waits for its rank 1 longer than the timeout."""
    with process_group(ParallelConfig(dp_replicate=2, timeout_s=TIMEOUT_S)) as world:
        if world.rank % 2 == 1:
            time.sleep(TIMEOUT_S + 5)
        group = world.mesh["dp_shard"].get_group()
        assert group is not dist.group.WORLD
        with pytest.raises(RuntimeError, match=r"Timed out|Connection closed|Connection reset"):
            dist.all_reduce(torch.ones(8), group=group)


@dataclass
class Case:
    breaking: Callable[[], None]
    rank: int
    code: int | None  # of that rank
    said: str  # by all others


CASES = [
    Case(kill, 1, -9, rf"phase data \(.*\): {SILENT}.* rank [02], step 3, phase update, is alive"),
    Case(kill, 0, -9, rf"phase data \(.*\): {STORE_GONE}"),
    Case(freeze, 1, None, rf"phase data \(.*\): {SILENT}"),
    Case(freeze, 0, None, rf"phase data \(.*\): {STORE_GONE}"),
    Case(
        hang,
        1,
        1,
        r"phase data \(.* in hang\): has not moved for 1[\d.]+ s .* while rank [02], step 3, phase update",
    ),
    Case(wrong, 0, 1, "phase data: KeyError: 'no such tensor'"),
    Case(out_of_memory, 1, 1, "phase data: OutOfMemoryError: .* Out of memory: .* GiB peak.*data.tokens_per_pack"),
    Case(really_out_of_memory, 1, 1, "phase data: RuntimeError: .*DefaultCPUAllocator.* Out of memory"),
    Case(really_out_of_python_memory, 0, 1, "phase data: MemoryError. Out of memory"),
]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Any, str]]]:
    """What became of every case. All run at once, for they mostly wait."""
    folder = tmp_path_factory.mktemp("cases")
    runs = {name(case): (written(folder / name(case), 3, loop, case.breaking, case.rank), case.rank) for case in CASES}
    runs["healthy"] = written(folder / "healthy", 2, slow_but_healthy), 0
    runs["groups"] = written(folder / "groups", 4, wait_in_a_group_of_the_mesh), 0
    return {n: outputs(*run, broken=rank) for n, (run, rank) in runs.items()}


def name(case: Case) -> str:
    return f"{case.breaking.__name__}-{case.rank}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_all_ranks_end_and_name_the_broken_one(ended: dict[str, list[tuple[Any, str]]], case: Case) -> None:
    results = ended[name(case)]
    assert [code for code, _ in results] == [case.code if rank == case.rank else 1 for rank in range(3)]
    for text in (text for rank, (_, text) in enumerate(results) if rank != case.rank):
        assert re.search(rf"kontext-train: rank {case.rank}, step 3, {case.said}", text), text
        assert "Traceback" not in text, "the reason stands alone"
    own = results[case.rank][1]
    if case.breaking is hang:
        assert re.search(rf"main thread of rank {case.rank} is here:(.|\n)*in loop\n(.|\n)*time\.sleep\(1000", own), own
    elif case.code == 1:
        assert re.search(rf"Traceback(.|\n)*kontext-train: rank {case.rank}, step 3, phase data", own), own


def test_a_slow_rank_and_a_long_save_are_no_failure(ended: dict[str, list[tuple[Any, str]]]) -> None:
    assert ended["healthy"] == [(0, ""), (0, "")]


def test_the_timeout_holds_in_groups_of_the_mesh(ended: dict[str, list[tuple[Any, str]]]) -> None:
    assert [code for code, _ in ended["groups"]] == [0] * 4, ended["groups"]


def test_one_process_says_where_it_failed() -> None:
    config = ParallelConfig()
    with pytest.raises(MemoryError) as raised:
        _fail_alone(config)
    assert re.search("rank 0, step 5, phase save. Out of memory: .* GiB peak", raised.value.__notes__[0])


def _fail_alone(config: ParallelConfig) -> None:
    with process_group(config) as world, watchdog(world, config) as watch:
        watch.at(5, "save")
        raise MemoryError


# -- whole runs ------------------------------------------------------------------------------------------------


def break_run(config: TrainConfig, method: str, breaking: Callable[[], None]) -> None:
    """A training run of which rank 1 breaks in a method of the trainer, with two updates made."""
    made = getattr(Trainer, method)

    def broken(self: Trainer, *arguments: Any) -> Any:
        if self.step == 2 and self.world.rank == 1:
            time.sleep(1)  # rank 0 hears of this place
            breaking()
        return made(self, *arguments)

    setattr(Trainer, method, broken)
    train(config)


@pytest.mark.parametrize(
    ("method", "breaking", "said"),
    [
        ("train_phase", kill, rf"phase encode \(.*\): {SILENT}"),
        (
            "save",
            hang,
            r"phase save \(.* in hang\): (has not moved|took no part in a collective, which failed on rank 0)",
        ),
    ],
)
def test_a_training_run_names_the_broken_rank(
    shards: Path, tmp_path: Path, method: str, breaking: Callable[[], None], said: str
) -> None:
    config = small_config(shards, tmp_path, f"parallel.timeout_s={TIMEOUT_S}", "run.save_every_steps=2")
    (code, text), _ = outputs(*written(tmp_path, 2, break_run, config, method, breaking), broken=1)
    assert code == 1
    assert re.search(rf"kontext-train: rank 1, step 2, {said}", text), text


def ranks_of(torchrun: int) -> dict[int, int]:
    """Process id by rank, of a torchrun's workers."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    found = (re.search(rb"\0RANK=(\d+)", Path(f"/proc/{child}/environ").read_bytes()) for child in children)
    return {int(rank[1]): int(child) for rank, child in zip(found, children, strict=True) if rank}


def test_torchrun_ends_with_the_reason(shards: Path, tmp_path: Path) -> None:
    """The command line as it is used, one of whose ranks the kernel kills."""
    options = [f"data.train={shards}", f"run.dir={tmp_path}", f"parallel.timeout_s={TIMEOUT_S}", "run.steps=100000"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with (tmp_path / "stderr").open("w") as file:
        torchrun = subprocess.Popen([*command, "-m", "kontext_train.train", *SMALL, *options], stderr=file)
    while len(read_metrics(tmp_path / "metrics.jsonl")) < 3:
        assert torchrun.poll() is None, (tmp_path / "stderr").read_text()
        time.sleep(0.1)
    os.kill(ranks_of(torchrun.pid)[1], signal.SIGKILL)
    assert torchrun.wait(timeout=60) == 1
    said = (tmp_path / "stderr").read_text()
    assert re.search(rf"kontext-train: rank 1, step \d+, phase [a-z ]+ \(.*\): {SILENT}", said), said
    assert re.search(r"Root Cause(.|\n)*rank +: 1 (.|\n)*exitcode +: -9", said), said
