"""Every metric against code we did not write or numbers known beforehand, with models small enough to make here."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.functional.image.lpips import _LPIPS
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer, Dinov2Model

from kontext_train.errors import ConfigError
from kontext_train.evaluation.benchmark import Case
from kontext_train.evaluation.config import MetricsConfig, VlmConfig
from kontext_train.evaluation.metrics import distribution
from kontext_train.evaluation.metrics.base import LeftOut, Shown, Unmeasured
from kontext_train.evaluation.metrics.build import build_metrics
from kontext_train.evaluation.metrics.clip import Aesthetic, Clip, ClipEmbedder
from kontext_train.evaluation.metrics.dino import Dino
from kontext_train.evaluation.metrics.face import TEMPLATE, Face, aligned
from kontext_train.evaluation.metrics.lpips import Lpips
from kontext_train.evaluation.metrics.ocr import Ocr, compared, expected_texts
from kontext_train.evaluation.metrics.pixels import Pixels
from kontext_train.evaluation.metrics.vlm import Vlm
from kontext_train.evaluation.results import open_results
from kontext_train.evaluation.scoring import score
from tests.evaluation import small_models
from tests.evaluation.cases import Inverter, benchmark, line, make
from tests.evaluation.judge import Judge, judging
from tests.evaluation.small_models import FACE_AT, LANDMARKS, noise, portrait

CPU = torch.device("cpu")
META = {"format": "pt"}  # transformers asks for it


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_models.alexnet(tmp_path_factory.mktemp("alexnet"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_models.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_models.dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_models.faces(tmp_path_factory.mktemp("faces"))


@pytest.fixture
def judge() -> Iterator[Judge]:
    with judging() as server:
        yield server


def shown(folder: Path, image: Image.Image, **of: Any) -> Shown:
    """A made image with a case of images and words."""
    image.save(folder / "made.png")
    known: dict[str, Any] = {"key": "k", "category": "hats", "instruction": "add a hat"}
    for name, value in of.items():
        if isinstance(value, Image.Image):
            file = folder / f"{name}.png"
            value.save(file)
            known |= {"contexts": (file,)} if name == "context" else {name: file}
        else:
            known[name] = value
    return Shown(Case(**{"contexts": (), **known}), 0, folder / "made.png")


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None]


# Pixels ---------------------------------------------------------------------------------------------------------------


def left_half(image: Image.Image) -> Image.Image:
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, image.width // 2, image.height))
    return mask


def test_psnr_and_ssim_are_torchmetrics_where_nothing_is_masked(tmp_path: Path) -> None:
    context = noise(0)
    image = Image.blend(context, noise(1), 0.3)
    found = Pixels().measure(shown(tmp_path, image, context=context, mask=Image.new("L", image.size)))
    a, b = tensor(image), tensor(context)
    assert found["untouched_psnr"] == pytest.approx(float(peak_signal_noise_ratio(a, b, data_range=1.0)), abs=1e-3)
    expected = float(structural_similarity_index_measure(a, b, data_range=1.0))
    assert found["untouched_ssim"] == pytest.approx(expected, abs=0.01), "torchmetrics' mean leaves the border out"
    assert found["untouched_mae"] == pytest.approx(float((a - b).abs().mean()), abs=1e-6)


def test_only_what_is_outside_the_mask_counts(tmp_path: Path) -> None:
    context = noise(0)
    mask = left_half(context)
    edited = Image.composite(noise(1), context, mask)
    found = Pixels().measure(shown(tmp_path, edited, context=context, mask=mask))
    assert (found["untouched_mae"], found["untouched_psnr"], found["untouched_colour"]) == (0, 100, 0)
    assert found["untouched_ssim"] == pytest.approx(1)
    spilt = edited.copy()
    spilt.putpixel((100, 50), (0, 0, 0))
    found = Pixels().measure(shown(tmp_path, spilt, context=context, mask=mask))
    assert found["untouched_mae"] > 0
    assert found["untouched_psnr"] < 60
    assert found["untouched_ssim"] < 1


def test_what_a_case_lacks_is_left_out(tmp_path: Path) -> None:
    everything = Image.new("L", (128, 96), 255)
    assert Pixels().measure(shown(tmp_path, noise(0))) == {}
    assert Pixels().measure(shown(tmp_path, noise(0), context=noise(1), mask=everything)) == {}
    assert set(Pixels().measure(shown(tmp_path, noise(0), context=noise(1)))) == {"colour_shift"}
    grey = Image.new("RGB", (128, 96), (100, 100, 100))
    warm = Image.new("RGB", (128, 96), (151, 100, 100))  # 0.2 more red
    found = Pixels().measure(shown(tmp_path, warm, context=grey, target=grey, home=True))
    assert found["colour_shift"] == pytest.approx(0.2, abs=1e-3)
    assert found["target_mae"] == found["cycle_mae"] == pytest.approx(0.2 / 3, abs=1e-6)


def test_a_context_is_cut_as_a_run_cuts_it(tmp_path: Path) -> None:
    """A run trims a context to whole tokens around its centre: no metric may see a shift in that."""
    wide = noise(0, 96, 131)
    made = wide.crop((1, 0, 129, 96))
    found = Pixels().measure(shown(tmp_path, made, context=wide, mask=Image.new("L", wide.size)))
    assert found["untouched_mae"] < 0.2
    shifted = wide.crop((3, 0, 131, 96))
    assert (
        Pixels().measure(shown(tmp_path, shifted, context=wide, mask=Image.new("L", wide.size)))["untouched_mae"] > 0.3
    )


def test_a_file_that_cannot_be_decoded_is_unmeasured(tmp_path: Path) -> None:
    case = shown(tmp_path, noise(0))
    (tmp_path / "made.png").write_bytes(b"no picture")
    with pytest.raises(Unmeasured, match=r"made\.png cannot be decoded"):
        Pixels().measure(case)


# LPIPS ----------------------------------------------------------------------------------------------------------------


def test_lpips_is_torchmetrics(alexnet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Lpips(alexnet, CPU)
    # torchmetrics takes its backbone from torchvision; it gets the same layers from us, the rest is its own.
    monkeypatch.setattr("torchmetrics.functional.image.lpips._get_tv_model_features", lambda *_: own.features)
    theirs = _LPIPS(pretrained=True, net="alex", eval_mode=True)
    a, b = noise(0), Image.blend(noise(0), noise(1), 0.5)
    expected = float(theirs(tensor(a) * 2 - 1, tensor(b) * 2 - 1))
    assert expected > 1e-3
    assert own.distance(a, b) == pytest.approx(expected, rel=1e-3)
    assert own.distance(a, a) == 0


def test_masked_lpips_sees_nothing_of_the_edit(alexnet: str, tmp_path: Path) -> None:
    context = noise(0)
    mask = left_half(context)
    found = Lpips(alexnet, CPU).measure(
        shown(tmp_path, Image.composite(noise(1), context, mask), context=context, mask=mask, target=context)
    )
    assert found["lpips_untouched"] == 0
    assert found["lpips_image"] == found["lpips_target"] > 0
    small = Lpips(alexnet, CPU).measure(shown(tmp_path, noise(0, 32, 32), context=noise(1, 32, 32)))
    assert small["lpips_image"] > 0, "small pictures are enlarged, not refused"


# CLIP and DINO --------------------------------------------------------------------------------------------------------


def test_clip_embeddings_are_the_models_own(clip: str) -> None:
    embedder, image = ClipEmbedder(clip, CPU), noise(0)
    model = CLIPModel.from_pretrained(clip).eval()
    tokens = CLIPTokenizer.from_pretrained(clip)(["recolour the red circle"], return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(clip)(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(input_ids=tokens["input_ids"], pixel_values=pixels)
    np.testing.assert_allclose(embedder.image(image), expected.image_embeds[0], atol=1e-5)
    np.testing.assert_allclose(embedder.text("recolour the red circle"), expected.text_embeds[0], atol=1e-5)
    assert len(embedder.text("red " * 100)) == 16, "long prompts are cut, not refused"


def test_clip_numbers_are_cosines_of_what_they_say(clip: str, tmp_path: Path) -> None:
    metric = Clip(ClipEmbedder(clip, CPU))
    image, context = noise(0), noise(1)
    embed = metric.embedder
    captions = {"source_caption": "red circle", "target_caption": "blue circle"}
    found = metric.measure(shown(tmp_path, image, context=context, **captions))
    a, b, words = embed.image(image), embed.image(context), embed.text("blue circle") - embed.text("red circle")
    assert found["clip_image"] == pytest.approx(float(a @ b), abs=1e-5)
    assert found["clip_text"] == pytest.approx(float(a @ embed.text("blue circle")), abs=1e-5)
    direction = torch.cosine_similarity(torch.tensor(a - b), torch.tensor(words), dim=0)
    assert found["clip_direction"] == pytest.approx(float(direction), abs=1e-4)
    alone = metric.measure(shown(tmp_path, image, instruction="red circle"))
    assert alone == {"clip_text": pytest.approx(float(a @ embed.text("red circle")), abs=1e-5)}
    assert metric.measure(shown(tmp_path, context, context=context))["clip_image"] == pytest.approx(1)
    same = {"source_caption": "red circle", "target_caption": "red circle"}
    assert "clip_direction" not in metric.measure(shown(tmp_path, image, context=context, **same)), "no direction"


def test_the_aesthetic_head_is_its_linear_layers(clip: str, tmp_path: Path) -> None:
    embedder = ClipEmbedder(clip, CPU)
    mlp = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.2), nn.Linear(8, 1)).eval()  # as LAION's: no activations
    file = tmp_path / "head.pth"
    torch.save({f"layers.{name}": value for name, value in mlp.state_dict().items()}, file)
    expected = mlp(torch.from_numpy(embedder.image(noise(0)))).item()
    found = Aesthetic(embedder, str(file)).measure(shown(tmp_path, noise(0)))
    assert found == {"aesthetic": pytest.approx(expected, abs=1e-5)}
    torch.save(nn.Linear(768, 1).state_dict(), file)
    with pytest.raises(ConfigError, match=r"takes embeddings of 768 numbers, and metrics\.clip gives 16"):
        Aesthetic(embedder, str(file))


def test_dino_compares_class_tokens(dino: str, tmp_path: Path) -> None:
    model, processor = Dinov2Model.from_pretrained(dino).eval(), CLIPImageProcessor.from_pretrained(dino)
    metric = Dino(dino, CPU)
    a, b = noise(0), noise(1)
    with torch.no_grad():
        pooled = [model(processor(images=i, return_tensors="pt")["pixel_values"]).pooler_output[0] for i in (a, b)]
    expected = float(torch.cosine_similarity(*pooled, dim=0))
    assert metric.measure(shown(tmp_path, a, context=b)) == {"dino_image": pytest.approx(expected, abs=1e-5)}
    assert metric.measure(shown(tmp_path, a, context=a)) == {"dino_image": pytest.approx(1)}
    assert metric.measure(shown(tmp_path, a)) == {}


@pytest.mark.parametrize("key", ["clip", "dino"])
def test_weights_are_whole_or_refused(key: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = tmp_path / key
    shutil.copytree(request.getfixturevalue(key), folder)
    options = MetricsConfig(**{key: str(folder)})
    (_, metric), _ = build_metrics(options)
    state = load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (_, same), _ = build_metrics(options)
    assert len({metric.about, same.about}) == 2, "the digest is of the file that is there"
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match=rf"metrics\.{key}=.*: it holds no weights"):
        build_metrics(options)
    lost = sorted(state)[-1]
    save_file({name: value for name, value in state.items() if name != lost}, folder / "model.safetensors", META)
    with pytest.raises(ConfigError, match=rf"its weights lack 1 tensors \({re.escape(lost)}\)"):
        build_metrics(options)
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        build_metrics(options)


# Distances between sets -----------------------------------------------------------------------------------------------


class Columns(nn.Module):
    """Features that torchmetrics and we can both be given: the image's own pixels."""

    num_features = 12

    def forward(self, images: torch.Tensor, return_features: bool = True) -> torch.Tensor:
        return images.reshape(images.shape[0], -1).to(torch.float64) / 64


