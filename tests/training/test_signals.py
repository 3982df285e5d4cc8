"""A request to stop is noted, and no program that the run executes dies of it."""

import os
import signal
import subprocess
import threading
import time

import pytest

from kontext_train.training.signals import StopRequest, stop_on_signals

SLEEPS = ["sleep", "60"]


def noted(request: StopRequest) -> str | None:
    """Its name, which is neither pending nor noted while another thread of a busy machine has yet to hand it on.

    Each sleep lets go of the interpreter's lock and asks for signals again; a loop alone may never see one (3.11).
    """
    end = time.monotonic() + 10
    while request.name is None and time.monotonic() < end:
        time.sleep(0.01)
    return request.name


def test_a_program_of_the_run_survives_the_signal_that_stops_the_run() -> None:
    """As Slurm sends it: to each process. The control is a program that started before."""
    before = subprocess.Popen(SLEEPS)
    with stop_on_signals() as request:
        inside = subprocess.Popen(SLEEPS)
        try:
            time.sleep(0.2)  # until both have executed theirs
            assert request.name is None
            for pid in (before.pid, inside.pid, os.getpid()):
                os.kill(pid, signal.SIGUSR1)
            assert before.wait(10) == -signal.SIGUSR1
            assert noted(request) == "SIGUSR1"
            with pytest.raises(subprocess.TimeoutExpired, match="timed out"):
                inside.wait(0.3)
        finally:
            inside.kill()
            inside.wait()
    assert not {signal.SIGUSR1} & (signal.sigpending() | signal.pthread_sigmask(signal.SIG_BLOCK, []))


def test_an_older_thread_may_take_the_signal() -> None:
    go_on = threading.Event()
    older = threading.Thread(target=go_on.wait)
    older.start()
    try:
        with stop_on_signals() as request:
            assert older.ident is not None
            signal.pthread_kill(older.ident, signal.SIGUSR1)
            assert noted(request) == "SIGUSR1"
    finally:
        go_on.set()
        older.join()


def test_what_interrupts_twice_interrupts_at_once() -> None:
    with stop_on_signals() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            signal.raise_signal(signal.SIGINT)
