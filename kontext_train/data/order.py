"""The order of an epoch: a keyed permutation of 0 ... n - 1 that is evaluated only where it is asked for.

A generalised Feistel network on a grid of rows x columns >= n, with cycle walking back into the range (Black & Rogaway
2002, "Ciphers with arbitrary finite domains"). Nothing is stored and nothing is shuffled, so neither memory nor
start-up grows with the dataset.
"""

from math import isqrt

import numpy as np
import numpy.typing as npt

ROUNDS = 8

Words = npt.NDArray[np.uint64]


def permuted(places: npt.ArrayLike, epochs: npt.ArrayLike, n: int, key: int) -> npt.NDArray[np.int64]:
    """What stands at some places of some epochs' orders.

    Args:
        places: integers [k], 0 <= place < n.
        epochs: integers [k], at least 0; every epoch has an order of its own.
        n: how many things are ordered, 1 <= n < 2**62.
        key: 128 bits; another key gives unrelated orders.

    Returns:
        int64 [k], each in 0 ... n - 1. For one epoch and all places: every number once.
    """
    found = np.array(places, dtype=np.uint64)
    epoch_key = _mixed(np.asarray(epochs, dtype=np.uint64) + np.uint64(key & _WORD)) ^ np.uint64(key >> 64 & _WORD)
    outside = np.arange(len(found))
    while len(outside):
        found[outside] = _feistel(found[outside], epoch_key[outside], n)
        outside = outside[found[outside] >= n]
    return found.astype(np.int64)


def _feistel(x: Words, key: Words, n: int) -> Words:
    """A permutation of 0 ... rows * columns - 1, which is less than sqrt(n) + 1 wider than the range."""
    rows = isqrt(n - 1) + 1
    columns = -(-n // rows)
    row, column = np.divmod(x, np.uint64(columns))
    for number in range(0, ROUNDS, 2):
        row = (row + _mixed(column ^ _mixed(key + np.uint64(number))) % np.uint64(rows)) % np.uint64(rows)
        column = (column + _mixed(row ^ _mixed(key + np.uint64(number + 1))) % np.uint64(columns)) % np.uint64(columns)
    return row * np.uint64(columns) + column


_WORD = (1 << 64) - 1


def _mixed(x: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): every bit of x moves every bit of the result."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
