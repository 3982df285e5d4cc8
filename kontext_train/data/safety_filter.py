"""What filtered shards say of the safety filter that they passed: `safety.json` beside them. Torch-free.

The file names every shard that the filter wrote, by its size and a digest of its members' names, places and sizes: an
index takes it over only if nothing else lies beside it. What members hold is not compared: indexing does not read it.
The format is described in docs/data_format.md.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kontext_train.errors import ConfigError

SAFETY_NAME = "safety.json"  # beside the shards


@dataclass(frozen=True, slots=True)
class FilterRecord:
    """What `safety.json` says.

    Attributes:
        path: of the file, for errors.
        passed: `name` and `digest` of the policy, and `reports_only`, whether by design it kept nothing out.
        shards: (bytes, `Columns.digest` of its samples) of each that the filter wrote, by name.
    """

    path: str
    passed: dict[str, Any]
    shards: dict[str, tuple[int, str]]

    @classmethod
    def parse(cls, path: str, raw: bytes) -> "FilterRecord":
        """Raises ValueError, with path, if the file is damaged."""
        try:
            given = json.loads(raw)
            passed = {"name": str(given["name"]), "digest": str(given["digest"]), "reports_only": given["reports_only"]}
            if not isinstance(passed["reports_only"], bool):
                raise TypeError("reports_only must be true or false")
            return cls(
                path, passed, {name: (shard["bytes"], shard["table"]) for name, shard in given["shards"].items()}
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            hint = "Copy it again, or run python -m data_tools.filter_safety again"
            raise ValueError(f"{path} is damaged, or of an earlier version ({error!r}). {hint}") from error

    def write(self) -> None:
        """The file, in one step."""
        shards = {name: {"bytes": size, "table": table} for name, (size, table) in self.shards.items()}
        temporary = Path(self.path).with_name(f".{SAFETY_NAME}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(json.dumps({**self.passed, "shards": shards}, indent=2).encode())
                file.flush()
                os.fsync(file.fileno())  # else a power cut can leave the new name on an empty file
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def check_size(self, name: str, size: int) -> None:
        """ValueError, with the path of the record, unless the filter wrote a shard of this name and size."""
        if self.shards.get(name, (None, ""))[0] != size:
            raise self._refused(name)

    def check_table(self, name: str, table: str) -> None:
        """Likewise, unless it has the members that the filter wrote."""
        if self.shards[name][1] != table:
            raise self._refused(name, ": its size is the same, but names, places or sizes of its members are others")

    def _refused(self, name: str, how: str = "") -> ValueError:
        hint = f"Copy it again, filter it too, or remove {SAFETY_NAME} if unfiltered data is wanted"
        return ValueError(f"{self.path}: shard {name} is not as the safety filter left it{how}. {hint}")


def check_filter(key: str, folder: str, passed: Mapping[str, Any] | None, required: str | None) -> None:
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
        _check_keeps_out(key, folder, passed)
        return
    has = "passed no safety filter" if passed is None else _has_passed(passed)
    rule = f"{has}, and data.require_safety_filter={required}"
    raise ConfigError(key, folder, rule, "Run python -m data_tools.filter_safety over it")


def _check_keeps_out(key: str, folder: str, passed: Mapping[str, Any]) -> None:
    match passed.get("reports_only"):
        case False:
            return
        case True:
            rule = f"{_has_passed(passed)}, whose rules only report: it kept nothing out"
            hint = "Filter with a policy that has a rule of policy drop or quarantine"
        case _:
            rule = f"{_has_passed(passed)} in an earlier version, which did not record whether its rules only report"
            hint = "Run python -m data_tools.index_shards over it; if that refuses its safety.json, filter again"
    raise ConfigError(key, folder, rule, hint)


def _has_passed(passed: Mapping[str, Any]) -> str:
    return f"passed {passed['name']}@{passed['digest'][:12]}"
