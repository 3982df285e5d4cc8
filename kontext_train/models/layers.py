"""The parts of a FLUX block. Attribute names are those of the released weights.

Legend: N tokens in joint order, I image tokens, T text tokens, S samples, D hidden, H heads, C head size.
"""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from kontext_train.models.attention import AttentionFunction
from kontext_train.models.config import FluxConfig
from kontext_train.models.sequence import SequenceLayout

Rope = tuple[Tensor, Tensor]  # cosine and sine, each [N, 1, C/2] float32


def rope(ids_N3: Tensor, axes_dim: list[int], theta: int) -> Rope:
    """Rotary angles of each token, one band of frequencies for each position axis."""
    angles = []
    for axis, dim in enumerate(axes_dim):
        omega = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=ids_N3.device) / dim)
        angles.append(ids_N3[:, axis].double()[:, None] * omega)
    angles_N1C = torch.cat(angles, dim=-1)[:, None]
    return angles_N1C.cos().float(), angles_N1C.sin().float()


def apply_rope(x_NHC: Tensor, angles: Rope) -> Tensor:
    """Rotate neighbouring pairs of channels by each token's angles (Su et al. 2021, arXiv 2104.09864, eq. 34)."""
    cos, sin = angles
    pairs = x_NHC.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # fuses this, and has no code for complex numbers
        even, odd = pairs.unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:  # one pass instead of seven
        rotated = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))
    return rotated.flatten(-2).to(x_NHC.dtype)


def sinusoidal_embedding(t_S: Tensor, dim: int = 256, max_period: float = 10_000.0) -> Tensor:
    """[S, dim] float32 of t in [0, 1]. The only place where time is multiplied by 1000."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t_S.device) / half)
    args = (1000.0 * t_S.float())[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(nn.functional.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """Normalises in float32 whatever the dtype, as released; the parameter is called `scale` there."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x.float(), self.scale.shape, eps=1e-6).to(x.dtype) * self.scale


class QKNorm(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, q_NHC: Tensor, k_NHC: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q_NHC), self.key_norm(k_NHC)


class _ToTokens(torch.autograd.Function):
    """x_SD[owner_N], whose derivative is one matrix product.

    That of indexing adds up rows one at a time; thousands of tokens of few samples are its worst case on any device.
    """

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, owner_N: Tensor) -> Tensor:
        ctx.save_for_backward(owner_N)
        ctx.samples = x_SD.shape[0]
        return x_SD[owner_N]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (owner_N,) = ctx.saved_tensors
        samples_S1 = torch.arange(ctx.samples, device=owner_N.device)[:, None]
        return (samples_S1 == owner_N).to(grads[0].dtype) @ grads[0], None


class _Join(torch.autograd.Function):
    """Rows of two streams to their places in joint order: each is moved once, and back once for the derivative."""

    @staticmethod
    def forward(ctx: Any, txt_TX: Tensor, img_IX: Tensor, stream_N: Tensor) -> Tensor:
        ctx.save_for_backward(stream_N)
        ctx.txt_tokens = len(txt_TX)
        joint_NX = txt_TX.new_empty(len(stream_N), *txt_TX.shape[1:])
        joint_NX[stream_N[: ctx.txt_tokens]] = txt_TX
        joint_NX[stream_N[ctx.txt_tokens :]] = img_IX
        return joint_NX

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (stream_N,) = ctx.saved_tensors
        return grads[0][stream_N[: ctx.txt_tokens]], grads[0][stream_N[ctx.txt_tokens :]], None


