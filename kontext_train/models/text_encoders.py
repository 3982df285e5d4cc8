"""The frozen text encoders of FLUX.1: T5 gives the tokens, CLIP the pooled vector."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn


class TextEncoders(nn.Module):
    def __init__(self, path: str | Path, t5_tokens: int, dtype: torch.dtype) -> None:
        """path: folder of the released layout. t5_tokens: length that every prompt is padded or cut to."""
        super().__init__()
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, T5EncoderModel  # seconds to import
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = Path(path)
        self.clip_tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self.t5_tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True)
        self.clip = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype, local_files_only=True)
        self.t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=dtype, local_files_only=True)
        self.t5_tokens = t5_tokens
        self.clip_tokens = min(self.clip_tokenizer.model_max_length, self.clip.config.max_position_embeddings)
        self.requires_grad_(False).eval()

    def blocks(self) -> Iterator[nn.Module]:
        """The repeated parts, which can be sharded one by one."""
        for encoder, name in ((self.t5, "block"), (self.clip, "layers")):  # where they are differs between releases
            for path, module in encoder.named_modules():
                if path.split(".")[-1] == name:
                    yield from module.children()

    @torch.no_grad()
    def forward(self, prompts: Sequence[str], *, pooled: bool = True) -> tuple[Tensor, Tensor | None]:
        """[S, t5_tokens, E] and [S, P] float32; None for the second where it is not wanted.

        Sharded encoders are gathered for this call alone; `tokens` and `pooled` are for those that are whole.
        """
        return self.tokens(prompts), self.pooled(prompts) if pooled else None

    @torch.no_grad()
    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """[S, t5_tokens, E] float32 from T5, which sees its padding unmasked, as the released pipelines run it."""
        ids = self._ids(self.t5_tokenizer, prompts, self.t5_tokens).to(self.t5.device)
        return self.t5(ids).last_hidden_state.float()

    @torch.no_grad()
    def pooled(self, prompts: Sequence[str]) -> Tensor:
        """[S, P] float32 from CLIP."""
        ids = self._ids(self.clip_tokenizer, prompts, self.clip_tokens).to(self.clip.device)
        return self.clip(ids).pooler_output.float()

    @staticmethod
    def _ids(tokenizer, prompts: Sequence[str], length: int) -> Tensor:  # type: ignore[no-untyped-def]
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        return tokenizer(list(prompts), **options).input_ids
