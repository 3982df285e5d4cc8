"""What check_host.py finds on this host, and says of hosts that this one is not."""

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import check_host
from launch.check_host import Host

SCRIPT = Path(check_host.__file__)
INTERFACES = ["lo", "eth0", "ib0", "ib1"]
MIB = 1 << 20


def checked(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NCCL", "GLOO", "SLURM", "CUDA"))} | environment
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=env, capture_output=True, text=True, check=False)


def test_this_host_can_train_and_is_the_head_at_its_own_address() -> None:
    done = checked("--head", "127.0.0.1:29411", "--ranks", "2")
    assert done.stdout == "IS_HEAD=true ADDRESS=127.0.0.1 INTERFACE=lo RANKS=2\n", done.stderr


def test_a_port_in_use_is_told_with_the_name_of_the_host() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        taken = checked("--head", f"127.0.0.1:{port}")
        other = checked("--head", f"127.0.0.1:{port}", SLURM_NODEID="1")  # the head is up: no reason to stay away
        assert other.stdout == "IS_HEAD=false ADDRESS=127.0.0.1 INTERFACE=lo RANKS=1\n", other.stderr
    assert taken.returncode == 2
    assert taken.stderr.startswith(f"launch: {socket.gethostname()}: port {port} cannot be listened on")
    assert checked("--head", f"127.0.0.1:{port}").returncode == 0


def test_a_head_that_never_listens_is_told() -> None:
    host = Host()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        check_host.wait_for_head(host, f"127.0.0.1:{silent.getsockname()[1]}", 0.5)
    assert "did not answer for 0.5 s ([Errno 111] Connection refused)" in host.errors[0]


def limits(files: int, locked: int) -> Callable[[int], tuple[int, int]]:
    return lambda which: (files, files) if which == resource.RLIMIT_NOFILE else (locked, locked)


@pytest.mark.parametrize(
    ("check", "error"),
    [
        (lambda h: check_host.check_meeting_point(h, "node1", 1, None), "HEAD=node1 must be HOST:PORT"),
        (lambda h: check_host.check_meeting_point(h, "node1:99999", 1, None), "HEAD=node1:99999 must be HOST:PORT"),
        (lambda h: check_host.check_meeting_point(h, "a.invalid:1234", 1, None), "the name does not resolve"),
        (lambda h: check_host.check_meeting_point(h, "localhost:1234", 2, "0"), "localhost is 127.0.0.1 on this host"),
        (lambda h: check_host.check_devices(h, 8, 4, None), "8 ranks need as many GPUs, and 4 are visible"),
        (lambda h: check_host.check_devices(h, 8, 0, 8), "8 GPUs were asked for, and 0 are visible"),
        (lambda h: check_host.check_limits(h, [], limits(1024, -1)), "ulimit -n is 1024 and must be at least 4096"),
        (lambda h: check_host.check_limits(h, ["mlx5_0"], limits(-1, 65536)), "ulimit -l is 65536 bytes and must be"),
        (lambda h: check_host.check_shared_memory(h, 8, 64 * MIB), "/dev/shm has 64 MiB free and 8 ranks need 2048"),
        (lambda h: check_host.check_nccl(h, {"NCCL_SOCKET_IFNAME": "en"}, INTERFACES, []), "fits no interface of this"),
        (lambda h: check_host.check_nccl(h, {"GLOO_SOCKET_IFNAME": "ib0,ib"}, INTERFACES, []), "must name interfaces"),
        (lambda h: check_host.check_nccl(h, {"GLOO_SOCKET_IFNAME": "^lo"}, INTERFACES, []), "must name interfaces of"),
        (lambda h: check_host.check_nccl(h, {"NCCL_IB_HCA": "mlx5"}, INTERFACES, []), "fits no InfiniBand device"),
        (lambda h: check_host.check_nccl(h, {"NCCL_DEBUG": "VERBOSE"}, INTERFACES, []), "must be one of VERSION, WARN"),
        (lambda h: check_host.visible_devices(h, {"CUDA_VISIBLE_DEVICES": "0,1"}, Path("/nowhere")), "names 2 GPUs"),
    ],
)
def test_what_cannot_work_is_an_error(check: Callable[[Host], object], error: str) -> None:
    host = Host()
    check(host)
    assert len(host.errors) == 1
    assert error in host.errors[0]


@pytest.mark.parametrize(
    "check",
    [
        lambda h: check_host.check_devices(h, 4, 0, 0),  # ranks on the CPU, as asked for
        lambda h: check_host.check_devices(h, 1, 0, None),
        lambda h: check_host.check_devices(h, 8, 8, 8),
        lambda h: check_host.check_meeting_point(h, "localhost:29412", 1, None),
        lambda h: check_host.check_nccl(h, {"GLOO_SOCKET_IFNAME": "eth0,ib0"}, INTERFACES, []),
        lambda h: check_host.check_limits(h, [], limits(65536, 65536)),
        lambda h: check_host.check_limits(h, ["mlx5_0"], limits(-1, -1)),
        lambda h: check_host.check_shared_memory(h, 8, 2048 * MIB),
        lambda h: check_host.check_nccl(h, {"NCCL_SOCKET_IFNAME": "ib"}, INTERFACES, []),
        lambda h: check_host.check_nccl(h, {"NCCL_SOCKET_IFNAME": "^lo,eth"}, INTERFACES, []),
        lambda h: check_host.check_nccl(h, {"NCCL_IB_HCA": "=mlx5_0:1"}, INTERFACES, ["mlx5_0"]),
        lambda h: check_host.check_nccl(h, {"NCCL_DEBUG": "info"}, INTERFACES, []),
        lambda h: check_host.check_clock(h, Path("/tmp")),
    ],
)
def test_what_works_is_none(check: Callable[[Host], object]) -> None:
    host = Host()
    check(host)
    assert (host.errors, host.warnings) == ([], [])


def test_ranks_on_the_cpu_that_no_one_asked_for_are_told() -> None:
    host = Host()
    check_host.check_devices(host, 8, 0, None)
    assert host.warnings == ["no GPU is visible (CUDA_VISIBLE_DEVICES, /dev): 8 ranks will train on the CPU"]


def test_ranks_that_share_a_core_are_told() -> None:
    """Slurm gives a job a single core if it asks for none."""
    host = Host()
    check_host.check_cores(host, 8, 8)
    assert host.warnings == []
    check_host.check_cores(host, 8, 1)
    assert "8 ranks and the processes that read for them share 1 CPU cores" in host.warnings[0]


def test_a_clock_that_differs_from_the_file_servers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, now = Host(), check_host.time.time()
    monkeypatch.setattr("launch.check_host.time.time", lambda: now + 90)
    check_host.check_clock(host, tmp_path)
    assert "its clock is 90 s ahead of the file system's" in host.errors[0]


def test_gpus_are_counted_without_a_driver(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    host = Host()
    assert check_host.visible_devices(host, {}, tmp_path) == 2
    assert check_host.visible_devices(host, {"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == 1
    assert check_host.visible_devices(host, {"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    assert host.errors == []


@pytest.mark.parametrize("file", sorted((SCRIPT.parent / "env").glob("*.sh")), ids=lambda p: p.name)
def test_examples_of_environments_are_sound(file: Path) -> None:
    """As train.sbatch reads them, with a stand-in for `module`."""
    script = f"set -uo pipefail; module() {{ :; }}; SUBMISSION=/r/launch/0001 SRUN=(); source {file}; echo ${{SRUN[@]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("--container-mounts=" in done.stdout) == (file.name == "container.sh")
