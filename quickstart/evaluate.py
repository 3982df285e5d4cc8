"""Judge a quickstart run by rendering the truth: summary.json, edits.png and multi_turn.png.

python -m quickstart.evaluate --run outputs/quickstart/run --out outputs/quickstart
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kontext_train.evaluation.trained import Trained, load_trained
from kontext_train.flow.config import SamplerConfig
from kontext_train.generate import Request
from kontext_train.training.metrics import read_metrics
from kontext_train.training.pictures import save_grid
from quickstart import scenes, scoring
from quickstart.scenes import EDIT_KINDS, Edit, Example, Kind, Scene, Split

SEED = 1000  # of the evaluation's scenes; training draws its own with another seed and split
AT_ONCE = 64  # images sampled in one packed sequence
SAMPLER = SamplerConfig(steps=8)


@dataclass
class Chain:
    """A scene and the edits to be done on it, one after the other."""

    start: Scene
    edits: list[Edit]
    prompts: list[str]

    def truths(self) -> list[Scene]:
        """The start and the right outcome after each turn."""
        result = [self.start]
        for edit in self.edits:
            result.append(scenes.apply_edit(result[-1], edit))
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a quickstart run against rendered truth")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--chains", type=int, default=128)
    arguments = parser.parse_args()
    summary = evaluate(arguments.run, arguments.out, arguments.samples, arguments.chains)
    for name, value in summary.items():
        print(f"  {name:38} {value:,.4g}")


def evaluate(run: Path, out: Path, samples: int, chains: int) -> dict[str, float]:
    """Writes summary.json and the pictures into `out`; returns the summary."""
    torch.manual_seed(0)
    trained = load_trained(run)
    edits = held_out_examples(Split.HELDOUT_SCENES, samples, EDIT_KINDS)
    results = sample_examples(trained, edits)
    scores = [scoring.score_example(image_HWC(i), e) for i, e in zip(results, edits, strict=True)]
    combinations = held_out_examples(Split.HELDOUT_COMBINATIONS, samples // 2, scenes.COMBINATION_KINDS)
    descriptions = held_out_examples(Split.HELDOUT_SCENES, samples // 4, (Kind.DESCRIBE,))
    turns = sample_chains(trained, held_out_chains(chains, turns=6))

    by_kind = {
        f"edit_accuracy_{kind.value}": share([s for s, e in zip(scores, edits, strict=True) if e.edit.kind is kind])
        for kind in EDIT_KINDS
    }
    summary = {
        "edit_accuracy": share(scores),
        "edit_accuracy_heldout_combinations": share(score(trained, combinations)),
        "untouched_mae": float(np.nanmean([s.untouched_mae for s in scores])),
        "edited_cell_mae": float(np.nanmean([s.edited_cell_mae for s in scores])),
        "no_context_accuracy": share(score(trained, edits, with_context=False)),
        "text_to_image_accuracy": share(score(trained, descriptions)),
        "multi_turn_all_right_at_3": float(np.mean([all(s.right for s in t.scores[:3]) for t in turns])),
        "multi_turn_all_right_at_6": float(np.mean([all(s.right for s in t.scores) for t in turns])),
        **by_kind,
        **training_figures(run),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw_edits(out / "edits.png", edits[: 2 * len(EDIT_KINDS)], results)
    draw_turns(out / "multi_turn.png", turns[:6])
    Image.fromarray(scenes.draw(edits[0].contexts[0])).save(out / "scene.png")  # to try kontext-sample on
    (out / "scene.txt").write_text(edits[0].prompt)
    return summary


def held_out_examples(split: Split, count: int, kinds: Sequence[Kind]) -> list[Example]:
    """Every kind equally often."""
    return [
        scenes.sample_example(scenes.example_rng(SEED, split, i), split, kinds[i % len(kinds)]) for i in range(count)
    ]


def held_out_chains(count: int, turns: int) -> list[Chain]:
    chains = []
    for i in range(count):
        rng = scenes.example_rng(SEED + 1, Split.HELDOUT_SCENES, i)
        start = scenes.sample_scene(rng, columns=scenes.COLUMNS[i % 2])
        edits = scenes.sample_chain(rng, start, turns)
        chains.append(Chain(start, edits, [scenes.phrase(edit, rng) for edit in edits]))
    return chains


@dataclass
class Turns:
    """What became of a chain: the picture after each turn (the first is the start) and its score."""

    chain: Chain
    images: list[Tensor]
    scores: list[scoring.Score]


def sample_chains(trained: Trained, chains: list[Chain]) -> list[Turns]:
    """Every turn edits the model's own result of the turn before."""
    turns = [Turns(chain, [picture(chain.start)], []) for chain in chains]
    for number in range(len(chains[0].edits)):
        requests = []
        for i, t in enumerate(turns):
            _, height, width = t.images[-1].shape
            requests.append(Request(t.chain.prompts[number], t.images[-1:], height, width, seed=1000 * number + i))
        for t, image in zip(turns, generate_all(trained, requests), strict=True):
            before, after = t.chain.truths()[number : number + 2]
            t.images.append(image)
            t.scores.append(scoring.score_edit(image_HWC(image), before, after))
    return turns


def score(trained: Trained, examples: list[Example], with_context: bool = True) -> list[scoring.Score]:
    results = sample_examples(trained, examples, with_context)
    return [scoring.score_example(image_HWC(i), e) for i, e in zip(results, examples, strict=True)]


def sample_examples(trained: Trained, examples: list[Example], with_context: bool = True) -> list[Tensor]:
    requests = []
    for i, example in enumerate(examples):
        height, width, _ = scenes.draw(example.target).shape
        contexts = [picture(scene) for scene in example.contexts] if with_context else []
        requests.append(Request(example.prompt, contexts, height, width, seed=i))
    return generate_all(trained, requests)


def generate_all(trained: Trained, requests: list[Request]) -> list[Tensor]:
    images = []
    for first in range(0, len(requests), AT_ONCE):
        images += trained.generate(requests[first : first + AT_ONCE], SAMPLER)
    return images


def share(scores: list[scoring.Score]) -> float:
    return float(np.mean([s.right for s in scores]))


def training_figures(run: Path) -> dict[str, float]:
    """What training took, from the run's own log."""
    records = read_metrics(run / "metrics.jsonl")
    logged = [r for r in records if "samples" in r]
    return {
        "train_seconds": sum(r.get("seconds", 0.0) for r in records),
        "steps": logged[-1]["step"],
        "samples": sum(r["samples"] for r in logged),
    }


def picture(scene: Scene) -> Tensor:
    return torch.from_numpy(scenes.draw(scene)).permute(2, 0, 1)


def image_HWC(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def draw_edits(file: Path, examples: list[Example], results: list[Tensor]) -> None:
    """context | second context, if any | result | truth"""
    rows = [
        (example.prompt, [*map(picture, example.contexts), result, picture(example.target)])
        for example, result in zip(examples, results, strict=False)
    ]
    save_grid(file, rows, scale=3)


def draw_turns(file: Path, turns: list[Turns]) -> None:
    """Two rows a chain: what the model made turn after turn, and the truth."""
    rows = []
    for t in turns:
        rows.append((" | ".join(t.chain.prompts), t.images))
        rows.append(("truth", [picture(scene) for scene in t.chain.truths()]))
    save_grid(file, rows, scale=2)


if __name__ == "__main__":
    main()
