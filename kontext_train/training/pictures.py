"""Pictures side by side, for people to look at."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

LINE, CHARACTER, GAP = 13, 6, 6  # pixels of the default font, and between pictures


def save_grid(file: Path, rows: Sequence[tuple[str, Sequence[Tensor]]], scale: int = 1) -> None:
    """A PNG of rows of [3, H, W] uint8 images, enlarged `scale` times, each row under its caption, right-aligned."""
    images = [image for _, row in rows for image in row]
    cell_h = max(i.shape[1] for i in images) * scale
    cell_w = max(i.shape[2] for i in images) * scale
    columns = max(len(row) for _, row in rows)
    width = columns * (cell_w + GAP) + GAP
    captions = ["\n".join(textwrap.wrap(text, (width - 2 * GAP) // CHARACTER)) for text, _ in rows]
    heights = [LINE * (caption.count("\n") + 1) + cell_h + GAP for caption in captions]
    sheet = Image.new("RGB", (width, sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for caption, height, (_, row) in zip(captions, heights, rows, strict=True):
        draw.multiline_text((GAP, top), caption, fill="black", spacing=1)
        for x, image in enumerate(row, start=columns - len(row)):
            picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
            picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
            sheet.paste(picture, (GAP + x * (cell_w + GAP), top + height - cell_h - GAP))
        top += height
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
