"""Local folders of shards, shard by shard, as the index sees them. An index is not needed."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from kontext_train.data.index import ShardIndex
from kontext_train.data.shard import Problem, ScannedSample, scan_shard


def flat_rows(index: ShardIndex) -> list[tuple[str, range]]:
    """(name, samples) of each shard. ValueError if one lies in a subfolder: its output would need one too."""
    rows = index.shard_rows()
    if below := [name for name, _ in rows if "/" in name]:
        raise ValueError(
            f"shard {below[0]} lies in a subfolder of {index.folder}. Give that folder, with an index of its own; or "
            "link all shards into one folder (ln -s), and index that"
        )
    return rows


def scan(path: Path, encoding: str | None = None) -> Iterator[ScannedSample | Problem]:
    """encoding: as `scan_shard` has it."""
    with open(path, "rb") as file:
        yield from scan_shard(file, path.name, path.stat().st_size, encoding)


def shard_digest(path: Path, *settings: object) -> str:
    """Names a shard as it is now, and the settings of a job on it."""
    state = path.stat()
    identity = [str(path.absolute()), state.st_size, state.st_mtime_ns, *settings]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