class _Part(torch.autograd.Function):
    """The inverse of _Join."""

    @staticmethod
    def forward(ctx: Any, joint_NX: Tensor, stream_N: Tensor, txt_tokens: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(stream_N)
        return joint_NX[stream_N[:txt_tokens]], joint_NX[stream_N[txt_tokens:]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (stream_N,) = ctx.saved_tensors
        txt_TX, img_IX = grads
        joint_NX = txt_TX.new_empty(len(stream_N), *txt_TX.shape[1:])
        joint_NX[stream_N[: len(txt_TX)]] = txt_TX
        joint_NX[stream_N[len(txt_TX) :]] = img_IX
        return joint_NX, None, None


def to_tokens(x_SD: Tensor, owner_N: Tensor) -> Tensor:
    """[N, D]: for each token the row of the sample that owns it."""
    tokens_ND = _ToTokens.apply(x_SD, owner_N)
    assert isinstance(tokens_ND, Tensor)
    return tokens_ND


def join(txt_TX: Tensor, img_IX: Tensor, layout: SequenceLayout) -> Tensor:
    """[N, ...]: both streams in joint order."""
    joint_NX = _Join.apply(txt_TX, img_IX, layout.stream_N)
    assert isinstance(joint_NX, Tensor)
    return joint_NX


def part(joint_NX: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    """Joint order to (text, image): the inverse of `join`."""
    txt_TX, img_IX = _Part.apply(joint_NX, layout.stream_N, layout.txt_tokens)
    return txt_TX, img_IX


class Modulation(nn.Module):
    """Shift, 1 + scale and gate from a sample's vector, handed to its tokens."""

    def __init__(self, dim: int, triples: int) -> None:
        super().__init__()
        self.lin = nn.Linear(dim, triples * 3 * dim)
        self.triples = triples

    def forward(self, vec_SD: Tensor, sample_of_token: Tensor) -> tuple[Tensor, ...]:
        """3 * triples tensors [tokens, D]: shift, 1 + scale, gate, shift, 1 + scale, gate."""
        rows = self.lin(nn.functional.silu(vec_SD)).chunk(3 * self.triples, dim=-1)
        return tuple(to_tokens(1 + x if i % 3 == 1 else x, sample_of_token) for i, x in enumerate(rows))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """scale * layer norm of x + shift."""
    return torch.addcmul(shift, scale, nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6))


class SelfAttention(nn.Module):
    """Projections of one stream; the attention itself is joint, in the block."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, config.hidden_size * 3, bias=config.qkv_bias)
        self.norm = QKNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def project_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "n (three h c) -> three n h c", three=3, h=self.num_heads)
        return *self.norm(q, k), v


def feed_forward(config: FluxConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.hidden_size, config.mlp_hidden),
        nn.GELU(approximate="tanh"),
        nn.Linear(config.mlp_hidden, config.hidden_size),
    )


class DoubleStreamBlock(nn.Module):
    """Text and image have their own weights and meet in one attention."""

    def __init__(self, config: FluxConfig, attention: AttentionFunction) -> None:
        super().__init__()
        self.img_mod = Modulation(config.hidden_size, triples=2)
        self.img_attn = SelfAttention(config)
        self.img_mlp = feed_forward(config)
        self.txt_mod = Modulation(config.hidden_size, triples=2)
        self.txt_attn = SelfAttention(config)
        self.txt_mlp = feed_forward(config)
        self.attention = attention

    def forward(
        self, img_ID: Tensor, txt_TD: Tensor, vec_SD: Tensor, angles: Rope, layout: SequenceLayout
    ) -> tuple[Tensor, Tensor]:
        shift_i1, scale_i1, gate_i1, shift_i2, scale_i2, gate_i2 = self.img_mod(vec_SD, layout.sample_of_img_I)
        shift_t1, scale_t1, gate_t1, shift_t2, scale_t2, gate_t2 = self.txt_mod(vec_SD, layout.sample_of_txt_T)

        img_qkv = self.img_attn.project_qkv(modulated_norm(img_ID, shift_i1, scale_i1))
        txt_qkv = self.txt_attn.project_qkv(modulated_norm(txt_TD, shift_t1, scale_t1))
        q, k, v = (join(txt, img, layout) for txt, img in zip(txt_qkv, img_qkv, strict=True))
        attended_NHC = self.attention(
            apply_rope(q, angles), apply_rope(k, angles), v, layout.cu_seqlens, layout.max_seqlen
        )
        txt_attended, img_attended = part(attended_NHC.flatten(1), layout)

        img_ID = torch.addcmul(img_ID, gate_i1, self.img_attn.proj(img_attended))
        img_ID = torch.addcmul(img_ID, gate_i2, self.img_mlp(modulated_norm(img_ID, shift_i2, scale_i2)))
        txt_TD = torch.addcmul(txt_TD, gate_t1, self.txt_attn.proj(txt_attended))
        txt_TD = torch.addcmul(txt_TD, gate_t2, self.txt_mlp(modulated_norm(txt_TD, shift_t2, scale_t2)))
        return img_ID, txt_TD


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side on the joint sequence (Dehghani et al. 2023, arXiv 2302.05442)."""

    def __init__(self, config: FluxConfig, attention: AttentionFunction) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.splits = [*[config.hidden_size] * 3, config.mlp_hidden]  # q, k, v, MLP
        self.linear1 = nn.Linear(config.hidden_size, sum(self.splits))
        self.linear2 = nn.Linear(config.hidden_size + config.mlp_hidden, config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(config.hidden_size, triples=1)
        self.attention = attention

    def forward(self, x_ND: Tensor, vec_SD: Tensor, angles: Rope, layout: SequenceLayout) -> Tensor:
        shift, scale, gate = self.modulation(vec_SD, layout.sample_of_joint_N)
        *qkv, mlp = self.linear1(modulated_norm(x_ND, shift, scale)).split(self.splits, dim=-1)
        q, k, v = (rearrange(x, "n (h c) -> n h c", h=self.num_heads) for x in qkv)
        q, k = self.norm(q, k)
        attended_NHC = self.attention(
            apply_rope(q, angles), apply_rope(k, angles), v, layout.cu_seqlens, layout.max_seqlen
        )
        hidden = torch.cat([attended_NHC.flatten(1), nn.functional.gelu(mlp, approximate="tanh")], dim=-1)
        return torch.addcmul(x_ND, gate, self.linear2(hidden))


class LastLayer(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, x_MD: Tensor, vec_SD: Tensor, sample_of_target_M: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec_SD).chunk(2, dim=-1)
        shift_MD, scale_MD = to_tokens(shift, sample_of_target_M), to_tokens(1 + scale, sample_of_target_M)
        return self.linear(modulated_norm(x_MD, shift_MD, scale_MD))
