"""The operators behind attention.py. Each is opaque and differentiable, so that a compiled block has no graph break,
one graph serves every packing, and selective checkpointing knows it by the word attention in its name.

A backend is a pair of functions: forward(packed) -> (out, lse) and backward(packed, grad, out, lse) -> (dq, dk, dv).
lse, the logarithm of each softmax's denominator, has whatever shape the backend's own backward wants. Nothing here
reads a CUDA tensor on the host, but for cuDNN's `_bounds`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Packed(NamedTuple):
    """What every backend is called with."""

    q_NHD: Tensor
    k_NHD: Tensor
    v_NHD: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


Forward = Callable[[Packed], tuple[Tensor, Tensor]]
Backward = Callable[[Packed, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
Shape = tuple[int, ...]


def _head_by_token(packed: Packed) -> Shape:
    return packed.q_NHD.shape[1], packed.q_NHD.shape[0]


def _token_by_head(packed: Packed) -> Shape:
    return packed.q_NHD.shape[0], packed.q_NHD.shape[1]


def _flat(packed: Packed) -> Shape:
    """[segments, H, tokens of the longest in whole 32s] in one dimension: a first size of 1 would cost a graph."""
    return ((packed.cu_seqlens.shape[0] - 1) * packed.q_NHD.shape[1] * ((packed.max_seqlen + 31) // 32 * 32),)


def _operator(name: str, forward: Forward, backward: Backward, lse_shape: Callable[[Packed], Shape]) -> Any:
    """Register `kontext_train::name` and its backward; returns the operator. All it returns is contiguous."""

    def packed_forward(
        q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor, Tensor]:
        out_NHD, lse = forward(Packed(q_NHD, k_NHD, v_NHD, cu_seqlens, max_seqlen))
        return out_NHD.contiguous(), lse.contiguous()

    def packed_backward(
        q_NHD: Tensor,
        k_NHD: Tensor,
        v_NHD: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        grad_NHD: Tensor,
        out_NHD: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        packed = Packed(q_NHD, k_NHD, v_NHD, cu_seqlens, max_seqlen)
        dq_NHD, dk_NHD, dv_NHD = backward(packed, grad_NHD, out_NHD, lse)
        return dq_NHD.contiguous(), dk_NHD.contiguous(), dv_NHD.contiguous()

    forward_op = torch.library.custom_op(f"kontext_train::{name}", packed_forward, mutates_args=())
    backward_op = torch.library.custom_op(f"kontext_train::{name}_backward", packed_backward, mutates_args=())

    @forward_op.register_fake
    def _(*inputs: Any) -> tuple[Tensor, Tensor]:
        packed = Packed(*inputs)
        lse = packed.q_NHD.new_empty(lse_shape(packed), dtype=torch.float32)
        return packed.q_NHD.new_empty(packed.q_NHD.shape), lse

    @backward_op.register_fake
    def _(*inputs: Any) -> tuple[Tensor, ...]:
        return tuple(_empty_gradients(Packed(*inputs[:5])))

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.max_seqlen = inputs
        ctx.save_for_backward(*tensors, *output)

    def gradients(ctx: Any, grad_NHD: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out_NHD, lse = ctx.saved_tensors
        return *backward_op(*tensors, ctx.max_seqlen, grad_NHD.contiguous(), out_NHD, lse), None, None

    forward_op.register_autograd(gradients, setup_context=save)
    return getattr(torch.ops.kontext_train, name).default


def _empty_gradients(packed: Packed) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in packed[:3]]


# FlashAttention. Each package is imported when its operator runs: attention.usable_backend has checked that it is here.


def _flash_4_forward(packed: Packed) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    # Releases differ in what follows (out, lse). return_lse: compiled code hands over tensors without requires_grad.
    out_NHD, lse_HN, *_ = _flash_attn_fwd(*packed[:3], **_lengths(packed), return_lse=True)
    return out_NHD, lse_HN


def _flash_4_backward(
    packed: Packed, grad_NHD: Tensor, out_NHD: Tensor, lse_HN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    return _flash_attn_bwd(*packed[:3], out_NHD, grad_NHD, lse_HN, **_lengths(packed))


def _flash_3_forward(packed: Packed) -> tuple[Tensor, Tensor]:
    import flash_attn_interface  # noqa: F401  registers flash_attn_3, whose schema is steadier than its Python

    out_NHD, lse_HN, *_ = torch.ops.flash_attn_3.fwd(*packed[:3], **_lengths(packed), num_splits=1)
    return out_NHD, lse_HN


def _flash_3_backward(
    packed: Packed, grad_NHD: Tensor, out_NHD: Tensor, lse_HN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    import flash_attn_interface  # noqa: F401

    dq_NHD, dk_NHD, dv_NHD = _empty_gradients(packed)
    torch.ops.flash_attn_3.bwd(grad_NHD, *packed[:3], out_NHD, lse_HN, dq_NHD, dk_NHD, dv_NHD, **_lengths(packed))
    return dq_NHD, dk_NHD, dv_NHD


def _flash_2_forward(packed: Packed) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    scale = packed.q_NHD.shape[-1] ** -0.5
    out_NHD, lse_HN, *_ = _flash_attn_varlen_forward(
        *packed[:3], **_lengths(packed), dropout_p=0.0, softmax_scale=scale, causal=False
    )
    return out_NHD, lse_HN


def _flash_2_backward(
    packed: Packed, grad_NHD: Tensor, out_NHD: Tensor, lse_HN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    dq_NHD, dk_NHD, dv_NHD = _empty_gradients(packed)
    _flash_attn_varlen_backward(
        grad_NHD,
        *packed[:3],
        out_NHD,
        lse_HN,
        dq_NHD,
        dk_NHD,
        dv_NHD,
        **_lengths(packed),
        dropout_p=0.0,
        softmax_scale=packed.q_NHD.shape[-1] ** -0.5,
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
    )
    return dq_NHD, dk_NHD, dv_NHD


def _lengths(packed: Packed) -> dict[str, Any]:
    """The same segments for queries and keys, by the names that all FlashAttentions share."""
    cu_seqlens, longest = packed.cu_seqlens, packed.max_seqlen
    return {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }


# torch's memory-efficient kernel, which knows cu_seqlens. 0.0 is no dropout, 0 no causal mask.


def _sdpa_forward(packed: Packed) -> tuple[Tensor, Tensor]:
    q, k, v = (x[None] for x in packed[:3])
    lengths = _lengths(packed).values()
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(q, k, v, None, *lengths, 0.0, 0, True)
    return out[0], lse.flatten()


def _sdpa_backward(packed: Packed, grad_NHD: Tensor, out_NHD: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad, out = (x[None] for x in (*packed[:3], grad_NHD, out_NHD))
    lengths = _lengths(packed).values()
    lse = lse.unflatten(0, (len(packed.cu_seqlens) - 1, q.shape[2], -1))
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the seed and offset of dropout
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        grad, q, k, v, None, out, *lengths, lse, 0.0, unused, unused, 0, False
    )
    return dq[0], dk[0], dv[0]


# Kernels that know batches of equal length only, [B, H, L, D]: called once for each run of segments of equal length.

_host_bounds = WeakTensorKeyDictionary()


def _bounds(cu_seqlens: Tensor) -> list[int]:
    """cu_seqlens on the host, read back once for each layout: all blocks of a pass share the tensor."""
    if cu_seqlens not in _host_bounds:
        _host_bounds[cu_seqlens] = cu_seqlens.tolist()
    return _host_bounds[cu_seqlens]


def _equal_runs(cu_seqlens: Tensor) -> Iterator[tuple[slice, int]]:
    """(rows of the packed sequence, segments in them) for each run of neighbouring segments of equal length."""
    bounds = _bounds(cu_seqlens)
    first = 0
    for i in range(1, len(bounds)):
        last_of_run = i + 1 == len(bounds) or bounds[i + 1] - bounds[i] != bounds[i] - bounds[i - 1]
        if last_of_run:
            if bounds[first] < bounds[i]:
                yield slice(bounds[first], bounds[i]), i - first
            first = i


def _batched(x_NHD: Tensor, rows: slice, segments: int) -> Tensor:
    """View of some rows as [segments, H, L, D], the order torch's attention takes."""
    return x_NHD[rows].unflatten(0, (segments, -1)).transpose(1, 2)


