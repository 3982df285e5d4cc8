"""Whole runs on real shards: the same result however they are cut into processes, sessions and world sizes."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torchao.float8  # noqa: F401 - once, and not in every forked run

from kontext_train.config import TrainConfig
from kontext_train.data.batch import PixelBatch
from kontext_train.data.index_build import build_index
from kontext_train.data.loader import train_batches
from kontext_train.errors import ConfigError
from kontext_train.evaluation.trained import load_model, read_config, resolve
from kontext_train.train import REQUEUE, train
from kontext_train.trainer import Trainer
from kontext_train.training import checkpoint
from kontext_train.training.metrics import read_metrics
from tests.runs import fork, in_processes, run, small_config, start
from tests.servers import often, web_server


def weights(run_dir: Path, ema: bool = False) -> dict[str, torch.Tensor]:
    path = resolve(run_dir)
    return {k: v.detach() for k, v in load_model(path, read_config(path), ema).named_parameters()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def losses(run_dir: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r]


BFLOAT16_WEIGHTS = ("parallel.master_dtype=bfloat16", "optimizer.stochastic_rounding=true")
TEN_STEPS = ("run.steps=10", "ema.half_life_images=50")


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, two packs a step, ten steps."""
    folder = tmp_path_factory.mktemp("straight")
    run(small_config(shards, folder, *TEN_STEPS, "run.microbatches=2"))
    return folder


@pytest.mark.parametrize("shared", [(), ("parallel=cp", "run.microbatches=2")], ids=["fsdp", "cp"])
def test_two_processes_equal_one_on_the_same_global_batch(
    shards: Path, straight: Path, tmp_path: Path, shared: tuple[str, ...]
) -> None:
    """Whether they have packs of their own or share each; then losses are reported once and not twice."""
    run(small_config(shards, tmp_path, *TEN_STEPS, *shared), processes=2)
    assert largest_difference(weights(tmp_path), weights(straight)) <= 1e-5
    assert largest_difference(weights(tmp_path, ema=True), weights(straight, ema=True)) <= 1e-5
    assert losses(tmp_path) == pytest.approx(losses(straight), rel=1e-5)


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_run_and_compiles_little(shards: Path, tmp_path: Path) -> None:
    """With the real compiler, padded packs and recomputation."""
    options = ("run.steps=2", "data.pad_packs=true", "parallel.activation_checkpointing=selective")
    run(small_config(shards, tmp_path / "eager", *options))
    run(small_config(shards, tmp_path / "compiled", *options, "parallel.compile=true"))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    records = read_metrics(tmp_path / "compiled" / "metrics.jsonl")
    graphs = [r["compile/graphs"] for r in records if "compile/graphs" in r]
    assert len(graphs) == 2
    assert 2 <= graphs[-1] <= 4  # two kinds of block, and a pack of one sample has graphs of its own


def test_half_the_global_batch_differs(shards: Path, straight: Path, tmp_path: Path) -> None:
    """Negative control of the test above."""
    run(small_config(shards, tmp_path, *TEN_STEPS))
    assert largest_difference(weights(tmp_path), weights(straight)) > 1e-3


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_and_resumed_is_bitwise_the_same(shards: Path, tmp_path: Path, processes: int, optimizer: str) -> None:
    options = ("run.steps=10", f"optimizer.name={optimizer}", "ema.half_life_images=50", "data.prompt_dropout=0.5")
    run(small_config(shards, tmp_path / "straight", *options), processes)

    broken = small_config(shards, tmp_path / "broken", *options, "run.save_every_steps=5")
    with pytest.raises(AssertionError, match=r"exit codes of the ranks: \[(-9(, )?)+\]"):
        in_processes(processes, killed_in_step_seven, broken)
    assert resolve(tmp_path / "broken").name == "step_00000005"
    assert losses(tmp_path / "broken") != losses(tmp_path / "straight")

    run(broken, processes)
    ours, expected = weights(tmp_path / "broken"), weights(tmp_path / "straight")
    assert largest_difference(ours, expected) == 0
    averages = (weights(tmp_path / name, ema=True) for name in ("broken", "straight"))
    assert largest_difference(*averages) == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")


