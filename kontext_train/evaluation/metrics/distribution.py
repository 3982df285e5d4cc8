"""Distances between what was made and real images: FID and KID on Inception's features, CMMD on CLIP's.

Legend: N made images; M real ones; D features; K = min(N, D).
FID: Heusel et al. 2017. KID: Binkowski et al. 2018. CMMD: Jayasumana et al. 2024, arXiv 2401.09603.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from kontext_train.errors import ConfigError
from kontext_train.evaluation.metrics.base import Better, digest
from kontext_train.evaluation.metrics.clip import ClipEmbedder

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # as the paper has them


class Inception:
    """FID and KID with the TorchScript Inception of 2015-12-05, which takes uint8 and resizes by itself."""

    name = "inception"
    numbers: ClassVar[Mapping[str, Better]] = {"fid": Better.lower, "kid": Better.lower}

    def __init__(self, file: str, device: torch.device) -> None:
        try:
            self.model = torch.jit.load(file, map_location=device).eval()
        except Exception as error:  # torch raises many kinds
            rule = f"is no TorchScript file ({type(error).__name__})"
            raise ConfigError("metrics.inception", file, rule, "Give inception-2015-12-05.pt") from error
        self.device = device
        self.about = f"{Path(file).name} {digest(Path(file))}"

    @torch.no_grad()
    def feature(self, image: Image.Image) -> np.ndarray:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(self.device)
        return self.model(pixels, return_features=True)[0].double().cpu().numpy()

    def compare(self, made_ND: np.ndarray, real_MD: np.ndarray) -> dict[str, float]:
        return {"fid": frechet(made_ND, real_MD), "kid": kernel_distance(made_ND, real_MD)}


class Cmmd:
    name = "cmmd"
    numbers: ClassVar[Mapping[str, Better]] = {"cmmd": Better.lower}

    def __init__(self, embedder: ClipEmbedder) -> None:
        self.embedder, self.about = embedder, embedder.about

    def feature(self, image: Image.Image) -> np.ndarray:
        return self.embedder.image(image).astype(np.float64)

    def compare(self, made_ND: np.ndarray, real_MD: np.ndarray) -> dict[str, float]:
        return {"cmmd": gaussian_distance(made_ND, real_MD)}


def frechet(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """|mean a - mean b|² + tr(A + B - 2 (A B)^½), A and B the covariances.

    With A = Rᵀ R and B = Sᵀ S, the eigenvalues of A B are the squared singular values of R Sᵀ: no matrix root.
    """
    root_a_KD, root_b_KD = _root(a_ND), _root(b_MD)
    cross = np.linalg.svd(root_a_KD @ root_b_KD.T, compute_uv=False).sum()
    apart = ((a_ND.mean(0) - b_MD.mean(0)) ** 2).sum()
    return float(apart + (root_a_KD**2).sum() + (root_b_KD**2).sum() - 2 * cross)


def _root(x_ND: np.ndarray) -> np.ndarray:
    """R [K, D] with Rᵀ R the covariance."""
    return np.asarray(np.linalg.qr((x_ND - x_ND.mean(0)) / np.sqrt(len(x_ND) - 1), mode="r"))


def kernel_distance(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """Unbiased MMD² with the kernel (a·b / D + 1)³."""
    dimensions = a_ND.shape[1]

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / dimensions + 1) ** 3

    within = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(a_ND, a_ND), kernel(b_MD, b_MD)))
    return float(within - 2 * kernel(a_ND, b_MD).mean())


def gaussian_distance(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """1000 x the biased MMD² with a Gaussian kernel of width 10, as the paper's code has it."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
        return float(np.exp(-squares / (2 * CMMD_SIGMA**2)).mean())

    return CMMD_SCALE * (kernel(a_ND, a_ND) + kernel(b_MD, b_MD) - 2 * kernel(a_ND, b_MD))
