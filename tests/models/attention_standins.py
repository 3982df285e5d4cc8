"""CPU stand-ins for attention kernels that need a GPU, with the call signatures of the real ones.

They compute with what they are given: the segments from cu_seqlens, the backward pass from the output and the
log-sum-exp that the forward pass returned. So a swapped argument, a wrong dtype or a lost tuple member shows.
Signatures: flash-attn-4 4.0.0b36 (`flash_attn/cute/interface.py`), flash-attention 0251105a (`hopper/flash_api.cpp`,
`flash_attn/flash_attn_interface.py`); torch's are torch's own, since they are registered with its dispatcher.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor


def packed_forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """(out [N, H, D], log-sum-exp [H, N] float32)"""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[1], q.shape[0])
    for rows in _segments(cu_q, longest):
        scores = _scores(q[rows], k[rows])
        out[rows] = (scores.softmax(-1) @ v[rows].transpose(0, 1).float()).transpose(0, 1).to(q.dtype)
        lse[:, rows] = scores.logsumexp(-1)
    return out, lse


def packed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, longest: int
) -> list[Tensor]:
    """The gradients of FlashAttention-2 (arXiv 2307.08691, algorithm 2), from out and lse."""
    assert grad.is_contiguous()
    assert lse.shape == (q.shape[1], q.shape[0])
    assert lse.dtype == torch.float32
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
    for rows in _segments(cu_q, longest):
        q_, k_, v_, out_, grad_ = (x[rows].transpose(0, 1).float() for x in (q, k, v, out, grad))
        p = (_scores(q[rows], k[rows]) - lse[:, rows, None]).exp()
        ds = p * (grad_ @ v_.mT - (grad_ * out_).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        for whole, part in zip(grads, (ds @ k_, ds.mT @ q_, p.mT @ grad_), strict=True):
            whole[rows] = part.transpose(0, 1).to(q.dtype)
    return grads


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q.transpose(0, 1).float() @ k.transpose(0, 1).mT.float() * q.shape[-1] ** -0.5


def _segments(cu_seqlens: Tensor, longest: int) -> list[slice]:
    bounds = cu_seqlens.tolist()
    slices = [slice(a, b) for a, b in pairwise(bounds) if b > a]
    assert all(s.stop - s.start <= longest for s in slices)
    return slices


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All three FlashAttention packages in sys.modules, and CPU kernels for torch's CUDA-only operators."""
    library = torch.library.Library("flash_attn_3", "DEF")
    kernels = torch.library.Library("aten", "IMPL")
    try:
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, "flash_attn.cute", ModuleType("flash_attn.cute"))
        monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", _flash_4())
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", _flash_2())
        monkeypatch.setitem(sys.modules, "flash_attn_interface", _flash_3(library))
        _torch_kernels(kernels)
        yield
    finally:
        library._destroy()
        kernels._destroy()


def _flash_4() -> ModuleType:
    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, return_lse=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        assert return_lse
        assert max_seqlen_q == max_seqlen_k
        return *packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q), None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        return tuple(packed_backward(dout, q, k, v, out, lse, cu_seqlens_k, max_seqlen_k))

    module = ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd  # type: ignore[attr-defined]
    return module


def _flash_2() -> ModuleType:
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        assert (dropout_p, softmax_scale, causal) == (0.0, q.shape[-1] ** -0.5, False)
        out, lse = packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_k)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        assert (dropout_p, softmax_scale, causal, softcap) == (0.0, q.shape[-1] ** -0.5, False, 0.0)
        assert (window_size_left, window_size_right, alibi_slopes) == (-1, -1, None)
        grads = packed_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, max_seqlen_q)
        for given, grad in zip((dq, dk, dv), grads, strict=True):
            given.copy_(grad)
        return torch.empty(0)

    module = ModuleType("flash_attn.flash_attn_interface")
    module._flash_attn_varlen_forward = _flash_attn_varlen_forward  # type: ignore[attr-defined]
    module._flash_attn_varlen_backward = _flash_attn_varlen_backward  # type: ignore[attr-defined]
    return module


