"""Whole runs of stages with a frozen teacher: however they are cut they are the same, and the teacher stays."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from kontext_train.config import TrainConfig
from kontext_train.data.index_build import build_index
from kontext_train.distributed.parallelize import reshard
from kontext_train.errors import ConfigError
from kontext_train.export import ExportConfig, StorageDtype, export
from kontext_train.objectives.guidance_distillation import GuidanceDistillation
from kontext_train.objectives.ladd import Ladd
from kontext_train.train import train
from kontext_train.trainer import Trainer
from kontext_train.training.metrics import read_metrics
from quickstart.make_dataset import write_shards
from tests.integration.test_train import largest_difference, losses, weights
from tests.runs import in_processes, run, small_config

LADD = (
    "stage=ladd",
    "objective.discriminator.channels=8",
    "objective.gradient_penalty=0.1",
    "objective.warmup_steps=1",
    "objective.backward_simulation=0.7",
    "discriminator_schedule.warmup_steps=0",
)
GUIDANCE = ("stage=guidance_distillation",)
STAGES = pytest.mark.parametrize("stage", [GUIDANCE, LADD], ids=["guidance", "ladd"])


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edits")
    write_shards(folder, 120, describe_fraction=0.0)
    build_index(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps old, so that its velocity is not zero and depends on the prompt."""
    folder = tmp_path_factory.mktemp("teacher")
    run(small_config(shards, folder / "run", "run.steps=2", "optimizer.lr=1e-2"))
    export(ExportConfig(str(folder / "run"), str(folder / "teacher.safetensors"), dtype=StorageDtype.float32))
    return folder / "teacher.safetensors"


def distillation(edits: Path, teacher: Path, folder: Path, *options: str) -> TrainConfig:
    given = (f"weights.teacher={teacher}", "weights.frozen_dtype=float32")
    return small_config(edits, folder, *given, "run.steps=4", "ema.half_life_images=50", *options)


@STAGES
def test_two_processes_equal_one(edits: Path, teacher: Path, tmp_path: Path, stage: tuple[str, ...]) -> None:
    run(distillation(edits, teacher, tmp_path / "one", *stage, "run.microbatches=2"))
    run(distillation(edits, teacher, tmp_path / "two", *stage), processes=2)
    assert largest_difference(weights(tmp_path / "two"), weights(tmp_path / "one")) <= 2e-5
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    phases = ["discriminator", "student"] if stage is LADD else ["student"]
    for phase in phases:
        two, one = (logged(tmp_path / name, f"{phase}/grad_norm") for name in ("two", "one"))
        assert two == pytest.approx(one, rel=1e-3)
    if stage is LADD:
        assert largest_difference(discriminator(tmp_path / "two"), discriminator(tmp_path / "one")) <= 2e-5
    run(distillation(edits, teacher, tmp_path / "half", *stage))
    assert largest_difference(weights(tmp_path / "half"), weights(tmp_path / "one")) > 1e-4  # the control


@pytest.mark.parametrize("stage", [pytest.param(GUIDANCE, marks=pytest.mark.slow), LADD], ids=["guidance", "ladd"])
def test_resumed_is_bitwise_the_same(edits: Path, teacher: Path, tmp_path: Path, stage: tuple[str, ...]) -> None:
    """Weights, averages and discriminator; the warm-up of LADD's times ends in the second session."""
    run(distillation(edits, teacher, tmp_path / "straight", *stage))
    run(distillation(edits, teacher, tmp_path / "cut", *stage, "run.steps=1"))
    run(distillation(edits, teacher, tmp_path / "cut", *stage))
    for ema in (False, True):
        assert largest_difference(weights(tmp_path / "cut", ema), weights(tmp_path / "straight", ema)) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    if stage is LADD:
        heads = [discriminator(tmp_path / name) for name in ("cut", "straight")]
        assert largest_difference(*heads) == 0


