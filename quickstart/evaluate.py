"""Judge a quickstart run by rendering the truth: summary.json, edits.png, multi_turn.png and a report.

python -m quickstart.evaluate --run outputs/quickstart/run --out outputs/quickstart

What is made and measured is in results/, as kontext-evaluate would have it: the same command goes on after a stop.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from kontext_train.evaluation.benchmark import Case, read_benchmark
from kontext_train.evaluation.config import MakingConfig
from kontext_train.evaluation.make_images import make_images, settings_of
from kontext_train.evaluation.metrics.pixels import Pixels
from kontext_train.evaluation.report import write_report
from kontext_train.evaluation.results import Results, open_results
from kontext_train.evaluation.scoring import read_scores, score
from kontext_train.evaluation.trained import describe_model, load_trained
from kontext_train.flow.config import SamplerConfig
from kontext_train.training.metrics import read_metrics
from kontext_train.training.pictures import save_grid
from quickstart.benchmark import HELD_OUT, Exact, as_tensor, write_benchmark
from quickstart.scenes import COMBINATION_KINDS, EDIT_KINDS

MAKING = MakingConfig(sampler=SamplerConfig(steps=8), at_once=64)


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
    """Writes summary.json, the pictures and the report into `out`; returns the summary."""
    results = judged(run, out, "scenes", samples, chains)
    blind = judged(run, out, "no_context", samples, 0)  # the same instructions, their context left out
    write_report([results], out / "report")
    kinds = [kind.value for kind in EDIT_KINDS]
    combined = [f"{kind.value}, {HELD_OUT}" for kind in COMBINATION_KINDS]
    summary = {
        "edit_accuracy": mean(results, "right", kinds),
        "edit_accuracy_heldout_combinations": mean(results, "right", combined),
        "untouched_mae": mean(results, "untouched_cell_mae", kinds),
        "edited_cell_mae": mean(results, "edited_cell_mae", kinds),
        "no_context_accuracy": mean(blind, "right", kinds),
        "text_to_image_accuracy": mean(results, "right", ["describe"]),
        "multi_turn_all_right_at_3": all_right(results, 3),
        "multi_turn_all_right_at_6": all_right(results, 6),
        **{f"edit_accuracy_{kind}": mean(results, "right", [kind]) for kind in kinds},
        **training_figures(run),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    edits = [case for case in results.benchmark.pairs if case.category in kinds]
    draw_edits(out / "edits.png", results, edits[: 2 * len(kinds)])
    draw_turns(out / "multi_turn.png", results, results.benchmark.chains[:6])
    with Image.open(edits[0].contexts[0]) as scene:
        scene.save(out / "scene.png")  # to try kontext-sample on
    (out / "scene.txt").write_text(edits[0].instruction)
    return summary


def judged(run: Path, out: Path, name: str, samples: int, chains: int) -> Results:
    """The run's images of one benchmark, made and measured."""
    folder = out / "benchmarks" / name
    write_benchmark(folder, samples, chains, with_context=name == "scenes")
    benchmark = read_benchmark(folder)
    model = describe_model(str(run), ema=True)
    settings = settings_of("quickstart", model, benchmark, MAKING)
    made = out / "results" / f"{name}_{model['digest']}_{benchmark.digest[:8]}"  # a run that trained on is another
    make_images(lambda: load_trained(run), benchmark, made, settings, MAKING)
    results = open_results(made)
    score(results, [Exact(folder), Pixels()])
    return results


def exact(results: Results) -> dict[str, dict[str, float]]:
    """What `Exact` found, by key."""
    return {image.split("@")[0]: found for image, found in read_scores(results)["exact"].values.items()}


def mean(results: Results, number: str, categories: list[str]) -> float:
    """Over the pairs of some categories that have this number."""
    found = exact(results)
    values = [found[case.key] for case in results.benchmark.pairs if case.category in categories]
    return float(np.mean([value[number] for value in values if number in value]))


def all_right(results: Results, turns: int) -> float:
    """Share of chains whose first turns are all right."""
    found = exact(results)
    chains = results.benchmark.chains
    return float(np.mean([all(found[case.key]["right"] for case in chain[:turns]) for chain in chains]))


def training_figures(run: Path) -> dict[str, float]:
    """What training took, from the run's own log."""
    records = read_metrics(run / "metrics.jsonl")
    logged = [r for r in records if "samples" in r]
    return {
        "train_seconds": sum(r.get("seconds", 0.0) for r in records),
        "steps": logged[-1]["step"],
        "samples": sum(r["samples"] for r in logged),
    }


def picture(file: Path) -> Tensor:
    with Image.open(file) as image:
        return as_tensor(np.array(image))


def draw_edits(file: Path, results: Results, edits: list[Case]) -> None:
    """context | second context, if any | result | truth"""
    rows = []
    for case in edits:
        truth = [case.target] if case.target is not None else []
        rows.append((case.instruction, list(map(picture, [*case.contexts, results.image(case.key, 0), *truth]))))
    save_grid(file, rows, scale=3)


def draw_turns(file: Path, results: Results, chains: Sequence[Sequence[Case]]) -> None:
    """Two rows a chain: what the model made turn after turn, and the truth."""
    rows = []
    for chain in chains:
        start = picture(chain[0].contexts[0])
        made = [picture(results.image(case.key, 0)) for case in chain]
        truths = [picture(case.target) for case in chain if case.target is not None]
        rows += [(" | ".join(case.instruction for case in chain), [start, *made]), ("truth", [start, *truths])]
    save_grid(file, rows, scale=2)


if __name__ == "__main__":
    main()
