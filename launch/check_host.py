"""What a host must have before torchrun starts on it: launch/torchrun.sh asks, once a host. Standard library only.

Prints what torchrun needs to be told as shell assignments. A host that cannot work ends with status 2 and one line for
each reason, which names the host; what only may go wrong is a warning. One that can work waits for the head to listen:
torchrun's own patience for that is the same as for a head that has gone.
"""

import argparse
import fcntl
import os
import re
import resource
import shutil
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

SIOCGIFADDR = 0x8915  # Linux ioctl: the IPv4 address of an interface
OPEN_FILES = 4096  # sockets to ranks, shards and workers' pipes; 1,024 is the usual default and too few
SHARED_MEMORY_MIB = 256  # a rank: pixel batches travel from its workers through it, and NCCL keeps buffers there
CLOCK_S = 30.0
HEAD_S = 600.0  # that hosts may start apart: an image is unpacked sooner on one than on another
DEBUG_LEVELS = ("VERSION", "WARN", "INFO", "TRACE")


@dataclass(slots=True)
class Host:
    """What was found; `errors` and `warnings` are whole sentences without the host's name."""

    is_head: bool = True
    address: str = "127.0.0.1"
    interface: str = "lo"
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", help="HOST:PORT where all nodes meet; without it there is one node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ranks", type=int, help="ranks on this host; without it one for each GPU, or one")
    parser.add_argument("--gpus", type=int, help="that this host must have; without it any number will do")
    given = parser.parse_args()
    host = Host()
    devices = visible_devices(host, os.environ)
    ranks = given.ranks or max(1, devices)
    if given.head:
        check_meeting_point(host, given.head, given.nodes, os.environ.get("SLURM_NODEID"))
    check_devices(host, ranks, devices, given.gpus)
    check_cores(host, ranks, len(os.sched_getaffinity(0)))
    check_limits(host, infiniband_devices(), resource.getrlimit)
    check_shared_memory(host, ranks, shutil.disk_usage("/dev/shm").free)
    check_clock(host, Path.cwd())
    check_nccl(host, os.environ, [name for _, name in socket.if_nameindex()], infiniband_devices())
    name = socket.gethostname()
    for warning in host.warnings:
        print(f"launch: {name}: warning: {warning}", file=sys.stderr)
    if given.head and not host.is_head and not host.errors:
        wait_for_head(host, given.head, HEAD_S)
    for error in host.errors:
        print(f"launch: {name}: {error}", file=sys.stderr)
    if host.errors:
        sys.exit(2)
    print(f"IS_HEAD={str(host.is_head).lower()} ADDRESS={host.address} INTERFACE={host.interface} RANKS={ranks}")


# -- the network ---------------------------------------------------------------------------------------------------


def check_meeting_point(host: Host, head: str, nodes: int, slurm_node: str | None) -> None:
    """Fills address, interface and is_head. slurm_node: SLURM_NODEID, which decides who the head is where it is set."""
    name, _, port = head.rpartition(":")
    if not name or not port.isdigit() or not 0 < int(port) < 65536:
        host.errors.append(f"HEAD={head} must be HOST:PORT, for example node1:29400")
        return
    try:
        head_address = str(socket.getaddrinfo(name, int(port), socket.AF_INET)[0][4][0])
    except OSError as error:
        host.errors.append(f"HEAD={head}: the name does not resolve ({error}). Give an address, or correct /etc/hosts")
        return
    if nodes > 1 and head_address.startswith("127.") and name != head_address:
        host.errors.append(f"HEAD={head}: {name} is {head_address} on this host (/etc/hosts): give its address")
        return
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((head_address, int(port)))  # sends nothing: asks the kernel which way it would go
            host.address = probe.getsockname()[0]
    except OSError as error:
        host.errors.append(f"there is no route to HEAD={head} ({head_address}): {error}. Look at `ip route`")
        return
    host.interface = interface_of(host.address)
    host.is_head = slurm_node == "0" if slurm_node is not None else host.address == head_address
    if host.is_head:
        try:
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((head_address, int(port)))
        except OSError as error:
            host.errors.append(f"port {port} cannot be listened on ({error}). Set HEAD to one that is free")


def wait_for_head(host: Host, head: str, patience_s: float) -> None:
    name, _, port = head.rpartition(":")
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        try:
            socket.create_connection((name, int(port)), timeout=5).close()
            return
        except OSError as error:
            last = error
            time.sleep(0.2)
    hint = "Start its node too, and look at firewalls"
    host.errors.append(f"HEAD={head} did not answer for {patience_s:g} s ({last}). {hint}")


