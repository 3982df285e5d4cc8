"""Attention over packed sequences: tokens of one segment see each other and nothing else.

Every backend has the same signature: q, k, v [N, H, D] in joint order, cu_seqlens int32 [segments + 1], max_seqlen ->
[N, H, D]. The model takes the function as an argument and does not know which one it got.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kontext_train.errors import ConfigError
from kontext_train.models.config import AttentionBackend

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def attention_function(backend: AttentionBackend, device: torch.device | str) -> AttentionFunction:
    """The function for a backend on a device; ConfigError if that device cannot run it."""
    on_cuda = torch.device(device).type == "cuda"
    match backend:
        case AttentionBackend.auto:
            return torch_varlen_attention if on_cuda else cpu_attention
        case AttentionBackend.cpu:
            if on_cuda:
                raise ConfigError("model.attention", backend.value, "has no CUDA kernel", "Use auto")
            return cpu_attention
        case AttentionBackend.torch_varlen:
            if not on_cuda:
                raise ConfigError("model.attention", backend.value, "needs a CUDA device", "Use auto")
            return torch_varlen_attention
    raise AssertionError(backend)


def torch_varlen_attention(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """torch's own variable-length FlashAttention (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn  # not in every CPU build

    out_NHD = varlen_attn(q_NHD, k_NHD, v_NHD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    assert isinstance(out_NHD, Tensor)  # a tuple only when asked for more
    return out_NHD


def cpu_attention(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """torch's CPU FlashAttention, once for each run of segments of equal length.

    One opaque operator, so that a compiled block has no graph break and one graph serves every packing. It computes in
    float32 whatever the input: at the short lengths that fit a CPU the bfloat16 backward kernel is ten times slower.
    """
    out_NHD, _ = _cpu_forward(q_NHD.float(), k_NHD.float(), v_NHD.float(), cu_seqlens)
    return out_NHD.to(q_NHD.dtype)


def _equal_runs(cu_seqlens: Tensor) -> Iterator[tuple[slice, int]]:
    """(rows of the packed sequence, segments in them) for each run of neighbouring segments of equal length."""
    bounds = cu_seqlens.tolist()
    first = 0
    for i in range(1, len(bounds)):
        last_of_run = i + 1 == len(bounds) or bounds[i + 1] - bounds[i] != bounds[i] - bounds[i - 1]
        if last_of_run:
            yield slice(bounds[first], bounds[i]), i - first
            first = i


def _batched(x_NHD: Tensor, rows: slice, segments: int) -> Tensor:
    """View of some rows as [segments, H, L, D], the order torch's attention takes."""
    return x_NHD[rows].unflatten(0, (segments, -1)).transpose(1, 2)


@torch.library.custom_op("kontext_train::cpu_attention", mutates_args=(), device_types="cpu")
def _cpu_forward(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    out_NHD, lse_NH = torch.empty_like(q_NHD), q_NHD.new_empty(q_NHD.shape[:2])
    for rows, segments in _equal_runs(cu_seqlens):
        q, k, v = (_batched(x, rows, segments) for x in (q_NHD, k_NHD, v_NHD))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        out_NHD[rows] = out.transpose(1, 2).flatten(0, 1)
        lse_NH[rows] = lse.transpose(1, 2).flatten(0, 1)
    return out_NHD, lse_NH


@_cpu_forward.register_fake
def _(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_NHD), q_NHD.new_empty(q_NHD.shape[:2])


@torch.library.custom_op("kontext_train::cpu_attention_backward", mutates_args=(), device_types="cpu")
def _cpu_backward(
    grad_NHD: Tensor, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, out_NHD: Tensor, lse_NH: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(q_NHD), torch.empty_like(k_NHD), torch.empty_like(v_NHD)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for rows, segments in _equal_runs(cu_seqlens):
        grad, q, k, v, out = (_batched(x, rows, segments) for x in (grad_NHD, q_NHD, k_NHD, v_NHD, out_NHD))
        lse = lse_NH[rows].unflatten(0, (segments, -1)).transpose(1, 2)
        for whole, part in zip(grads, backward(grad, q, k, v, out, lse, 0.0, False), strict=True):
            whole[rows] = part.transpose(1, 2).flatten(0, 1)
    return grads


@_cpu_backward.register_fake
def _(
    grad_NHD: Tensor, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, out_NHD: Tensor, lse_NH: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_NHD), torch.empty_like(k_NHD), torch.empty_like(v_NHD)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, *output)


def _attention_grad(ctx, grad_NHD, grad_lse_NH):  # type: ignore[no-untyped-def]
    q_NHD, k_NHD, v_NHD, cu_seqlens, out_NHD, lse_NH = ctx.saved_tensors
    return *_cpu_backward(grad_NHD.contiguous(), q_NHD, k_NHD, v_NHD, out_NHD, lse_NH, cu_seqlens), None


_cpu_forward.register_autograd(_attention_grad, setup_context=_save_for_backward)
