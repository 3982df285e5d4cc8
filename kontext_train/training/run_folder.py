"""What a run folder says of each start of its run, so that months later nobody has to be asked.

    run.dir/starts/0001/start.json         when, the command, the checkpoint gone on from, hosts and ranks, git
                        environment.json   versions, GPUs, variables that steer libraries, installed distributions
                        config.yaml        composed for this start; run.dir/config.yaml is that of the last
                        uncommitted.patch  of the checkout that the package runs from, where it differs from its commit

A resumed run adds 0002 and so on.
"""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kontext_train.distributed.setup import World

PACKAGE = Path(__file__).parent.parent
PATCH_BYTES = 1 << 20  # of a patch at most; the rest is cut off
GIT_TIMEOUT_S = 60  # on a slow file system; then the start is recorded without git
# Variables by how their names begin; none that may be a secret, whatever its name begins with.
TOLD = (
    *("CUDA", "NCCL", "GLOO", "TORCH", "PYTORCH", "OMP_", "MKL_", "TRITON", "NVIDIA", "UCX", "FI_", "LD_LIBRARY_PATH"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_", "SLURM_", "HYDRA_", "PYTHON"),
    *("HF_", "WANDB_", "VIRTUAL_ENV", "CONDA_", "KONTEXT_TRAIN_"),
)
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "AUTH")


def record_start(folder: Path, world: World, config_yaml: str, resumed_from: Path | None) -> None:
    """Add an entry to run.dir/starts. Every rank must call it; rank 0 writes."""
    own = (socket.gethostname(), torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None)
    ranks: list[tuple[str, str | None]] = [own] * world.size
    dist.all_gather_object(ranks, own)
    if not world.is_main:
        return
    starts = folder / "starts"
    number = 1 + max((int(p.name) for p in starts.glob("[0-9]*")), default=0)
    entry = starts / f"{number:04d}"
    entry.mkdir(parents=True)
    git, patch = git_state(PACKAGE)
    start = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "folder": os.getcwd(),
        "resumed_from": None if resumed_from is None else str(resumed_from),
        "world_size": world.size,
        "hosts": _by_host(ranks),
        "git": git,
    }
    (entry / "start.json").write_text(json.dumps(start, indent=2))
    (entry / "environment.json").write_text(json.dumps(environment(), indent=2))
    (entry / "config.yaml").write_text(config_yaml)
    if patch:
        (entry / "uncommitted.patch").write_bytes(patch)


def _by_host(ranks: list[tuple[str, str | None]]) -> dict[str, dict[str, list[Any]]]:
    """{host: {"ranks": [...], "gpus": [name of each rank's]}}."""
    hosts: dict[str, dict[str, list[Any]]] = {}
    for rank, (host, gpu) in enumerate(ranks):
        entry = hosts.setdefault(host, {"ranks": [], "gpus": []})
        entry["ranks"].append(rank)
        entry["gpus"].append(gpu)
    return hosts


def environment() -> dict[str, Any]:
    """Of this process, as JSON-able values."""
    driver = Path("/proc/driver/nvidia/version")
    named = ((d.metadata["Name"], d.version) for d in distributions())
    installed = sorted((name, number) for name, number in named if name)  # what a broken uninstall leaves has no name
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "kontext_train": _version("kontext-train"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        "flash_attn": _version("flash-attn"),
        "driver": driver.read_text().splitlines()[0] if driver.is_file() else None,
        "variables": {k: v for k, v in sorted(os.environ.items()) if is_told(k)},
        "distributions": dict(installed),
    }


def is_told(variable: str) -> bool:
    """Whether an environment variable's value may be and should be written down."""
    return variable.startswith(TOLD) and not any(word in variable.upper() for word in SECRET)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def git_state(package: Path) -> tuple[dict[str, Any] | None, bytes]:
    """(commit, branch, changed files of the checkout that tracks `package`, or None; its uncommitted changes)."""

    def git(*arguments: str) -> bytes:
        quiet = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, check=True, timeout=GIT_TIMEOUT_S, env=quiet).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # a virtual environment inside somebody's checkout is not it
        state: dict[str, Any] = {
            "commit": git("rev-parse", "HEAD").decode().strip(),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD").decode().strip(),
            "changed": git("status", "--porcelain").decode(errors="replace").splitlines(),
        }
        patch = git("diff", "--no-ext-diff", "--no-textconv", "HEAD")
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, no answer
        return None, b""
    return state | {"patch_was_cut": len(patch) > PATCH_BYTES}, patch[:PATCH_BYTES]
