"""DINOv2: how near the image is to its context, blind to words. The cosine of the two class tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from kontext_train.errors import ConfigError
from kontext_train.evaluation.metrics.base import CONTEXT, Better, Shown, cosine, load_whole


class Dino:
    name = "dino"
    workers = 1
    numbers: ClassVar[Mapping[str, Better]] = {"dino_image": Better.higher}
    needs: ClassVar[Mapping[str, str]] = {"dino_image": CONTEXT}

    def __init__(self, folder: str, device: torch.device) -> None:
        try:
            model, weights = load_whole(AutoModel, folder)
            self.images = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            rule = f"is no vision model with its processor: {str(error).splitlines()[0]}"
            raise ConfigError("metrics.dino", folder, rule, "Give a folder as dinov2-base is released") from error
        self.model, self.device = model.to(device), device
        self.about = f"DINO {Path(folder).name}, weights {weights}"

    @torch.no_grad()
    def embed(self, image: Image.Image) -> np.ndarray:
        pixels = self.images(images=image, return_tensors="pt")["pixel_values"].to(self.device)
        return self.model(pixels).last_hidden_state[0, 0].float().cpu().numpy()

    def measure(self, shown: Shown) -> dict[str, float]:
        if shown.context is None:
            return {}
        return {"dino_image": cosine(self.embed(shown.image), self.embed(shown.context))}
