"""Two hosts, each a network namespace with a name and an address of its own, and a cable that can be pulled."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launch import runs
from tests.launch import leftovers
from tests.launch.cluster import until
from tests.launch.conftest import OPTIONS, PATIENCE_S, ROOT, Straight, ranks_of, same, wait_for_step
from tests.launch.leftovers import kill
from tests.runs import SMALL

TIMEOUT_S, FROZEN_S = 20, 3
MARGIN_S = 20  # for a busy machine; the watchdog's own 12 beats are 12 s
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}


@dataclass(slots=True)
class Hosts:
    session: Path
    options: list[str] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        return f"kt{os.getpid()}"

    def link(self, state: str) -> None:
        ip("-n", f"{self.prefix}a", "link", "set", "e0", state)

    def start(self, outputs: Path, restarts: int = 0) -> list[subprocess.Popen[bytes]]:
        """launch/torchrun.sh on both."""
        own = {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, leftovers.MARK: str(self.session)}
        own |= {"NODES": "2", "RANKS": "1", "HEAD": f"{ADDRESSES['a']}:29400"}
        own |= {"MAX_RESTARTS": str(restarts), "FROZEN_S": str(FROZEN_S)}
        outputs.mkdir()
        made = []
        for host in ADDRESSES:
            command = ["nsenter", f"--net=/run/netns/{self.prefix}{host}", "unshare", "--uts", "bash", "-c"]
            script = ['hostname $0; exec bash launch/torchrun.sh "$@"', f"host-{host}", *self.options]
            with (outputs / host).open("wb") as file:
                made.append(
                    subprocess.Popen([*command, *script], env=os.environ | own, cwd=ROOT, stdout=file, stderr=file)
                )
            leftovers.started(self.session, made[-1].pid)
        return made


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts(installed: None, session: Path) -> Iterator[Hosts]:
    made = Hosts(session)
    try:
        for host in ADDRESSES:
            ip("netns", "add", f"{made.prefix}{host}")
        ends = [f"{made.prefix}{host}" for host in ADDRESSES]
        ip("link", "add", "e0", "netns", ends[0], "type", "veth", "peer", "name", "e0", "netns", ends[1])
        for host, address in ADDRESSES.items():
            ip("-n", f"{made.prefix}{host}", "link", "set", "lo", "up")
            ip("-n", f"{made.prefix}{host}", "addr", "add", f"{address}/24", "dev", "e0")
            ip("-n", f"{made.prefix}{host}", "link", "set", "e0", "up")
        yield made
    finally:
        leftovers.end_marked(session)
        leftovers.remove_namespaces(session)


@pytest.mark.slow
def test_killed_ranks_and_a_pulled_cable_end_both_with_a_reason_and_the_run_goes_on_bitwise(
    hosts: Hosts, straight: Straight, shards: Path, tmp_path: Path
) -> None:
    """At full speed, over local shards: no one else is on this network."""
    run_dir = tmp_path / "run"
    hosts.options += [*SMALL, *OPTIONS, f"parallel.timeout_s={TIMEOUT_S}", f"data.train={shards}", f"run.dir={run_dir}"]

    def said(start: str, host: str) -> str:
        return (tmp_path / start / host).read_text()

    def wait_for_start(start: str, count: int) -> None:
        """For steps that the count-th start of the ranks has made, going on from a checkpoint."""
        until(lambda: said(start, "a").count("going on from") == count, PATIENCE_S, lambda: said(start, "a"))
        newest = runs.read(run_dir)
        assert newest.checkpoint is not None
        wait_for_step(run_dir, int(newest.checkpoint.name.removeprefix("step_")) + 1)

    # A rank is killed: both hosts start theirs again. Killed once more than --max-restarts: both end, and say why.
    processes = hosts.start(tmp_path / "first", restarts=1)
    until(lambda: runs.read(run_dir).checkpoint is not None, PATIENCE_S, "no checkpoint was finished")
    kill(ranks_of(hosts.session)[1])
    wait_for_start("first", 1)
    kill(ranks_of(hosts.session)[1])
    assert [process.wait(timeout=PATIENCE_S) for process in processes] == [1, 1], said("first", "a")
    assert len(re.findall(r"rank 1, step \d+, phase .*: no sign of life", said("first", "a"))) == 2, said("first", "a")
    assert re.search(r"exitcode +: -9 .*SIGKILL", said("first", "b")), said("first", "b")

    # The cable is pulled: each host's rank has a reason of its own, and torchrun ends on both.
    processes = hosts.start(tmp_path / "second")
    wait_for_start("second", 1)
    hosts.link("down")
    bound_s = TIMEOUT_S + FROZEN_S + MARGIN_S
    until(lambda: None not in [p.poll() for p in processes], bound_s, lambda: said("second", "a") + said("second", "b"))
    assert [process.returncode for process in processes] == [1, 137], said("second", "a") + said("second", "b")
    reasons = {
        "a": r"rank 1, step \d+, phase .*: no sign of life for [\d.]+ s.* So rank 0 ends",
        "b": r"The store that torchrun keeps at 10\.77\.0\.1:\d+ is gone or frozen: .* So rank 1 ends",
    }
    for host, reason in reasons.items():
        assert re.search(reason, said("second", host)), said("second", host)
    assert f"launch: host-b: all ranks of this host ended {FROZEN_S} s ago" in said("second", "b")

    hosts.link("up")
    processes = hosts.start(tmp_path / "third")
    assert [process.wait(timeout=PATIENCE_S) for process in processes] == [0, 0], said("third", "a")
    assert "going on from" in said("third", "a")
    assert same(run_dir, straight.run_dir)
