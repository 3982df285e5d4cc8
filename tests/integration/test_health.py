"""Runs in trouble: bad updates named, skipped or rolled back exactly; slow ranks named; what a run writes of itself."""

import gzip
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import Encoder
from transformers.models.t5.modeling_t5 import T5Block

from kontext_train.config import TrainConfig
from kontext_train.data import loader
from kontext_train.data.batch import PixelBatch
from kontext_train.data.plan import Position
from kontext_train.errors import ConfigError
from kontext_train.evaluation.trained import resolve
from kontext_train.models.layers import SingleStreamBlock
from kontext_train.train import train
from kontext_train.trainer import Trainer
from kontext_train.training import checkpoint
from kontext_train.training.metrics import read_metrics
from kontext_train.training.optimizer import PhaseOptimizer
from kontext_train.training.stability import Stability, Unstable
from tests.integration.test_train import largest_difference, losses, weights
from tests.runs import broken_copy, in_processes, run, small_config

ONE_WINDOW = "data.window_samples=200"  # so that a place in the data is a number of steps


@pytest.fixture(autouse=True)
def _patches_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `poison` replaces is back after each test that trains in this process."""
    monkeypatch.setattr(loader, "read_pack", loader.read_pack)


def poison(factor: float, places: list[int], rank: int = 0) -> None:
    """From now on the loss of the n-th steps of the data, counted from 1, is too large on one rank."""
    made = loader.read_pack

    def read_pack(*arguments: Any, **options: Any) -> PixelBatch:
        batch = made(*arguments, **options)
        if int(os.environ.get("RANK", "0")) == rank and place(batch.position) in places:
            batch.weight_S *= factor
        return batch

    loader.read_pack = read_pack


def place(position: Position) -> int:
    """Steps of the first window up to a position in it."""
    assert (position.window, position.pack) == (0, 0)
    return sum(steps for _, steps in position.legs)


def poisoned(config: TrainConfig, factor: float, places: list[int], rank: int) -> None:
    poison(factor, places, rank)
    train(config)


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "health.jsonl").read_text().splitlines()]


def test_without_a_policy_all_ranks_stop_and_name_rank_phase_and_samples(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small_config(shards, tmp_path, "run.steps=6", ONE_WINDOW)
    with pytest.raises(AssertionError, match=r"exit codes of the ranks: \[1, 1\]"):
        in_processes(2, poisoned, config, float("nan"), [4], 1)
    (event,) = events(tmp_path)
    assert (event["event"], event["step"], event["phase"], event["loss"]) == ("not finite", 3, "student", "nan")
    first, second = event["packs"]
    assert (first["rank"], first["loss"], second["rank"]) == (1, "nan", 0)
    assert isinstance(second["loss"], float)
    told = capfd.readouterr().err
    for pack in event["packs"]:
        assert all(key.startswith("data.train:train-00000.tar:train_") for key in pack["samples"])
        said = f"step 3, phase student, rank {pack['rank']}: gradient norm is nan, loss nan, no update was made. The "
        blamed = f"loss is not finite on rank 1, for the packs of these samples: {', '.join(first['samples'])}. "
        assert f"{said}{blamed}This rank's samples: {', '.join(pack['samples'])}. " in told
    assert losses(tmp_path) != []
    assert checkpoint.complete_checkpoints(tmp_path / "checkpoints") == []


SPIKES = ("run.steps=12", "run.save_every_steps=4", "health.spike_window=4", "ema.half_life_images=50", ONE_WINDOW)


def test_a_spike_is_skipped_as_if_there_were_no_update_and_resumes_bitwise(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data steps 7 and 10 have a loss a thousand times too large. The window is full after four steps."""
    poison(1000, [7, 10])
    policy = (*SPIKES, "health.spike_mads=200")
    train(small_config(shards, tmp_path / "policy", *policy))
    assert [(e["event"], e["step"]) for e in events(tmp_path / "policy")] == [("skipped", 6), ("skipped", 9)]
    assert all(
        e["loss"] > 5 * e["loss_limit"] and len(e["packs"][0]["samples"]) > 0 for e in events(tmp_path / "policy")
    )
    logged = {
        r["step"]: r["health/skipped"] for r in read_metrics(tmp_path / "policy" / "metrics.jsonl") if "loss" in r
    }
    assert [logged[step] for step in (6, 7, 9, 10, 12)] == [0, 1, 1, 2, 2]

    saved = tmp_path / "policy" / "checkpoints" / "step_00000008"
    train(small_config(shards, tmp_path / "resumed", *policy, f"run.resume={saved}"))
    record = json.loads((saved / "record.json").read_text())
    assert [len(values) for values in record["stability"]["accepted"].values()] == [4, 4]
    assert record["stability"] | {"accepted": {}} == {"accepted": {}, "skips": [6], "skipped": 1, "rollbacks": 0}

    monkeypatch.setattr(Stability, "load", lambda self, state: None)
    train(small_config(shards, tmp_path / "forgetful", *policy, f"run.resume={saved}"))
    monkeypatch.setattr(Stability, "accepts", lambda self, step, *rest: step not in (6, 9))
    train(small_config(shards, tmp_path / "told", *SPIKES))
    monkeypatch.setattr(Stability, "accepts", lambda self, step, *rest: True)
    train(small_config(shards, tmp_path / "none", *SPIKES))
    for ema in (False, True):
        of = {name: weights(tmp_path / name, ema) for name in ("policy", "resumed", "told", "forgetful", "none")}
        assert largest_difference(of["policy"], of["told"]) == 0
        assert largest_difference(of["policy"], of["resumed"]) == 0
        assert largest_difference(of["policy"], of["forgetful"]) > 1e-4  # the control of the saved state
        assert largest_difference(of["policy"], of["none"]) > 1e-4