def sets(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 200, (count, 3, 2, 2), generator=generator, dtype=torch.uint8)
    return real, torch.randint(40, 256, (count - 10, 3, 2, 2), generator=generator, dtype=torch.uint8)


def test_fid_and_kid_are_torchmetrics() -> None:
    real, made = sets(60)
    a, b = (Columns()(x).numpy() for x in (made, real))
    fid = FrechetInceptionDistance(feature=Columns())
    fid.set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=Columns(), subsets=1, subset_size=50)
    for metric in (fid, kid):
        metric.update(real[:50], real=True)
        metric.update(made, real=False)
    assert distribution.frechet(a, b[:50]) == pytest.approx(float(fid.compute()), rel=1e-4)
    assert distribution.kernel_distance(a, b[:50]) == pytest.approx(float(kid.compute()[0]), rel=1e-4)
    assert distribution.frechet(a, a) == pytest.approx(0, abs=1e-9)
    few = distribution.frechet(a[:5], b)  # fewer images than features
    assert np.isfinite(few)
    assert few > 0


def test_cmmd_is_the_mmd_of_its_kernel() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 4)), rng.normal(1, 1, size=(9, 4))

    def mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean([np.exp(-((p - q) ** 2).sum() / 200) for p in x for q in y]))

    expected = 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
    assert distribution.gaussian_distance(a, b) == pytest.approx(expected)
    assert distribution.gaussian_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_inception_is_a_torchscript_file(tmp_path: Path) -> None:
    torch.jit.script(Columns()).save(str(tmp_path / "inception.pt"))
    metric = distribution.Inception(str(tmp_path / "inception.pt"), CPU)
    image = noise(0, 2, 2)
    np.testing.assert_allclose(metric.feature(image), np.asarray(image).transpose(2, 0, 1).reshape(-1) / 64)
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"metrics\.inception=.*is no TorchScript file"):
        distribution.Inception(str(tmp_path / "broken.pt"), CPU)


