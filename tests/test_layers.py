"""Layers hold: a file imports its own room or lower ones, never upward, never a sibling room."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "kontext_train"
ORDER = [
    {"errors"},
    {"randomness"},
    {"flow", "models", "distributed"},
    {"data"},
    {"generate", "safety"},
    {"objectives"},
    {"training"},
    {"trainer"},
    {"evaluation", "estimation"},
    {"config", "overrides"},
    {"assembly"},
    {"train", "sample", "evaluate", "export", "estimate"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.name != "__init__.py"]


def room_of(parts: tuple[str, ...]) -> str:
    return parts[0]


def imported(file: Path) -> list[tuple[str, ...]]:
    """Dotted names below kontext_train that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        modules = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [tuple(m.split(".")[1:]) for m in modules if m.startswith("kontext_train.")]
    return names


def violations(own: str, names: list[tuple[str, ...]]) -> list[str]:
    return [".".join(n) for n in names if room_of(n) != own and LEVEL[room_of(n)] >= LEVEL[own]]


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(file: Path) -> None:
    own = room_of(file.relative_to(ROOT).with_suffix("").parts)
    assert violations(own, imported(file)) == []


def test_an_upward_and_a_sideways_import_are_seen() -> None:
    assert violations("models", [("training", "ema")]) == ["training.ema"]
    assert violations("models", [("flow", "path")]) == ["flow.path"]
    assert violations("training", [("models", "flux"), ("training", "ema")]) == []


@pytest.mark.parametrize("file", [*ROOT.glob("*/config.py"), ROOT / "config.py", ROOT / "errors.py"], ids=str)
def test_options_import_nothing_heavy(file: Path) -> None:
    tree = ast.parse(file.read_text())
    modules = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert not {m.split(".")[0] for m in modules} & {"torch", "numpy", "transformers", "diffusers", "pyarrow", "wandb"}
