"""LPIPS (Zhang et al. 2018, arXiv 1801.03924), version 0.1 on AlexNet, to the context: whole, and outside the edit.

The linear weights come with torchmetrics. The backbone is torchvision's AlexNet file, so its layers have those names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torchmetrics
from PIL import Image
from torch import Tensor, nn

from kontext_train.errors import ConfigError
from kontext_train.evaluation.metrics.base import CONTEXT, UNTOUCHED, Better, Shown, digest

LINEAR = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "alex.pth"
SHIFT_C, SCALE_C = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet, for pictures in [-1, 1]
LEAST_SIDE = 64  # pixels: below, AlexNet's last maps are empty


def alexnet_features() -> nn.Sequential:
    """The convolutions of AlexNet (Krizhevsky 2014, arXiv 1404.5997) by torchvision's numbers."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


class Lpips:
    name = "lpips"
    workers = 1
    numbers: ClassVar[Mapping[str, Better]] = {
        "lpips_image": Better.lower,
        "lpips_untouched": Better.lower,
        "lpips_target": Better.lower,
    }
    needs: ClassVar[Mapping[str, str]] = {
        "lpips_image": CONTEXT,
        "lpips_untouched": UNTOUCHED,
        "lpips_target": "a target",
    }

    def __init__(self, file: str, device: torch.device) -> None:
        self.features = alexnet_features()
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            kept = {name[9:]: value for name, value in state.items() if name.startswith("features.")}
            self.features.load_state_dict(kept)
        except Exception as error:  # torch.load raises many kinds
            rule = f"does not hold AlexNet's convolutions ({type(error).__name__}: {str(error).splitlines()[0]})"
            raise ConfigError("metrics.lpips", file, rule, "Give torchvision's alexnet-owt-7be5be79.pth") from error
        self.features.to(device).eval().requires_grad_(False)
        linear = torch.load(LINEAR, map_location=device, weights_only=True)
        self.linear = [linear[f"lin{i}.model.1.weight"] for i in range(5)]
        self.shift, self.scale = (torch.tensor(x, device=device)[:, None, None] for x in (SHIFT_C, SCALE_C))
        self.device = device
        self.about = f"LPIPS 0.1 alex, {Path(file).name} {digest(Path(file))}, torchmetrics {torchmetrics.__version__}"

    def measure(self, shown: Shown) -> dict[str, float]:
        found = {}
        if shown.context is not None:
            found["lpips_image"] = self.distance(shown.image, shown.context)
            if shown.untouched is not None:
                found["lpips_untouched"] = self.distance(shown.untouched, shown.context)
        if shown.target is not None:
            found["lpips_target"] = self.distance(shown.image, shown.target)
        return found

    @torch.no_grad()
    def distance(self, a: Image.Image, b: Image.Image) -> float:
        """Of two pictures of one size. Small ones are enlarged until AlexNet has something to see."""
        total = torch.zeros((), device=self.device)
        for x, y, weight in zip(self._maps(a), self._maps(b), self.linear, strict=True):
            total += nn.functional.conv2d((x - y) ** 2, weight).mean()
        return float(total)

    def _maps(self, image: Image.Image) -> list[Tensor]:
        """Outputs of the five ReLUs, normalised over channels."""
        if min(image.size) < LEAST_SIDE:
            factor = -(-LEAST_SIDE // min(image.size))
            image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1).to(self.device)
        x, maps = ((x - self.shift) / self.scale)[None], []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                maps.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return maps
