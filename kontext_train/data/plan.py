"""Which samples each rank packs at each step: a pure function of (index, seed, position, packs per step).

An epoch is one permutation of the samples, cut into *windows*. The samples of a window are dealt into packs of at most
`tokens_per_pack` tokens and as equal as possible in FLOPs; a step takes one pack for every rank and microbatch. A
window's samples do not depend on the number of ranks, so resuming at another world size re-plans what is left of the
current window and nothing is lost or repeated.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from kontext_train.data.config import DataConfig
from kontext_train.data.index import ShardIndex
from kontext_train.data.transforms import Transform
from kontext_train.errors import ConfigError
from kontext_train.models.sequence import SampleShape
from kontext_train.randomness import generator, key_of

PLAN_VERSION = 1  # raise it whenever the same settings give other packs: runs in progress must not mix the two
CostFunction = Callable[[np.ndarray], np.ndarray]  # tokens of samples -> their FLOPs, in any unit


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the data a run stands: all that resume needs.

    legs: (packs per step, steps taken) within the current window; more than one after a change of world size.
    """

    epoch: int = 0
    window: int = 0
    legs: tuple[tuple[int, int], ...] = ()

    def after_step(self, packs_per_step: int) -> "Position":
        if self.legs and self.legs[-1][0] == packs_per_step:
            return replace(self, legs=(*self.legs[:-1], (packs_per_step, self.legs[-1][1] + 1)))
        return replace(self, legs=(*self.legs, (packs_per_step, 1)))


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """The samples of one forward pass. Arrays of one entry a sample."""

    samples: np.ndarray  # row of the shard index
    visits: np.ndarray  # epoch * samples of the dataset + sample: names this sight of the sample for all randomness
    drop_prompt: np.ndarray  # bool
    drop_context: np.ndarray  # bool
    counts: np.ndarray  # bool; false for the filler of a rank that got no sample: computed, but of weight zero
    samples_in_step: int  # that count, over all ranks and microbatches
    position: Position  # where the run stands once this pack's step is done


@dataclass(frozen=True, slots=True)
class SampleSizes:
    """Sizes in tokens of every sample, as trained at. Arrays of one row a sample (or a context image)."""

    txt_tokens: int
    target_hw: np.ndarray  # [n, 2]
    context_start: np.ndarray  # [n + 1]
    context_hw: np.ndarray  # [contexts, 2]
    target_tokens: np.ndarray  # [n]
    context_tokens: np.ndarray  # [n]

    def __len__(self) -> int:
        return len(self.target_hw)

    def tokens(self, samples: np.ndarray, drop_context: np.ndarray) -> np.ndarray:
        return self.txt_tokens + self.target_tokens[samples] + self.context_tokens[samples] * ~drop_context

    def shape(self, sample: int, drop_context: bool) -> SampleShape:
        first, last = self.context_start[sample], self.context_start[sample + 1]
        contexts = () if drop_context else tuple((int(h), int(w)) for h, w in self.context_hw[first:last])
        h, w = self.target_hw[sample]
        return SampleShape(txt=self.txt_tokens, target=(int(h), int(w)), contexts=contexts)


def sample_sizes(index: ShardIndex, transform: Transform, txt_tokens: int) -> SampleSizes:
    """Token sizes from image sizes, by the same rule that the reader crops with."""
    size = transform.size if index.encoding is None else np.asarray  # what is encoded has its size
    target_hw = size(index.target_hw) // transform.multiple
    context_hw = size(index.context_hw) // transform.multiple
    running = np.concatenate([[0], np.cumsum(context_hw.prod(axis=1))])
    return SampleSizes(
        txt_tokens=txt_tokens,
        target_hw=target_hw,
        context_start=index.context_start,
        context_hw=context_hw,
        target_tokens=target_hw.prod(axis=1),
        context_tokens=np.diff(running[index.context_start]),
    )


def check_budget(sizes: SampleSizes, config: DataConfig) -> None:
    """ConfigError if some sample alone exceeds the token budget."""
    tokens = sizes.tokens(np.arange(len(sizes)), np.zeros(len(sizes), dtype=bool))
    longest = int(tokens.argmax())
    if tokens[longest] > config.tokens_per_pack:
        rule = f"must hold the largest sample: sample {longest} of the index has {tokens[longest]} tokens"
        raise ConfigError("data.tokens_per_pack", config.tokens_per_pack, rule, "Raise it, or lower data.max_pixels")


def plan_digest(index: ShardIndex, sizes: SampleSizes, config: DataConfig, seed: int) -> str:
    """Names a plan: runs of equal digest see the same samples in the same windows, and may continue each other."""
    tokens = (int(sizes.target_tokens.sum()), int(sizes.context_tokens.sum()))  # says how many pixels a token has
    settings = (config.max_pixels, config.tokens_per_pack, config.window_samples, tokens)
    dropouts = (config.prompt_dropout, config.context_dropout)
    return f"{key_of('plan', PLAN_VERSION, index.digest, sizes.txt_tokens, repr((settings, dropouts)), seed):032x}"


