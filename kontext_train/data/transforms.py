"""From the bytes of an image to the pixels that training sees: decode, turn upright, resize, crop.

`Transform.size` is the one rule for the size that an image is trained at. The plan calls it on the sizes in the index,
the reader calls it on the image it decoded, and both must agree to the pixel; so `fit_size` is integer arithmetic.

Legend: H, W pixels after resizing; `hw` is (height, width) in pixels.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from kontext_train.data.config import Crop, DataConfig, Resize
from kontext_train.data.shard import IMAGE_FORMATS, upright_hw
from kontext_train.errors import ConfigError
from kontext_train.randomness import generator

# (height, width) of the 17 sizes that Kontext was trained at, by rising width: PREFERED_KONTEXT_RESOLUTIONS in
# flux/util.py of github.com/black-forest-labs/flux; diffusers' pipeline_flux_kontext.py has the same list.
KONTEXT_HW = (
    (1568, 672),
    (1504, 688),
    (1456, 720),
    (1392, 752),
    (1328, 800),
    (1248, 832),
    (1184, 880),
    (1104, 944),
    (1024, 1024),
    (944, 1104),
    (880, 1184),
    (832, 1248),
    (800, 1328),
    (752, 1392),
    (720, 1456),
    (688, 1504),
    (672, 1568),
)
# A JPEG of many times the wanted size is decoded by libjpeg at 1/2, 1/4 or 1/8, but at no less than 1.5 times the
# wanted size; the filter does the rest. Against decoding all of it that is 48.5 dB or more on pictures of 12 megapixels
# (bicubic against Lanczos is 49 dB) in half of the time, and 53 dB on 24 megapixels; without the 1.5 it would be 44 dB.
_DRAFT_GAP = 1.5


@dataclass(frozen=True, slots=True)
class Transform:
    """What becomes of every image of a run. One frozen value, so that plan and reader cannot differ."""

    max_pixels: int  # of an image, height * width; with Resize.kontext of those images alone that keep their own size
    multiple: int  # both sides are divisible by it: the pixels of a token
    resize: Resize = Resize.pixel_budget
    max_upscale: float = 1.0
    crop: Crop = Crop.center
    background: tuple[int, ...] = (255, 255, 255)
    seed: int = 0  # of random crops

    def __post_init__(self) -> None:
        fit_size((1, 1), self.max_pixels, self.multiple)  # refuse bad values here, not in a worker
        if self.resize is Resize.kontext and any(side % self.multiple for hw in KONTEXT_HW for side in hw):
            rule = f"needs tokens of 16 pixels, or of a divisor of 16; these encoders have {self.multiple}"
            raise ConfigError("data.resize", self.resize.value, rule, "Use data.resize=pixel_budget")

    @classmethod
    def of(cls, config: DataConfig, multiple: int, seed: int) -> "Transform":
        """As configured. multiple: pixels of a token; seed: the run's."""
        background = tuple(config.background)
        return cls(config.max_pixels, multiple, config.resize, config.max_upscale, config.crop, background, seed)

    def size(self, hw: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Sizes that images are trained at: int64 [..., 2] from integers [..., 2], (height, width) in pixels."""
        own = fit_size(hw, self.max_pixels, self.multiple, self.max_upscale)
        match self.resize:
            case Resize.pixel_budget:
                return own
            case Resize.kontext:
                nearest, given = nearest_kontext_size(hw), np.asarray(hw)
                covered = (nearest <= self.max_upscale * given).all(axis=-1, keepdims=True)
                return np.where(covered, nearest, own)

    def decides_size(self) -> tuple[Any, ...]:
        """All that `size` depends on, for digests."""
        return self.resize.value, self.max_pixels, self.max_upscale, self.multiple

    def most_tokens(self) -> int:
        """Tokens that no image exceeds."""
        kontext = max(h * w for h, w in KONTEXT_HW) if self.resize is Resize.kontext else 0
        return max(self.max_pixels, kontext) // self.multiple**2

    def centering(self, visit: int) -> tuple[float, float]:
        """Where a crop lies: (share of the surplus width left of it, share of the surplus height above it).

        All images of a sample share it, so that an edit stays aligned with its source.
        """
        match self.crop:
            case Crop.center:
                return 0.5, 0.5
            case Crop.random:
                x, y = generator(self.seed, "crop", visit).random(2)
                return float(x), float(y)

    def apply(
        self,
        file: str | Path | IO[bytes],
        centering: tuple[float, float] = (0.5, 0.5),
        expected_hw: tuple[int, int] | None = None,
    ) -> npt.NDArray[np.uint8]:
        """uint8 [H, W, 3] RGB at `size` of the image's own size.

        expected_hw: its own size as the index has it.

        Raises:
            ValueError: the bytes are no PNG, JPEG or WebP image that decodes, or one of another size than expected. The
                message is the reason.
        """
        try:
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                return self._pixels(image, centering, expected_hw)
        except OtherSize:
            raise
        except UnidentifiedImageError as error:  # its message is the address of `file` in memory
            raise ValueError("cannot be decoded (not a PNG, JPEG or WebP image)") from error
        except Exception as error:  # Pillow raises a dozen kinds on bad bytes, SyntaxError and struct.error among them
            raise ValueError(f"cannot be decoded ({type(error).__name__}: {error})") from error

    def _pixels(
        self, image: Image.Image, centering: tuple[float, float], expected_hw: tuple[int, int] | None
    ) -> npt.NDArray[np.uint8]:
        if image.format in ("JPEG", "MPO"):
            hw = upright_hw(image)
            wanted_hw = self.size(hw).tolist()
            _draft(image, hw, wanted_hw)
            ImageOps.exif_transpose(image, in_place=True)
        else:  # a PNG may tell after its pixels how it is turned
            ImageOps.exif_transpose(image, in_place=True)
            hw = image.height, image.width
            wanted_hw = self.size(hw).tolist()
        if expected_hw is not None and hw != expected_hw:
            height, width = expected_hw
            raise OtherSize(f"decodes to {hw[0]}×{hw[1]}, the index says {height}×{width} (height×width)")
        rgb = to_rgb(image, self.background)
        if [rgb.height, rgb.width] != wanted_hw:
            # fit = the largest box of the wanted aspect ratio, resampled with antialiasing: resize to cover, then crop,
            # in one pass.
            rgb = ImageOps.fit(rgb, wanted_hw[::-1], Image.Resampling.LANCZOS, centering=centering)
        return np.array(rgb)


class OtherSize(ValueError):
    """An image is not of the size that the index has."""


def _draft(image: Image.Image, upright: tuple[int, int], wanted_hw: list[int]) -> None:
    """Have a JPEG that is far larger than wanted decoded smaller."""
    turned = (image.height, image.width) != upright
    width, height = wanted_hw if turned else wanted_hw[::-1]
    image.draft(None, (math.ceil(_DRAFT_GAP * width), math.ceil(_DRAFT_GAP * height)))


def to_rgb(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """RGB of an image in any mode that PNG, JPEG and WebP decode to; `background` (RGB) shows through transparency."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit greys at 255, which turns a photograph white.
        grey = np.asarray(image).astype(np.uint32)
        image = Image.fromarray((grey * 255 + 32895 >> 16).astype(np.uint8))  # grey / 257, rounded, without dividing
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", rgba.size, background)
        image.paste(rgba, mask=rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def nearest_kontext_size(hw: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The size of `KONTEXT_HW` whose width / height is nearest, the narrower of two equally near. [..., 2] to [..., 2].

    As the released pipelines choose it for a context image, in the same floating-point operations.
    """
    given = np.asarray(hw, dtype=np.int64)
    ratio = given[..., 1] / given[..., 0]
    nearest, distance = np.empty_like(given), np.full(ratio.shape, np.inf)
    for height, width in KONTEXT_HW:  # one after another: a table of all 17 would take 1.4 GB for ten million images
        away = np.abs(ratio - width / height)
        nearest[away < distance] = height, width
        distance = np.minimum(away, distance)
    return nearest


def fit_size(hw: npt.ArrayLike, max_pixels: int, multiple: int, max_upscale: float = 1.0) -> npt.NDArray[np.int64]:
    """The size of an image at its own aspect ratio: at most `max_pixels`, each side a multiple of `multiple`.

    An image is scaled to `max_pixels`, then each side is floored to a multiple, but to one multiple at least. Where
    that minimum widens a very thin image, its long side gives way, so height * width <= max_pixels holds always. An
    image that would have to grow more than `max_upscale` times a side is not scaled at all.

    Args:
        hw: integers [..., 2], (height, width) in pixels, at least 1.
        max_pixels: the largest height * width.
        multiple: what both sides are divisible by, pixels.
        max_upscale: at least 1, which never makes an image larger.

    Returns:
        int64 [..., 2], (height, width) in pixels.

    Raises:
        ValueError: `multiple` is below 1, or `max_pixels` has no room for a square of one multiple.
    """
    if multiple < 1:
        raise ValueError(f"multiple is {multiple}; it must be at least 1 pixel")
    if max_pixels < multiple**2:
        raise ValueError(f"max_pixels is {max_pixels}; it must be at least multiple ** 2 = {multiple**2}")
    assert max_upscale >= 1
    size = np.asarray(hw, dtype=np.int64)
    assert size.shape[-1:] == (2,)
    assert (size >= 1).all()
    # Scaled by s = sqrt(max_pixels / (h w)), h becomes sqrt(max_pixels h / w): an integer square root, no rounding.
    scaled = _isqrt(max_pixels * size // size[..., ::-1])
    size = np.where(size.prod(axis=-1, keepdims=True) * max_upscale**2 >= max_pixels, scaled, size)
    size = np.maximum(size // multiple, 1) * multiple
    room = max_pixels // size[..., ::-1] // multiple * multiple  # what the other side leaves
    return np.minimum(size, np.maximum(room, multiple))


def _isqrt(x: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """floor(sqrt(x)) exactly, 0 <= x < 2**62. Above 2**52 the float root of k² - 1 rounds up to k, never down."""
    root = np.sqrt(x.astype(np.float64)).astype(np.int64)
    return root - (root * root > x)


def decode_image(file: str | Path | IO[bytes], background: tuple[int, ...]) -> Image.Image:
    """RGB of an image file, upright and at its own size: what the filter looks at. Pillow's errors come through."""
    with Image.open(file, formats=IMAGE_FORMATS) as encoded:
        return to_rgb(ImageOps.exif_transpose(encoded), background)


def load_image(path: str | Path, transform: Transform) -> npt.NDArray[np.uint8]:
    """An image file as training sees images: uint8 [H, W, 3]. Raises ValueError, with the path, if it is no image."""
    try:
        return transform.apply(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