def test_too_many_skips_end_the_run_or_roll_it_back(shards: Path, tmp_path: Path) -> None:
    poison(1000, [6, 7, 8])
    policy = (*SPIKES, "health.spike_mads=200", "health.max_skips=2")
    with pytest.raises(
        Unstable, match=r"step 7, .*3 updates of the last 4 steps were skipped, health\.max_skips=2 are"
    ):
        train(small_config(shards, tmp_path / "ends", *policy))
    train(small_config(shards, tmp_path / "goes_on", *policy, "health.max_rollbacks=1"))
    assert [(e["event"], e["step"]) for e in events(tmp_path / "goes_on")] == [
        ("skipped", 5),
        ("skipped", 6),
        ("skipped", 7),
        ("rolled back", 7),
    ]
    assert checkpoint.read_record(resolve(tmp_path / "goes_on"))["step"] == 12


def from_a_later_place(config: TrainConfig, steps: int) -> None:
    """A run that resumes elsewhere in the data than its checkpoint says."""
    made = Trainer.load

    def load(self: Trainer, path: Path) -> None:
        made(self, path)
        ((packs, _),) = self.position.legs
        self.position = replace(self.position, legs=((packs, steps),))

    Trainer.load = load  # type: ignore[method-assign]
    train(config)


FLOAT8 = (
    *("parallel.float8=tensorwise", "parallel.float8_emulate=true", "parallel.float8_min_features=16"),
    *("parallel.master_dtype=bfloat16", "optimizer.stochastic_rounding=true", "optimizer.moments=int8"),
    *("model.hidden_size=64", "model.axes_dim=[8,12,12]"),
)


@pytest.mark.parametrize("lean", [(), FLOAT8], ids=["plain", "float8"])
def test_a_rollback_is_a_resume_past_the_bad_data_bit_by_bit(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], lean: tuple[str, ...]
) -> None:
    """On two ranks; the seventh step of the data is poisoned on one of them, and the last checkpoint is of step 4."""
    options = ("run.steps=10", "run.save_every_steps=4", "ema.half_life_images=50", ONE_WINDOW, *lean)
    policy = (*options, "health.max_rollbacks=1")
    in_processes(2, poisoned, small_config(shards, tmp_path / "run", *policy), float("nan"), [7], 1)
    bad, back = events(tmp_path / "run")
    assert (bad["event"], bad["step"], bad["packs"][0]["rank"]) == ("not finite", 6, 1)
    assert (back["event"], back["step"], back["to_step"], back["steps_of_data_left_out"]) == ("rolled back", 6, 4, 3)
    assert "step 6: back to step 4, leaving out the data of 3 steps (rollback 1 of at most 1)" in capfd.readouterr().err
    steps = [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, 11))
    saved = {p.name: p for p in checkpoint.complete_checkpoints(tmp_path / "run" / "checkpoints")}
    record = checkpoint.read_record(saved["step_00000008"])
    assert record["position"]["legs"] == [[2, 7 + 4]]
    assert record["stability"]["rollbacks"] == 1

    reference = small_config(shards, tmp_path / "reference", *options, f"run.resume={saved['step_00000004']}")
    in_processes(2, from_a_later_place, reference, 7)
    run(small_config(shards, tmp_path / "resumed", *policy, f"run.resume={saved['step_00000008']}"), processes=2)
    for ema in (False, True):
        ours, expected, resumed = (weights(tmp_path / name, ema) for name in ("run", "reference", "resumed"))
        assert largest_difference(ours, expected) == 0
        assert largest_difference(ours, resumed) == 0
    assert losses(tmp_path / "run")[4:] == losses(tmp_path / "reference")
    assert all(torch.isfinite(weight).all() for weight in ours.values())


