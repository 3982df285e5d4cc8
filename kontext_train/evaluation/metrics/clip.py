"""CLIP: does the image show what the words say, does it change as the words do, how near is it to its context.

Similarities are cosines. Direction: Gal et al. 2022 (StyleGAN-NADA), as InstructPix2Pix reports it for edits.
The aesthetic head is LAION's: linear layers on the normalised image embedding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from kontext_train.errors import ConfigError
from kontext_train.evaluation.metrics.base import CONTEXT, Better, Shown, cosine, digest, load_whole


class ClipEmbedder:
    """Normalised embeddings of images and texts, [D] float32."""

    def __init__(self, folder: str, device: torch.device) -> None:
        try:
            self.model, weights = load_whole(CLIPModel, folder)
            self.images = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            self.tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            rule = f"is no CLIP model with its processor and tokenizer: {str(error).splitlines()[0]}"
            raise ConfigError(
                "metrics.clip", folder, rule, "Give a folder as clip-vit-large-patch14 is released"
            ) from error
        self.model.to(device)
        self.device = device
        self.about = f"CLIP {Path(folder).name}, weights {weights}"

    @torch.no_grad()
    def image(self, image: Image.Image) -> np.ndarray:
        pixels = self.images(images=image, return_tensors="pt")["pixel_values"].to(self.device)
        return self._normalised(self.model.visual_projection(self.model.vision_model(pixels).pooler_output))

    @torch.no_grad()
    def text(self, text: str) -> np.ndarray:
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokens([text], return_tensors="pt", truncation=True, max_length=longest).to(self.device)
        pooled = self.model.text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        return self._normalised(self.model.text_projection(pooled))

    @staticmethod
    def _normalised(embedding_1D: torch.Tensor) -> np.ndarray:
        return torch.nn.functional.normalize(embedding_1D.float(), dim=-1)[0].cpu().numpy()


class Clip:
    name = "clip"
    workers = 1
    numbers: ClassVar[Mapping[str, Better]] = {
        "clip_text": Better.higher,
        "clip_direction": Better.higher,
        "clip_image": Better.higher,
    }
    needs: ClassVar[Mapping[str, str]] = {
        "clip_direction": "a context and two captions that differ",
        "clip_image": CONTEXT,
    }

    def __init__(self, embedder: ClipEmbedder) -> None:
        self.embedder, self.about = embedder, embedder.about

    def measure(self, shown: Shown) -> dict[str, float]:
        """clip_text is against the caption of the right image, or the instruction where there is none."""
        case, embed = shown.case, self.embedder
        image = embed.image(shown.image)
        found = {"clip_text": cosine(image, embed.text(case.target_caption or case.instruction))}
        if shown.context is None:
            return found
        context = embed.image(shown.context)
        found["clip_image"] = cosine(image, context)
        if case.source_caption and case.target_caption and case.source_caption != case.target_caption:
            words = embed.text(case.target_caption) - embed.text(case.source_caption)
            found["clip_direction"] = cosine(image - context, words)
        return found


class Aesthetic:
    name = "aesthetic"
    workers = 1
    numbers: ClassVar[Mapping[str, Better]] = {"aesthetic": Better.higher}
    needs: ClassVar[Mapping[str, str]] = {}

    def __init__(self, embedder: ClipEmbedder, file: str) -> None:
        if not Path(file).is_file():
            hint = "Give sa_0_4_vit_l_14_linear.pth, for example"
            raise ConfigError("metrics.aesthetic", file, "is no file", hint)
        self.embedder = embedder
        self.about = f"{Path(file).name} {digest(Path(file))} on {embedder.about}"
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            names = [name for name in state if name.endswith("weight")]
            self.layers = [(state[n].float().numpy(), state[n[:-6] + "bias"].float().numpy()) for n in names]
            taken = self.layers[0][0].shape[1]
        except Exception as error:  # torch.load raises many kinds
            rule = f"is no head of linear layers ({type(error).__name__}: {error})"
            raise ConfigError(
                "metrics.aesthetic", file, rule, "Give sa_0_4_vit_l_14_linear.pth, for example"
            ) from error
        given = embedder.model.config.projection_dim
        if taken != given:
            rule = f"takes embeddings of {taken} numbers, and metrics.clip gives {given}"
            raise ConfigError("metrics.aesthetic", file, rule, "Give the CLIP that it was trained on")

    def measure(self, shown: Shown) -> dict[str, float]:
        hidden = self.embedder.image(shown.image)
        for weight, bias in self.layers:  # LAION's have no activations between them
            hidden = weight @ hidden + bias
        return {"aesthetic": float(hidden[0])}
