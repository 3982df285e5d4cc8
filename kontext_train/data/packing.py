"""Samples into packs that are nearly full and cost the same: a pure function of integers, vectorised over packs.

Filling packs to a token budget is bin packing, giving them equal FLOPs is load balancing, and attention's quadratic
term sets the two against each other. Samples are dealt in rounds (after Graham 1969's LPT); then, sweep after sweep,
packs meet in pairs and exchange up to two samples for up to two, whatever brings their tokens below the budget and,
within it, their costs together. What a full pack cannot hold after that is packed once more.

Everything is integer and every sort stable, so all ranks find the same packs whatever their processors are.

Legend: n samples, m packs, s slots of a pack, p pairs of packs, k offers.
"""

import numpy as np
import numpy.typing as npt

# Measured on benchmarks/packing.py's workload: fuller packs or fewer sweeps leave more for the second packing.
FILL = 0.986  # of the budget, on average: the rest is what the exchange works with
SWEEPS = 80
OFFERS = 12  # pairs of slots that a pack offers in one sweep
MEAN_PACK_COST = 10**6  # of scaled costs, so that sums and differences of packs fit into int32
OVERFLOW_WEIGHT = 100  # a token beyond the budget counts as much as the cost of so many tokens

Ints = npt.NDArray[np.int64]


