"""Start and end of the process group, and what every process must know of itself."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from kontext_train.distributed.config import ParallelConfig


@dataclass(frozen=True, slots=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh  # ("dp_replicate", "dp_shard"): who holds which part of the weights; shards are dp_shard x cp
    cp_group: dist.ProcessGroup | None  # the ranks that share this one's packed sequences; None where none does
    cp: int  # how many they are

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """Which packs this process reads: the ranks of one cp group read the same."""
        return self.rank // self.cp

    @property
    def dp_size(self) -> int:
        return self.size // self.cp


@contextmanager
def process_group(config: ParallelConfig) -> Iterator[World]:
    """The process group for the duration of a run. One process alone gets a group of one, so that there is one path."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    timeout = timedelta(seconds=config.collective_timeout_s)
    store, rank, size = _meeting_point(timeout) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        replicate, shard, cp = config.mesh_shape(dist.get_world_size())
        mesh = init_device_mesh(device.type, (replicate, shard * cp), mesh_dim_names=("dp_replicate", "dp_shard"))
        _set_timeouts(mesh, timeout)
        cp_group = None
        if cp > 1:
            by_sequence = init_device_mesh(device.type, (replicate * shard, cp), mesh_dim_names=("dp", "cp"))
            _set_timeouts(by_sequence, timeout)
            cp_group = by_sequence["cp"].get_group()
        yield World(dist.get_rank(), dist.get_world_size(), device, mesh, cp_group, cp)
    finally:
        dist.destroy_process_group()
        forget_meshes()


def forget_meshes() -> None:
    """To call when a group has ended and the process goes on.

    DTensor remembers results by mesh: a later mesh of the same ranks would get those of the dead one, with its groups.
    """
    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
    if clear := getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", None):  # since torch 2.10
        clear()


def _meeting_point(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """(store, rank, world size).

    torchrun keeps its store when it restarts ranks, with addresses of those that died, and other runs may share it.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RUN_ID", ""), store)
        store = dist.PrefixStore(name_of_start(store, rank, size, timeout), store)
    return store, rank, size


def name_of_start(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that no earlier start of these ranks had, the same on all of them. Raises RuntimeError if some stay away.

    torchrun's count of restarts is no such name: each node has its own. So rank 0 makes one up and answers each rank,
    by a name which that rank has made up: what ranks of earlier starts asked for and were told means nothing.
    """
    own = uuid4().hex
    if rank > 0:
        store.set(f"start/asks/{rank}", own)
        store.wait([f"start/answer/{own}"], timeout)
        name = store.get(f"start/answer/{own}").decode()
        store.set(f"{name}/came/{rank}", "")
        return name
    waiting, end = list(range(1, size)), time.monotonic() + timeout.total_seconds()
    while waiting := [other for other in waiting if not store.check([f"{own}/came/{other}"])]:
        if time.monotonic() > end:
            raise RuntimeError(f"ranks {waiting[:8]} did not come within {timeout.total_seconds():g} s")
        for other in waiting:
            if store.check([f"start/asks/{other}"]):
                store.set(f"start/answer/{store.get(f'start/asks/{other}').decode()}", own)
        time.sleep(0.02)
    return own


def _set_timeouts(mesh: DeviceMesh, timeout: timedelta) -> None:
    """The groups of a mesh have torch's default, ten or thirty minutes, whatever the whole world's group was given."""
    for group in mesh.get_all_groups():
        _set_pg_timeout(timeout, group)
