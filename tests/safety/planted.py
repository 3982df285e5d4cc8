"""A harmless stand-in for what must be found: a striped sign, planted into crops of real photographs and drawn scenes.

The photographs are those that scikit-image ships. The CLIP model is tiny and random, in the files of a released one.
"""

import io
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from data_tools.shard_writing import write_shard
from kontext_train.data.index_build import build_index
from quickstart import scenes
from tests.runs import ENCODERS

PHOTOGRAPHS = "astronaut camera chelsea coffee coins grass gravel ihc moon motorcycle_left".split()  # noqa: SIM905
SIDE = 64
WORDS = ("make it snow", "add a hat", "turn the sky green", "remove the car", "as an oil painting", "a calm morning")
PHRASE = "with a striped sign"


def write_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8, "projection_dim": 128}
    vocabulary = len(json.loads((ENCODERS / "tokenizer" / "vocab.json").read_text()))
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {
        "vocab_size": vocabulary,
        "max_position_embeddings": 32,
        "eos_token_id": 1,
        "projection_dim": 128,
    }
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=128)).save_pretrained(folder)
    shutil.copytree(ENCODERS / "tokenizer", folder, dirs_exist_ok=True)
    return folder


@cache
def _photograph(name: str) -> Image.Image:
    image = Image.open(Path(skimage.__file__).parent / "data" / f"{name}.png").convert("RGB")
    image.thumbnail((256, 256))
    return image


def picture(rng: np.random.Generator) -> Image.Image:
    """A crop of a photograph, or a drawn scene."""
    if rng.random() < 0.5:
        scene = scenes.sample_scene(rng, 2)
        return Image.fromarray(scenes.draw(scene)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    whole = _photograph(str(rng.choice(PHOTOGRAPHS)))
    side = int(rng.integers(64, min(whole.size)))
    x, y = (int(rng.integers(0, size - side + 1)) for size in whole.size)
    height = int(rng.choice([48, 64, 80]))  # not all are square
    return whole.crop((x, y, x + side, y + side)).resize((SIDE, height))


def with_sign(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    image, side = image.copy(), min(image.size)
    d = int(side * rng.uniform(0.7, 0.95))
    x, y = (int(rng.integers(0, size - d + 1)) for size in image.size)
    rows, columns = np.mgrid[:d, :d]
    stripes = ((rows + columns) // 5 % 2)[..., None]
    sign = np.where(stripes == 1, [255, 0, 255], [0, 255, 0]).astype(np.uint8)
    disc = (rows - d / 2) ** 2 + (columns - d / 2) ** 2 <= (d / 2) ** 2
    image.paste(Image.fromarray(sign), (x, y), Image.fromarray((disc * 255).astype(np.uint8)))
    return image


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def sample(rng: np.random.Generator, planted: str, contexts: int = 1, **fields: Any) -> dict[str, bytes]:
    """Members of a sample with context images. planted: context (all, or context.N), target, prompt or nothing."""
    images = {"target": picture(rng), **{f"context.{i}": picture(rng) for i in range(contexts)}}
    prompt = str(rng.choice(WORDS))
    for role in images:
        if role.startswith(planted or "-"):
            images[role] = with_sign(images[role], rng)
    if planted == "prompt":
        prompt = f"{prompt} {PHRASE}"
    about = {"prompt": prompt, "planted": planted, **fields}
    return {"json": json.dumps(about).encode(), **{f"{role}.png": png(image) for role, image in images.items()}}


def write_planted(folder: Path, planted: list[str], shards: int, seed: int) -> Path:
    """One sample for each entry, in so many shards, indexed."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    samples = [(f"{i:05d}", sample(rng, what)) for i, what in enumerate(planted)]
    for number in range(shards):
        write_shard(folder / f"{number:03d}.tar", samples[number::shards])
    build_index(folder)
    return folder
