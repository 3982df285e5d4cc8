"""A real Slurm on this host: munged, slurmctld and one slurmd for each node, on loopback, all of it below one folder.

Every daemon is noted as a process of ours and ended as one; nothing of the system's own configuration is touched.
"""

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.launch import leftovers
from tests.launch.leftovers import command_line, environment, kill, parent, processes

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={base}/munge/socket,cred_expire=5
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
MessageTimeout=5
SlurmdTimeout=10
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL DefaultTime=10 PriorityTier=2 PreemptMode=OFF
"""


class Cluster:
    def __init__(self, nodes: int, session: Path) -> None:
        """session: tests.launch.leftovers says what it is."""
        self.session, self.base = session, session / "slurm"
        self.base.mkdir(mode=0o755)
        for name in ("munge", "state", "spool", "log"):
            (self.base / name).mkdir(mode=0o755)
        (self.base / "munge.key").write_bytes(os.urandom(128))
        (self.base / "munge.key").chmod(0o400)
        host, port = socket.gethostname().split(".")[0], _free_ports(nodes + 1)
        ports = {"port": port, "first": port + 1, "last": port + nodes}
        (self.base / "slurm.conf").write_text(CONFIG.format(host=host, base=self.base, nodes=nodes, **ports))
        # Without it slurmd looks for a mounted cgroup file system and stops where there is none.
        (self.base / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self.env = os.environ | {"SLURM_CONF": str(self.base / "slurm.conf"), leftovers.MARK: str(session)}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]

    def start(self) -> None:
        m = self.base / "munge"
        files = [f"--{k}={m}/{k.split('-')[0]}" for k in ("pid-file", "log-file", "seed-file")]
        self._daemon("munged", "-F", "--force", f"--key-file={self.base}/munge.key", f"--socket={m}/socket", *files)
        until(lambda: (m / "socket").is_socket(), 20, self.logs)
        self._daemon("slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        until(lambda: self.states() == ["idle"] * len(self.nodes), 30, self.logs)

    def logs(self) -> str:
        return "\n".join(f"{file.name}: {file.read_text()[-2000:]}" for file in (self.base / "log").iterdir())

    def start_node(self, node: str) -> None:
        (self.base / "spool" / node).mkdir(exist_ok=True)
        self._daemon("slurmd", "-D", "-N", node, name=node)

    def states(self) -> list[str]:
        return self("sinfo", "-h", "-N", "-p", "low", "-o", "%T", check=False).split()

    def kill_node(self, node: str) -> None:
        """As if its power were cut: the daemon and all that it started, at once."""
        daemon = self.daemons.pop(node)
        for pid in [daemon.pid, *self._processes(node)]:
            kill(pid)
        daemon.wait()

    def __call__(self, *command: str, check: bool = True) -> str:
        try:
            done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, timeout=20)
        except subprocess.TimeoutExpired:
            assert not check, f"{command} does not answer"
            return ""
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        words = self("scontrol", "show", "job", "--oneliner", number, check=False).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def finish(self, number: str, timeout_s: float) -> dict[str, str]:
        """The job once it has ended, however it ended."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(lambda: self.job(number).get("JobState") in ended, timeout_s, lambda: f"not ended: {self.job(number)}")
        return self.job(number)

    def stop(self) -> None:
        """Cancel what is queued (a job may queue itself again while it ends), then end the daemons."""
        for _ in range(100):
            queued = self("squeue", "-h", "-o", "%A", check=False).split() if "slurmctld" in self.daemons else []
            if not queued:
                break
            self("scancel", *queued, check=False)
            time.sleep(0.2)
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        left = [pid for node in self.nodes for pid in self._processes(node)]
        for pid in left:
            kill(pid)
        assert not left, f"{len(left)} processes of jobs outlived their job"

    def _daemon(self, program: str, *arguments: str, name: str = "") -> None:
        name = name or program
        with (self.base / "log" / f"{name}.out").open("a") as out:
            self.daemons[name] = subprocess.Popen(
                [program, *arguments],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        leftovers.started(self.session, self.daemons[name].pid)

    def _processes(self, node: str) -> list[int]:
        """Of the jobs on a node: what knows that it runs there, and slurmstepd, which started it."""
        here = {p for p in processes() if environment(p).get("SLURMD_NODENAME") == node and self._is_ours(p)}
        keepers = {parent(p) for p in here}
        return [*here, *(p for p in keepers if command_line(p).startswith("slurmstepd"))]

    def _is_ours(self, pid: int) -> bool:
        return environment(pid).get("SLURM_CONF") == self.env["SLURM_CONF"]


def until(condition: Callable[[], bool], timeout_s: float, what: str | Callable[[], str]) -> None:
    """Wait for it, or fail with what is wrong."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, what if isinstance(what, str) else what()
        time.sleep(0.05)


def _free_ports(count: int) -> int:
    """The first of some neighbours that are free now."""
    for first in range(17800, 19800, 20):
        try:
            for port in range(first, first + count):
                with socket.socket() as listener:
                    listener.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")
