"""Starts a script of launch/ with a stand-in for Python, which notes what would run, and can hang and fail."""

import json
import os
import subprocess
from pathlib import Path

from tests.launch.cluster import until
from tests.launch.conftest import ROOT
from tests.launch.leftovers import command_line

STAND_IN = """#!/usr/bin/env bash
python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@" >> "$LOG"
case " $* " in
  *" ${HANGS:-nothing} "*) sleep 600 & echo $! > "$LOG.sleeper"; wait ;;
  *" ${FAILS:-nothing} "*) until [ -s "$LOG.sleeper" ]; do sleep 0.05; done; exit 3 ;;
esac
touch "$OUT/table.md"
"""


def demo(script: str, folder: Path, **env: str | Path) -> tuple[int, list[list[str]]]:
    """Exit status, and the arguments of each start of Python.

    env: HANGS and FAILS are arguments: what is started with the first hangs, and then what has the second fails.
    """
    stand_in = folder / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    given = {"PYTHON": stand_in, "OUT": folder / "out", "LOG": folder / "log", **env}
    # not through pipes: what is left running would hold them open
    with (folder / "output").open("wb") as output:
        command = ["bash", str(ROOT / "launch" / script)]
        status = subprocess.run(
            command,
            env=os.environ | {name: str(value) for name, value in given.items()},
            stdout=output,
            stderr=output,
            timeout=100,
        ).returncode
    return status, [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def options(start: list[str], module: str) -> list[str]:
    """What a module was started with."""
    return start[start.index(module) + 1 :]


def assert_ended(folder: Path) -> None:
    """That what hung does not run any more."""
    sleeper = int((folder / "log.sleeper").read_text())
    until(lambda: not command_line(sleeper), 10, "the other lane is left running")
