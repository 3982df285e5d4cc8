"""Whole runs on real shards: the same result however they are cut into processes, sessions and world sizes."""

import json
import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from kontext_train.evaluation.trained import load_model, read_config, resolve
from kontext_train.train import REQUEUE, train
from kontext_train.training import checkpoint
from kontext_train.training.metrics import read_metrics
from tests.runs import run, small_config


def weights(run_dir: Path, ema: bool = False) -> dict[str, torch.Tensor]:
    path = resolve(run_dir)
    return {k: v.detach() for k, v in load_model(path, read_config(path), ema).named_parameters()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def losses(run_dir: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, two packs a step, ten steps."""
    folder = tmp_path_factory.mktemp("straight")
    run(small_config(shards, folder, "run.steps=10", "run.microbatches=2", "ema.half_life_images=50"))
    return folder


def test_two_processes_equal_one_on_the_same_global_batch(shards: Path, straight: Path, tmp_path: Path) -> None:
    run(small_config(shards, tmp_path, "run.steps=10", "ema.half_life_images=50"), processes=2)
    assert largest_difference(weights(tmp_path), weights(straight)) <= 1e-5
    assert largest_difference(weights(tmp_path, ema=True), weights(straight, ema=True)) <= 1e-5
    assert losses(tmp_path) == pytest.approx(losses(straight), rel=1e-5)


def test_half_the_global_batch_differs(shards: Path, straight: Path, tmp_path: Path) -> None:
    """Negative control of the test above."""
    run(small_config(shards, tmp_path, "run.steps=10", "ema.half_life_images=50"))
    assert largest_difference(weights(tmp_path), weights(straight)) > 1e-3


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_and_resumed_is_bitwise_the_same(shards: Path, tmp_path: Path, processes: int, optimizer: str) -> None:
    options = ("run.steps=10", f"optimizer.name={optimizer}", "ema.half_life_images=50", "data.prompt_dropout=0.5")
    run(small_config(shards, tmp_path / "straight", *options), processes)

    broken = small_config(shards, tmp_path / "broken", *options, "run.save_every_steps=5")
    context = get_context("fork")
    victim = context.Process(target=run, args=(broken, processes))
    victim.start()
    while not checkpoint.complete_checkpoints(tmp_path / "broken" / "checkpoints"):
        assert victim.is_alive()
        time.sleep(0.02)
    _kill_tree(victim.pid)
    victim.join()
    assert resolve(tmp_path / "broken").name == "step_00000005"

    run(broken, processes)
    ours, expected = weights(tmp_path / "broken"), weights(tmp_path / "straight")
    assert largest_difference(ours, expected) == 0
    averages = (weights(tmp_path / name, ema=True) for name in ("broken", "straight"))
    assert largest_difference(*averages) == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")


def _kill_tree(pid: int | None) -> None:
    import psutil

    root = psutil.Process(pid)
    for process in [*root.children(recursive=True), root]:
        process.send_signal(signal.SIGKILL)


def test_resume_at_another_world_size_loses_and_repeats_nothing(shards: Path, tmp_path: Path) -> None:
    """One epoch of 200 samples: 2 steps on two processes, the rest on one; every sample was seen exactly once."""
    options = ("run.save_every_steps=1", "run.keep_checkpoints=100", "data.tokens_per_pack=256")
    run(small_config(shards, tmp_path, "run.steps=2", *options), processes=2)
    run(small_config(shards, tmp_path, "run.steps=25", *options))
    records = [checkpoint.read_record(p) for p in checkpoint.complete_checkpoints(tmp_path / "checkpoints")]
    in_first_epoch = [r for r in records if r["position"]["epoch"] == 0]
    assert any(len(r["position"]["legs"]) == 2 for r in records), "the change of world size fell between windows"
    samples = [r["samples"] for r in read_metrics(tmp_path / "metrics.jsonl") if "samples" in r]
    assert len(in_first_epoch) < len(samples)
    assert sum(samples[: len(in_first_epoch)]) == 200


def test_a_signal_saves_and_asks_to_be_requeued(shards: Path, tmp_path: Path) -> None:
    config = small_config(shards, tmp_path, "run.steps=100000")
    process = get_context("fork").Process(target=train, args=(config,))
    process.start()
    while len(losses(tmp_path)) < 2:
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(timeout=60)
    assert process.exitcode == REQUEUE
    saved = resolve(tmp_path)
    assert checkpoint.read_record(saved)["step"] == read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]


def test_checkpoints_explain_themselves_and_old_ones_go(shards: Path, tmp_path: Path) -> None:
    run(small_config(shards, tmp_path, "run.steps=6", "run.save_every_steps=1", "run.keep_checkpoints=2"))
    kept = checkpoint.complete_checkpoints(tmp_path / "checkpoints")
    assert [p.name for p in kept] == ["step_00000005", "step_00000006"]
    record = json.loads((kept[-1] / "record.json").read_text())
    assert record["step"] == 6
    assert record["config"]["model"]["hidden_size"] == 32
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_nonfinite_gradient_stops_before_the_update_and_names_the_samples(shards: Path, tmp_path: Path) -> None:
    config = small_config(shards, tmp_path, "run.steps=20", "optimizer.lr=1e30", "run.save_every_steps=1")
    with pytest.raises(
        FloatingPointError, match=r"step \d+, phase student, rank 0: .* samples: train-00000.tar:train_"
    ):
        train(config)
    assert all(torch.isfinite(w).all() for w in weights(tmp_path).values())


def test_validation_is_deterministic_and_draws(shards: Path, tmp_path: Path) -> None:
    validation = ("validation.samples=16", "validation.pictures=3", "validation.sampler.steps=2")
    options = (f"data.validation={shards}", "run.steps=2", "run.validate_every_steps=1", *validation)
    for name, processes in (("one", 1), ("two", 2)):
        microbatches = f"run.microbatches={2 // processes}"
        run(small_config(shards, tmp_path / name, *options, microbatches), processes)
    values = [
        [r["validation/loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if "validation/loss" in r]
        for name in ("one", "two")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert len(set(values[0])) == 2, "the loss must follow the weights"
    assert (tmp_path / "one" / "samples" / "step_00000002.png").stat().st_size > 1000
