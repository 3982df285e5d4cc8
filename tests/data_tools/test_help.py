"""Every example in every tool's --help runs, as it stands there, on files of the names it has."""

import importlib
import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kontext_train.data.index import ShardIndex
from tests.runs import ENCODERS

TOOLS = ["make_shards", "index_shards", "check_shards", "filter_shards"]


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (520, 520, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_inputs(folder: Path) -> None:
    """What the examples name, in `folder`."""
    for name in ("photos", "cats/train", "clip-filtered-dataset/0000000"):
        (folder / name).mkdir(parents=True)
    for i in range(3):
        (folder / "photos" / f"{i}.png").write_bytes(png(i))
    rows = [
        {"target": f"{i}.png", "prompt": f"ball {i}", "context": "0.png", "source": "s", "aesthetic": 4.0 + i}
        for i in range(3)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pairs.csv").write_text("target,prompt,context,source\n0.png,a ball,1.png;2.png,s\n1.png,ball,2.png,s\n")
    images = [{"bytes": png(i), "path": None} for i in range(4)]
    for part in (0, 1):
        pair = {"input_image": images[part], "edit_prompt": "p", "edited_image": images[part + 2]}
        pq.write_table(pa.Table.from_pylist([pair]), folder / f"train-{part}.parquet")
    (folder / "cats/train/0.png").write_bytes(png(0))
    (folder / "cats/train/metadata.csv").write_text("file_name,text\n0.png,a cat\n")
    (folder / "clip-filtered-dataset/0000000/prompt.json").write_text('{"input": "a", "edit": "b", "output": "c"}')
    for number in (0, 1):
        Image.open(io.BytesIO(png(number))).save(folder / f"clip-filtered-dataset/0000000/7_{number}.jpg")
    shutil.copytree(ENCODERS / "tokenizer_2", folder / "FLUX.1-dev" / "tokenizer_2")


def examples(tool: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The command lines in --help."""
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"data_tools.{tool}").main(["--help"])
    text = capsys.readouterr().out
    assert "docs/data_format.md" in text or "filter_shards --drop-list" in text
    lines = [line.strip() for line in text.split("examples:")[1].splitlines() if line.startswith("  python -m ")]
    return [line for line in lines if "://" not in line]  # tests of storage have servers


def run(line: str, folder: Path) -> int:
    """Runs an example in this process, /data being a folder of the test."""
    words = shlex.split(line.replace("/data/", f"{folder}/data/"))
    assert words[:2] == ["python", "-m"]
    arguments = [
        name for word in words[3:] for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
    ]
    if "index_shards" not in words[2]:
        arguments += ["--processes", "1"]  # the last one counts
    return int(importlib.import_module(words[2]).main(arguments))


@pytest.mark.parametrize("tool", TOOLS)
def test_examples_run(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = examples(tool, capsys)
    assert len(lines) >= 2
    if tool != "make_shards":
        make = "python -m data_tools.make_shards --table pairs.jsonl --images photos --out /data/"
        assert run(make + "edits", tmp_path) == run(make + "text_to_image", tmp_path) == 0
        (tmp_path / "report").mkdir()
        (tmp_path / "report" / "duplicates.jsonl").write_text('{"shard": "shard-000000.tar", "key": "00000001"}\n')
    for line in lines:
        if tool == "check_shards":
            shutil.rmtree("report")
        assert run(line, tmp_path) == 0, (line, capsys.readouterr().err)
        if tool == "make_shards":
            out = Path(line.split("--out /data/")[1].split()[0])
            assert len(ShardIndex.open(tmp_path / "data" / out)) >= 1
            shutil.rmtree(tmp_path / "data" / out)


def test_tools_do_not_load_torch() -> None:
    """Every process of a job imports its tool: torch would cost each two seconds and hundreds of megabytes."""
    code = f"import sys, {', '.join(f'data_tools.{tool}' for tool in TOOLS)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
