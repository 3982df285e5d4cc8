"""What is stored is what training would have computed; no kill, no other process and no other setting changes it."""

import io
import os
import re
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from webdataset import ShardWriter

from data_tools import encode_shards as tool
from data_tools.check_shards import check_shards
from data_tools.encode_shards import encode_shards
from data_tools.filter_shards import filter_shards
from data_tools.shared_job import JobReport, share_of
from kontext_train import assembly
from kontext_train.data import encoded as encoded_module
from kontext_train.data.config import DataConfig, Resize
from kontext_train.data.encoded import to_bytes
from kontext_train.data.encoding import digest_of
from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import build_index
from kontext_train.data.sample import BadSample, SampleReader
from kontext_train.data.transforms import Transform
from kontext_train.errors import ConfigError
from kontext_train.models.config import EncoderDtype, EncodersConfig
from kontext_train.models.text_encoders import TextEncoders
from kontext_train.train import train
from kontext_train.training.metrics import read_metrics
from tests.data.test_sample import encode as image_bytes
from tests.data.test_sample import noise, write_folder
from tests.runs import ENCODERS, broken_copy, fork, overwrite, small_config
from tests.servers import web_server

DATA = DataConfig()


def encoders_config(path: Path = ENCODERS, dtype: EncoderDtype = EncoderDtype.float32) -> EncodersConfig:
    return EncodersConfig(path=str(path), t5_tokens=12, dtype=dtype)


