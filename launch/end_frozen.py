"""Ends a torchrun that is frozen: end_frozen.py PID SECONDS, which launch/torchrun.sh runs beside it.

torchrun asks the head's host for news about once a second, in a call without a limit. When that host or the link to it
goes, torchrun away from the head stays in the call until TCP gives up, some 15 minutes. Its ranks notice within
parallel.timeout_s and end; but torchrun, which otherwise takes note of that ten times a second, leaves them zombies.
So one whose ranks have all been zombies for SECONDS is frozen. Waiting for others, it has no ranks; while it ends
them, one of them is alive.
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path

LOOK_S = 0.5


def main() -> None:
    torchrun, patience_s, shell = int(sys.argv[1]), float(sys.argv[2]), os.getppid()
    since = time.monotonic()
    # Of this shell's own: a number that another process has by now is not.
    while os.getppid() == shell and stat(torchrun)[1:] == [str(shell)]:
        time.sleep(LOOK_S)
        if not all_zombies(children(torchrun)):
            since = time.monotonic()
        elif time.monotonic() - since > patience_s:
            end(torchrun, patience_s)
            return


def end(torchrun: int, patience_s: float) -> None:
    where = f"launch: {socket.gethostname()}"
    why = f"all ranks of this host ended {patience_s:g} s ago and torchrun has not noticed"
    print(f"{where}: {why}: the head's host, or the link to it, is gone. Ended torchrun", file=sys.stderr, flush=True)
    os.kill(torchrun, signal.SIGKILL)  # its Python is in the call and sees no other signal


def children(parent: int) -> list[str]:
    """States of the processes that a process started and has not taken note of ending."""
    states = [stat(int(p.name)) for p in Path("/proc").glob("[0-9]*")]
    return [state for state, *of in states if of == [str(parent)]]


def all_zombies(states: list[str]) -> bool:
    return bool(states) and all(state == "Z" for state in states)


def stat(process: int) -> list[str]:
    """[state, id of the parent]; ["gone"] of one that is not there."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return ["gone"]


if __name__ == "__main__":
    main()
