"""As much of a run as a checkpoint holds, and no data: a sharded network, AdamW, an average, and a step.

Gradients are made of weights and step, element by element, so that every number is the same on every mesh.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.serialization
from torch import nn

from kontext_train.distributed.config import ParallelConfig, Precision
from kontext_train.distributed.parallelize import parallelize
from kontext_train.distributed.setup import World, process_group
from kontext_train.training.checkpoint import find_resume, load, newest_whole, read_record
from kontext_train.training.checkpoint_saver import Saver
from kontext_train.training.config import CheckpointConfig, OptimizerConfig
from kontext_train.training.ema import EMA
from kontext_train.training.optimizer import PhaseOptimizer


class Network(nn.Module):
    """Rows that two, three and four ranks share unequally."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)


class TinyRun:
    def __init__(self, world: World, parallel: ParallelConfig, width: int) -> None:
        torch.manual_seed(0)
        self.model = Network(width)
        parallelize(self.model, world.mesh, parallel, None)
        self.optimizer = PhaseOptimizer(self.model, OptimizerConfig(lr=1e-2), seed=0)
        self.ema = EMA(self.model, half_life_images=3)
        self.step = 0

    def advance(self) -> None:
        self.step += 1
        for parameter in self.model.parameters():
            parameter.grad = torch.sin(parameter.detach() * 7 + self.step)
        self.optimizer.step(lr_factor=1.0)
        self.ema.update(images=1)

    def state(self) -> dict[str, Any]:
        weights = dict(self.model.named_parameters())
        return {
            "modules": {"student": weights},
            "optimizers": {"student": self.optimizer.state()},
            "ema": self.ema.average,
        }

    def save(self, saver: Saver, wait: bool = False) -> None:
        saver.save(self.step, self.state(), {"step": self.step}, wait)

    def resume(self, folder: Path, resume: str = "auto") -> Path | None:
        path = newest_whole(resume, find_resume(resume, folder))
        if path is not None:
            load(path, self.state())
            self.step = read_record(path)["step"]
        return path

    def tensors(self) -> list[torch.Tensor]:
        """All of them in one order, as this rank has them."""
        moments = self.optimizer.state()["state"]
        kept = [moments[name][kind] for name in sorted(moments) for kind in ("exp_avg", "exp_avg_sq", "step")]
        return [*self.model.parameters(), *self.ema.average.values(), *kept]

    def digest(self, whole: bool = False) -> str:
        """Of this rank's shards, or of whole tensors, for which all ranks must call it."""
        found = hashlib.blake2b(digest_size=8)
        for tensor in self.tensors():
            if isinstance(tensor, torch.distributed.tensor.DTensor):
                tensor = tensor.full_tensor() if whole else tensor.to_local()
            found.update(tensor.detach().contiguous().numpy().tobytes())
        return found.hexdigest()


@contextmanager
def tiny_run(width: int = 7, **parallel: Any) -> Iterator[TinyRun]:
    config = ParallelConfig(param_dtype=Precision.float32, **parallel)
    with process_group(config) as world:
        yield TinyRun(world, config, width)


def train_for_ever(folder: Path, keep: int, last: int) -> None:
    """A run that saves at every second step, and notes its numbers at each, for a parent that kills it."""
    log = folder.parent / f"log.{os.environ['RANK']}"
    with tiny_run() as run:
        saver = Saver(folder, CheckpointConfig(keep_last=keep))
        run.resume(folder)
        with log.open("a") as file:
            print(f"resumed {run.step} {run.digest()}", file=file, flush=True)
            while run.step < last:
                run.advance()
                print(f"made {run.step} {run.digest()}", file=file, flush=True)
                dist.all_reduce(torch.zeros(1))
                saver.check()
                if run.step % 2 == 0:
                    run.save(saver, wait=run.step == last)