@pytest.fixture(scope="module")
def source(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 of the scenes in four shards."""
    folder = tmp_path_factory.mktemp("source")
    index = ShardIndex.open(shards)
    with ShardWriter(f"{folder}/%02d.tar", maxcount=15, verbose=0, encoder=False, mtime=0) as writer:
        for i in range(60):
            location = index.location(i)
            raw = location.shard.read_bytes()
            spans = {"json": location.json, "target.png": location.target}
            spans |= {f"context.{number}.png": span for number, span in enumerate(location.contexts)}
            members = {name: raw[span.offset : span.offset + span.size] for name, span in spans.items()}
            writer.write({"__key__": location.key} | members)
    build_index(folder)
    return folder


def encode(source: Path, out: Path, t5: bool = True, **options: object) -> JobReport:
    settings: dict[str, object] = {"encoders": encoders_config(), "data": DATA, "processes": 0} | options
    return encode_shards(source, out, t5=t5, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def encoded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoded") / "out"
    report = encode(source, out)
    assert (report.samples, report.shards, report.kept, report.bad, report.indexed) == (60, 4, 0, [], True)
    return out


@pytest.fixture(scope="module")
def other_encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same encoders but for a slightly other autoencoder."""
    folder = tmp_path_factory.mktemp("other") / "encoders"
    shutil.copytree(ENCODERS, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({k: v * 1.05 if k.startswith("encoder.conv_out") else v for k, v in weights.items()}, file)
    return folder


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "index.arrow"}


def losses(run_dir: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r]


STEPS = ("run.steps=3", "data.prompt_dropout=0.4", "data.context_dropout=0.2")


def trained(data: Path, run_dir: Path, *overrides: str) -> list[float]:
    train(small_config(data, run_dir, "encoders.dtype=float32", *STEPS, *overrides))
    return losses(run_dir)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def from_pixels(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return trained(source, tmp_path_factory.mktemp("pixels"))


def test_training_from_encoded_shards_is_training_from_pixels(
    encoded: Path, from_pixels: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Posterior noise belongs to the visit, so sampling may stay on. T5 is stored in bfloat16: 2^-9 of each value."""
    with monkeypatch.context() as without_text_encoders:
        without_text_encoders.setattr(TextEncoders, "__init__", None)  # were one loaded, the run would fail
        stored = trained(encoded, tmp_path / "stored")
    assert stored == pytest.approx(from_pixels, rel=2e-3)
    assert len(set(stored)) == 3


def test_with_t5_left_online_losses_are_equal_to_rounding(
    source: Path, from_pixels: list[float], tmp_path: Path
) -> None:
    encode(source, tmp_path / "out", t5=False)
    assert trained(tmp_path / "out", tmp_path / "run") == pytest.approx(from_pixels, rel=1e-5)


def test_in_bfloat16_and_without_sampling(source: Path, tmp_path: Path) -> None:
    encode(source, tmp_path / "out", encoders=encoders_config(dtype=EncoderDtype.bfloat16))
    options = ("encoders.dtype=bfloat16", "encoders.sample_latents=false", "run.steps=2")
    pixels, stored = (trained(d, tmp_path / d.name / "run", *options) for d in (source, tmp_path / "out"))
    assert stored == pytest.approx(pixels, rel=4e-3)


def test_other_latents_are_seen_in_the_loss(
    source: Path,
    other_encoders: Path,
    from_pixels: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Control: latents 5 % off, with the check that would refuse them switched off."""
    encode(source, tmp_path / "out", encoders=encoders_config(other_encoders))
    with pytest.raises(ConfigError, match=r"encoders\.path='.*': has another vae than .*out was encoded with"):
        trained(tmp_path / "out", tmp_path / "run")
    monkeypatch.setattr(assembly, "check_encoding", lambda *arguments: None)
    off = trained(tmp_path / "out", tmp_path / "run")
    assert max(abs(a / b - 1) for a, b in zip(off, from_pixels, strict=True)) > 5e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("encoders.dtype=bfloat16", r"encoders\.dtype='bfloat16': but .*out was encoded with 'float32'"),
        ("encoders.t5_tokens=11", r"encoders\.t5_tokens=11: but .* was encoded with 12"),
        ("data.max_pixels=4096", r"data\.max_pixels=4096: but .* was encoded with 1048576"),
        ("data.resize=kontext", r"data\.resize='kontext': but .* was encoded with 'pixel_budget'"),
        ("data.max_upscale=2", r"data\.max_upscale=2\.0: but .* was encoded with 1\.0"),
        ("data.background=[0,0,0]", r"data\.background=\[0, 0, 0\]: but .* was encoded with \[255, 255, 255\]"),
        ("data.crop=random", r"data\.crop='random': but .* was encoded with 'center'"),
    ],
)
def test_other_settings_are_refused_by_key(encoded: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(encoded, tmp_path, override)


def test_validation_and_its_pictures(source: Path, encoded: Path, tmp_path: Path) -> None:
    options = ("run.steps=1", "validation.samples=6", "validation.pictures=2", "validation.sampler.steps=1")
    values = []
    for held_out in (source, encoded):
        run_dir = tmp_path / str(len(values))
        trained(encoded, run_dir, f"data.validation={held_out}", *options)
        assert (run_dir / "samples" / "step_00000001.png").stat().st_size > 1000
        values += [r["validation/loss"] for r in read_metrics(run_dir / "metrics.jsonl") if "validation/loss" in r]
    assert values[1] == pytest.approx(values[0], rel=2e-3)


def test_a_source_of_images_beside_one_of_latents_is_refused_by_key(
    source: Path, encoded: Path, tmp_path: Path
) -> None:
    encode(source, tmp_path / "clip", t5=False)
    for other, kind in ((source, "images"), (tmp_path / "clip", "latents")):
        two = (f"+data.sources.a.path={encoded}", f"+data.sources.b.path={other}")
        rule = rf"data\.sources\.b\.path='.*': holds {kind}, but data\.sources\.a latents and T5's tokens"
        with pytest.raises(ConfigError, match=rule):
            trained("", tmp_path / "run", *two)  # type: ignore[arg-type]


def test_two_sources_of_latents_train_together(
    source: Path, encoded: Path, other_encoders: Path, tmp_path: Path
) -> None:
    two = (f"+data.sources.a.path={encoded}", f"+data.sources.b.path={shutil.copytree(encoded, tmp_path / 'b')}")
    assert len(set(trained("", tmp_path / "run", *two))) == 3  # type: ignore[arg-type]
    encode(source, tmp_path / "b2", encoders=encoders_config(other_encoders))
    with pytest.raises(ConfigError, match=r"encoders\.path='.*': has another vae than .*b2 was encoded with"):
        trained("", tmp_path / "run", two[0], f"+data.sources.b.path={tmp_path / 'b2'}")  # type: ignore[arg-type]


def test_a_run_does_not_go_on_with_shards_encoded_otherwise(
    source: Path, encoded: Path, other_encoders: Path, tmp_path: Path
) -> None:
    encode(source, tmp_path / "out", encoders=encoders_config(other_encoders))
    assert ShardIndex.open(tmp_path / "out").digest != ShardIndex.open(encoded).digest
    trained(encoded, tmp_path / "run", "run.save_every_steps=1")
    with pytest.raises(ConfigError, match=r"run\.resume='.*': but .* was planned with other data settings"):
        trained(tmp_path / "out", tmp_path / "run", "run.steps=4", f"encoders.path={other_encoders}")


def test_a_bad_encoded_sample_leaves_a_hole(encoded: Path, tmp_path: Path) -> None:
    trained(broken_copy(encoded, tmp_path / "broken", range(0, 60, 4)), tmp_path / "run")
    noted = (tmp_path / "run" / "bad_samples.jsonl").read_text()
    assert "encoded: cannot be read (SafetensorError" in noted
    whole, hole = (SampleReader(ShardIndex.open(f), Transform(1 << 20, 16)) for f in (encoded, tmp_path / "broken"))
    for i in (0, 4, 8, 12):
        expected, given = whole.read(i), hole.hole(i)
        assert (given.key, given.prompt) == (expected.key, "")
        images = [(image.shape, image.dtype) for image in (given.target, *given.contexts)]
        assert images == [(image.shape, image.dtype) for image in (expected.target, *expected.contexts)]
        assert given.text is whole.empty_prompt or torch.equal(given.text.clip_P, whole.empty_prompt.clip_P)  # type: ignore[union-attr]


def test_encoded_shards_on_a_web_server_train_like_local_ones(encoded: Path, tmp_path: Path) -> None:
    local = trained(encoded, tmp_path / "local")
    with web_server(encoded) as server:
        assert build_index(server.url, out=tmp_path / "index").problems == []
        assert ShardIndex.open(tmp_path / "index").digest == ShardIndex.open(encoded).digest
        assert trained(tmp_path / "index", tmp_path / "remote") == local
        (tmp_path / "named").mkdir()
        build_index(server.url, out=tmp_path / "named", shards=["00.tar"])  # no listing tells of the encoding
        assert ShardIndex.open(tmp_path / "named").encoding == ShardIndex.open(encoded).encoding


def test_an_encoding_that_was_replaced_is_refused_by_name(encoded: Path, tmp_path: Path) -> None:
    shutil.copytree(encoded, tmp_path / "out")
    reader = SampleReader(ShardIndex.open(tmp_path / "out"), Transform(1 << 20, 16))
    (tmp_path / "out" / "encoding.safetensors").write_bytes(save({}, {"kontext_train": '{"t5": false}'}))
    with pytest.raises(ValueError, match=r"encoding\.safetensors was replaced after the shards beside it were indexed"):
        _ = reader.empty_prompt
    (tmp_path / "out" / "encoding.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"encoding\.safetensors is damaged"):
        _ = SampleReader(reader.index, reader.transform).empty_prompt
    (tmp_path / "out" / "encoding.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"encoding\.safetensors"):
        _ = SampleReader(reader.index, reader.transform).empty_prompt


def test_encoded_shards_can_be_filtered_but_not_checked(encoded: Path, tmp_path: Path) -> None:
    filter_shards(encoded, tmp_path / "edits", ["contexts > 0"])
    filtered, all_ = ShardIndex.open(tmp_path / "edits"), ShardIndex.open(encoded)
    assert filtered.encoding == all_.encoding
    assert len(filtered) == sum(all_.samples_by_contexts[1:]) > 0
    assert trained(tmp_path / "edits", tmp_path / "run")
    with pytest.raises(ValueError, match=r"out holds encoded shards .*Give the images they were made from"):
        check_shards(encoded, tmp_path / "report")


# -------------------------------------------------------------------------------------------------------------- storing


def test_samples_keep_key_prompt_metadata_and_size(source: Path, encoded: Path) -> None:
    pixels, stored = ShardIndex.open(source), ShardIndex.open(encoded)
    transform = Transform(1 << 20, 16)
    assert np.array_equal(stored.target_hw, transform.size(pixels.target_hw))
    assert np.array_equal(stored.context_hw, transform.size(pixels.context_hw))
    assert stored.encoding is not None
    assert stored.encoding["source"] == pixels.digest
    for i in (0, 17, 59):
        theirs, ours = (SampleReader(index, transform).read(i) for index in (pixels, stored))
        assert (ours.key, ours.prompt, ours.metadata) == (theirs.key, theirs.prompt, theirs.metadata)
        assert len(ours.contexts) == len(theirs.contexts)
        assert ours.target.shape == (2, 16, theirs.target.shape[0] // 8, theirs.target.shape[1] // 8)


def test_t5_is_bfloat16_and_latents_are_as_computed(source: Path, encoded: Path, tmp_path: Path) -> None:
    with tarfile.open(encoded / "00.tar") as tar:
        file = tar.extractfile(next(m for m in tar if m.name.endswith(".encoded.safetensors")))
        assert file is not None
        tensors = load(file.read())
    assert {name: tensor.dtype for name, tensor in tensors.items() if not name.startswith("context")} == {
        "target": torch.float32,
        "clip": torch.float32,
        "t5": torch.bfloat16,
    }


def _encode_forever(source: Path, out: Path) -> None:
    encode(source, out, samples_at_once=1)


def test_killed_and_run_again_is_one_run(source: Path, encoded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = fork(_encode_forever, source, out)
    while not (out / "00.tar").exists():
        assert process.is_alive()
        time.sleep(0.002)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert finished.keys() < {"00.tar", "01.tar", "02.tar", "03.tar"}  # it was killed in the middle
    (out / ".03.tar.elsewhere.1.tmp").write_bytes(b"half")  # as a kill at a worse moment leaves it
    report = encode(source, out, samples_at_once=1)
    assert (report.kept, report.shards, report.indexed) == (len(finished), 4 - len(finished), True)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    assert {path.name for path in out.iterdir()} == {path.name for path in encoded.iterdir()}
    assert len(ShardIndex.open(out)) == 60
    again = encode(source, tmp_path / "again", samples_at_once=1)
    assert again.samples == 60
    assert shard_bytes(tmp_path / "again") == shard_bytes(out)


def test_processes_share_the_shards_and_the_last_writes_the_index(source: Path, encoded: Path, tmp_path: Path) -> None:
    reports = [encode(source, tmp_path / "out", share=(number, 3)) for number in range(3)]
    assert [(r.shards, r.samples, r.indexed) for r in reports] == [(2, 30, False), (1, 15, False), (1, 15, True)]
    assert shard_bytes(tmp_path / "out") == shard_bytes(encoded)
    assert ShardIndex.open(tmp_path / "out").digest == ShardIndex.open(encoded).digest


def test_share_of_torchrun_slurm_and_both() -> None:
    array = {"SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "8"}
    assert share_of({}) == (0, 1)
    assert share_of({"RANK": "3", "WORLD_SIZE": "8"}) == (3, 8)
    assert share_of(array) == (4, 8)
    assert share_of(array | {"RANK": "1", "WORLD_SIZE": "2"}) == (9, 16)  # every number once
    steps = {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert share_of(steps | {"SLURM_ARRAY_TASK_STEP": "2"}) == (3, 4)
    with pytest.raises(ValueError, match=r"task 6 of a Slurm array of 4: its numbers have gaps\. Use --array=0-3"):
        share_of(steps)


def test_a_bad_sample_is_left_out_by_name(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(source, tmp_path / "source")
    index = ShardIndex.open(tmp_path / "source")
    location = index.location(20)
    overwrite(location.shard, location.target.offset + 40, bytes(40))
    arguments = [str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--encoders", str(ENCODERS), "--processes=1"]
    assert tool.main([*arguments, "--t5-tokens=12", "--dtype=float32"]) == 1
    printed = capsys.readouterr().out
    assert f"left out: {location.shard}: {location.key}: target: cannot be decoded" in printed
    assert "59 samples in 4 shards, 0 kept; indexed" in printed
    keys = [ShardIndex.open(tmp_path / "out").location(i).key for i in range(59)]
    assert location.key not in keys
    assert tool.main([*arguments, "--t5-tokens=12", "--dtype=float32"]) == 1, "a rerun does not forget it"
    assert f"left out: {location.shard}: {location.key}: could not be read when" in capsys.readouterr().out


def test_a_folder_of_something_else_is_not_added_to(source: Path, encoded: Path) -> None:
    with pytest.raises(ValueError, match=r"out was begun with another data.max_pixels: 1048576 there, 4096 now"):
        encode(source, encoded, data=DataConfig(max_pixels=4096))
    with pytest.raises(ValueError, match=r"was begun with another t5: True there, False now"):
        encode(source, encoded, t5=False)
    with pytest.raises(ValueError, match=r"holds encoded shards already"):
        encode(encoded, source.parent / "new")
    with pytest.raises(ValueError, match=r"holds 00\.tar, which encode_shards did not write"):
        encode(source, source)


def test_wrong_settings_have_a_name_and_a_status(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(source), "--out", "never", "--encoders", str(ENCODERS)]
    assert tool.main([*arguments, "--max-upscale", "0.5"]) == 1
    assert "data.max_upscale=0.5: must be at least 1" in capsys.readouterr().err


def test_kontext_sizes_are_stored(tmp_path: Path) -> None:
    """A picture of one megapixel, at the size that the released pipelines would give it."""
    (tmp_path / "source").mkdir()
    write_folder(tmp_path / "source", [{"target.jpg": image_bytes(noise(64, 96), "JPEG")}])
    data = DataConfig(resize=Resize.kontext, max_upscale=20.0)
    encode(tmp_path / "source", tmp_path / "out", data=data, t5=False)
    assert ShardIndex.open(tmp_path / "out").target_hw.tolist() == [[832, 1248]]


# ----------------------------------------------------------------------------------------------------- damaged shards


def repacked(encoded: Path, folder: Path, change: dict[str, bytes | None]) -> list[str]:
    """One shard with some members replaced or (None) removed; the index's problems."""
    folder.mkdir()
    shutil.copy(encoded / "encoding.safetensors", folder)
    with tarfile.open(encoded / "00.tar") as old, tarfile.open(folder / "00.tar", "w") as new:
        for member in old.getmembers()[:4]:
            file = old.extractfile(member)
            assert file is not None
            raw = change.get(member.name, file.read())
            if raw is not None:
                info = tarfile.TarInfo(member.name)
                info.size = len(raw)
                new.addfile(info, io.BytesIO(raw))
    return [problem.reason for problem in build_index(folder).problems]


def test_the_index_names_damaged_members(encoded: Path, tmp_path: Path) -> None:
    with tarfile.open(encoded / "00.tar") as tar:
        name = tar.getnames()[0]
        file = tar.extractfile(name)
        assert file is not None
        good = file.read()
    strange, about = {"target": torch.zeros(3, 4, 4)}, '{"encoding": "x", "pixels_per_latent": 8}'
    other = to_bytes([torch.zeros(2, 16, 4, 4)], encoded_module.StoredText(torch.zeros(64), None), "other", 8)
    cases: dict[str, tuple[bytes, str]] = {
        "cut": (good[:-9], r"\.encoded\.safetensors is truncated: it has"),
        "header": (good[:40], "no safetensors file, or a truncated one"),
        "text": (b"\x08\0\0\0\0\0\0\0notjson!", "no safetensors file: its header cannot be parsed"),
        "huge": (b"\xff" * 16, "no safetensors file, or a truncated one"),
        "strange": (save(strange), r"not written by encode_shards \(KeyError"),
        "shape": (save(strange, {"kontext_train": about}), "not written by encode_shards"),
        "other": (other, r"not encoded as encoding\.safetensors says"),
        "empty": (b"", r"encoded\.safetensors is empty \(0 bytes\)"),
    }
    for case, (raw, message) in cases.items():
        (reason,) = repacked(encoded, tmp_path / case, {name: raw})
        assert re.search(message, reason), (case, reason)


def test_encoded_samples_do_not_mix_with_images(source: Path, encoded: Path, tmp_path: Path) -> None:
    shutil.copytree(encoded, tmp_path / "both")
    shutil.copy(source / "00.tar", tmp_path / "both" / "pixels.tar")
    report = build_index(tmp_path / "both")
    assert report.samples == 60
    assert {p.reason for p in report.problems} == {
        "not encoded as encoding.safetensors says: a folder holds one encoding, or images"
    }
    (tmp_path / "both" / "encoding.safetensors").unlink()
    assert build_index(tmp_path / "both").samples == 15  # now it is a folder of images


def test_bytes_damaged_after_indexing_are_a_bad_sample(encoded: Path, tmp_path: Path) -> None:
    shutil.copytree(encoded, tmp_path / "out")
    index = ShardIndex.open(tmp_path / "out")
    location = index.location(3)
    overwrite(location.shard, location.target.offset, b"\xff" * 64)
    with pytest.raises(BadSample, match=rf"00\.tar: {location.key}: encoded: cannot be read \(SafetensorError"):
        SampleReader(index, Transform(1 << 20, 16)).read(3)


def test_a_digest_names_an_encoding() -> None:
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})


def test_a_digest_of_weights_sees_any_byte_of_a_small_file_and_any_name(tmp_path: Path) -> None:
    def digest(name: str, raw: bytes) -> str:
        shutil.rmtree(tmp_path / "w", ignore_errors=True)
        (tmp_path / "w").mkdir()
        (tmp_path / "w" / name).write_bytes(raw)
        return encoded_module.weights_digest([tmp_path / "w"])

    raw = bytes(3 << 20)
    assert digest("a.safetensors", raw) == digest("a.safetensors", raw)
    changed = {digest("a.safetensors", raw[:i] + b"x" + raw[i + 1 :]) for i in (0, 1 << 20, len(raw) - 1)}
    assert len(changed | {digest("a.safetensors", raw), digest("b.safetensors", raw)}) == 5
    assert digest("a.safetensors", raw) != digest("a.safetensors", raw + b"\0")


def test_as_many_processes_read_as_asked(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this process's share is."""
    asked: list[int] = []

    def read(reader: object, rows: object, processes: int) -> None:
        asked.append(processes)
        raise InterruptedError("enough seen")

    monkeypatch.setattr(tool, "_read", read)
    with pytest.raises(InterruptedError, match="enough seen"):
        encode(source, tmp_path / "out", share=(1, 3), processes=2)
    assert asked == [2]
