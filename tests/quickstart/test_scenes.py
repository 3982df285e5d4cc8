"""The scorer is exact: the truth is right, every shortcut wrong. Sampling is deterministic, balanced, without leaks."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quickstart import scenes, scoring
from quickstart.make_dataset import example_at, write_shards
from quickstart.scenes import Edit, Example, Kind, Split


def examples(kind: Kind, count: int, split: Split = Split.HELDOUT_SCENES, columns: int | None = None) -> list[Example]:
    rngs = (scenes.example_rng(1, split, index) for index in range(count))
    return [scenes.sample_example(rng, split, kind, columns) for rng in rngs]


def share_right(images: list[np.ndarray], truths: list[Example]) -> float:
    scores = [scoring.score_example(image, example).right for image, example in zip(images, truths, strict=True)]
    return float(np.mean(scores))


def with_noise(image: np.ndarray, std: float, rng: np.random.Generator) -> np.ndarray:
    return np.clip(image + rng.normal(0, 255 * std, image.shape), 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("kind", list(Kind))
def test_truth_is_right(kind: Kind) -> None:
    truths = examples(kind, 2000)
    assert share_right([scenes.draw(example.target) for example in truths], truths) == 1.0


@pytest.mark.parametrize("kind", list(Kind))
def test_scorer_bears_small_noise_but_not_large(kind: Kind) -> None:
    truths, rng = examples(kind, 150), np.random.default_rng(0)
    images = [scenes.draw(example.target) for example in truths]
    assert share_right([with_noise(image, 0.05, rng) for image in images], truths) >= 0.99
    if kind is not Kind.DESCRIBE:  # a description has no pixel bound
        assert share_right([with_noise(image, 0.10, rng) for image in images], truths) <= 0.5


@pytest.mark.parametrize("kind", scenes.EDIT_KINDS)
def test_copying_the_context_is_wrong(kind: Kind) -> None:
    truths = examples(kind, 500)
    assert share_right([scenes.draw(example.contexts[0]) for example in truths], truths) == 0.0


@pytest.mark.parametrize("kind", list(Kind))
def test_another_samples_truth_is_wrong(kind: Kind) -> None:
    truths = examples(kind, 500, columns=2)
    images = [scenes.draw(example.target) for example in truths]
    assert share_right(images[1:] + images[:1], truths) <= 0.01


def test_match_background_needs_the_exact_colour() -> None:
    """The canonical colour of the reference's background is not enough: only the second context image tells."""
    truths = examples(Kind.MATCH_BACKGROUND, 500)
    named = [scenes.apply_edit(e.contexts[0], Edit(Kind.BACKGROUND, argument=e.target.background)) for e in truths]
    assert share_right([scenes.draw(scene) for scene in named], truths) <= 0.5


def test_move_must_empty_the_source_and_keep_the_others() -> None:
    example = next(e for e in examples(Kind.MOVE, 50) if len(e.target.things) >= 2)
    before, after = example.contexts[0], example.target
    moved = after.find(example.edit.shape, example.edit.colour)
    source = before.find(example.edit.shape, example.edit.colour)
    assert moved is not None
    assert source is not None
    image = scenes.draw(after)
    assert scoring.score_edit(image, before, after).right
    both = image.copy()
    cell = np.s_[source.row * 16 : source.row * 16 + 16, source.column * 16 : source.column * 16 + 16]
    both[cell] = scenes.draw(before)[cell]
    assert not scoring.score_edit(both, before, after).right
    other = next(thing for thing in after.things if thing is not moved)
    lost = image.copy()
    lost[other.row * 16 : other.row * 16 + 16, other.column * 16 : other.column * 16 + 16] = after.background_rgb
    score = scoring.score_edit(lost, before, after)
    assert not score.right
    assert score.edited_cell_mae == 0
    assert score.untouched_mae > 0


def test_errors_are_measured_in_the_right_cells() -> None:
    example = examples(Kind.RECOLOUR, 1, columns=2)[0]
    thing = example.contexts[0].find(example.edit.shape, example.edit.colour)
    assert thing is not None
    image = scenes.draw(example.target)
    image[thing.row * 16 : thing.row * 16 + 16, thing.column * 16 : thing.column * 16 + 16] ^= 1
    score = scoring.score_example(image, example)
    assert score.right
    assert score.untouched_mae == 0
    assert score.edited_cell_mae == pytest.approx(1 / 255, rel=1e-4)


def test_text_to_image_takes_any_layout_and_nothing_else() -> None:
    example = next(e for e in examples(Kind.DESCRIBE, 50, columns=2) if len(e.target.things) == 2)
    first, second = example.target.things
    cells = iter(example.target.cells())
    elsewhere = tuple(scenes.replace(t, row=(c := next(cells))[0], column=c[1], dx=-t.dx) for t in (second, first))
    assert scoring.text_to_image_right(scenes.draw(scenes.replace(example.target, things=elsewhere)), example.target)
    twice = scenes.replace(elsewhere[0], row=1, column=1)
    for things in (elsewhere[:1], (*elsewhere, twice)):
        wrong = scenes.draw(scenes.replace(example.target, things=things))
        assert not scoring.text_to_image_right(wrong, example.target)


