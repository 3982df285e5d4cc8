"""What `check_shards` measured, as columns over all samples, and what follows from them.

Legend: n samples in good order, in the order of shards and within them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.near_duplicates import bit_distance, duplicate_groups

_SPAN = pa.list_(pa.int64(), 2)  # (offset, size)
MEASURES = pa.schema(
    [
        ("key", pa.string()),
        ("prompt", pa.string()),
        ("prompt_id", pa.uint64()),  # of its bytes
        ("prompt_chars", pa.int32()),
        ("t5_tokens", pa.int32()),  # null without a tokenizer
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("target_id", pa.uint64()),  # of the file's bytes
        ("target_hash", pa.uint64()),  # perceptual; null for an image of one colour
        ("identical", pa.bool_()),  # target is a context image, pixel for pixel
        ("target", _SPAN),
        ("contexts", pa.list_(_SPAN)),
    ]
)
_NUMBERS = [name for name in MEASURES.names if name not in ("key", "prompt", "target", "contexts")]
_SIDES = (256, 512, 768, 1024, 1536, 2048)  # histogram edges: the side of a square of as many pixels
_ASPECTS = (1 / 4, 1 / 2, 2 / 3, 3 / 4, 0.95, 1.05, 4 / 3, 3 / 2, 2, 4)
_LENGTHS = (1, 10, 20, 50, 100, 200, 500, 1000, 2000)
_TOKENS = (2, 8, 16, 32, 64, 128, 256, 512, 1024)
_SHOWN_PROMPTS = 10


class Sample(NamedTuple):
    """One sample as the report shows it."""

    shard: str
    key: str
    prompt: str
    target: tuple[int, int]  # (offset, size) in the shard, bytes
    contexts: list[tuple[int, int]]

    def place(self) -> dict[str, str]:
        return {"shard": self.shard, "key": self.key}


@dataclass(slots=True)
class Histogram:
    """counts[i] values are at least edges[i - 1] (if there is one) and below edges[i] (if there is one)."""

    edges: list[float]
    counts: list[int]

    @classmethod
    def of(cls, values: npt.NDArray[Any], edges: Sequence[float]) -> "Histogram":
        bins = np.searchsorted(np.asarray(edges), values, side="right")
        return cls(list(edges), np.bincount(bins, minlength=len(edges) + 1).tolist())

    def to_json(self) -> dict[str, Any]:
        return {"edges": self.edges, "counts": self.counts}


class Checked:
    """The measures of a folder. Numbers are in memory; keys and prompts are read from the files when asked for."""

    def __init__(self, folder: Path, files: Sequence[Path], broken: list[dict[str, str]]) -> None:
        """files: one for each shard, named as the shard and .parquet. broken: shard, key, reason of each problem."""
        self.folder, self.files, self.broken = folder, files, broken
        table = pa.concat_tables([pq.read_table(file, columns=[*_NUMBERS, "contexts"]) for file in files])
        self.number = {name: table[name] for name in _NUMBERS}
        self.contexts = pc.list_value_length(table["contexts"]).to_numpy()
        self.start = np.cumsum([0, *(pq.read_metadata(file).num_rows for file in files)])  # first sample of each shard

    def __len__(self) -> int:
        return int(self.start[-1])

    def array(self, name: str) -> npt.NDArray[Any]:
        return self.number[name].to_numpy()

    def samples(self, numbers: Sequence[int]) -> list[Sample]:
        """Samples by number, 0 <= number < len(self), in the order asked for."""
        found: dict[int, Sample] = {}
        wanted = np.unique(np.asarray(numbers, np.int64))
        for shard, first, end in zip(self.files, self.start, self.start[1:], strict=False):
            rows = wanted[(wanted >= first) & (wanted < end)]
            if len(rows):
                table = pq.read_table(shard, columns=["key", "prompt", "target", "contexts"]).take(rows - first)
                name = shard.name.removesuffix(".parquet")
                found |= {int(n): Sample(name, **row) for n, row in zip(rows, table.to_pylist(), strict=True)}
        return [found[int(number)] for number in numbers]

    @cached_property
    def identical(self) -> npt.NDArray[np.int64]:
        return np.flatnonzero(self.array("identical"))

    def duplicates(self, distance: int) -> list[npt.NDArray[np.int64]]:
        """Groups of samples whose targets look alike; see `duplicate_groups`."""
        hashed = np.flatnonzero(self.number["target_hash"].is_valid())
        hashes = self.number["target_hash"].drop_null().to_numpy()
        return [hashed[group] for group in duplicate_groups(hashes, distance)]

    def duplicate_lines(self, groups: Sequence[npt.NDArray[np.int64]]) -> Iterator[dict[str, Any]]:
        """All but the first of each group, and how it differs from the first."""
        hashes = self.number["target_hash"].fill_null(0).to_numpy()
        prompt_id, target_id = self.array("prompt_id"), self.array("target_id")
        samples = iter(self.samples(np.concatenate(groups).tolist() if groups else []))
        for group in groups:
            first, distances = next(samples), bit_distance(hashes[group[1:]], hashes[group[:1]])
            for number, bits in zip(group[1:], distances.tolist(), strict=True):
                yield {
                    **next(samples).place(),
                    "like": first.place(),
                    "bits": bits,
                    "same_file": bool(target_id[number] == target_id[group[0]]),
                    "same_prompt": bool(prompt_id[number] == prompt_id[group[0]]),
                }

    def histograms(self) -> dict[str, Histogram]:
        """Of targets and prompts, by what they count."""
        height, width = self.array("height").astype(np.int64), self.array("width").astype(np.int64)
        most = int(self.contexts.max(initial=0))
        histograms = {
            "target pixels": Histogram.of(height * width, [side**2 + 1 for side in _SIDES]),
            "target width / height": Histogram.of(width / height, _ASPECTS),
            "context images": Histogram.of(self.contexts, list(range(1, most + 1))),
            "prompt characters": Histogram.of(self.array("prompt_chars"), _LENGTHS),
        }
        if self.has_tokens:
            histograms["prompt T5 tokens"] = Histogram.of(self.array("t5_tokens"), _TOKENS)
        return histograms

    @property
    def has_tokens(self) -> bool:
        return len(self) > 0 and self.number["t5_tokens"].null_count == 0

    def prompts(self, t5_tokens: int | None) -> dict[str, Any]:
        """Counts that mean the same in every language. t5_tokens: where training cuts; None without a tokenizer."""
        unique, first, counts = np.unique(self.array("prompt_id"), return_index=True, return_counts=True)
        chars = self.array("prompt_chars")
        order = np.argsort(-counts, kind="stable")[:_SHOWN_PROMPTS]
        order = order[counts[order] > 1]
        repeated = zip(self.samples(first[order].tolist()), counts[order].tolist(), strict=True)
        statistics: dict[str, Any] = {
            "different": len(unique),
            "empty": int((chars == 0).sum()),
            "broken": sum(problem["reason"].startswith("json") for problem in self.broken),
            "characters": _quantiles(chars),
            "most_repeated": [{"prompt": sample.prompt, "times": times} for sample, times in repeated],
        }
        if t5_tokens is not None and self.has_tokens:
            tokens = self.array("t5_tokens")
            statistics["t5_tokens"] = _quantiles(tokens) | {"limit": t5_tokens, "cut": int((tokens > t5_tokens).sum())}
        return statistics


def _quantiles(values: npt.NDArray[Any]) -> dict[str, int]:
    if len(values) == 0:
        return {}
    names = {"least": 0, "median": 0.5, "p95": 0.95, "p99": 0.99, "most": 1}
    return {name: int(np.quantile(values, at, method="higher")) for name, at in names.items()}
