"""A benchmark folder: KontextBench as it is released, or any folder of the same form.

    metadata.jsonl    one line a pair: key, category, instruction, file_name (the context image; null for text-to-image)
    chains.jsonl      optional, one line a chain of edits: key, file_name, instructions
    benchmark.json    optional: {"name": ..., "categories": {category: number of pairs}}

The last says what a complete folder holds; without it, that is KontextBench. What else a line may say is in
docs/evaluation.md. Names and counts of the release: huggingface.co/datasets/black-forest-labs/kontext-bench.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kontext_train.errors import ConfigError

KONTEXT_BENCH = {
    "Instruction Editing - Local": 416,
    "Instruction Editing - Global": 262,
    "Character Reference": 193,
    "Text Editing": 92,
    "Style Reference": 63,
}
ALL = "all"  # pairs, whatever their category
SHOWN = 5  # names in a message
LONGEST_KEY = 200  # bytes: file systems stop at 255, and more is added to it
GET_IT = "Download all of it again, with its images (Git LFS or xet)"


@dataclass(frozen=True, slots=True)
class Case:
    """One image to be made, and what is known about the right one. A turn of a chain is a case too."""

    key: str
    category: str  # of a turn: "turn N"
    instruction: str
    contexts: tuple[Path, ...]  # a turn's: the first image of its chain, which drift is measured against
    target: Path | None = None  # the right image
    mask: Path | None = None  # white where the edit may change something
    text: str | None = None  # what should be legible
    source_caption: str | None = None  # what the context shows
    target_caption: str | None = None  # what the right image shows
    height: int | None = None  # pixels; None: by the resolution policy
    width: int | None = None
    turn: int = 0  # of a chain, from 1
    home: bool = False  # the chain's edits undo each other: this turn should show the first image again
    base: str = ""  # what results have in common: prompts on one image, by its place in the folder, are not independent
    inputs: str = ""  # digest of what decides its image; a turn's, of the turns before too
    truth: str = ""  # digest of what it is measured against

    @property
    def before(self) -> str:
        """The key of the turn before."""
        assert self.turn > 1
        return f"{self.key.rsplit('_', 1)[0]}_{self.turn - 1}"


@dataclass(frozen=True, slots=True)
class Benchmark:
    name: str
    folder: Path
    pairs: tuple[Case, ...]
    chains: tuple[tuple[Case, ...], ...]
    digest: str  # of all lines and files

    def __iter__(self) -> Iterator[Case]:
        """Every case, in order."""
        yield from self.pairs
        for chain in self.chains:
            yield from chain

    def first(self, per_category: int) -> "Benchmark":
        """The first pairs of every category, and as many chains."""
        seen: Counter[str] = Counter()
        pairs = []
        for case in self.pairs:
            seen[case.category] += 1
            if seen[case.category] <= per_category:
                pairs.append(case)
        return Benchmark(self.name, self.folder, tuple(pairs), self.chains[:per_category], self.digest)


def read_benchmark(given: str | Path, *, partial: bool = False, key: str = "benchmark") -> Benchmark:
    """Every line checked, every file there. partial: fewer pairs than a complete folder has are taken as they are.

    Raises ConfigError, which names what is wrong and counts it.
    """
    folder = _root(Path(given), key)
    name, expected = _declared(folder, key)
    lines = _lines(folder / "metadata.jsonl", key)
    pairs = tuple(_pair(folder, line, f"metadata.jsonl line {number}", key) for number, line in lines)
    chains: tuple[tuple[Case, ...], ...] = ()
    if (folder / "chains.jsonl").is_file():
        its_lines = _lines(folder / "chains.jsonl", key)
        chains = tuple(_chain(folder, line, f"chains.jsonl line {number}", key) for number, line in its_lines)
    benchmark = Benchmark(name, folder, pairs, chains, "")
    _check_keys(benchmark, key)
    _check_categories(benchmark, expected, partial, key)
    _check_files(benchmark, key)
    hashes = {file: hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() for file in files_of(benchmark)}
    pairs = _with_digests(pairs, hashes)
    chains = tuple(_with_digests(chain, hashes) for chain in chains)
    return Benchmark(name, folder, pairs, chains, _digest(benchmark, hashes))


def _root(given: Path, key: str) -> Path:
    """KontextBench's files are in its folder test/."""
    for folder in (given, given / "test"):
        if (folder / "metadata.jsonl").is_file():
            return folder
    rule = "must hold metadata.jsonl, itself or in test/"
    raise ConfigError(key, str(given), rule, "Give a folder in the form of KontextBench, see docs/evaluation.md")


