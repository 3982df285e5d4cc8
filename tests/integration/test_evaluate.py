"""kontext-evaluate on real checkpoints, and slices of a benchmark made while a model trains."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kontext_train.config import check
from kontext_train.errors import ConfigError
from kontext_train.evaluate import main, parse, report, run, score
from kontext_train.evaluation import trained
from kontext_train.evaluation.config import ArenaConfig, MetricsConfig, ReportConfig, RunConfig, ScoreConfig
from kontext_train.evaluation.make_images import request_seed
from kontext_train.evaluation.results import not_made, open_results
from kontext_train.export import ExportConfig, StorageDtype, export
from kontext_train.flow.config import SamplerConfig
from kontext_train.sample import SampleConfig, sample
from kontext_train.training import checkpoint
from kontext_train.training.metrics import read_metrics
from quickstart.benchmark import write_benchmark
from tests import runs

STEPS = "making.sampler.steps=2"


@pytest.fixture(scope="module")
def trained_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    runs.run(runs.small_config(shards, folder, "run.steps=3", "run.save_every_steps=2"))
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_benchmark(folder, samples=5, chains=1)
    return folder


def made(checkpoint: Path, scenes: Path, out: Path, *more: str) -> Path:
    run(parse(RunConfig, [f"checkpoint={checkpoint}", f"benchmark={scenes}", f"out={out}", STEPS, *more]))
    return out


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def test_a_checkpoint_and_its_export_are_made_measured_and_compared(
    trained_run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    released = tmp_path / "model.safetensors"
    export(ExportConfig(str(trained_run), str(released), dtype=StorageDtype.float32))
    folders = [made(trained_run, scenes, tmp_path / "run"), made(released, scenes, tmp_path / "export")]
    results = [open_results(folder) for folder in folders]
    for case, seed in results[0].images():
        one, other = (pixels(r.image(case.key, seed)) for r in results)
        np.testing.assert_array_equal(one, other)
    assert results[0].settings["model"]["step"] == 3
    assert results[1].settings["model"]["digest"] != results[0].settings["model"]["digest"]
    for folder in folders:
        score(parse(ScoreConfig, [f"results={folder}"]))
    printed = capsys.readouterr().out
    asked = len(results[0].images())
    assert f"{asked} of {asked} images" in printed
    assert "latency median_s" in printed
    assert f"torch {torch.__version__}" in printed, "on what"
    report(parse(ReportConfig, [f"results=[{folders[0]},{folders[1]}]", f"out={tmp_path / 'report'}"]))
    assert (tmp_path / "report" / "index.html").is_file()
    data = json.loads((tmp_path / "report" / "data.js").read_text().removeprefix("const DATA = ").rstrip(";\n"))
    assert data["differences"][1]["target_mae"]["all"]["value"] == 0


def test_an_image_is_what_kontext_sample_makes_from_its_record(trained_run: Path, scenes: Path, tmp_path: Path) -> None:
    results = open_results(made(trained_run, scenes, tmp_path / "run", "making.per_category=1"))
    case = next(case for case in results.benchmark.pairs if case.category == "recolour")
    record = results.record(case.key, 0)
    assert record is not None
    assert record["request_seed"] == request_seed(case.key, 0)
    (file,) = sample(
        SampleConfig(
            str(trained_run),
            [record["instruction"]],
            record["contexts"],
            str(tmp_path / "sample.png"),
            seed=record["request_seed"],
            sampler=SamplerConfig(**record["sampler"]),
        )
    )
    np.testing.assert_array_equal(pixels(file), pixels(results.image(case.key, 0)))


def test_a_model_that_trained_on_is_another_model(trained_run: Path, scenes: Path, tmp_path: Path) -> None:
    early, late = (trained_run / "checkpoints" / f"step_{step:08d}" for step in (2, 3))
    made(early, scenes, tmp_path / "out", "making.per_category=1")
    assert not_made(open_results(tmp_path / "out")) == {}
    made(early.rename(early.with_name("moved")), scenes, tmp_path / "out", "making.per_category=1")
    with pytest.raises(ConfigError, match=r"holds images of other settings: .*model\.step \(was 2, now 3\)"):
        made(late, scenes, tmp_path / "out", "making.per_category=1")


def test_images_of_other_encoders_are_refused_by_name(trained_run: Path, scenes: Path, tmp_path: Path) -> None:
    """The same encoders elsewhere are no others; another autoencoder, text encoder or tokenizer is."""
    shutil.copytree(runs.ENCODERS, tmp_path / "encoders")
    few = "making.per_category=1"
    out = made(trained_run, scenes, tmp_path / "out", few)
    results = open_results(out)
    settings = results.settings["model"]["encoders"]
    assert (settings["dtype"], settings["t5_tokens"]) == ("bfloat16", 12)
    record = results.record(results.benchmark.pairs[0].key, 0)
    assert record is not None
    assert record["made_on"].endswith(f"float32, torch {torch.__version__}")
    made(trained_run, scenes, out, few, f"encoders={tmp_path / 'encoders'}")
    for changed in ("vae/diffusion_pytorch_model.safetensors", "text_encoder_2/config.json", "tokenizer/vocab.json"):
        file = tmp_path / "encoders" / changed
        before = file.read_bytes()
        if file.suffix == ".json":
            file.write_bytes(before + b"\n")
        else:
            state = {name: value + 0.01 for name, value in load_file(file).items()}
            save_file(state, file, {"format": "pt"})
        with pytest.raises(
            ConfigError, match=r"other settings: model\.encoders\.digest \(was '\w+', now '\w+'\)\. Give"
        ):
            made(trained_run, scenes, out, few, f"encoders={tmp_path / 'encoders'}")
        file.write_bytes(before)


def test_weights_are_loaded_piece_by_piece_as_they_were_saved(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all of them as float32 on the host of every process."""
    monkeypatch.setattr(trained, "load_model", None)
    path = trained.resolve(trained_run)
    parameters = dict(trained.load_trained(path, ema=False).model.named_parameters())
    monkeypatch.undo()
    expected = dict(trained.load_model(path, trained.read_config(path), ema=False).named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, expected[name]), name


