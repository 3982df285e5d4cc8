"""Which samples each rank packs at each step: a pure function of (indexes, seed, position, packs per step).

A run is a sequence of *windows* of samples (sources.py). Each is packed on its own (packing.py), into the same packs at
every world size; all packs of all windows, one after the other, are the stream that steps take their packs from. The
steps that begin in a window are planned together: packs of like cost share a step, so that no rank waits, and the steps
come in random order, so that cost (and with it size) says nothing about time. The last of them is filled up from the
next window. When the world size changes, the packs that are left are shared out anew: nothing is lost or repeated.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import overload

import numpy as np
import numpy.typing as npt

from kontext_train.data.config import DataConfig
from kontext_train.data.packing import pack
from kontext_train.data.sources import Mixture
from kontext_train.randomness import generator, key_of

PLAN_VERSION = 2  # raise it whenever the same settings give other packs: runs in progress must not mix the two

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
CostFunction = Callable[[int, Ints, Ints], Ints]  # (text tokens, target tokens, context tokens) -> FLOPs


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the data a run stands: all that resume needs.

    window: the window that the next steps begin in, or the last window of a run that is just beyond it.
    pack: so many of its packs went to steps that began in an earlier window.
    legs: (packs per step, steps taken) since then; more than one after a change of world size.
    """

    window: int = 0
    pack: int = 0
    legs: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """The samples of one forward pass. Arrays of one entry a sample."""

    samples: Ints  # rows of the mixture
    visits: Ints  # name this sight of each sample for all randomness
    drop_prompt: Bools
    drop_context: Bools
    counts: Bools  # false for the filler of a rank that got no sample: computed, but of weight zero
    samples_in_step: int  # that count, over all ranks and microbatches
    position: Position  # where the run stands once this pack's step is done


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A packed window: the samples of pack p are first[p]:first[p + 1]. Its packs come in random order."""

    number: int
    samples: Ints
    visits: Ints
    drop_prompt: Bools
    drop_context: Bools
    first: Ints  # [packs + 1]
    flops: Ints  # [packs]

    def __len__(self) -> int:
        return len(self.flops)


@dataclass(frozen=True, slots=True, eq=False)
class Step(Sequence[Pack]):
    """The packs of a step, the cheapest first; made only when asked for, as a rank needs few of them."""

    windows: dict[int, Window]
    places: Ints  # [packs, 2]: window, pack
    samples: int
    position: Position

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, i: int) -> Pack: ...
    @overload
    def __getitem__(self, i: slice) -> list[Pack]: ...
    def __getitem__(self, i: int | slice) -> Pack | list[Pack]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        number, place = self.places[i].tolist()
        window = self.windows[number]
        rows = slice(window.first[place], window.first[place + 1])
        return Pack(
            samples=window.samples[rows],
            visits=window.visits[rows],
            drop_prompt=window.drop_prompt[rows],
            drop_context=window.drop_context[rows],
            counts=np.ones(rows.stop - rows.start, dtype=bool),
            samples_in_step=self.samples,
            position=self.position,
        )


def plan_digest(mixture: Mixture, config: DataConfig, seed: int) -> str:
    """Names a plan: runs of equal digest, and of one model, see the same samples in the same packs."""
    sources = [
        (s.key, s.index.digest, str(s.share), s.transform.decides_size(), s.prompt_dropout, s.context_dropout)
        for s in mixture.sources
    ]
    tokens = (mixture.txt_tokens, config.tokens_per_pack, config.window_samples)
    return f"{key_of('plan', PLAN_VERSION, repr(sources), repr(tokens), seed):032x}"


class Planner:
    """Plans the packs of a mixture. Holds no state: every method is a function of its arguments."""

    def __init__(self, mixture: Mixture, config: DataConfig, seed: int, cost: CostFunction) -> None:
        self.mixture, self.budget, self.seed, self.cost = mixture, config.tokens_per_pack, seed, cost
        self.window_samples = min(config.window_samples, len(mixture))  # a window of a small dataset is an epoch

    def window(self, number: int) -> Window:
        """A window's packs, the same at every world size. The one method that takes time."""
        drawn = self.mixture.draw(self.seed, number, self.window_samples)
        draws = generator(self.seed, "dropout", number).random((2, len(drawn.rows)))
        drop_prompt, drop_context = draws[0] < drawn.prompt_dropout, draws[1] < drawn.context_dropout
        return self._packed(number, drawn.rows, drawn.visits, drop_prompt, drop_context)

    def _packed(self, number: int, rows: Ints, visits: Ints, drop_prompt: Bools, drop_context: Bools) -> Window:
        target, context = self.mixture.image_tokens(rows)
        context = context * ~drop_context
        flops = self.cost(self.mixture.txt_tokens, target, context)
        random = generator(self.seed, "packing", number)
        pack_of_sample = pack(self.mixture.txt_tokens + target + context, flops, self.budget, random)
        packs = int(pack_of_sample.max(initial=-1)) + 1
        pack_of_sample = random.permutation(packs)[pack_of_sample]
        by_pack = np.argsort(pack_of_sample, kind="stable")
        first = np.append(0, np.cumsum(np.bincount(pack_of_sample, minlength=packs)))
        return Window(
            number=number,
            samples=rows[by_pack],
            visits=visits[by_pack],
            drop_prompt=drop_prompt[by_pack],
            drop_context=drop_context[by_pack],
            first=first,
            flops=np.diff(np.append(0, np.cumsum(flops[by_pack]))[first]),  # right even where the running sum wraps
        )

    def steps(self, position: Position, packs_per_step: int, windows: Iterable[Window] | None = None) -> Iterator[Step]:
        """Endless: the steps from `position` on.

        windows: the windows from position.window on, if they are planned elsewhere.
        """
        stream = _Stream(map(self.window, count(position.window)) if windows is None else windows, position)
        while True:
            yield from self._steps_of_window(stream, position, packs_per_step)
            position = stream.position

    def _steps_of_window(self, stream: "_Stream", position: Position, packs_per_step: int) -> Iterator[Step]:
        """Shares out the packs as earlier legs did and leaves out what they took; then shares out the rest."""
        legs = position.legs
        if not legs or legs[-1][0] != packs_per_step:
            legs = (*legs, (packs_per_step, 0))
        pool = stream.rest_of_window()
        for number, (packs, done) in enumerate(legs):
            pool = np.concatenate([pool, stream.take(-len(pool) % packs)])
            key = (self.seed, "steps", position.window, position.pack, repr(legs[:number]))
            steps = _steps_of_like_cost(pool, packs, generator(*key))
            pool = steps[done:].reshape(-1, pool.shape[1])
        for taken, places in enumerate(steps[done:], done + 1):
            inside = replace(position, legs=(*legs[:-1], (packs, taken)))
            yield Step(
                windows=dict(stream.windows),
                places=places[:, [WINDOW, PACK]],
                samples=int(places[:, SAMPLES].sum()),
                position=inside if taken < len(steps) else stream.position,
            )

    def fixed(self, first: int, packs_per_step: int) -> list[list[Pack]]:
        """Steps that cover the first samples of the mixture once, without dropout: for validation."""
        assert 0 < first <= len(self.mixture)
        keep, rows = np.zeros(first, dtype=bool), np.arange(first)
        window = self._packed(0, rows, rows, keep, keep)
        stream = _Stream([window], Position())
        step = Step({0: window}, stream.take(len(window))[:, [WINDOW, PACK]], first, Position())
        none = np.zeros(1, dtype=bool)
        filler = Pack(rows[:1], rows[:1], none, none, counts=none, samples_in_step=first, position=Position())
        packs = [*step, *[filler] * (-len(step) % packs_per_step)]  # a rank without samples must join all collectives
        return [packs[i : i + packs_per_step] for i in range(0, len(packs), packs_per_step)]