def logged(folder: Path, name: str) -> list[float]:
    found = [r[name] for r in read_metrics(folder / "metrics.jsonl") if name in r]
    assert found
    return found


def discriminator(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "checkpoints" / "step_00000004"
    prefix = "modules.discriminator."
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(m.size) for name, m in stored.items() if name.startswith(prefix)}  # type: ignore[union-attr]
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert tensors
    return tensors


def digest(module: torch.nn.Module) -> str:
    reshard(module)
    found = hashlib.blake2b()
    for parameter in module.parameters():
        found.update(parameter.detach().to_local().numpy().tobytes())  # type: ignore[attr-defined]
    return found.hexdigest()


def noting_digests(config: TrainConfig, file: Path) -> None:
    """A run that writes the digests of all networks before it and after each phase, and who had gradients then."""
    made, notes = Trainer.train_phase, list[dict[str, Any]]()

    def train_phase(self: Trainer, phase: str, *arguments: Any) -> Any:
        assert isinstance(self.objective, Ladd | GuidanceDistillation)
        networks = self.objective.modules | {"teacher": self.objective.teacher}
        before = {role: digest(network) for role, network in networks.items()}
        result = made(self, phase, *arguments)
        changed = [role for role, network in networks.items() if digest(network) != before[role]]
        held = [r for r, n in networks.items() if r == "teacher" and any(p.grad is not None for p in n.parameters())]
        notes.append({"phase": phase, "changed": changed, "frozen gradients": held})
        file.write_text(json.dumps(notes))
        return result

    Trainer.train_phase = train_phase  # type: ignore[method-assign]
    train(config)


@STAGES
def test_a_phase_changes_its_own_role_alone(edits: Path, teacher: Path, tmp_path: Path, stage: tuple[str, ...]) -> None:
    before = teacher.read_bytes()
    config = distillation(edits, teacher, tmp_path / "run", *stage, "run.steps=2")
    in_processes(1, noting_digests, config, tmp_path / "notes.json")
    phases = ["discriminator", "student"] if stage is LADD else ["student"]
    expected = [{"phase": phase, "changed": [phase], "frozen gradients": []} for phase in phases] * 2
    assert json.loads((tmp_path / "notes.json").read_text()) == expected
    assert teacher.read_bytes() == before
    stored = dcp.FileSystemReader(tmp_path / "run" / "checkpoints" / "step_00000002").read_metadata()
    assert not [name for name in stored.state_dict_metadata if "teacher" in name]


def test_health_is_told_at_every_log_step(edits: Path, teacher: Path, tmp_path: Path) -> None:
    run(distillation(edits, teacher, tmp_path, *LADD, "run.steps=2"))
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    assert len(records) == 2
    names = {"discriminator/hinge", "discriminator/grad_norm", "discriminator/lr_factor", "student/grad_norm"}
    names |= {"discriminator/logit_made", "discriminator/logit_real", "diversity_made", "diversity_real"}
    names |= {"discriminator/gradient_penalty", *(f"discriminator/accuracy_block_{block}" for block in range(2))}
    assert all(names <= r.keys() for r in records)


def test_bfloat16_leaves_the_heads_and_their_penalty_as_they_are(edits: Path, teacher: Path, tmp_path: Path) -> None:
    """A slope over a hundredth of the features: bfloat16 verdicts would differ by their rounding."""
    reduced = ("weights.frozen_dtype=bfloat16", "parallel.param_dtype=bfloat16")
    run(distillation(edits, teacher, tmp_path / "whole", *LADD, "run.steps=1"))
    run(distillation(edits, teacher, tmp_path / "reduced", *LADD, "run.steps=1", *reduced))
    for name, tolerance in (("gradient_penalty", 0.03), ("hinge", 0.01), ("grad_norm", 0.03)):
        found, expected = (logged(tmp_path / run, f"discriminator/{name}") for run in ("reduced", "whole"))
        assert found == pytest.approx(expected, rel=tolerance)
        assert found != expected  # the control: the rest does compute in bfloat16


