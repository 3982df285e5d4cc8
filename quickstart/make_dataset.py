"""Write the quickstart's world as WebDataset shards: `python -m quickstart.make_dataset --out DIR --samples 40000`.

A sample is `KEY.target.png`, `KEY.context.0.png`, `KEY.context.1.png` (as many as it has; none for text-to-image) and
`KEY.json`: {"prompt", "kind", "edit", "contexts", "target"}, from which `scenes.Example.from_json` rebuilds the truth.
Sample i is a function of (seed, split, i).
"""

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from quickstart import scenes
from quickstart.scenes import Example, Kind, Split

SAMPLES_PER_SHARD = 2048
DESCRIBE_FRACTION = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's triplet shards")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", type=Split, choices=list(Split), default=Split.TRAIN)
    parser.add_argument(
        "--describe-fraction", type=float, default=DESCRIBE_FRACTION, help="text-to-image share, 0 to 1"
    )
    arguments = parser.parse_args()
    write_shards(arguments.out, arguments.samples, arguments.seed, arguments.split, arguments.describe_fraction)


def write_shards(
    out: Path, samples: int, seed: int = 0, split: Split = Split.TRAIN, describe_fraction: float = DESCRIBE_FRACTION
) -> None:
    """Write `samples` samples as `out/SPLIT-00000.tar`, `out/SPLIT-00001.tar`, ... of 2048 each.

    Raises ValueError when `out` already holds shards of this split: a shorter second run would leave some of the first.
    """
    if any(out.glob(f"{split.value}-*.tar")):
        raise ValueError(f"--out {out} already holds {split.value} shards; choose another folder or remove them")
    out.mkdir(parents=True, exist_ok=True)
    pattern = str(out / f"{split.value}-%05d.tar")
    with webdataset.ShardWriter(pattern, maxcount=SAMPLES_PER_SHARD, verbose=0, mtime=0) as writer:
        for index in range(samples):
            writer.write(to_sample(example_at(seed, split, index, describe_fraction), f"{split.value}_{index:08d}"))


def example_at(seed: int, split: Split, index: int, describe_fraction: float = DESCRIBE_FRACTION) -> Example:
    """Sample `index` of a split: text-to-image with probability `describe_fraction`, otherwise an edit.

    Held-out combinations are edits only.
    """
    rng = scenes.example_rng(seed, split, index)
    is_description = rng.random() < describe_fraction and split is not Split.HELDOUT_COMBINATIONS
    return scenes.sample_example(rng, split, Kind.DESCRIBE if is_description else None)


def to_sample(example: Example, key: str) -> dict[str, Any]:
    """The files of one sample by extension, as `webdataset.ShardWriter` takes them."""
    contexts = {f"context.{i}.png": to_png(scenes.draw(scene)) for i, scene in enumerate(example.contexts)}
    record = {"kind": example.edit.kind.value, **example.to_json()}
    return {"__key__": key, "target.png": to_png(scenes.draw(example.target)), **contexts, "json": record}


def to_png(image_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
