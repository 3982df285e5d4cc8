"""What a demonstration must show, beside what it measured."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bar:
    name: str
    value: float
    limit: float
    at_least: bool  # or at most

    @property
    def met(self) -> bool:
        return bool(self.value >= self.limit if self.at_least else self.value <= self.limit)  # of NumPy's numbers too


def at_least(name: str, value: float, limit: float) -> Bar:
    return Bar(name, value, limit, at_least=True)


def at_most(name: str, value: float, limit: float) -> Bar:
    return Bar(name, value, limit, at_least=False)


def table(bars: Sequence[Bar]) -> str:
    """Markdown."""
    lines = ["| | measured | bar | |", "|---|---|---|---|"]
    for bar in bars:
        sign, verdict = ("≥", "≤")[not bar.at_least], ("missed", "met")[bar.met]
        lines.append(f"| {bar.name} | {bar.value:.4g} | {sign} {bar.limit:.4g} | {verdict} |")
    return "\n".join(lines) + "\n"
