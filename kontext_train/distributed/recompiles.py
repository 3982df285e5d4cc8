"""Recompiling reported, not suffered: how many graphs torch.compile made, how long it took, and why it made more.

A function is compiled again whenever a guard of its graphs fails: another shape, another grad mode, another object
inlined. A few graphs are meant (one for each way a block is called); a run that keeps compiling is slower than eager.
Numbers and reasons come from torch's own record of compilations, `torch._dynamo.utils.get_compilation_metrics`.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import CompilationMetrics, get_compilation_metrics

# A kind of block is called with and without gradients, by trained and by frozen roles, in packs of the padded length
# and of others; all share its code, and behind a checkpoint all kinds of block share one.
GRAPHS_PER_FUNCTION = 16
REMEDY = (
    "Keep constant what a block is given (shapes, Python values, grad mode), mark as dynamic what must vary, or set "
    "parallel.compile=false. TORCH_LOGS=recompiles tells more"
)


@dataclass(slots=True)
class Graphs:
    """Of one function."""

    graphs: int = 0
    reasons: list[str] = field(default_factory=list)  # for each graph after the first


class Recompiles:
    """Counts compilations from its making on; `metrics` at each log step, which also reports a storm, once."""

    def __init__(self, graphs_per_function: int = GRAPHS_PER_FUNCTION) -> None:
        """graphs_per_function: how many a kind of block needs: one for each way it is called (grad mode, role)."""
        self.allowed = graphs_per_function
        self.seen = {_identity(m) for m in get_compilation_metrics()}
        self.seconds, self.functions = 0.0, defaultdict[str, Graphs](Graphs)
        self.reported = False

    def metrics(self) -> dict[str, float]:
        """compile/graphs and compile/seconds so far, if any. torch remembers 64 compilations: call it before more."""
        for compilation in get_compilation_metrics():
            if _identity(compilation) not in self.seen:
                self.seen.add(_identity(compilation))
                self._add(compilation)
        if not self.reported and any(f.graphs > self.allowed for f in self.functions.values()):
            self.reported = True
            print(f"\nkontext-train: {self.storm()}", file=sys.stderr)
        graphs = sum(f.graphs for f in self.functions.values())
        return {"compile/graphs": float(graphs), "compile/seconds": self.seconds} if graphs else {}

    def storm(self) -> str:
        """Each function with more graphs than allowed, and why it was compiled again."""
        many = {name: f for name, f in self.functions.items() if f.graphs > self.allowed}
        told = "; ".join(f"{name} has {f.graphs}, because {_listed(f.reasons)}" for name, f in many.items())
        return f"torch.compile keeps compiling: {self.allowed} graphs of a function were expected, {told}. {REMEDY}"

    def _add(self, compilation: CompilationMetrics) -> None:
        self.seconds += (compilation.duration_us or 0) / 1e6
        if compilation.has_guarded_code:  # others are backward graphs, compiled when first run, and failures
            function = self.functions[_function(compilation)]
            function.graphs += 1
            if compilation.recompile_reason:
                function.reasons.append(compilation.recompile_reason)


def explained(compiled: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A compiled function whose error at torch's recompile limit says its name, how many graphs, why, and what to do.

    torch raises that error for fullgraph=True only; without it, it goes on uncompiled.
    """

    @wraps(compiled)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return compiled(*arguments, **options)
        except FailOnRecompileLimitHit as error:
            raise RuntimeError(_limit_hit(name)) from error

    return call


def _limit_hit(name: str) -> str:
    past = get_compilation_metrics()
    frame = _frame(next(m for m in reversed(past) if m.fail_type == FailOnRecompileLimitHit.__name__))
    same = {m.compile_id: m for m in past if _frame(m) == frame and m.is_forward is not False}.values()
    reasons = [m.recompile_reason for m in same if m.recompile_reason]
    graphs = sum(bool(m.has_guarded_code) for m in same)
    return f"{name} has {graphs} graphs, torch's limit, because {_listed(reasons)}. {REMEDY}"


def _identity(compilation: CompilationMetrics) -> tuple[Any, ...]:
    return compilation.compile_id, compilation.is_forward, compilation.start_time_us


def _frame(compilation: CompilationMetrics) -> str:
    """What is compiled: of the id "3/1", the 3."""
    return (compilation.compile_id or "").split("/")[0]


def _function(compilation: CompilationMetrics) -> str:
    return f"{compilation.co_name} ({os.path.basename(compilation.co_filename or '')}:{compilation.co_firstlineno})"


def _listed(reasons: Iterable[str]) -> str:
    """Reasons without the ids of graphs, most frequent first, at most five."""
    counts: dict[str, int] = defaultdict(int)
    for reason in reasons:
        counts[" ".join(reason.split(": ", 1)[-1].split())] += 1
    ordered = sorted(counts, key=lambda reason: -counts[reason])
    told = ", ".join(f"{reason} ({counts[reason]} x)" for reason in ordered[:5])
    return told + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "") or "of nothing torch tells"
