"""Samples that could not be read: named when they come, counted over all ranks and resumes, bounded.

Their holes in the packs have weight 0, and the loss is still divided by the planned number of samples: a hole counts as
a sample without error. To divide by what is left would take every step a collective before its backward pass; to leave
it makes the gradient of a step with b holes among N samples smaller by b / N, which `data.max_bad_fraction` bounds.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from kontext_train.data.batch import BadSampleNote
from kontext_train.errors import ConfigError
from kontext_train.training.checkpoint_files import put

FEWEST_SAMPLES = 10_000  # a fraction of fewer says nothing


class BadSamples:
    """count: of them so far. seen: samples so far, good or bad."""

    def __init__(self, max_fraction: float, folder: Path, is_main: bool) -> None:
        self.max_fraction, self.file, self.is_main = max_fraction, folder / "bad_samples.jsonl", is_main
        self.count = self.seen = 0

    def note(self, step: int, own: list[BadSampleNote]) -> None:
        """Take down this step's, of all ranks; every rank must call it. Ranks that share a sample count it once."""
        gathered: list[list[BadSampleNote]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, own)
        notes = {note.visit: note for notes in gathered for note in notes}
        self.count += len(notes)
        if not self.is_main:
            return
        with self.file.open("a") as file:
            for note in notes.values():
                print(f"kontext-train: step {step}: left out a bad sample: {note.reason}", file=sys.stderr)
                file.write(json.dumps({"step": step, **asdict(note)}) + "\n")

    def too_many(self) -> bool:
        return self.count > self.max_fraction * max(self.seen, FEWEST_SAMPLES)

    def error(self) -> ConfigError:
        rule = f"but {self.count} of the first {self.seen} samples could not be read"
        if self.seen < FEWEST_SAMPLES:
            rule += f" (the fraction is taken of {FEWEST_SAMPLES} at least)"
        hint = f"{self.file} names them. Repair them or leave them out and index again, or raise it"
        return ConfigError("data.max_bad_fraction", self.max_fraction, rule, hint)

    def state(self) -> dict[str, int]:
        return {"count": self.count, "seen": self.seen}

    def load(self, state: dict[str, int], step: int) -> None:
        """Go on from a checkpoint; what a killed run wrote down after it is forgotten."""
        self.count, self.seen = state["count"], state["seen"]
        if self.is_main and self.file.is_file():
            lines = self.file.read_text().splitlines(keepends=True)
            kept = (line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
            put(self.file, "".join(kept).encode())
