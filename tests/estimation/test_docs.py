"""What docs/distillation.md says of 12B is what kontext-estimate says."""

import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "distillation.md"


def of_selective(printed: str, row: str) -> float:
    """The number of a row in the column of selective checkpointing, the second."""
    (line,) = re.findall(rf"^ +{row} +(.*)$", printed, re.MULTILINE)
    return float(line.split()[1])


def test_the_cost_of_ladd_at_12b() -> None:
    command = (sys.executable, "-m", "kontext_train.estimate", "experiment=pro", "world=64")
    printed = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    text = DOCS.read_text()
    section = " ".join(text[text.index("## What a step costs") :].partition("\n## ")[0].split())
    said = re.search(
        r"and (\d+) with `objective.backward_simulation`.* (\d+\.\d) GiB at the peak of (\d+\.\d) with selective"
        r".* (\d+\.\d) GiB left, (\d+\.\d) s for a step",
        section,
    )
    assert said is not None
    rows = ("in forward passes", "total at the peak", "left", "seconds a step")
    passes, peak, left, seconds = (of_selective(printed, row) for row in rows)
    assert [float(number) for number in said.groups()] == [
        passes, round(peak, 1), 79.1, round(left, 1), round(seconds, 1)
    ]  # fmt: skip
