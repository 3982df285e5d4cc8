"""Choices of this room. Torch-free, so that a command line is checked before anything heavy is imported."""

import json
import math
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kontext_train.errors import ConfigError


class AttentionBackend(Enum):
    auto = "auto"  # the fastest that is installed and runs here: attention.py says in which order
    flash_attention_4 = "flash_attention_4"  # Hopper, Blackwell: pip install flash-attn-4
    flash_attention_3 = "flash_attention_3"  # Hopper: the package that brings flash_attn_interface
    flash_attention_2 = "flash_attention_2"  # Ampere and newer: pip install flash-attn
    torch_varlen = "torch_varlen"  # FlashAttention-2 inside torch
    cudnn = "cudnn"  # one call for each run of segments of equal length
    sdpa = "sdpa"  # torch's memory-efficient kernel: any NVIDIA GPU, float32 too
    cpu = "cpu"  # torch's SDPA on a CPU


@dataclass(slots=True)
class InitConfig:
    """How a network that starts without weights is filled. Released weights never use this."""

    gate: float = (
        0.0  # bias of every residual gate: 0 is adaLN-Zero (Peebles & Xie 2023, arXiv 2212.09748, section 3.2)
    )
    qk_gain: float = 1.0  # scale of the query and key norms


@dataclass(slots=True)
class FluxConfig:
    """Shape of the FLUX transformer; the defaults are FLUX.1 12B as released. Names as in the released code."""

    in_channels: int = 64  # 16 latent channels x 2 x 2
    vec_in_dim: int = 768  # pooled CLIP
    context_in_dim: int = 4096  # T5
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: list[int] = field(default_factory=lambda: [16, 56, 56])
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = False
    attention: AttentionBackend = AttentionBackend.auto
    init: InitConfig = field(default_factory=InitConfig)

    def __post_init__(self) -> None:
        for key in ("in_channels", "vec_in_dim", "context_in_dim", "hidden_size", "num_heads", "theta", "mlp_ratio"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"model.{key}", getattr(self, key), "must be positive", "Give a value above 0")
        if self.depth < 0 or self.depth_single_blocks < 0 or self.depth + self.depth_single_blocks == 0:
            depths = (self.depth, self.depth_single_blocks)
            raise ConfigError("model.depth", depths, "depth + depth_single_blocks must be at least 1", "Add a block")
        if self.hidden_size % self.num_heads:
            rule = f"must divide model.hidden_size={self.hidden_size}"
            divisors = [h for h in range(1, self.hidden_size + 1) if self.hidden_size % h == 0 and h <= 64]
            raise ConfigError("model.num_heads", self.num_heads, rule, f"Use one of {divisors}")
        if sum(self.axes_dim) != self.head_dim or len(self.axes_dim) != 3 or any(d % 2 for d in self.axes_dim):
            rule = f"must be three even numbers that sum to the head size hidden_size/num_heads={self.head_dim}"
            raise ConfigError("model.axes_dim", self.axes_dim, rule, "For example [16, 56, 56] for heads of 128")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)


def block_linears(config: FluxConfig) -> list[dict[str, tuple[int, int]]]:
    """(in, out) features of the linear layers of a double-stream and of a single-stream block, by name."""
    d, mlp = config.hidden_size, config.mlp_hidden
    stream = {"mod.lin": (d, 6 * d), "attn.qkv": (d, 3 * d), "attn.proj": (d, d), "mlp.0": (d, mlp), "mlp.2": (mlp, d)}
    double = {f"{kind}_{name}": shape for kind in ("img", "txt") for name, shape in stream.items()}
    return [double, {"linear1": (d, 3 * d + mlp), "linear2": (d + mlp, d), "modulation.lin": (d, 3 * d)}]


class GuidanceIn(Enum):
    """What becomes of `guidance_in`, which dev and Kontext-dev have and schnell has not, when weights are read."""

    require = "require"  # file and model must agree
    add = "add"  # the file has none and the model gets one that changes no output at first
    drop = "drop"  # the file's is left out


class BaseDtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float8 = "float8"  # the blocks' matrices, with a scale for each row; the rest is bfloat16


