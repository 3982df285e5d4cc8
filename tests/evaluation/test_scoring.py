"""Nothing drops out of a mean unseen, and intervals are as wide as they say."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.distributed_c10d import _set_pg_timeout

from kontext_train.distributed.config import ParallelConfig
from kontext_train.distributed.setup import World, process_group
from kontext_train.errors import ConfigError
from kontext_train.evaluation import bootstrap
from kontext_train.evaluation.benchmark import read_benchmark
from kontext_train.evaluation.config import InTrainingConfig, MakingConfig, MetricsConfig
from kontext_train.evaluation.in_training import BenchmarkSlice
from kontext_train.evaluation.metrics.base import Better, LeftOut, Shown, Unmeasured
from kontext_train.evaluation.metrics.distribution import kernel_distance
from kontext_train.evaluation.metrics.pixels import Pixels
from kontext_train.evaluation.results import Results, image_id, open_results
from kontext_train.evaluation.scoring import complete, read_scores, score, scores_file, table
from kontext_train.flow.config import SamplerConfig, ShiftConfig
from tests import runs
from tests.evaluation.cases import Inverter, benchmark, line, make, save_image


class Told:
    """A metric that says what it is told to."""

    name = "told"
    numbers: ClassVar[Mapping[str, Better]] = {"told": Better.higher}
    needs: ClassVar[Mapping[str, str]] = {"told": "a buttonhole"}
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
    assert (told["categories"]["all"]["n"], told["categories"]["all"]["of"]) == (6, 8), "and it shows"
    assert told["left_out"] == dict.fromkeys(("0006@0", "0007@0"), "has not a buttonhole")


def test_what_a_case_lacks_is_named_by_number(tmp_path: Path) -> None:
    """No mask, one that is white everywhere, and one that says something."""
    rows = [line(0), *(line(i, mask_file_name=f"images/mask{i}.png") for i in (1, 2)), line(3, file_name=None)]
    folder = benchmark(tmp_path / "b", rows)
    for i, box in ((1, (0, 0, 48, 32)), (2, (0, 0, 24, 32))):
        mask = Image.new("L", (48, 32))
        mask.paste(255, box)
        mask.save(folder / "images" / f"mask{i}.png")
    make(Inverter(), folder, tmp_path / "out", MakingConfig(at_once=4, height=32, width=48))
    summary = score(open_results(tmp_path / "out"), [Pixels()])
    numbers = summary["numbers"]
    lacks = "has not a context with a mask that is not white everywhere"
    for name in ("untouched_mae", "untouched_colour"):
        assert numbers[name]["left_out"] == dict.fromkeys(("0000@0", "0001@0", "0003@0"), lacks)
        assert numbers[name]["categories"]["all"]["n"] == 1
    assert numbers["colour_shift"]["left_out"].keys() == {"0001@0", "0002@0", "0003@0"}
    assert numbers["target_mae"]["left_out"] == {f"000{i}@0": "has not a target" for i in range(4)}
    assert complete(summary)


def test_an_error_of_a_metric_is_its_images_own(results: Results) -> None:
    def value(shown: Shown) -> float:
        if shown.case.key == "0003":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return number(shown)

    summary = score(results, [Told(value)])
    assert summary["numbers"]["told"]["failed"] == {"0003@0": "OutOfMemoryError: CUDA out of memory"}
    assert summary["numbers"]["told"]["categories"]["all"]["n"] == 7
    assert not complete(summary)


def test_only_what_is_new_is_measured_unless_the_metric_is_another(results: Results) -> None:
    first = Told(lambda shown: "not now" if shown.case.key == "0002" else number(shown))
    score(results, [first])
    again = Told(number)
    assert score(results, [again])["numbers"]["told"]["failed"] == {}
    assert again.asked == ["0002@0"]
    other = Told(number, about="2")
    score(results, [other])
    assert len(other.asked) == 10


def test_another_image_or_truth_is_measured_anew(results: Results) -> None:
    score(results, [Told(number)])
    save_image(results.image("0004", 0), seed=77)
    metadata = results.benchmark.folder / "metadata.jsonl"
    lines = metadata.read_text().replace('"add hat 2"', '"add hat 2", "target_caption": "a hat"')
    metadata.write_text(lines)
    results = open_results(results.folder)
    unseen = "was not measured yet; score again"
    assert read_scores(results)["told"].failed == {"0002@0": unseen, "0004@0": unseen}
    again = Told(number)
    assert complete(score(results, [again]))
    assert sorted(again.asked) == ["0002@0", "0004@0"]


def test_an_error_keeps_what_was_measured(results: Results) -> None:
    def value(shown: Shown) -> float:
        if shown.case.key == "0003":
            raise KeyboardInterrupt
        return number(shown)

    first = Told(value)
    first.workers = 1
    with pytest.raises(KeyboardInterrupt):
        score(results, [first])
    again = Told(number)
    score(results, [again])
    assert {"0000@0", "0001@0", "0002@0"}.isdisjoint(again.asked)
    assert "0003@0" in again.asked


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_keeps_what_was_measured(results: Results, by: signal.Signals) -> None:
    """Of single images and of sets: what took long is kept as it is found."""
    slow = Told(lambda shown: time.sleep(60) or 0.0 if shown.case.key == "0004" else number(shown))
    slow.workers = 1
    process = runs.fork(score, results, [slow])
    wait_for(lambda: "0003@0" in read(results, "told").get("values", {}))
    assert process.pid is not None
    os.kill(process.pid, by)
    process.join()
    assert process.exitcode == -by
    again = Told(number)
    assert score(results, [again])["numbers"]["told"]["categories"]["all"]["n"] == 8
    assert sorted(again.asked) == ["0004@0", "0005@0", "0006@0", "0007@0", "c.turn_1@0", "c.turn_2@0"]


def test_a_kill_keeps_the_features_of_sets(results: Results) -> None:
    references, stopped = str(results.benchmark.folder / "images"), Mean(stop_at=5)
    with pytest.raises(KeyboardInterrupt):
        score(results, [], [stopped], references)
    again = Mean()
    value = score(results, [], [again], references)["numbers"]["apart_edits"]["categories"]["all"]["value"]
    assert again.asked == 8 + 9 - 4, "four were kept"
    other = Mean(about="2")
    assert score(results, [], [other], references)["numbers"]["apart_edits"]["categories"]["all"]["value"] == value
    assert other.asked == 8 + 9, "another model measures all again"


def test_progress_is_shown_where_it_is_asked_for(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    score(results, [Told(number)])
    assert capsys.readouterr().err == ""
    score(results, [Told(number, about="2")], progress=True)
    assert "told: 100%" in (shown := capsys.readouterr().err)
    assert "10/10" in shown


def test_a_line_that_a_kill_has_torn_is_measured_again(results: Results) -> None:
    score(results, [Told(number)])
    file = scores_file(results, "told")
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    again = Told(number)
    assert score(results, [again])["numbers"]["told"]["categories"]["all"]["n"] == 8
    assert len(again.asked) == 1
    odd = "no \u2028 face é"
    score(results, [Told(lambda shown: odd if shown.case.key == "0001" else number(shown), about="3")])
    assert read_scores(results)["told"].failed == {"0001@0": odd}, "not a line's end"
    file.write_bytes(file.read_bytes().partition("é".encode())[0] + b"\xc3")
    assert read_scores(results)["told"].numbers == {"told": "higher"}, "torn within a letter"
    file.write_bytes(whole[:20])
    assert read_scores(results) == {}, "not even the metric's name is whole"


def wait_for(there: Callable[[], bool], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


def read(results: Results, name: str) -> dict[str, Any]:
    found = read_scores(results).get(name)
    return {} if found is None else asdict(found)


class Other(Told):
    name = "other"
    numbers: ClassVar[Mapping[str, Better]] = {"other": Better.higher}
    needs: ClassVar[Mapping[str, str]] = {}

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
    assert told["categories"]["all"]["n"] == 7, "the image of before was made again"
    assert len(told["failed"]) == 11
    assert told["failed"]["0003@1"] == "was not measured yet; score again"
    assert "failed on 11" in table(summary)


class Mean:
    """A distance between sets: of their mean brightness."""

    name = "mean"
    numbers: ClassVar[Mapping[str, Better]] = {"apart": Better.lower}

    def __init__(self, about: str = "1", stop_at: int = 0) -> None:
        self.about, self.stop_at, self.asked = about, stop_at, 0

    def feature(self, image: object) -> np.ndarray:
        self.asked += 1
        if self.asked == self.stop_at:
            raise KeyboardInterrupt
        return np.array([np.asarray(image).mean()])

    def compare(self, made_ND: np.ndarray, real_MD: np.ndarray) -> dict[str, float]:
        return {"apart": float(abs(made_ND.mean() - real_MD.mean()))}


def test_sets_are_compared_with_references_or_refused(results: Results, tmp_path: Path) -> None:
    no_folder = str(tmp_path / "file")
    Path(no_folder).touch()
    with pytest.raises(ConfigError, match=r"metrics\.references='.*file': is no folder"):
        score(results, [], [Mean()], no_folder)
    with pytest.raises(ConfigError, match=r"metrics\.references=None: needs two real images .* there are 0 and 8"):
        score(results, [], [Mean()])
    references = results.benchmark.folder / "images"
    found = score(results, [], [Mean()], str(references))["numbers"]["apart_edits"]["categories"]
    assert {category: estimate["n"] for category, estimate in found.items()} == {"all": 8, "hats": 6, "coats": 2}
    assert found["all"]["real"] == 9
    about = score(results, [], [Mean()], str(references))["numbers"]["apart_edits"]["about"]
    (tmp_path / "others").mkdir()
    for i in range(9):
        save_image(tmp_path / "others" / f"{i}.png", 100 + i)
    other = score(results, [], [Mean()], str(tmp_path / "others"))["numbers"]["apart_edits"]["about"]
    assert about.startswith("1; against 9 real images ")
    assert about != other, "a report does not hold numbers against other real images for comparable"
    assert "apart_edits" in score(results, [Told(number)])["numbers"], "a later score of something else keeps it"
    results.image("0000", 0).unlink()
    summary = score(results, [])
    assert summary["numbers"]["apart_edits"]["categories"] == {}, "but no value once it is of other images"
    assert set(summary["numbers"]["apart_edits"]["failed"]) == {f"000{i}@0" for i in range(1, 8)}
    make(Inverter(), results.benchmark.folder, results.folder, MakingConfig(seeds=2, at_once=4))
    summary = score(open_results(results.folder), [])
    assert summary["numbers"]["apart_edits"]["failed"]["0003@1"] == "was not measured yet; score again"
    assert "0003@0" not in summary["numbers"]["apart_edits"]["failed"]
    assert not complete(summary)
    assert "apart_edits" in table(summary)
    results.image("0000", 0).unlink()
    (references / "z.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"z\.png cannot be decoded"):
        score(results, [], [Mean()], str(references))


def test_edits_and_text_to_image_are_sets_of_their_own(tmp_path: Path) -> None:
    """Each against its own targets, by category too; what has none is named."""
    rows = [line(i, "hats" if i < 4 else "coats", target_file_name=f"images/t{i}.png") for i in range(5)]
    rows += [line(i, "scenes", file_name=None, height=32, width=48) for i in range(5, 8)]
    folder = benchmark(tmp_path / "b", rows)
    for i in range(4):
        Image.new("RGB", (48, 32), (200, 200, 200)).save(folder / "images" / f"t{i}.png")
    make(Inverter(), folder, tmp_path / "out")
    results = open_results(tmp_path / "out")
    found = score(results, [], [Mean()])["numbers"]
    edits, described = found["apart_edits"], found["apart_text_to_image"]
    assert edits["categories"]["all"]["n"] == 5
    made = np.mean([np.asarray(Image.open(results.image(f"{i:04d}", 0))).mean() for i in range(4)])
    assert edits["categories"]["hats"]["value"] == pytest.approx(abs(made - 200), abs=1e-3), "of this category alone"
    assert edits["left_out"] == {"category coats": "1 made and 1 real images; at least 2 of each are needed"}
    assert described["categories"] == {}
    assert described["failed"].keys() == {"0005@0", "0006@0", "0007@0"}
    assert described["failed"]["0005@0"] == "3 made and 0 real images; at least 2 of each are needed"
    found = score(results, [], [Mean()], str(folder / "images"))["numbers"]
    assert found["apart_text_to_image"]["categories"]["all"]["n"] == 3
    grey = np.mean([np.asarray(Image.open(file)).mean() for file in sorted((folder / "images").glob("*.png"))])
    assert found["apart_text_to_image"]["categories"]["all"]["value"] == pytest.approx(abs(127 - grey), abs=1e-3)


def test_what_a_metric_leaves_out_is_named_and_no_failure(results: Results) -> None:
    def value(shown: Shown) -> float:
        if shown.case.category == "coats":
            raise LeftOut("no coat in sight")
        return number(shown)

    summary = score(results, [Told(value)])
    told = summary["numbers"]["told"]
    assert told["left_out"] == {"0006@0": "no coat in sight", "0007@0": "no coat in sight"}
    assert told["failed"] == {}
    assert told["categories"]["all"]["n"] == 6
    assert "does not apply to 2: 0006@0, 0007@0" in table(summary)
    assert complete(summary)
    again = Told(value)
    score(results, [again])
    assert again.asked == [], "it is known"
    results.image("0000", 0).unlink()
    assert not complete(score(results, []))


def test_images_of_two_folders_are_two_base_images(tmp_path: Path) -> None:
    rows = [line(i, file_name=f"{place}/0.png") for i, place in enumerate(("a", "b", "a"))]
    folder = benchmark(tmp_path / "b", [*rows, line(3, file_name=None)])
    assert [case.base for case in read_benchmark(folder).pairs] == ["a/0.png", "b/0.png", "a/0.png", "@0003"]


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
    assert (estimate.value, estimate.n) == (2.0, 3)
    assert bootstrap.mean([]) is None


def sliced(
    folder: Path, best_by: str, world: World | None = None, options: MetricsConfig | None = None
) -> BenchmarkSlice:
    nothing: Any = None
    return BenchmarkSlice(
        InTrainingConfig(benchmark=str(folder), metrics=options or MetricsConfig()),
        nothing,
        SamplerConfig(),
        ShiftConfig(),
        Inverter.transform,
        best_by=best_by,
        guidance_embed=False,
        world=world or World(0, 1, torch.device("cpu"), nothing, None, 1),
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
    words = benchmark(tmp_path / "words", [line(0, "Text Editing", instruction="remove the text")])
    with pytest.raises(ConfigError, match=r"checkpoint\.best_by='benchmark/text_found': would never be known"):
        sliced(words, "benchmark/text_found", options=MetricsConfig(ocr=True))
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


def test_ranks_wait_for_a_slow_judge_in_no_collective(tmp_path: Path) -> None:
    """Rank 0 measures for longer than a collective may last; a broadcast in its place ends the run."""
    folder = benchmark(tmp_path / "b", [line(0)])
    runs.in_processes(2, slow_slice, folder)


def slow_slice(folder: Path) -> None:
    with process_group(ParallelConfig()) as world:
        _set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
        found = sliced(folder, "validation/loss", world)
        nothing: Any = None
        found._make = lambda model: {}  # type: ignore[method-assign, assignment]
        found._score = lambda images, step: time.sleep(2.5) or {"benchmark/vlm_follows": float(step)}  # type: ignore[method-assign, assignment]
        for step in (7, 7, 9):  # a run may go back to a step
            assert found.measure(torch.nn.Linear(1, 1), step) == {"benchmark/vlm_follows": float(step)}
            found._score = lambda images, step: {"benchmark/vlm_follows": float(step)}  # type: ignore[method-assign]
        if world.is_main:
            time.sleep(2.5)
            return
        with pytest.raises(RuntimeError, match=r"(?i)timed? ?out|closed"):
            dist.broadcast_object_list([nothing], src=0)
