"""Jobs that make one shard of each shard, in processes that share the shards out among themselves."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True)
class JobReport:
    samples: int = 0  # made by this process
    shards: int = 0
    kept: int = 0  # shards of this process that an earlier run had finished
    bad: list[str] = field(default_factory=list)  # samples that are left out, each with shard, key and reason
    indexed: bool = False  # all shards of all processes are done

    def told(self, out: Path) -> int:
        """Prints it; returns the exit status."""
        state = "indexed" if self.indexed else "other processes still have shards to finish"
        print(f"{out}: {self.samples:,} samples in {self.shards:,} shards, {self.kept:,} kept; {state}")
        for problem in self.bad:
            print(f"  left out: {problem}")
        return int(bool(self.bad))


def share_of(environ: Mapping[str, str]) -> tuple[int, int]:
    """(number of this process, processes): of torchrun, of a Slurm array, or of torchrun in every task of an array."""
    rank, ranks = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    tasks = int(environ.get("SLURM_ARRAY_TASK_COUNT", 1))
    step = int(environ.get("SLURM_ARRAY_TASK_STEP", 1))
    task = (int(environ.get("SLURM_ARRAY_TASK_ID", 0)) - int(environ.get("SLURM_ARRAY_TASK_MIN", 0))) // step
    if not 0 <= task < tasks:
        raise ValueError(f"task {task} of a Slurm array of {tasks}: its numbers have gaps. Use --array=0-{tasks - 1}")
    return task * ranks + rank, tasks * ranks
