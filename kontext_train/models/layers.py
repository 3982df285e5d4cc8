"""The parts of a FLUX block. Attribute names are those of the released weights.

Legend: N tokens in joint order, I image tokens, T text tokens, S samples, D hidden, H heads, C head size.
"""

import math

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
    even, odd = x_NHC.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x_NHC.dtype)


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


class Modulation(nn.Module):
    """Shift, scale and gate from a sample's vector, handed to its tokens by index."""

    def __init__(self, dim: int, triples: int) -> None:
        super().__init__()
        self.lin = nn.Linear(dim, triples * 3 * dim)
        self.triples = triples

    def forward(self, vec_SD: Tensor, sample_of_token: Tensor) -> tuple[Tensor, ...]:
        """3 * triples tensors [tokens, D]: shift, scale, gate, shift, scale, gate."""
        return self.lin(nn.functional.silu(vec_SD))[sample_of_token].chunk(3 * self.triples, dim=-1)


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm without learned scale or shift: modulation supplies both."""
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


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

        img_qkv = self.img_attn.project_qkv((1 + scale_i1) * layer_norm(img_ID) + shift_i1)
        txt_qkv = self.txt_attn.project_qkv((1 + scale_t1) * layer_norm(txt_TD) + shift_t1)
        q, k, v = (torch.cat(pair)[layout.joint_N] for pair in zip(txt_qkv, img_qkv, strict=True))
        attended_NHC = self.attention(
            apply_rope(q, angles), apply_rope(k, angles), v, layout.cu_seqlens, layout.max_seqlen
        )
        txt_attended, img_attended = attended_NHC.flatten(1)[layout.stream_N].split([len(txt_TD), len(img_ID)])

        img_ID = img_ID + gate_i1 * self.img_attn.proj(img_attended)
        img_ID = img_ID + gate_i2 * self.img_mlp((1 + scale_i2) * layer_norm(img_ID) + shift_i2)
        txt_TD = txt_TD + gate_t1 * self.txt_attn.proj(txt_attended)
        txt_TD = txt_TD + gate_t2 * self.txt_mlp((1 + scale_t2) * layer_norm(txt_TD) + shift_t2)
        return img_ID, txt_TD


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side on the joint sequence (Dehghani et al. 2023, arXiv 2302.05442)."""

    def __init__(self, config: FluxConfig, attention: AttentionFunction) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.splits = [3 * config.hidden_size, config.mlp_hidden]
        self.linear1 = nn.Linear(config.hidden_size, sum(self.splits))
        self.linear2 = nn.Linear(config.hidden_size + config.mlp_hidden, config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(config.hidden_size, triples=1)
        self.attention = attention

    def forward(self, x_ND: Tensor, vec_SD: Tensor, angles: Rope, layout: SequenceLayout) -> Tensor:
        shift, scale, gate = self.modulation(vec_SD, layout.sample_of_joint_N)
        qkv, mlp = self.linear1((1 + scale) * layer_norm(x_ND) + shift).split(self.splits, dim=-1)
        q, k, v = rearrange(qkv, "n (three h c) -> three n h c", three=3, h=self.num_heads)
        q, k = self.norm(q, k)
        attended_NHC = self.attention(
            apply_rope(q, angles), apply_rope(k, angles), v, layout.cu_seqlens, layout.max_seqlen
        )
        hidden = torch.cat([attended_NHC.flatten(1), nn.functional.gelu(mlp, approximate="tanh")], dim=-1)
        return x_ND + gate * self.linear2(hidden)


class LastLayer(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, x_MD: Tensor, vec_SD: Tensor, sample_of_target_M: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec_SD)[sample_of_target_M].chunk(2, dim=-1)
        return self.linear((1 + scale) * layer_norm(x_MD) + shift)
