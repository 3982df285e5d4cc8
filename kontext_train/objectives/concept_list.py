"""A list of concepts as a file. Torch-free, so that a bad list is refused before anything starts."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kontext_train.errors import ConfigError

_KEY = "objective.concepts"
_FIELDS = {"prompt", "anchor", "goal", "context", "height", "width"}


@dataclass(frozen=True, slots=True)
class Concept:
    """One way of asking for what must not be made."""

    prompt: str
    anchor: str | None  # what is made instead; None: away from the concept
    goal: str | None  # how the reference is best asked for it: what the attack is after; None: the prompt itself
    context: tuple[Path, ...]  # images to be edited or referred to; none is text-to-image
    size: tuple[int, int] | None  # height and width in pixels; None: of the first context


def read_concepts(path: str | None) -> list[Concept]:
    """JSON Lines: {"prompt": …, "anchor": …, "goal": …, "context": ["a.png"], "height": …, "width": …}; all but prompt
    may lack.

    Images are named relative to the list. Raises ConfigError that names line and rule.
    """
    if not path or not Path(path).is_file():
        raise ConfigError(_KEY, path, "must be a file of concepts, one JSON object a line", "See docs/safety.md")
    lines = Path(path).read_text().splitlines()
    concepts = [_concept(Path(path), number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not concepts:
        raise ConfigError(_KEY, path, "holds no concept", "Give one JSON object a line: docs/safety.md")
    return concepts


def concepts_digest(concepts: Sequence[Concept]) -> str:
    """Names a list by all that it says, its images' content too, wherever it lies."""
    digest = hashlib.sha256()
    for concept in concepts:
        said = [concept.prompt, concept.anchor, concept.goal, concept.size, len(concept.context)]
        digest.update(json.dumps(said).encode())
        for path in concept.context:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _concept(path: Path, number: int, line: str) -> Concept:
    def refuse(rule: str, hint: str) -> ConfigError:
        return ConfigError(_KEY, str(path), f"line {number} {rule}", hint)

    try:
        entry = json.loads(line)
    except ValueError as error:
        raise refuse(f"is not JSON ({error})", "Correct it") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise refuse("must be an object with a string prompt", 'For example {"prompt": "a red circle"}')
    if unknown := sorted(entry.keys() - _FIELDS):
        raise refuse(f"has {unknown[0]!r}, which is no field", f"Known are {', '.join(sorted(_FIELDS))}")
    anchor, goal, context = entry.get("anchor"), entry.get("goal"), entry.get("context", [])
    for name, given in (("anchor", anchor), ("goal", goal)):
        if not (given is None or isinstance(given, str)):
            raise refuse(f"has {name} {given!r}", "It must be a string, or left out")
    if not isinstance(context, list) or not all(isinstance(name, str) for name in context):
        raise refuse(f"has context {context!r}", "It must be a list of image files")
    files = tuple(path.parent / name for name in context)
    if missing := [file for file in files if not file.is_file()]:
        raise refuse(f"names {missing[0]}, which is no file", "Paths are relative to the list")
    match entry.get("height"), entry.get("width"):
        case int() as height, int() as width if height > 0 and width > 0:
            return Concept(entry["prompt"], anchor, goal, files, (height, width))
        case None, None if files:
            return Concept(entry["prompt"], anchor, goal, files, None)
        case _:
            raise refuse("must have height and width in pixels, both or, with a context, neither", "Add them")