@pytest.mark.parametrize("split", [Split.TRAIN, Split.HELDOUT_SCENES])
def test_training_never_holds_a_held_out_combination(split: Split) -> None:
    edits = [e.edit for kind in scenes.COMBINATION_KINDS for e in examples(kind, 500, split)]
    assert not any(scenes.is_held_out(edit) for edit in edits)


def test_held_out_combinations_are_one_in_eight_and_only_they_are_in_their_split() -> None:
    for kind in scenes.COMBINATION_KINDS:
        held_out, trained = scenes.combinations(kind, True), scenes.combinations(kind, False)
        assert 0.1 <= len(held_out) / (len(held_out) + len(trained)) <= 0.15
        assert all(scenes.is_held_out(e.edit) for e in examples(kind, 100, Split.HELDOUT_COMBINATIONS))
    with pytest.raises(ValueError, match="kind=background has no held-out combinations"):
        examples(Kind.BACKGROUND, 1, Split.HELDOUT_COMBINATIONS)


def test_samples_are_deterministic_and_kinds_and_sizes_equally_frequent() -> None:
    drawn = [example_at(3, Split.TRAIN, index) for index in range(3000)]
    assert drawn[7] == example_at(3, Split.TRAIN, 7)
    assert drawn[7] != example_at(4, Split.TRAIN, 7)
    assert drawn[7] != example_at(3, Split.HELDOUT_SCENES, 7)
    kinds = Counter(example.edit.kind for example in drawn)
    assert kinds[Kind.DESCRIBE] == pytest.approx(600, abs=80)
    assert all(kinds[kind] == pytest.approx(480, abs=80) for kind in scenes.EDIT_KINDS)
    assert Counter(example.target.columns for example in drawn)[2] == pytest.approx(1500, abs=120)


def test_scenes_hold_distinct_things_one_a_cell() -> None:
    for example in (e for kind in Kind for e in examples(kind, 200, Split.TRAIN)):
        for scene in (*example.contexts, example.target):
            assert len({(thing.shape, thing.colour) for thing in scene.things}) == len(scene.things)
            assert len({(thing.row, thing.column) for thing in scene.things}) == len(scene.things)
            assert set(scene.cells()) >= {(thing.row, thing.column) for thing in scene.things}


def test_a_chain_stays_valid_and_every_turn_changes_the_picture() -> None:
    kinds: Counter[Kind] = Counter()
    for index in range(100):
        rng = scenes.example_rng(0, Split.HELDOUT_SCENES, index)
        scene = scenes.sample_scene(rng, columns=2 + index % 2)
        for edit in scenes.sample_chain(rng, scene, turns=6):
            after = scenes.apply_edit(scene, edit)
            assert not scoring.score_edit(scenes.draw(scene), scene, after).right
            assert scoring.score_edit(scenes.draw(after), scene, after).right
            assert not scenes.is_held_out(edit)
            scene = after
            kinds[edit.kind] += 1
    assert set(kinds) == set(scenes.SINGLE_CONTEXT_KINDS)


def test_impossible_edits_are_refused() -> None:
    thing = scenes.Thing("circle", "red", (222, 34, 34), 0, 0, 0, 0)
    scene = scenes.Scene(2, "gray", (128, 128, 128), (thing,))
    with pytest.raises(ValueError, match="no blue circle"):
        scenes.apply_edit(scene, Edit(Kind.REMOVE, "circle", "blue"))
    with pytest.raises(ValueError, match="outside the picture or taken"):
        scenes.apply_edit(scene, Edit(Kind.MOVE, "circle", "red", "left"))
    with pytest.raises(ValueError, match="needs `reference`"):
        scenes.apply_edit(scene, Edit(Kind.MATCH_BACKGROUND))
    with pytest.raises(ValueError, match="expected uint8"):
        scoring.read_cells(np.zeros((32, 32, 3), np.float32))


def test_shards_hold_triplets_from_which_the_truth_is_rebuilt(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", 60, seed=5)
    write_shards(tmp_path / "b", 60, seed=5)
    shard = tmp_path / "a" / "train-00000.tar"
    assert shard.read_bytes() == (tmp_path / "b" / "train-00000.tar").read_bytes()
    with tarfile.open(shard) as tar:
        files = {name: member.read() for name in tar.getnames() if (member := tar.extractfile(name))}
    records = {name.removesuffix(".json"): json.loads(data) for name, data in files.items() if name.endswith(".json")}
    assert len(records) == 60
    counts = set()
    for key, record in records.items():
        example = Example.from_json(record)
        assert example.prompt == record["prompt"]
        assert "." not in key
        pictures = {
            name: Image.open(io.BytesIO(data))
            for name, data in files.items()
            if name.startswith(f"{key}.") and "png" in name
        }
        assert len(pictures) == 1 + len(example.contexts)
        assert scoring.score_example(np.asarray(pictures[f"{key}.target.png"]), example).right
        for i, scene in enumerate(example.contexts):
            assert np.array_equal(np.asarray(pictures[f"{key}.context.{i}.png"]), scenes.draw(scene))
        counts.add(len(example.contexts))
    assert counts == {0, 1, 2}
    with pytest.raises(ValueError, match="already holds train shards"):
        write_shards(tmp_path / "a", 60)
