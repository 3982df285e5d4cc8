"""Signals set a flag; the loop asks for it at a step boundary."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """The name of the signal that asked this process to stop, once one did."""

    name: str | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt  # asked twice: at once
        self.name = signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch SIGTERM, SIGUSR1 and SIGINT inside; the former handlers are back afterwards."""
    request = StopRequest()
    caught = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    former = {number: signal.signal(number, request.note) for number in caught}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
