"""Attention written out as a masked softmax in float64, and packings to compare every backend on."""

import torch
from torch import Tensor

from kontext_train.models.attention import AttentionFunction

# Lengths of the segments, in order. A padding tail is a segment like any other.
PACKINGS = {
    "one_segment": [37],
    "equal_runs": [8, 8, 8, 5, 5],
    "lengths_of_one": [1, 9, 1, 1, 4],
    "padding_tail": [6, 11, 15],
    "empty_segments": [0, 7, 0, 0, 9, 0],
}


def cu_seqlens(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def random_qkv(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """q, k, v as a block makes them: v is a view into the projection of all three."""
    qkv = torch.randn(tokens, 3, heads, head_dim, device=device).to(dtype)
    return [qkv[:, 0].contiguous(), qkv[:, 1].contiguous(), qkv[:, 2]]


def reference(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, lengths: list[int]) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in float64, with everything outside of a token's own segment masked."""
    q, k, v = (x.double().transpose(0, 1) for x in (q_NHD, k_NHD, v_NHD))
    segment_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(segment_N[:, None] != segment_N, -torch.inf)
    return (scores.softmax(dim=-1) @ v).transpose(0, 1)


def errors(function: AttentionFunction, lengths: list[int], qkv: list[Tensor], bounds: Tensor | None = None) -> dict:
    """Relative errors of the output and of the three gradients; bounds: other segments than the reference has."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    grad = torch.randn_like(leaves[0])
    bounds = cu_seqlens(lengths, leaves[0].device.type) if bounds is None else bounds
    out = function(*leaves, bounds, max(lengths))
    expected = reference(*exact, lengths)
    actual_grads = torch.autograd.grad(out, leaves, grad)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    pairs = zip((out, *actual_grads), (expected, *expected_grads), strict=True)
    return dict(zip(("out", "dq", "dk", "dv"), (_relative(a, b) for a, b in pairs), strict=True))


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()