# Faces ----------------------------------------------------------------------------------------------------------------


def test_landmarks_are_where_the_detector_puts_them(faces: str) -> None:
    metric = Face(faces)
    found = metric.landmarks(portrait((255, 0, 0)))
    np.testing.assert_allclose(found, (np.array(FACE_AT) * 16 + LANDMARKS * 16) / 2, atol=1e-4)
    assert metric.landmarks(portrait((0, 0, 255))) is None


def test_similarity_is_of_the_face_and_a_lost_face_counts(faces: str, tmp_path: Path) -> None:
    metric = Face(faces)
    red, orange, blue = (portrait(colour) for colour in ((255, 0, 0), (255, 60, 0), (0, 0, 255)))
    same = metric.measure(shown(tmp_path, red, context=red))
    assert same == {"face_similarity": pytest.approx(1), "face_found": 1.0}
    other = metric.measure(shown(tmp_path, orange, context=red))
    a, b = np.array([1, 60 / 127.5 - 1, -1]), np.array([1, -1, -1])
    assert other["face_similarity"] == pytest.approx(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), abs=2e-2)
    assert metric.measure(shown(tmp_path, blue, context=red)) == {"face_similarity": 0.0, "face_found": 0.0}
    with pytest.raises(LeftOut, match="its context shows no face"):
        metric.measure(shown(tmp_path, red, context=blue))


