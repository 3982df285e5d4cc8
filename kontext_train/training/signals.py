"""Signals note a request to stop; the loop asks for it at a step boundary.

SIGUSR1 goes to every process of a Slurm step, and a program that a rank executes (a compiler and its workers) would die
of it: a handler does not survive exec, a blocked signal does. So the rank blocks SIGUSR1 and looks whether it is
pending. The handler is for threads older than the block.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    _noted: str | None = None

    @property
    def name(self) -> str | None:
        """The name of the signal that asked this process to stop, once one did."""
        if self._noted is None and signal.SIGUSR1 in signal.sigpending():
            return "SIGUSR1"
        return self._noted

    def note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._noted == "SIGINT":
            raise KeyboardInterrupt  # asked twice: at once
        self._noted = signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch SIGTERM, SIGUSR1 and SIGINT inside; the former handlers and blocked signals are back afterwards."""
    request = StopRequest()
    caught = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    former = {number: signal.signal(number, request.note) for number in caught}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield request
    finally:
        signal.sigtimedwait({signal.SIGUSR1}, 0)  # a pending one is done with
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in former.items():
            signal.signal(number, handler)
