"""All randomness of a run, as a pure function of named things.

A draw belongs to a *visit*: the v-th time any sample is seen, counted over the run as epoch * samples + sample. Noise
and timesteps keyed by visit do not depend on how many processes there are, which rank packs the sample, or what else
is in the pack. So ranks that share a sample (context parallelism) agree by construction, resuming at another world
size changes nothing, and no generator state exists to be checkpointed.
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from any tuple of names and numbers; a small change of key gives an unrelated seed."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for this key alone."""
    return torch.Generator(device=device).manual_seed(seed_of(*key))


class VisitRandom:
    """Normal draws for a list of visits; the same visit and purpose always give the same numbers.

    Numbers are drawn on the CPU and then moved, so that a run on another kind of device sees the same noise.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.device = torch.device(device)

    def normal(self, purpose: str, visits: Iterable[int], lengths: Sequence[int], channels: int) -> Tensor:
        """[sum(lengths), channels] float32: lengths[i] rows of standard normals for the i-th visit."""
        rows = [
            torch.randn(length, channels, generator=generator(self.seed, purpose, visit))
            for visit, length in zip(visits, lengths, strict=True)
        ]
        return torch.cat(rows).to(self.device, non_blocking=True)

    def normal_per_visit(self, purpose: str, visits: Sequence[int]) -> Tensor:
        """[visits] float32: one standard normal for each visit."""
        return self.normal(purpose, visits, [1] * len(visits), 1)[:, 0]
