"""How a process of a pool ends."""

import multiprocessing
import os
import signal
import threading


def end_with_parent(on_interrupt: signal.Handlers) -> None:
    """In a process of a pool: what Ctrl-C does; and an end with its parent's, for else it would wait for ever."""
    signal.signal(signal.SIGINT, on_interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # a parent may hold it back until here
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
