"""Attention over packed sequences: tokens of one segment see each other and nothing else.

Every backend has the same signature: q, k, v [N, H, D] in joint order, cu_seqlens int32 [segments + 1], max_seqlen ->
[N, H, D]. H may be a share of the model's heads. Segments may be empty, and max_seqlen may be above the longest. The
model takes the function as an argument and does not know which one it got.

How to read: which backend (`usable_backend`), then one function a backend, then what they share (attention_ops.py).
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from kontext_train.errors import ConfigError
from kontext_train.models import attention_ops as ops
from kontext_train.models.config import AttentionBackend

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]

# What auto tries on a GPU, fastest first. FlashAttention-3 was written for Hopper, FlashAttention-4 for Blackwell (and
# runs on Hopper); torch's own is FlashAttention-2, so flash_attention_2 never comes before it; sdpa is what float32
# and old cards get. cudnn is left out although its kernels are fast: it reads the segments' lengths back to the host
# once for each pack and plans each new pair of count and length, which packs of mixed sizes pay again and again.
AUTO_ORDER = (
    AttentionBackend.flash_attention_3,
    AttentionBackend.flash_attention_4,
    AttentionBackend.torch_varlen,
    AttentionBackend.sdpa,
)


@dataclass(frozen=True, slots=True)
class _Needs:
    """What a CUDA backend cannot do without."""

    capabilities: range  # major compute capabilities: 8 Ampere and Ada, 9 Hopper, 10 Blackwell
    max_head: int = 256
    half: bool = True  # bfloat16 and float16 only
    module: str = "torch"
    install: str = ""


_NEEDS = {
    AttentionBackend.flash_attention_4: _Needs(
        range(9, 11), 128, module="flash_attn.cute.interface", install="pip install --pre flash-attn-4"
    ),
    AttentionBackend.flash_attention_3: _Needs(
        range(9, 10), module="flash_attn_interface", install="Build it from the folder hopper/ of flash-attention"
    ),
    AttentionBackend.flash_attention_2: _Needs(
        range(8, 13), module="flash_attn.flash_attn_interface", install="pip install flash-attn"
    ),
    AttentionBackend.torch_varlen: _Needs(range(8, 13)),
    AttentionBackend.cudnn: _Needs(range(8, 13), 128),
    AttentionBackend.sdpa: _Needs(range(5, 13), half=False),
}


def usable_backend(
    backend: AttentionBackend, device: torch.device | str, dtype: torch.dtype, head_dim: int
) -> AttentionBackend:
    """The backend itself, or what auto comes to; ConfigError if it is not installed or cannot run this here."""
    device = torch.device(device)
    if backend is not AttentionBackend.auto:
        _check(backend, device, dtype, head_dim)
        return backend
    if device.type == "cpu":
        return AttentionBackend.cpu
    refusals = []
    for candidate in AUTO_ORDER:
        try:
            _check(candidate, device, dtype, head_dim)
            return candidate
        except ConfigError as error:
            refusals.append(str(error))
    raise ConfigError("model.attention", backend.value, "finds no backend for this model", "; ".join(refusals))


def _check(backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    def refuse(rule: str, fix: str) -> ConfigError:
        return ConfigError("model.attention", backend.value, rule, fix)

    if backend is AttentionBackend.cpu or device.type != "cuda":
        if backend is not AttentionBackend.cpu:
            raise refuse(f"needs a CUDA device, and this process computes on {device.type}", "Use auto")
        if device.type != "cpu":
            raise refuse("has no CUDA kernel", "Use auto")
        return
    needs = _NEEDS[backend]
    major, minor = torch.cuda.get_device_capability(device)
    if major not in needs.capabilities:
        known = f"{needs.capabilities.start} to {needs.capabilities.stop - 1}"
        rule = f"runs on compute capability {known}, and {torch.cuda.get_device_name(device)} has {major}.{minor}"
        raise refuse(rule, "Use auto")
    if needs.half and dtype not in (torch.bfloat16, torch.float16):
        raise refuse(f"computes in bfloat16 or float16, not in {dtype}", "Use sdpa, or parallel.param_dtype=bfloat16")
    if head_dim % 8 or head_dim > needs.max_head:
        rule = f"needs a head size that is a multiple of 8 and at most {needs.max_head}, not {head_dim}"
        raise refuse(rule, "Change model.num_heads")
    try:
        importlib.import_module(needs.module)
    except (ImportError, OSError) as error:  # OSError: built for another torch or CUDA
        raise refuse(f"needs the module {needs.module} ({error})", needs.install) from error


def attention_function(backend: AttentionBackend) -> AttentionFunction:
    """The function of a backend that `usable_backend` gave."""
    match backend:
        case AttentionBackend.flash_attention_4:
            return flash_attention_4
        case AttentionBackend.flash_attention_3:
            return flash_attention_3
        case AttentionBackend.flash_attention_2:
            return flash_attention_2
        case AttentionBackend.torch_varlen:
            return torch_varlen_attention
        case AttentionBackend.cudnn:
            return cudnn_attention
        case AttentionBackend.sdpa:
            return sdpa_attention
        case AttentionBackend.cpu:
            return cpu_attention
    raise AssertionError(backend)


def flash_attention_4(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """FlashAttention-4 (flash_attn/cute of Dao-AILab/flash-attention); compiles its kernels at the first call."""
    return ops.flash_attention_4(q_NHD, k_NHD, v_NHD, cu_seqlens, max_seqlen)[0]


def flash_attention_3(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608): Hopper."""
    return ops.flash_attention_3(q_NHD, k_NHD, v_NHD, cu_seqlens, max_seqlen)[0]


def flash_attention_2(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """FlashAttention-2 (Dao 2023, arXiv 2307.08691) from its own package."""
    return ops.flash_attention_2(q_NHD, k_NHD, v_NHD, cu_seqlens, max_seqlen)[0]


def torch_varlen_attention(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """FlashAttention-2 as torch brings it, by its public entry; its operator is opaque already."""
    out_NHD = varlen_attn(q_NHD, k_NHD, v_NHD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    assert isinstance(out_NHD, Tensor)  # a tuple only when asked for more
    return out_NHD


def cudnn_attention(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """cuDNN's kernels through torch, once for each run of segments of equal length.

    torch's own variable-length entry to cuDNN is not used: in torch 2.11 it plans anew at every call, and its backward
    takes the head size for the sequence length (pytorch pull requests 191576 and 186142, both later).
    """
    return ops.cudnn_attention(q_NHD, k_NHD, v_NHD, cu_seqlens, max_seqlen)[0]


def sdpa_attention(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """torch's memory-efficient kernel (Rabe and Staats 2021, arXiv 2112.05682), the SDPA backend for any card."""
    return ops.sdpa_attention(q_NHD, k_NHD, v_NHD, cu_seqlens, max_seqlen)[0]


def cpu_attention(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """torch's CPU FlashAttention, once for each run of segments of equal length.

    v, a slice of a wider matrix, is copied first: strided rows cost the kernel more than the copy.
    """
    out_NHD, _ = ops.cpu_attention(q_NHD, k_NHD, v_NHD.contiguous(), cu_seqlens, max_seqlen)
    return out_NHD
