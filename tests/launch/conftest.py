"""One Slurm, one slow data set and one undisturbed run for all tests of this room."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kontext_train.data.index_build import build_index
from tests.launch.cluster import Cluster
from tests.runs import SMALL, run, small_config
from tests.servers import web_server

ROOT = Path(__file__).parents[2]
OPTIONS = ("run.steps=40", "run.save_every_steps=5", "parallel.timeout_s=40")


@dataclass(slots=True)
class Straight:
    """Forty steps of two ranks that nothing disturbed, and the options that train the same over slow storage."""

    run_dir: Path
    slow: list[str]


@pytest.fixture(scope="session")
def installed() -> None:
    """Slurm's programs, iproute2 and util-linux, by the project's own script."""
    script = ["bash", str(ROOT / "launch" / "slurm" / "install_test_slurm.sh")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = f"no Slurm to test with: {done.stderr.strip()}"
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)


@pytest.fixture(scope="session")
def slurm(installed: None) -> Iterator[Cluster]:
    """Six nodes on this host. n1, n2 are the preempted job's; n3 to n5 lose one; n6 has the rest."""
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons are started as root here, and this is not root")
    cluster = Cluster(nodes=6)
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
        yield Straight(folder / "run", [*SMALL, *OPTIONS, f"data.train={server.url}/"])
