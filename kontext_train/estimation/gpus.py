"""GPUs by their data sheets, as they sit in an 8-GPU HGX server with one 400 Gb/s network card each (A100: 200)."""

from dataclasses import dataclass

from kontext_train.estimation.config import GPU


@dataclass(frozen=True, slots=True)
class DataSheet:
    memory_gib: float  # that CUDA shows
    bfloat16_tflops: float  # dense
    float8_tflops: float | None  # dense; None has no such units
    hbm_gb_per_s: float
    nvlink_gb_per_s: float  # one direction
    network_gb_per_s: float  # one direction, of one card
    capability: tuple[int, int]


DATA_SHEETS = {
    GPU.h100: DataSheet(79.1, 989, 1979, 3350, 450, 50, (9, 0)),  # SXM5
    GPU.h200: DataSheet(139.7, 989, 1979, 4800, 450, 50, (9, 0)),
    GPU.b200: DataSheet(178.3, 2250, 4500, 8000, 900, 50, (10, 0)),
    GPU.a100: DataSheet(79.2, 312, None, 2039, 300, 25, (8, 0)),  # SXM4, 80 GB
    GPU.l40s: DataSheet(44.4, 362, 733, 864, 32, 50, (8, 9)),  # 48 GB; PCIe 4 in place of NVLink
    GPU.rtx4090: DataSheet(23.6, 165, 330, 1008, 32, 25, (8, 9)),  # 24 GB; PCIe 4
}
