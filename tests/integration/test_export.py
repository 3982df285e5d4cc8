"""kontext-export: what it writes is what diffusers runs, what a run starts from, and what it says it is."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kontext_train.errors import ConfigError
from kontext_train.evaluation.exported import Source, write_pipeline, write_released
from kontext_train.evaluation.trained import Trained, load_model, load_trained, read_config, resolve
from kontext_train.export import ExportConfig, Format, StorageDtype, Weights, export, main
from kontext_train.flow.config import SamplerConfig
from kontext_train.generate import Request
from kontext_train.models.flux import Flux
from kontext_train.models.weights import load
from kontext_train.randomness import VisitRandom
from kontext_train.train import train
from tests.models.flux_cases import random_flux
from tests.runs import ENCODERS, run, small_config

# What diffusers can say: it has theta 10,000 built in.
MODEL = ("model.theta=10000", "model.guidance_embed=true", "ema.half_life_images=20", "encoders.dtype=float32")
HEIGHT, WIDTH, STEPS, GUIDANCE = 32, 48, 4, 3.0


@pytest.fixture(scope="module")
def trained_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps from random weights, so that every weight matters, with an average that differs."""
    folder = tmp_path_factory.mktemp("trained")
    start = folder / "start.safetensors"
    config = small_config(shards, folder, *MODEL, "run.steps=2", "optimizer.lr=1e-2", f"weights.student={start}")
    torch.manual_seed(0)
    save_file(dict(random_flux(config.model).state_dict()), start)
    run(config)
    start.unlink()
    return folder


def export_to(trained_run: Path, out: Path, **options: object) -> Path:
    export(ExportConfig(str(trained_run), str(out), **options))  # type: ignore[arg-type]
    return out


@pytest.fixture(scope="module")
def pipeline_folder(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "pipeline"
    options = {"format": Format.diffusers, "dtype": StorageDtype.float32, "max_shard_gb": 1e-4}
    return export_to(trained_run, out, **options)


def same_parameters(path: Path, ema: bool, trained_run: Path) -> bool:
    checkpoint = resolve(trained_run)
    expected = load_model(checkpoint, read_config(checkpoint), ema=ema)
    model = Flux(expected.config)
    load(model, path)
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))


def context_image() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, HEIGHT, WIDTH), dtype=np.uint8))


def our_image(trained: Trained, contexts: list[Tensor], monkeypatch: pytest.MonkeyPatch, embedded: float) -> Tensor:
    """[3, H, W] in [0, 1], before it is rounded to pixels."""
    decoded = []
    decode = trained.encoders.autoencoder.vae.decode

    def recorded(latents: Tensor) -> object:
        out = decode(latents)
        decoded.append(out.sample[0])
        return out

    monkeypatch.setattr(trained.encoders.autoencoder.vae, "decode", recorded)
    sampler = SamplerConfig(steps=STEPS, embedded_guidance=embedded)
    trained.generate([Request("erase the red circle", contexts, HEIGHT, WIDTH, seed=7)], sampler)
    monkeypatch.undo()
    return (decoded[0] / 2 + 0.5).clamp(0, 1)


def their_image(pipeline: FluxKontextPipeline, contexts: list[Tensor], guidance: float = GUIDANCE) -> Tensor:
    tokens = HEIGHT // 16 * WIDTH // 16
    image = Image.fromarray(contexts[0].permute(1, 2, 0).numpy()) if contexts else None
    out = pipeline(
        image=image,
        prompt="erase the red circle",
        height=HEIGHT,
        width=WIDTH,
        max_area=HEIGHT * WIDTH,
        _auto_resize=False,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=VisitRandom(0, torch.device("cpu")).normal("sample", [7], [tokens], 64)[None],
        max_sequence_length=12,
        output_type="pt",
    )
    return out.images[0]