def test_alignment_undoes_a_turn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    face = Image.fromarray(rng.integers(0, 256, (14, 14, 3), np.uint8)).resize((112, 112), Image.Resampling.BICUBIC)
    angle, scale, shift = 0.5, 1.7, np.array([120.0, 40.0])
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    back = np.linalg.inv(turn)
    rows = np.concatenate([back, (-back @ shift)[:, None]], 1).reshape(-1)
    scene = face.transform((320, 320), Image.Transform.AFFINE, tuple(rows), Image.Resampling.BICUBIC)
    found = aligned(scene, TEMPLATE @ turn.T + shift)
    inner = (slice(20, 92), slice(20, 92))
    difference = abs(np.asarray(found, float)[inner] - np.asarray(face, float)[inner]).mean()
    assert difference < 4
    wrong = aligned(scene, TEMPLATE @ turn.T + shift + 15)
    assert abs(np.asarray(wrong, float)[inner] - np.asarray(face, float)[inner]).mean() > 3 * difference


def test_a_face_folder_must_have_both_models(tmp_path: Path, faces: str) -> None:
    shutil.copy(Path(faces) / "scrfd_test.onnx", tmp_path)
    with pytest.raises(ConfigError, match=r"metrics\.face=.*must hold one of glintr\*\.onnx .* and holds 0"):
        Face(str(tmp_path))
    (tmp_path / "glintr.onnx").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"is no ONNX model that runs here"):
        Face(str(tmp_path))


