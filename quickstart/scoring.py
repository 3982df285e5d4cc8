"""Exact scoring of pictures of scenes: what stands in every cell, and whether an edit came out right.

Shapes: H, W = picture height and width in px; C = 3 (RGB); N = cells; P = 256 px of a cell; M = templates (shape x
place); K = colours.
"""

import functools
from collections import Counter
from dataclasses import dataclass

import numpy as np

from quickstart.scenes import (
    BACKGROUNDS,
    CELL_PX,
    COLOUR_JITTER,
    COLOURS,
    PLACE_JITTER,
    ROWS,
    SHAPES,
    Example,
    Kind,
    Scene,
    draw,
    shape_mask,
)

TOLERANCE = 0.05  # mean absolute error in [0, 1] within which a cell or a background counts as kept


@dataclass(frozen=True, slots=True)
class Reading:
    """What stands in a cell: names (None: empty), and its mean absolute error against the nearest template."""

    shape: str | None
    colour: str | None
    template_mae: float


@dataclass(frozen=True, slots=True)
class Score:
    """`right` is the strict verdict; errors are mean absolute, pictures in [0, 1]; NaN where there is no such cell."""

    right: bool
    untouched_mae: float
    edited_cell_mae: float


@functools.cache
def _templates() -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """(shape of each template, coverage [M, P], lowest and highest colours [K, C] in [0, 1])."""
    keys = [(shape, dx, dy) for shape in SHAPES for dx in PLACE_JITTER for dy in PLACE_JITTER]
    mask_MP = np.stack([shape_mask(*key).reshape(-1) for key in keys])
    colour_KC = np.array(list(COLOURS.values()), np.float32)
    return [key[0] for key in keys], mask_MP, (colour_KC - COLOUR_JITTER) / 255, (colour_KC + COLOUR_JITTER) / 255


def estimate_background(image_HWC: np.ndarray) -> np.ndarray:
    """Background colour [3] in [0, 1]: the median over the outer rings of all cells, which no thing can reach."""
    cell_NP = _split_cells(image_HWC).reshape(-1, CELL_PX, CELL_PX, 3)
    ring = np.ones((CELL_PX, CELL_PX), bool)
    ring[1:-1, 1:-1] = False
    return np.median(cell_NP[:, ring].reshape(-1, 3), axis=0)


def read_cells(image_HWC: np.ndarray) -> list[Reading]:
    """Nearest template of every cell, in `Scene.cells` order: empty | shape x place x any colour within a name's
    jitter.

    Templates stand on the picture's own background. The squared error is quadratic in the template's colour, channel by
    channel, so the best colour in a name's box is the least-squares colour, clipped.
    """
    shapes, mask_MP, low_KC, high_KC = _templates()
    background_C = estimate_background(image_HWC)
    weight_M = (mask_MP**2).sum(1)
    readings = []
    for cell_PC in _split_cells(image_HWC):
        rest_PC = cell_PC - background_C
        project_MC = mask_MP @ rest_PC
        colour_MKC = np.clip((project_MC / weight_M[:, None] + background_C)[:, None], low_KC, high_KC) - background_C
        # ||rest - mask * colour||^2 - ||rest||^2; an empty cell scores 0
        gain_MK = (weight_M[:, None, None] * colour_MKC**2 - 2 * colour_MKC * project_MC[:, None]).sum(-1)
        m, k = np.unravel_index(gain_MK.argmin(), gain_MK.shape)
        if gain_MK[m, k] >= 0:
            readings.append(Reading(None, None, float(abs(rest_PC).mean())))
            continue
        error_PC = rest_PC - mask_MP[m][:, None] * colour_MKC[m, k]
        readings.append(Reading(shapes[m], list(COLOURS)[k], float(abs(error_PC).mean())))
    return readings


def _split_cells(image_HWC: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 -> [N, P, 3] float32 in [0, 1], cells row by row."""
    height, width, channels = image_HWC.shape
    if image_HWC.dtype != np.uint8 or channels != 3 or height % CELL_PX or width % CELL_PX:
        raise ValueError(f"expected uint8 [16 * rows, 16 * columns, 3], got {image_HWC.dtype} {image_HWC.shape}")
    grid = image_HWC.reshape(height // CELL_PX, CELL_PX, width // CELL_PX, CELL_PX, 3).swapaxes(1, 2)
    return grid.reshape(-1, CELL_PX * CELL_PX, 3).astype(np.float32) / 255


def score_edit(image_HWC: np.ndarray, before: Scene, after: Scene) -> Score:
    """Judge an edited picture against the true outcome `after` of the scene `before`.

    Right: every cell shows the right thing or nothing, the background is right, every untouched cell is kept (both
    within 0.05). Edited cells are those whose thing changed; where the background changed, they are the empty cells
    (held to 0.05 too: they have nothing else to show), and the things, on the new background, are the untouched ones.
    """
    if image_HWC.shape != (ROWS * CELL_PX, after.columns * CELL_PX, 3):
        raise ValueError(
            f"the picture is {image_HWC.shape}, the scene has {ROWS} rows and {after.columns} columns of {CELL_PX} px"
        )
    new_background = before.background_rgb != after.background_rgb
    edited_N = np.array(
        [after.at(*c) is None if new_background else before.at(*c) != after.at(*c) for c in after.cells()]
    )
    mae_N = abs(_split_cells(image_HWC) - _split_cells(draw(after))).mean((1, 2))
    kept_N = mae_N <= TOLERANCE
    named = [(thing.shape, thing.colour) if (thing := after.at(*c)) else (None, None) for c in after.cells()]
    background_mae = abs(estimate_background(image_HWC) - np.array(after.background_rgb) / 255).mean()
    right = (
        [(reading.shape, reading.colour) for reading in read_cells(image_HWC)] == named
        and background_mae <= TOLERANCE
        and bool((kept_N | (edited_N & (not new_background))).all())
    )
    return Score(right, _mean_or_nan(mae_N[~edited_N]), _mean_or_nan(mae_N[edited_N]))


def _mean_or_nan(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def text_to_image_right(image_HWC: np.ndarray, scene: Scene) -> bool:
    """Whether a picture shows the described things, each once and anywhere, no others, on the named background."""
    seen = Counter((reading.shape, reading.colour) for reading in read_cells(image_HWC) if reading.shape is not None)
    wanted = Counter((thing.shape, thing.colour) for thing in scene.things)
    return seen == wanted and background_name(image_HWC) == scene.background


def background_name(image_HWC: np.ndarray) -> str:
    """Name of the background whose canonical colour is nearest."""
    names, colour_KC = list(BACKGROUNDS), np.array(list(BACKGROUNDS.values())) / 255
    return names[int(((colour_KC - estimate_background(image_HWC)) ** 2).sum(1).argmin())]


def score_example(image_HWC: np.ndarray, example: Example) -> Score:
    """`score_edit`, or `text_to_image_right` (errors NaN: it has many right answers), by the example's kind."""
    if example.edit.kind is Kind.DESCRIBE:
        return Score(text_to_image_right(image_HWC, example.target), float("nan"), float("nan"))
    return score_edit(image_HWC, example.contexts[0], example.target)
