"""Images come out upright, in RGB, at the size that was planned, whatever mode and size they went in with."""

import io
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from kontext_train.data import transforms as transforms_module
from kontext_train.data.config import Crop, DataConfig, Resize
from kontext_train.data.sample import BadSample, SampleReader
from kontext_train.data.transforms import KONTEXT_HW, Transform, fit_size, load_image, nearest_kontext_size
from kontext_train.errors import ConfigError
from tests.data.test_sample import encode, noise, read_target, write_folder

# ------------------------------------------------------------------------------------------------------------ fit_size


@pytest.mark.parametrize(
    ("hw", "max_pixels", "multiple", "expected"),
    [
        ((1024, 1024), 1 << 20, 16, (1024, 1024)),  # fits exactly
        ((3072, 3072), 1 << 20, 16, (1024, 1024)),  # float scaling gives 1023.99… here and loses a row of patches
        ((512, 768), 1 << 20, 16, (512, 768)),  # small: never up
        ((1000, 1000), 1 << 20, 16, (992, 992)),
        ((2160, 3840), 1 << 20, 16, (768, 1360)),
        ((3, 5), 1 << 20, 16, (16, 16)),  # at least one multiple
        ((1, 100_000), 1 << 16, 16, (16, 4096)),  # thin: the raised side takes pixels from the long one
    ],
)
def test_fit_size_by_hand(hw: tuple[int, int], max_pixels: int, multiple: int, expected: tuple[int, int]) -> None:
    assert tuple(fit_size(np.array(hw), max_pixels, multiple)) == expected
    assert tuple(fit_size(np.array(hw[::-1]), max_pixels, multiple)) == expected[::-1]


def test_float_scaling_would_lose_a_patch() -> None:
    """Control: the exact root is there for a reason, common sizes among them."""
    wrong = [side for side in range(1025, 8192) if int(side * math.sqrt((1 << 20) / (side * side))) != 1024]
    assert wrong
    sides = np.array(wrong)
    assert (fit_size(np.stack([sides, sides], -1), 1 << 20, 16) == 1024).all()


side = st.integers(1, 100_000)


