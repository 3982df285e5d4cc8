"""Whole LoRA runs: only adapters train and are kept, and a run is the same however it is cut."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from kontext_train.config import TrainConfig, check
from kontext_train.errors import ConfigError
from kontext_train.evaluation.trained import (
    EXPORT_ORIGIN,
    load_adapters,
    load_model,
    load_trained,
    read_config,
    resolve,
    section,
)
from kontext_train.export import ExportConfig, Format, StorageDtype, export
from kontext_train.flow.config import SamplerConfig
from kontext_train.generate import Request
from kontext_train.models.config import FluxConfig, LoraConfig
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import predict_velocity
from kontext_train.models.lora import adapt, float8_rows
from kontext_train.models.weights import load
from kontext_train.train import train
from kontext_train.trainer import trained_share
from kontext_train.training import checkpoint
from kontext_train.training.metrics import read_metrics
from tests.integration.test_train import killed_in_step_seven, largest_difference, losses, weights
from tests.models.flux_cases import SHAPES, pack, random_flux, random_sample
from tests.parity.test_flux_against_diffusers import TOLERANCE, relative_error, their_velocity
from tests.parity.test_lora_against_diffusers import pipeline
from tests.runs import in_processes, run, small_config

THETA = "model.theta=10000"  # diffusers has no other
RUN = ("run.steps=10", "ema.half_life_images=50", "lora.rank=4", "lora.alpha=8", "optimizer.lr=3e-3")


@pytest.fixture(scope="module")
def base(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose every weight is random, as a released file."""
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    torch.manual_seed(0)
    save_file(random_flux(small_config(shards, file.parent).model).state_dict(), file)
    return file


def lora_config(shards: Path, base: Path, folder: Path, *options: str) -> TrainConfig:
    return small_config(shards, folder, *RUN, THETA, f"weights.student={base}", *options)


def adapters(run_dir: Path, ema: bool = False) -> dict[str, Tensor]:
    path = resolve(run_dir)
    return load_adapters(path, read_config(path), ema)


def network(run_dir: Path) -> Flux:
    return Flux(section(FluxConfig, read_config(resolve(run_dir))["model"]))