def killed_in_step_seven(config: TrainConfig) -> None:
    """A run whose every rank gets SIGKILL with its seventh update half made."""
    made = Trainer.train_phase

    def train_phase(self: Trainer, *arguments: Any) -> Any:
        result = made(self, *arguments)
        if self.step == 6:
            self.saver.finish()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Trainer.train_phase = train_phase  # type: ignore[method-assign]
    train(config)


def noting_visits(config: TrainConfig, folder: Path) -> None:
    """A run that notes every sample it trains on."""
    made = Trainer.train_step

    def train_step(self: Trainer, pixels: list[PixelBatch]) -> Any:
        with (folder / f"visits.{os.getpid()}").open("a") as file:
            for batch in pixels:
                kept = (v for v, weight in zip(batch.visits, batch.weight_S.tolist(), strict=True) if weight > 0)
                file.writelines(f"{visit}\n" for visit in kept)
        return made(self, pixels)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    train(config)


def test_resume_at_other_world_sizes_loses_and_repeats_nothing(shards: Path, tmp_path: Path) -> None:
    """Two steps on two processes, one on three, the rest of the epoch on one: each of 200 samples is seen once."""
    options = ("run.save_every_steps=1", "checkpoint.keep_last=100", "data.tokens_per_pack=128")
    for steps, processes, workers in ((2, 2, 2), (3, 3, 1), (90, 1, 0)):
        config = small_config(shards, tmp_path, f"run.steps={steps}", f"data.workers={workers}", *options)
        in_processes(processes, noting_visits, config, tmp_path)
    records = [checkpoint.read_record(p) for p in checkpoint.complete_checkpoints(tmp_path / "checkpoints")]
    assert max(len(r["position"]["legs"]) for r in records) == 3, "the changes fell between windows"
    assert records[-1]["position"]["window"] >= 3
    visits = [int(line) for file in tmp_path.glob("visits.*") for line in file.read_text().split()]
    assert sorted(v for v in visits if v < 200) == list(range(200))


def test_an_unfinished_save_is_neither_taken_nor_kept(shards: Path, tmp_path: Path) -> None:
    run(small_config(shards, tmp_path, "run.steps=2"))
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step_00000002", folder / "step_00000003", ignore=shutil.ignore_patterns("COMPLETE"))
    shutil.copytree(folder / "step_00000002", folder / "step_00000004")
    (folder / "step_00000004" / "COMPLETE").unlink()
    assert checkpoint.find_resume("auto", folder) == [folder / "step_00000002"]
    run(small_config(shards, tmp_path, "run.steps=4"))
    assert [p.name for p in sorted(folder.iterdir())] == ["step_00000002", "step_00000004"]
    assert resolve(tmp_path).name == "step_00000004"


def test_an_older_checkpoint_is_not_mixed_with_newer_ones(shards: Path, tmp_path: Path) -> None:
    run(small_config(shards, tmp_path / "first", "run.steps=3", "run.save_every_steps=1"))
    old = tmp_path / "first" / "checkpoints" / "step_00000002"
    for own in (old, old.with_name("step_00000003")):  # the newest too: it is so only until the next save
        with pytest.raises(ConfigError, match=r"run\.resume=.*step_0000000\d': is one of the run's own checkpoints"):
            train(small_config(shards, tmp_path / "first", "run.steps=4", f"run.resume={own}"))
    with pytest.raises(ConfigError, match=r"run\.resume='/nowhere': is not a complete checkpoint"):
        train(small_config(shards, tmp_path / "new", "run.resume=/nowhere"))
    branch = small_config(shards, tmp_path / "branch", "run.steps=4", f"run.resume={old}")
    run(branch)
    first_steps = [r["step"] for r in read_metrics(tmp_path / "branch" / "metrics.jsonl") if "loss" in r]
    assert first_steps == [3, 4]
    shutil.rmtree(old)  # pruned by the run it came from
    run(branch)  # as a requeued job would: it goes on with its own checkpoint, which is the last
    assert [r["step"] for r in read_metrics(tmp_path / "branch" / "metrics.jsonl") if "loss" in r] == [3, 4]


