"""Ranks killed at random moments of a save, fifty times."""

import random
import time
from pathlib import Path

import pytest

from kontext_train.training.checkpoint import complete_checkpoints
from tests.runs import in_processes, start
from tests.training.tiny_run import train_for_ever

RANKS, KEEP = 2, 2


def notes(folder: Path, rank: int) -> list[list[str]]:
    """Whole lines of a rank's log; a kill may tear the last of a session."""
    file = folder / f"log.{rank}"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [line.split() for line in lines if line.endswith("\n") and len(line.split()) == 3]


def sessions(folder: Path) -> int:
    return min(sum(what == "resumed" for what, _, _ in notes(folder, rank)) for rank in range(RANKS))


def kill_once(folder: Path, rng: random.Random) -> None:
    """One rank, and the other some time later, as torchrun would; or both at once."""
    before = sessions(folder)
    ranks = start(RANKS, train_for_ever, folder / "checkpoints", KEEP, 10**9)
    while sessions(folder) == before:
        assert all(rank.is_alive() for rank in ranks), [rank.exitcode for rank in ranks]
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.25))
    rng.shuffle(ranks)
    for rank in ranks:
        rank.kill()
        time.sleep(rng.choice([0, 0.02, 0.1]))
    for rank in ranks:
        rank.join()


@pytest.mark.slow
def test_whatever_moment_ranks_are_killed_at_the_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    rng = random.Random(0)
    in_saves = 0
    for _ in range(50):
        kill_once(tmp_path, rng)
        folders = [path for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()]
        whole = complete_checkpoints(tmp_path / "checkpoints")
        in_saves += len(folders) > len(whole)
        assert len(folders) <= KEEP + 2, "one may be half written, and one half removed"
    assert in_saves >= 10, "the kills fell between saves"
    steps = {int(step) for _, step, _ in notes(tmp_path, 0)}
    last = max(steps) + max(steps) % 2
    in_processes(RANKS, train_for_ever, tmp_path / "checkpoints", KEEP, last)
    (tmp_path / "straight").mkdir()
    in_processes(RANKS, train_for_ever, tmp_path / "straight" / "checkpoints", KEEP, last)
    for rank in range(RANKS):
        expected = {step: digest for what, step, digest in notes(tmp_path / "straight", rank) if what == "made"}
        cut = notes(tmp_path, rank)
        assert {step for what, step, _ in cut if what == "made"} == expected.keys(), "steps were left out"
        resumed = [int(step) for what, step, _ in cut if what == "resumed"]
        assert resumed == sorted(resumed)
        assert resumed[-1] >= 20
        assert all(digest == expected[step] for what, step, digest in cut if step != "0"), "numbers differ"
    assert len(set(expected.values())) == last, "every step has numbers of its own"
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        f"step_{step:08d}" for step in (last - 2, last)
    ]
