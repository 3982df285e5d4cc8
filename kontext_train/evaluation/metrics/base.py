"""What metrics get and give."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image, ImageOps

from kontext_train.data.transforms import to_rgb
from kontext_train.evaluation.benchmark import Case, some

CONTEXT, UNTOUCHED = "a context", "a context with a mask that is not white everywhere"  # what numbers need
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # of transformers


class Better(Enum):
    higher = "higher"
    lower = "lower"


class Unmeasured(ValueError):
    """An image for which a metric has no number although it should; the message is the reason."""


class LeftOut(ValueError):
    """An image that a metric has nothing to say of, though others of its kind have a number; the message says why."""


@dataclass(frozen=True)
class Shown:
    """A made image with its case. Pictures are RGB; those to compare with are cut to the image's size, as runs do."""

    case: Case
    seed: int
    file: Path

    @functools.cached_property
    def image(self) -> Image.Image:
        return open_rgb(self.file)

    @functools.cached_property
    def context(self) -> Image.Image | None:
        return self._fitted(self.case.contexts[0]) if self.case.contexts else None

    @functools.cached_property
    def target(self) -> Image.Image | None:
        return self._fitted(self.case.target) if self.case.target is not None else None

    @functools.cached_property
    def mask_HW(self) -> np.ndarray | None:
        """True where the edit may change something; None if the case does not say."""
        if self.case.mask is None:
            return None
        return np.asarray(self._fitted(self.case.mask, Image.Resampling.NEAREST).convert("L")) >= 128

    @functools.cached_property
    def untouched(self) -> Image.Image | None:
        """The image with the context's own pixels where the edit may change something: all that still differs from the
        context should not. None without a mask, or where the mask is everything.
        """
        if self.context is None or self.mask_HW is None or self.mask_HW.all():
            return None
        return Image.composite(self.context, self.image, Image.fromarray(self.mask_HW.astype(np.uint8) * 255))

    def _fitted(self, file: Path, resampling: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
        image = open_rgb(file)
        return image if image.size == self.image.size else ImageOps.fit(image, self.image.size, resampling)


class Metric(Protocol):
    name: str
    about: str
    workers: int  # images measured at once, in threads: of use where a server does the work
    numbers: ClassVar[Mapping[str, Better]]
    needs: ClassVar[Mapping[str, str]]  # what of a case numbers need that not every case has

    def measure(self, shown: Shown) -> dict[str, float]:
        """Some of `numbers`: those that the case has what it takes for. Raises Unmeasured or LeftOut."""
        ...


class SetMetric(Protocol):
    """Compares a set of images with reference images, by one feature vector an image."""

    name: str
    about: str
    numbers: ClassVar[Mapping[str, Better]]

    def feature(self, image: Image.Image) -> np.ndarray: ...

    def compare(self, made_ND: np.ndarray, real_MD: np.ndarray) -> dict[str, float]: ...


def open_rgb(file: Path) -> Image.Image:
    """Upright RGB. Raises Unmeasured, with the file's name, if it cannot be decoded."""
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
            return to_rgb(upright, (255, 255, 255))
    except Exception as error:  # Pillow raises a dozen kinds on bad bytes
        raise Unmeasured(f"{file.name} cannot be decoded ({type(error).__name__}: {error})") from error


def digest(*files: Path) -> str:
    """12 hexadecimal digits that say which files these are."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as raw:
            total.update(hashlib.file_digest(raw, "sha256").digest())
    return total.hexdigest()[:12]


def load_whole(kind: Any, folder: str) -> tuple[Any, str]:
    """A transformers model on the CPU, and the digest of its weights and configuration. Raises ValueError or OSError.

    from_pretrained fills what a file lacks with random numbers, and only warns.
    """
    files = sorted(f for pattern in WEIGHTS for f in Path(folder).glob(pattern))
    if not files:
        raise ValueError(f"it holds no weights ({' or '.join(WEIGHTS)})")
    try:
        model, found = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError):
        raise
    except Exception as error:  # readers of weights raise many kinds on bad bytes
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{names} cannot be read ({type(error).__name__}: {error})") from error
    lacking = sorted(found["missing_keys"])
    if lacking:
        raise ValueError(f"its weights lack {len(lacking)} tensors ({some(lacking)})")
    return model.eval(), digest(*files, *sorted(Path(folder).glob("*config.json")))  # how images are prepared, too


def cosine(a_D: np.ndarray, b_D: np.ndarray) -> float:
    return float(a_D @ b_D / (np.linalg.norm(a_D) * np.linalg.norm(b_D)).clip(1e-12))
