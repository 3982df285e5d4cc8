"""What an index of many samples costs: its size, opening it, looking samples up, and the memory of each.

The index is written by the same writer as one of real shards, from rows that a generator makes up: 30 % text-to-image,
else one to three context images, keys of twelve characters, a thousand samples a shard.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from kontext_train.data.index import ShardIndex
from kontext_train.data.index_file import INDEX_NAME, Columns, IndexWriter

_SAMPLES_PER_SHARD = 1000
_LOOKED_UP = 1000


def write_synthetic(folder: Path, samples: int) -> None:
    """An index of samples that do not exist, in shards that are all hole: opening looks at each of those files."""
    rng = np.random.default_rng(0)
    with closing(IndexWriter(folder)) as writer:
        for first in range(0, samples, _SAMPLES_PER_SHARD):
            n = min(_SAMPLES_PER_SHARD, samples - first)
            path = folder / f"shard-{first // _SAMPLES_PER_SHARD:06d}.tar"
            path.touch()
            os.truncate(path, n << 20)
            shard = {"path": path.name, "bytes": n << 20, "mtime_ns": path.stat().st_mtime_ns, "problems": 0}
            writer.append(shard, _made_up(first, n, rng))
        writer.finish(folder / INDEX_NAME, encoding=None, base=None, whole_folder=True)


def _made_up(first: int, n: int, rng: np.random.Generator) -> Columns:
    counts = np.where(rng.random(n) < 0.3, 0, rng.integers(1, 4, n))
    contexts, at = int(counts.sum()), np.arange(n, dtype=np.int64) << 20
    sides = rng.integers(16, 128, (n + contexts, 2), dtype=np.int32) * 16
    sizes = rng.integers(50_000, 500_000, n + contexts, dtype=np.int32)
    return Columns(
        key_start=np.arange(n + 1, dtype=np.int64) * 12,
        key_utf8=np.frombuffer("".join(f"{i:012d}" for i in range(first, first + n)).encode(), np.uint8),
        json_offset=at + 512,
        json_bytes=rng.integers(40, 400, n, dtype=np.int32),
        target_offset=at + 1536,
        target_bytes=sizes[:n],
        target_hw=sides[:n],
        context_start=np.concatenate([[0], counts.cumsum()]),
        context_offset=rng.integers(0, n << 20, contexts),
        context_bytes=sizes[n:],
        context_hw=sides[n:],
    )


def mapped_bytes(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory, in pages of the kernel's choice (Rss in smaps)."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def own_bytes() -> int:
    """Memory of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) << 10  # type: ignore[index]


def measure_reading(folder: Path) -> dict[str, float]:
    """Opening, then looking up samples all over the index. Run in a fresh process."""
    path, before = folder / INDEX_NAME, own_bytes()
    started = time.perf_counter()
    index = ShardIndex.open(folder)
    found: dict[str, float] = {"open_s": time.perf_counter() - started, "open_mapped_bytes": mapped_bytes(path)}
    rows = np.random.default_rng(1).integers(0, len(index), _LOOKED_UP)
    for i in rows[:10]:
        index.location(i)
    found["mapped_bytes_after_10"] = mapped_bytes(path)
    started = time.perf_counter()
    for i in rows:
        index.location(i)
    found["lookup_us"] = (time.perf_counter() - started) / len(rows) * 1e6
    found["own_bytes"] = own_bytes() - before
    return found


def measure(folder: Path, samples: int) -> dict[str, float]:
    started, before = time.perf_counter(), own_bytes()
    write_synthetic(folder, samples)
    seconds = time.perf_counter() - started
    size = (folder / INDEX_NAME).stat().st_size
    written = {"samples": samples, "index_bytes": size, "write_s": seconds, "write_own_bytes": own_bytes() - before}
    code = "from benchmarks.index import *; print(json.dumps(measure_reading(Path(sys.argv[1]))))"
    fresh = subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True)
    return written | json.loads(fresh.stdout)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index", description=__doc__)
    parser.add_argument("--samples", metavar="N", type=int, default=10_000_000, help="(default: 10 million)")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/index.json"), help="(default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.samples)
    mib = 2**20
    print(f"{found['samples']:,} samples, index of {found['index_bytes'] / 2**30:.3f} GiB")
    print(f"  a sample                {found['index_bytes'] / found['samples']:10.1f} bytes")
    print(f"  writing                 {found['samples'] / found['write_s']:10,.0f} samples/s")
    print(f"    memory grew by        {found['write_own_bytes'] / mib:10.1f} MiB")
    print(f"  opening                 {found['open_s'] * 1e3:10.1f} ms")
    print(f"    pages of the file     {found['open_mapped_bytes'] / mib:10.2f} MiB")
    print(f"  10 samples anywhere: +  {(found['mapped_bytes_after_10'] - found['open_mapped_bytes']) / mib:10.2f} MiB")
    print(f"  looking one up          {found['lookup_us']:10.1f} µs")
    print(f"  memory besides the file {found['own_bytes'] / mib:10.1f} MiB")
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
