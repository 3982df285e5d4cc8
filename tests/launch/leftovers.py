"""What tests start and make, written down, so that the next session of tests removes it if this one is killed.

    /tmp/kontext_train_tests/PID.START/   of a session: its process, and when that started, in clock ticks since boot
        started                           PID.START of each process it started itself
        slurm/                            its Slurm: configuration, sockets, logs

What those start in turn carries the folder's name in MARK. Network namespaces are named kt<PID>..., PID the session's.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PLACE = Path("/tmp/kontext_train_tests")  # short: a socket's path has at most 108 bytes
MARK = "KONTEXT_TRAIN_TEST"


@contextmanager
def session() -> Iterator[Path]:
    """This session's folder; what dead sessions left is gone before, and what this one leaves afterwards."""
    clean_up()
    folder = PLACE / identity(os.getpid())
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        remove(folder)


def clean_up() -> None:
    """End and remove what sessions left whose process is gone."""
    for folder in PLACE.glob("*.*"):
        if not is_alive(folder.name):
            remove(folder)


def started(folder: Path, pid: int) -> None:
    """Note a process of the session in `folder`."""
    with (folder / "started").open("a") as file:
        file.write(f"{identity(pid)}\n")


def remove(folder: Path) -> None:
    """End the processes of a session, then remove its namespaces and its folder."""
    noted = folder / "started"
    for name in noted.read_text().split() if noted.is_file() else []:
        if is_alive(name):
            kill(int(name.partition(".")[0]))
    end_marked(folder)
    remove_namespaces(folder)
    shutil.rmtree(folder, ignore_errors=True)


def end_marked(folder: Path) -> None:
    """End what processes of a session have started."""
    marked = {pid for pid in processes() if environment(pid).get(MARK) == str(folder) and pid != os.getpid()}
    # slurmstepd, which writes its title over its environment.
    keepers = {pid for pid in map(parent, marked) if command_line(pid).startswith("slurmstepd")}
    for pid in marked | keepers:
        kill(pid)


def remove_namespaces(folder: Path) -> None:
    for namespace in Path("/run/netns").glob(f"kt{folder.name.partition('.')[0]}[a-z]"):
        subprocess.run(["ip", "netns", "del", namespace.name], check=False, capture_output=True)


def identity(pid: int) -> str:
    """PID.START: names one process, and none that gets its number later."""
    return f"{pid}.{(_stat(pid) or ['0'] * 20)[19]}"


def is_alive(name: str) -> bool:
    pid = int(name.partition(".")[0])
    return identity(pid) == name and _stat(pid)[0] != "Z"


def processes() -> list[int]:
    return [int(p.name) for p in Path("/proc").glob("[0-9]*")]


def environment(pid: int) -> dict[str, str]:
    """What a process was started with; nothing if it is gone."""
    words = _of_process(pid, "environ").split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def command_line(pid: int) -> str:
    return _of_process(pid, "cmdline").replace("\0", " ")


def parent(pid: int) -> int:
    return int((_stat(pid) or ["", "0"])[1])


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _stat(pid: int) -> list[str]:
    """From the state on: what proc(5) calls field 3 and those after it."""
    return _of_process(pid, "stat").rpartition(")")[2].split()


def _of_process(pid: int, name: str) -> str:
    try:
        return Path("/proc", str(pid), name).read_bytes().decode(errors="replace")
    except OSError:
        return ""