# Text -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_text_is_read(tmp_path: Path) -> None:
    def sign(text: str) -> Image.Image:
        image = Image.new("RGB", (160, 160), "white")  # the engine enlarges the shorter side to 736
        ImageDraw.Draw(image).text((10, 20), text, fill="black", font=ImageFont.load_default(36))
        return image

    engine = Ocr()
    right = engine.measure(shown(tmp_path, sign("OPEN\nLATE"), text="Open late"))
    assert right == {"text_found": 1.0, "text_similarity": pytest.approx(1.0)}
    wrong = engine.measure(shown(tmp_path, sign("CLOSED"), text="Open late"))
    assert wrong["text_found"] == 0
    assert wrong["text_similarity"] < 0.6
    assert engine.measure(shown(tmp_path, sign("OPEN"))) == {}


def test_text_may_stand_among_other_text_and_over_lines() -> None:
    assert compared(["open late"], ["CAFE", "Open", "LATE", "since 1999"]) == {
        "text_found": 1.0,
        "text_similarity": 1.0,
    }
    assert compared(["open late"], []) == {"text_found": 0.0, "text_similarity": 0.0}
    both = compared(["open late", "closed"], ["open late"])
    assert both == {"text_found": 0.0, "text_similarity": pytest.approx(0.5, abs=0.3)}
    near = compared(["open late"], ["0pen late"])
    assert near == {"text_found": 0.0, "text_similarity": pytest.approx(8 / 9)}


@pytest.mark.parametrize(
    ("instruction", "texts"),
    [
        ('Replace "joy" with "BFL"', ("BFL",)),
        ("change the sign to 'It's open'.", ("It's open",)),
        ("make the shirt say “hello world”!", ("hello world",)),
        ("Change “A” to “B” and make it red", ("B",)),
        ("Make it say ‘Late’ instead of ‘Early’", ("Late",)),
        ('replace «un» with «deux» and "x" with "y"', ("deux", "y")),
        ("Write „Guten Tag“ above the door", ("Guten Tag",)),
        ('Add "Z" next to "Y"', ("Z",)),
        ("Delete 'X' and write 'W' in its place", ("W",)),
        ("make the word 'HELLO' bold", None),
        ('Remove the sign that says "STOP"', None),
        ('Remove the sign with the word "STOP"', None),
        ('Erase the text saying "SALE"', None),
        ('Change the sign that says "STOP" to "GO"', ("GO",)),
        ('Change the sign that says "STOP" to say "GO"', ("GO",)),
        ('Replace the text saying "A" with "B"', ("B",)),
        ('Get rid of "X"', None),
        ('Hide the label "X"', None),
        ('Cross out "X"', None),
        ('Cross the word "X" out', None),
        ('Cover up the word "X"', None),
        ('Omit "X" and "Y"', None),
        ('Clear the board reading "X"', None),
        ('Strip "X" from the shirt', None),
        ("Don't write 'X'", None),
        ('Translate "Bonjour" into English', None),
        ('Translate "Bonjour" to "Hello"', ("Hello",)),
        ('Fix the typo in "Recieve"', None),
        ('Write "A" and "B"', ("A", "B")),
        ('Write "A", "B" and "C"', ("A", "B", "C")),
        ('Change "A" and "B" to "C" and "D"', ("C", "D")),
        ('Change "A" to "B" and the word "C" to "D"', ("B", "D")),
        ('Make the "STOP" sign say "GO"', ("GO",)),
        ('Add a sign that says "HI"', ("HI",)),
        ('Add "NEW" next to the sign saying "OLD"', ("NEW",)),
        ('The sign should read "OPEN"', ("OPEN",)),
        ('Change the word next to "A" to "B"', ("B",)),
        ('Delete "A" so that it says "B"', ("B",)),
        ('Write "A" but keep "C"', ("A",)),
        ('change the text: "sale" -> "sold"', ("sold",)),
        ('remove the text "joy"', None),
        ('change "A" into a heart', None),
        ("make the letters gold", None),
        ("don't touch the dog's sign", None),
    ],
)
def test_the_text_asked_for_is_what_the_instruction_quotes_as_new(
    instruction: str, texts: tuple[str, ...] | None
) -> None:
    assert expected_texts(Case("k", "Text Editing", instruction, ())) == texts
    assert expected_texts(Case("k", "Style Reference", instruction, ())) == (), "elsewhere a quote is no order"
    assert expected_texts(Case("k", "Style Reference", instruction, (), text="told")) == ("told",)
    assert expected_texts(Case("k", "Text Editing", instruction, (), text="")) == (), "metadata says that there is none"


