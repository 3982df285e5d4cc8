"""Choices of this room. Torch-free."""

from dataclasses import dataclass, field
from enum import Enum

from kontext_train.errors import ConfigError


class GPU(Enum):
    h100 = "h100"
    h200 = "h200"
    b200 = "b200"
    a100 = "a100"
    l40s = "l40s"
    rtx4090 = "rtx4090"


@dataclass(slots=True)
class Sample:
    """What a typical sample looks like, where no shards are given: a 1024² edit has 8,704 tokens."""

    height: int = 1024
    width: int = 1024
    contexts: int = 1  # images of the same size

    def __post_init__(self) -> None:
        for key, least in (("height", 1), ("width", 1), ("contexts", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"sample.{key}", getattr(self, key), f"must be at least {least}", f"Use {least}")
            if key != "contexts" and getattr(self, key) % 16:
                rule = "must be whole tokens of 16 x 16 pixels"
                raise ConfigError(f"sample.{key}", getattr(self, key), rule, "Use a multiple of 16")


@dataclass(slots=True)
class Assumptions:
    """What a prediction of speed rests on: shares of a data sheet's number that real code reaches."""

    matmul: float = 0.72  # of peak FLOP/s, by the blocks' products (a large bf16 product alone reaches 0.80 on an H100)
    matmul_float8: float = 0.60
    attention: float = 0.50  # of peak bf16 FLOP/s, counting two products forward and four backward (FlashAttention-3)
    encoders: float = 0.40
    memory: float = 0.80  # of HBM bandwidth, by everything else
    compiled_traffic: float = 0.12  # of the bytes moved operator by operator; ideal fusion would be near 0.07
    links: float = 0.80  # of NVLink's and the network's bandwidth
    overlap: float = 0.90  # of the time of computation, in which collectives of FSDP can hide
    reserve_gib: float = 6.0  # CUDA context, NCCL's buffers, fragmentation, workspaces

    def __post_init__(self) -> None:
        for key in ("matmul", "matmul_float8", "attention", "encoders", "memory", "compiled_traffic", "links"):
            if not 0 < getattr(self, key) <= 1:
                raise ConfigError(f"assume.{key}", getattr(self, key), "is a share above 0, at most 1", "Try 0.5")
        if not 0 <= self.overlap <= 1:
            raise ConfigError("assume.overlap", self.overlap, "is a share from 0 to 1", "0 hides nothing")
        if self.reserve_gib < 0:
            raise ConfigError("assume.reserve_gib", self.reserve_gib, "must not be negative", "0 reserves nothing")


@dataclass(slots=True)
class ClusterConfig:
    gpu: GPU = GPU.h100
    world: int = 8  # GPUs in all
    gpus_per_node: int = 8
    sample: Sample = field(default_factory=Sample)
    assume: Assumptions = field(default_factory=Assumptions)

    def __post_init__(self) -> None:
        for key in ("world", "gpus_per_node"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "must be at least 1", "For example 8")
        if self.world > self.gpus_per_node and self.world % self.gpus_per_node:
            rule = f"must be whole nodes of gpus_per_node={self.gpus_per_node}"
            raise ConfigError("world", self.world, rule, "Use a multiple")
