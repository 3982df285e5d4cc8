"""make_shards from Parquet, Hugging Face imagefolders and the InstructPix2Pix layout."""

import datetime
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools import make_shards, tables
from data_tools.rows import Columns
from data_tools.tables import Table
from kontext_train.data.index import ShardIndex
from kontext_train.data.sample import RawSample, SampleReader
from kontext_train.data.transforms import Transform


def encoded(form: str, seed: int, side: int = 16) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def packed(sources: Sequence[Table], out: Path, columns: Columns | None = None, **options: Any) -> list[RawSample]:
    make_shards.make_shards(sources, out, columns, **options)
    reader = SampleReader(ShardIndex.open(out), Transform(1 << 20, 16))
    return [reader.read(i) for i in range(len(reader.index))]


def pixels(raw: bytes) -> list[Any]:
    with Image.open(io.BytesIO(raw)) as image:
        return np.asarray(image.convert("RGB")).tolist()  # type: ignore[no-any-return]


def hugging_face(raw: bytes, path: str | None = None) -> dict[str, Any]:
    """A cell of an image column as Hugging Face datasets store it."""
    return {"bytes": raw, "path": path}


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Ten InstructPix2Pix-like rows with images inside, in row groups of 3."""
    rows = [
        {
            "input_image": hugging_face(encoded("JPEG", i)),
            "edit_prompt": f"edit {i}",
            "edited_image": hugging_face(encoded("PNG" if i % 2 else "WEBP", 100 + i), "any name.bmp"),
            "score": i / 4,
            "made": datetime.datetime(2024, 1, 1 + i),
        }
        for i in range(10)
    ]
    fields = [("input_image", IMAGE), ("edit_prompt", pa.string()), ("edited_image", IMAGE)]
    schema = pa.schema([*fields, ("score", pa.float64()), ("made", pa.timestamp("s"))])
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "pairs.parquet", row_group_size=3)
    return tmp_path / "pairs.parquet"


@pytest.mark.parametrize("samples_per_shard", [1, 4, 100])
def test_parquet_with_images_inside(pairs: Path, tmp_path: Path, samples_per_shard: int) -> None:
    samples = packed(tables.table_files([pairs], None), tmp_path / "out", samples_per_shard=samples_per_shard)
    assert [sample.prompt for sample in samples] == [f"edit {i}" for i in range(10)]
    for i, sample in enumerate(samples):
        assert sample.target.tolist() == pixels(encoded("PNG" if i % 2 else "WEBP", 100 + i))
        assert [context.tolist() for context in sample.contexts] == [pixels(encoded("JPEG", i))]
        # what is left goes into the JSON, times as text; images inside do not
        assert sample.metadata == {"score": i / 4, "made": f"2024-01-{1 + i:02d}T00:00:00"}


def test_several_tables_are_one_set(pairs: Path, tmp_path: Path) -> None:
    samples = packed(tables.table_files([pairs, pairs], None), tmp_path / "out", samples_per_shard=6, processes=2)
    assert [sample.key for sample in samples] == [f"{i:08d}" for i in range(20)]
    assert [sample.prompt for sample in samples] == [f"edit {i}" for i in range(10)] * 2


def test_parquet_with_paths_lists_and_columns_by_name(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(encoded("PNG", ord(name[0])))
    rows = [
        {"after": "a.png", "words": "w", "one": "b.png", "more": ["c.png", "b.png"], "x": 1, "y": 2},
        {"after": "b.png", "words": "", "one": None, "more": ["a.png"], "x": None, "y": 3},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    columns = Columns(target=("after",), prompt=("words",), context=("more", "one"), keep=("x",))
    samples = packed(tables.table_files([tmp_path / "t.parquet"], None), tmp_path / "out", columns)
    assert [len(sample.contexts) for sample in samples] == [3, 1]
    assert samples[0].contexts[2].tolist() == pixels(encoded("PNG", ord("b")))
    assert [sample.metadata for sample in samples] == [{"x": 1}, {"x": None}]


def test_bad_cells_of_parquet_are_named(pairs: Path, tmp_path: Path) -> None:
    rows = pq.read_table(pairs).to_pylist()
    rows[3]["input_image"]["bytes"] = b"no image"
    rows[5]["edited_image"] = None
    rows[7]["edit_prompt"] = None
    pq.write_table(pa.Table.from_pylist(rows), pairs)
    with pytest.raises(ValueError, match="more than max_bad_rows = 0") as caught:
        make_shards.make_shards(tables.table_files([pairs], None), tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert "pairs.parquet, row 4: column input_image is b'no image'; it is not a readable PNG, JPEG or WebP" in lines[0]
    assert "row 6: column edited_image is None; it must be the path of an image" in lines[1]
    assert "row 8: column edit_prompt is None; it must be a string" in lines[2]


def test_values_that_json_cannot_hold(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG", 0))
    rows = [{"target": "a.png", "prompt": "p", "score": float("nan"), "raw": b"x"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    table = tables.table_files([tmp_path / "t.parquet"], None)
    with pytest.raises(ValueError, match=r"row 1: column score is nan; JSON cannot hold it"):
        make_shards.make_shards(table, tmp_path / "out")
    with pytest.raises(ValueError, match=r"row 1: column raw is b'x'; JSON cannot hold it \(it is bytes\)"):
        make_shards.make_shards(table, tmp_path / "out", Columns(keep=("raw",)))
    assert packed(table, tmp_path / "out", Columns(keep=()))[0].metadata == {}


def test_column_named_prompt_that_is_not_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG", 0))
    (tmp_path / "t.jsonl").write_text('{"target": "a.png", "prompt": "long", "edit": "short"}\n')
    table = tables.table_files([tmp_path / "t.jsonl"], None)
    with pytest.raises(ValueError, match=r"column prompt is 'long'; the sample's prompt is in 'edit'"):
        make_shards.make_shards(table, tmp_path / "out", Columns(prompt=("edit",)))
    assert packed(table, tmp_path / "out", Columns(prompt=("edit",), keep=()))[0].prompt == "short"


def test_missing_columns_are_told_at_once(pairs: Path, tmp_path: Path) -> None:
    table = tables.table_files([pairs], None)
    with pytest.raises(ValueError, match=r"columns are \['input_image', .*; there is no 'source'"):
        make_shards.make_shards(table, tmp_path / "out", Columns(keep=("source",)))
    with pytest.raises(ValueError, match=r"one must be 'after', or give --target"):
        make_shards.make_shards(table, tmp_path / "out", Columns(target=("after",)))


def test_damaged_parquet_is_named(pairs: Path, tmp_path: Path) -> None:
    whole = pairs.read_bytes()
    pairs.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"pairs\.parquet cannot be read as Parquet"):
        make_shards.make_shards(tables.table_files([pairs], None), tmp_path / "out")


def test_imagefolder_with_splits(tmp_path: Path) -> None:
    for number, name in enumerate(["train/0.jpg", "train/in/1.png", "test/0.jpg", "test/2.png"]):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded("JPEG" if name.endswith("jpg") else "PNG", number))
    (tmp_path / "set/train/metadata.csv").write_text("file_name,text\n0.jpg,a cat\nin/1.png,a dog\n")
    lines = [{"file_name": "2.png", "text": "a hen", "before": "0.jpg"}]
    (tmp_path / "set/test/metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = packed(tables.imagefolder(tmp_path / "set" / "train"), tmp_path / "train")
    assert [sample.prompt for sample in samples] == ["a cat", "a dog"]
    assert samples[1].target.tolist() == pixels(encoded("PNG", 1))
    test = packed(tables.imagefolder(tmp_path / "set" / "test"), tmp_path / "test", Columns(context=("before",)))
    assert test[0].contexts[0].tolist() == pixels(encoded("JPEG", 2))
    both = packed(tables.imagefolder(tmp_path / "set"), tmp_path / "both", Columns(keep=()))
    assert [sample.prompt for sample in both] == ["a hen", "a cat", "a dog"]
    with pytest.raises(
        ValueError, match=r"none of metadata\.csv, metadata\.jsonl, metadata\.parquet is in it or below"
    ):
        tables.imagefolder(tmp_path / "set" / "train" / "in")


def test_instruct_pix2pix_as_released(tmp_path: Path) -> None:
    """Folders as dataset_creation/generate_img_dataset.py of the authors' repository writes them."""
    root = tmp_path / "clip-filtered"
    for name, seeds in {"0000001": [11, 2**31], "0000000": [7]}.items():
        (root / name).mkdir(parents=True)
        (root / name / "prompt.json").write_text(json.dumps({"input": "a", "edit": f"do {name}", "output": "b"}))
        for seed in seeds:
            (root / name / f"{seed}_0.jpg").write_bytes(encoded("JPEG", seed % 1000))
            (root / name / f"{seed}_1.jpg").write_bytes(encoded("JPEG", seed % 1000 + 1))
        lines = [{"seed": seed, "p2p_threshold": 0.5, "clip_sim_dir": 0.25} for seed in seeds]
        (root / name / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "seeds.json").write_text("[]")
    samples = packed(tables.instruct_pix2pix(root), tmp_path / "out", samples_per_shard=2)
    assert [sample.prompt for sample in samples] == ["do 0000000", "do 0000001", "do 0000001"]
    assert samples[0].target.tolist() == pixels(encoded("JPEG", 8))
    assert samples[0].contexts[0].tolist() == pixels(encoded("JPEG", 7))
    scores = {"p2p_threshold": 0.5, "clip_sim_dir": 0.25}
    assert samples[0].metadata == {"input": "a", "output": "b", "seed": "7", **scores}

    (root / "0000000" / "7_1.jpg").unlink()
    (root / "0000001" / "prompt.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match=r"row 1: column target is '0000000/7_1\.jpg'; there is no such file[^\n]*\n.*"
        r"row 2: 0000001/prompt\.json or metadata\.jsonl cannot be used \(KeyError\('edit'\)\)",
    ):
        make_shards.make_shards(tables.instruct_pix2pix(root), tmp_path / "again")
    with pytest.raises(ValueError, match=r"no folder in it has a prompt\.json"):
        tables.instruct_pix2pix(root / "0000000")


def test_command_takes_columns(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--target", "input_image", "--context", "edited_image", "--keep", "score", "--processes", "1"]
    assert make_shards.main(["--table", str(pairs), "--out", str(out), *options]) == 0
    assert "10 samples in 1 shards, indexed" in capsys.readouterr().out
    sample = SampleReader(ShardIndex.open(out), Transform(1 << 20, 16)).read(1)
    assert sample.metadata == {"score": 0.25}
    assert sample.target.tolist() == pixels(encoded("JPEG", 1))
    with pytest.raises(SystemExit, match="2"):
        make_shards.main(["--imagefolder", "x", "--images", "y", "--out", str(out)])
