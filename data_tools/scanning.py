"""Local folders of shards, shard by shard, as the index sees them. An index is not needed."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from kontext_train.data.shard import Problem, ScannedSample, scan_shard


def folder_shards(folder: Path) -> list[Path]:
    """Every *.tar directly in a folder, by name. Raises ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Give the one that holds the shards (*.tar)")
    paths = sorted(folder.glob("[!.]*.tar"))
    if not paths:
        raise ValueError(f"{folder} has no shards: no *.tar (uncompressed) is directly in it")
    if strange := [path for path in paths if not path.is_file()]:  # opening a pipe would wait for ever
        raise ValueError(
            f"{strange[0]} is not a file, or a link to none. Remove it or give it another suffix than .tar"
        )
    return paths


def scan(path: Path, encoding: str | None = None) -> Iterator[ScannedSample | Problem]:
    """encoding: as `scan_shard` has it."""
    with open(path, "rb") as file:
        yield from scan_shard(file, path.name, path.stat().st_size, encoding)


def shard_digest(path: Path, *settings: object) -> str:
    """Names a shard as it is now, and the settings of a job on it."""
    state = path.stat()
    identity = [str(path.absolute()), state.st_size, state.st_mtime_ns, *settings]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
