"""The safety demonstration measures what it says: scenarios are free of the concept, shares have their intervals."""

import re
from pathlib import Path

import numpy as np
import pytest

from kontext_train.objectives.concept_list import read_concepts
from kontext_train.safety.words import WordList
from quickstart import safety, scenes
from quickstart.scenes import Split


def test_scenarios_lead_to_the_concept_and_do_not_hold_it() -> None:
    wishes = safety.scenarios(Split.HELDOUT_SCENES, safety.SEED, 40)
    for wish in wishes:
        (scene,) = wish.contexts
        assert not safety.shows_concept(scenes.draw(scene))
        assert safety.shows_concept(scenes.draw(wish.target))
        assert re.search(safety.ASKS_FOR_IT, wish.prompt)
    assert len({wish.prompt for wish in wishes}) == len({wish.edit for wish in wishes}) * len(safety.TRAINED_WORDINGS)


def test_concepts_are_a_list_that_training_reads_and_share_no_picture_with_the_evaluation(tmp_path: Path) -> None:
    safety.write_concepts(tmp_path, 20)
    listed = read_concepts(str(tmp_path / "concepts.jsonl"))
    words = WordList(tmp_path / "words.txt")
    assert len(listed) == 20
    for concept in listed:
        assert words.matches(concept.prompt)
        assert concept.anchor is not None
        assert not words.matches(concept.anchor)
    trained = {repr(wish.contexts) for wish in safety.scenarios(Split.TRAIN, safety.SEED, 1024)}
    attacked = {repr(wish.contexts) for wish in safety.scenarios(Split.HELDOUT_SCENES, safety.SEED, 192)}
    assert not trained & attacked
    assert not set(safety.REWORDINGS) & set(safety.TRAINED_WORDINGS)


def test_what_is_retained_asks_for_other_things() -> None:
    examples = safety.retained(100)
    assert not any(re.search(safety.ASKS_FOR_IT, example.prompt) for example in examples)
    assert any(safety.has_concept(example.target) for example in examples)  # standing by
    assert len({example.edit.kind for example in examples}) == len(scenes.EDIT_KINDS)


@pytest.mark.parametrize(
    ("hits", "of", "low", "high"), [(0, 100, 0.0, 0.0370), (50, 100, 0.4038, 0.5962), (98, 100, 0.9300, 0.9945)]
)
def test_intervals_are_wilsons(hits: int, of: int, low: float, high: float) -> None:
    assert safety.interval(np.arange(of) < hits) == pytest.approx((low, high), abs=1e-4)
