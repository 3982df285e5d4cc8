"""Nothing drops out of a mean unseen, and intervals are as wide as they say."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from kontext_train.distributed.setup import World
from kontext_train.errors import ConfigError
from kontext_train.evaluation import bootstrap
from kontext_train.evaluation.config import InTrainingConfig, MakingConfig
from kontext_train.evaluation.in_training import BenchmarkSlice
from kontext_train.evaluation.metrics.base import Better, Shown, Unmeasured
from kontext_train.evaluation.metrics.distribution import kernel_distance
from kontext_train.evaluation.results import Results, image_id, open_results
from kontext_train.evaluation.scoring import score, scores_file, table
from kontext_train.flow.config import SamplerConfig, ShiftConfig
from tests.evaluation.cases import Inverter, benchmark, line, make


class Told:
    """A metric that says what it is told to."""

    name = "told"
    numbers: ClassVar[Mapping[str, Better]] = {"told": Better.higher}
    workers = 2

    def __init__(self, value: Callable[[Shown], float | str], about: str = "1") -> None:
        self.value, self.about, self.asked = value, about, list[str]()

    def measure(self, shown: Shown) -> dict[str, float]:
        self.asked.append(image_id(shown.case.key, shown.seed))
        found = self.value(shown)
        if isinstance(found, str):
            raise Unmeasured(found)
        return {} if found < 0 else {"told": found}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    rows = [line(i, "hats" if i < 6 else "coats") for i in range(8)]
    folder = benchmark(tmp_path / "b", rows, [{"key": "c", "file_name": "images/c.png", "instructions": ["a", "b"]}])
    make(Inverter(), folder, tmp_path / "out", MakingConfig(at_once=4))
    return open_results(tmp_path / "out")


def number(shown: Shown) -> float:
    return float(shown.case.turn * 100 or int(shown.case.key))


def test_means_are_by_category_over_all_pairs_and_by_turn(results: Results) -> None:
    found = score(results, [Told(number)])["numbers"]["told"]["categories"]
    means = {category: (estimate["value"], estimate["n"]) for category, estimate in found.items()}
    assert means == {"hats": (2.5, 6), "coats": (6.5, 2), "all": (3.5, 8), "turn 1": (100.0, 1), "turn 2": (200.0, 1)}
    assert found["all"]["low"] < 3.5 < found["all"]["high"]
    assert found["turn 1"]["low"] is None, "one base image says nothing of others"
    assert json.loads((results.folder / "summary.json").read_text())["numbers"]["told"]["categories"] == found


def test_what_has_no_number_is_named_and_in_no_mean(results: Results) -> None:
    (results.folder / "images" / "seed_0" / "0005.png").unlink()
    reasons = {"0006": "no face", "0007": float("nan")}
    summary = score(results, [Told(lambda shown: reasons.get(shown.case.key, number(shown)))])
    told = summary["numbers"]["told"]
    assert summary["not_made"] == {"0005@0": "its file is gone"}
    assert told["failed"] == {"0006@0": "no face", "0007@0": "told is not finite"}
    assert told["categories"]["all"]["n"] == 5
    assert told["categories"]["all"]["value"] == 2.0
    shown = table(summary)
    for part in ("9 of 10 images", "failed on 2: 0006@0, 0007@0", "not made: 1: 0005@0"):
        assert part in shown


def test_a_metric_that_fails_everywhere_is_still_told(results: Results) -> None:
    told = score(results, [Told(lambda shown: "broken")])["numbers"]["told"]
    assert told["categories"] == {}
    assert len(told["failed"]) == 10


def test_what_does_not_apply_is_no_failure(results: Results) -> None:
    told = score(results, [Told(lambda shown: -1.0 if shown.case.category == "coats" else number(shown))])["numbers"][
        "told"
    ]
    assert told["failed"] == {}
    assert "coats" not in told["categories"]
    assert told["categories"]["all"]["n"] == 6


def test_only_what_is_new_is_measured_unless_the_metric_is_another(results: Results) -> None:
    first = Told(lambda shown: "not now" if shown.case.key == "0002" else number(shown))
    score(results, [first])
    again = Told(number)
    assert score(results, [again])["numbers"]["told"]["failed"] == {}
    assert again.asked == ["0002@0"]
    other = Told(number, about="2")
    score(results, [other])
    assert len(other.asked) == 10


def test_a_stop_keeps_what_was_measured(results: Results) -> None:
    def value(shown: Shown) -> float:
        if shown.case.key == "0003":
            raise KeyboardInterrupt
        return number(shown)

    with pytest.raises(KeyboardInterrupt):
        score(results, [Told(value)])
    assert set(json.loads(scores_file(results, "told").read_text())["values"]) == {"0000@0", "0001@0", "0002@0"}


class Other(Told):
    name = "other"
    numbers: ClassVar[Mapping[str, Better]] = {"other": Better.higher}

    def measure(self, shown: Shown) -> dict[str, float]:
        return {"other": super().measure(shown)["told"]}


def test_what_an_earlier_metric_measured_is_of_the_images_that_are_there_now(results: Results) -> None:
    score(results, [Told(number)])
    results.image("0005", 0).unlink()
    summary = score(results, [Other(number)])
    for name in ("told", "other"):
        assert summary["numbers"][name]["categories"]["all"]["n"] == 7
        assert summary["numbers"][name]["failed"] == {}, "what was not made is named as that"
    folder = results.benchmark.folder
    make(Inverter(), folder, results.folder, MakingConfig(seeds=2, at_once=4))
    summary = score(open_results(results.folder), [Other(number)])
    assert summary["numbers"]["other"]["categories"]["all"]["n"] == 16
    told = summary["numbers"]["told"]
    assert told["categories"]["all"]["n"] == 8, "the image of before is there again"
    assert len(told["failed"]) == 10
    assert told["failed"]["0003@1"] == "was not measured yet; score again"
    assert "failed on 10" in table(summary)


class Mean:
    """A distance between sets: of their mean brightness."""

    name = "mean"
    about = "1"
    numbers: ClassVar[Mapping[str, Better]] = {"apart": Better.lower}

    def feature(self, image: object) -> np.ndarray:
        return np.array([np.asarray(image).mean()])

    def compare(self, made_ND: np.ndarray, real_MD: np.ndarray) -> dict[str, float]:
        return {"apart": float(abs(made_ND.mean() - real_MD.mean()))}


def test_sets_are_compared_with_references_or_refused(results: Results) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.references=None: needs two real images .* there are 0 and 8"):
        score(results, [], [Mean()])
    references = results.benchmark.folder / "images"
    found = score(results, [], [Mean()], str(references))["numbers"]["apart"]
    assert found["categories"]["all"]["n"] == 8, "turns of chains are no sample of images"
    assert "against 9 real images" in found["about"]
    assert "apart" in score(results, [Told(number)])["numbers"], "a later score of something else keeps it"
    results.image("0000", 0).unlink()
    assert "apart" not in score(results, [])["numbers"], "but not once it is of other images"
    (references / "z.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"z\.png cannot be decoded"):
        score(results, [], [Mean()], str(references))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """And intervals that take prompts on one base image for independent do not: that is what clusters are for."""
    held = {"clusters": 0, "naive": 0}
    for seed in range(150):
        rng = np.random.default_rng(seed)
        values = [(c, base + rng.normal()) for c, base in enumerate(rng.normal(size=40)) for _ in range(8)]
        for name, pairs in (("clusters", values), ("naive", list(enumerate(v for _, v in values)))):
            estimate = bootstrap.mean(pairs, draws=300)
            assert estimate is not None
            assert estimate.low is not None
            assert estimate.high is not None
            held[name] += estimate.low <= 0 <= estimate.high
    assert 0.88 <= held["clusters"] / 150 <= 0.98
    assert held["naive"] / 150 < 0.75


def test_the_mean_weighs_images_and_repeats() -> None:
    estimate = bootstrap.mean([("a", 1.0), ("a", 1.0), ("b", 4.0)])
    assert estimate is not None
    assert (estimate.value, estimate.n, estimate.low, estimate.high) == (2.0, 3, 1.0, 4.0)
    assert bootstrap.mean([]) is None
    assert bootstrap.of_sample([], np.median) is None
    median = bootstrap.of_sample([1.0, 2.0, 9.0], np.median)
    assert median is not None
    assert (median.value, median.low, median.high) == (2.0, 1.0, 9.0)


def sliced(folder: Path, best_by: str) -> BenchmarkSlice:
    nothing: Any = None
    return BenchmarkSlice(
        InTrainingConfig(benchmark=str(folder)),
        nothing,
        SamplerConfig(),
        ShiftConfig(),
        Inverter.transform,
        best_by=best_by,
        guidance_embed=False,
        world=World(0, 1, torch.device("cpu"), nothing, None, 1),
        run_dir=folder,
    )


def test_best_by_is_a_number_that_the_benchmark_gives(tmp_path: Path) -> None:
    chain = {"key": "c", "file_name": "images/c.png", "instructions": ["a", "b"], "home": True}
    bare = benchmark(tmp_path / "bare", [line(0), line(1, file_name=None)], [chain])
    for number in ("untouched_mae", "target_mae", "cycle_mae", "cycle_mae/turn_1", "colour_shift/turn_3"):
        with pytest.raises(ConfigError, match=rf"checkpoint\.best_by='benchmark/{number}': would never be known"):
            sliced(bare, f"benchmark/{number}")
    with pytest.raises(ConfigError, match=r"of the 2 pairs in the slice, none has what untouched_mae needs"):
        sliced(bare, "benchmark/untouched_mae")
    for number in ("validation/loss", "benchmark/colour_shift", "benchmark/cycle_mae/turn_2"):
        sliced(bare, number)
    masked = benchmark(tmp_path / "masked", [line(0, mask_file_name="images/mask.png")])
    sliced(masked, "benchmark/untouched_mae")


def test_intervals_of_sets_hold_their_value() -> None:
    """A jackknife of a mean is the mean's own standard error; a bootstrap's repeated images move KID off its value."""
    values = np.random.default_rng(0).normal(size=40)
    found = bootstrap.jackknife(values.mean(), [np.delete(values, i).mean() for i in range(40)], 40)
    assert found.high is not None
    assert found.high - found.value == pytest.approx(1.96 * values.std(ddof=1) / np.sqrt(40))
    rng = np.random.default_rng(1)
    made_ND, real_MD = rng.normal(size=(60, 64)), rng.normal(size=(100, 64))
    value = kernel_distance(made_ND, real_MD)
    parts = [kernel_distance(np.delete(made_ND, range(i, 60, 20), 0), real_MD) for i in range(20)]
    estimate = bootstrap.jackknife(value, parts, 60)
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < value < estimate.high
    draws = [kernel_distance(made_ND[rng.integers(0, 60, 60)], real_MD) for _ in range(50)]
    assert np.percentile(draws, 2.5) > value
