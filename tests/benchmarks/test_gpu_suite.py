"""The GPU benchmark's own code, at toy sizes on a CPU. Its numbers mean nothing here; that it reports all does."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from benchmarks.gpu import suite
from benchmarks.gpu.measure import Setting, Step, options, race, row
from kontext_train.distributed.config import ParallelConfig

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _diffusers_keeps_its_backend() -> Iterator[None]:
    """Choosing one for a model chooses it for all models of the process."""
    before, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def rows_of(section: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    lines: list[str] = []
    suite.run(section, "cpu", True, time.monotonic() + 600, lines.append)
    rows = [json.loads(line) for line in lines]
    assert suite.table({"device": "cpu", "torch": "", "python": "", "rows": rows})
    return rows


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of("ceilings", monkeypatch)
    assert [r["name"].split()[0] for r in rows] == ["bf16"] * 3 + ["fp8"] * 3 + ["copy"]
    assert all(r["ms"] > 0 for r in rows)


def test_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of("attention", monkeypatch)
    refused = {r["name"]: r["error"] for r in rows if "error" in r}
    assert len(refused) == 6
    assert all("needs a CUDA device" in error for error in refused.values())
    assert sum("ms" in r for r in rows) == 8, "one backend, four packs, two directions"


@pytest.mark.slow
def test_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of("blocks", monkeypatch)
    ran = {(r["section"], r["name"]) for r in rows if "ms" in r}
    for group in ("blocks, eager", "blocks, compiled"):
        assert {(group, "ours, none"), (group, "ours, full"), (group, "diffusers")} <= ran, rows
    assert all(r["derived"] for r in rows if "ms" in r)


@pytest.mark.slow
def test_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [r["name"] for r in rows_of("whole", monkeypatch)] == [
        "ours, forward + backward, full checkpointing",
        "ours, step, 8-bit AdamW, full checkpointing",
        "ours, forward + backward, selective",
    ]


def test_a_contender_that_fails_is_reported_and_the_others_go_on() -> None:
    def broken() -> Step:
        raise RuntimeError("no such kernel\nand much more")

    def diverging() -> Step:
        return lambda: torch.tensor(float("nan"))

    setting = Setting(torch.device("cpu"), True, time.monotonic() + 60, print)
    results = race({"broken": broken, "good": lambda: lambda: None, "diverging": diverging}, setting)
    rows = {name: row("s", name, result, 1.0) for name, result in results.items()}
    assert rows["broken"]["error"] == "RuntimeError: no such kernel"
    assert rows["diverging"]["error"] == "FloatingPointError: loss nan"
    assert rows["good"]["ms"] > 0
    late = race({"late": lambda: lambda: None}, Setting(torch.device("cpu"), True, time.monotonic() - 1, print))
    assert row("s", "late", late["late"], 1.0)["error"] == "TimeoutError: no time is left in this section's share"


def test_an_option_that_this_version_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="ParallelConfig has no option warp_drive"):
        options(ParallelConfig, warp_drive=True)


def test_one_command_writes_all_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy's section is done in time; the other is not, which must show and not stop anything."""
    monkeypatch.setenv("PYTHON", sys.executable)
    command = ["bash", str(ROOT / "benchmarks/gpu/run.sh"), str(tmp_path), "--device", "cpu", "--tiny"]
    done = subprocess.run([*command, "--only", "ceilings"], capture_output=True, text=True, check=True)
    (report,) = tmp_path.glob("gpu-cpu-*.json")
    written = json.loads(report.read_text())
    assert written["torch"] == torch.__version__
    assert all(r["name"] in done.stdout for r in written["rows"])
    assert sum("ms" in r for r in written["rows"]) == 7
    report.unlink()

    subprocess.run([*command, "--only", "whole", "--minutes", "0.01"], capture_output=True, text=True, check=True)
    (report,) = tmp_path.glob("gpu-cpu-*.json")
    (cut,) = json.loads(report.read_text())["rows"]
    assert "not done in its" in cut["error"]


def test_unknown_sections_are_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.suite", "--only", "ceilings,lunch"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "unknown lunch" in done.stderr