def test_pictures_are_drawn_at_their_cadence(edits: Path, teacher: Path, tmp_path: Path) -> None:
    options = ("run.validate_every_steps=2", "validation.samples=2", "validation.pictures=2")
    run(distillation(edits, teacher, tmp_path, *LADD, f"data.validation={edits}", *options))
    pictures = sorted((tmp_path / "samples").iterdir())
    assert [p.name for p in pictures] == ["step_00000002.png", "step_00000004.png"]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


def test_trouble_is_printed_and_not_at_every_log_step(
    edits: Path, teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(distillation(edits, teacher, tmp_path, *LADD, "data.tokens_per_pack=30", "run.steps=12"))
    printed = [line for line in capfd.readouterr().err.splitlines() if "each hinge is over one sample" in line]
    assert [line.split(": ")[1] for line in printed] == ["step 1", "step 11"]


def test_adapters_learn_from_a_teacher_too(edits: Path, teacher: Path, tmp_path: Path) -> None:
    run(distillation(edits, teacher, tmp_path, *LADD, "run.steps=1", "lora.rank=2"))
    stored = dcp.FileSystemReader(tmp_path / "checkpoints" / "step_00000001").read_metadata().state_dict_metadata
    student = [name for name in stored if name.startswith("modules.student.")]
    assert student
    assert all(name.endswith((".lora_up", ".lora_down")) for name in student)


def test_a_teacher_that_embeds_guidance_cannot_be_guided(edits: Path, teacher: Path, tmp_path: Path) -> None:
    embedding = ("model.guidance_embed=true", "run.steps=1", f"weights.student={teacher}", "weights.guidance_in=add")
    run(small_config(edits, tmp_path / "run", *embedding))
    file = tmp_path / "embedding.safetensors"
    export(ExportConfig(str(tmp_path / "run"), str(file), dtype=StorageDtype.float32))
    given = (f"weights.teacher={file}", f"weights.student={teacher}")
    with pytest.raises(ConfigError, match=r"weights\.teacher='with guidance_in': is told its guidance"):
        train(distillation(edits, teacher, tmp_path / "dev", *GUIDANCE, *given))


@pytest.mark.slow
def test_another_teacher_is_refused_on_resume(edits: Path, shards: Path, teacher: Path, tmp_path: Path) -> None:
    stage = (*GUIDANCE, f"weights.student={teacher}")
    run(distillation(edits, teacher, tmp_path / "run", *stage, "run.steps=1"))
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(teacher.read_bytes())
    run(distillation(edits, teacher, tmp_path / "run", *stage, "run.steps=2", f"weights.teacher={moved}"))
    run(small_config(shards, tmp_path / "other", "run.steps=1"))
    other = tmp_path / "other.safetensors"
    export(ExportConfig(str(tmp_path / "other"), str(other), dtype=StorageDtype.float32))
    with pytest.raises(
        ConfigError, match=r"weights\.teacher='.*other.*': holds other weights than those that .* learn"
    ):
        train(distillation(edits, teacher, tmp_path / "run", *stage, "run.steps=3", f"weights.teacher={other}"))


def test_samples_without_a_context_are_refused_where_only_edits_count(
    shards: Path, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"data\.train='.*': must hold edits alone for this stage, and \d+ of its"):
        train(distillation(shards, teacher, tmp_path, *GUIDANCE))


def test_a_teacher_of_another_shape_is_refused(edits: Path, teacher: Path, tmp_path: Path) -> None:
    options = ("stage=ladd", "weights.student=null", "model.hidden_size=64", "model.axes_dim=[8,12,12]")
    with pytest.raises(ConfigError, match=r"weights\.teacher='.*': must hold a network of the student's shape"):
        train(distillation(edits, teacher, tmp_path, *options))
