"""One Slurm, one slow data set and one undisturbed run for all tests of this room."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kontext_train.data.index_build import build_index
from kontext_train.evaluation.trained import load_model, read_config, resolve
from launch import runs
from tests.launch import leftovers
from tests.launch.cluster import Cluster, until
from tests.launch.leftovers import command_line, environment, processes
from tests.runs import SMALL, run, small_config
from tests.servers import FaultyServer, web_server

ROOT = Path(__file__).parents[2]
OPTIONS = ("run.steps=40", "run.save_every_steps=5", "parallel.timeout_s=40")


PATIENCE_S = 200  # for a whole job, on a machine that does other things too


@dataclass(slots=True)
class Straight:
    """Forty steps of two ranks that nothing disturbed, and the options that train the same over slow storage."""

    run_dir: Path
    slow: list[str]
    server: FaultyServer  # `delay_s` makes it slow


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    path = resolve(run_dir)
    return {k: v.detach() for k, v in load_model(path, read_config(path), ema=False).named_parameters()}


def same(run_dir: Path, other: Path) -> bool:
    ours, theirs = weights(run_dir), weights(other)
    return all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def wait_for_step(run_dir: Path, step: int) -> None:
    until(lambda: runs.read(run_dir).step >= step, PATIENCE_S, f"{run_dir} did not reach step {step}")


def ranks_of(session: Path) -> dict[int, int]:
    """Process ids of the training ranks that a session of tests has running, by rank."""
    ours = {pid: environment(pid) for pid in processes()}
    ours = {pid: env for pid, env in ours.items() if env.get(leftovers.MARK) == str(session) and "RANK" in env}
    return {int(env["RANK"]): pid for pid, env in ours.items() if "-m kontext_train.train" in command_line(pid)}


def needs(what: str, missing: str) -> None:
    """Skip, because something is missing here; under launch/test.sh, which demands everything, fail."""
    reason = f"{what}: {missing}"
    assert os.environ.get("KONTEXT_TRAIN_TEST_ALL") != "1", f"{reason}. KONTEXT_TRAIN_TEST_ALL=0 skips what needs it"
    pytest.skip(reason)


@pytest.fixture(scope="session")
def session() -> Iterator[Path]:
    with leftovers.session() as folder:
        yield folder


@pytest.fixture(scope="session")
def installed() -> None:
    """Slurm's programs, iproute2 and util-linux, by the project's own script; and root, to start them."""
    if os.geteuid() != 0:
        needs("Slurm's daemons and network namespaces are made by root", "this is not root")
    script = ["bash", str(ROOT / "launch" / "slurm" / "install_test_slurm.sh")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        needs("no Slurm to test with", done.stderr.strip())


@pytest.fixture(scope="session")
def slurm(installed: None, session: Path) -> Iterator[Cluster]:
    """Four nodes on this host. n1 to n3 are the disturbed job's; n4 has the rest."""
    cluster = Cluster(4, session)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Straight]:
    """The storage is slow so that a run is in its middle long enough to be disturbed there; it computes nothing."""
    folder = tmp_path_factory.mktemp("straight")
    run(small_config(shards, folder / "run", *OPTIONS), processes=2)
    (folder / "www").mkdir()
    for shard in shards.glob("*.tar"):
        (folder / "www" / shard.name).symlink_to(shard)
    with web_server(folder / "www") as server:
        build_index(server.url, out=folder / "index")
        (folder / "www" / "index.arrow").symlink_to(folder / "index" / "index.arrow")
        server.delay_s = 0.03
        yield Straight(folder / "run", [*SMALL, *OPTIONS, f"data.train={server.url}/"], server)