def test_rollbacks_are_bounded_and_need_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    poison(float("nan"), [3, 5])
    options = ("run.steps=6", "health.max_rollbacks=1", ONE_WINDOW)
    with pytest.raises(Unstable, match=r"step 3, phase student, rank 0: gradient norm is nan"):
        train(small_config(shards, tmp_path / "twice", *options, "run.save_every_steps=2"))
    assert [e["event"] for e in events(tmp_path / "twice")] == ["not finite", "rolled back", "not finite"]
    with pytest.raises(Unstable, match="step 2, phase student") as stopped:
        train(small_config(shards, tmp_path / "early", *options))
    assert any("no rollback (health.max_rollbacks)" in note for note in stopped.value.__notes__)


def test_bad_samples_of_a_step_that_is_rolled_back_are_named(shards: Path, tmp_path: Path) -> None:
    options = ("run.steps=6", "run.save_every_steps=2", "data.max_bad_fraction=0.5", ONE_WINDOW)
    poison(float("nan"), [4])
    with pytest.raises(Unstable):
        train(small_config(shards, tmp_path / "finds", *options))
    key = events(tmp_path / "finds")[0]["packs"][0]["samples"][0]  # of the fourth step
    broken = broken_copy(shards, tmp_path / "broken", [int(key.rpartition("_")[2])])
    train(small_config(broken, tmp_path / "run", *options, "health.max_rollbacks=1"))
    assert [e["event"] for e in events(tmp_path / "run")] == ["not finite", "rolled back"]
    (noted,) = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert key.rpartition(":")[2] in noted
    assert checkpoint.read_record(resolve(tmp_path / "run"))["bad_samples"]["count"] == 1


def test_a_rollback_that_fails_hides_no_cause(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(resume: str, paths: Sequence[Path]) -> Path | None:
        if paths:
            raise ConfigError("run.resume", resume, "step_00000002 is damaged", "Restore it")
        return None

    poison(float("nan"), [3])
    monkeypatch.setattr(checkpoint, "newest_whole", damaged)
    options = ("run.steps=6", "run.save_every_steps=2", "health.max_rollbacks=1", ONE_WINDOW)
    with pytest.raises(Unstable, match=r"step 2, phase student, rank 0: gradient norm is nan") as stopped:
        train(small_config(shards, tmp_path, *options))
    assert any("no rollback: run.resume='auto': step_00000002 is damaged" in note for note in stopped.value.__notes__)


def sleeps_before(rank: int, owner: Any, name: str) -> None:
    """One rank's calls of a method take their time."""
    if int(os.environ["RANK"]) == rank:
        made = getattr(owner, name)

        def method(*arguments: Any, **options: Any) -> Any:
            time.sleep(0.4)
            return made(*arguments, **options)

        setattr(owner, name, method)


class SleepsBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(0.4)
        return gradient


def slow_ranks(config: TrainConfig, slow: dict[str, int]) -> None:
    """slow: which rank takes its time, by what for. A rank that waits for it must not be taken for it."""
    train_batches, forward = loader.train_batches, SingleStreamBlock.forward

    def slow_batches(*arguments: Any, **options: Any) -> Any:
        for batch in train_batches(*arguments, **options):
            time.sleep(0.4)
            yield batch

    for what, rank in slow.items():
        match what:
            case "data" if rank == int(os.environ["RANK"]):
                loader.train_batches = slow_batches
            case "autoencoder":
                sleeps_before(rank, Encoder, "forward")
            case "text encoder":  # sharded: the ranks gather every block's weights together
                sleeps_before(rank, T5Block, "forward")
            case "forward":
                sleeps_before(rank, SingleStreamBlock, "forward")
            case "backward" if rank == int(os.environ["RANK"]):
                SingleStreamBlock.forward = lambda *inputs: SleepsBack.apply(forward(*inputs))  # type: ignore[method-assign]
            case "update":
                sleeps_before(rank, PhaseOptimizer, "step")
    train(config)


@pytest.mark.parametrize(
    ("slow", "named"),
    [
        ({"data": 0, "forward": 1}, {"data": 0, "train": 1}),
        ({"autoencoder": 1, "backward": 0}, {"encode": 1, "train": 0}),
        ({"text encoder": 0, "update": 1}, {"encode": 0, "update": 1}),
    ],
    ids=lambda value: "-".join(value),
)
def test_a_slow_rank_is_named_with_what_it_is_slow_at(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], slow: dict[str, int], named: dict[str, int]
) -> None:
    """The ranks wait for each other in every block, so that a step takes the same time on both."""
    options = ("run.steps=6", "health.straggler_factor=1.5")  # of the mean of two: three times the other
    in_processes(2, slow_ranks, small_config(shards, tmp_path, *options), slow)
    told = capfd.readouterr().err
    last = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r][-1]
    for part, rank in named.items():
        assert f"kontext-train: rank {rank} is slow at {part}: " in told
        assert f"rank {1 - rank} is slow at {part}: " not in told
        assert last[f"straggler/{part}/rank"] == rank
        assert last[f"straggler/{part}/seconds"] > 0.4


