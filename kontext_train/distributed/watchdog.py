"""Ends a run that one rank has broken, on every rank, with an error that names the rank, its step and its phase.

The loop notes where it is: `watch.at(step, phase)`, one attribute written, nothing waited for. A thread of each rank
tells it to a store (torchrun's, or rank 0's) every heartbeat. Rank 0 reads all of it and judges (distributed/verdict.py
has the rules); every rank reads the verdict and rank 0's beat, so rank 0 is watched by all. A rank that raises is its
own judge: it publishes rank, step, phase and error before the error goes on, out of memory with what the device held. A
rank whose collective failed first waits to be told why.

A verdict ends every process with status 1, from the thread: the main thread may be stuck in a collective for good.
Nothing here depends on the backend.
"""

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from kontext_train.distributed.config import ParallelConfig
from kontext_train.distributed.memory import is_out_of_memory, out_of_memory
from kontext_train.distributed.reduce import any_rank, from_main
from kontext_train.distributed.setup import World
from kontext_train.distributed.verdict import PATIENT, QUICK, Beat, Verdict, judge, silent

TICKS = 10  # in a beat: a place is told within one of them, so that a rank that dies soon after is known there
T = TypeVar("T")


@contextmanager
def watchdog(world: World, config: ParallelConfig) -> Iterator["Watch"]:
    """Watch over the ranks of a process group. A single process is only told where it failed."""
    watch = Watch(world, config)
    try:
        yield watch
    except SystemExit:  # ranks agreed to stop
        watch.leave()
        raise
    except BaseException as error:
        watch.fail(error)
        raise
    watch.leave()


