"""Context parallelism after DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509) over a packed sequence.

Each rank of a group holds every R-th token of the joint order, wherever samples begin and end, and all heads; around
attention, one exchange turns that into all tokens and an R-th of the heads. Weights see a share of the tokens on each
rank, so their gradients are shares too, which FSDP sums with those of all other ranks.

Legend: R ranks of the group, n tokens of a rank, N = R n, H heads, C head size.
"""

from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]

_groups: dict[str, dist.ProcessGroup] = {}  # an operator takes names, not groups


class Part(Protocol):
    """See kontext_train.models.sequence.LayoutPart."""

    layout: Any
    txt_T: Tensor
    img_I: Tensor
    target_M: Tensor
    added_padding: int


class Layout(Protocol):
    targets: int

    def part(self, rank: int, ranks: int) -> Part: ...


def ulysses(attention: Attention, group: dist.ProcessGroup) -> Attention:
    """The same attention for ranks that hold a share of the tokens each: q, k, v [n, H, C] -> [n, H, C]."""
    _groups[group.group_name] = group

    def attend(q_nHC: Tensor, k_nHC: Tensor, v_nHC: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        qkv_nHX = torch.cat([q_nHC, k_nHC, v_nHC], dim=-1)  # one exchange for all three
        q_NhC, k_NhC, v_NhC = all_tokens(qkv_nHX, group.group_name).chunk(3, dim=-1)
        return all_heads(attention(q_NhC, k_NhC, v_NhC, cu_seqlens, max_seqlen), group.group_name)

    return attend


def split_sequence(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Let `model` run on this rank's share of the tokens; what goes in and what comes out is whole on every rank.

    The model's forward must be that of kontext_train.models.flux.Flux, and its attention come from `ulysses`. A loss
    computed alike on all ranks of the group gives each of them its share of the gradient of every weight.
    """
    plain, rank, ranks = model.forward, group.rank(), group.size()
    parts: WeakKeyDictionary[Layout, Part] = WeakKeyDictionary()  # validation and sampling run one layout many times

    def forward(
        img_IC: Tensor, txt_TE: Tensor, vec_SP: Tensor, t_S: Tensor, layout: Layout, guidance_S: Tensor | None = None
    ) -> Tensor:
        part = parts.get(layout) or parts.setdefault(layout, layout.part(rank, ranks))
        img_iC = nn.functional.pad(img_IC, (0, 0, 0, part.added_padding))[part.img_I]
        v_mC = plain(img_iC, txt_TE[part.txt_T], vec_SP, t_S, part.layout, guidance_S)
        v_MC = _Assembled.apply(v_mC, part.target_M, layout.targets, group)
        assert isinstance(v_MC, Tensor)
        return v_MC

    model.forward = forward


class _Assembled(torch.autograd.Function):
    """Rows that each rank has some of, on every rank. All ranks compute the same loss of them: ours are our share."""

    @staticmethod
    def forward(ctx: Any, own_mC: Tensor, rows_M: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(rows_M)
        whole_MC = own_mC.new_zeros(count, own_mC.shape[1])
        whole_MC[rows_M] = own_mC
        dist.all_reduce(whole_MC, group=group)
        return whole_MC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows_M,) = ctx.saved_tensors
        return grads[0][rows_M], None, None, None


# Operators, so that a compiler sees two shapes and none of the shuffling between them. Each is the other's derivative.


@torch.library.custom_op("kontext_train::all_to_all_tokens", mutates_args=())
def all_tokens(x_nHX: Tensor, group: str) -> Tensor:
    """Our tokens with all heads -> [N, H / R, X], all tokens with our heads. Token i of rank r is number i R + r."""
    ranks = _groups[group].size()
    sent = x_nHX.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()  # [R, n, h, X]: row r goes to rank r
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=_groups[group])
    return received.transpose(0, 1).flatten(0, 1).contiguous()


@torch.library.custom_op("kontext_train::all_to_all_heads", mutates_args=())
def all_heads(x_NhX: Tensor, group: str) -> Tensor:
    """All tokens with our heads -> [n, H, X], our tokens with all heads: the inverse of `all_tokens`."""
    ranks = _groups[group].size()
    sent = x_NhX.unflatten(0, (-1, ranks)).transpose(0, 1).contiguous()  # [R, n, h, X]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=_groups[group])
    return received.transpose(0, 1).flatten(1, 2).contiguous()  # of one head a rank, flatten makes a view


@all_tokens.register_fake
def _(x_nHX: Tensor, group: str) -> Tensor:
    n, heads, x = x_nHX.shape
    return x_nHX.new_empty(n * _groups[group].size(), heads // _groups[group].size(), x)


@all_heads.register_fake
def _(x_NhX: Tensor, group: str) -> Tensor:
    tokens, heads, x = x_NhX.shape
    return x_NhX.new_empty(tokens // _groups[group].size(), heads * _groups[group].size(), x)


def _remember_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


all_tokens.register_autograd(lambda ctx, grad: (all_heads(grad, ctx.group), None), setup_context=_remember_group)
all_heads.register_autograd(lambda ctx, grad: (all_tokens(grad, ctx.group), None), setup_context=_remember_group)
