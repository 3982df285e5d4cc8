"""What the card can do at all: matrix products and copies. Everything else is read against these."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.measure import Setting, Step, race, row

SECTION = "ceilings"


def run(setting: Setting) -> None:
    side, tokens = (128, 64) if setting.tiny else (8192, 8704)
    d = setting.model.hidden_size
    products = {
        f"matmul {side} x {side} x {side}": (side, side, side),
        f"linear1 of a single block, {tokens} tokens": (tokens, d, 7 * d),
        f"linear2 of a single block, {tokens} tokens": (tokens, 5 * d, d),
    }
    for kind, build in (("bf16", _matmul), ("fp8", _matmul_fp8)):
        builders: dict[str, Callable[[], Step]] = {
            f"{kind} {name}": partial(build, shape, setting) for name, shape in products.items()
        }
        for (name, result), (m, k, n) in zip(race(builders, setting, 20).items(), products.values(), strict=True):
            setting.emit(row(SECTION, name, result, 2 * m * k * n / 1e12))
    bytes_moved = 2 * (2**20 if setting.tiny else 4 * 2**30)
    for name, result in race({"copy on the device": partial(_copy, bytes_moved // 2, setting)}, setting, 20).items():
        values = row(SECTION, name, result, 0.0)
        if "ms" in values:
            values |= {"tb_per_s": bytes_moved / values["ms"] / 1e9}  # read and written
        setting.emit(values)


def _matmul(shape: tuple[int, int, int], setting: Setting) -> Step:
    m, k, n = shape
    a = torch.randn(m, k, device=setting.device, dtype=setting.dtype)  # random: zeros run faster than data will
    b = torch.randn(n, k, device=setting.device, dtype=setting.dtype)
    out = torch.empty(m, n, device=setting.device, dtype=setting.dtype)

    def step() -> None:
        torch.mm(a, b.T, out=out)

    return step


def _matmul_fp8(shape: tuple[int, int, int], setting: Setting) -> Step:
    m, k, n = shape
    a = torch.randn(m, k, device=setting.device).to(torch.float8_e4m3fn)
    b = torch.randn(n, k, device=setting.device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=setting.device)

    def step() -> None:
        torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=setting.dtype, use_fast_accum=True)

    return step


def _copy(size: int, setting: Setting) -> Step:
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)

    def step() -> None:
        target.copy_(source)

    return step