class Watch:
    """One rank's view. What the main thread writes is above `told`; the rest is the thread's."""

    def __init__(self, world: World, config: ParallelConfig) -> None:
        self.world, self.beat_s, self.timeout_s = world, config.heartbeat_s, config.timeout_s
        self.snapshot: Path | None = None  # where to put one of the device's memory, if its history is recorded
        self.here = (0, 0, "start")  # places come to, step, phase
        self.error: BaseException | None = None  # that ended the loop here
        self.failed = ""  # how a collective failed here
        self.verdict: Verdict | None = None  # on an error that began here
        self.leaving = False
        self.told, self.wake = threading.Event(), threading.Event()
        self.main = threading.get_ident()
        if world.size == 1:
            return
        faulthandler.enable()  # a crash shows where
        # A name of this run's own: a torchrun that restarts ranks may keep its store, and with it the last verdict.
        store: Any = _get_default_store()
        self.store = dist.PrefixStore(f"watchdog/{from_main(uuid4().hex)}", store.clone())  # a connection of its own
        self.store.set_timeout(timedelta(seconds=PATIENT * self.beat_s))
        self.store_is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.own = Beat()
        self.store.set(f"beat/{world.rank}", json.dumps(asdict(self.own)))
        if world.is_main:
            self.store.set("verdict", "")
        any_rank(False)  # all keys are there
        watched = range(world.size) if world.is_main else [0]
        self.beats, self.missed = {rank: Beat() for rank in watched}, dict.fromkeys(watched, 0)
        self.caller = ThreadPoolExecutor(1, "watchdog-store")  # a store whose host froze never answers
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    # -- the main thread -------------------------------------------------------------------------------------------

    def at(self, step: int, phase: str) -> None:
        """This rank comes to a place; every rank must come to the same ones. step: updates made so far."""
        self.here = (self.here[0] + 1, step, phase)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks, once. Returns with a note added to the error, or the thread ends this process."""
        if error is self.error:
            return
        self.error = error
        _, step, phase = self.here
        where = f"rank {self.world.rank}, step {step}, phase {phase}"
        reason = f". {out_of_memory(self.world.device, self.snapshot)}" if is_out_of_memory(error) else ""
        if self.world.size > 1 and not reason and _from_a_collective(error):
            self.failed = _first_line(error)
            self.wake.set()
            self.thread.join()  # ends this process with the reason
        error.add_note(f"kontext-train: {where}{reason}")
        if self.world.size > 1:
            self.verdict = Verdict([self.world.rank], f"{where}: {_first_line(error)}{reason}")
            self.wake.set()
            self.told.wait(PATIENT * self.beat_s)

    def leave(self) -> None:
        """This rank is done. Rank 0 stays until all are: its process may host the store."""
        if self.world.size > 1:
            self.at(self.here[1], "end")
            self.leaving = True
            self.wake.set()
            self.thread.join(self.timeout_s)
            self.caller.shutdown(wait=False)

    # -- the thread ------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            verdict = self._until_verdict()
        except (RuntimeError, TimeoutError) as error:
            if self.leaving:
                return  # rank 0 did not wait for this one
            self._say(self._store_gone(error))
        else:
            if verdict is None:
                return  # every rank is done
            if self.verdict is None:
                self._say(verdict)
            with suppress(RuntimeError, TimeoutError):  # the store may go with rank 0
                self._let_others_read(verdict)
        if self.verdict is not None:
            self.told.set()
            time.sleep(PATIENT * self.beat_s)  # the main thread has an error of its own, and should have ended by now
        os._exit(1)

    def _until_verdict(self) -> Verdict | None:
        while True:
            self._wait_a_beat()
            verdict = self._beat()
            if verdict is not None:
                return verdict
            if self.own.left and (not self.world.is_main or self._others_left()):
                return None

    def _wait_a_beat(self) -> None:
        for _ in range(TICKS):
            if self.wake.wait(self.beat_s / TICKS):
                break
            if self.here[0] != self.own.moves:
                self._within_patience(self._tell)
        self.wake.clear()

    def _beat(self) -> Verdict | None:
        """Tell and read once; the verdict, if there is one now."""
        answer, beats = self._within_patience(self._exchange)
        for rank, beat in beats.items():
            self.missed[rank] = self.missed[rank] + 1 if beat.number == self.beats[rank].number else 0
        self.beats = beats
        if answer is not None:
            return answer
        found = self.verdict
        if found is None and self.world.is_main:
            found = judge(self.beats, self.missed, self.beat_s, self.timeout_s)
        elif found is None:
            both = {self.world.rank: self.own, 0: self.beats[0]}
            found = silent(both, {self.world.rank: 0, 0: self.missed[0]}, bool(self.failed), self.beat_s)
        return self._within_patience(self._publish, found) if found is not None else None

    def _tell(self) -> None:
        moves, step, phase = self.here
        failed_now = bool(self.failed) != bool(self.own.failed)
        stood = 0 if moves != self.own.moves or failed_now else self.own.stood + 1
        self.own = Beat(self.own.number + 1, moves, step, phase, stood, self._line(), self.failed, self.leaving)
        self.store.set(f"beat/{self.world.rank}", json.dumps(asdict(self.own)))

    def _line(self) -> str:
        frame = sys._current_frames().get(self.main)
        if frame is None or self.failed:  # it waits for the verdict
            return ""
        return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"

    def _exchange(self) -> tuple[Verdict | None, dict[int, Beat]]:
        self._tell()
        verdict, *beats = self.store.multi_get(["verdict", *(f"beat/{rank}" for rank in self.beats)])
        read = {rank: Beat(**json.loads(beat)) for rank, beat in zip(self.beats, beats, strict=True)}
        return (Verdict(**json.loads(verdict)) if verdict else None), read

    def _publish(self, found: Verdict) -> Verdict:
        """The first verdict published is everyone's."""
        return Verdict(**json.loads(self.store.compare_set("verdict", "", json.dumps(asdict(found)))))

    def _within_patience(self, call: Callable[..., T], *arguments: object) -> T:
        future = self.caller.submit(call, *arguments)
        for _ in range(PATIENT):
            if wait([future], self.beat_s).done:
                return future.result()
        raise TimeoutError("it does not answer")

    def _others_left(self) -> bool:
        return all(beat.left for rank, beat in self.beats.items() if rank != self.world.rank)

    def _let_others_read(self, verdict: Verdict) -> None:
        """The one to blame ends first, so that torchrun names it. The host of the store ends last."""
        hosts = self.world.is_main and not self.store_is_torchruns
        self.leaving = True  # tells the host that this rank has read
        for _ in range(QUICK if hosts else 1):
            _, self.beats = self._within_patience(self._exchange)
            if (hosts and self._others_left()) or (not hosts and self.world.rank in verdict.ranks):
                return
            time.sleep(self.beat_s)

    def _store_gone(self, error: Exception) -> Verdict:
        host = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if self.store_is_torchruns:
            return Verdict([], f"The store that torchrun keeps at {host} is gone or frozen: {_first_line(error)}")
        gone = f"its process, which keeps the store of all ranks at {host}, is gone or frozen"
        return Verdict([0], f"rank 0, {self.beats[0].place()}: {gone}. This rank is at {self.own.place()}")

    def _say(self, verdict: Verdict) -> None:
        stack = ""
        if self.world.rank in verdict.ranks:
            frames = traceback.format_stack(sys._current_frames().get(self.main), limit=30)
            stack = f"The main thread of rank {self.world.rank} is here:\n{''.join(frames)}"
        sys.stderr.write(f"\n{stack}kontext-train: {verdict.text}. So rank {self.world.rank} ends\n")
        sys.stderr.flush()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _from_a_collective(error: BaseException) -> bool:
    """Whether it may be the echo of what happened on another rank. gloo raises bare RuntimeErrors."""
    return any(isinstance(e, dist.DistError) or "gloo" in str(e) for e in _chain(error))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
