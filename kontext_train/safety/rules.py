"""A safety policy as a file: which scorers look at what, from which score on, and what becomes of a sample. Torch-free.

    name: policy-2026-11
    rules:
      - {name: listed,    kind: image_hash, list: known.txt, distance: 6, policy: drop}
      - {name: files,     kind: file_hash, list: md5.csv, policy: drop}
      - {name: words,     kind: words, list: words.txt, policy: quarantine}
      - {name: probe,     kind: clip_image, clip: CLIP, head: probe.safetensors, policy: drop}
      - {name: asked,     kind: clip_text, clip: CLIP, head: text_probe.safetensors, threshold: 0.8, policy: drop}
      - {name: together,  kind: combination, of: [probe, asked], threshold: 0.9, policy: quarantine}
      - {name: source,    kind: metadata, where: "json.source in ['forum', 'unknown']", policy: report}

Paths are relative to the file.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from kontext_train.errors import ConfigError

IMAGE_PARTS = ("target", "context")


class Policy(Enum):
    drop = "drop"
    quarantine = "quarantine"  # left out too, and listed for somebody to look at
    report = "report"  # kept, and noted


class Kind(Enum):
    words = "words"  # the prompt, by a list of words and regular expressions
    image_hash = "image_hash"  # images, by a list of perceptual hashes
    file_hash = "file_hash"  # the files that images were given as, by a list of MD5, SHA-1 or SHA-256
    clip_image = "clip_image"  # images, by a head on a CLIP vision tower
    clip_text = "clip_text"  # the prompt, by a head on a CLIP text tower
    metadata = "metadata"  # the sample's JSON, by an expression; of shards only
    combination = "combination"  # several rules' scores together


@dataclass(frozen=True, slots=True)
class Rule:
    """What does not belong to its kind is None or empty."""

    name: str
    kind: Kind
    policy: Policy
    parts: tuple[str, ...] = ()  # of images: target, context
    list: Path | None = None
    distance: int = 0  # bits of 64
    clip: Path | None = None
    head: Path | None = None
    threshold: float | None = None  # of clip_*: None takes the one its head was calibrated to
    where: str = ""
    of: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rules:
    name: str
    rules: tuple[Rule, ...]
    source: Path

    @property
    def reports_only(self) -> bool:
        """Whether it keeps nothing out but what could not be judged."""
        return all(rule.policy is Policy.report for rule in self.rules)


# by kind: keys it needs, and those it may have
_COMMON = {"name", "kind", "policy"}
_KEYS: Mapping[Kind, tuple[set[str], set[str]]] = {
    Kind.words: ({"list"}, set()),
    Kind.image_hash: ({"list", "distance"}, {"parts"}),
    Kind.file_hash: ({"list"}, {"parts"}),
    Kind.clip_image: ({"clip", "head"}, {"parts", "threshold"}),
    Kind.clip_text: ({"clip", "head"}, {"threshold"}),
    Kind.metadata: ({"where"}, set()),
    Kind.combination: ({"of", "threshold"}, set()),
}


def read_rules(path: str | Path, key: str = "rules") -> Rules:
    """key: of the option that named the file, for errors.

    Raises ConfigError that names rule, value and what to do: also for a list, a model or a head that is not there.
    """
    path = Path(path)
    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            key, str(path), f"cannot be read ({error})", "Give a file of rules: docs/safety.md"
        ) from error
    if not isinstance(given, dict) or not isinstance(given.get("name"), str) or not given.get("rules"):
        raise ConfigError(key, str(path), "must hold a name and a list of rules", "See docs/safety.md")
    if unknown := sorted(given.keys() - {"name", "rules"}):
        raise ConfigError(f"{key}.{unknown[0]}", given[unknown[0]], "is no key of a policy", "Known are name and rules")
    rules: list[Rule] = []
    for number, entry in enumerate(given["rules"]):
        rules.append(_rule(f"{key}.rules[{number}]", entry, path.parent, rules))
    return Rules(given["name"], tuple(rules), path)


def _rule(key: str, entry: Any, folder: Path, before: Sequence[Rule]) -> Rule:
    if not isinstance(entry, dict):
        raise ConfigError(key, entry, "must be an object with name, kind and policy", "See docs/safety.md")
    kind, policy = (
        _one_of(Kind, f"{key}.kind", entry.get("kind")),
        _one_of(Policy, f"{key}.policy", entry.get("policy")),
    )
    needed, allowed = _KEYS[kind]
    if missing := sorted((_COMMON | needed) - entry.keys()):
        raise ConfigError(f"{key}.{missing[0]}", None, f"must be given for kind={kind.value}", "See docs/safety.md")
    if unknown := sorted(entry.keys() - _COMMON - needed - allowed):
        value, known = entry[unknown[0]], ", ".join(sorted(_COMMON | needed | allowed))
        raise ConfigError(f"{key}.{unknown[0]}", value, f"has no effect for kind={kind.value}", f"Known: {known}")
    name = entry["name"]
    if not isinstance(name, str) or not name or name in {rule.name for rule in before}:
        raise ConfigError(f"{key}.name", name, "must be a name that no other rule has", "Rename it")
    paths = {part: _path(f"{key}.{part}", entry[part], folder) for part in ("list", "clip", "head") if part in entry}
    rule = Rule(
        name,
        kind,
        policy,
        parts=tuple(entry.get("parts", IMAGE_PARTS if "parts" in allowed else ())),
        distance=entry.get("distance", 0),
        threshold=entry.get("threshold"),
        where=entry.get("where", ""),
        of=tuple(entry.get("of", ())),
        **paths,
    )
    _check(key, rule, before)
    return rule


def _check(key: str, rule: Rule, before: Sequence[Rule]) -> None:
    if strange := [part for part in rule.parts if part not in IMAGE_PARTS]:
        raise ConfigError(f"{key}.parts", strange[0], "is no kind of image", f"Known are {', '.join(IMAGE_PARTS)}")
    if "parts" in _KEYS[rule.kind][1] and not rule.parts:
        raise ConfigError(f"{key}.parts", [], "looks at nothing", "Give target, context or both")
    if not (isinstance(rule.distance, int) and 0 <= rule.distance <= 16):
        raise ConfigError(f"{key}.distance", rule.distance, "must be 0 to 16 bits of 64", "6 finds resized copies")
    if not is_threshold(rule.threshold) and (rule.threshold is not None or rule.kind is Kind.combination):
        raise ConfigError(f"{key}.threshold", rule.threshold, "must be above 0 and at most 1", "For example 0.5")
    if rule.kind is Kind.combination:
        scored = [r.name for r in before if r.kind in (Kind.clip_image, Kind.clip_text)]
        if len(rule.of) < 2 or (strange := [name for name in rule.of if name not in scored]):
            rule_text = "must name at least two rules above it of kind clip_image or clip_text"
            raise ConfigError(f"{key}.of", list(rule.of), rule_text, f"There are: {', '.join(scored) or 'none'}")


def is_threshold(value: Any) -> bool:
    """Whether scores, which end at 1, can reach it and need not all reach it. Not so NaN, which nothing does."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _one_of(kind: type[Enum], key: str, value: Any) -> Any:
    try:
        return kind(value)
    except ValueError as error:
        raise ConfigError(key, value, "is not known", f"Use one of {', '.join(k.value for k in kind)}") from error


def _path(key: str, value: Any, folder: Path) -> Path:
    path = folder / str(value)
    if not path.exists():
        raise ConfigError(key, str(value), f"must exist: there is no {path}", "Paths are relative to the file of rules")
    return path


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
