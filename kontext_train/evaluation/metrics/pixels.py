"""Pixel against pixel: what an edit should have left alone, the truth where it is known, and the way home of a chain.

Pictures in [0, 1]; mae is the mean absolute error. SSIM: Wang et al. 2004, as torchmetrics computes it.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torchmetrics import __version__
from torchmetrics.functional.image import structural_similarity_index_measure

from kontext_train.evaluation.metrics.base import UNTOUCHED, Better, Shown

NO_ERROR_DB = 100.0  # what PSNR is at most: equal pictures would have infinity, and so would every mean


class Pixels:
    name = "pixels"
    workers = 1
    about = f"torchmetrics {__version__}"
    numbers: ClassVar[Mapping[str, Better]] = {
        "untouched_mae": Better.lower,
        "untouched_psnr": Better.higher,
        "untouched_ssim": Better.higher,
        "untouched_colour": Better.lower,
        "colour_shift": Better.lower,
        "target_mae": Better.lower,
        "cycle_mae": Better.lower,
    }
    needs: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("untouched_mae", "untouched_psnr", "untouched_ssim", "untouched_colour"), UNTOUCHED),
        "colour_shift": "a context without a mask; with one, untouched_colour is measured",
        "target_mae": "a target",
        "cycle_mae": "the end of a chain that comes home",
    }

    def measure(self, shown: Shown) -> dict[str, float]:
        image = as_float(shown.image)
        found: dict[str, float] = {}
        if shown.untouched is not None and shown.context is not None and shown.mask_HW is not None:
            kept_HW = ~shown.mask_HW
            found |= untouched(as_float(shown.untouched), as_float(shown.context), kept_HW)
        elif shown.context is not None and shown.mask_HW is None:
            found["colour_shift"] = colour_shift(image, as_float(shown.context))
        if shown.target is not None:
            found["target_mae"] = float(abs(image - as_float(shown.target)).mean())
        if shown.case.home and shown.context is not None:
            found["cycle_mae"] = float(abs(image - as_float(shown.context)).mean())
        return found


def untouched(image_HWC: np.ndarray, context_HWC: np.ndarray, kept_HW: np.ndarray) -> dict[str, float]:
    """Both pictures are equal where an edit was allowed, so no window of SSIM that reaches there sees it."""
    error_NC = (image_HWC - context_HWC)[kept_HW]
    mse = float((error_NC**2).mean())
    # float64: variances are differences of squares, which cancel where a picture is flat
    a, b = (torch.from_numpy(x).double().permute(2, 0, 1)[None] for x in (image_HWC, context_HWC))
    _, ssim_1CHW = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    return {
        "untouched_mae": float(abs(error_NC).mean()),
        "untouched_psnr": NO_ERROR_DB if mse == 0 else min(NO_ERROR_DB, float(-10 * np.log10(mse))),
        "untouched_ssim": float(ssim_1CHW[0].mean(0)[torch.from_numpy(kept_HW)].mean()),
        "untouched_colour": colour_shift(image_HWC[kept_HW], context_HWC[kept_HW]),
    }


def colour_shift(a: np.ndarray, b: np.ndarray) -> float:
    """Distance of the mean colours of [..., 3] pictures, in units of the whole range of a channel."""
    return float(np.linalg.norm(a.reshape(-1, 3).mean(0) - b.reshape(-1, 3).mean(0)))


def as_float(image: Image.Image) -> np.ndarray:
    """float32 [H, W, 3] in [0, 1]."""
    return np.asarray(image, np.float32) / 255
