"""An index of any length: written in bounded memory, opened by looking at nothing but its schema."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest

from benchmarks.index import mapped_bytes, write_synthetic
from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import build_index
from kontext_train.data.index_file import INDEX_NAME
from tests.data.test_index import encoded, sample, write_tar

SAMPLES = 300_000
MIB = 2**20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    write_synthetic(folder, SAMPLES)
    return folder


def test_a_sample_costs_less_than_a_gibibyte_for_ten_million_allows(large: Path) -> None:
    assert (large / INDEX_NAME).stat().st_size / SAMPLES < 2**30 / 10_000_000


def test_a_process_touches_only_the_pages_that_it_looks_at(large: Path) -> None:
    path = large / INDEX_NAME
    index = ShardIndex.open(large)
    assert len(index) == SAMPLES
    assert mapped_bytes(path) < 512 << 10
    near = [100, SAMPLES // 2, SAMPLES - 100]
    for i in near:
        index.location(i)
    columns, around = 12, 64 << 10  # the kernel maps what it has within 64 KiB of a page that is touched
    assert mapped_bytes(path) < (512 << 10) + len(near) * columns * around
    int(index.target_hw.sum(dtype=np.int64))
    int(index.context_hw.sum(dtype=np.int64))
    looked_at = index.target_hw.nbytes + index.context_hw.nbytes
    assert mapped_bytes(path) > looked_at  # control: looking at whole columns shows


def test_a_pickled_index_carries_no_column(large: Path) -> None:
    import pickle

    assert len(pickle.dumps(ShardIndex.open(large))) < 1000


def _under_a_limit(code: str, limit_mib: int, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs code in a process whose memory without files may grow by so much."""
    start = (
        "import sys, resource, re, numpy as np; from pathlib import Path; from benchmarks.index import *\n"
        "now = int(re.search(r'VmData:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) << 10\n"
        f"resource.setrlimit(resource.RLIMIT_DATA, (now + ({limit_mib} << 20),) * 2)\n"
    )
    command = [sys.executable, "-c", start + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_writing_needs_less_memory_than_the_index_has(tmp_path: Path) -> None:
    run = _under_a_limit("write_synthetic(Path(sys.argv[1]), 600_000)", 24, str(tmp_path))
    assert run.returncode == 0, run.stderr
    size = (tmp_path / INDEX_NAME).stat().st_size
    assert size > 50 * MIB
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".tar"] == [INDEX_NAME]
    run = _under_a_limit(f"np.ones({size}, np.uint8)", 24)
    assert "MemoryError" in run.stderr  # control: the limit would have been felt


def test_other_tools_read_it(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("0", contexts=2) + sample("ü"))
    build_index(tmp_path)
    table = pa.feather.read_table(tmp_path / INDEX_NAME)
    assert table.column("key").to_pylist() == ["0", "ü"]
    assert table.column("target_hw").to_pylist() == [[8, 12]] * 2
    raw = (tmp_path / "a.tar").read_bytes()
    for row, contexts in zip(table.to_pylist(), (2, 1), strict=True):
        assert json.loads(raw[row["json_offset"] :][: row["json_bytes"]])["prompt"] == "make it red"
        assert raw[row["target_offset"] :][: row["target_bytes"]] == encoded(8, 12, seed=99)
        for i, context in enumerate(row["contexts"]):
            assert raw[context["offset"] :][: context["bytes"]] == encoded(10 + i, 20 + i, seed=i)
            assert context["hw"] == [10 + i, 20 + i]
        assert len(row["contexts"]) == contexts


def test_what_planners_need_is_known_without_a_scan(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("0", contexts=0) + sample("1", contexts=3))
    write_tar(tmp_path / "b.tar", sample("2", contexts=3))
    build_index(tmp_path)
    index = ShardIndex.open(tmp_path)
    assert index.samples_by_contexts == [1, 0, 0, 2]
    assert sum(index.samples_by_contexts) == len(index) == 3