def _flat_again(x: Tensor) -> Tensor:
    """[segments, H, L, ...] -> [segments * L, H, ...]; no copy where a kernel writes token after token."""
    return x.transpose(1, 2).flatten(0, 1)


def _joined(runs: list[Tensor]) -> Tensor:
    return runs[0] if len(runs) == 1 else torch.cat(runs)


def _by_runs(
    kernel: Callable[..., tuple[Tensor, Tensor]], kernel_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> tuple[Forward, Backward]:
    """Forward and backward over packed sequences from a kernel's (q, k, v) -> (out, lse [B, H, L])."""

    def forward(packed: Packed) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for rows, segments in _equal_runs(packed.cu_seqlens):
            if rows.stop - rows.start == segments:  # a token alone attends to itself; cuDNN refuses the length 1
                outs.append(packed.v_NHD[rows].clone())
                lses.append(packed.v_NHD.new_zeros(outs[-1].shape[:2], dtype=torch.float32))
                continue
            out, lse = kernel(*(_batched(x, rows, segments) for x in packed[:3]))
            outs.append(_flat_again(out))
            lses.append(_flat_again(lse))
        return _joined(outs), _joined(lses)

    def backward(packed: Packed, grad_NHD: Tensor, out_NHD: Tensor, lse_NH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts: tuple[list[Tensor], ...] = ([], [], [])
        for rows, segments in _equal_runs(packed.cu_seqlens):
            if rows.stop - rows.start == segments:
                none = torch.zeros_like(grad_NHD[rows])
                grads = none, none.clone(), grad_NHD[rows].clone()
            else:
                q, k, v, grad, out = (_batched(x, rows, segments) for x in (*packed[:3], grad_NHD, out_NHD))
                lse = lse_NH[rows].unflatten(0, (segments, -1)).transpose(1, 2)
                dq, dk, dv = (_flat_again(d) for d in kernel_backward(grad, q, k, v, out, lse))
                grads = dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
            for whole, part in zip(parts, grads, strict=True):
                whole.append(part)
        dq_NHD, dk_NHD, dv_NHD = (_joined(part) for part in parts)
        return dq_NHD, dk_NHD, dv_NHD

    return forward, backward


def _cudnn_kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, lse.flatten(2)  # [B, H, L, 1]


def _cudnn_kernel_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the seed and offset of dropout
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(grad, q, k, v, out, lse.contiguous()[..., None], unused, unused),
        *(None, None, None, q.shape[2], k.shape[2], 0.0, False),  # no bias, no cu_seqlens, no dropout, not causal
    )


def _cpu_kernel_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # In float32 whatever the input: below 250 tokens the bfloat16 kernel takes two to seven times as long.
    wide = (x.float() for x in (grad, q, k, v, out))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*wide, lse, 0.0, False)


flash_attention_4 = _operator("flash_attention_4", _flash_4_forward, _flash_4_backward, _head_by_token)
flash_attention_3 = _operator("flash_attention_3", _flash_3_forward, _flash_3_backward, _head_by_token)
flash_attention_2 = _operator("flash_attention_2", _flash_2_forward, _flash_2_backward, _head_by_token)
sdpa_attention = _operator("sdpa_attention", _sdpa_forward, _sdpa_backward, _flat)
cudnn_attention = _operator("cudnn_attention", *_by_runs(_cudnn_kernel, _cudnn_kernel_backward), _token_by_head)
cpu_attention = _operator(
    "cpu_attention",
    *_by_runs(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, _cpu_kernel_backward),
    _token_by_head,
)
