"""The quickstart's judge: the truth passes, copying and noise do not, and every number ranks them as it claims to."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kontext_train.evaluation.benchmark import read_benchmark
from kontext_train.evaluation.metrics.pixels import Pixels
from kontext_train.evaluation.results import Results, open_results
from kontext_train.evaluation.scoring import score
from quickstart import evaluate, scenes
from quickstart.benchmark import (
    Exact,
    StandIn,
    StandInModel,
    changed_cells,
    held_out_chains,
    make_stand_in,
    write_benchmark,
)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_benchmark(folder, samples=40, chains=8)
    return folder


@pytest.fixture(scope="module")
def measured(benchmark: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[StandIn, dict[str, dict[str, float]]]:
    """{stand-in: {number: {category: value}}}."""
    folder = tmp_path_factory.mktemp("stand_ins")
    found = {}
    for kind in StandIn:
        results = open_results(make_stand_in(kind, benchmark, folder / kind.value))
        numbers = score(results, [Exact(benchmark), Pixels()])["numbers"]
        found[kind] = {n: {c: e["value"] for c, e in f["categories"].items()} for n, f in numbers.items()}
    return found


Measured = dict[StandIn, dict[str, dict[str, float]]]


@pytest.mark.parametrize("number", ["right", "untouched_cell_mae", "edited_cell_mae", "target_mae"])
@pytest.mark.parametrize("bad", [StandIn.COPY, StandIn.NOISE, StandIn.OTHER])
def test_what_knows_the_answer_ranks_the_truth_first(measured: Measured, number: str, bad: StandIn) -> None:
    truth, other = measured[StandIn.TRUTH][number]["all"], measured[bad][number]["all"]
    assert truth == (1.0 if number == "right" else 0.0)
    assert other == 0.0 if number == "right" else other > 0.05, f"{number} does not see {bad}"


@pytest.mark.parametrize("number", ["untouched_mae", "untouched_psnr", "untouched_ssim", "untouched_colour"])
def test_what_looks_outside_the_edit_cannot_tell_a_copy_but_sees_the_rest(measured: Measured, number: str) -> None:
    values = {kind: measured[kind][number]["all"] for kind in StandIn}
    assert values[StandIn.TRUTH] == values[StandIn.COPY], "they claim nothing about the edit itself"
    for bad in (StandIn.NOISE, StandIn.OTHER):
        lost = values[StandIn.TRUTH] - values[bad] if number.endswith(("psnr", "ssim")) else values[bad]
        assert lost > 0.3, number


def test_chains_drift_where_they_should_and_come_home(measured: Measured) -> None:
    turns = [f"turn {turn}" for turn in range(1, 7)]
    for turn in turns:
        assert measured[StandIn.TRUTH]["right"][turn] == 1.0
        assert measured[StandIn.TRUTH]["target_mae"][turn] == 0.0
        assert measured[StandIn.NOISE]["target_mae"][turn] > 0.2
    copied = [measured[StandIn.COPY]["target_mae"][turn] for turn in turns]
    assert copied[-1] > 2 * copied[0] > 0, "who never edits falls further behind with each turn"
    assert measured[StandIn.TRUTH]["cycle_mae"] == {"turn 6": 0.0}
    assert measured[StandIn.COPY]["cycle_mae"] == {"turn 6": 0.0}, "it never left"
    assert measured[StandIn.NOISE]["cycle_mae"]["turn 6"] > 0.2


def test_home_chains_end_where_they_began_and_others_do_not() -> None:
    for chain in held_out_chains(8, turns=6):
        start, *_, end = (scenes.draw(scene) for scene in chain.truths())
        assert (start == end).all() == chain.home
        assert (scenes.draw(chain.truths()[1]) != start).any()


def test_a_mask_covers_what_changes_and_no_cell_more() -> None:
    chain = next(c for c in held_out_chains(8, turns=6) if c.home)
    before, after = chain.truths()[:2]
    mask, difference = changed_cells(before, [after]) > 0, (scenes.draw(before) != scenes.draw(after)).any(-1)
    assert (mask | ~difference).all()
    assert mask.sum() == 2 * scenes.CELL_PX**2, "a move empties one cell and fills another"


def run_of(kind: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The whole of quickstart.evaluate for a stand-in."""

    def model(run: Path) -> StandInModel:
        folders = [tmp_path / "out" / "benchmarks" / name for name in ("scenes", "no_context")]
        folder = next(f for f in reversed(folders) if f.exists())
        return StandInModel(kind, read_benchmark(folder), Exact(folder).examples, 1)

    monkeypatch.setattr(evaluate, "load_trained", model)
    monkeypatch.setattr(evaluate, "describe_model", lambda run, ema: {"digest": kind.value})
    monkeypatch.setattr(evaluate, "training_figures", lambda run: {})
    return evaluate.evaluate(Path("run"), tmp_path / "out", samples=20, chains=4)


def test_the_quickstarts_summary_of_the_truth_and_of_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = run_of(StandIn.TRUTH, tmp_path / "truth", monkeypatch)
    for name in ("edit_accuracy", "edit_accuracy_heldout_combinations", "text_to_image_accuracy"):
        assert truth[name] == 1.0, name
    assert truth["multi_turn_all_right_at_6"] == 1.0
    assert truth["untouched_mae"] == truth["edited_cell_mae"] == 0.0
    written = {f.name for f in (tmp_path / "truth" / "out").iterdir()}
    assert written >= {"summary.json", "edits.png", "multi_turn.png", "scene.png", "scene.txt", "report"}
    copy = run_of(StandIn.COPY, tmp_path / "copy", monkeypatch)
    for name in (
        "edit_accuracy",
        "edit_accuracy_heldout_combinations",
        "text_to_image_accuracy",
        "no_context_accuracy",
    ):
        assert copy[name] == 0.0, name
    assert copy["multi_turn_all_right_at_3"] == 0.0


def test_an_image_of_another_size_is_counted_as_failed(benchmark: Path, tmp_path: Path) -> None:
    folder = make_stand_in(StandIn.TRUTH, benchmark, tmp_path / "truth")
    results: Results = open_results(folder)
    case = results.benchmark.pairs[0]
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(results.image(case.key, 0))
    right = score(results, [Exact(benchmark)])["numbers"]["right"]
    assert right["failed"] == {
        f"{case.key}@0": "the picture is (64, 64, 3), the scene has 2 rows and 3 columns of 16 px"
    }
    assert right["categories"]["all"]["n"] == len(results.benchmark.pairs) - 1
