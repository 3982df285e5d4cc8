"""Models whose quality is known rank as they should on every number that claims to see it.

What this shows: each number gets the pictures, masks and words it should and points the way it says it does. Where it
stands on weights made here (`small_models`), it does not show what the released ones would see: those are ranked by the
same stand-ins on a user's machine, `python -m quickstart.benchmark --stand-ins`.
"""

import base64
import inspect
import io
import json
import pkgutil
import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kontext_train.data.transforms import Transform
from kontext_train.evaluation import metrics as metrics_room
from kontext_train.evaluation.benchmark import Benchmark, Case, read_benchmark
from kontext_train.evaluation.config import MakingConfig, MetricsConfig, VlmConfig
from kontext_train.evaluation.make_images import make_images, request_seed, settings_of
from kontext_train.evaluation.metrics.base import Metric
from kontext_train.evaluation.metrics.build import build_metrics
from kontext_train.evaluation.metrics.clip import ClipEmbedder
from kontext_train.evaluation.metrics.ocr import Ocr
from kontext_train.evaluation.metrics.pixels import Pixels
from kontext_train.evaluation.results import Results, open_results
from kontext_train.evaluation.scoring import score
from kontext_train.evaluation.sets import EDITS, TEXT_TO_IMAGE
from kontext_train.flow.config import SamplerConfig
from kontext_train.generate import Request
from quickstart import scenes
from quickstart.benchmark import Exact, StandIn, as_tensor, held_out_examples, make_stand_in, write_benchmark
from tests.evaluation import small_models
from tests.evaluation.judge import judging

TRUTH, COPY, NOISE, OTHER = StandIn.TRUTH, StandIn.COPY, StandIn.NOISE, StandIn.OTHER
ANSWER = ((TRUTH,), (COPY, NOISE, OTHER))  # knows what was asked for
OUTSIDE = ((TRUTH, COPY), (NOISE, OTHER))  # sees what should have been left alone, and nothing of the edit
NEAR = ((COPY,), (TRUTH,), (NOISE, OTHER))  # how near to the context: a copy is the nearest, right or not
SET = ((TRUTH,), (COPY, OTHER), (NOISE,))  # of images, whoever they answer
RANKS: dict[str, tuple[tuple[StandIn, ...], ...]] = {
    "right": ANSWER,
    "edited_cell_mae": ANSWER,
    "untouched_cell_mae": ANSWER,  # against the right answer's cells: a new background touches all of them
    "target_mae": ANSWER,
    "lpips_target": ANSWER,
    "clip_text": ANSWER,
    "clip_direction": ANSWER,
    "vlm_follows": ANSWER,
    "text_found": ANSWER,
    "text_similarity": ANSWER,
    "untouched_mae": OUTSIDE,
    "untouched_psnr": OUTSIDE,
    "untouched_ssim": OUTSIDE,
    "untouched_colour": OUTSIDE,
    "colour_shift": NEAR,  # of the whole picture, the edit in it
    "lpips_untouched": OUTSIDE,
    "vlm_keeps": OUTSIDE,
    "cycle_mae": OUTSIDE,  # who never leaves is home
    "face_similarity": OUTSIDE,  # another answer has another face
    "face_found": ((TRUTH, COPY, OTHER), (NOISE,)),
    "clip_image": NEAR,
    "dino_image": NEAR,
    "lpips_image": NEAR,
    "aesthetic": ((TRUTH, COPY, OTHER), (NOISE,)),  # of a picture alone
    **{f"{number}_{EDITS}": SET for number in ("fid", "kid", "cmmd")},
    # without a context a copy is noise
    **{f"{number}_{TEXT_TO_IMAGE}": ((TRUTH, OTHER), (COPY, NOISE)) for number in ("fid", "kid", "cmmd")},
}
Ranked = dict[str, dict[StandIn, dict[str, Any]]]  # {number: {model: {category: estimate}}}


def measured(ranked: Ranked, kind: StandIn, results: Results, metrics: Sequence[Metric], *sets: Any) -> dict[str, Any]:
    """Adds what is found; returns the summary."""
    summary = score(results, metrics, *sets)
    for number, found in summary["numbers"].items():
        if found["categories"]:
            ranked.setdefault(number, {})[kind] = found["categories"]
    return summary