def test_an_instruction_without_its_text_is_named_and_counted(tmp_path: Path) -> None:
    rows = [line(0, "Text Editing", instruction="remove the text"), line(1, "Text Editing", instruction="say 'no'")]
    make(Inverter(), benchmark(tmp_path / "b", [*rows, line(2)]), tmp_path / "out")
    engine = Ocr.__new__(Ocr)  # without its models
    engine.read = lambda image: ["NO"]  # type: ignore[method-assign]
    found = score(open_results(tmp_path / "out"), [engine])["numbers"]["text_found"]
    assert list(found["left_out"]) == ["0000@0", "0002@0"]
    assert "puts no new text in quotes; `text` in metadata.jsonl can say what it is" in found["left_out"]["0000@0"]
    assert found["categories"]["all"]["n"] == 1
    assert found["failed"] == {}


# A judge --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(judge: Judge, tmp_path: Path) -> Callable[..., dict[str, float]]:
    metric = Vlm(VlmConfig(url=f"http://127.0.0.1:{judge.server_port}/v1/", model="judge-1", retries=2))
    metric.backoff_s = 0.0

    def asked(*answers: str | int, **of: Any) -> dict[str, float]:
        judge.answers = list(answers)
        return metric.measure(shown(tmp_path, noise(0), **of))

    return asked


def test_a_judge_sees_both_images_and_its_marks_are_taken(
    ask: Callable[..., dict[str, float]], judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    found = ask('Here you are:\n```json\n{"follows": 7, "keeps": 10}\n```', context=noise(1))
    assert found == {"vlm_follows": 0.7, "vlm_keeps": 1.0}
    body, key = judge.requests[0]
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert (body["model"], key, kinds) == ("judge-1", "Bearer secret", ["image_url", "image_url", "text"])
    assert "add a hat" in body["messages"][0]["content"][-1]["text"]
    last = ask('I weigh {as asked} {"follows": 1, "keeps": 1}. No: {"follows": 4, "keeps": 5} {so}', context=noise(1))
    assert last == {"vlm_follows": 0.4, "vlm_keeps": 0.5}
    judge.requests.pop()
    assert ask('{"follows": 3}') == {"vlm_follows": 0.3}, "without a context there is nothing to keep"
    assert [part["type"] for part in judge.requests[1][0]["messages"][0]["content"]] == ["image_url", "text"]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["I would say seven."], r"gave no JSON object: 'I would say seven\.'"),
        (['{"follows": 7}'], r"the judge's keeps is None, not a number from 0 to 10"),
        (['{"follows": 11, "keeps": 1}'], r"the judge's follows is 11"),
        (['{"follows": true, "keeps": 1}'], r"the judge's follows is True"),
        ([401], r"does not answer \(HTTP 401\)"),
        ([503, 503, 503], r"does not answer \(HTTP 503\)"),
        (["cut", "cut", "cut"], r"does not answer \(IncompleteRead"),
        (["no status", "no status", "no status"], r"does not answer \(BadStatusLine"),
    ],
)
def test_an_answer_that_is_none_is_told(
    ask: Callable[..., dict[str, float]], judge: Judge, answers: list[str | int], message: str
) -> None:
    with pytest.raises(Unmeasured, match=message):
        ask(*answers, context=noise(1))
    assert len(judge.requests) == len(answers), "only what may pass is asked again"


def test_a_busy_judge_is_asked_again(ask: Callable[..., dict[str, float]], judge: Judge) -> None:
    assert ask(503, 429, '{"follows": 1, "keeps": 2}', context=noise(1)) == {"vlm_follows": 0.1, "vlm_keeps": 0.2}
    judge.shutdown()
    judge.server_close()
    with pytest.raises(Unmeasured, match=r"does not answer \(\w+"):
        ask("{}", context=noise(1))


def test_a_judge_that_is_silent_is_not_waited_for(judge: Judge, tmp_path: Path) -> None:
    config = VlmConfig(url=f"http://127.0.0.1:{judge.server_port}/v1", model="judge-1", retries=0, timeout_s=0.2)
    judge.answers = ["nothing"]
    with pytest.raises(Unmeasured, match=r"does not answer \(TimeoutError"):
        Vlm(config).measure(shown(tmp_path, noise(0)))


