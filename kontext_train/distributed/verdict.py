"""Which rank is to blame, decided from what every rank says of itself. Pure functions; distributed/watchdog.py acts.

A rank says where it is (step, phase) and for how long, once a heartbeat. All ranks come to the same places in the same
order, so the number of places a rank has come to tells who is ahead and who is behind. Rules, first that holds:

1. Silent: no new beat of a rank for PATIENT beats; QUICK beats are enough once a collective has failed somewhere. Its
   process was killed, crashed or froze, or its machine is gone. Beats come from a thread of their own: a rank that
   computes, compiles, reads or waits goes on beating.
2. Behind: a rank has stood at a place for timeout_s, and a rank that is further on has stood for timeout_s too.
3. Absent: a collective has failed, nobody is silent, and 2 x QUICK beats later some ranks have not seen one fail. They
   stood at the same place without taking part.
4. Nobody: every rank's collective failed. The network, or a device, is to blame.

What is slow on all ranks at once (the first compile, a save, a validation) is never behind. Time is counted in beats of
the rank that tells, not in seconds of a clock, so a job that is suspended and goes on ages nothing.
"""

from dataclasses import dataclass

QUICK, PATIENT = 3, 12  # beats; PATIENT must be less than timeout_s, or a dead rank looks like one behind


@dataclass(slots=True)
class Beat:
    """What a rank tells of itself."""

    number: int = 0  # counts up with every beat
    moves: int = 0  # places it has come to
    step: int = 0  # updates made so far
    phase: str = "start"
    stood: int = 0  # beats since it came to this place, or since its collective failed there
    line: str = ""  # of Python, that its main thread is in
    failed: str = ""  # how its collective failed, from then on
    left: bool = False  # it is done, by itself or by a verdict

    def place(self) -> str:
        return f"step {self.step}, phase {self.phase}" + (f" ({self.line})" if self.line else "")


@dataclass(slots=True)
class Verdict:
    ranks: list[int]  # to blame; empty if nobody is
    text: str


def silent(beats: dict[int, Beat], missed: dict[int, int], failed: bool, beat_s: float) -> Verdict | None:
    """Rule 1. missed: beats since a rank's last one, by rank; failed: a collective has failed somewhere."""
    patience = QUICK if failed else PATIENT
    ranks = [rank for rank, beat in beats.items() if not beat.left and missed[rank] >= patience]
    if not ranks:
        return None
    reason = (
        f"no sign of life for {missed[ranks[0]] * beat_s:.3g} s. The process was killed (by the kernel if the host ran "
        "out of memory: see dmesg), crashed (see its own output) or froze, or its machine is gone"
    )
    alive = [rank for rank in beats if rank not in ranks]
    first = max(alive, key=lambda rank: beats[rank].moves)
    return Verdict(ranks, f"{_named(ranks, beats)}: {reason}. {_named([first], beats)}, is alive")


def judge(beats: dict[int, Beat], missed: dict[int, int], beat_s: float, timeout_s: float) -> Verdict | None:
    """All rules, on the last beat of every rank."""
    failed = [rank for rank, beat in beats.items() if beat.failed and not beat.left]
    dead = silent(beats, missed, bool(failed), beat_s)
    return dead or _behind(beats, beat_s, timeout_s) or _absent(beats, failed)


def _behind(beats: dict[int, Beat], beat_s: float, timeout_s: float) -> Verdict | None:
    here = {rank: beat for rank, beat in beats.items() if not beat.left}
    last = min((beat.moves for beat in here.values()), default=0)
    stuck = {rank: beat for rank, beat in here.items() if beat.stood * beat_s > timeout_s}
    ranks = [rank for rank, beat in stuck.items() if beat.moves == last]
    waiting = [rank for rank, beat in stuck.items() if beat.moves > last]
    if not ranks or not waiting:
        return None
    reason = (
        f"has not moved for {beats[ranks[0]].stood * beat_s:.3g} s (parallel.timeout_s={timeout_s:g}) while "
        f"{_named(waiting[:1], beats)}, waits ({len(waiting)} in all). The stack of rank {ranks[0]} is in its output"
    )
    return Verdict(ranks, f"{_named(ranks, beats)}: {reason}")


def _absent(beats: dict[int, Beat], failed: list[int]) -> Verdict | None:
    if not failed or max(beats[rank].stood for rank in failed) < 2 * QUICK:
        return None
    first = max(failed, key=lambda rank: beats[rank].stood)
    how = f"rank {first}, {beats[first].place()}: {beats[first].failed}"
    others = [rank for rank in beats if rank not in failed]
    last = min((beats[rank].moves for rank in others), default=0)
    ranks = [rank for rank in others if beats[rank].moves == last]
    if not ranks:
        return Verdict([], f"{how}. No rank is dead or behind: look at the network and the devices")
    return Verdict(ranks, f"{_named(ranks, beats)}: took no part in a collective, which failed on {how}")


def _named(ranks: list[int], beats: dict[int, Beat]) -> str:
    shown = "; ".join(f"rank {rank}, {beats[rank].place()}" for rank in ranks[:4])
    return shown + (f" and {len(ranks) - 4} more ranks" if len(ranks) > 4 else "")
