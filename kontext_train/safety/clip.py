"""CLIP towers from a local folder in the released layout (transformers'): unit features of images and of texts.

Legend: I images, S texts, F features of the space that both towers share.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

_MEAN, _STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # OpenAI's, of all released CLIPs
_AT_ONCE = 64  # tiles in one pass
_LONGEST = 16  # width to height, or height to width


class ImageTower:
    """Scores must not depend on where in the picture something stands: a picture that is not square is seen in several
    squares that overlap by half, where CLIP's own preparation cuts its ends off.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        """ValueError if the folder lacks weights of the tower or its projection."""
        from transformers import CLIPVisionModelWithProjection  # seconds to import

        self.model = _loaded(CLIPVisionModelWithProjection, folder, device)
        self.width = int(self.model.config.projection_dim)
        self.side = self.model.config.image_size
        self.device = device
        mean, std = _normalisation(folder)
        self.mean, self.std = (torch.tensor(v, device=device)[:, None, None] for v in (mean, std))

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """[tiles, F] float32 for each image, RGB of any size, on the CPU."""
        tiles = [_tiles(image, self.side) for image in images]
        flat = [tile for one in tiles for tile in one]
        parts = [self._features(flat[first : first + _AT_ONCE]) for first in range(0, len(flat), _AT_ONCE)]
        return list(torch.cat(parts).split([len(one) for one in tiles])) if flat else []

    def _features(self, tiles: Sequence[Image.Image]) -> Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).to(self.device)
        normalised = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        return _unit(self.model(pixel_values=normalised).image_embeds)


class TextTower:
    def __init__(self, folder: Path, device: torch.device) -> None:
        """ValueError if the folder lacks weights of the tower or its projection."""
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer  # seconds to import

        self.model = _loaded(CLIPTextModelWithProjection, folder, device)
        self.width = int(self.model.config.projection_dim)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.tokens = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        self.device = device

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> list[Tensor]:
        """[windows, F] float32 for each text, on the CPU. What is longer than CLIP's 77 tokens is read in windows.

        They overlap by half: what has no more tokens than that is whole in one.
        """
        windows = [self._windows(text) for text in texts]
        flat = [window for one in windows for window in one]
        padded = self.tokenizer.pad({"input_ids": flat}, return_tensors="pt").to(self.device)
        features = _unit(self.model(**padded).text_embeds)
        return list(features.split([len(one) for one in windows]))

    def _windows(self, text: str) -> list[list[int]]:
        start, *ids, end = self.tokenizer(text).input_ids
        room = self.tokens - 2
        return [[start, *ids[first : first + room], end] for first in _starts(len(ids), room)]


def _loaded(kind: Any, folder: Path, device: torch.device) -> Any:
    from transformers.utils import logging

    logging.set_verbosity_error()  # a folder of both towers has weights that one of them does not take
    logging.disable_progress_bar()
    try:
        # safetensors alone, for `clip_digest` reads no other weights
        options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
        model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # transformers raises many kinds for a folder that is no model
        raise ValueError(f"{folder} is no CLIP model ({type(error).__name__}: {error})") from error
    if info["missing_keys"]:  # they would be random
        raise ValueError(f"{folder} lacks {sorted(info['missing_keys'])[0]}: it must hold the tower and its projection")
    return model.to(device).requires_grad_(False).eval()


def _normalisation(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    file = folder / "preprocessor_config.json"
    given = json.loads(file.read_text()) if file.is_file() else {}
    return given.get("image_mean", _MEAN), given.get("image_std", _STD)


def _tiles(image: Image.Image, side: int) -> list[Image.Image]:
    """Squares of side x side that cover an image, scaled so that its shorter side fits; past 16:1 it is squeezed."""
    width, height = image.size
    long = min(round(max(width, height) / min(width, height) * side), _LONGEST * side)
    size = (long, side) if width >= height else (side, long)
    scaled = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    starts = _starts(long, side)
    boxes = [(s, 0, s + side, side) if width >= height else (0, s, side, s + side) for s in starts]
    return [scaled.crop(box) for box in boxes]


def _starts(length: int, window: int) -> list[int]:
    """Where windows over a length begin, evenly: neighbours have half of a window or more in common."""
    rest = max(length - window, 0)
    return np.linspace(0, rest, 1 + math.ceil(rest / (window // 2))).round().astype(int).tolist()


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.float(), dim=1).cpu()