class Planner:
    """Plans a dataset's packs. Holds no state: every method is a function of its arguments."""

    def __init__(self, sizes: SampleSizes, config: DataConfig, seed: int, cost: CostFunction) -> None:
        self.sizes, self.config, self.seed, self.cost = sizes, config, seed, cost
        self.windows = max(1, round(len(sizes) / config.window_samples))

    def steps(self, position: Position, packs_per_step: int) -> Iterator[list[Pack]]:
        """Endless: for each step from `position` on, its packs (rank-major: rank r's microbatches lie side by side)."""
        while True:
            yield from self._rest_of_window(position, packs_per_step)
            last = position.window + 1 == self.windows
            position = Position(position.epoch + last, 0 if last else position.window + 1)

    def fixed(self, first: int, packs_per_step: int) -> list[list[Pack]]:
        """Steps that cover the first samples of the index once, without dropout: for validation."""
        assert first <= len(self.sizes)
        keep = np.zeros(first, dtype=bool)
        return list(self._plan(Position(), np.arange(first), keep, keep, packs_per_step))

    def _rest_of_window(self, position: Position, packs_per_step: int) -> Iterator[list[Pack]]:
        """Replays the planning, never the data, of the legs already taken; then plans what they left."""
        samples, drop_prompt, drop_context = self._window(position.epoch, position.window)
        left = np.ones(len(samples), dtype=bool)
        for leg_packs, leg_steps in position.legs:
            taken = self._deal(samples[left], drop_context[left], leg_packs, position)[:leg_steps]
            left[np.flatnonzero(left)[np.concatenate([p for step in taken for p in step])]] = False
        # A window that ends here, or a leg of this same size, goes on with the plan it had.
        if position.legs and position.legs[-1][0] == packs_per_step:
            *before, (_, done) = position.legs
            rest = self._rest_of_window(replace(position, legs=tuple(before)), packs_per_step)
            yield from (packs for i, packs in enumerate(rest) if i >= done)
        elif left.any():
            yield from self._plan(position, samples[left], drop_prompt[left], drop_context[left], packs_per_step)

    def _window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(samples, drop_prompt, drop_context) of a window; the same at every world size."""
        n = len(self.sizes)
        order = generator(self.seed, "order", epoch).permutation(n)
        samples = order[window * n // self.windows : (window + 1) * n // self.windows]
        draws = generator(self.seed, "dropout", epoch, window).random((2, len(samples)))
        return samples, draws[0] < self.config.prompt_dropout, draws[1] < self.config.context_dropout

    def _plan(
        self,
        position: Position,
        samples: np.ndarray,
        drop_prompt: np.ndarray,
        drop_context: np.ndarray,
        packs_per_step: int,
    ) -> Iterator[list[Pack]]:
        first_visit = position.epoch * len(self.sizes)
        for step in self._deal(samples, drop_context, packs_per_step, position):
            position = position.after_step(packs_per_step)
            in_step = sum(len(rows) for rows in step)
            assert in_step > 0
            packs = []
            for rows in step:
                counts = np.ones(len(rows), dtype=bool)
                if len(rows) == 0:  # a rank without samples must still join every collective
                    rows, counts = np.array([0]), np.array([False])
                packs.append(
                    Pack(
                        samples=samples[rows],
                        visits=first_visit + samples[rows],
                        drop_prompt=drop_prompt[rows],
                        drop_context=drop_context[rows],
                        counts=counts,
                        samples_in_step=in_step,
                        position=position,
                    )
                )
            yield packs

    def _deal(
        self, samples: np.ndarray, drop_context: np.ndarray, packs_per_step: int, position: Position
    ) -> list[list[np.ndarray]]:
        """Rows of `samples` for each step and pack: fewest steps that keep the budget, like loads side by side."""
        tokens = self.sizes.tokens(samples, drop_context)
        cost = self.cost(tokens)
        budget = self.config.tokens_per_pack
        steps = max(1, -(-int(tokens.sum()) // (budget * packs_per_step)))
        most = -(-len(samples) // packs_per_step)  # one sample a pack always fits, and leaves no step empty
        while True:
            pack_of_sample = deal_by_cost(cost, steps * packs_per_step)
            loads = np.bincount(pack_of_sample, weights=tokens, minlength=steps * packs_per_step)
            if loads.max() <= budget:
                break
            assert steps < most, "a sample exceeds the budget: check_budget was not called"
            steps = min(most, steps + 1 + steps // 100)
        by_pack = np.argsort(pack_of_sample, kind="stable")
        rows = np.split(by_pack, np.cumsum(np.bincount(pack_of_sample, minlength=steps * packs_per_step))[:-1])
        # Packs of like cost share a step, so that no rank waits; steps come in random order, so that cost (and with
        # it size) says nothing about time.
        like = np.argsort(np.bincount(pack_of_sample, weights=cost, minlength=len(rows)), kind="stable")
        order = generator(self.seed, "steps", position.epoch, position.window).permutation(steps)
        return [[rows[p] for p in like.reshape(steps, packs_per_step)[s]] for s in order]


def deal_by_cost(cost: np.ndarray, packs: int) -> np.ndarray:
    """Pack of each sample, in rounds of one sample a pack, the costliest to the lightest (after Graham 1969's LPT)."""
    largest_first = np.argsort(-cost, kind="stable")
    load, pack_of_sample = np.zeros(packs), np.empty(len(cost), dtype=np.int64)
    for first in range(0, len(cost), packs):
        chosen = largest_first[first : first + packs]
        lightest = np.argsort(load, kind="stable")[: len(chosen)]
        pack_of_sample[chosen] = lightest
        load[lightest] += cost[chosen]
    return pack_of_sample
