"""Small real training runs: shards on disk, composed config, one process or several forked ones."""

import gc
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path

import matplotlib.figure  # noqa: F401 - once, and not in every forked run, like the other two
import torch
from diffusers import AutoencoderKL  # noqa: F401
from hydra import compose, initialize_config_module
from torch.distributed import TCPStore
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, T5EncoderModel  # noqa: F401

from kontext_train.config import TrainConfig, register_schemas, typed
from kontext_train.data.index import ShardIndex
from kontext_train.train import train

ENCODERS = Path(__file__).parent.parent / "quickstart" / "encoders"

SMALL = [
    "model=tiny",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.axes_dim=[4,6,6]",
    "model.depth_single_blocks=1",
    "model.init.gate=1",
    f"encoders.path={ENCODERS}",
    "encoders.t5_tokens=12",
    "data.tokens_per_pack=128",
    "data.window_samples=64",
    "data.workers=0",
    "optimizer.lr=1e-3",
    "schedule.warmup_steps=0",
    "parallel.param_dtype=float32",
    "run.log_every_steps=1",
    "logging.wandb=disabled",
    "logging.progress_bar=false",
]


def compose_config(*overrides: str) -> TrainConfig:
    register_schemas()
    with initialize_config_module("kontext_train.conf", version_base="1.3"):
        return typed(compose("train", overrides=list(overrides)))


def small_config(shards: Path, run_dir: Path, *overrides: str) -> TrainConfig:
    return compose_config(*SMALL, f"data.train={shards}", f"run.dir={run_dir}", *overrides)


def broken_copy(shards: Path, folder: Path, samples: Sequence[int]) -> Path:
    """The shards with the target images of some samples overwritten, as a bad disk would: the index still fits."""
    shutil.copytree(shards, folder)  # keeps times
    index = ShardIndex.open(folder)
    for i in samples:
        where = index.location(i)
        overwrite(where.shard, where.target.offset, bytes(where.target.size))
    return folder


def overwrite(path: Path, offset: int, raw: bytes) -> None:
    """Size and time stay as they are."""
    state = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(raw)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def run(config: TrainConfig, processes: int = 1) -> None:
    """Train in forked processes (fork: the imports are done already). Raises if any of them failed."""
    in_processes(processes, train, config)


def in_processes(processes: int, function: Callable[..., None], *arguments: object) -> None:
    ranks = start(processes, function, *arguments)
    for process in ranks:
        process.join(timeout=600)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * processes, f"exit codes of the ranks: {codes}"


def start(processes: int, function: Callable[..., None], *arguments: object) -> list[BaseProcess]:
    """Forked ranks, as torchrun would tell them."""
    store, number = _store(), next(_NUMBERS)
    return [fork(_as_rank, rank, processes, store.port, number, function, arguments) for rank in range(processes)]


def fork(function: Callable[..., None], *arguments: object) -> BaseProcess:
    """A started process. Garbage of this one stays out of its collector: a process group that a child collects waits
    for threads that only the parent has.
    """
    if "torch._dynamo" in sys.modules:  # a child counts what it compiles itself
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    gc.collect()
    gc.freeze()
    process = multiprocessing.get_context("fork").Process(target=_in_child, args=(function, arguments))
    process.start()
    gc.unfreeze()
    return process


def _in_child(function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)  # makes a pool of threads again: two threads that ask for it at once may find none
    function(*arguments)


def _as_rank(
    rank: int, processes: int, port: int, number: int, function: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": str(number),  # the ranks of each start meet under its number
    }
    function(*arguments)


@cache
def _store() -> TCPStore:
    """Where ranks meet, as in torchrun's: one that is there already, for a port that is only picked may be taken."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


_NUMBERS = count()
