"""Start and end of the process group, and what every process must know of itself."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kontext_train.distributed.config import ParallelConfig


@dataclass(frozen=True, slots=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh  # ("dp_replicate", "dp_shard")

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(config: ParallelConfig) -> Iterator[World]:
    """The process group for the duration of a run. One process alone gets a group of one, so that there is one path."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    alone: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout_s), **alone)
    try:
        shape = config.mesh_shape(dist.get_world_size())
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))
        yield World(dist.get_rank(), dist.get_world_size(), device, mesh)
    finally:
        dist.destroy_process_group()
