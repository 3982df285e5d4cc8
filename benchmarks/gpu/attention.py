"""Attention backends on the 12B's 24 heads of 128: one triplet, two, and mixed packs; forward, and both ways."""

from functools import partial

import torch

from benchmarks.gpu.measure import Setting, Step, race, row
from kontext_train.errors import ConfigError
from kontext_train.models.attention import attention_function, usable_backend
from kontext_train.models.config import AttentionBackend

SECTION = "attention"
# Lengths of the segments as a layout sorts them, padding last.
PACKS = {
    "one triplet": [8704],
    "two triplets": [8704, 8704],
    "mixed pack": [1536, 4608, 8704, 2560],  # 512² and 1024² text-to-image, a 1024² edit, padding
    "seven 512² edits": [2560] * 7 + [1536],  # and padding
}


def run(setting: Setting) -> None:
    installed = _installed(setting)
    heads, head_dim = setting.model.num_heads, setting.model.head_dim
    for pack, sizes in PACKS.items():
        lengths = [n // 256 for n in sizes] if setting.tiny else sizes
        forward = 4 * heads * head_dim * sum(n**2 for n in lengths) / 1e12
        for direction, tflop in (("forward", forward), ("both ways", 3.5 * forward)):  # backward redoes the scores
            builders = {b.value: partial(_step, b, lengths, direction == "both ways", setting) for b in installed}
            for name, result in race(builders, setting, 10).items():
                more = {"backend": name, "lengths": lengths, "direction": direction}
                setting.emit(row(SECTION, f"{name}, {direction}, {pack}", result, tflop, **more))


def _installed(setting: Setting) -> list[AttentionBackend]:
    """Backends that can run here; why the others cannot is reported once."""
    usable = []
    for backend in AttentionBackend:
        try:
            chosen = usable_backend(backend, setting.device, setting.dtype, setting.model.head_dim)
        except ConfigError as error:
            setting.emit(row(SECTION, backend.value, error, 0.0))
            continue
        if backend is AttentionBackend.auto:
            setting.emit({"section": SECTION, "name": f"auto is {chosen.value} here", "note": ""})
        else:
            usable.append(backend)
    return usable


def _step(backend: AttentionBackend, lengths: list[int], both_ways: bool, setting: Setting) -> Step:
    model = setting.model
    function = attention_function(backend)
    shape = (sum(lengths), model.num_heads, model.head_dim)
    q, k, v, grad = (torch.randn(shape, device=setting.device, dtype=setting.dtype) for _ in range(4))
    cu_seqlens = torch.tensor([0, *lengths], device=setting.device).cumsum(0).to(torch.int32)
    inputs = [x.requires_grad_(both_ways) for x in (q, k, v)]

    def step() -> None:
        out = function(*inputs, cu_seqlens, max(lengths))
        if both_ways:
            torch.autograd.grad(out, inputs, grad)

    return step