@dataclass(slots=True)
class LoraConfig:
    """Adapters of low rank on a frozen network (Hu et al. 2021, arXiv 2106.09685). Rank 0 trains all weights."""

    rank: int = 0
    alpha: float = 16.0  # adapters count alpha / rank times
    # Linears of the blocks by their dotted names; * stands for anything. Attention and MLP, all that multiplies tokens.
    targets: list[str] = field(default_factory=lambda: ["*_attn.*", "*_mlp.*", "*.linear?"])
    base_dtype: BaseDtype = BaseDtype.bfloat16  # in which the frozen network is kept; adapters are float32

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError("lora.rank", self.rank, "must not be negative", "16 is usual, 0 trains all weights")
        if not 0 < self.alpha < math.inf:
            raise ConfigError("lora.alpha", self.alpha, "must be positive", "Equal to lora.rank it scales by 1")
        if self.rank and not self.targets:
            raise ConfigError("lora.targets", self.targets, "must name at least one linear", 'For example ["*_attn.*"]')

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def lora_targets(config: LoraConfig, model: FluxConfig) -> list[str]:
    """Names of the linears that get an adapter. ConfigError naming every pattern that fits none."""
    double, single = block_linears(model)
    linears = [f"double_blocks.{i}.{name}" for i in range(model.depth) for name in double]
    linears += [f"single_blocks.{i}.{name}" for i in range(model.depth_single_blocks) for name in single]
    idle = [pattern for pattern in config.targets if not any(fnmatchcase(name, pattern) for name in linears)]
    if idle:
        known = [f"double_blocks.N.{name}" for name in double] + [f"single_blocks.N.{name}" for name in single]
        rule = f"fits no linear of the blocks: {', '.join(idle)}"
        raise ConfigError("lora.targets", config.targets, rule, f"Known: {', '.join(known)}")
    return [name for name in linears if any(fnmatchcase(name, pattern) for pattern in config.targets)]


@dataclass(slots=True)
class DiscriminatorConfig:
    """Heads on a frozen network's blocks that tell made from real (Sauer et al. 2024, arXiv 2403.12015, section 3)."""

    blocks: list[int] = field(default_factory=list)  # that have a head, from 0, double-stream blocks first; [] is all
    channels: int = 256  # of a head

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ConfigError("objective.discriminator.channels", self.channels, "must be at least 1", "Use 256")
        if sorted(set(self.blocks)) != self.blocks or any(number < 0 for number in self.blocks):
            rule = "must be numbers of blocks in ascending order, each once"
            raise ConfigError("objective.discriminator.blocks", self.blocks, rule, "For example [3, 9, 18]")

    def blocks_of(self, model: FluxConfig) -> list[int]:
        """Numbers of the blocks that have a head. ConfigError if the model has fewer."""
        count = model.depth + model.depth_single_blocks
        if self.blocks and self.blocks[-1] >= count:
            rule = f"must be below {count}, the number of blocks of the model"
            raise ConfigError("objective.discriminator.blocks", self.blocks, rule, "Leave [] for all blocks")
        return self.blocks or list(range(count))


class EncoderDtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(slots=True)
class EncodersConfig:
    """The frozen encoders: a folder in the layout of the released FLUX.1 repositories."""

    path: str = ""  # holds tokenizer/ text_encoder/ (CLIP) tokenizer_2/ text_encoder_2/ (T5) and vae/
    t5_tokens: int = (
        512  # every prompt is padded or cut to this many T5 tokens; attention sees the padding, as released
    )
    dtype: EncoderDtype = EncoderDtype.bfloat16
    sample_latents: bool = True  # draw latents from the autoencoder's posterior; false takes its mean

    def __post_init__(self) -> None:
        if self.t5_tokens < 1:
            raise ConfigError("encoders.t5_tokens", self.t5_tokens, "must be at least 1", "FLUX.1-dev uses 512")

    def pixels_per_token(self) -> int:
        """Side of the square of pixels that one token stands for: the autoencoder's factor times the 2 x 2 patch."""
        return 2 ** len(self._read("vae", "block_out_channels"))

    def token_sizes(self) -> dict[str, int]:
        """What a model must take, by its config key: channels of an image token, of a T5 token, of CLIP's vector."""
        return {
            "in_channels": 4 * self._read("vae", "latent_channels"),
            "context_in_dim": self._read("text_encoder_2", "d_model"),
            "vec_in_dim": self._read("text_encoder", "hidden_size"),
        }

    def _read(self, part: str, name: str) -> Any:
        file = Path(self.path, part, "config.json")
        if not file.is_file():
            rule = f"must be a folder in the layout of the released FLUX.1 repositories, but {file} is missing"
            raise ConfigError("encoders.path", self.path, rule, "Give the folder that holds vae/ and text_encoder/")
        try:
            return json.loads(file.read_text())[name]
        except (ValueError, KeyError) as error:
            raise ConfigError(
                "encoders.path", self.path, f"has no {name!r} in {file}", "Fetch the folder again"
            ) from error
