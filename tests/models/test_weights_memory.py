"""What reading and writing large weights costs a process: private memory (RssAnon), mapped pages of files (RssFile)."""

import ctypes
import json
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from kontext_train.config import plain
from kontext_train.distributed.config import ParallelConfig
from kontext_train.distributed.parallelize import parallelize
from kontext_train.distributed.setup import process_group
from kontext_train.evaluation import trained
from kontext_train.evaluation.exported import Source, write_released
from kontext_train.evaluation.trained import Origin, load_model
from kontext_train.models.config import FluxConfig
from kontext_train.models.flux import Flux
from kontext_train.models.weights import load
from kontext_train.training.checkpoint import COMPLETE
from tests.runs import compose_config, in_processes

WIDE = FluxConfig(hidden_size=4096, num_heads=32, depth=1, depth_single_blocks=2)  # 1.2 billion parameters
RANKS = 4


def give_back_freed() -> None:
    """What earlier tests freed: memory that is taken from it again was there all the time, and would not show."""
    ctypes.CDLL(None).malloc_trim(0)


class Meter:
    """How much more memory this process held at the worst moment inside, in bytes."""

    def __enter__(self) -> "Meter":
        give_back_freed()
        self.before, self.peak, self.running = self._now(), {"RssAnon": 0, "RssFile": 0}, True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._look()
        self.running = False
        self.thread.join()

    def _watch(self) -> None:
        while self.running:
            self._look()
            time.sleep(0.001)

    def _look(self) -> None:
        now = self._now()
        self.peak = {key: max(self.peak[key], now[key] - self.before[key]) for key in self.peak}

    @staticmethod
    def _now() -> dict[str, int]:
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        return {words[0][:-1]: 1024 * int(words[1]) for words in lines if words[0] in ("RssAnon:", "RssFile:")}


def sparse_file(file: Path) -> tuple[int, int]:
    """A bfloat16 file of a wide network without data on disk; (its bytes, those of its largest tensor)."""
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in Flux(WIDE).named_parameters()}
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        out.truncate(8 + len(header) + end)
    return end, max(b - a for a, b in (entry["data_offsets"] for entry in entries.values()))


def check_sharded_load(file: Path, size: int, largest: int) -> None:
    with process_group(ParallelConfig()) as world:
        with torch.device("meta"):
            model = Flux(WIDE)
        give_back_freed()  # before the parameters get their places
        parallelize(model, world.mesh, ParallelConfig())
        model.to_empty(device="cpu")
        with Meter() as meter:
            load(model, file)
        shard = sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[attr-defined]
    assert abs(shard - 2 * size / RANKS) < 0.001 * size  # float32 of bfloat16
    print("shard, private, mapped (GB):", *(round(n / 1e9, 3) for n in (shard, *meter.peak.values())))
    assert 0.98 * shard < meter.peak["RssAnon"] < shard + largest
    assert 0.98 * size / RANKS < meter.peak["RssFile"] < 1.1 * size / RANKS  # its own rows of the file


def check_whole_load(file: Path, size: int) -> None:
    with Meter() as meter:
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    assert meter.peak["RssAnon"] > 0.98 * size
    assert meter.peak["RssFile"] > 0.98 * size
    del tensors


@pytest.mark.slow
def test_a_rank_holds_its_shard_and_no_more_than_a_tensor_besides(tmp_path: Path) -> None:
    """A file of 2.4 GB on four ranks; and the negative control, that reading the whole file is seen."""
    file = tmp_path / "wide.safetensors"
    size, largest = sparse_file(file)
    assert size > 2.3e9
    try:
        in_processes(RANKS, check_sharded_load, file, size, largest)
        in_processes(1, check_whole_load, file, size)
    finally:
        file.unlink()


def check_export(folder: Path) -> None:
    model = ("hidden_size=1024", "num_heads=8", "depth=3", "depth_single_blocks=4")
    config = plain(compose_config(*(f"model.{option}" for option in model)))
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Flux(trained.section(FluxConfig, config["model"])).named_parameters()}
    size = 4 * sum(shape.numel() for shape in shapes.values())
    assert size > 6e8
    dcp.save({"modules": {"student": {n: torch.zeros(s) for n, s in shapes.items()}}}, checkpoint_id=folder / "c")
    (folder / "c" / COMPLETE).touch()
    trained.GROUP_BYTES = 2**26
    with Meter() as streamed:
        write_released(Source(folder / "c", config, False, Origin()), folder / "x.safetensors", torch.bfloat16, None)
    print("checkpoint, private (GB):", *(round(n / 1e9, 3) for n in (size, streamed.peak["RssAnon"])))
    assert streamed.peak["RssAnon"] < 4 * trained.GROUP_BYTES < size / 2
    with Meter() as whole:
        load_model(folder / "c", config, ema=False)
    assert whole.peak["RssAnon"] > 0.85 * size  # the rest was free in the allocator


@pytest.mark.slow
def test_an_export_holds_a_part_of_the_weights(tmp_path: Path) -> None:
    in_processes(1, check_export, tmp_path)