WINDOW, PACK, FLOPS, SAMPLES = range(4)  # columns of a list of packs, int64 [packs, 4]


class _Stream:
    """The packs of all windows, one after the other, and how far they have been handed out."""

    def __init__(self, windows: Iterable[Window], position: Position) -> None:
        self._coming, self.windows = iter(windows), dict[int, Window]()
        self._number, self._pack = position.window, position.pack

    @property
    def position(self) -> Position:
        return Position(self._number, self._pack)

    def rest_of_window(self) -> Ints:
        """The packs of the window that is next; windows before it are forgotten."""
        self.windows = {number: window for number, window in self.windows.items() if number >= self._number}
        while len(self._window()) == 0:
            self._number += 1
        return self._hand_out(len(self._window()))

    def take(self, packs: int) -> Ints:
        """The next packs, from as many windows as it takes."""
        taken = [np.empty((0, 4), dtype=np.int64)]
        while packs > 0:
            taken.append(self._hand_out(packs))
            packs -= len(taken[-1])
        return np.concatenate(taken)

    def _hand_out(self, packs: int) -> Ints:
        """Up to so many packs, all from one window."""
        window = self._window()
        places = np.arange(self._pack, min(self._pack + packs, len(window)))
        self._pack += len(places)
        if self._pack == len(window):
            self._number, self._pack = self._number + 1, 0
        columns = (np.full(len(places), window.number), places, window.flops[places], np.diff(window.first)[places])
        return np.stack(columns, axis=1)

    def _window(self) -> Window:
        if self._number not in self.windows:
            self.windows[self._number] = next(self._coming)
            assert self.windows[self._number].number == self._number
        return self.windows[self._number]


def _steps_of_like_cost(pool: Ints, packs: int, random: np.random.Generator) -> Ints:
    """[steps, packs, 4] the pool in steps; the packs of each, the cheapest first."""
    by_cost = pool[np.lexsort((pool[:, PACK], pool[:, WINDOW], pool[:, FLOPS]))]
    steps = by_cost.reshape(-1, packs, pool.shape[1])
    return steps[random.permutation(len(steps))]