def pack(tokens: Ints, cost: Ints, budget: int, random: np.random.Generator) -> Ints:
    """The pack of each sample: [n] in 0 ... m - 1. No pack exceeds the budget, none is empty.

    Args:
        tokens, cost: [n] positive. No sample alone exceeds the budget.
        random: draws which packs and slots meet; the same state gives the same packs.
    """
    if len(tokens) == 0:
        return np.empty(0, dtype=np.int64)
    assert tokens.max() <= budget, "a sample exceeds the budget: check_budget was not called"
    packs = min(len(tokens), -(-int(tokens.sum()) // max(1, int(budget * FILL))))
    pack_of_sample = _Exchange(tokens, cost, budget, deal(tokens, packs), packs).run(random)
    spilled = np.flatnonzero(_overflow(pack_of_sample, tokens, budget))
    if len(spilled):
        pack_of_sample[spilled] = packs + pack(tokens[spilled], cost[spilled], budget, random)
    return pack_of_sample


def deal(size: Ints, packs: int) -> Ints:
    """The pack of each sample, in rounds of one sample a pack, the largest to the emptiest."""
    largest_first = np.argsort(-size, kind="stable")
    load, pack_of_sample = np.zeros(packs, dtype=np.int64), np.empty(len(size), dtype=np.int64)
    for first in range(0, len(size), packs):
        chosen = largest_first[first : first + packs]
        emptiest = np.argsort(load, kind="stable")[: len(chosen)]
        pack_of_sample[chosen] = emptiest
        load[emptiest] += size[chosen]
    return pack_of_sample


class _Exchange:
    """Packs while they exchange samples. A free slot holds a sample of no size, so that a move is an exchange too."""

    def __init__(self, tokens: Ints, cost: Ints, budget: int, pack_of_sample: Ints, packs: int) -> None:
        self.n, self.packs, self.budget = len(tokens), packs, budget
        self.tokens = np.append(tokens, 0).astype(np.int32)
        self.cost = np.append(_scaled(tokens, cost, budget), 0).astype(np.int32)
        self.weight = np.int32(OVERFLOW_WEIGHT * max(1, MEAN_PACK_COST // budget))
        self.slots_ms = self._slots(pack_of_sample)
        self.load_m = self.tokens[self.slots_ms].sum(axis=1, dtype=np.int32)
        self.cost_m = self.cost[self.slots_ms].sum(axis=1, dtype=np.int32)

    def _slots(self, pack_of_sample: Ints) -> Ints:
        """Samples of each pack; every pack has two free slots at least."""
        count = np.bincount(pack_of_sample, minlength=self.packs)
        by_pack = np.argsort(pack_of_sample, kind="stable")
        place = np.arange(self.n) - np.repeat(np.cumsum(count) - count, count)
        slots_ms = np.full((self.packs, count.max() + 2), self.n)
        slots_ms[pack_of_sample[by_pack], place] = by_pack
        return slots_ms

    def run(self, random: np.random.Generator) -> Ints:
        """The pack of each sample after all sweeps, or once nothing is left to gain."""
        for sweep in range(SWEEPS):
            within = self.load_m.max() <= self.budget
            if self.packs == 1 or (within and np.ptp(self.cost_m) <= MEAN_PACK_COST // 1000):
                break
            self._sweep(*self._meet(sweep, random), random)
        pack_of_sample = np.empty(self.n + 1, dtype=np.int64)
        pack_of_sample[self.slots_ms] = np.arange(self.packs)[:, None]
        return pack_of_sample[: self.n]

    def _meet(self, sweep: int, random: np.random.Generator) -> tuple[Ints, Ints]:
        """Which packs meet: anybody; the cheapest quarter and the costliest; twice, the emptiest and the fullest."""
        if sweep % 4 == 0:
            order, pairs = random.permutation(self.packs), self.packs // 2
        else:
            order = np.argsort(self.cost_m if sweep % 4 == 1 else self.load_m, kind="stable")
            pairs = max(1, self.packs // 4)
        return order[:pairs], order[::-1][:pairs]

    def _sweep(self, a: Ints, b: Ints, random: np.random.Generator) -> None:
        """Each pair of packs (a[p], b[p]) makes its best exchange, if one is better than none."""
        offer_a, offer_b = self._offers(random), self._offers(random)
        of_a, of_b = self.slots_ms[a[:, None, None], offer_a], self.slots_ms[b[:, None, None], offer_b]  # [p, k, 2]
        t_a, t_b = (self.tokens[of[..., 0]] + self.tokens[of[..., 1]] for of in (of_a, of_b))
        c_a, c_b = (self.cost[of[..., 0]] + self.cost[of[..., 1]] for of in (of_a, of_b))
        room_a, room_b = (self.budget - self.load_m[a])[:, None] + t_a, (self.budget - self.load_m[b])[:, None] + t_b
        apart = self.cost_m[a] - self.cost_m[b]
        # badness [p, k of a, k of b] if a's offer goes to b and b's to a: tokens beyond the budget, costs apart
        badness = np.maximum(t_b[:, None, :] - room_a[:, :, None], 0)
        badness += np.maximum(t_a[:, :, None] - room_b[:, None, :], 0)
        badness *= self.weight
        badness += np.abs((apart[:, None] - 2 * c_a)[:, :, None] + 2 * c_b[:, None, :])
        best = badness.reshape(len(a), -1).argmin(axis=1)
        over = np.maximum(self.load_m[a] - self.budget, 0) + np.maximum(self.load_m[b] - self.budget, 0)
        better = badness.reshape(len(a), -1)[np.arange(len(a)), best] < np.abs(apart) + self.weight * over
        pair = np.flatnonzero(better)
        i, j = np.divmod(best[pair], len(offer_b))
        a, b = a[pair], b[pair]
        self.slots_ms[a[:, None], offer_a[i]], self.slots_ms[b[:, None], offer_b[j]] = of_b[pair, j], of_a[pair, i]
        gained_t, gained_c = t_b[pair, j] - t_a[pair, i], c_b[pair, j] - c_a[pair, i]
        self.load_m[a] += gained_t
        self.load_m[b] -= gained_t
        self.cost_m[a] += gained_c
        self.cost_m[b] -= gained_c

    def _offers(self, random: np.random.Generator) -> Ints:
        """[k, 2] different slots; free ones among them make it one sample, or none."""
        both = np.stack(np.triu_indices(self.slots_ms.shape[1], 1), axis=1)
        return both[random.permutation(len(both))[:OFFERS]]


def _scaled(tokens: Ints, cost: Ints, budget: int) -> Ints:
    """Costs in units in which a full pack costs about MEAN_PACK_COST."""
    cost = cost >> max(0, int(cost.max()).bit_length() - 40)  # sums of millions of them fit into int64
    return cost * MEAN_PACK_COST // max(1, int(cost.sum()) * budget // int(tokens.sum()))


def _overflow(pack_of_sample: Ints, tokens: Ints, budget: int) -> npt.NDArray[np.bool_]:
    """Which samples must leave so that every pack keeps its budget: the largest of each."""
    order = np.lexsort((tokens, pack_of_sample))  # pack after pack, the smallest first
    running = np.cumsum(tokens[order])
    count = np.bincount(pack_of_sample)
    before = np.append(0, running)[np.cumsum(count) - count]
    leaves = np.empty(len(tokens), dtype=bool)
    leaves[order] = running - np.repeat(before, count) > budget
    return leaves