@pytest.fixture(scope="module")
def on_scenes(tmp_path_factory: pytest.TempPathFactory) -> Ranked:
    """All numbers that the quickstart's benchmark has."""
    folder = tmp_path_factory.mktemp("scenes")
    places = {name: folder / name for name in ("clip", "dino", "real")}
    for place in places.values():
        place.mkdir()
    write_benchmark(folder / "pairs", samples=20, chains=0)
    write_benchmark(folder / "turns", samples=1, chains=8)
    shutil.copytree(folder / "pairs", folder / "unmasked")
    for file in (folder / "unmasked").rglob("metadata.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        bare = [{name: said for name, said in line.items() if name != "mask_file_name"} for line in lines]
        file.write_text("".join(json.dumps(line) + "\n" for line in bare))
    for i, example in enumerate(held_out_examples(scenes.Split.TRAIN, 40, (scenes.Kind.DESCRIBE,))):
        Image.fromarray(scenes.draw(example.target)).save(places["real"] / f"{i}.png")
    clip = small_models.clip_of_scenes(places["clip"])
    options = MetricsConfig(
        clip=clip,
        dino=small_models.dino(places["dino"]),
        lpips=small_models.alexnet(folder),
        aesthetic=taste(clip, folder),
        inception=small_models.inception(folder),
        cmmd=True,
    )
    metrics, sets = build_metrics(options)
    ranked: Ranked = {}
    for kind in StandIn:
        results = open_results(make_stand_in(kind, folder / "pairs", folder / kind.value))
        own: list[Metric] = [*metrics, Exact(folder / "pairs")]
        summary = measured(ranked, kind, results, own, sets)
        described = {f"{case.key}@0" for case in results.benchmark.pairs if not case.contexts}
        assert summary["numbers"][f"fid_{TEXT_TO_IMAGE}"]["failed"].keys() == described, "there is no right image"
        measured(ranked, kind, results, [], sets, str(places["real"]))
        for number in ("fid", "kid", "cmmd"):  # not those against images of another kind
            ranked[f"{number}_{EDITS}"][kind] = summary["numbers"][f"{number}_{EDITS}"]["categories"]
        turns = open_results(make_stand_in(kind, folder / "turns", folder / f"{kind.value}_turns"))
        cycle = score(turns, [Pixels()])["numbers"]["cycle_mae"]["categories"]
        ranked.setdefault("cycle_mae", {})[kind] = {"all": cycle["turn 6"]}
        unmasked = open_results(make_stand_in(kind, folder / "unmasked", folder / f"{kind.value}_unmasked"))
        shift = score(unmasked, [Pixels()])["numbers"]["colour_shift"]["categories"]
        ranked.setdefault("colour_shift", {})[kind] = shift
    return ranked


def taste(clip: str, folder: Path) -> str:
    """An aesthetic head fitted here to like scenes and not noise."""
    embedder = ClipEmbedder(clip, torch.device("cpu"))
    drawn = [scenes.draw(scenes.sample_scene(np.random.default_rng(i), columns=3)) for i in range(30)]
    pictures = [*map(Image.fromarray, drawn), *(small_models.noise(i, 32, 48) for i in range(30))]
    features = np.stack([np.append(embedder.image(picture), 1) for picture in pictures])
    liked = np.repeat([1.0, 0.0], 30)
    head = np.linalg.solve(features.T @ features + 0.01 * np.eye(features.shape[1]), features.T @ liked)
    head = torch.from_numpy(head).float()
    torch.save({"weight": head[None, :-1], "bias": head[-1:]}, folder / "head.pth")
    return str(folder / "head.pth")


class Known:
    """A stand-in on a benchmark in which every pair has its target."""

    pixels_per_token, transform, made_on = 8, Transform(max_pixels=1 << 20, multiple=8), "no machine"

    def __init__(self, kind: StandIn, benchmark: Benchmark) -> None:
        self.kind, self.cases = kind, list(benchmark)
        self.numbers = {request_seed(case.key, 0): i for i, case in enumerate(self.cases)}

    def generate(self, requests: Sequence[Request], sampler: SamplerConfig) -> list[Tensor]:
        return [self._image(request) for request in requests]

    def _image(self, request: Request) -> Tensor:
        number = self.numbers[request.seed]
        match self.kind:
            case StandIn.COPY:
                return request.contexts[0]
            case StandIn.NOISE:
                return as_tensor(np.array(small_models.noise(number, request.height, request.width)))
            case StandIn.TRUTH | StandIn.OTHER:
                case = self.cases[number if self.kind is TRUTH else (number + 1) % len(self.cases)]
                assert case.target is not None
                return as_tensor(np.array(Image.open(case.target)))


def known_results(folder: Path, kind: StandIn) -> Results:
    benchmark, out, making = read_benchmark(folder), folder.parent / kind.value, MakingConfig(at_once=4)
    settings = settings_of(kind.value, {"stand_in": kind.value}, benchmark, making)
    make_images(lambda: Known(kind, benchmark), benchmark, out, settings, making)
    return open_results(out)


def write_pairs(folder: Path, pairs: Sequence[tuple[str, Image.Image, Image.Image]], category: str) -> Path:
    """A benchmark of (instruction, context, target)."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, (instruction, context, target) in enumerate(pairs):
        names = {"file_name": f"images/{i}.png", "target_file_name": f"images/{i}_target.png"}
        for name, image in zip(names.values(), (context, target), strict=True):
            image.save(folder / name)
        lines.append({"key": str(i), "category": category, "instruction": instruction, **names})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "benchmark.json").write_text(json.dumps({"name": "pairs", "categories": {category: len(lines)}}))
    return folder


@pytest.fixture(scope="module")
def on_portraits(tmp_path_factory: pytest.TempPathFactory) -> Ranked:
    """Faces are kept in other places. Detector and recogniser see patches of red: `small_models.faces`."""
    folder = tmp_path_factory.mktemp("portraits")
    people = [(255, 0, 0), (255, 90, 0), (255, 0, 90), (255, 60, 60)]
    shots = [small_models.portrait(colour) for colour in people]
    elsewhere = [small_models.portrait(colour, around=(0, 40, 90)) for colour in people]
    pairs = [("put this person on a beach", *images) for images in zip(shots, elsewhere, strict=True)]
    benchmark = write_pairs(folder / "benchmark", pairs, "Character Reference")
    models = folder / "models"
    models.mkdir()
    metrics, _ = build_metrics(MetricsConfig(face=small_models.faces(models), pixels=False))
    ranked: Ranked = {}
    for kind in StandIn:
        measured(ranked, kind, known_results(benchmark, kind), metrics)
    return ranked


@pytest.fixture(scope="module")
def on_signs(tmp_path_factory: pytest.TempPathFactory) -> Ranked:
    """Text is replaced. The engine is the released one, with its own weights."""

    def sign(text: str) -> Image.Image:
        image = Image.new("RGB", (160, 160), "white")  # the engine enlarges the shorter side to 736
        ImageDraw.Draw(image).text((20, 50), text, fill="black", font=ImageFont.load_default(44))
        return image

    words = [("OPEN", "SHUT"), ("tea", "cake")]
    pairs = [(f"replace “{old}” with “{new}”", sign(old), sign(new)) for old, new in words]
    benchmark = write_pairs(tmp_path_factory.mktemp("signs") / "benchmark", pairs, "Text Editing")
    engine, ranked = Ocr(), Ranked()
    for kind in StandIn:
        measured(ranked, kind, known_results(benchmark, kind), [engine])
    return ranked


@pytest.fixture(scope="module")
def on_judged(tmp_path_factory: pytest.TempPathFactory) -> Ranked:
    """A judge that looks at the images it was sent: it knows the right one of each context and instruction."""
    folder = tmp_path_factory.mktemp("judged") / "scenes"
    write_benchmark(folder, samples=10, chains=0)
    cases = [case for case in read_benchmark(folder).pairs if case.contexts]
    known = {(case.instruction, pixels(case.contexts[0]).tobytes()): case for case in cases}

    def judged(body: dict[str, Any]) -> str:
        *images, words = body["messages"][0]["content"]
        sent = [pixels(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))) for part in images]
        (case,) = (
            case
            for (instruction, context), case in known.items()
            if f"instruction was: {instruction}\n" in words["text"] and sent[0].tobytes() == context
        )
        return json.dumps({"follows": mark(sent[-1], case.target), "keeps": mark(sent[-1], case.contexts[0], case)})

    def mark(image: np.ndarray, right: Path | None, case: Case | None = None) -> int:
        assert right is not None
        wrong = abs(image.astype(float) - pixels(right)).mean(-1) / 255
        if case is not None and case.mask is not None:
            kept = pixels(case.mask)[..., 0] < 128
            wrong = wrong[kept] if kept.any() else np.zeros(1)
        return round(10 - 10 * min(1.0, 8 * float(wrong.mean())))

    ranked: Ranked = {}
    with judging() as server:
        server.answers = [judged]
        url = f"http://127.0.0.1:{server.server_port}/v1"
        metrics, _ = build_metrics(MetricsConfig(pixels=False, vlm=VlmConfig(url=url, model="judge", retries=0)))
        for kind in StandIn:
            results = open_results(make_stand_in(kind, folder, folder.parent / kind.value))
            for case in results.benchmark.pairs:  # of text-to-image this judge knows nothing
                if not case.contexts:
                    results.image(case.key, 0).unlink()
            summary = measured(ranked, kind, results, metrics)
            assert summary["numbers"]["vlm_follows"]["failed"] == {}
    return ranked


def pixels(file: Any) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


WHERE = {
    **dict.fromkeys(RANKS, "on_scenes"),
    **dict.fromkeys(("face_similarity", "face_found"), "on_portraits"),
    **dict.fromkeys(("text_found", "text_similarity"), "on_signs"),
    **dict.fromkeys(("vlm_follows", "vlm_keeps"), "on_judged"),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", RANKS)
def test_models_of_known_quality_rank_as_they_should(number: str, request: pytest.FixtureRequest) -> None:
    ranked: Ranked = request.getfixturevalue(WHERE[number])
    sign = 1 if better(number) == "higher" else -1
    found = {kind: sign * ranked[number][kind]["all"]["value"] for kind in StandIn}
    for i, group in enumerate(RANKS[number]):
        for worse in (kind for later in RANKS[number][i + 1 :] for kind in later):
            assert min(found[kind] for kind in group) > found[worse], (group, worse, found)
    told = [ranked[number][kind]["all"] for kind in StandIn]
    for estimate in told:  # each has an interval, where there are base images enough
        assert estimate["low"] is None or estimate["low"] <= estimate["value"] <= estimate["high"]


def better(number: str) -> str:
    for given in all_numbers():
        if number in given:
            return given[number]
    raise KeyError(number)


def all_numbers() -> list[dict[str, str]]:
    """Of every class in evaluation/metrics that has numbers, and of the quickstart's own; sets' for both kinds."""
    found = [{number: way.value for number, way in Exact.numbers.items()}]
    for module in pkgutil.iter_modules(metrics_room.__path__):
        for _, kind in inspect.getmembers(import_module(f"{metrics_room.__name__}.{module.name}"), inspect.isclass):
            if not isinstance(getattr(kind, "numbers", None), dict):
                continue
            ends = ("",) if hasattr(kind, "measure") else (f"_{EDITS}", f"_{TEXT_TO_IMAGE}")
            found.append({f"{number}{end}": way.value for number, way in kind.numbers.items() for end in ends})
    return found


def test_no_number_is_without_a_rank() -> None:
    assert {number for given in all_numbers() for number in given} == RANKS.keys()


@pytest.mark.slow
def test_what_cannot_see_an_edit_does_not_reward_it(on_scenes: Ranked) -> None:
    for number in ("untouched_mae", "untouched_psnr", "untouched_ssim", "untouched_colour", "lpips_untouched"):
        truth, copy = (on_scenes[number][kind]["all"]["value"] for kind in (TRUTH, COPY))
        assert truth == pytest.approx(copy, abs=1e-6), number
    for number, best in (("clip_image", 1), ("dino_image", 1), ("lpips_image", 0)):
        assert on_scenes[number][COPY]["all"]["value"] == pytest.approx(best, abs=1e-6), "a copy is its context"


@pytest.mark.slow
@pytest.mark.parametrize("number", ["fid", "kid", "cmmd"])
def test_sets_are_ranked_by_category_too(on_scenes: Ranked, number: str) -> None:
    found = on_scenes[f"{number}_{EDITS}"]
    categories = {kind.value for kind in scenes.EDIT_KINDS}
    assert found[TRUTH].keys() >= categories | {"all"}
    assert "describe" not in found[TRUTH], "text-to-image is no edit"
    assert on_scenes[f"{number}_{TEXT_TO_IMAGE}"][TRUTH].keys() == {"all"}
    for category in categories:
        assert found[TRUTH][category]["value"] < found[NOISE][category]["value"], category
    if number != "kid":  # unbiased, so below 0 for one set twice
        assert found[TRUTH]["all"]["value"] == pytest.approx(0, abs=1e-6)
