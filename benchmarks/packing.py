"""The plan against three other ways to batch: FLOP balance, padding, predicted step time, speed of planning.

    python -m benchmarks.packing               # some minutes; prints the table, writes benchmarks/results/packing.json
    python -m benchmarks.packing --budgets 32768 --ranks 8 64

The workload: three resolutions (256², 512², 1024²), seven aspect ratios, 0 to 3 context images each with an aspect
ratio of its own, 30 % text-to-image; FLOPs of the 12B with 512 text tokens. Every method sees the same samples.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kontext_train.data.config import DataConfig
from kontext_train.data.plan import Planner, Position, Window
from kontext_train.data.sources import Mixture, Source
from kontext_train.data.transforms import Transform
from kontext_train.models.config import FluxConfig
from kontext_train.models.flops import forward_flops

Ints = npt.NDArray[np.int64]

TXT_TOKENS, PIXELS_PER_TOKEN = 512, 16
RESOLUTIONS = (256, 512, 1024)
ASPECT_RATIOS = ((1, 1), (3, 4), (4, 3), (2, 3), (3, 2), (9, 16), (16, 9))
CONTEXTS = (0.3, 0.4, 0.2, 0.1)  # shares of samples with 0, 1, 2 and 3 context images
FLOPS = forward_flops(FluxConfig())


class MixedIndex:
    """Stands in for a shard index: image sizes of n samples, nothing else."""

    def __init__(self, n: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        side = np.array(RESOLUTIONS)[random.integers(len(RESOLUTIONS), size=n)]
        contexts = random.choice(len(CONTEXTS), n, p=CONTEXTS)
        self.aspect = random.integers(len(ASPECT_RATIOS), size=n)
        self.target_hw = _image_sizes(side, self.aspect)
        self.context_start = np.append(0, np.cumsum(contexts))
        owner = np.repeat(np.arange(n), contexts)
        self.context_hw = _image_sizes(side[owner], random.integers(len(ASPECT_RATIOS), size=len(owner)))
        self.samples_by_contexts = np.bincount(contexts).tolist()
        self.encoding = None
        self.digest = f"mixed {n} {seed}"

    def __len__(self) -> int:
        return len(self.target_hw)


def _image_sizes(side: Ints, aspect: Ints) -> npt.NDArray[np.int32]:
    ratio = np.array(ASPECT_RATIOS)[aspect]
    return (side[:, None] * np.sqrt(ratio / ratio[:, ::-1])).astype(np.int32)


def mixed_planner(n: int, budget: int, window_samples: int, seed: int = 0) -> Planner:
    source = Source("mixed", MixedIndex(n, seed), Fraction(1), Transform(1024 * 1024, PIXELS_PER_TOKEN), 0.0, 0.0)  # type: ignore[arg-type]
    config = DataConfig(tokens_per_pack=budget, window_samples=window_samples)
    return Planner(Mixture([source], TXT_TOKENS), config, seed, FLOPS.of_tokens)


@dataclass
class Packs:
    """What ranks compute, in the order in which steps take it. Arrays of one entry a pack (or batch)."""

    flops: Ints  # of samples
    executed: Ints  # of samples and padding
    tokens: Ints  # of samples
    computed: Ints  # of samples and padding
    seconds: float  # CPU time that planning took
    samples: int


def padded_to_budget(flops: Ints, tokens: Ints, budget: int, seconds: float, samples: int) -> Packs:
    """Packs as static shapes want them: padding costs the linear part, and attends to itself."""
    padding = budget - tokens
    executed = flops + padding * (FLOPS.per_token + FLOPS.per_img_token) + FLOPS.per_token_pair * padding**2
    return Packs(flops, executed, tokens, np.full_like(tokens, budget), seconds, samples)


def samples_of(planner: Planner, windows: list[Window], *, shuffled: bool) -> tuple[list[Ints], Ints, Ints]:
    """(positions of each window's samples, tokens, FLOPs): in packed order, or shuffled within each window."""
    random = np.random.default_rng(0)
    target, context = planner.mixture.image_tokens(np.concatenate([w.samples for w in windows]))
    tokens, flops = TXT_TOKENS + target + context, FLOPS.of_tokens(TXT_TOKENS, target, context)
    ends = np.cumsum([0, *(len(w.samples) for w in windows)])
    order = [np.arange(a, b) for a, b in pairwise(ends.tolist())]
    if shuffled:
        mixed = np.concatenate([random.permutation(part) for part in order])
        tokens, flops = tokens[mixed], flops[mixed]
    return order, tokens, flops


def ours(planner: Planner, ranks: int, windows: list[Window], seconds: float) -> Packs:
    """The steps that begin in these windows. One more window, planned off the clock, fills up the last of them."""
    more = [*windows, planner.window(len(windows))]
    started = time.process_time()
    steps = list(islice(planner.steps(Position(), ranks, more), -(-sum(len(w) for w in windows) // ranks)))
    seconds += time.process_time() - started
    of_window, tokens, flops = samples_of(planner, more, shuffled=False)
    of_pack = [
        [np.add.reduceat(part[own], window.first[:-1]) for part in (flops, tokens)]
        for window, own in zip(more, of_window, strict=True)
    ]
    places = np.concatenate([step.places for step in steps]).tolist()
    pack_flops, pack_tokens = (np.array([of_pack[w][part][p] for w, p in places]) for part in (0, 1))
    return padded_to_budget(pack_flops, pack_tokens, planner.budget, seconds, sum(len(w.samples) for w in windows))


def random_packing(planner: Planner, windows: list[Window]) -> Packs:
    """Samples in random order; a pack closes where the next sample does not fit."""
    _, tokens, flops = samples_of(planner, windows, shuffled=True)
    started = time.process_time()
    pack_of_sample, pack, load = np.empty(len(tokens), dtype=np.int64), 0, 0
    for i, size in enumerate(tokens.tolist()):
        if load + size > planner.budget:
            pack, load = pack + 1, 0
        load += size
        pack_of_sample[i] = pack
    return _summed(pack_of_sample, tokens, flops, planner.budget, time.process_time() - started)


def first_fit_decreasing(planner: Planner, windows: list[Window]) -> Packs:
    """Window by window, the longest sample first into the first pack with room; packs in random order."""
    of_window, tokens, flops = samples_of(planner, windows, shuffled=True)
    started, packs, pack_of_sample = time.process_time(), 0, np.empty(len(tokens), dtype=np.int64)
    for own in of_window:
        room, used, found = np.full(len(own), planner.budget, dtype=np.int32), 1, np.empty(len(own), dtype=np.int64)
        for i in np.argsort(-tokens[own], kind="stable"):
            size = tokens[own[i]]
            found[i] = np.argmax(room[: used + 1] >= size)
            room[found[i]] -= size
            used = max(used, int(found[i]) + 1)
        pack_of_sample[own] = packs + np.random.default_rng(packs).permutation(used)[found]
        packs += used
    return _summed(pack_of_sample, tokens, flops, planner.budget, time.process_time() - started)


def _summed(pack_of_sample: Ints, tokens: Ints, flops: Ints, budget: int, seconds: float) -> Packs:
    sums = [np.zeros(int(pack_of_sample.max()) + 1, dtype=np.int64) for _ in range(2)]
    for total, values in zip(sums, (flops, tokens), strict=True):
        np.add.at(total, pack_of_sample, values)
    return padded_to_budget(sums[0], sums[1], budget, seconds, len(tokens))


def buckets(planner: Planner, windows: list[Window]) -> Packs:
    """A batch is samples of one resolution, target aspect ratio and number of contexts, padded to the longest of it.

    Its number of samples is fixed for each bucket: as many as the budget holds of the bucket's longest. Every rank
    takes the next batch, whatever its bucket.
    """
    started = time.process_time()
    rows = np.random.default_rng(0).permutation(np.concatenate([w.samples for w in windows]))
    target, context = planner.mixture.image_tokens(rows)
    tokens, flops = TXT_TOKENS + target + context, FLOPS.of_tokens(TXT_TOKENS, target, context)
    index = planner.mixture.sources[0].index
    kind = np.column_stack([index.target_hw[rows], np.diff(index.context_start)[rows]])
    bucket = np.unique(kind, axis=0, return_inverse=True)[1]
    batches: list[Ints] = []
    for number in range(int(bucket.max()) + 1):
        own = np.flatnonzero(bucket == number)
        size = planner.budget // int(tokens[own].max())
        batches += [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
    batches = [batches[i] for i in np.random.default_rng(1).permutation(len(batches))]
    longest, count = np.array([tokens[b].max() for b in batches]), np.array([len(b) for b in batches])
    executed = count * (FLOPS.per_sample + FLOPS.per_token * longest + FLOPS.per_token_pair * longest**2)
    useful_flops, useful_tokens = (np.array([part[b].sum() for b in batches]) for part in (flops, tokens))
    seconds = time.process_time() - started
    return Packs(useful_flops, executed, useful_tokens, count * longest, seconds, len(rows))


METHODS: dict[str, Callable[[Planner, list[Window]], Packs]] = {
    "(a) aspect-ratio buckets, fixed batch": buckets,
    "(b) random packing": random_packing,
    "(c) first-fit decreasing": first_fit_decreasing,
}


@dataclass
class Row:
    budget: int
    ranks: int
    window_samples: int
    steps: int
    method: str
    imbalance_mean: float  # of samples' FLOPs, max over ranks / mean - 1
    imbalance_p99: float
    padding: float  # share of computed tokens
    step_time: float  # the slowest rank's FLOPs with padding, over all samples' FLOPs shared out evenly
    samples_per_s: float


def row(method: str, planner: Planner, ranks: int, packs: Packs) -> Row:
    """What a method's packs give on so many ranks; packs that fill no step are left out."""
    whole = len(packs.flops) // ranks * ranks
    flops, executed = (part[:whole].reshape(-1, ranks).astype(float) for part in (packs.flops, packs.executed))
    imbalance = flops.max(axis=1) / flops.mean(axis=1) - 1
    return Row(
        budget=planner.budget,
        ranks=ranks,
        window_samples=planner.window_samples,
        steps=len(imbalance),
        method=method,
        imbalance_mean=float(imbalance.mean()),
        imbalance_p99=float(np.quantile(imbalance, 0.99)),
        padding=float(1 - packs.tokens.sum() / packs.computed.sum()),
        step_time=float(executed.max(axis=1).sum() / flops.mean(axis=1).sum()),
        samples_per_s=packs.samples / packs.seconds,
    )


def rows(budget: int, ranks: list[int], window_samples: int, windows: int) -> Iterator[Row]:
    planner = mixed_planner(4 * window_samples, budget, window_samples)
    started = time.process_time()
    planned = [planner.window(k) for k in range(windows)]
    seconds = time.process_time() - started
    others = {name: method(planner, planned) for name, method in METHODS.items()}
    for size in ranks:
        yield row("planned (ours)", planner, size, ours(planner, size, planned, seconds))
        for name, packs in others.items():
            yield row(name, planner, size, packs)


def first_step_seconds(planner: Planner, position: Position, ranks: int) -> float:
    """CPU time from a position to its first step: what a resume waits for before it reads."""
    started = time.process_time()
    next(planner.steps(position, ranks))
    return time.process_time() - started


HEADER = (
    "| budget | ranks | steps | method | imbalance mean | p99 | padding | step time | samples/s |\n"
    + "|---:" * 3
    + "|---"
    + "|---:" * 5
    + "|"
)


def line(r: Row) -> str:
    return (
        f"| {r.budget:,} | {r.ranks} | {r.steps} | {r.method} | {r.imbalance_mean:.2%} | {r.imbalance_p99:.2%} "
        f"| {r.padding:.2%} | {r.step_time:.3f} | {r.samples_per_s:,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=[65_536, 32_768, 17_408])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--window-samples", type=int, default=65_536)
    parser.add_argument("--windows", type=int, default=8, help="how many are planned")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/packing.json"))
    options = parser.parse_args()
    print(HEADER)
    found = []
    for budget in options.budgets:
        for result in rows(budget, options.ranks, options.window_samples, options.windows):
            found.append(asdict(result))
            print(line(result), flush=True)
    planner = mixed_planner(10 * options.window_samples, options.budgets[0], options.window_samples)
    packs = len(planner.window(0))
    late = Position(window=1_000_000 * 64 // packs)
    resume = {f"step_{step}": first_step_seconds(planner, at, 64) for step, at in ((0, Position()), (1_000_000, late))}
    print(
        f"\nCPU seconds to the first planned step on 64 ranks, at step 0 and (window {late.window}) 1,000,000: {resume}"
    )
    about = {"machine": platform.processor() or platform.machine(), "numpy": np.__version__}
    options.out.write_text(json.dumps({"about": about, "rows": found, "resume_seconds": resume}, indent=1) + "\n")


if __name__ == "__main__":
    main()
