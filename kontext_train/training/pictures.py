"""Pictures side by side, for people to look at."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor


def save_grid(file: Path, rows: Sequence[tuple[str, Sequence[Tensor]]], scale: int = 1) -> None:
    """A PNG of rows of [3, H, W] uint8 images, enlarged `scale` times, each row under its caption, right-aligned."""
    images = [image for _, row in rows for image in row]
    cell_h = max(i.shape[1] for i in images) * scale
    cell_w = max(i.shape[2] for i in images) * scale
    columns, gap, caption = max(len(row) for _, row in rows), 6, 14
    sheet = Image.new("RGB", (columns * (cell_w + gap) + gap, len(rows) * (cell_h + caption + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (text, row) in enumerate(rows):
        top = gap + y * (cell_h + caption + gap)
        draw.text((gap, top), text, fill="black")
        for x, image in enumerate(row, start=columns - len(row)):
            picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
            picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
            sheet.paste(picture, (gap + x * (cell_w + gap), top + caption))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