def _declared(folder: Path, key: str) -> tuple[str, dict[str, int]]:
    file = folder / "benchmark.json"
    if not file.is_file():
        return "KontextBench", KONTEXT_BENCH
    try:
        declared = json.loads(file.read_text())
        return str(declared["name"]), {str(name): int(count) for name, count in declared["categories"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"has no name and number of pairs by category ({error!r})"
        raise ConfigError(key, str(file), rule, 'For example {"name": "mine", "categories": {"hats": 20}}') from error


def _lines(file: Path, key: str) -> list[tuple[int, dict[str, Any]]]:
    found = []
    lines = file.read_bytes().removesuffix(b"\n").split(b"\n")  # not splitlines: text may hold other line ends
    for number, raw in enumerate(lines if lines != [b""] else [], start=1):
        try:
            line = json.loads(raw)
        except ValueError as error:
            raise ConfigError(key, str(file), f"line {number} is no JSON: {error}", GET_IT) from error
        if not isinstance(line, dict):
            raise ConfigError(key, str(file), f"line {number} is no JSON object", GET_IT)
        found.append((number, line))
    return found


def _text(line: dict[str, Any], name: str, where: str, key: str) -> str:
    value = line.get(name)
    if isinstance(value, int):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise ConfigError(key, where, f"has no {name}, or an empty one", "Every line needs it")
    return value


def _safe_key(line: dict[str, Any], where: str, key: str) -> str:
    name = _text(line, "key", where, key)
    if name.startswith(".") or set(name) & set('/\\@\0"'):
        raise ConfigError(key, where, f"has the key {name!r}, which cannot be a file's name", "Use letters and digits")
    if len(name.encode()) > LONGEST_KEY:
        rule = f"has a key of {len(name.encode())} bytes, {name[:30]!r}…: files are named by it"
        raise ConfigError(key, where, rule, f"Use at most {LONGEST_KEY}")
    return name


def _pair(folder: Path, line: dict[str, Any], where: str, key: str) -> Case:
    category = _text(line, "category", where, key)
    if category == ALL or re.fullmatch(r"turn \d+", category):
        rule = f"has the category {category!r}, which results over {'all pairs' if category == ALL else 'chains'} have"
        raise ConfigError(key, where, rule, "Give it another name")
    references = line.get("reference_file_names") or []
    if not isinstance(references, list):
        raise ConfigError(key, where, f"has reference_file_names {references!r}, no list", 'For example ["a.png"]')
    files = [_file(folder, line.get("file_name"), "file_name", where, key)]
    files += [_file(folder, file, "reference_file_names", where, key) for file in references]
    name = _safe_key(line, where, key)
    return Case(
        key=name,
        category=category,
        instruction=_text(line, "instruction", where, key),
        contexts=tuple(file for file in files if file is not None),
        target=_file(folder, line.get("target_file_name"), "target_file_name", where, key),
        mask=_file(folder, line.get("mask_file_name"), "mask_file_name", where, key),
        text=_optional(line, "text", where, key),
        source_caption=_optional(line, "source_caption", where, key),
        target_caption=_optional(line, "target_caption", where, key),
        height=_side(line, "height", where, key),
        width=_side(line, "width", where, key),
        base=_base(folder, files[0]) or f"@{name}",
    )


def _file(folder: Path, given: object, name: str, where: str, key: str) -> Path | None:
    """A file below the folder; None where none is named."""
    if given is None or given == "":
        return None
    if not isinstance(given, str):
        raise ConfigError(key, where, f"has the {name} {given!r}, which is no file's name", "Give text, or null")
    if Path(given).is_absolute() or ".." in Path(given).parts:
        rule = f"has the {name} {given!r}, which leads out of the benchmark's folder"
        raise ConfigError(key, where, rule, "Put the file into the folder, and name it from there")
    return folder / given


def _base(folder: Path, context: Path | None) -> str:
    return "" if context is None else context.relative_to(folder).as_posix()


def _optional(line: dict[str, Any], name: str, where: str, key: str) -> str | None:
    value = line.get(name)
    if value is not None and not isinstance(value, str):
        raise ConfigError(key, where, f"has the {name} {value!r}, which is no text", "Give text, or leave it out")
    return value


def _side(line: dict[str, Any], name: str, where: str, key: str) -> int | None:
    value = line.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        rule = f"has the {name} {value!r}, which is no number of pixels"
        raise ConfigError(key, where, rule, "Give a whole number above 0, or leave it out")
    return value


def _chain(folder: Path, line: dict[str, Any], where: str, key: str) -> tuple[Case, ...]:
    name, start = _safe_key(line, where, key), _file(folder, line.get("file_name"), "file_name", where, key)
    if start is None:
        raise ConfigError(key, where, "has no file_name, or an empty one", "Every chain needs it")
    instructions = line.get("instructions") or []
    if (
        not isinstance(instructions, list)
        or not all(isinstance(i, str) and i for i in instructions)
        or not instructions
    ):
        raise ConfigError(key, where, "has no instructions", 'For example ["add a hat", "remove the hat"]')
    targets, masks = (_one_a_turn(folder, line, f"{which}_file_names", where, key) for which in ("target", "mask"))
    return tuple(
        Case(
            key=f"{name}.turn_{turn}",
            category=f"turn {turn}",
            instruction=instruction,
            contexts=(start,),
            target=targets[turn - 1],
            mask=masks[turn - 1],
            turn=turn,
            home=bool(line.get("home")) and turn == len(instructions),
            base=_base(folder, start),
        )
        for turn, instruction in enumerate(instructions, start=1)
    )


def _one_a_turn(folder: Path, line: dict[str, Any], name: str, where: str, key: str) -> list[Path | None]:
    turns, files = len(line["instructions"]), line.get(name)
    if files is None:
        return [None] * turns
    if not isinstance(files, list):
        raise ConfigError(key, where, f"has {name} {files!r}, no list", "Give one a turn, or none")
    if len(files) != turns:
        raise ConfigError(key, where, f"has {len(files)} {name} for {turns} instructions", "Give one a turn, or none")
    return [_file(folder, file, name, where, key) for file in files]


def _check_keys(benchmark: Benchmark, key: str) -> None:
    doubled = [name for name, times in Counter(case.key for case in benchmark).items() if times > 1]
    if doubled:
        rule = f"has {len(doubled)} keys more than once ({some(doubled)})"
        raise ConfigError(key, str(benchmark.folder), rule, "Give every pair a key of its own")
    if not benchmark.pairs and not benchmark.chains:
        raise ConfigError(key, str(benchmark.folder), "holds no pairs and no chains", GET_IT)


def _check_categories(benchmark: Benchmark, expected: dict[str, int], partial: bool, key: str) -> None:
    found = Counter(case.category for case in benchmark.pairs)
    unknown = {name: count for name, count in found.items() if name not in expected}
    if unknown:
        told = some([f"{name!r} × {count}" for name, count in unknown.items()])
        rule = f"has {len(unknown)} categories that {benchmark.name} has not ({told}). It has {', '.join(expected)}"
        raise ConfigError(key, str(benchmark.folder), rule, "Correct them, or declare your own in benchmark.json")
    wrong = [f"{name} {found[name]} of {count}" for name, count in expected.items() if found[name] != count]
    if wrong and not (partial and all(found[name] <= count for name, count in expected.items())):
        total = f"{sum(found.values()):,} of {sum(expected.values()):,} pairs"
        rule = f"is not all of {benchmark.name}: {total} ({', '.join(wrong)})"
        raise ConfigError(key, str(benchmark.folder), rule, f"{GET_IT}, or say partial=true")


def _check_files(benchmark: Benchmark, key: str) -> None:
    absent = sorted({str(f.relative_to(benchmark.folder)) for f in files_of(benchmark) if not f.is_file()})
    if absent:
        rule = f"lacks {len(absent)} files that it names ({some(absent)})"
        raise ConfigError(key, str(benchmark.folder), rule, GET_IT)


def files_of(cases: Iterable[Case]) -> set[Path]:
    found = set[Path]()
    for case in cases:
        found |= {*case.contexts, *(file for file in (case.target, case.mask) if file is not None)}
    return found


def some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:SHOWN]) + (f", … {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _with_digests(cases: Sequence[Case], hashes: dict[Path, str]) -> tuple[Case, ...]:
    """Of pairs, or of one chain. hashes: of every file, wherever it lies."""
    found: list[Case] = []
    for case in cases:
        before = found[-1].inputs if case.turn > 1 else ""
        contexts = [hashes[file] for file in case.contexts]
        known = [None if file is None else hashes[file] for file in (case.target, case.mask)]
        captions = (case.text, case.source_caption, case.target_caption)
        inputs = _digest_of(case.instruction, contexts, case.height, case.width, before)
        truth = _digest_of(known, captions, case.category, case.home)
        found.append(replace(case, inputs=inputs, truth=truth))
    return tuple(found)


def _digest_of(*values: object) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def _digest(benchmark: Benchmark, hashes: dict[Path, str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    lines = [benchmark.folder / name for name in ("metadata.jsonl", "chains.jsonl")]
    for line in lines:
        digest.update(line.read_bytes() if line.is_file() else b"")
    for file in sorted(hashes):
        digest.update(hashes[file].encode())
    return digest.hexdigest()
