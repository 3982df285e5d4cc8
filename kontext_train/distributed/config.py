"""Choices of this room. Torch-free."""

import os
from dataclasses import dataclass, field
from enum import Enum

from kontext_train.errors import ConfigError


class Precision(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Checkpointing(Enum):
    none = "none"  # keep every activation
    selective = "selective"  # keep each block's input and the outputs named in keep_outputs, recompute the rest
    full = "full"  # keep each block's input, recompute the rest


class Reshard(Enum):
    """When gathered weights are freed between forward and backward."""

    always = "always"
    all_but_last = "all_but_last"  # the last block and the ends of the network, which backward needs first, stay
    never = "never"  # one gather a step instead of two, for the memory of a whole copy in param_dtype


class Float8(Enum):
    none = "none"
    tensorwise = "tensorwise"  # one scale a tensor; weights are also gathered in float8
    rowwise = "rowwise"  # a scale for each row and column: closer to bfloat16, weights are gathered in param_dtype
    mxfp8 = "mxfp8"  # a scale for each 32 values, on Blackwell


@dataclass(slots=True)
class ParallelConfig:
    dp_replicate: int = 1  # copies of the sharded model (HSDP)
    dp_shard: int = -1  # ranks that share one copy and read packs of their own; -1 is all that are left
    cp: int = 1  # neighbouring ranks that share each packed sequence (Ulysses); they hold shards of the copy too
    master_dtype: Precision = Precision.float32  # of the sharded weights; bfloat16 needs optimizer.stochastic_rounding
    param_dtype: Precision = Precision.bfloat16  # gathered and computed in
    reduce_dtype: Precision = Precision.float32
    reshard_after_forward: Reshard = Reshard.all_but_last
    prefetch_forward: int = 0  # blocks whose weights are gathered ahead of use; 0 leaves it to FSDP's streams: one
    prefetch_backward: int = 0
    cpu_offload: bool = False  # shards, gradients and optimizer states live in host memory
    shard_encoders: bool = True  # spread the frozen text encoders over the ranks too
    activation_checkpointing: Checkpointing = Checkpointing.none
    # What `selective` keeps: "attention", "all_to_all" (of cp), and linear layers by the end of their released names.
    # These three save the most arithmetic for their bytes: docs/parallel.md
    keep_outputs: list[str] = field(default_factory=lambda: ["attention", "mlp.2", "linear2"])
    compile: bool = False  # compile each kind of block once
    float8: Float8 = Float8.none  # of the blocks' matrix products, by torchao: pip install kontext-train[float8]
    float8_min_features: int = 2048  # smaller sides of a matrix do not pay on an H100
    float8_emulate: bool = False  # compute in float32 what float8 would give, anywhere and slowly: for tests
    timeout_s: int = 600  # a rank that keeps others waiting longer ends the run

    def __post_init__(self) -> None:
        for key, least in (("dp_replicate", 1), ("cp", 1), ("prefetch_forward", 0), ("prefetch_backward", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"parallel.{key}", getattr(self, key), f"must be at least {least}", f"Use {least}")
        if self.dp_shard < 1 and self.dp_shard != -1:
            rule = "must be at least 1, or -1 for all ranks left"
            raise ConfigError("parallel.dp_shard", self.dp_shard, rule, "Use -1")
        if self.float8_min_features < 1:
            given = self.float8_min_features
            raise ConfigError("parallel.float8_min_features", given, "must be at least 1", "Use 2048")
        if self.float8_emulate and self.float8 is Float8.none:
            rule = "emulates parallel.float8, which is none"
            raise ConfigError("parallel.float8_emulate", True, rule, "Set parallel.float8=tensorwise")
        if self.float8 is Float8.tensorwise and self.cpu_offload:
            rule = "needs its scales where the weights are gathered, and cpu_offload keeps both in host memory"
            raise ConfigError("parallel.float8", "tensorwise", rule, "Use rowwise, or cpu_offload=false")
        if self.timeout_s < 1:
            raise ConfigError("parallel.timeout_s", self.timeout_s, "must be at least 1", "600 is ten minutes")

    @property
    def heartbeat_s(self) -> float:
        """How often a rank tells where it is."""
        return min(5.0, self.timeout_s / 20)

    @property
    def collective_timeout_s(self) -> float:
        """When torch gives a collective up: later than the watchdog, which knows which rank is to blame."""
        return self.timeout_s + 4 * self.heartbeat_s

    def mesh_shape(self, world_size: int) -> tuple[int, int, int]:
        """(dp_replicate, dp_shard, cp); ConfigError unless their product is the world size."""
        shard = world_size // (self.dp_replicate * self.cp) if self.dp_shard == -1 else self.dp_shard
        if self.dp_replicate * shard * self.cp != world_size or shard == 0:
            given = (self.dp_replicate, self.dp_shard, self.cp)
            rule = f"dp_replicate x dp_shard x cp must be the number of processes, {world_size}"
            if self.dp_shard == -1:
                rule = f"dp_replicate x cp = {self.dp_replicate * self.cp} must divide the {world_size} processes"
            hint = "Start that many processes, or use dp_shard=-1"
            raise ConfigError("parallel.dp_replicate, dp_shard, cp", given, rule, hint)
        return self.dp_replicate, shard, self.cp


def world_size_from_environment() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
