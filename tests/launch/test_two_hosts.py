"""Two hosts, each a network namespace with a name and an address of its own, and a cable that can be pulled."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch.cluster import environment, kill, processes, until
from tests.launch.conftest import OPTIONS, ROOT, Straight
from tests.launch.test_slurm import same, wait_for_step
from tests.runs import SMALL

TIMEOUT_S = 20
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}


@dataclass(slots=True)
class Hosts:
    prefix: str

    def link(self, state: str) -> None:
        ip("-n", f"{self.prefix}a", "link", "set", "e0", state)

    def start(self, host: str, output: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """launch/torchrun.sh on a host."""
        command = ["nsenter", f"--net=/run/netns/{self.prefix}{host}", "unshare", "--uts", "bash", "-c"]
        script = ['hostname $0; exec bash launch/torchrun.sh "$@"', f"host-{host}", *arguments]
        own = {"PYTHONPATH": str(ROOT), "NODES": "2", "RANKS": "1", "MAX_RESTARTS": "0", "RUN_ID": self.prefix}
        env = os.environ | own | {"HEAD": f"{ADDRESSES['a']}:29400", "PYTHON": sys.executable}
        with output.open("wb") as file:
            return subprocess.Popen([*command, *script], env=env, cwd=ROOT, stdout=file, stderr=file)

    def end_processes(self) -> None:
        for pid in processes():
            if environment(pid).get("RUN_ID") == self.prefix:
                kill(pid)

    def end(self) -> None:
        self.end_processes()
        for host in ADDRESSES:
            with suppress(subprocess.CalledProcessError):  # it was not made
                ip("netns", "del", f"{self.prefix}{host}")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts(installed: None) -> Iterator[Hosts]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root, and this is not root")
    made = Hosts(f"kt{os.getpid()}")
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
        made.end()


@pytest.mark.slow
def test_a_pulled_cable_ends_both_with_a_reason_and_the_run_goes_on_after(
    hosts: Hosts, straight: Straight, shards: Path, tmp_path: Path
) -> None:
    """At full speed, over local shards: no one else is on this network."""
    options = (*SMALL, *OPTIONS, f"parallel.timeout_s={TIMEOUT_S}", f"data.train={shards}", f"run.dir={tmp_path}/run")
    first = [hosts.start(host, tmp_path / f"first.{host}", *options) for host in ADDRESSES]
    wait_for_step(tmp_path / "run", 6)
    hosts.link("down")

    def said(host: str) -> str:
        return (tmp_path / f"first.{host}").read_text()

    reasons = {
        "a": r"rank 1, step \d+, phase .*: no sign of life for [\d.]+ s.* So rank 0 ends",
        "b": r"The store that torchrun keeps at 10\.77\.0\.1:\d+ is gone or frozen: .* So rank 1 ends",
    }
    # The ranks' own reasons, not the collective's timeout, which comes later and says less.
    until(lambda: all(re.search(reasons[h], said(h)) for h in ADDRESSES), 60, lambda: said("a") + said("b"))
    assert first[0].wait(timeout=60) == 1
    hosts.end_processes()  # torchrun on b may hang in a read from a; on Slurm, srun ends it after a minute

    hosts.link("up")
    second = [hosts.start(host, tmp_path / f"second.{host}", *options) for host in ADDRESSES]
    assert [process.wait(timeout=200) for process in second] == [0, 0], (tmp_path / "second.a").read_text()
    assert "going on from" in (tmp_path / "second.a").read_text()
    assert same(tmp_path / "run", straight.run_dir)
