"""Real runs on a GPU: FSDP2 over NCCL on a mesh of one, from shards to checkpoints."""

from pathlib import Path

import pytest

from kontext_train.train import train
from kontext_train.training.metrics import read_metrics
from tests.runs import small_config

OPTIONS = (
    "parallel.param_dtype=bfloat16",
    "model.attention=torch_varlen",
    "run.save_every_steps=2",
    "optimizer.lr=3e-3",
)


def losses(run_dir: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r]


def test_a_run_learns(shards: Path, tmp_path: Path) -> None:
    train(small_config(shards, tmp_path, *OPTIONS, "run.steps=30", "run.save_every_steps=30"))
    found = losses(tmp_path)
    assert len(found) == 30
    assert sum(found[-10:]) < 0.9 * sum(found[:10])


def test_a_resumed_run_goes_on_from_the_very_bits(shards: Path, tmp_path: Path) -> None:
    """The loss of a step is a function of weights and data alone, and the forward pass of it is deterministic."""
    train(small_config(shards, tmp_path / "whole", *OPTIONS, "run.steps=3"))
    start = tmp_path / "whole" / "checkpoints" / "step_00000002"
    train(small_config(shards, tmp_path / "resumed", *OPTIONS, "run.steps=3", f"run.resume={start}"))
    _, second, third = losses(tmp_path / "whole")
    assert losses(tmp_path / "resumed") == [third]
    assert third != second


@pytest.mark.parametrize("option", ["parallel.compile=true", "parallel.activation_checkpointing=selective"])
def test_options_change_the_speed_and_not_the_result(shards: Path, tmp_path: Path, option: str) -> None:
    train(small_config(shards, tmp_path / "plain", *OPTIONS, "run.steps=3"))
    train(small_config(shards, tmp_path / "changed", *OPTIONS, "run.steps=3", option))
    assert losses(tmp_path / "changed") == pytest.approx(losses(tmp_path / "plain"), rel=2e-2)
