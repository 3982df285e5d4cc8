"""run.dir/heartbeat.json: where the run is, for a watchdog outside of it. docs/health.md says how to read it.

A thread of rank 0 writes it, so that a file system that hangs does not hold up the loop, and a loop that hangs does not
hold up the file: `written` tells that the process lives, `entered` since when it has been in its phase.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EVERY_S = 5.0


@contextmanager
def heartbeat(file: Path | None, every_s: float = EVERY_S) -> Iterator["Heartbeat"]:
    """Beats inside, from phase `start` to `end`, `stopped` (by a signal, to be resumed) or `failed`. None: no file."""
    beats = Heartbeat(file, every_s)
    last = "failed"
    try:
        yield beats
        last = "end"
    except SystemExit:  # ranks agreed to stop
        last = "stopped"
        raise
    finally:
        beats.close(last)


class Heartbeat:
    def __init__(self, file: Path | None, every_s: float) -> None:
        self.file, self.every_s = file, every_s
        self.here = (0, "start", time.time())
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        if file is not None:
            self.thread.start()

    def at(self, step: int, phase: str) -> None:
        """The loop comes to a phase. step: updates made so far."""
        self.here = (step, phase, time.time())

    def close(self, phase: str) -> None:
        self.at(self.here[0], phase)
        self.ended.set()
        if self.file is not None:
            self.thread.join(EVERY_S)  # unless its file system hangs

    def _beat(self) -> None:
        told = last = False
        while True:
            try:
                self._write()
                told = False
            except OSError as error:  # a run does not end for this
                if not told:
                    print(f"kontext-train: {self.file} cannot be written: {error}", file=sys.stderr)
                told = True
            if last:
                return
            last = self.ended.wait(self.every_s)

    def _write(self) -> None:
        assert self.file is not None
        step, phase, entered = self.here
        process = {"host": socket.gethostname(), "pid": os.getpid()}
        beat = {"step": step, "phase": phase, "entered": entered, "written": time.time()} | process
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(f"{self.file.name}.partial")
        partial.write_text(json.dumps(beat))
        partial.replace(self.file)
