"""Packs to pixel batches in worker processes, in plan order.

torch's DataLoader keeps the order of the packs it is given whatever its workers do, so order lives in the plan alone.
"""

import signal
from collections.abc import Generator, Iterable, Iterator
from itertools import chain
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from kontext_train.data.batch import PixelBatch, read_pack
from kontext_train.data.config import DataConfig
from kontext_train.data.plan import Pack, Planner, Position, SampleSizes
from kontext_train.data.sample import SampleReader


class PackReader(Dataset[PixelBatch]):
    """Maps a pack to its pixel batch; what a worker process runs."""

    def __init__(self, reader: SampleReader, sizes: SampleSizes, pad_to: int | None = None) -> None:
        self.reader, self.sizes, self.pad_to = reader, sizes, pad_to

    def __getitem__(self, pack: Pack) -> PixelBatch:
        return read_pack(pack, self.reader, self.sizes, self.pad_to)


class _InOrder(Sampler[Pack]):
    """Hands the DataLoader the packs themselves instead of row numbers."""

    def __init__(self, packs: Iterable[Pack]) -> None:
        self.packs = packs

    def __iter__(self) -> Iterator[Pack]:
        return iter(self.packs)


def rank_packs(steps: Iterable[list[Pack]], rank: int, microbatches: int) -> Iterator[Pack]:
    """One rank's packs, microbatch after microbatch."""
    return chain.from_iterable(packs[rank * microbatches : (rank + 1) * microbatches] for packs in steps)


def load_packs(packs: Iterable[Pack], reader: PackReader, config: DataConfig) -> Generator[PixelBatch]:
    """Pixel batches of the packs, in order. Close it to end the workers."""
    options: dict[str, Any] = {"num_workers": config.workers, "worker_init_fn": _leave_signals_to_the_loop}
    if config.workers:
        options["prefetch_factor"] = config.prefetch
    batches = iter(DataLoader(reader, batch_size=None, sampler=_InOrder(packs), **options))
    workers = getattr(batches, "_workers", [])
    try:
        yield from batches
    finally:
        del batches  # asks the workers to end and waits some seconds
        for worker in workers:
            worker.kill()  # one that hangs in a read would keep this process from ending


def _leave_signals_to_the_loop(worker: int) -> None:
    """A stop signal goes to the whole process group; a worker that died of it would take the save down with it."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def train_batches(
    planner: Planner,
    reader: PackReader,
    config: DataConfig,
    position: Position,
    *,
    rank: int,
    ranks: int,
    microbatches: int,
) -> Generator[PixelBatch]:
    """Endless batches of one rank from `position` on. Close it to end the workers."""
    return load_packs(rank_packs(planner.steps(position, ranks * microbatches), rank, microbatches), reader, config)