def test_ranks_that_are_alike_are_not_named(shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("run.steps=4", "health.straggler_factor=1.75")  # seven times the other
    run(small_config(shards, tmp_path / "on", *options), processes=2)
    assert "is slow at" not in capfd.readouterr().err
    run(small_config(shards, tmp_path / "off", "run.steps=1", "health.straggler_factor=0"), processes=2)
    assert not any("straggler" in key for r in read_metrics(tmp_path / "off" / "metrics.jsonl") for key in r)


def test_a_profile_names_the_phases_of_its_steps_and_no_others(shards: Path, tmp_path: Path) -> None:
    window = ("profiler.start_step=1", "profiler.steps=2")
    train(small_config(shards, tmp_path, "run.steps=5", *window))
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "rank_0000_step_00000001.json.gz"
    with gzip.open(file, "rt") as stream:
        names = [event.get("name", "") for event in json.load(stream)["traceEvents"]]
    for phase in ("data", "encode", "student forward and backward", "student update", "log"):
        assert names.count(phase) == 2, phase
    assert any("addmm" in name for name in names)
    train(small_config(shards, tmp_path / "past", "run.steps=6", *window, f"run.resume={resolve(tmp_path)}"))
    assert not (tmp_path / "past" / "profile").exists()


def test_a_run_folder_explains_each_start(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "SLURM_JOB_PASSWORD", "NCCL_SECRET"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    train(small_config(shards, tmp_path, "run.steps=1"))
    train(small_config(shards, tmp_path, "run.steps=2", "health.straggler_factor=2"))
    first, second = sorted((tmp_path / "starts").iterdir())
    assert (first.name, second.name) == ("0001", "0002")
    start = json.loads((second / "start.json").read_text())
    assert start["resumed_from"].endswith("checkpoints/step_00000001")
    assert json.loads((first / "start.json").read_text())["resumed_from"] is None
    assert start["command"] == shlex.join(sys.orig_argv)
    assert [host["ranks"] for host in start["hosts"].values()] == [[0]]
    environment = json.loads((second / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["distributions"]["numpy"]
    assert environment["variables"]["NCCL_DEBUG"] == "INFO"
    assert not any("hunter2" in file.read_text() for file in tmp_path.glob("starts/*/*"))
    assert (second / "config.yaml").read_text() == (tmp_path / "config.yaml").read_text()
    assert (second / "config.yaml").read_text() != (first / "config.yaml").read_text()
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["step"], beat["phase"], beat["pid"]) == (2, "end", os.getpid())


def test_options_that_could_do_nothing_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"health\.memory_history=100: is of a GPU's allocator, and there is no GPU"):
        train(small_config(shards, tmp_path, "health.memory_history=100"))
