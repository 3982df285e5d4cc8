"""The quickstart's scenes as a benchmark in KontextBench's form, with a judge that knows the right answer.

    python -m quickstart.benchmark --out outputs/scenes [--stand-ins outputs/stand_ins]

Stand-ins are models of which it is known how good they are. A metric that does not rank them as it claims to is not to
be trusted: truth gives the right image, copy the context, noise is noise, other is another pair's right image.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kontext_train.data.transforms import Transform
from kontext_train.evaluation.benchmark import Benchmark, read_benchmark
from kontext_train.evaluation.config import MakingConfig
from kontext_train.evaluation.make_images import make_images, request_seed, settings_of
from kontext_train.evaluation.metrics.base import Better, Shown, Unmeasured
from kontext_train.evaluation.metrics.pixels import Pixels
from kontext_train.evaluation.results import open_results
from kontext_train.evaluation.scoring import score, table
from kontext_train.flow.config import SamplerConfig
from kontext_train.generate import Request
from quickstart import scenes, scoring
from quickstart.scenes import COMBINATION_KINDS, EDIT_KINDS, Edit, Example, Kind, Scene, Split

SEED = 1000  # of the benchmark's scenes; training draws its own with another seed and split
TURNS = 6
SCENES = "scenes.jsonl"  # beside metadata.jsonl: what `Exact` judges by
HELD_OUT = "held-out combination"
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
TRANSFORM = Transform(max_pixels=1 << 20, multiple=scenes.CELL_PX)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's scenes as a benchmark")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=512, help="edits; fewer of other kinds")
    parser.add_argument("--chains", type=int, default=128)
    parser.add_argument("--stand-ins", type=Path, help="make and score what models of known quality would")
    arguments = parser.parse_args()
    write_benchmark(arguments.out, arguments.samples, arguments.chains)
    if arguments.stand_ins is not None:
        for kind in StandIn:
            folder = make_stand_in(kind, arguments.out, arguments.stand_ins / kind.value)
            print(table(score(open_results(folder), [Exact(arguments.out), Pixels()])))


# The benchmark --------------------------------------------------------------------------------------------------------


def write_benchmark(folder: Path, samples: int, chains: int, with_context: bool = True) -> None:
    """Edits of every kind, held-out combinations, descriptions (text-to-image), chains of edits.

    with_context=False writes the edits alone and leaves their context images out: nobody can know the answer then.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    found = held_out_examples(Split.HELDOUT_SCENES, samples, EDIT_KINDS)
    named = [(f"{e.edit.kind.value}_{i:04d}", e.edit.kind.value, e) for i, e in enumerate(found)]
    if with_context:
        found = held_out_examples(Split.HELDOUT_COMBINATIONS, samples // 2, COMBINATION_KINDS)
        named += [(f"combination_{i:04d}", f"{e.edit.kind.value}, {HELD_OUT}", e) for i, e in enumerate(found)]
        found = held_out_examples(Split.HELDOUT_SCENES, samples // 4, (Kind.DESCRIBE,))
        named += [(f"describe_{i:04d}", "describe", e) for i, e in enumerate(found)]
    lines = [_pair(folder, key, category, example, with_context) for key, category, example in named]
    judged = [{"key": key, "example": example.to_json()} for key, _, example in named]
    chain_lines = []
    for i, chain in enumerate(held_out_chains(chains, TURNS) if with_context else []):
        key = f"{'home' if chain.home else 'chain'}_{i:04d}"
        chain_lines.append(_chain(folder, key, chain))
        judged += [{"key": f"{key}.turn_{turn}", "example": e.to_json()} for turn, e in enumerate(chain.examples(), 1)]
    categories: dict[str, int] = {}
    for line in lines:
        categories[line["category"]] = categories.get(line["category"], 0) + 1
    declared = {"name": "scenes" if with_context else "scenes without context", "categories": categories}
    (folder / "benchmark.json").write_text(json.dumps(declared, indent=1))
    for name, rows in (("metadata.jsonl", lines), ("chains.jsonl", chain_lines), (SCENES, judged)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def held_out_examples(split: Split, count: int, kinds: Sequence[Kind]) -> list[Example]:
    """Every kind equally often."""
    return [
        scenes.sample_example(scenes.example_rng(SEED, split, i), split, kinds[i % len(kinds)]) for i in range(count)
    ]


@dataclass(frozen=True, slots=True)
class Chain:
    """A scene and the edits to be done on it, one after the other. home: they end where they began."""

    start: Scene
    edits: list[Edit]
    prompts: list[str]
    home: bool

    def truths(self) -> list[Scene]:
        """The start and the right outcome after each turn."""
        result = [self.start]
        for edit in self.edits:
            result.append(scenes.apply_edit(result[-1], edit))
        return result

    def examples(self) -> list[Example]:
        """One a turn."""
        truths = self.truths()
        turns = zip(self.prompts, self.edits, truths, truths[1:], strict=False)
        return [Example(prompt, edit, (before,), after) for prompt, edit, before, after in turns]


def held_out_chains(count: int, turns: int) -> list[Chain]:
    """Every fourth moves things and moves them back."""
    chains = []
    for i in range(count):
        rng = scenes.example_rng(SEED + 1, Split.HELDOUT_SCENES, i)
        home = i % 4 == 3
        start = scenes.sample_scene(rng, columns=scenes.COLUMNS[i % 2])
        while home and not there_and_back(start):
            start = scenes.sample_scene(rng, columns=scenes.COLUMNS[i % 2])
        edits = (there_and_back(start) * turns)[:turns] if home else scenes.sample_chain(rng, start, turns)
        chains.append(Chain(start, edits, [scenes.phrase(edit, rng) for edit in edits], home))
    return chains


def there_and_back(scene: Scene) -> list[Edit]:
    """A move and the move that undoes it, both trained; none where the scene allows none."""
    for edit in scenes.valid_edits(scene, Kind.MOVE):
        back = Edit(Kind.MOVE, edit.shape, edit.colour, OPPOSITE[edit.argument])
        if not scenes.is_held_out(back):
            return [edit, back]
    return []


def _pair(folder: Path, key: str, category: str, example: Example, with_context: bool) -> dict[str, Any]:
    target = scenes.draw(example.target)
    line: dict[str, Any] = {"key": key, "category": category, "instruction": example.prompt}
    line |= {"height": target.shape[0], "width": target.shape[1], "target_caption": caption(example.target)}
    if not (example.contexts and with_context):
        return line  # of text-to-image many images are right, and `Exact` knows them
    first, *others = (_save(folder, f"{key}.{i}", scenes.draw(scene)) for i, scene in enumerate(example.contexts))
    line |= {"file_name": first, "reference_file_names": others, "source_caption": caption(example.contexts[0])}
    line["target_file_name"] = _save(folder, f"{key}.target", target)
    line["mask_file_name"] = _save(folder, f"{key}.mask", changed_cells(example.contexts[0], [example.target]))
    return line


def caption(scene: Scene) -> str:
    """All that it shows, and no places."""
    things = " and ".join(sorted(f"a {thing.colour} {thing.shape}" for thing in scene.things))
    return f"{things} on a {scene.background} background" if things else f"a {scene.background} background"


def _chain(folder: Path, key: str, chain: Chain) -> dict[str, Any]:
    truths = chain.truths()
    targets = [_save(folder, f"{key}.target_{t}", scenes.draw(scene)) for t, scene in enumerate(truths[1:], 1)]
    masks = [
        _save(folder, f"{key}.mask_{t}", changed_cells(chain.start, truths[1 : t + 1])) for t in range(1, len(truths))
    ]
    start = _save(folder, f"{key}.start", scenes.draw(chain.start))
    files = {"file_name": start, "target_file_names": targets, "mask_file_names": masks}
    return {"key": key, "instructions": chain.prompts, "home": chain.home, **files}


def _save(folder: Path, name: str, image_HWC: np.ndarray) -> str:
    Image.fromarray(image_HWC).save(folder / "images" / f"{name}.png")
    return f"images/{name}.png"


def changed_cells(before: Scene, afters: Sequence[Scene]) -> np.ndarray:
    """uint8 [H, W]: 255 in cells where any of the outcomes differs from the scene before."""
    pixels = [scenes.draw(scene) for scene in (before, *afters)]
    mask_HW = np.zeros(pixels[0].shape[:2], np.uint8)
    for row, column in before.cells():
        cell = (
            slice(row * scenes.CELL_PX, (row + 1) * scenes.CELL_PX),
            slice(column * scenes.CELL_PX, (column + 1) * scenes.CELL_PX),
        )
        if any((after[cell] != pixels[0][cell]).any() for after in pixels[1:]):
            mask_HW[cell] = 255
    return mask_HW


# Judging --------------------------------------------------------------------------------------------------------------


class Exact:
    """The quickstart's strict verdict, as a metric: each cell is held against the scene that was asked for."""

    name = "exact"
    workers = 1
    about = "quickstart.scoring"
    numbers: ClassVar[Mapping[str, Better]] = {
        "right": Better.higher,
        "untouched_cell_mae": Better.lower,
        "edited_cell_mae": Better.lower,
    }
    needs: ClassVar[Mapping[str, str]] = {
        "untouched_cell_mae": "a cell that stays as it is",
        "edited_cell_mae": "a cell that changes",
    }

    def __init__(self, benchmark: Path) -> None:
        rows = (json.loads(line) for line in (benchmark / SCENES).read_text().splitlines())
        self.examples = {row["key"]: Example.from_json(row["example"]) for row in rows}

    def measure(self, shown: Shown) -> dict[str, float]:
        try:
            judged = scoring.score_example(np.array(shown.image), self.examples[shown.case.key])
        except ValueError as error:
            raise Unmeasured(str(error)) from error
        errors = {"untouched_cell_mae": judged.untouched_mae, "edited_cell_mae": judged.edited_cell_mae}
        return {"right": float(judged.right), **{k: v for k, v in errors.items() if not np.isnan(v)}}


# Models of known quality ----------------------------------------------------------------------------------------------


class StandIn(StrEnum):
    TRUTH = "truth"
    COPY = "copy"
    NOISE = "noise"
    OTHER = "other"


class StandInModel:
    """Knows a request's case by its seed."""

    pixels_per_token, transform, made_on = scenes.CELL_PX, TRANSFORM, "no machine"

    def __init__(self, kind: StandIn, benchmark: Benchmark, examples: dict[str, Example], seeds: int) -> None:
        self.kind, self.examples = kind, examples
        self.keys = {request_seed(case.key, seed): case.key for case in benchmark for seed in range(seeds)}

    def generate(self, requests: Sequence[Request], sampler: SamplerConfig) -> list[Tensor]:
        return [self._image(request) for request in requests]

    def _image(self, request: Request) -> Tensor:
        key = self.keys[request.seed]
        noise = np.random.default_rng(request.seed).integers(0, 256, (request.height, request.width, 3), np.uint8)
        match self.kind:
            case StandIn.TRUTH:
                return picture(self.examples[key].target)
            case StandIn.COPY:
                return request.contexts[0] if request.contexts else as_tensor(noise)
            case StandIn.NOISE:
                return as_tensor(noise)
            case StandIn.OTHER:
                return picture(self._other(key, request.width).target)
            case _:
                raise ValueError(self.kind)

    def _other(self, key: str, width: int) -> Example:
        """The next of the same size that is not right here, and of no turn of the same chain."""
        keys = list(self.examples)
        start, truth = keys.index(key) + 1, scenes.draw(self.examples[key].target)
        for other in keys[start:] + keys[:start]:
            drawn = scenes.draw(self.examples[other].target)
            if other.split(".")[0] != key.split(".")[0] and drawn.shape[1] == width and (drawn != truth).any():
                return self.examples[other]
        raise ValueError(f"there is no other scene of {width} px")


def make_stand_in(kind: StandIn, benchmark_folder: Path, out: Path, seeds: int = 1) -> Path:
    """A result folder of a stand-in."""
    benchmark = read_benchmark(benchmark_folder)
    making = MakingConfig(seeds=seeds)
    settings = settings_of(kind.value, {"stand_in": kind.value}, benchmark, making)
    model = StandInModel(kind, benchmark, Exact(benchmark_folder).examples, seeds)
    make_images(lambda: model, benchmark, out, settings, making)
    return out


def picture(scene: Scene) -> Tensor:
    return as_tensor(scenes.draw(scene))


def as_tensor(image_HWC: np.ndarray) -> Tensor:
    return torch.from_numpy(image_HWC).permute(2, 0, 1)


if __name__ == "__main__":
    main()
