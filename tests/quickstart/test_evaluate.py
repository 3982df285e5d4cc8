"""The quickstart's judge: the truth passes, copying and noise do not."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kontext_train.generate import Request
from quickstart import evaluate, scenes
from quickstart.scenes import EDIT_KINDS, Kind, Split

Model = Callable[[Sequence[Request]], list[Tensor]]


def judged(model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, float]:
    """The whole summary for a stand-in model."""
    stand_in = SimpleNamespace(generate=lambda requests, sampler: model(requests))
    monkeypatch.setattr(evaluate, "load_trained", lambda run: stand_in)
    monkeypatch.setattr(evaluate, "training_figures", lambda run: {})
    return evaluate.evaluate(Path("run"), tmp_path, samples=40, chains=4)


def truths() -> dict[tuple[str, bytes], Tensor]:
    """The right picture for each prompt and first context of the evaluation, chains included."""
    examples = [
        *evaluate.held_out_examples(Split.HELDOUT_SCENES, 40, EDIT_KINDS),
        *evaluate.held_out_examples(Split.HELDOUT_COMBINATIONS, 20, scenes.COMBINATION_KINDS),
        *evaluate.held_out_examples(Split.HELDOUT_SCENES, 10, (Kind.DESCRIBE,)),
    ]
    known = {
        (e.prompt, scenes.draw(e.contexts[0]).tobytes() if e.contexts else b""): evaluate.picture(e.target)
        for e in examples
    }
    for chain in evaluate.held_out_chains(4, turns=6):
        steps = zip(chain.prompts, chain.truths(), chain.truths()[1:], strict=False)
        known |= {(p, scenes.draw(before).tobytes()): evaluate.picture(after) for p, before, after in steps}
    return known


def test_the_truth_is_right_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = truths()

    def model(requests: Sequence[Request]) -> list[Tensor]:
        keys = [(r.prompt, evaluate.image_HWC(r.contexts[0]).tobytes() if r.contexts else b"") for r in requests]
        grey = [torch.full((3, r.height, r.width), 128, dtype=torch.uint8) for r in requests]
        return [known.get(key, default) for key, default in zip(keys, grey, strict=True)]

    summary = judged(model, monkeypatch, tmp_path)
    for name in ("edit_accuracy", "edit_accuracy_heldout_combinations", "text_to_image_accuracy"):
        assert summary[name] == 1.0, name
    assert summary["multi_turn_all_right_at_6"] == 1.0
    assert summary["no_context_accuracy"] == 0.0  # without its context it does not know the answer
    assert summary["untouched_mae"] == summary["edited_cell_mae"] == 0.0
    assert {f.name for f in tmp_path.iterdir()} >= {"summary.json", "edits.png", "multi_turn.png", "scene.png"}


@pytest.mark.parametrize("kind", ["copy", "noise"])
def test_copying_and_noise_are_wrong(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def model(requests: Sequence[Request]) -> list[Tensor]:
        noise = [torch.randint(0, 256, (3, r.height, r.width), dtype=torch.uint8) for r in requests]
        if kind == "noise":
            return noise
        return [r.contexts[0] if r.contexts else n for r, n in zip(requests, noise, strict=True)]

    summary = judged(model, monkeypatch, tmp_path)
    for name in ("edit_accuracy", "edit_accuracy_heldout_combinations", "multi_turn_all_right_at_3"):
        assert summary[name] == 0.0, name
    assert summary["text_to_image_accuracy"] == 0.0