def test_the_exit_status_tells_what_failed(
    trained_run: Path,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """0: all of it, 1: something failed, and is named; 2: refused."""
    shutil.copytree(scenes, tmp_path / "scenes")
    broken = tmp_path / "scenes" / "images" / "recolour_0000.0.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"no picture")
    making = ("making.per_category=1", STEPS)
    options = [f"checkpoint={trained_run}", f"benchmark={tmp_path / 'scenes'}", f"out={tmp_path / 'out'}", *making]
    assert not run(parse(RunConfig, options))
    assert not score(parse(ScoreConfig, [f"results={tmp_path / 'out'}"]))
    monkeypatch.setattr(sys, "argv", ["kontext-evaluate", "score", f"results={tmp_path / 'out'}"])
    with pytest.raises(SystemExit, match=r"^1$"):
        main()
    assert "not made: 1: recolour_0000@0" in capsys.readouterr().out
    broken.write_bytes(whole)
    options[2] = f"out={tmp_path / 'whole'}"
    assert run(parse(RunConfig, options))
    assert score(parse(ScoreConfig, [f"results={tmp_path / 'whole'}"]))


def test_scores_are_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE='2': is more than one process, and score takes one"):
        score(ScoreConfig("results"))


def test_processes_share_a_benchmark_out(trained_run: Path, scenes: Path, tmp_path: Path) -> None:
    """As torchrun starts them: ranks and their number come from the environment."""
    options = [f"checkpoint={trained_run}", f"benchmark={scenes}", f"out={tmp_path / 'two'}", STEPS]
    runs.in_processes(2, run, parse(RunConfig, options))
    one, two = (open_results(f) for f in (made(trained_run, scenes, tmp_path / "one"), tmp_path / "two"))
    for case, seed in one.images():
        np.testing.assert_array_equal(pixels(one.image(case.key, seed)), pixels(two.image(case.key, seed)))


def test_options_are_refused_by_key_in_one_line(tmp_path: Path) -> None:
    def said(*arguments: str) -> str:
        command = [sys.executable, "-m", "kontext_train.evaluate", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == (2 if arguments else 0), done.stderr
        return done.stderr.strip() if arguments else done.stdout

    assert "kontext-evaluate run" in said()
    assert said("judge") == (
        "kontext-evaluate: command='judge': is none of run, score, report, arena. kontext-evaluate --help shows them"
    )
    for kind, arguments, message in (
        (RunConfig, ["checkpoint=a", "benchmark=b"], r"out='': must be given"),
        (RunConfig, ["checkpoint=a", "benchmark=b", "out=c", "making.steps=3"], r"Key 'steps' not in 'MakingConfig'"),
        (RunConfig, ["checkpoint=a", "benchmark=b", "out=c", "making.seeds=0"], r"making\.seeds=0: must be at least 1"),
        (ScoreConfig, ["results=a", "metrics.clip=/nowhere"], r"metrics\.clip='/nowhere': is not there"),
        (ScoreConfig, ["a"], r"argument='a': is not key=value"),
        (ArenaConfig, ["results=[a]", "votes=v"], r"must be two result folders or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(kind, arguments)
    with pytest.raises(ConfigError, match=r"is no result folder: it has no settings\.json"):
        score(ScoreConfig(str(tmp_path), MetricsConfig()))


# In training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pairs of three categories and a chain of six turns."""
    folder = tmp_path_factory.mktemp("few")
    write_benchmark(folder, samples=2, chains=1)
    return folder


def sliced(shards: Path, benchmark: Path, *more: str) -> tuple[str, ...]:
    validation = (f"data.validation={shards}", "validation.samples=2", "validation.pictures=0")
    each = ("run.validate_every_steps=1", "evaluation.per_category=1")
    return (*validation, *each, "validation.sampler.steps=2", f"evaluation.benchmark={benchmark}", *more)


class Wandb(ModuleType):
    """What of wandb's module a run calls, written to a file: the run is another process."""

    def __init__(self, file: Path) -> None:
        super().__init__("wandb")
        self.file = file

    def init(self, **of: Any) -> "Wandb":
        self._write({"init": {name: str(value) for name, value in of.items()}})
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self._write({"step": step, "values": values})

    def finish(self, exit_code: int) -> None:
        self._write({"finish": exit_code})

    @staticmethod
    def Image(file: str) -> dict[str, Any]:
        with Image.open(file) as image:
            return {"image": file, "size": image.size}

    def _write(self, line: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def told(folder: Path) -> list[dict[str, float]]:
    return [r for r in read_metrics(folder / "metrics.jsonl") if "benchmark/target_mae" in r]


@pytest.mark.slow
def test_a_slice_is_made_and_measured_at_each_validation(
    shards: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And told to wandb, and the same whether one process makes it or two do."""
    monkeypatch.setitem(sys.modules, "wandb", Wandb(tmp_path / "wandb.jsonl"))
    options = sliced(shards, few, "run.steps=2", "run.microbatches=2", "logging.wandb=offline")
    runs.run(runs.small_config(shards, tmp_path / "one", *options))
    check_wandb(tmp_path / "wandb.jsonl", tmp_path / "one")
    runs.run(runs.small_config(shards, tmp_path / "two", *sliced(shards, few, "run.steps=1")), processes=2)
    (first, second), (shared,) = told(tmp_path / "one"), told(tmp_path / "two")
    names = ["benchmark/target_mae", *(f"benchmark/target_mae/turn_{turn}" for turn in range(1, 7))]
    for name in names:
        assert first[name] == pytest.approx(shared[name], abs=2e-3), name
    assert first["benchmark/target_mae"] != second["benchmark/target_mae"], "the weights moved"
    results = open_results(tmp_path / "two" / "benchmark" / "step_00000001")
    assert not_made(results) == {}
    assert len(results.images()) == 3 + 6
    assert (results.folder / "grid.png").stat().st_size > 1000
    # the same weights, by kontext-evaluate from their checkpoint
    again = open_results(made(tmp_path / "two", few, tmp_path / "again", "making.per_category=1", "making.at_once=4"))
    for case, seed in results.images():
        assert abs(pixels(results.image(case.key, seed)) - pixels(again.image(case.key, seed))).max() <= 2, case.key


def check_wandb(file: Path, run_dir: Path) -> None:
    """Every number of the slice that the run's own log has, and one picture a validation of all its images."""
    first, *logged, last = (json.loads(row) for row in file.read_text().splitlines())
    assert first["init"]["mode"] == "offline"
    assert last == {"finish": 0}
    for record in told(run_dir):
        step = record["step"]
        values: dict[str, Any] = {}
        for row in logged:
            if row["step"] == step:
                values |= row["values"]
        expected = {name: value for name, value in record.items() if name.startswith("benchmark/")}
        assert {name: values[name] for name in expected} == expected
        assert {f"benchmark/target_mae/turn_{turn}" for turn in range(1, 7)} <= values.keys(), "drift"
        assert values["benchmark"]["image"] == str(run_dir / "benchmark" / f"step_{step:08d}" / "grid.png")
        assert min(values["benchmark"]["size"]) > 100


def test_the_best_by_a_benchmarks_number_stays(shards: Path, few: Path, tmp_path: Path) -> None:
    best_by = ("checkpoint.keep_best=1", "checkpoint.best_by=benchmark/target_mae", "checkpoint.best_is=highest")
    every = ("run.save_every_steps=1", "checkpoint.keep_last=1", "run.steps=4", "optimizer.lr=0.1")
    config = runs.small_config(shards, tmp_path, *sliced(shards, few), *best_by, *every)
    runs.run(config)
    judged = {r["step"]: r["benchmark/target_mae"] for r in told(tmp_path)}
    highest = max(judged, key=judged.__getitem__)
    assert highest not in (4, min(judged, key=judged.__getitem__)), judged
    kept = [checkpoint.step_of(path) for path in checkpoint.complete_checkpoints(tmp_path / "checkpoints")]
    assert kept == [highest, 4]
    config.checkpoint.best_by, config.run.dir = "benchmark/target_mse", str(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"is not measured on evaluation\.benchmark\. Known: benchmark/untouched_mae"):
        runs.train(config)


def test_a_slice_that_cannot_be_read_is_refused_before_training(shards: Path, few: Path, tmp_path: Path) -> None:
    shutil.copytree(few, tmp_path / "few")
    (tmp_path / "few" / "images" / "recolour_0000.0.png").write_bytes(b"no picture")
    config = runs.small_config(shards, tmp_path / "run", *sliced(shards, tmp_path / "few", "run.steps=1"))
    with pytest.raises(ConfigError, match=r"evaluation\.benchmark='.*recolour_0000\.0\.png': .* cannot be decoded"):
        runs.train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("evaluation.benchmark=x",), r"evaluation\.benchmark='x': is made when a run validates"),
        (("checkpoint.best_by=loss",), r"checkpoint\.best_by='loss': is no number of validation"),
        (("checkpoint.best_by=benchmark/right",), r"is measured on evaluation\.benchmark, which is not given"),
    ],
)
def test_slices_need_what_they_need(shards: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(runs.small_config(shards, tmp_path, *options), 1)
