"""A teacher's pictures as ordinary shards: the same however the work is cut, and used as any shards are."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import generate_targets as tool
from data_tools.generate_targets import generate_targets
from data_tools.shard_writing import write_shard
from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import build_index
from kontext_train.data.sample import SampleReader
from kontext_train.evaluation.trained import load_trained
from kontext_train.export import ExportConfig, StorageDtype, export
from kontext_train.flow.config import SamplerConfig
from kontext_train.generate import Request
from quickstart.make_dataset import example_at, to_sample
from quickstart.scenes import Split
from tests.runs import overwrite, run, small_config

SAMPLER = SamplerConfig(steps=2, guidance=3.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of five samples."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(2):
        samples = [to_sample(example_at(0, Split.TRAIN, 5 * number + i), f"{number}_{i}") for i in range(5)]
        members = [({k: v for k, v in s.items() if k != "__key__"}, s["__key__"]) for s in samples]
        encoded = [(key, m | {"json": json.dumps(m["json"]).encode()}) for m, key in members]
        write_shard(folder / f"{number}.tar", encoded)
    build_index(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    run(small_config(source, folder / "run", "run.steps=2", "optimizer.lr=1e-2", "data.tokens_per_pack=64"))
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


def test_a_run_trains_on_them(targets: Path, tmp_path: Path) -> None:
    run(small_config(targets, tmp_path, "run.steps=1", "data.tokens_per_pack=64"))


def test_a_bad_sample_is_left_out_by_name(source: Path, teacher: Path, tmp_path: Path) -> None:
    broken = tmp_path / "source"
    broken.mkdir()
    for name in ("0.tar", "1.tar"):
        (broken / name).write_bytes((source / name).read_bytes())
    build_index(broken)
    where = ShardIndex.open(broken).location(7)
    overwrite(where.shard, where.target.offset, bytes(where.target.size))
    report = generate_targets(broken, tmp_path / "out", teacher, SAMPLER)
    assert report.samples == 9
    assert len(report.bad) == 1
    assert "1.tar: 1_2: target" in report.bad[0]


def test_pictures_survive_as_png() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(tool._png(picture)))), picture)