def interface_of(address: str) -> str:
    """The network interface that has an IPv4 address; "" if none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no IPv4 address
                continue
            if name == "lo" and address.startswith("127."):
                return name
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


def check_nccl(host: Host, env: Mapping[str, str], interfaces: list[str], infiniband: list[str]) -> None:
    wanted = env.get("NCCL_SOCKET_IFNAME")
    if wanted is not None and not _matching(wanted, interfaces):
        host.errors.append(f"NCCL_SOCKET_IFNAME={wanted} fits no interface of this host ({', '.join(interfaces)})")
    wanted = env.get("GLOO_SOCKET_IFNAME")  # whole names, unlike NCCL's
    if wanted and not set(wanted.split(",")) <= set(interfaces):
        rule = f"must name interfaces of this host ({', '.join(interfaces)}) in full, with commas between"
        host.errors.append(f"GLOO_SOCKET_IFNAME={wanted} {rule}")
    ib_off = env.get("NCCL_IB_DISABLE", "0") == "1"
    if "NCCL_IB_HCA" in env and not ib_off and not _matching(env["NCCL_IB_HCA"], infiniband):
        found = ", ".join(infiniband) or "none"
        host.errors.append(f"NCCL_IB_HCA={env['NCCL_IB_HCA']} fits no InfiniBand device of this host (found: {found})")
    if infiniband and ib_off:
        host.warnings.append(f"NCCL_IB_DISABLE=1 leaves {', '.join(infiniband)} unused")
    if "NCCL_DEBUG" in env and env["NCCL_DEBUG"].upper() not in DEBUG_LEVELS:
        host.errors.append(f"NCCL_DEBUG={env['NCCL_DEBUG']} must be one of {', '.join(DEBUG_LEVELS)}")
    for key in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"):
        if env.get(key, "0") == "1":
            host.warnings.append(f"{key}=1 makes NCCL slow between the GPUs of this host")


def _matching(wanted: str, present: list[str]) -> bool:
    """NCCL's lists: a,b are beginnings of names, =a,b whole names, ^a,b all but these; a port may follow a colon."""
    rule = re.match(r"[\^=]*", wanted)
    assert rule is not None
    names = [n.split(":")[0] for n in wanted[rule.end() :].split(",") if n]
    fits = [p for p in present if any(p == n if "=" in rule[0] else p.startswith(n) for n in names)]
    return len(fits) < len(present) if "^" in rule[0] else bool(fits)


def infiniband_devices() -> list[str]:
    folder = Path("/sys/class/infiniband")
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


# -- the host itself -----------------------------------------------------------------------------------------------


def visible_devices(host: Host, env: Mapping[str, str], dev: Path = Path("/dev")) -> int:
    """GPUs that ranks will see, without asking a driver."""
    present = len([p for p in dev.glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)])
    told = env.get("CUDA_VISIBLE_DEVICES")
    if told is None:
        return present
    named = [d for d in told.split(",") if d.strip() not in ("", "-1", "NoDevFiles")]
    if len(named) > present:
        host.errors.append(f"CUDA_VISIBLE_DEVICES={told} names {len(named)} GPUs, and /dev has {present}")
    return len(named)


def check_devices(host: Host, ranks: int, devices: int, gpus: int | None) -> None:
    """gpus: that there must be, if that is known."""
    if gpus is not None and devices < gpus:
        host.errors.append(f"{gpus} GPUs were asked for, and {devices} are visible (CUDA_VISIBLE_DEVICES, /dev)")
    elif gpus is None and devices == 0 and ranks > 1:
        host.warnings.append(f"no GPU is visible (CUDA_VISIBLE_DEVICES, /dev): {ranks} ranks will train on the CPU")
    elif devices and ranks > devices:
        host.errors.append(f"{ranks} ranks need as many GPUs, and {devices} are visible (CUDA_VISIBLE_DEVICES, /dev)")
    elif ranks < devices:
        host.warnings.append(f"{devices} GPUs are visible and only {ranks} ranks use them")


def check_cores(host: Host, ranks: int, cores: int) -> None:
    if cores < ranks:
        hint = "On Slurm ask for more: --sbatch=--exclusive, or --sbatch=--cpus-per-task=NUMBER (of a node)"
        host.warnings.append(f"{ranks} ranks and the processes that read for them share {cores} CPU cores. {hint}")


def check_limits(host: Host, infiniband: list[str], limit: Callable[[int], tuple[int, int]]) -> None:
    files, _ = limit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < OPEN_FILES:
        host.errors.append(f"ulimit -n is {files} and must be at least {OPEN_FILES}. Raise it (limits.conf)")
    locked, _ = limit(resource.RLIMIT_MEMLOCK)
    if infiniband and locked != resource.RLIM_INFINITY:
        hint = "InfiniBand registers memory. Raise it (limits.conf; slurmd's unit: LimitMEMLOCK=infinity)"
        host.errors.append(f"ulimit -l is {locked} bytes and must be unlimited: {hint}")


def check_shared_memory(host: Host, ranks: int, free: int) -> None:
    needed = ranks * SHARED_MEMORY_MIB
    if free < needed << 20:
        hint = "Empty it, or give a container more (docker run --shm-size=16g, or --ipc=host)"
        host.errors.append(f"/dev/shm has {free >> 20} MiB free and {ranks} ranks need {needed}. {hint}")


def check_clock(host: Host, folder: Path) -> None:
    """Against the file server that all hosts share: logs and checkpoints are read by time."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock") as file:
            ahead_s = time.time() - os.stat(file.name).st_mtime
    except OSError:
        return  # not a folder to write to
    if abs(ahead_s) > CLOCK_S:
        where = "ahead of" if ahead_s > 0 else "behind"
        host.errors.append(f"its clock is {abs(ahead_s):.0f} s {where} the file system's. Start chrony or ntpd")


if __name__ == "__main__":
    main()
