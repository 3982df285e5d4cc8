"""Whole runs on several sources, and on shards with samples that cannot be read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kontext_train.config import TrainConfig
from kontext_train.data import loader
from kontext_train.data.batch import PixelBatch
from kontext_train.data.index_build import build_index
from kontext_train.data.sample import BadSample
from kontext_train.errors import ConfigError
from kontext_train.evaluation.trained import resolve
from kontext_train.train import train
from kontext_train.training import bad_samples, checkpoint
from kontext_train.training.metrics import read_metrics
from quickstart.make_dataset import write_shards
from tests.integration.test_train import largest_difference, losses, noting_visits, weights
from tests.runs import SMALL, broken_copy, compose_config, in_processes, run, small_config

BAD = list(range(0, 200, 9))


@pytest.fixture(scope="module")
def broken(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return broken_copy(shards, tmp_path_factory.mktemp("bad") / "broken", BAD)


def blind_to_bad(config: TrainConfig) -> None:
    """A run whose reader gives the bad samples weight 0, though it can read them."""
    made = loader.read_pack

    def read_pack(*arguments: Any, **options: Any) -> PixelBatch:
        batch = made(*arguments, **options)
        batch.weight_S *= torch.tensor([visit % 200 not in BAD for visit in batch.visits])
        return batch

    loader.read_pack = read_pack
    train(config)


TOLERANT = ("data.max_bad_fraction=0.5", "run.steps=3")


@pytest.mark.slow
def test_training_with_holes_is_training_without_those_samples(shards: Path, broken: Path, tmp_path: Path) -> None:
    """And the loss is divided by the planned number of samples. On one process and on two."""
    run(small_config(broken, tmp_path / "holes", *TOLERANT, "run.microbatches=2"))
    run(small_config(broken, tmp_path / "two", *TOLERANT, "data.workers=1"), processes=2)
    in_processes(1, blind_to_bad, small_config(shards, tmp_path / "blind", *TOLERANT, "run.microbatches=2"))
    run(small_config(shards, tmp_path / "whole", *TOLERANT, "run.microbatches=2"))
    holes, two, blind, whole = (weights(tmp_path / name) for name in ("holes", "two", "blind", "whole"))
    assert largest_difference(holes, blind) == 0
    assert largest_difference(two, holes) <= 1e-5
    assert largest_difference(whole, holes) > 1e-3  # control
    assert losses(tmp_path / "holes") == losses(tmp_path / "blind")
    one, other = (bad_lines(tmp_path / name) for name in ("holes", "two"))
    assert [(line["step"], line["visit"], line["key"]) for line in one] == [
        (line["step"], line["visit"], line["key"]) for line in other
    ]
    assert {line["visit"] % 200 for line in one} <= set(BAD)
    assert all("cannot be decoded" in line["reason"] and line["key"] in line["reason"] for line in one)
    record = checkpoint.read_record(resolve(tmp_path / "two"))
    assert record["bad_samples"]["count"] == len(one) > 0
    told = [line["bad_samples"] for line in read_metrics(tmp_path / "two" / "metrics.jsonl") if "bad_samples" in line]
    assert told[-1] == len(one)


def bad_lines(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["step"], line["visit"]))


def test_too_many_bad_samples_stop_all_ranks_after_saving_and_a_resume_remembers(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bad_samples, "FEWEST_SAMPLES", 40)
    config = small_config(broken, tmp_path, "data.max_bad_fraction=0.05", "run.steps=50", "run.save_every_steps=1000")
    with pytest.raises(AssertionError, match=r"exit codes of the ranks: \[1, 1\]"):
        in_processes(2, train, config)
    told = capfd.readouterr().err
    record = checkpoint.read_record(resolve(tmp_path))
    bad, seen = record["bad_samples"]["count"], record["bad_samples"]["seen"]
    assert told.count(f"data.max_bad_fraction=0.05: but {bad} of the first {seen} samples could not be read") == 2
    assert told.count("left out a bad sample") == len(bad_lines(tmp_path)) == bad > 0.05 * max(40, seen)
    with pytest.raises(ConfigError, match=r"data\.max_bad_fraction=0\.05: but \d+ of the first"):
        train(config)
    resumed = checkpoint.read_record(resolve(tmp_path))
    assert resumed["step"] == record["step"] + 1
    assert resumed["bad_samples"]["count"] >= bad


def test_a_fraction_of_zero_stops_at_the_first(broken: Path, tmp_path: Path) -> None:
    with pytest.raises(BadSample, match="target: cannot be decoded"):
        train(small_config(broken, tmp_path, "data.max_bad_fraction=0", "run.steps=50"))


def test_a_killed_runs_bad_samples_are_not_told_twice(tmp_path: Path) -> None:
    file = tmp_path / "bad_samples.jsonl"
    file.write_text('{"step": 1}\n{"step": 3}\n{"st')
    found = bad_samples.BadSamples(0.1, tmp_path, is_main=True)
    found.load({"count": 1, "seen": 20}, step=2)
    assert file.read_text() == '{"step": 1}\n'
    assert found.state() == {"count": 1, "seen": 20}


# -------------------------------------------------------------------------------------------------------------- sources


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("second")
    write_shards(folder, 50)
    build_index(folder)
    return folder


def mixed_config(shards: Path, second: Path, run_dir: Path, *overrides: str) -> TrainConfig:
    paths = (f"+data.sources.a.path={shards}", f"+data.sources.b.path={second}")
    return compose_config(*SMALL, *paths, f"run.dir={run_dir}", *overrides)


@pytest.mark.slow
def test_a_mixture_trains_and_resumes_at_other_world_sizes(shards: Path, second: Path, tmp_path: Path) -> None:
    options = ("+data.sources.b.repeat=2", "+data.sources.b.max_pixels=256", "run.save_every_steps=1")
    for steps, processes in ((2, 2), (3, 3), (70, 1)):
        config = mixed_config(shards, second, tmp_path, f"run.steps={steps}", *options)
        in_processes(processes, noting_visits, config, tmp_path)
    visits = [int(line) for file in tmp_path.glob("visits.*") for line in file.read_text().split()]
    assert len(set(visits)) == len(visits)
    rows = [v % 250 for v in visits if v < 250]
    assert sorted(rows) == list(range(250)), "the first epoch of each source"
    second_epoch = [v % 250 for v in visits if 250 <= v < 500]
    assert sorted(row for row in second_epoch if row >= 200) == list(range(200, 250)), "b comes twice as often"


def test_another_mixture_is_another_plan(shards: Path, second: Path, tmp_path: Path) -> None:
    train(mixed_config(shards, second, tmp_path, "run.steps=1"))
    with pytest.raises(ConfigError, match=r"run\.resume=.*was planned with other data settings"):
        train(mixed_config(shards, second, tmp_path, "run.steps=2", "+data.sources.b.repeat=2"))
