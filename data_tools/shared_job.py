"""Jobs that make one shard of each shard, in processes that share the shards out among themselves."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import build_index

UNREAD = ": could not be read when its shard was made"


@dataclass(slots=True)
class JobReport:
    samples: int = 0  # made by this process
    shards: int = 0
    kept: int = 0  # shards of this process that an earlier run had finished
    bad: list[str] = field(default_factory=list)  # samples that are left out, each with shard, key and reason
    indexed: bool = False  # all shards of all processes are done

    def index(self, source: ShardIndex, out: Path, passed: dict[str, Any] | None = None) -> None:
        """Writes the index of `out`, whose shards are all there. `bad` then has all that they lack of the source's
        samples, whichever run or process made them.

        passed: the safety filter that the shards passed.
        """
        problems = build_index(out, passed=passed).problems
        if problems:
            raise ValueError(f"{out} was changed while it was written: {problems[0]}. Remove that shard and run again")
        self.indexed = True
        told = "\n".join(["", *self.bad])
        self.bad += [name + UNREAD for name in _left_out(source, ShardIndex.open(out)) if f"\n{name}: " not in told]

    def told(self, out: Path) -> int:
        """Prints it; returns the exit status.

        Bad samples are a failure of the process that ends the job: torchrun ends all others when one of them fails.
        """
        state = "indexed" if self.indexed else "other processes still have shards to finish"
        print(f"{out}: {self.samples:,} samples in {self.shards:,} shards, {self.kept:,} kept; {state}")
        for problem in self.bad:
            print(f"  left out: {problem}")
        return int(self.indexed and bool(self.bad))


def _left_out(source: ShardIndex, made: ShardIndex) -> Iterator[str]:
    """Shard and key of the source's samples that no shard has."""
    rows_made = dict(made.shard_rows())
    for name, rows in source.shard_rows():
        if len(rows_made[name]) < len(rows):
            there = {made.location(i).key for i in rows_made[name]}
            yield from (f"{at.shard}: {at.key}" for at in map(source.location, rows) if at.key not in there)


def share_of(environ: Mapping[str, str]) -> tuple[int, int]:
    """(number of this process, processes): of torchrun, of a Slurm array, or of torchrun in every task of an array."""
    rank, ranks = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    tasks = int(environ.get("SLURM_ARRAY_TASK_COUNT", 1))
    step = int(environ.get("SLURM_ARRAY_TASK_STEP", 1))
    task = (int(environ.get("SLURM_ARRAY_TASK_ID", 0)) - int(environ.get("SLURM_ARRAY_TASK_MIN", 0))) // step
    if not 0 <= task < tasks:
        raise ValueError(f"task {task} of a Slurm array of {tasks}: its numbers have gaps. Use --array=0-{tasks - 1}")
    return task * ranks + rank, tasks * ranks