@pytest.mark.parametrize("where", ['"plan": "', '"lr": 0.00', '"config'])
def test_a_flipped_bit_of_a_record_is_damage_and_no_change_of_options(
    shards: Path, tmp_path: Path, where: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run(small_config(shards, tmp_path, "run.steps=2", "run.save_every_steps=1"))
    record = tmp_path / "checkpoints" / "step_00000002" / "record.json"
    raw = bytearray(record.read_bytes())
    raw[raw.index(where.encode()) + len(where)] ^= 1
    record.write_bytes(raw)
    run(small_config(shards, tmp_path, "run.steps=3", "run.save_every_steps=1"))
    told = capfd.readouterr().err
    assert "step_00000002 is damaged: record.json has other bytes than were written" in told
    assert f"going on from {record.parent.with_name('step_00000001')}" in told
    assert resolve(tmp_path).name == "step_00000003"


def test_a_run_folder_that_cannot_be_written_to_is_refused_by_name(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run\.dir='.*/file/run': cannot be written to: .*Not a directory"):
        train(small_config(shards, tmp_path / "file" / "run"))


def test_optimizer_options_of_a_resumed_run_are_its_own(shards: Path, tmp_path: Path) -> None:
    run(small_config(shards, tmp_path / "a", "run.steps=2", "run.save_every_steps=1"))
    start = f"run.resume={tmp_path / 'a' / 'checkpoints' / 'step_00000001'}"
    run(small_config(shards, tmp_path / "same", "run.steps=2", start))
    decayed = ("optimizer.weight_decay=50", "run.allow_changes=[optimizer]")
    run(small_config(shards, tmp_path / "decayed", "run.steps=2", start, *decayed))
    assert largest_difference(weights(tmp_path / "same"), weights(tmp_path / "a")) == 0
    assert largest_difference(weights(tmp_path / "decayed"), weights(tmp_path / "a")) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        ("parallel.float8=tensorwise", *BFLOAT16_WEIGHTS, "optimizer.moments=int8"),
        ("parallel.float8=rowwise", *BFLOAT16_WEIGHTS, "optimizer.name=muon"),
    ],
    ids=["tensorwise-adamw-int8", "rowwise-muon"],
)
def test_lean_runs_resume_bitwise(shards: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Nothing of float8 is in a checkpoint, and rounding depends on the step alone."""
    sizes = ("model.hidden_size=64", "model.axes_dim=[8,12,12]")  # rows of 256 in one matrix, for 8-bit moments
    emulated = ("parallel.float8_emulate=true", "parallel.float8_min_features=16")
    common = ("run.steps=4", "run.save_every_steps=2", "ema.half_life_images=50", *sizes, *emulated, *options)
    run(small_config(shards, tmp_path / "straight", *common), processes=2)
    start = tmp_path / "straight" / "checkpoints" / "step_00000002"
    run(small_config(shards, tmp_path / "resumed", *common, f"run.resume={start}"), processes=2)
    assert checkpoint.read_record(resolve(tmp_path / "resumed"))["step"] == 4
    for ema in (False, True):
        ours, expected = weights(tmp_path / "resumed", ema), weights(tmp_path / "straight", ema)
        assert largest_difference(ours, expected) == 0
    before = dict(load_model(start, read_config(start), ema=False).named_parameters())
    assert largest_difference(before, expected) > 1e-4


def test_weights_that_stay_gathered_survive_validation(shards: Path, tmp_path: Path) -> None:
    """Two ways to train the same: keeping gathered weights may cost memory, never change a number."""
    validation = (f"data.validation={shards}", "run.validate_every_steps=1", "validation.samples=4")
    pictures = ("validation.pictures=1", "validation.sampler.steps=1")
    for name in ("always", "never"):
        options = ("run.steps=3", "ema.half_life_images=50", f"parallel.reshard_after_forward={name}")
        run(small_config(shards, tmp_path / name, *options, *validation, *pictures), processes=2)
    assert largest_difference(weights(tmp_path / "always"), weights(tmp_path / "never")) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_group_saves_and_asks_to_be_requeued(
    shards: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """As Ctrl-C, Slurm and torchrun send it: to reader processes too."""
    config = small_config(shards, tmp_path, "run.steps=100000", "data.workers=2")
    process = fork(_in_own_group, config)
    while len(losses(tmp_path)) < 2:
        assert process.is_alive()
        time.sleep(0.05)
    os.killpg(process.pid or 0, number)
    process.join(timeout=60)
    code = process.exitcode
    if code is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
    assert code == REQUEUE
    saved = resolve(tmp_path)
    assert checkpoint.read_record(saved)["step"] == read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_after_the_save_under_way(
    shards: Path, tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    keep_all = ("run.save_every_steps=3", "checkpoint.keep_last=100")
    config = small_config(shards, tmp_path, "run.steps=100000", "parallel.timeout_s=20", *keep_all)
    ranks = start(2, on_a_slow_disk, config)
    while len(losses(tmp_path)) < 4:
        assert all(rank.is_alive() for rank in ranks)
        time.sleep(0.02)
    os.kill(ranks[1].pid or 0, number)
    for rank in ranks:
        rank.join(timeout=60)
    assert [rank.exitcode for rank in ranks] == [REQUEUE, REQUEUE]
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
    saved = [checkpoint.step_of(path) for path in checkpoint.complete_checkpoints(tmp_path / "checkpoints")]
    assert saved == [*range(3, last, 3), last]
    assert f"step {last} waits for the save of step {saved[-2]}: the last one waits for it" in capfd.readouterr().err


def on_a_slow_disk(config: TrainConfig) -> None:
    """A run whose saves take a while."""
    save = dcp.save

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return save(*arguments, **options)

    dcp.save = slow
    train(config)


def test_a_failing_run_completes_the_save_under_way(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dcp, "save", dcp.save)  # put back afterwards
    with pytest.raises(FloatingPointError, match="step 1, phase student, rank 0: gradient norm is"):
        on_a_slow_disk(small_config(shards, tmp_path, "run.steps=20", "optimizer.lr=1e30", "run.save_every_steps=1"))
    assert [path.name for path in checkpoint.complete_checkpoints(tmp_path / "checkpoints")] == ["step_00000001"]


def _in_own_group(config: TrainConfig) -> None:
    os.setpgrp()
    train(config)


def test_checkpoints_explain_themselves_and_old_ones_go(shards: Path, tmp_path: Path) -> None:
    run(small_config(shards, tmp_path, "run.steps=6", "run.save_every_steps=1", "checkpoint.keep_last=2"))
    kept = checkpoint.complete_checkpoints(tmp_path / "checkpoints")
    assert [p.name for p in kept] == ["step_00000005", "step_00000006"]
    record = json.loads((kept[-1] / "record.json").read_text())
    assert record["step"] == 6
    assert record["config"]["model"]["hidden_size"] == 32
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_the_best_by_validation_stays(shards: Path, tmp_path: Path) -> None:
    validation = (f"data.validation={shards}", "validation.samples=2", "validation.pictures=0")
    every = ("run.validate_every_steps=1", "run.save_every_steps=1", "checkpoint.keep_best=1", "checkpoint.keep_last=1")
    run(small_config(shards, tmp_path, "run.steps=5", "optimizer.lr=0.3", *validation, *every))
    judged = {
        r["step"]: r["validation/loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if "validation/loss" in r
    }
    best = min(judged, key=judged.__getitem__)
    assert best < 5, "with such a rate it gets worse"
    kept = [checkpoint.step_of(path) for path in checkpoint.complete_checkpoints(tmp_path / "checkpoints")]
    assert kept == [best, 5]


def test_a_nonfinite_gradient_stops_before_the_update_and_names_the_samples(shards: Path, tmp_path: Path) -> None:
    config = small_config(shards, tmp_path, "run.steps=20", "optimizer.lr=1e30", "run.save_every_steps=1")
    with pytest.raises(
        FloatingPointError,
        match=r"step \d+, phase student, rank 0: .* samples: data.train:train-00000.tar:train_",
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


def test_speeds_do_not_count_validation_and_saving(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock by which an update takes a second and a save a hundred, at steps that logging does not share."""
    now = [0.0]

    def taking(seconds: float, method: Any) -> Any:
        def timed(self: Trainer, *arguments: Any) -> Any:
            now[0] += seconds
            return method(self, *arguments)

        return timed

    monkeypatch.setattr("kontext_train.trainer.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("kontext_train.trainer.peak_tflops", lambda device: 1.0)
    monkeypatch.setattr(Trainer, "train_phase", taking(1, Trainer.train_phase))
    monkeypatch.setattr(Trainer, "save", taking(100, Trainer.save))
    train(small_config(shards, tmp_path, "run.steps=8", "run.log_every_steps=4", "run.save_every_steps=3"))
    logged = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "samples" in r]
    assert [r["samples"] / r["speed/samples_per_s"] for r in logged] == pytest.approx([4, 4])
    assert [r["seconds"] for r in logged] == pytest.approx([104, 104])


def test_data_wait_is_the_share_of_time_spent_waiting(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock by which a batch takes three seconds to come and an update one; the log begins with a step's wait."""
    now = [0.0]

    def slow(*arguments: Any, **options: Any) -> Any:
        for batch in train_batches(*arguments, **options):
            now[0] += 3
            yield batch

    def phase(self: Trainer, *arguments: Any) -> Any:
        now[0] += 1
        return train_phase(self, *arguments)

    train_phase = Trainer.train_phase
    monkeypatch.setattr("kontext_train.data.loader.train_batches", slow)
    monkeypatch.setattr("kontext_train.trainer.peak_tflops", lambda device: 1.0)
    monkeypatch.setattr("kontext_train.trainer.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(Trainer, "train_phase", phase)
    train(small_config(shards, tmp_path, "run.steps=4", "run.log_every_steps=2"))
    waits = [r["speed/data_wait"] for r in read_metrics(tmp_path / "metrics.jsonl") if "speed/data_wait" in r]
    assert waits == pytest.approx([0.75, 0.75])


def test_shards_on_a_bad_network_train_like_local_ones(shards: Path, tmp_path: Path) -> None:
    options = ("run.steps=5", "data.workers=1")
    run(small_config(shards, tmp_path / "local", *options))
    shutil.copytree(shards, tmp_path / "www")
    with web_server(tmp_path / "www") as server:
        build_index(server.url, out=tmp_path / "index")
        shutil.copy(tmp_path / "index" / "index.arrow", tmp_path / "www")
        server.requests.clear()
        server.fault = often(0.2)
        storage = (f"data.storage.cache_dir={tmp_path / 'cache'}", "data.storage.backoff_s=0.001")
        config = small_config(shards, tmp_path / "remote", *options, *storage, f"data.train={server.url}/")
        run(config, processes=1)
        assert len(server.requests) > 10
    assert largest_difference(weights(tmp_path / "remote"), weights(tmp_path / "local")) == 0
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