@pytest.fixture(scope="module")
def straight(shards: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, two packs a step, ten steps, nothing clever."""
    folder = tmp_path_factory.mktemp("straight")
    run(lora_config(shards, base, folder, "run.microbatches=2"))
    return folder


@pytest.fixture(scope="module")
def straight_on_two(shards: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same global batch on two processes that share the base and the adapters."""
    folder = tmp_path_factory.mktemp("straight_on_two")
    run(lora_config(shards, base, folder), processes=2)
    return folder


def test_two_processes_equal_one(straight: Path, straight_on_two: Path) -> None:
    for ema in (False, True):
        assert largest_difference(adapters(straight_on_two, ema), adapters(straight, ema)) <= 1e-5
    assert losses(straight_on_two) == pytest.approx(losses(straight), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ("parallel=cp", "run.microbatches=2", "parallel.activation_checkpointing=selective"),
        ("parallel.dp_replicate=2", "parallel.activation_checkpointing=full"),
    ],
    ids=["cp-selective", "hsdp-full"],
)
def test_other_meshes_and_checkpointing_equal_it(
    shards: Path, base: Path, straight: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    run(lora_config(shards, base, tmp_path, *options, "run.steps=4"), processes=2)
    assert losses(tmp_path) == pytest.approx(losses(straight)[:4], rel=1e-5)


def test_a_float8_base_trains_as_its_rounded_weights_do(
    shards: Path, base: Path, straight: Path, tmp_path: Path
) -> None:
    """Two processes that keep it in float8, one that computes with the same numbers kept in float32."""
    rounded = tmp_path / "rounded.safetensors"
    save_file({name: rounded_to_float8(name, value) for name, value in load_file(base).items()}, rounded)
    options = ("run.steps=4",)
    run(lora_config(shards, base, tmp_path / "8", *options, "lora.base_dtype=float8"), processes=2)
    microbatches = ("run.microbatches=2", "lora.base_dtype=float32")
    run(lora_config(shards, rounded, tmp_path / "32", *options, *microbatches))
    assert losses(tmp_path / "8") == pytest.approx(losses(tmp_path / "32"), rel=1e-5)
    assert largest_difference(adapters(tmp_path / "8"), adapters(tmp_path / "32")) <= 1e-5
    assert losses(tmp_path / "8") != pytest.approx(losses(straight)[:4], rel=1e-4), "nothing was rounded"


def rounded_to_float8(name: str, value: Tensor) -> Tensor:
    if value.ndim == 2 and "_blocks." in name:
        rounded, scale = float8_rows(value)
        return rounded.float() * scale[:, None]
    return value.bfloat16().float()


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_run_and_compiles_no_more(
    shards: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Derivatives are traced, without code generation, which a run that trains all weights has in test_train.py."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    options = ("run.steps=2", "data.pad_packs=true", "parallel.activation_checkpointing=selective")
    run(lora_config(shards, base, tmp_path / "eager", *options))
    run(lora_config(shards, base, tmp_path / "compiled", *options, "parallel.compile=true"))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    records = read_metrics(tmp_path / "compiled" / "metrics.jsonl")
    graphs = [r["compile/graphs"] for r in records if "compile/graphs" in r]
    assert 2 <= graphs[-1] <= 4  # as of a run that trains all weights


def test_the_start_is_the_base_and_training_leaves_it(shards: Path, base: Path, straight: Path, tmp_path: Path) -> None:
    run(lora_config(shards, base, tmp_path, "run.steps=1", "lora.base_dtype=float32", "run.microbatches=2"))
    run(small_config(shards, tmp_path / "all", "run.steps=1", THETA, f"weights.student={base}", "run.microbatches=2"))
    assert losses(tmp_path) == losses(tmp_path / "all")
    assert min(losses(straight)[5:]) < losses(straight)[0], "adapters learn nothing"
    ups = {name: t for name, t in adapters(straight).items() if name.endswith("lora_up")}
    assert all(t.abs().max() > 1e-4 for t in ups.values())


def test_a_checkpoint_holds_the_adapters_alone(straight: Path) -> None:
    names = FileSystemReader(resolve(straight)).read_metadata().state_dict_metadata
    kept = {n.removeprefix("modules.student.") for n in names if n.startswith("modules.")}
    assert kept == adapters(straight).keys()
    assert {n.removeprefix("ema.") for n in names if n.startswith("ema.")} == kept
    states = [n for n in names if n.startswith("optimizers.") and ".state." in n]
    assert states
    assert all(".lora_" in n for n in states)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_is_bitwise_the_same(
    shards: Path, base: Path, straight: Path, straight_on_two: Path, tmp_path: Path, processes: int
) -> None:
    broken = lora_config(shards, base, tmp_path, "run.save_every_steps=5", f"run.microbatches={2 // processes}")
    with pytest.raises(AssertionError, match=r"exit codes of the ranks: \[(-9(, )?)+\]"):
        in_processes(processes, killed_in_step_seven, broken)
    assert resolve(tmp_path).name == "step_00000005"
    run(broken, processes)
    expected = straight if processes == 1 else straight_on_two
    for ema in (False, True):
        assert largest_difference(adapters(tmp_path, ema), adapters(expected, ema)) == 0
    assert losses(tmp_path) == losses(expected)


def test_a_resume_needs_the_same_base_and_the_same_adapters(
    shards: Path, base: Path, straight: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    changed = load_file(base)
    changed["single_blocks.0.linear2.weight"] += 1e-3
    save_file(changed, other)
    on = ("run.steps=11", "run.microbatches=2")
    with pytest.raises(ConfigError, match=r"weights\.student=.*holds other weights than those that .* adapts"):
        train(lora_config(shards, other, straight, *on))
    with pytest.raises(ConfigError, match=r"run\.allow_changes=\[\]: .*lora\.alpha \(was 8\.0, now 16\.0\)"):
        train(lora_config(shards, base, straight, *on, "lora.alpha=16"))
    with pytest.raises(ConfigError, match=r"lora\.rank=0: but .* was saved with 4"):
        train(small_config(shards, straight, THETA, *on))


def test_another_machine_may_keep_the_base_in_another_type(
    shards: Path, base: Path, straight: Path, tmp_path: Path
) -> None:
    """No checkpoint holds the base, so only the permission is asked for."""
    shutil.copytree(straight, tmp_path / "run")
    on = ("run.steps=11", "run.microbatches=2", "lora.base_dtype=float8", "run.allow_changes=[lora.base_dtype]")
    run(lora_config(shards, base, tmp_path / "run", *on))
    assert resolve(tmp_path / "run").name == "step_00000011"


def test_sampling_weights_are_base_and_adapters(shards: Path, base: Path, straight: Path) -> None:
    merged, made = weights(straight), adapters(straight)
    plain = network(straight)
    load(plain, base)
    changed = {n for n, p in plain.named_parameters() if not torch.equal(p, merged[n])}
    assert changed == {n.rsplit(".", 1)[0] + ".weight" for n in made}
    name = "single_blocks.0.linear1"
    expected = plain.get_parameter(f"{name}.weight") + 2 * made[f"{name}.lora_up"] @ made[f"{name}.lora_down"].T
    assert torch.allclose(merged[f"{name}.weight"], expected, atol=1e-6)


def test_exported_adapters_run_in_diffusers_as_merged_weights_do_here(
    shards: Path, base: Path, straight: Path, tmp_path: Path
) -> None:
    """And merged weights, exported, are a network like any other."""
    lora, full = tmp_path / "lora.safetensors", tmp_path / "full.safetensors"
    for out, kind in ((lora, Format.lora), (full, Format.bfl)):
        export(ExportConfig(str(straight), str(out), dtype=StorageDtype.float32, format=kind))
    with safe_open(lora, framework="pt") as opened:
        origin = json.loads(opened.metadata()[EXPORT_ORIGIN])
    assert origin == {"weights": "ema", "step": 10, "plan": checkpoint.read_record(resolve(straight))["plan"]}
    assert origin["plan"] in (tmp_path / "lora.md").read_text()
    config = read_config(full)
    model = load_model(full, config, ema=False)
    assert largest_difference(dict(model.named_parameters()), weights(straight, ema=True)) == 0

    plain = network(straight)
    load(plain, base)
    theirs = pipeline(plain)
    theirs.load_lora_weights(lora)
    sample = random_sample(SHAPES[1], model.config)
    ours, before = (predict_velocity(network, *pack([sample])) for network in (model, plain))
    assert relative_error(their_velocity(theirs.transformer, sample, guidance=False), ours) <= TOLERANCE
    assert relative_error(before, ours) > 100 * TOLERANCE
    with pytest.raises(ConfigError, match=r"checkpoint=.*has no adapters"):
        export(ExportConfig(str(full), str(tmp_path / "none.safetensors"), format=Format.lora))


def test_the_base_is_not_written_over(base: Path, straight: Path) -> None:
    before = base.read_bytes()
    with pytest.raises(ConfigError, match=r"out='.*base\.safetensors': is the file that the run started from"):
        export(ExportConfig(str(straight), str(base)))
    assert base.read_bytes() == before


def test_a_frozen_base_spares_a_third_of_the_flops_that_a_run_logs() -> None:
    model = random_flux()
    assert trained_share(model) == 1
    adapt(model, LoraConfig(rank=1))
    assert 0 < trained_share(model) < 0.1


def test_a_lora_checkpoint_draws(straight: Path) -> None:
    trained = load_trained(straight)
    request = Request("a red circle", [], 32, 32, seed=0)
    (image,) = trained.generate([request], SamplerConfig(steps=1))
    assert image.shape == (3, 32, 32)
    expected = weights(straight, ema=True)
    assert largest_difference(dict(trained.model.named_parameters()), expected) == 0


def test_a_base_that_moved_is_missed_by_name(shards: Path, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "base.safetensors"
    file.write_bytes(base.read_bytes())
    run(lora_config(shards, file, tmp_path / "run", "run.steps=1"))
    file.unlink()
    path = resolve(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"weights\.student=.*base\.safetensors.*is gone"):
        load_model(path, read_config(path), ema=False)


def test_relations_are_checked(shards: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"weights\.student=None: must be given"):
        check(small_config(shards, tmp_path, *RUN), 1)
    cases = {
        r"lora\.targets=.*fits no linear of the blocks: \*\.qvk\..*Known: double_blocks\.N\.img_mod\.lin": (
            "lora.targets=['*.qvk','*.linear1']",
        ),
        r"parallel\.float8='rowwise': is for weights that train": ("parallel.float8=rowwise",),
        r"parallel\.master_dtype='bfloat16': is of trained weights": (
            "parallel.master_dtype=bfloat16",
            "optimizer.stochastic_rounding=true",
        ),
        r"optimizer\.name='muon': orthogonalises": ("optimizer.name=muon",),
        r"lora\.rank=0: trains all weights": ("lora.rank=0",),
    }
    for message, options in cases.items():
        with pytest.raises(ConfigError, match=message):
            check(lora_config(shards, base, tmp_path, *options), 1)
