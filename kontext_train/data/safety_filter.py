"""What filtered shards say of the safety filter that they passed: `safety.json` beside them. Torch-free.

The file names every shard that the filter wrote, by size: an index takes it over only if nothing else lies beside it.
The format is described in docs/data_format.md.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kontext_train.errors import ConfigError

SAFETY_NAME = "safety.json"  # beside the shards


def passed_filter(passed: Mapping[str, Any], shards: Iterable[Path]) -> bytes:
    """The content of `safety.json`. passed: `name` and `digest` of the policy; shards: files that are complete."""
    sizes = {path.name: path.stat().st_size for path in shards}
    return json.dumps({"name": passed["name"], "digest": passed["digest"], "shards": sizes}, indent=2).encode()


def parse_filter(path: str, raw: bytes, sizes: Mapping[str, int]) -> dict[str, str]:
    """Name and digest of the policy. sizes: bytes of the folder's shards by name.

    Raises ValueError, with path, if the file is damaged or a shard is not one that the filter wrote.
    """
    try:
        given = json.loads(raw)
        known, passed = given["shards"], {"name": str(given["name"]), "digest": str(given["digest"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}). Copy it again") from error
    for name, size in sizes.items():
        if known.get(name) != size:
            hint = f"Filter it too, or remove {SAFETY_NAME} if unfiltered data is wanted"
            raise ValueError(f"{path}: shard {name} is not as the safety filter left it. {hint}")
    return passed


def check_filter(key: str, folder: str, passed: Mapping[str, str] | None, required: str | None) -> None:
    """ConfigError by key unless a source passed the policy that data.require_safety_filter names.

    required: a policy's name, or name@ and the beginning of its digest. None asks for nothing.
    """
    if required is None:
        return
    name, at, digest = required.partition("@")
    if at and not digest:
        hint = "Give what filter_safety printed, or the name alone"
        raise ConfigError("data.require_safety_filter", required, "has no digest behind its @", hint)
    if passed is not None and passed["name"] == name and passed["digest"].startswith(digest):
        return
    has = "passed no safety filter" if passed is None else f"passed {passed['name']}@{passed['digest'][:12]}"
    rule = f"{has}, and data.require_safety_filter={required}"
    raise ConfigError(key, folder, rule, "Run python -m data_tools.filter_safety over it")
