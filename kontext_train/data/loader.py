"""Packs to pixel batches in worker processes, in plan order; windows to packs in one more process, ahead of them.

torch's DataLoader keeps the order of what it is given whatever its workers do, so order lives in the plan alone.
"""

import signal
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import chain, count
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from kontext_train.data.batch import PixelBatch, read_pack
from kontext_train.data.config import DataConfig
from kontext_train.data.plan import Pack, Planner, Position, Window
from kontext_train.data.sample import SampleReader
from kontext_train.data.sources import Mixture


class PackReader(Dataset[PixelBatch]):
    """Maps a pack to its pixel batch; what a worker process runs."""

    def __init__(self, mixture: Mixture, *, holes: bool, pad_to: int | None = None) -> None:
        """holes: a sample that cannot be read leaves one, or raises. pad_to: as in `read_pack`."""
        self.readers = [SampleReader(source.index, source.transform) for source in mixture.sources]
        self.mixture, self.holes, self.pad_to = mixture, holes, pad_to

    def __getitem__(self, pack: Pack) -> PixelBatch:
        return read_pack(pack, self.readers, self.mixture, holes=self.holes, pad_to=self.pad_to)


class _WindowPlanner(Dataset[Window]):
    """Maps a window's number to its plan; what the planning process runs."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner

    def __getitem__(self, number: int) -> Window:
        return self.planner.window(number)


class _InOrder(Sampler[Any]):
    """Hands the DataLoader the things themselves instead of row numbers."""

    def __init__(self, things: Iterable[Any]) -> None:
        self.things = things

    def __iter__(self) -> Iterator[Any]:
        return iter(self.things)


def rank_packs(steps: Iterable[Sequence[Pack]], rank: int, ranks: int) -> Iterator[Pack]:
    """One rank's packs, microbatch after microbatch. Each takes neighbours in cost on all ranks, so that none waits."""
    return chain.from_iterable(packs[rank::ranks] for packs in steps)


def load_packs(packs: Iterable[Pack], reader: PackReader, config: DataConfig) -> Generator[PixelBatch]:
    """Pixel batches of the packs, in order. Close it to end the workers."""
    return _in_workers(reader, packs, config.workers, config.prefetch)


def plan_ahead(planner: Planner, first: int, config: DataConfig) -> Generator[Window]:
    """Windows from `first` on, one ahead of what is asked for. Close it to end the process that plans them."""
    return _in_workers(_WindowPlanner(planner), count(first), min(1, config.workers), 1)


def _in_workers(dataset: Dataset[Any], things: Iterable[Any], workers: int, prefetch: int) -> Generator[Any]:
    """dataset[thing] for each thing, in order."""
    options: dict[str, Any] = {"num_workers": workers, "worker_init_fn": _leave_signals_to_the_loop}
    if workers:
        options["prefetch_factor"] = prefetch
    results: Any = iter(DataLoader(dataset, batch_size=None, sampler=_InOrder(things), **options))
    try:
        yield from results
    finally:
        if workers:
            results._shutdown_workers()  # asks and waits some seconds; `del` does not, while an error holds `results`
            for process in results._workers:
                process.kill()  # one that hangs in a read would keep this process from ending


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
    """Endless batches of one rank from `position` on. Close it to end the workers.

    rank, ranks: those among which samples are shared out; ranks that share a sample (context parallelism) are one.
    """
    windows = plan_ahead(planner, position.window, config)
    try:
        steps = planner.steps(position, ranks * microbatches, windows)
        yield from load_packs(rank_packs(steps, rank, ranks), reader, config)
    finally:
        windows.close()