# What is not there ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["clip", "dino", "aesthetic", "lpips", "face", "inception", "references"])
def test_an_absent_model_is_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"metrics\.{key}='/nowhere': is not there\. Put it there, or leave"):
        MetricsConfig(**{key: "/nowhere"})


def test_a_folder_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"nothing")
    for key, given in (("clip", tmp_path), ("dino", tmp_path), ("lpips", tmp_path / "weights.pth")):
        with pytest.raises(ConfigError, match=rf"metrics\.{key}="):
            build_metrics(MetricsConfig(**{key: str(given)}))
    with pytest.raises(ConfigError, match=r"metrics\.aesthetic=.*: is no file"):
        Aesthetic(None, str(tmp_path))  # type: ignore[arg-type]


def test_what_needs_another_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.cmmd=True: is a function of CLIP's embeddings"):
        MetricsConfig(cmmd=True)
    with pytest.raises(ConfigError, match=r"metrics\.references=.*has no effect without"):
        MetricsConfig(references=str(tmp_path))
    with pytest.raises(ConfigError, match=r"metrics\.vlm\.model='': must be given with metrics\.vlm\.url"):
        VlmConfig(url="http://localhost/v1")
    with pytest.raises(ConfigError, match=r"metrics\.vlm\.model='m': has no effect without metrics\.vlm\.url"):
        VlmConfig(model="m")
    with pytest.raises(ConfigError, match=r"measures nothing"):
        build_metrics(MetricsConfig(pixels=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000/v1"}, r"metrics\.vlm\.url='localhost:8000/v1': must be an HTTP address"),
        ({"url": "http://"}, r"metrics\.vlm\.url='http://': must be an HTTP address"),
        ({"url": "http://host:port/v1"}, r"metrics\.vlm\.url=.*must be an HTTP address"),
        ({"url": "https://host/v1?key=1"}, r"metrics\.vlm\.url=.*without a user or a query"),
        ({"url": "https://me:key@host/v1"}, r"metrics\.vlm\.url=.*without a user or a query"),
        ({"timeout_s": 0.0}, r"metrics\.vlm\.timeout_s=0\.0: must be a number of at least"),
        ({"timeout_s": float("nan")}, r"metrics\.vlm\.timeout_s=nan"),
        ({"retries": -1}, r"metrics\.vlm\.retries=-1: must be a number of at least 0"),
        ({"concurrency": 0}, r"metrics\.vlm\.concurrency=0: must be a number of at least 1"),
        ({"key_variable": "NO_SUCH_KEY"}, r"metrics\.vlm\.key_variable='NO_SUCH_KEY': is not set.*export NO_SUCH_KEY"),
    ],
)
def test_a_judge_is_checked_before_it_is_asked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VlmConfig(**{"url": "https://host:8000/v1", "model": "m", **options})


def test_a_judges_key_is_the_environments(
    ask: Callable[..., dict[str, float]], judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "mine")
    url = f"http://127.0.0.1:{judge.server_port}/v1"
    judge.answers = ['{"follows": 3}']
    metric = Vlm(VlmConfig(url=url, model="m", key_variable="MY_KEY"))
    metric.measure(shown(tmp_path, noise(0)))
    assert judge.requests[-1][1] == "Bearer mine"
    assert "mine" not in metric.about
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    ask('{"follows": 3}')
    assert judge.requests[-1][1] is None


def test_a_missing_package_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    monkeypatch.delitem(sys.modules, "kontext_train.evaluation.metrics.ocr")
    with pytest.raises(ConfigError, match=r'metrics\.ocr=True: needs a package .*pip install "kontext-train\[eval\]"'):
        build_metrics(MetricsConfig(ocr=True))


def test_all_that_is_asked_for_is_built(clip: str, alexnet: str, faces: str) -> None:
    metrics, found = build_metrics(MetricsConfig(clip=clip, lpips=alexnet, face=faces, cmmd=True))
    assert [metric.name for metric in metrics] == ["pixels", "clip", "lpips", "face"]
    assert [metric.name for metric in found] == ["cmmd"]
    assert all(metric.about for metric in (*metrics, *found))
    assert os.path.basename(clip) in metrics[1].about
