"""All randomness of a run, as a pure function of named things.

A draw belongs to a *visit*: the v-th time any sample is seen, counted over the run as epoch * samples + sample. Noise
and timesteps keyed by visit do not depend on how many processes there are, which rank packs the sample, or what else
is in the pack. So ranks that share a sample (context parallelism) agree by construction, resuming at another world
size changes nothing, and no generator state exists to be checkpointed.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


def key_of(*key: int | str) -> int:
    """128 bits from any tuple of names and numbers; a small change of it gives unrelated bits."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=16).digest(), "little")


def generator(*key: int | str) -> np.random.Generator:
    """A fresh generator for this key alone. (torch's would keep 32 bits of it: too few for a billion visits.)"""
    return np.random.Generator(np.random.Philox(key=key_of(*key)))


class VisitRandom:
    """Normal draws for a list of visits; the same visit and purpose always give the same numbers.

    Numbers are drawn on the CPU and then moved, so that a run on another kind of device sees the same noise.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.device = torch.device(device)

    def normal(self, purpose: str, visits: Iterable[int], lengths: Sequence[int], channels: int) -> Tensor:
        """[sum(lengths), channels] float32: lengths[i] rows of standard normals for the i-th visit."""
        rows = np.empty((sum(lengths), channels), dtype=np.float32)
        first = 0
        for visit, length in zip(visits, lengths, strict=True):
            part = rows[first : first + length]
            generator(self.seed, purpose, visit).standard_normal(out=part, dtype=np.float32)
            first += length
        return torch.from_numpy(rows).to(self.device, non_blocking=True)

    def normal_per_visit(self, purpose: str, visits: Sequence[int]) -> Tensor:
        """[visits] float32: one standard normal for each visit."""
        return self.normal(purpose, visits, [1] * len(visits), 1)[:, 0]
