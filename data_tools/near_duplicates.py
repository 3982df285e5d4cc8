"""Images that look alike, by 64-bit perceptual hashes: which hashes differ in few bits, among very many."""

from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

HASH_BITS = 64
_SHARED_BLOCKS = 3
_BITS_OF_BYTE = np.array([value.bit_count() for value in range(256)], np.uint8)


def bit_distance(a: npt.NDArray[np.uint64], b: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """How many bits of each pair of hashes differ."""
    return _BITS_OF_BYTE[np.atleast_1d(a ^ b).view(np.uint8).reshape(-1, 8)].sum(axis=1, dtype=np.int64)


def duplicate_groups(hashes: npt.NDArray[np.uint64], distance: int) -> list[npt.NDArray[np.int64]]:
    """Groups of two or more positions, the largest group first; within a group the positions rise.

    Two hashes are in one group if they differ in at most `distance` bits, or if a chain of such pairs joins them.
    """
    unique, where = np.unique(hashes, return_inverse=True)
    pairs = near_pairs(unique, distance)
    graph = coo_array((np.ones(len(pairs), np.bool_), (pairs[:, 0], pairs[:, 1])), shape=(len(unique), len(unique)))
    label = connected_components(graph, directed=False)[1][where]
    order = np.argsort(label, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(label[order])) + 1)
    return sorted((group for group in groups if len(group) > 1), key=len, reverse=True)


def near_pairs(unique: npt.NDArray[np.uint64], distance: int) -> npt.NDArray[np.int64]:
    """All pairs of positions whose hashes, all different, differ in at most `distance` bits: int64 [p, 2], exactly.

    The bits are cut into distance + 3 blocks. Of these `distance` flipped bits leave 3 whole, so each near pair agrees
    in some 3 blocks: for every choice of 3 the hashes are sorted by these alone, and equal ones are compared. That is
    C(distance + 3, 3) sorts, O(n log n) each, and few comparisons beside them: at distance 4 a pair that is unlike
    agrees in 27 bits, one in 10^8. Memory is O(n + pairs).
    """
    found = [np.empty((0, 2), np.int64)]
    blocks = _block_masks(distance + _SHARED_BLOCKS) if distance > 0 else []
    for chosen in combinations(blocks, _SHARED_BLOCKS):
        key = unique & np.bitwise_or.reduce(np.array(chosen, np.uint64))
        order = np.argsort(key)
        found.append(_pairs_in_runs(unique[order], key[order], order, distance))
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def _block_masks(count: int) -> list[int]:
    edges = np.linspace(0, HASH_BITS, count + 1).round().astype(int).tolist()
    return [(1 << high) - (1 << low) for low, high in pairwise(edges)]


def _pairs_in_runs(
    hashes: npt.NDArray[np.uint64], key: npt.NDArray[np.uint64], order: npt.NDArray[np.int64], distance: int
) -> npt.NDArray[np.int64]:
    """Near pairs among those of equal key, which stand side by side: first neighbours, then next but one, …"""
    found = [np.empty((0, 2), np.int64)]
    left, step = np.arange(len(key)), 1
    while len(left := left[left + step < len(key)]) and len(left := left[key[left] == key[left + step]]):
        near = left[bit_distance(hashes[left], hashes[left + step]) <= distance]
        found.append(np.stack([order[near], order[near + step]], axis=1))
        step += 1
    return np.concatenate(found)
