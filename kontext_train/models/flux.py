"""The FLUX.1 transformer on packed sequences (Black Forest Labs 2024; parameter names as released).

Legend: S samples, T text tokens, I image tokens, M target tokens, N = T + I, D hidden, C token channels.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from kontext_train.models.attention import AttentionFunction, cpu_attention
from kontext_train.models.config import FluxConfig, InitConfig
from kontext_train.models.layers import (
    DoubleStreamBlock,
    LastLayer,
    MLPEmbedder,
    Modulation,
    SingleStreamBlock,
    join,
    rope,
    sinusoidal_embedding,
)
from kontext_train.models.sequence import SequenceLayout


class Flux(nn.Module):
    def __init__(self, config: FluxConfig, attention: AttentionFunction = cpu_attention) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, d)
        self.time_in = MLPEmbedder(256, d)
        self.vector_in = MLPEmbedder(config.vec_in_dim, d)
        self.guidance_in = MLPEmbedder(256, d) if config.guidance_embed else None
        self.txt_in = nn.Linear(config.context_in_dim, d)
        self.double_blocks = nn.ModuleList([DoubleStreamBlock(config, attention) for _ in range(config.depth)])
        self.single_blocks = nn.ModuleList(
            [SingleStreamBlock(config, attention) for _ in range(config.depth_single_blocks)]
        )
        self.final_layer = LastLayer(config)

    def blocks(self) -> Iterator[nn.Module]:
        """The repeated parts: what is sharded, checkpointed and compiled one by one."""
        yield from self.double_blocks
        yield from self.single_blocks

    def token_linears(self) -> Iterator[nn.Linear]:
        """The blocks' linears that multiply every token. Modulation's multiply a vector a sample."""
        modules = [module for block in self.blocks() for module in block.modules()]
        of_samples = {id(module.lin) for module in modules if isinstance(module, Modulation)}
        yield from (m for m in modules if isinstance(m, nn.Linear) and id(m) not in of_samples)

    def forward(
        self,
        img_IC: Tensor,
        txt_TE: Tensor,
        vec_SP: Tensor,
        t_S: Tensor,
        layout: SequenceLayout,
        guidance_S: Tensor | None = None,
    ) -> Tensor:
        """Velocity [M, C] of the target tokens, the first M of the image stream.

        img_IC: tokens in stream order (targets, contexts, padding). txt_TE: T5 output. vec_SP: pooled CLIP.
        t_S: float32 in [0, 1], 1 is noise. guidance_S: float32 guidance scale, exactly when the model embeds it.
        """
        img_ID, txt_TD, vec_SD = self._embed(img_IC, txt_TE, vec_SP, t_S, guidance_S)
        angles = rope(layout.ids_N3, self.config.axes_dim, self.config.theta)
        for block in self.double_blocks:
            img_ID, txt_TD = block(img_ID, txt_TD, vec_SD, angles, layout)
        x_ND = join(txt_TD, img_ID, layout)
        for block in self.single_blocks:
            x_ND = block(x_ND, vec_SD, angles, layout)
        x_MD = x_ND.index_select(0, layout.target_in_joint_M)
        return self.final_layer(x_MD, vec_SD, layout.sample_of_target_M)

    def features(
        self,
        img_IC: Tensor,
        txt_TE: Tensor,
        vec_SP: Tensor,
        t_S: Tensor,
        layout: SequenceLayout,
        guidance_S: Tensor | None,
        blocks: Sequence[int],
    ) -> list[Tensor]:
        """[M, D] of the target tokens after each of `blocks`, numbered as `blocks()` yields them, in ascending order.

        Inputs as those of `forward`. It runs no further than to the last of them.
        """
        img_ID, txt_TD, vec_SD = self._embed(img_IC, txt_TE, vec_SP, t_S, guidance_S)
        angles = rope(layout.ids_N3, self.config.axes_dim, self.config.theta)
        found, depth = dict[int, Tensor](), len(self.double_blocks)
        for number, block in enumerate(self.double_blocks[: blocks[-1] + 1]):
            img_ID, txt_TD = block(img_ID, txt_TD, vec_SD, angles, layout)
            if number in blocks:
                found[number] = img_ID[: layout.targets].clone()  # FSDP hangs a hook on it, which a view may lose
        x_ND = join(txt_TD, img_ID, layout)
        for number, block in enumerate(self.single_blocks[: max(0, blocks[-1] + 1 - depth)], start=depth):
            x_ND = block(x_ND, vec_SD, angles, layout)
            if number in blocks:
                found[number] = x_ND.index_select(0, layout.target_in_joint_M)
        return [found[number] for number in blocks]

    def _embed(
        self, img_IC: Tensor, txt_TE: Tensor, vec_SP: Tensor, t_S: Tensor, guidance_S: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image tokens, text tokens and the samples' vectors as the blocks take them."""
        dtype = self.img_in.weight.dtype  # bfloat16 while a sharded parameter is gathered; inputs follow the weights
        img_ID = self.img_in(img_IC.to(dtype))
        txt_TD = self.txt_in(txt_TE.to(dtype))
        vec_SD = self.time_in(sinusoidal_embedding(t_S).to(dtype)) + self.vector_in(vec_SP.to(dtype))
        if self.guidance_in is not None:
            if guidance_S is None:
                raise ValueError("this model embeds guidance (model.guidance_embed=true): give a guidance scale")
            vec_SD = vec_SD + self.guidance_in(sinusoidal_embedding(guidance_S).to(dtype))
        elif guidance_S is not None:
            raise ValueError("this model has no guidance embedding (model.guidance_embed=false): give no guidance")
        return img_ID, txt_TD, vec_SD


def initial_tensor(name: str, shape: torch.Size, config: InitConfig, generator: np.random.Generator) -> Tensor:
    """What a parameter starts from without released weights: DiT's choices (arXiv 2212.09748), by parameter name."""
    if name.endswith(".scale"):
        return torch.full(shape, config.qk_gain)
    if name.startswith("final_layer.") or ("mod" in name and name.endswith(".lin.weight")):
        return torch.zeros(shape)
    if name.endswith(".lin.bias"):
        values = torch.zeros(shape)
        values.view(-1, 3, shape[0] // (3 * _triples(name)))[:, 2] = config.gate  # shift, scale, gate
        return values
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if name.startswith(("time_in.", "vector_in.", "guidance_in.")):
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)) * 0.02
    bound = (6.0 / (shape[0] + shape[1])) ** 0.5  # Xavier uniform
    return torch.from_numpy(generator.random(shape, dtype=np.float32)) * (2 * bound) - bound


def _triples(modulation_name: str) -> int:
    return 1 if modulation_name.startswith("single_blocks.") else 2
