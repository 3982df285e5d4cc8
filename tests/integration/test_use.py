"""What a trained run is for: sampling, exporting, training on from an export, sweeping."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kontext_train.config import TrainConfig, as_yaml
from kontext_train.data.encode import load_encoders
from kontext_train.errors import ConfigError
from kontext_train.evaluation.trained import load_model, load_trained, read_config, resolve
from kontext_train.export import ExportConfig, StorageDtype, Weights, export
from kontext_train.flow.config import SamplerConfig
from kontext_train.generate import Request
from kontext_train.sample import SampleConfig, sample
from kontext_train.train import of_run, train
from kontext_train.training.checkpoint_files import put
from kontext_train.training.metrics import read_metrics
from tests.runs import SMALL, run, small_config

AS_TRAINED = ("ema.half_life_images=100", "optimizer.lr=1e-2")


@pytest.fixture(scope="module")
def trained_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run(small_config(shards, folder, "run.steps=30", *AS_TRAINED))
    return folder


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def context_file(folder: Path, height: int = 32, width: int = 48) -> str:
    file = folder / "context.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)).save(file)
    return str(file)


def test_sampling_writes_a_picture_and_seeds_reproduce(trained_run: Path, tmp_path: Path) -> None:
    def make(name: str, **changes: object) -> np.ndarray:
        options: dict[str, object] = {"prompt": ["erase it"], "context": [context_file(tmp_path)]}
        out = tmp_path / f"{name}.png"
        config = SampleConfig(str(trained_run), out=str(out), sampler=SamplerConfig(steps=3), **(options | changes))  # type: ignore[arg-type]
        assert sample(config) == [out]
        return pixels(out)

    first = make("a")
    assert first.shape == (32, 48, 3)
    np.testing.assert_array_equal(make("b"), first)
    assert abs(make("c", seed=1) - first).mean() > 1
    assert make("d", context=[], height=64, width=32).shape == (64, 32, 3)
    assert abs(make("e", ema=False) - first).mean() > 0


def test_prompts_in_a_row_edit_the_result_before(trained_run: Path, tmp_path: Path) -> None:
    context = context_file(tmp_path)
    sampler = SamplerConfig(steps=2)
    files = sample(
        SampleConfig(str(trained_run), ["one", "two"], [context], str(tmp_path / "x.png"), seed=5, sampler=sampler)
    )
    assert [f.name for f in files] == ["x.0.png", "x.1.png"]
    (alone,) = sample(
        SampleConfig(str(trained_run), ["two"], [str(files[0])], str(tmp_path / "y.png"), seed=6, sampler=sampler)
    )
    np.testing.assert_array_equal(pixels(files[1]), pixels(alone))


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_result_does_not_depend_on_its_neighbours(trained_run: Path, stochastic: bool) -> None:
    trained = load_trained(trained_run)
    sampler = SamplerConfig(steps=3, guidance=2.0, stochastic=stochastic)
    requests = [
        Request("remove the red circle", [torch.full((3, 32, 32), 90, dtype=torch.uint8)], 32, 32, seed=1),
        Request("a blue square", [], 32, 48, seed=2),
    ]
    together = trained.generate(requests, sampler)
    alone = [trained.generate([r], sampler)[0] for r in requests]
    for a, b in zip(together, alone, strict=True):
        assert (a.int() - b.int()).abs().max() <= 1  # rounding of one pixel level
    other = trained.generate(requests, replace(sampler, stochastic=not stochastic))
    assert all((a.int() - b.int()).abs().max() > 10 for a, b in zip(together, other, strict=True))


def test_guidance_changes_the_result(trained_run: Path) -> None:
    trained = load_trained(trained_run)
    request = Request("a blue square", [], 32, 32)
    plain, guided = (trained.generate([request], SamplerConfig(steps=3, guidance=g))[0] for g in (1.0, 5.0))
    assert (plain.int() - guided.int()).abs().float().mean() > 1


def test_an_export_is_the_checkpoint(trained_run: Path, tmp_path: Path) -> None:
    for weights in Weights:
        out = tmp_path / f"{weights.value}.safetensors"
        export(ExportConfig(str(trained_run), str(out), weights, StorageDtype.float32))
        checkpoint = trained_run / "checkpoints" / "step_00000030"
        model = load_model(checkpoint, read_config(checkpoint), ema=weights is Weights.ema)
        tensors = load_file(out)
        assert tensors.keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(tensors[k], p) for k, p in model.named_parameters())
    assert not torch.equal(tensors["img_in.weight"], load_file(tmp_path / "ema.safetensors")["img_in.weight"])
    image = load_trained(tmp_path / "raw.safetensors").generate([Request("x", [], 32, 32)], SamplerConfig(steps=2))[0]
    expected = load_trained(trained_run, ema=False).generate([Request("x", [], 32, 32)], SamplerConfig(steps=2))[0]
    assert torch.equal(image, expected)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_starts_from_an_export(trained_run: Path, shards: Path, tmp_path: Path, processes: int) -> None:
    out = tmp_path / "start.safetensors"
    export(ExportConfig(str(trained_run), str(out), dtype=StorageDtype.float32))
    small_step = ("run.steps=1", "optimizer.lr=1e-12", f"weights.student={out}")
    config = small_config(shards, tmp_path / "run", *small_step)
    run(config, processes)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    model = load_model(checkpoint, read_config(checkpoint), ema=False)
    for name, tensor in load_file(out).items():
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), tensor, rtol=0, atol=1e-8)
    out.rename(tmp_path / "moved.safetensors")
    config.run.steps = 2
    run(config)  # goes on without it
    assert resolve(tmp_path / "run").name == "step_00000002"
    config.weights.student = str(tmp_path / "moved.safetensors")
    with pytest.raises(ConfigError, match=r"run\.allow_changes=\[\]: .*weights\.student \(was .*start"):
        train(config)  # another start has no effect any more


def test_a_used_folder_is_not_overwritten_unasked(trained_run: Path, shards: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.resume='none': but .* holds checkpoints of an earlier run"):
        train(small_config(shards, trained_run, "run.resume=none"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.tokens_per_pack=200", r"run\.resume=.*step_00000030': but .* was planned with other data settings"),
        ("model.depth_single_blocks=2", r"model\.depth_single_blocks=2: but .* was saved with 1"),
        ("optimizer.name=muon", r"optimizer\.name='muon': but .* was saved with 'adamw'"),
        ("ema.half_life_images=0", r"ema\.half_life_images=0\.0: but .* was saved with 100\.0"),
        (
            "optimizer={lr: 2e-3, betas: [0.8, 0.9]}",
            r"allow_changes=\[\]: .* optimizer\.lr \(was 0\.01, now 0\.002\), optimizer\.betas \(was .*allow_changes="
            r"\[optimizer\.lr,optimizer\.betas\]",
        ),
        ("optimizer={name: muon, lr: 2e-3}", r"optimizer\.name='muon': .* Changed: .*optimizer\.lr \(was 0\.01"),
        ("run.allow_changes=[optimiser.lr]", r"run\.allow_changes=\['optimiser\.lr'\]: optimiser\.lr is no option"),
        ("parallel.param_dtype=bfloat16", r"parallel\.param_dtype \(was 'float32', now 'bfloat16'\)"),
    ],
)
def test_resuming_as_another_run_is_refused_by_key(
    trained_run: Path, shards: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(small_config(shards, trained_run, "run.steps=40", *AS_TRAINED, override))


def test_a_damaged_checkpoint_is_named(trained_run: Path, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(trained_run, tmp_path / "run")
    (file,) = (tmp_path / "run" / "checkpoints" / "step_00000030").glob("*.distcp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"step_00000030 is damaged: __0_0\.distcp has \d+ bytes, \d+ when written"):
        train(small_config(shards, tmp_path / "run", "run.steps=40", *AS_TRAINED))


def outcome(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, check=False)


@pytest.mark.slow
def test_a_sweep_trains_every_member_that_can_run(shards: Path, tmp_path: Path) -> None:
    """As installed, from any folder, with nothing said about run.dir. One is refused, and the one after it is not."""
    entry = str(Path(sys.executable).with_name("kontext-train"))
    options = [*(o for o in SMALL if not o.startswith("optimizer.lr")), f"data.train={shards}", "run.steps=2"]
    done = outcome([entry, "-m", "optimizer.lr=1e-4,-1,3e-4", *options], tmp_path)
    assert done.returncode == 1, done.stderr
    assert "optimizer.lr=-1.0: must be positive" in done.stderr
    for lr in ("0.0001", "0.0003"):
        member = tmp_path / "outputs" / "run" / f"optimizer.lr={lr}"
        assert read_metrics(member / "metrics.jsonl")[-1]["step"] == 2
        assert read_config(member / "checkpoints" / "step_00000002")["optimizer"]["lr"] == float(lr)


@pytest.mark.slow
def test_torchrun_starts_the_module(shards: Path, tmp_path: Path) -> None:
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    options = [*SMALL, f"data.train={shards}", "run.steps=2", "run.dir=out"]
    done = outcome([*torchrun, "-m", "kontext_train.train", *options], tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "checkpoints" / "step_00000002" / "record.json").read_text())
    assert record["position"]["legs"] == [[2, 2]]


def test_a_signal_while_it_loads_is_not_lost(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return load_encoders(*arguments, **options)

    monkeypatch.setattr("kontext_train.assembly.load_encoders", signalled)
    with pytest.raises(SystemExit, match="75"):
        train(small_config(shards, tmp_path))
    assert resolve(tmp_path).name == "step_00000001"


def test_a_run_folder_is_all_that_a_resume_needs(trained_run: Path, tmp_path: Path) -> None:
    """Even when it was moved; what else is said comes on top, and is judged like any change."""
    folder = tmp_path / "moved"
    shutil.copytree(trained_run, folder)
    kontext_train = [sys.executable, "-m", "kontext_train.train", "--resume-run"]
    refused = outcome([*kontext_train, str(folder), "optimizer.lr=1e-3"], tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert "run.allow_changes=[]: does not name all that changed since " in refused.stderr
    assert "optimizer.lr (was 0.01, now 0.001)." in refused.stderr
    done = outcome([*kontext_train[:-1], f"--resume-run={folder}", "run.steps=32"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"going on from {folder}/checkpoints/step_00000030" in done.stderr
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r] == list(range(1, 33))
    assert of(folder) == replace(of(trained_run, "run.steps=32"), run=of(folder).run)
    with pytest.raises(ConfigError, match=r"run\.stepz='.*': stepz is no option\. Known here: .* Did you mean steps\?"):
        of(folder, "run.stepz=3")
    with pytest.raises(ConfigError, match=r"--resume-run='/nowhere': must be a folder that kontext-train wrote"):
        of(Path("/nowhere"))


def of(folder: Path, *changes: str) -> TrainConfig:
    return of_run(["--resume-run", str(folder), *changes])


def test_a_run_folder_remembers_where_it_began_and_what_its_last_start_allowed(
    trained_run: Path, shards: Path, tmp_path: Path
) -> None:
    """It may have been killed before a checkpoint held either."""
    start = f"run.resume={trained_run}/checkpoints/step_00000030"
    allowed = ("optimizer.lr=1e-3", "run.allow_changes=[optimizer.lr]")
    config = small_config(shards, tmp_path, "run.steps=31", *AS_TRAINED, start, *allowed)
    put(tmp_path / "config.yaml", as_yaml(config).encode())
    assert of(tmp_path).run.resume == f"{trained_run}/checkpoints/step_00000030"
    assert of(tmp_path).run.allow_changes == ["optimizer.lr"]
    assert of(tmp_path, "run.steps=32").run.allow_changes == [], "what comes now was never allowed"
    run(of(tmp_path))
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r] == [31]
    put(tmp_path / "config.yaml", as_yaml(small_config(shards, tmp_path, "run.resume=none")).encode())
    assert of(tmp_path).run.resume == "auto"


def test_allowed_changes_are_made(trained_run: Path, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(trained_run, tmp_path / "run")
    changed = ("optimizer.lr=1e-4", "optimizer.betas=[0.8,0.9]", "run.allow_changes=[optimizer.lr,optimizer.betas]")
    config = small_config(shards, tmp_path / "run", "run.steps=32", *AS_TRAINED, *changed)
    run(config)
    assert read_config(tmp_path / "run" / "checkpoints" / "step_00000032")["optimizer"]["lr"] == 1e-4
    run(config)  # as a requeued job would
    config.optimizer.lr = 1e-2
    config.run.allow_changes = []
    with pytest.raises(ConfigError, match=r"optimizer\.lr \(was 0\.0001, now 0\.01\)\. Restore"):
        train(config)


def test_a_schedule_that_ends_with_the_run_keeps_its_length(shards: Path, tmp_path: Path) -> None:
    run(small_config(shards, tmp_path, "run.steps=2", "schedule.name=linear"))
    with pytest.raises(ConfigError, match=r"run\.steps \(was 2, now 3\)"):
        train(small_config(shards, tmp_path, "run.steps=3", "schedule.name=linear"))