def _flash_3(library: torch.library.Library) -> ModuleType:
    segments = "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None"
    library.define(
        f"fwd(Tensor q, Tensor k, Tensor v, {segments}, int num_splits=0) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    library.define(
        "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
        f"Tensor(a!)? dq=None, Tensor(b!)? dk=None, Tensor(c!)? dv=None, {segments}) -> (Tensor, Tensor)"
    )

    def fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, num_splits):  # type: ignore[no-untyped-def]
        return *packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q), torch.empty(0), torch.empty(0)

    def bwd(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):  # type: ignore[no-untyped-def]
        grads = packed_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, max_seqlen_q)
        for given, grad in zip((dq, dk, dv), grads, strict=True):
            given.copy_(grad)
        return torch.empty(0), torch.empty(0)

    library.impl("fwd", fwd, "CPU")
    library.impl("bwd", bwd, "CPU")
    return ModuleType("flash_attn_interface")


def _torch_kernels(library: torch.library.Library) -> None:
    unused = torch.zeros((), dtype=torch.int64)

    def flash(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, **options):  # type: ignore[no-untyped-def]
        assert (dropout_p, is_causal) == (0.0, False)
        return *packed_forward(q, k, v, cu_q, cu_k, max_q), unused, unused, torch.empty(0)

    def flash_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, *_, **options):  # type: ignore[no-untyped-def]
        return tuple(packed_backward(grad, q, k, v, out, lse, cu_q, max_q))

    def efficient(q, k, v, bias, cu_q, cu_k, max_q, max_k, dropout_p, mask_type, compute_log_sumexp, **options):  # type: ignore[no-untyped-def]
        assert (bias, dropout_p, mask_type, compute_log_sumexp) == (None, 0.0, 0, True)
        out, lse_HN = packed_forward(q[0], k[0], v[0], cu_q, cu_k, max_q)
        lse = torch.zeros(len(cu_q) - 1, q.shape[2], (max_q + 31) // 32 * 32)
        for i, (first, last) in enumerate(zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True)):
            lse[i, :, : last - first] = lse_HN[:, first:last]
        return out[None], lse, unused, unused, max_q, max_k

    def efficient_backward(
        grad, q, k, v, bias, out, cu_q, cu_k, max_q, max_k, lse, dropout_p, seed, offset, mask_type, *_, **options
    ):  # type: ignore[no-untyped-def]
        lengths = cu_q.diff().tolist()
        lse_HN = torch.cat([lse[i, :, :length] for i, length in enumerate(lengths)], dim=1)
        grads = packed_backward(grad[0], q[0], k[0], v[0], out[0], lse_HN, cu_q, max_q)
        return *(g[None] for g in grads), torch.empty(0)

    def cudnn(q, k, v, bias, compute_log_sumexp, *_, **options):  # type: ignore[no-untyped-def]
        assert compute_log_sumexp
        assert q.shape[2] > 1, "cuDNN refuses keys of length 1"
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, lse[..., None].contiguous(), None, None, q.shape[2], k.shape[2], unused, unused, None

    def cudnn_backward(
        grad, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, **options
    ):  # type: ignore[no-untyped-def]
        assert lse.shape == (*q.shape[:3], 1)
        assert lse.is_contiguous()
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        # That kernel reads lse as it lies after transposition, [B, L, H].
        lse_BHL = lse[..., 0].transpose(1, 2).contiguous().transpose(1, 2)
        return backward(grad, q, k, v, out, lse_BHL, dropout_p, is_causal)

    library.impl("_flash_attention_forward", flash, "CPU")
    library.impl("_flash_attention_backward", flash_backward, "CPU")
    library.impl("_efficient_attention_forward", efficient, "CPU")
    library.impl("_efficient_attention_backward", efficient_backward, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention", cudnn, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", cudnn_backward, "CPU")
