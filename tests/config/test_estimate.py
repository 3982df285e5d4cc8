"""What a user of kontext-estimate sees."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from kontext_train.config import typed
from kontext_train.errors import ConfigError
from kontext_train.estimate import EstimateConfig, estimated
from tests.runs import ENCODERS

TINY = ["model=tiny", "model.hidden_size=64", "model.num_heads=2", "model.axes_dim=[8,12,12]"]


def composed(*overrides: str) -> EstimateConfig:
    with initialize_config_module("kontext_train.conf", version_base="1.3"):
        config = typed(compose("estimate", overrides=list(overrides)))
    assert isinstance(config, EstimateConfig)
    return config


def kontext_estimate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kontext_train.estimate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_config_and_a_cluster_give_a_table_and_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = kontext_estimate(*TINY, "world=16", "parallel.dp_replicate=2", "parallel.activation_checkpointing=full")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("A prediction, not a measurement. 16 x h100, 8 a node")
    lines = {line.strip().split("  ")[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "[full]" in lines["memory of one GPU, GiB"]
    assert lines["fits"].split()[1:] == ["yes", "yes", "yes"]
    sources = ("parameters, sharded", "activations", "computed TFLOP", "MFU", "all-gather", "all-reduce")
    words = ("formula", "traced", "traced", "roofline", "formula", "formula")
    assert all(word in lines[source] for source, word in zip(sources, words, strict=True))
    assert not list(tmp_path.iterdir())


def test_shards_and_a_simulation(shards: Path) -> None:
    text = estimated(
        composed(
            *TINY,
            f"data.train={shards}",
            f"encoders.path={ENCODERS}",
            "encoders.t5_tokens=12",
            "data.tokens_per_pack=128",
            "world=4",
            "simulate=true",
        )
    )
    assert f"first steps of {shards}" in text
    assert "all-gather of 4 ranks, GB" in text


def row(text: str, name: str) -> list[str]:
    (line,) = re.findall(rf"^  {re.escape(name)} {{2,}}(.+)$", text, re.MULTILINE)
    return re.split(" {2,}", line.strip())


def test_ladd_costs_eight_forward_passes() -> None:
    """Instead of three."""
    rows = {}
    for stage in ("flow_finetune", "ladd"):
        text = estimated(composed(*TINY, f"stage={stage}", "world=4", "run.microbatches=32"))
        names = ("useful TFLOP", "computed TFLOP")
        found = [re.search(rf"^  {name} +([\d.]+)", text, re.MULTILINE) for name in names]
        rows[stage] = [float(match[1]) for match in found if match]
        assert row(text, "in forward passes")[0] == {"flow_finetune": "3.00", "ladd": "8.00"}[stage]
    useful, computed = (b / a for a, b in zip(rows["flow_finetune"], rows["ladd"], strict=True))
    assert useful == pytest.approx(8 / 3, rel=0.02)
    assert computed == pytest.approx(8 / 3, rel=0.02)


def test_safety_costs_what_its_concepts_cost_too() -> None:
    """4 passes on a pack; on as many concepts as it has samples, 3 + 5 + 2 for each step of the attack. Here half."""
    text = {}
    wide = ("model.hidden_size=1024", "model.num_heads=32")
    for stage in ("flow_finetune", "safety"):
        half = ["objective.concepts_per_pack=2", "objective.attack_steps=3"] if stage == "safety" else []
        sizes = ("data.tokens_per_pack=10240", "world=4")  # four typical samples
        text[stage] = estimated(
            composed(*TINY, *wide, f"stage={stage}", *sizes, "sample.height=512", "sample.width=512", *half)
        )
    passes = 4 + 0.5 * (3 + 5 + 2 * 3)
    assert row(text["safety"], "in forward passes")[0] == f"{passes:.2f}"
    for name, grown in (("computed TFLOP", passes / 3), ("activations", 1.5)):
        flow, safety = (float(row(text[stage], name)[0]) for stage in text)
        assert safety / flow == pytest.approx(grown, rel=0.05)


def test_recipes_compose_for_64_gpus() -> None:
    for recipe in ("pro", "dev", "max"):
        config = composed(f"experiment={recipe}", "world=64")
        assert config.parallel.activation_checkpointing.value == "selective"
        assert config.data.tokens_per_pack % 8704 == 0


@cache
def on_64(*overrides: str) -> str:
    return estimated(composed(*overrides, "world=64"))


@pytest.mark.parametrize(("recipe", "passes"), [("pro", "10.00"), ("dev", "5.00")])
def test_distillation_fits_on_64_h100s(recipe: str, passes: str) -> None:
    """With the checkpointing of its recipe; the control is without any."""
    text = on_64(f"experiment={recipe}")
    assert row(text, "fits") == ["NO", "yes", "yes"]
    assert row(text, "in forward passes")[:3] == [passes] * 3
    assert len(row(text, "the peak is in")) == 3  # cells that are told apart


def test_the_documented_cost_of_pro_is_the_estimate() -> None:
    text = on_64("experiment=pro")
    page = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text()
    section = " ".join(page[page.index("## What a step costs") :].partition("\n## ")[0].split())
    said = re.search(
        r"and (\d+) with `objective.backward_simulation` .*; (\d+\.\d) s of the .* (\d+\.\d) GiB at the peak of 79.1 "
        r"with selective .* (\d+\.\d) GiB left, (\d+\.\d) s for a step",
        section,
    )
    assert said is not None
    passes, peak, left, seconds = (
        float(row(text, name)[1]) for name in ("in forward passes", "total at the peak", "left", "seconds a step")
    )
    without = on_64("experiment=pro", "objective.backward_simulation=0")
    expected = [passes, float(row(without, "seconds a step")[1]), peak, left, seconds]
    assert [float(number) for number in said.groups()] == [round(number, 1) for number in expected]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("world=0", r"world=0: must be at least 1"),
        ("world=12", r"world=12: must be whole nodes of gpus_per_node=8"),
        ("parallel.dp_shard=3", r"dp_replicate, dp_shard, cp=\(1, 3, 1\)"),
        ("parallel.cp=5", r"parallel\.dp_replicate, dp_shard, cp"),
        ("parallel.cp=8", r"parallel\.cp=8: must divide model\.num_heads=2"),
        ("assume.matmul=1.5", r"assume\.matmul=1\.5: is a share"),
        ("sample.contexts=-1", r"sample\.contexts=-1: must be at least 0"),
        ("data.tokens_per_pack=100", r"data\.tokens_per_pack=100: must hold the typical sample"),
        ("+assume.mfu=1", r"assume\.mfu=1: is no option"),
        ("data.train=/nowhere", r"data\.train='/nowhere': must be a folder of indexed shards"),
    ],
)
def test_refused_by_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        estimated(composed(*TINY, override))


def test_a_refusal_is_one_line_and_status_2() -> None:
    done = kontext_estimate("world=12")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kontext-estimate: world=12")


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, kontext_train.estimate; print({'torch', 'numpy', 'pyarrow'} & set(sys.modules))"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert imported.stdout.strip() == "set()"
