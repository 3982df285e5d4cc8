"""What reading costs beyond decoding and resizing, whether a step ever waits for it, and whether memory stays flat.

Images are made up: noise whose spectrum falls with frequency as that of photographs does, as JPEG of quality 90.
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset import ShardWriter

from benchmarks.packing import FLOPS
from kontext_train.data.config import DataConfig
from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import build_index
from kontext_train.data.loader import PackReader, load_packs, train_batches
from kontext_train.data.plan import Pack, Planner, Position
from kontext_train.data.sample import SampleReader
from kontext_train.data.sources import Mixture, Source
from kontext_train.data.transforms import Transform

_EXAMPLES = """examples:
  python -m benchmarks.data                          all of it, about three minutes on one core
  python -m benchmarks.data --rounds 3 --batches 500"""

MAX_PIXELS, MULTIPLE, TXT_TOKENS = 1 << 20, 16, 1
SIZES = {  # (height, width) of the images; what they become has at most 1024² pixels
    "1.2 megapixels": [(960, 1280), (1280, 960), (1110, 1110), (820, 1460)],
    "as trained": [(1024, 1024), (832, 1248), (1248, 832), (1184, 880)],
    "12 megapixels": [(3000, 4000), (4000, 3000)],
}
COPIES = {"1.2 megapixels": 4, "as trained": 4, "12 megapixels": 1}  # an image is read so often a round


def picture(height: int, width: int, seed: int) -> bytes:
    """A JPEG."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]).astype(np.float32)
    frequency[0, 0] = 1
    planes = []
    for _ in range(3):
        phase = rng.standard_normal((2, *frequency.shape), dtype=np.float32)
        planes.append(np.fft.irfft2((phase[0] + 1j * phase[1]) / frequency**1.2, (height, width)))
    waves = np.stack(planes, axis=-1)
    file = io.BytesIO()
    Image.fromarray((waves / waves.std() * 45 + 128).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_shard(folder: Path, images: Sequence[bytes]) -> ShardIndex:
    folder.mkdir()
    with ShardWriter(f"{folder}/%03d.tar", maxcount=len(images), verbose=0, encoder=False) as writer:
        for i, raw in enumerate(images):
            writer.write({"__key__": f"{i:04d}", "json": b'{"prompt": "make it snow"}', "target.jpg": raw})
    report = build_index(folder)
    assert not report.problems
    return ShardIndex.open(folder)


def floor(raw: bytes, hw: tuple[int, int]) -> np.ndarray:
    """Pillow's own price of the same pixels: open, decode, resize the same box, hand over."""
    height, width = hw
    image = Image.open(io.BytesIO(raw))
    scale = max(width / image.width, height / image.height)
    left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
    box = (left, top, image.width - left, image.height - top)
    return np.array(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def seconds(function: Callable[[], object]) -> float:
    started = time.process_time()  # of this core: what others run on the machine does not count
    function()
    return time.process_time() - started


def decoding(folder: Path, name: str, rounds: int) -> dict[str, Any]:
    """Images a second of one core, read as training reads them and by the floor, turn by turn."""
    images = [picture(*hw, seed) for seed, hw in enumerate(SIZES[name])] * COPIES[name]
    index = write_shard(folder, images)
    transform = Transform(MAX_PIXELS, MULTIPLE)
    reader = SampleReader(index, transform)
    sizes = [tuple(hw) for hw in transform.size(index.target_hw).tolist()]
    assert all(reader.read(i).target.shape[:2] == hw for i, hw in enumerate(sizes))

    def ours() -> None:
        for i in range(len(images)):
            reader.read(i)

    def theirs() -> None:
        for raw, hw in zip(images, sizes, strict=True):
            floor(raw, hw)

    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return {
        "images": name,
        "per_s_per_core": len(images) / statistics.median(a for a, _ in pairs),
        "floor_per_s_per_core": len(images) / statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


def pack_reader(index: ShardIndex) -> PackReader:
    source = Source("made up", index, Fraction(1), Transform(MAX_PIXELS, MULTIPLE), 0.0, 0.0)
    return PackReader(Mixture([source], TXT_TOKENS), holes=False)


def packs(samples: int) -> Iterator[Pack]:
    """One sample a pack, for ever."""
    one = np.zeros(1, dtype=bool)
    for i in count():
        row = np.array([i % samples])
        yield Pack(row, row + i, one, one, ~one, samples_in_step=1, position=Position())


def waiting(folder: Path, steps: int, reading: float) -> dict[str, float]:
    """Share of the time that steps wait for their pack, which one worker reads in `reading` of a step.

    As in training: windows are planned in a process of their own, here of 64 samples, so that some fall into the time.
    """
    images = [picture(*hw, seed) for seed, hw in enumerate(SIZES["1.2 megapixels"])] * 16
    index = write_shard(folder, images)
    reader = pack_reader(index)
    config = DataConfig(workers=1, tokens_per_pack=TXT_TOKENS + 2 * MAX_PIXELS // 256, window_samples=64)
    planner = Planner(reader.mixture, config, seed=0, cost=FLOPS.of_tokens)
    few = [pack for step, _ in zip(planner.steps(Position(), 1), range(10), strict=False) for pack in step]
    started = time.perf_counter()
    for pack in few:
        reader[pack]
    step_s = (time.perf_counter() - started) / len(few) / reading
    batches = train_batches(planner, reader, config, Position(), rank=0, ranks=1, microbatches=1)
    next(batches)  # processes have to start first
    waits = []
    for _ in range(steps):
        time.sleep(step_s)
        asked = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - asked)
    batches.close()
    waited = sum(waits)
    return {
        "reading": reading,
        "step_ms": 1e3 * step_s,
        "data_wait": waited / (waited + steps * step_s),
        "longest_wait_ms": 1e3 * max(waits),
    }


def resident_mib() -> float:
    """Of this process and its children. Pages that they share count once for each."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    kib = 0
    for process in ("self", *children):
        status = Path(f"/proc/{process}/status").read_text()
        kib += int(status.split("VmRSS:")[1].split()[0])
    return kib / 1024


def memory(folder: Path, batches: int) -> dict[str, float]:
    """Growth of memory while so many batches of small images pass, after a tenth of them."""
    index = write_shard(folder, [picture(64 + 16 * i, 96, seed=i) for i in range(8)])
    reader = pack_reader(index)
    loader = load_packs(packs(len(index)), reader, DataConfig(workers=1))
    at, seen = list[int](), list[float]()
    for i in range(batches):
        next(loader)
        if i >= batches // 10 and i % max(1, batches // 100) == 0:
            at.append(i)
            seen.append(resident_mib())
    loader.close()
    slope, _ = np.polyfit(at, seen, 1)
    return {"batches": batches, "resident_mib": seen[-1], "growth_mib": slope * batches, "spread_mib": np.ptp(seen)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=15, help="of each kind of image (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="that may wait (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=10_000, help="that memory is watched for (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data.json"), help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [decoding(folder / kind, kind, arguments.rounds) for kind in SIZES]
        print(f"{'images':>16}  {'read/s/core':>11}  {'Pillow/s/core':>13}  {'ratio':>6}")
        for row in rows:
            print(
                f"{row['images']:>16}  {row['per_s_per_core']:>11.1f}  {row['floor_per_s_per_core']:>13.1f}  "
                f"{row['ratio']:>6.3f}"
            )
        waits = [waiting(folder / f"waiting {share}", arguments.steps, share) for share in (0.6, 0.9, 1.5)]
        for wait in waits:
            print(
                f"data wait {wait['data_wait']:.4f} of the time, {wait['longest_wait_ms']:.0f} ms at most, where one "
                f"worker reads a pack in {wait['reading']} of a step of {wait['step_ms']:.0f} ms"
            )
        flat = memory(folder / "memory", arguments.batches)
        print(f"memory {flat['resident_mib']:.0f} MiB, {flat['growth_mib']:+.1f} MiB over {flat['batches']:,} batches")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"decoding": rows, "waiting": waits, "memory": flat}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
