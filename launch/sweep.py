"""Results of a sweep: python -m launch.sweep SWEEP_DIR   (or several run folders)

Prints a table, best member first, and writes results.csv and results.png into the first folder. Members that failed or
are not done are in it as they are.
"""

import csv
import math
import sys
from pathlib import Path
from typing import Any

from launch import runs

MEASURES = ("validation/loss", "loss")  # what members are ordered by: the first that one of them has
COLUMNS = ("member", "step", "steps", "finished", *MEASURES)


def main() -> None:
    if len(sys.argv) < 2 or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    folders = [Path(a) for a in sys.argv[1:]]
    members = [run for folder in folders if folder.is_dir() for run in runs.runs_below(folder)]
    if not members:
        print(f"sweep: no run in {', '.join(map(str, folders))}", file=sys.stderr)
        sys.exit(2)
    rows = table(members)
    print(as_text(rows))
    with (folders[0] / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    draw(members, folders[0] / "results.png")
    print(f"also {folders[0]}/results.csv and results.png")


def table(members: list[Path]) -> list[dict[str, Any]]:
    """A row for each member, best first; those without a value last."""
    rows = []
    for member in members:
        now = runs.read(member)
        row: dict[str, Any] = {"member": member.name, "step": now.step, "steps": now.steps, "finished": now.finished}
        rows.append(row | {name: now.values.get(name, math.nan) for name in MEASURES})
    measure = next((m for m in MEASURES if any(not math.isnan(row[m]) for row in rows)), MEASURES[-1])
    return sorted(rows, key=lambda row: (math.isnan(row[measure]), row[measure]))


def as_text(rows: list[dict[str, Any]]) -> str:
    cells = [COLUMNS, *(tuple(_cell(row[name]) for name in COLUMNS) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def draw(members: list[Path], picture: Path) -> None:
    """The loss of every member over its steps: training as a line, validation as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    for number, member in enumerate(members):
        lines = runs.metrics(member / "metrics.jsonl", sys.maxsize)
        for name, style, label in (("loss", "-", member.name), ("validation/loss", "o", None)):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=label, linewidth=1, markersize=3)
    if axes.lines:
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