@given(st.lists(st.tuples(side, side), min_size=1), st.sampled_from([1, 8, 16, 32]), st.integers(1 << 10, 1 << 22))
@settings(max_examples=200, deadline=None)
def test_fit_size_properties(sizes: list[tuple[int, int]], multiple: int, max_pixels: int) -> None:
    fitted = fit_size(np.array(sizes, np.int32), max_pixels, multiple)
    assert fitted.dtype == np.int64
    assert (fitted % multiple == 0).all()
    assert (fitted >= multiple).all()
    assert (fitted.prod(-1) <= max_pixels).all()
    for (height, width), result in zip(sizes, fitted, strict=True):
        assert (fit_size(np.array([height, width]), max_pixels, multiple) == result).all()  # one by one, or all at once
        assert (fit_size(np.array([width, height]), max_pixels, multiple) == result[::-1]).all()
        if height * width <= max_pixels:
            ideal = (height, width)
        else:
            ideal = (math.isqrt(height * max_pixels // width), math.isqrt(width * max_pixels // height))
        if min(ideal) >= multiple:
            assert tuple(result) == tuple(side // multiple * multiple for side in ideal)


def test_integer_root_is_exact_around_squares() -> None:
    k = np.random.default_rng(0).integers(1, 1 << 31, 100_000)
    k[:100] = np.arange(1, 101)
    k[100:] >>= np.arange(k.size - 100) % 31
    k = np.maximum(k, 1)
    assert np.array_equal(transforms_module._isqrt(k * k), k)
    assert np.array_equal(transforms_module._isqrt(k * k - 1), k - 1)
    assert np.array_equal(transforms_module._isqrt(k * k + 2 * k), k)
    assert (np.sqrt((k * k - 1).astype(np.float64)).astype(np.int64) != k - 1).any()  # control: floats alone are not


@pytest.mark.parametrize(
    ("hw", "max_upscale", "expected"),
    [
        ((512, 512), 1.0, (512, 512)),
        ((512, 512), 2.0, (1024, 1024)),  # exactly the limit
        ((511, 511), 2.0, (496, 496)),  # past it: its own size, not the limit's
        ((300, 900), 2.0, (591 // 16 * 16, 1773 // 16 * 16)),
        ((2048, 2048), 2.0, (1024, 1024)),
    ],
)
def test_enlarging_has_a_limit(hw: tuple[int, int], max_upscale: float, expected: tuple[int, int]) -> None:
    assert tuple(fit_size(hw, 1 << 20, 16, max_upscale)) == expected


def test_fit_size_keeps_shape_and_takes_no_samples() -> None:
    assert fit_size(np.ones((4, 3, 2), np.int32), 256, 16).shape == (4, 3, 2)
    assert fit_size(np.empty((0, 2), np.int32), 256, 16).shape == (0, 2)


def test_fit_size_refuses_values_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"multiple is 0; it must be at least 1"):
        fit_size((4, 4), 100, 0)
    with pytest.raises(ValueError, match=r"max_pixels is 255; it must be at least multiple \*\* 2 = 256"):
        fit_size((4, 4), 255, 16)


def test_resize_covers_and_crops_the_centre(tmp_path: Path) -> None:
    # Left and right tenths are red and blue: a square of 160×200 keeps the middle 160 columns, so no colour is left.
    pixels = np.full((160, 200, 3), 128, np.uint8)
    pixels[:, :20], pixels[:, 180:] = (255, 0, 0), (0, 0, 255)
    index = write_folder(tmp_path, [{"target.png": encode(pixels)}])
    wide = SampleReader(index, Transform(160 * 200, 8)).read(0).target
    assert (wide[:, 0] == (255, 0, 0)).all()
    assert (wide[:, -1] == (0, 0, 255)).all()  # control: nothing is cropped where the ratio is kept
    square = SampleReader(index, Transform(64 * 64, 64)).read(0).target
    assert square.shape == (64, 64, 3)
    assert np.abs(square.astype(int) - 128)[:, 3:-3].max() <= 1


def test_downscaling_is_antialiased(tmp_path: Path) -> None:
    checkers = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    index = write_folder(tmp_path, [{"target.png": encode(checkers)}])
    small = SampleReader(index, Transform(48 * 48, 16)).read(0).target
    assert np.abs(small.astype(int) - 127.5).max() < 25  # grey; without a filter it stays black and white
    nearest = np.asarray(Image.fromarray(checkers).resize((48, 48), Image.Resampling.NEAREST))
    assert np.abs(nearest.astype(int) - 127.5).max() > 100


# -------------------------------------------------------------------------------------------------- modes, orientation


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, form: str, orientation: int) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation to the Image.Transpose that a camera applied
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    target = read_target(tmp_path, encode(stored, form, exif=exif, quality=95), form.lower())
    assert target.shape == upright.shape
    quarters = (slice(4, 12), slice(20, 28)), (slice(4, 20), slice(28, 44))
    for rows in quarters[0]:
        for columns in quarters[1]:
            assert np.abs(target[rows, columns].astype(int) - upright[rows, columns]).max() < 12


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_png_with_orientation_after_its_pixels_is_never_trained_unturned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = encode(noise(16, 32))
    end = raw.rindex(b"IEND") - 4
    late = raw[:end] + png_chunk(b"eXIf", exif.tobytes()[6:]) + raw[end:]
    with pytest.raises(BadSample, match=r"k0: target: decodes to 32×16, the index says 16×32"):
        read_target(tmp_path, late)


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    rgba = noise(16, 16, 4)
    rgba[:8, :, 3], rgba[8, :, 3] = 0, 255
    target = read_target(tmp_path, encode(rgba))
    assert (target[:8] == 255).all()
    assert np.array_equal(target[8], rgba[8, :, :3])
    alpha = rgba[9:, :, 3:].astype(float) / 255
    assert np.abs(target[9:] - (rgba[9:, :, :3] * alpha + 255 * (1 - alpha))).max() <= 1


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    indices = np.array([[0, 1], [2, 3]], np.uint8).repeat(8, 0).repeat(8, 1)
    image = Image.fromarray(indices, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)[indices]
    (tmp_path / "plain").mkdir()
    assert np.array_equal(read_target(tmp_path / "plain", encode(image)), colours)
    colours[:8, 8:] = 255
    (tmp_path / "clear").mkdir()
    assert np.array_equal(read_target(tmp_path / "clear", encode(image, transparency=1)), colours)


def test_grey_and_grey_with_alpha(tmp_path: Path) -> None:
    grey = noise(16, 16, 2)
    (tmp_path / "l").mkdir()
    assert np.array_equal(read_target(tmp_path / "l", encode(grey[..., 0])), grey[..., :1].repeat(3, -1))
    grey[..., 1] = np.arange(16) % 2 * 255
    (tmp_path / "la").mkdir()
    white = np.where(grey[..., 1:] > 0, grey[..., :1], 255).repeat(3, -1)
    assert np.array_equal(read_target(tmp_path / "la", encode(Image.fromarray(grey, "LA"))), white)


def test_black_and_white(tmp_path: Path) -> None:
    bits = noise(16, 16, 1)[..., 0] > 127
    assert np.array_equal(read_target(tmp_path, encode(Image.fromarray(bits)))[..., 0] > 0, bits)


def test_sixteen_bit_grey_keeps_its_tones(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    assert Image.open(io.BytesIO(encode(ramp))).mode.startswith("I")  # it is the 16-bit case
    target = read_target(tmp_path, encode(ramp))
    assert np.array_equal(target[..., 0].ravel(), np.arange(256))


def test_cmyk(tmp_path: Path) -> None:
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:8, :, 0], ink[8:, :, 1] = 255, 255  # cyan above magenta
    target = read_target(tmp_path, encode(Image.fromarray(ink, "CMYK"), "JPEG", quality=95), "jpg").astype(int)
    assert np.abs(target[2:6] - (0, 255, 255)).max() < 8
    assert np.abs(target[10:14] - (255, 0, 255)).max() < 8


def test_load_image_is_what_the_reader_gives(tmp_path: Path) -> None:
    raw = encode(noise(50, 90, 4))
    file = tmp_path / "x.png"
    file.write_bytes(raw)
    expected = SampleReader(write_folder(tmp_path, [{"target.png": raw}]), Transform(32 * 32, 16)).read(0).target
    assert np.array_equal(load_image(file, Transform(32 * 32, 16)), expected)
    file.write_bytes(raw[:-100])
    with pytest.raises(ValueError, match=r"x\.png: cannot be decoded"):
        load_image(file, Transform(32 * 32, 16))


# -------------------------------------------------------------------------------------------- Kontext's sizes and crops


@pytest.fixture(scope="module")
def released() -> Callable[[tuple[int, int]], tuple[int, int]]:
    """(height, width) that diffusers' FluxKontextPipeline resizes a context image of (height, width) to."""
    from diffusers import FluxKontextPipeline

    class Resized(Exception):
        pass

    def resize(image: Image.Image, height: int, width: int) -> None:
        raise Resized((height, width))

    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    pipeline = FluxKontextPipeline(**dict.fromkeys(parts))
    pipeline.encode_prompt = lambda **options: (None, None, None)
    pipeline.image_processor.resize = resize
    prompt = {"prompt_embeds": torch.zeros(1, 1, 1), "pooled_prompt_embeds": torch.zeros(1, 1)}

    def size(hw: tuple[int, int]) -> tuple[int, int]:
        with pytest.raises(Resized) as resized:
            pipeline(image=Image.new("1", hw[::-1]), **prompt)
        return resized.value.args[0]

    return size


def test_kontext_sizes_are_those_of_the_released_pipeline(
    released: Callable[[tuple[int, int]], tuple[int, int]],
) -> None:
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    assert [hw[::-1] for hw in KONTEXT_HW] == PREFERRED_KONTEXT_RESOLUTIONS
    sizes = np.random.default_rng(0).integers(1, 200, (60, 2)) * 16  # diffusers first floors to multiples of 16
    ties = [(64 * 59, 64 * 64), (64 * 64, 64 * 59)]  # half-way between two ratios, but for rounding
    sizes = np.concatenate([sizes, ties, [(16, 16), (16, 3200), (3200, 16)], KONTEXT_HW])
    assert [tuple(hw) for hw in nearest_kontext_size(sizes).tolist()] == [released(hw) for hw in sizes.tolist()]
    large = sizes[-17:] * 2
    assert np.array_equal(Transform(1 << 20, 16, Resize.kontext).size(large), nearest_kontext_size(large))


def test_kontext_keeps_what_would_have_to_grow_too_much() -> None:
    def size(hw: tuple[int, int], max_upscale: float) -> tuple[int, int]:
        return tuple(Transform(1 << 20, 16, Resize.kontext, max_upscale).size(hw).tolist())

    assert size((1025, 1025), 1) == (1024, 1024)
    assert size((1000, 1000), 1) == (992, 992)  # its own size, as a pixel budget would have it
    assert size((1000, 1000), 1.03) == (1024, 1024)
    assert size((520, 4000), 1) == (368, 2832)  # wide enough, but not high enough for 672
    assert size((520, 4000), 1.3) == (672, 1568)


def test_kontext_sizes_need_tokens_that_divide_them() -> None:
    with pytest.raises(ConfigError, match=r"data\.resize='kontext': needs tokens of 16 pixels"):
        Transform(1 << 20, 32, Resize.kontext)
    with pytest.raises(
        ConfigError, match=r"data\.max_pixels=262144: must be at least 1048576 with data.resize=kontext"
    ):
        DataConfig(resize=Resize.kontext, max_pixels=512 * 512)


@given(st.lists(st.tuples(side, side), min_size=1), st.sampled_from(Resize), st.floats(1, 4))
@settings(max_examples=100, deadline=None)
def test_plan_and_reader_have_one_size(sizes: list[tuple[int, int]], resize: Resize, max_upscale: float) -> None:
    """All at once, as the plan asks, or one by one, as the reader does: the same, and what was encoded stays so."""
    transform = Transform(1 << 20, 16, resize, max_upscale)
    planned = transform.size(np.array(sizes, np.int32))
    assert (planned % 16 == 0).all()
    assert (planned.prod(-1) <= max(1 << 20, max(h * w for h, w in KONTEXT_HW))).all()
    assert planned.tolist() == [transform.size(hw).tolist() for hw in sizes]


@pytest.mark.parametrize("resize", Resize)
def test_images_come_at_the_size_of_the_rule(resize: Resize) -> None:
    transform = Transform(1 << 20, 16, resize, 1.5)
    for hw in ((900, 1000), (1500, 700), (33, 47), (2500, 2600)):
        image = transform.apply(io.BytesIO(encode(Image.new("RGB", hw[::-1]), "JPEG")))
        assert image.shape == (*transform.size(hw).tolist(), 3)


def test_random_crops_belong_to_the_visit_and_keep_edits_aligned(tmp_path: Path) -> None:
    picture = noise(64, 200)
    index = write_folder(tmp_path, [{"target.png": encode(picture), "context.0.png": encode(picture)}])
    reader = SampleReader(index, Transform(64 * 64, 64, crop=Crop.random, seed=3))
    seen = [reader.read(0, visit) for visit in range(8)]
    assert len({sample.target.tobytes() for sample in seen}) == 8
    for sample in seen:
        assert np.array_equal(sample.target, sample.contexts[0])
    assert np.array_equal(reader.read(0, 5).target, seen[5].target)
    other = SampleReader(index, Transform(64 * 64, 64, crop=Crop.random, seed=4)).read(0, 5)
    assert not np.array_equal(other.target, seen[5].target)
    fixed = SampleReader(index, Transform(64 * 64, 64))
    assert np.array_equal(fixed.read(0, 1).target, fixed.read(0, 2).target)


def test_the_background_is_an_option() -> None:
    clear = io.BytesIO(encode(Image.new("RGBA", (16, 16), (9, 9, 9, 0))))
    assert (Transform(1 << 20, 16, background=(255, 0, 7)).apply(clear) == (255, 0, 7)).all()
    with pytest.raises(ConfigError, match=r"data\.background=\[1, 2\]: must be red, green and blue from 0 to 255"):
        DataConfig(background=[1, 2])


# ----------------------------------------------------------------------------------------- decoding large JPEGs smaller


def picture_of(height: int, width: int) -> Image.Image:
    """Detail of all sizes, as photographs have it: noise whose spectrum falls with frequency, and edges."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    spectrum = rng.standard_normal((3, *frequency.shape)) + 1j * rng.standard_normal((3, *frequency.shape))
    waves = np.fft.irfft2(spectrum / frequency**1.2, (height, width))
    waves /= waves.std()
    rows, columns = np.mgrid[:height, :width]
    for y, x, radius in rng.integers(1, min(height, width) // 2, (8, 3)):
        waves[:, (rows - 2 * y) ** 2 + (columns - 2 * x) ** 2 < radius**2] += rng.standard_normal((3, 1))
    return Image.fromarray((waves.transpose(1, 2, 0) * 45 + 128).clip(0, 255).astype(np.uint8))


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio."""
    return 10 * math.log10(255**2 / max(1e-9, ((a.astype(float) - b) ** 2).mean()))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_decoded_smaller_is_the_same_picture(orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encode(picture_of(1000, 1500), "JPEG", quality=92, exif=exif)
    transform = Transform(256 * 256, 16)
    drafted = transform.apply(io.BytesIO(raw))
    monkeypatch.setattr(Image.Image, "draft", lambda *arguments: None)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *arguments: None)
    whole = transform.apply(io.BytesIO(raw))
    assert drafted.shape == whole.shape
    assert not np.array_equal(drafted, whole)  # it was decoded smaller
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))
    bicubic = ImageOps.fit(upright, whole.shape[1::-1], Image.Resampling.BICUBIC)
    assert decibels(drafted, whole) > max(45, decibels(np.asarray(bicubic), whole))  # nearer than another good filter
