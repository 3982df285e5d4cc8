"""How long a step takes if each of its parts runs at a stated share of what the hardware can: a prediction."""

from collections.abc import Sequence
from dataclasses import dataclass

from kontext_train.estimation.config import Assumptions
from kontext_train.estimation.gpus import DataSheet
from kontext_train.estimation.traffic import Collective


@dataclass(frozen=True, slots=True)
class Work:
    """Of one step on one GPU, recomputation included."""

    matrix_flops: float  # bfloat16 products but attention
    float8_flops: float
    attention_flops: float
    encoder_flops: float
    elementwise_bytes: float
    optimizer_bytes: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds; they add up."""

    matrix: float
    attention: float
    elementwise: float
    encoders: float
    optimizer: float
    waiting: float  # for collectives that do not hide behind computation

    @property
    def total(self) -> float:
        return self.matrix + self.attention + self.elementwise + self.encoders + self.optimizer + self.waiting


def step_time(
    work: Work,
    collectives: Sequence[Collective],
    gpu: DataSheet,
    gpus_per_node: int,
    assume: Assumptions,
    compiled: bool,
) -> StepTime:
    """Raises ValueError for float8 on a GPU without it."""
    peak, hbm = gpu.bfloat16_tflops * 1e12, gpu.hbm_gb_per_s * 1e9 * assume.memory
    matrix = work.matrix_flops / (peak * assume.matmul)
    if work.float8_flops:
        if gpu.float8_tflops is None:
            raise ValueError("this GPU has no float8 units")
        matrix += work.float8_flops / (gpu.float8_tflops * 1e12 * assume.matmul_float8)
    attention = work.attention_flops / (peak * assume.attention)
    elementwise = work.elementwise_bytes * (assume.compiled_traffic if compiled else 1.0) / hbm

    def seconds(collective: Collective) -> float:
        within, between = collective.by_link(gpus_per_node)
        slower = max(within / gpu.nvlink_gb_per_s, between / gpu.network_gb_per_s)  # both go on at once
        return slower / 1e9 / assume.links

    hiding = sum(seconds(c) for c in collectives if c.hidden)
    open_ = sum(seconds(c) for c in collectives if not c.hidden)
    return StepTime(
        matrix=matrix,
        attention=attention,
        elementwise=elementwise,
        encoders=work.encoder_flops / (peak * assume.encoders),
        optimizer=work.optimizer_bytes / hbm,
        waiting=open_ + max(0.0, hiding - assume.overlap * (matrix + attention + elementwise)),
    )
