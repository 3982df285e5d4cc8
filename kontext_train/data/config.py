"""Choices of this room. Torch-free."""

from dataclasses import dataclass, field
from enum import Enum

from kontext_train.errors import ConfigError

KONTEXT_PIXELS = 1024 * 1024  # what the sizes of Resize.kontext have, about


class Resize(Enum):
    pixel_budget = "pixel_budget"  # the image's own aspect ratio, at most max_pixels
    kontext = "kontext"  # the nearest by aspect ratio of the 17 sizes of one megapixel that Kontext was trained at


class Crop(Enum):
    center = "center"
    random = "random"  # another place at each visit, the same for all images of a sample


@dataclass(slots=True)
class DataConfig:
    train: str = ""  # folder of indexed shards
    validation: str | None = None  # folder of indexed shards; none switches validation off
    resize: Resize = Resize.pixel_budget
    max_pixels: int = 1024 * 1024  # larger images are scaled down to this, keeping their aspect ratio
    max_upscale: float = 1.0  # an image that had to grow more than this a side keeps its own size; 1 enlarges none
    crop: Crop = Crop.center  # where the few pixels go that the resized image has too many
    background: list[int] = field(default_factory=lambda: [255, 255, 255])  # RGB, seen through transparency
    tokens_per_pack: int = 16_384  # budget of one forward pass on one GPU: text + target + context tokens
    pad_packs: bool = False  # pad every pack to tokens_per_pack, so that compiled code is specialised for one length
    window_samples: int = 16_384  # samples are packed among this many neighbours of the epoch's permutation
    prompt_dropout: float = 0.1  # share of samples trained with the empty prompt, for classifier-free guidance
    context_dropout: float = 0.0  # share of samples trained without their context images
    workers: int = 4  # reader processes for each rank; 0 reads in the training process
    prefetch: int = 2  # packs that each worker holds ready

    def __post_init__(self) -> None:
        for key in ("max_pixels", "tokens_per_pack", "window_samples", "prefetch"):
            if getattr(self, key) < 1:
                raise ConfigError(f"data.{key}", getattr(self, key), "must be at least 1", "Give a larger value")
        if self.resize is Resize.kontext and self.max_pixels < KONTEXT_PIXELS:
            rule = f"must be at least {KONTEXT_PIXELS} with data.resize=kontext, whose sizes are of one megapixel"
            raise ConfigError("data.max_pixels", self.max_pixels, rule, "Use data.resize=pixel_budget for less")
        if self.max_upscale < 1:
            raise ConfigError("data.max_upscale", self.max_upscale, "must be at least 1", "1 enlarges no image")
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            rule = "must be red, green and blue from 0 to 255"
            raise ConfigError("data.background", self.background, rule, "White is [255,255,255]")
        if self.workers < 0:
            raise ConfigError("data.workers", self.workers, "must not be negative", "0 reads in the training process")
        for key in ("prompt_dropout", "context_dropout"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"data.{key}", getattr(self, key), "is a probability", "Give a value from 0 to 1")