def test_a_damaged_checkpoint_is_not_exported(trained_run: Path, tmp_path: Path) -> None:
    newest = sorted((trained_run / "checkpoints").iterdir())[-1]
    shutil.copytree(newest, tmp_path / newest.name)
    file = next((tmp_path / newest.name).glob("*.distcp"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ConfigError, match=rf"is damaged: .*{file.name}"):
        export(ExportConfig(checkpoint=str(tmp_path / newest.name), out=str(tmp_path / "model.safetensors")))
    assert not (tmp_path / "model.safetensors").exists()


def test_the_pipeline_makes_the_images_that_we_make(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = FluxKontextPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    trained = load_trained(pipeline_folder)
    images = []
    for contexts in ([], [context_image()]):
        ours, theirs = our_image(trained, contexts, monkeypatch, GUIDANCE), their_image(pipeline, contexts)
        assert theirs.shape == (3, HEIGHT, WIDTH)
        print("largest difference:", (ours - theirs).abs().max().item())
        assert (ours - theirs).abs().max() <= 1e-3
        images.append(theirs)
    # Negative controls: the context, the guidance and the schedule each change more than that.
    assert (images[1] - images[0]).abs().max() > 1e-2
    assert (their_image(pipeline, [context_image()], 9.0) - images[1]).abs().max() > 1e-2
    pipeline.scheduler.register_to_config(base_shift=3.0)
    assert (their_image(pipeline, [context_image()]) - images[1]).abs().max() > 1e-2


@pytest.mark.parametrize("weights", list(Weights))
@pytest.mark.parametrize("form", ["one file", "parts", "pipeline"])
def test_what_is_read_back_is_the_checkpoint(trained_run: Path, tmp_path: Path, form: str, weights: Weights) -> None:
    out = tmp_path / ("model.safetensors" if form == "one file" else "model")
    form_options: dict[str, dict[str, object]] = {
        "one file": {},
        "parts": {"max_shard_gb": 1e-4},
        "pipeline": {"max_shard_gb": 1e-4, "format": Format.diffusers, "encoders": "none"},
    }
    export_to(trained_run, out, weights=weights, dtype=StorageDtype.float32, **form_options[form])
    averaged = weights is Weights.ema
    assert same_parameters(out, averaged, trained_run)
    assert not same_parameters(out, not averaged, trained_run)
    if form != "one file":
        files = list(out.rglob("*.safetensors"))
        assert len(files) > 2
        for file in files:
            sizes = [t.numel() * t.element_size() for t in load_file(file).values()]
            assert sum(sizes) <= 1e5 or len(sizes) == 1
    assert not list(tmp_path.rglob("*.partial*"))


def test_an_export_inside_the_run_folder_is_not_taken_for_the_run(trained_run: Path, tmp_path: Path) -> None:
    shutil.copytree(trained_run, tmp_path / "run")
    export_to(trained_run, tmp_path / "run" / "model.safetensors")
    assert resolve(tmp_path / "run").name == "step_00000002"
    damaged = tmp_path / "run" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"checkpoint=.*cannot be read.*is not a whole safetensors file"):
        export_to(damaged, tmp_path / "x.safetensors")


def test_exports_are_exported_again_in_another_form(trained_run: Path, tmp_path: Path) -> None:
    pipeline = export_to(
        trained_run, tmp_path / "a", format=Format.diffusers, dtype=StorageDtype.float32, encoders="none"
    )
    released = export_to(pipeline, tmp_path / "b.safetensors", dtype=StorageDtype.float32)
    assert same_parameters(released, True, trained_run)
    assert "| training step | 2 |" in (tmp_path / "b.md").read_text()
    with pytest.raises(ConfigError, match=r"weights='raw': but .*/a is an export of averaged weights"):
        export_to(pipeline, tmp_path / "c.safetensors", weights=Weights.raw)


def test_a_run_starts_from_a_pipeline(trained_run: Path, pipeline_folder: Path, shards: Path, tmp_path: Path) -> None:
    options = ("run.steps=1", "optimizer.lr=1e-12", f"weights.student={pipeline_folder}")
    run(small_config(shards, tmp_path, *MODEL, *options), processes=2)
    checkpoint = resolve(tmp_path)
    started = load_model(checkpoint, read_config(checkpoint), ema=False)
    source = resolve(trained_run)
    expected = load_model(source, read_config(source), ema=True)
    for p, q in zip(started.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-8)


def test_a_run_says_what_becomes_of_guidance_in(pipeline_folder: Path, shards: Path, tmp_path: Path) -> None:
    without = ("run.steps=1", "model.theta=10000", f"weights.student={pipeline_folder}")
    with pytest.raises(ConfigError, match=r"weights\.student=.*weights\.guidance_in=drop leaves it out"):
        train(small_config(shards, tmp_path, *without))
    run(small_config(shards, tmp_path, *without, "weights.guidance_in=drop"))
    checkpoint = resolve(tmp_path)
    assert load_model(checkpoint, read_config(checkpoint), ema=False).guidance_in is None


def test_float8_keeps_matrices_to_a_sixteenth(trained_run: Path, tmp_path: Path) -> None:
    out = export_to(trained_run, tmp_path / "model.safetensors", dtype=StorageDtype.float8)
    tensors = load_file(out)
    checkpoint = resolve(trained_run)
    expected = load_model(checkpoint, read_config(checkpoint), ema=True)
    ours = Flux(expected.config)
    load(ours, out)
    for (name, p), q in zip(ours.named_parameters(), expected.parameters(), strict=True):
        in_block = p.ndim == 2 and name.startswith(("double_blocks.", "single_blocks."))
        assert tensors[name].dtype is (torch.float8_e4m3fn if in_block else torch.bfloat16), name
        if in_block:
            scale = tensors[name.replace(".weight", ".scale_weight")]
            # Half a unit in the last of three bits; below the smallest normal number, 2^-6, units are all alike.
            bound = torch.maximum(q.abs() / 16, 2**-10 * scale) * 1.0001
            assert ((p - q).abs() <= bound).all(), name
            assert tensors[name].float().abs().max() == 448
        else:
            assert torch.equal(p, q.bfloat16().float()), name
    assert tensors["scaled_fp8"].shape == (2,)


def test_the_files_and_the_card_say_what_they_are(trained_run: Path, pipeline_folder: Path, shards: Path) -> None:
    record = json.loads((resolve(trained_run) / "record.json").read_text())
    text = (pipeline_folder / "README.md").read_text()
    config = OmegaConf.create(text.split("```yaml\n")[1].split("```")[0])
    assert OmegaConf.to_container(config) == record["config"]
    assert config.data.train == str(shards)
    assert record["plan"] in text
    assert "| weights | averaged (EMA) |" in text
    assert "max_sequence_length=12" in text
    for file in (pipeline_folder / "transformer").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert json.loads(opened.metadata()["kontext_train_config"]) == record["config"]
            origin = json.loads(opened.metadata()["kontext_train_origin"])
            assert origin == {"weights": "ema", "step": 2, "plan": record["plan"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("format=bfl", "out='': must be given"),
        ("out=x.safetensors max_shard_gb=1", r"max_shard_gb=1\.0: splits what goes into a folder"),
        ("out=x max_shard_gb=0", r"max_shard_gb=0\.0: must be above 0"),
        ("out=x.safetensors format=diffusers", r"out='x\.safetensors': must be a folder with format=diffusers"),
        ("out=x format=diffusers dtype=float8", r"dtype='float8': is not for format=diffusers"),
        ("out=x encoders=y", "encoders='y': are part of a diffusers pipeline"),
        ("out=tests", "out='tests': exists and is not an empty folder"),
        ("out=x format=diffusers encoders=tests", "encoders='tests': must hold vae, .*but vae/ is missing"),
        ("out=x format=gguf", "Invalid value 'gguf'"),
    ],
)
def test_impossible_exports_are_refused(
    trained_run: Path, arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ENCODERS.parent.parent)
    monkeypatch.setattr("sys.argv", ["kontext-export", f"checkpoint={trained_run}", *arguments.split()])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert error.startswith("kontext-export: ")
    assert re.search(message, error)
    assert not Path("x").exists()


def test_what_diffusers_has_no_option_for_is_refused(trained_run: Path, tmp_path: Path) -> None:
    source = Source.of(resolve(trained_run), ema=True)
    other = replace(source, config=source.config | {"model": source.config["model"] | {"theta": 100}})
    with pytest.raises(ConfigError, match=r"model\.theta=100: cannot be told to diffusers"):
        write_pipeline(other, tmp_path / "x", torch.float32, 10**9, ENCODERS)
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_nothing(trained_run: Path, tmp_path: Path) -> None:
    broken = replace(Source.of(resolve(trained_run), ema=True), path=tmp_path / "gone")
    with pytest.raises(ValueError, match="gone: no safetensors file there"):
        write_released(broken, tmp_path / "x.safetensors", torch.float32, None)
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.safetensors.partial").mkdir()  # of one that was killed
    export_to(trained_run, tmp_path / "x.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.md", "x.safetensors"]


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ConfigError, match=r"out='.*model\.safetensors': is a folder, and one file is asked for"):
        ExportConfig("run", str(tmp_path / "model.safetensors"))
