"""Choices of this room. Torch-free."""

import os
from dataclasses import dataclass
from enum import Enum

from kontext_train.errors import ConfigError


class Precision(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Checkpointing(Enum):
    none = "none"  # keep every activation
    full = "full"  # keep each block's input, recompute the rest


@dataclass(slots=True)
class ParallelConfig:
    dp_replicate: int = 1  # copies of the sharded model (HSDP)
    dp_shard: int = -1  # ranks that share one copy; -1 is all that are left
    param_dtype: Precision = Precision.bfloat16  # gathered and computed in; master weights stay float32
    reduce_dtype: Precision = Precision.float32
    reshard_after_forward: bool = True  # free gathered weights between forward and backward
    activation_checkpointing: Checkpointing = Checkpointing.none
    compile: bool = False  # compile each kind of block once
    timeout_s: int = 600  # a collective that waits longer ends the run

    def __post_init__(self) -> None:
        if self.dp_replicate < 1:
            raise ConfigError("parallel.dp_replicate", self.dp_replicate, "must be at least 1", "1 is no replication")
        if self.dp_shard < 1 and self.dp_shard != -1:
            rule = "must be at least 1, or -1 for all ranks left"
            raise ConfigError("parallel.dp_shard", self.dp_shard, rule, "Use -1")

        if self.timeout_s < 1:
            raise ConfigError("parallel.timeout_s", self.timeout_s, "must be at least 1", "600 is ten minutes")

    def mesh_shape(self, world_size: int) -> tuple[int, int]:
        """(dp_replicate, dp_shard); ConfigError unless their product is the world size."""
        shard = world_size // self.dp_replicate if self.dp_shard == -1 else self.dp_shard
        if self.dp_replicate * shard != world_size:
            rule = f"dp_replicate x dp_shard must be the number of processes, {world_size}"
            given = (self.dp_replicate, self.dp_shard)
            raise ConfigError("parallel.dp_replicate, dp_shard", given, rule, "Start that many processes, or use -1")
        return self.dp_replicate, shard


def world_size_from_environment() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
