"""A teacher's pictures as ordinary shards: the same however the work is cut, and used as any shards are."""

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data_tools import generate_targets as tool
from data_tools.generate_targets import generate_targets
from data_tools.shard_writing import write_shard
from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import build_index
from kontext_train.data.sample import SampleReader
from kontext_train.evaluation.trained import EXPORT_CONFIG, load_trained, read_config
from kontext_train.export import ExportConfig, StorageDtype, export
from kontext_train.flow.config import SamplerConfig
from kontext_train.generate import Request
from kontext_train.models.lora import base_digest
from quickstart.make_dataset import example_at, to_sample
from quickstart.scenes import Split
from tests.runs import ENCODERS, broken_copy, overwrite, run, small_config, start

SAMPLER = SamplerConfig(steps=2, guidance=3.0)


def write_samples(shard: Path, samples: Sequence[dict[str, Any]]) -> None:
    members = [({k: v for k, v in s.items() if k != "__key__"}, s["__key__"]) for s in samples]
    write_shard(shard, [(key, m | {"json": json.dumps(m["json"]).encode()}) for m, key in members])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of five samples."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(2):
        samples = [to_sample(example_at(0, Split.TRAIN, 5 * number + i), f"{number}_{i}") for i in range(5)]
        write_samples(folder / f"{number}.tar", samples)
    build_index(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    # float32: the rounding of bfloat16 kernels depends on what else is in the pack, by more or less with the CPU
    options = ("run.steps=2", "optimizer.lr=1e-2", "data.tokens_per_pack=64", "encoders.dtype=float32")
    run(small_config(source, folder / "run", *options))
    export(ExportConfig(str(folder / "run"), str(folder / "teacher.safetensors"), dtype=StorageDtype.float32))
    return folder / "teacher.safetensors"


@pytest.fixture(scope="module")
def targets(source: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("targets") / "out"
    report = generate_targets(source, out, teacher, SAMPLER)
    assert (report.samples, report.shards, report.kept, report.indexed) == (10, 2, 0, True)
    return out


def test_targets_are_the_teachers_and_all_else_is_kept(source: Path, teacher: Path, targets: Path) -> None:
    trained = load_trained(teacher)
    before, after = (SampleReader(ShardIndex.open(f), trained.transform) for f in (source, targets))
    for i in range(10):
        old, new = before.read(i), after.read(i)
        assert (new.key, new.prompt, len(new.contexts)) == (old.key, old.prompt, len(old.contexts))
        assert all(np.array_equal(a, b) for a, b in zip(old.contexts, new.contexts, strict=True))
        contexts = [torch.as_tensor(np.asarray(c)).permute(2, 0, 1) for c in old.contexts]
        seed = new.metadata["generated"]["seed"]
        (made,) = trained.generate([Request(old.prompt, contexts, *old.target.shape[:2], seed=seed)], SAMPLER)
        difference = np.asarray(new.target).astype(int) - made.permute(1, 2, 0).numpy()
        assert abs(difference).max() <= 1  # it was made in a pack, and now alone
        assert not np.array_equal(new.target, old.target)
        assert {k: v for k, v in new.metadata.items() if k != "generated"} == old.metadata
    assert len({after.read(i).metadata["generated"]["seed"] for i in range(10)}) == 10


def test_cut_short_and_shared_out_it_is_the_same(source: Path, teacher: Path, targets: Path, tmp_path: Path) -> None:
    first = generate_targets(source, tmp_path, teacher, SAMPLER, share=(0, 2))
    assert (first.shards, first.indexed) == (1, False)
    (tmp_path / ".1.tar.host.1.tmp").write_bytes(b"half")  # another process was killed
    second = generate_targets(source, tmp_path, teacher, SAMPLER)
    assert (second.shards, second.kept, second.indexed) == (1, 1, True)
    for name in ("0.tar", "1.tar"):
        assert (tmp_path / name).read_bytes() == (targets / name).read_bytes()
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


def test_other_settings_are_refused(
    source: Path, teacher: Path, targets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(source), "--out", str(targets), "--teacher", str(teacher), "--steps", "2"]
    assert tool.main([*arguments, "--guidance", "4"]) == 1
    assert "was begun with another sampler" in capsys.readouterr().err
    assert tool.main([*arguments, "--seed", "1"]) == 1
    assert "was begun with another seed: 0 there, 1 now" in capsys.readouterr().err
    assert tool.main(arguments) == 0
    assert "0 samples in 0 shards, 2 kept; indexed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("flow.base_mu=0.7", "another shift: {'base_tokens': 256, 'base_mu': 0.5,"),
        ("data.background=[0,0,0]", "another background: [255, 255, 255] there, [0, 0, 0] now"),
        ("data.max_pixels=1024", "another sizes"),
        ("encoders.t5_tokens=16", "another encoders"),
    ],
)
def test_a_teacher_that_reads_or_samples_otherwise_is_refused(
    source: Path, teacher: Path, targets: Path, tmp_path: Path, option: str, said: str
) -> None:
    """Though its weights are the same."""
    config = read_config(teacher)
    section, _, rest = option.partition(".")
    name, _, value = rest.partition("=")
    config[section][name] = json.loads(value)
    other = tmp_path / "other.safetensors"
    with safe_open(teacher, "pt") as file:
        save_file(load_file(teacher), other, file.metadata() | {EXPORT_CONFIG: json.dumps(config)})
    with pytest.raises(ValueError, match=re.escape(f"was begun with {said}")):
        generate_targets(source, targets, other, SAMPLER)


def test_what_was_made_with_other_encoders_is_refused(
    source: Path, teacher: Path, targets: Path, tmp_path: Path
) -> None:
    """Of the same place in the config; and moved, they are the same."""
    shutil.copytree(ENCODERS, tmp_path / "encoders")
    assert generate_targets(source, targets, teacher, SAMPLER, encoders=str(tmp_path / "encoders")).indexed
    file = tmp_path / "encoders" / "vae" / "config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ValueError, match=r"was begun with another encoders: \{'digest': "):
        generate_targets(source, targets, teacher, SAMPLER, encoders=str(tmp_path / "encoders"))


def test_the_teacher_is_named_by_bytes_of_its_weights(teacher: Path, targets: Path) -> None:
    """And not by sums, which a machine of more cores adds up otherwise."""
    settings = json.loads((targets / tool.SETTINGS).read_text())
    assert settings["teacher"] == base_digest(teacher)
    assert "kontext_train_config" not in settings
    assert str(teacher.parent) not in json.dumps(settings)


def test_a_released_file_is_refused_as_a_teacher(
    source: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    released = tmp_path / "released.safetensors"
    save_file(load_file(teacher), released)
    assert tool.main([str(source), "--out", str(tmp_path / "out"), "--teacher", str(released)]) == 1
    told = capsys.readouterr().err
    assert "--teacher takes a run, a checkpoint of one or what kontext-export wrote" in told
    assert "does not say which model it holds" in told
    assert not (tmp_path / "out").exists()


def test_the_same_key_in_two_shards_has_two_noises(source: Path, teacher: Path, tmp_path: Path) -> None:
    twice = tmp_path / "source"
    twice.mkdir()
    for name in ("a.tar", "b.tar"):
        shutil.copy(source / "0.tar", twice / name)
    build_index(twice)
    generate_targets(twice, tmp_path / "out", teacher, SAMPLER)
    reader = SampleReader(ShardIndex.open(tmp_path / "out"), load_trained(teacher).transform)
    first, second = reader.read(0), reader.read(5)
    assert first.key == second.key
    assert first.metadata["generated"]["seed"] != second.metadata["generated"]["seed"]
    assert not np.array_equal(first.target, second.target)


ODD_PROMPTS = ("", "\n", "make it\nred\r\n\tnow ", "把圆变成红色 🟥 é", "\u202e\x00\u200d", "long " * 500)


def test_odd_prompts_are_kept(source: Path, teacher: Path, tmp_path: Path) -> None:
    odd = tmp_path / "source"
    odd.mkdir()
    reader = SampleReader(ShardIndex.open(source), load_trained(teacher).transform)
    picture = tool._png(reader.read(0).target)
    samples = [
        (f"{i}", {"json": json.dumps({"prompt": prompt, "note": prompt}).encode(), "target.png": picture})
        for i, prompt in enumerate(ODD_PROMPTS)
    ]
    write_shard(odd / "0.tar", samples)
    build_index(odd)
    report = generate_targets(odd, tmp_path / "out", teacher, SAMPLER)
    assert (report.samples, report.bad) == (len(ODD_PROMPTS), [])
    made = SampleReader(ShardIndex.open(tmp_path / "out"), reader.transform)
    found = [made.read(i) for i in range(len(ODD_PROMPTS))]
    assert [(raw.prompt, raw.metadata["note"]) for raw in found] == [(prompt, prompt) for prompt in ODD_PROMPTS]


@pytest.mark.parametrize("ladd", [False, True])
def test_a_run_trains_on_them(targets: Path, teacher: Path, tmp_path: Path, ladd: bool) -> None:
    stage = ("stage=ladd", f"weights.teacher={teacher}", "schedule.warmup_steps=0") if ladd else ()
    late = ("discriminator_schedule.warmup_steps=0",) if ladd else ()
    run(small_config(targets, tmp_path, "run.steps=1", "data.tokens_per_pack=64", *stage, *late))


def test_a_bad_sample_is_left_out_by_name(
    source: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by a run that finds its shard made."""
    broken = broken_copy(source, tmp_path / "source", [7])
    arguments = [str(broken), "--out", str(tmp_path / "out"), "--teacher", str(teacher), "--steps", "2"]
    assert tool.main(arguments) == 1
    told = capsys.readouterr().out
    assert "9 samples in 2 shards, 0 kept; indexed" in told
    assert told.count("left out: ") == 1
    assert "1.tar: 1_2: target: cannot be decoded" in told
    for _ in range(2):
        assert tool.main(arguments) == 1
        told = capsys.readouterr().out
        assert "0 samples in 0 shards, 2 kept; indexed" in told
        assert told.count("left out: ") == 1
        assert "1.tar: 1_2: could not be read when its shard was made" in told


def test_a_shard_of_bad_samples_alone_is_left_out(source: Path, teacher: Path, tmp_path: Path) -> None:
    broken = broken_copy(source, tmp_path / "source", range(5, 10))
    first = generate_targets(broken, tmp_path / "out", teacher, SAMPLER)
    assert (first.samples, first.indexed, len(first.bad)) == (5, True, 5)
    again = generate_targets(broken, tmp_path / "out", teacher, SAMPLER)
    names = [f"{broken / '1.tar'}: 1_{i}: could not be read when its shard was made" for i in range(5)]
    assert (again.kept, again.bad) == (2, names)
    assert len(ShardIndex.open(tmp_path / "out")) == 5


def test_a_shard_that_was_cut_off_stops_the_job_and_no_more(
    source: Path, teacher: Path, targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(source, tmp_path / "source")
    whole = (tmp_path / "source" / "1.tar").read_bytes()
    state = (tmp_path / "source" / "1.tar").stat()
    (tmp_path / "source" / "1.tar").write_bytes(whole[: len(whole) // 2])
    arguments = [str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--teacher", str(teacher), "--steps", "2"]
    assert tool.main(arguments) == 1
    assert "1.tar" in capsys.readouterr().err
    (tmp_path / "source" / "1.tar").write_bytes(whole)
    os.utime(tmp_path / "source" / "1.tar", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert tool.main(arguments) == 0
    assert (tmp_path / "out" / "1.tar").read_bytes() == (targets / "1.tar").read_bytes()


def as_rank(arguments: list[str]) -> None:
    sys.exit(tool.main(arguments))


def test_a_rank_with_bad_samples_does_not_end_the_others(source: Path, teacher: Path, tmp_path: Path) -> None:
    """torchrun ends all ranks as soon as one of them fails: only the one that finishes last may. Of two, the first has
    one sample, a bad one.
    """
    long = tmp_path / "source"
    long.mkdir()
    write_samples(long / "0.tar", [to_sample(example_at(0, Split.TRAIN, 0), "bad")])
    shutil.copy(source / "1.tar", long)
    build_index(long)
    where = ShardIndex.open(long).location(0)
    overwrite(where.shard, where.target.offset, bytes(where.target.size))
    ranks = start(2, as_rank, [str(long), "--out", str(tmp_path / "out"), "--teacher", str(teacher)])
    for rank in ranks:
        rank.join(timeout=300)
    assert sorted(rank.exitcode for rank in ranks) == [0, 1]
    assert len(ShardIndex.open(tmp_path / "out")) == 5


def test_pictures_survive_as_png() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(tool._png(picture)))), picture)
