"""The quickstart's world: pictures of coloured shapes on a grid, edits, and prompts for the edits.

A picture is 2 rows of 2 or 3 cells of 16 x 16 px (32 x 32 or 32 x 48 px). With the quickstart's VAE one cell is one
FLUX token. Colours and places jitter, so that what an edit leaves alone can be known only from the context image. What
an edit brings in (a new colour, a named background) has one canonical value, so that every edit has exactly one right
answer; `describe` (text-to-image) has many.

Shapes: H, W = picture height and width in px; C = 3 (RGB).
"""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

Rgb = tuple[int, int, int]

CELL_PX = 16
ROWS = 2
COLUMNS = (2, 3)
COLOURS: dict[str, Rgb] = {
    "red": (222, 34, 34),
    "green": (34, 180, 44),
    "blue": (44, 64, 226),
    "yellow": (226, 212, 34),
    "cyan": (34, 200, 216),
    "magenta": (214, 54, 204),
}
BACKGROUNDS: dict[str, Rgb] = {
    "black": (32, 32, 32),
    "gray": (128, 128, 128),
    "white": (222, 222, 222),
    "brown": (120, 74, 34),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (rows, columns)
COLOUR_JITTER = 24  # of 255, each channel, uniform; small enough that every colour stays nearest to its own name
BACKGROUND_JITTER = 30  # likewise
PLACE_JITTER = (-1, 0, 1)  # px
MAX_PROMPT_TOKENS = 12  # with the end token; `tests/quickstart` holds the wordings to it
MAX_DESCRIBED_THINGS = 3
HELD_OUT_SALT = 555  # one under which each kind holds out close to 1 in 8, and removal three shapes of three colours


class Kind(StrEnum):
    RECOLOUR = "recolour"
    REMOVE = "remove"
    MOVE = "move"
    BACKGROUND = "background"
    MATCH_BACKGROUND = "match_background"  # two context images
    DESCRIBE = "describe"  # text-to-image: no context image


EDIT_KINDS = tuple(kind for kind in Kind if kind is not Kind.DESCRIBE)
COMBINATION_KINDS = (Kind.RECOLOUR, Kind.REMOVE, Kind.MOVE)  # those that name a thing: some combinations are held out
SINGLE_CONTEXT_KINDS = (*COMBINATION_KINDS, Kind.BACKGROUND)


class Split(StrEnum):
    TRAIN = "train"
    HELDOUT_SCENES = "heldout_scenes"  # new scenes, trained combinations
    HELDOUT_COMBINATIONS = "heldout_combinations"  # only (kind, shape, colour, argument) never trained on


WORDINGS: dict[Kind, tuple[str, ...]] = {
    Kind.RECOLOUR: (
        "make the {colour} {shape} {argument}",
        "turn the {colour} {shape} {argument}",
        "recolour the {colour} {shape} to {argument}",
    ),
    Kind.REMOVE: ("remove the {colour} {shape}", "delete the {colour} {shape}", "erase the {colour} {shape}"),
    Kind.MOVE: (
        "move the {colour} {shape} {argument}",
        "shift the {colour} {shape} {argument}",
        "push the {colour} {shape} {argument}",
    ),
    Kind.BACKGROUND: (
        "make the background {argument}",
        "change the background to {argument}",
        "use a {argument} background",
    ),
    Kind.MATCH_BACKGROUND: (
        "use the background of the second image",
        "copy the background of the second image",
        "match the background of the second image",
    ),
}


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: its names, exact colour (0 to 255), cell, and place in it (`dx`, `dy` px off the centre)."""

    shape: str
    colour: str
    rgb: Rgb
    row: int
    column: int
    dx: int
    dy: int


@dataclass(frozen=True, slots=True)
class Scene:
    """2 rows x `columns` cells, a background (name, exact colour), and things; no two share both shape and colour."""

    columns: int
    background: str
    background_rgb: Rgb
    things: tuple[Thing, ...]

    def at(self, row: int, column: int) -> Thing | None:
        return next((thing for thing in self.things if (thing.row, thing.column) == (row, column)), None)

    def find(self, shape: str, colour: str) -> Thing | None:
        return next((thing for thing in self.things if (thing.shape, thing.colour) == (shape, colour)), None)

    def cells(self) -> list[tuple[int, int]]:
        return [(row, column) for row in range(ROWS) for column in range(self.columns)]

    def free_cells(self) -> list[tuple[int, int]]:
        return [cell for cell in self.cells() if self.at(*cell) is None]


@dataclass(frozen=True, slots=True)
class Edit:
    """What to do: `shape` and `colour` name the thing, `argument` the new colour, direction or background; else ""."""

    kind: Kind
    shape: str = ""
    colour: str = ""
    argument: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One training or evaluation sample: `contexts` (0, 1 or 2 scenes), the prompt, and the true outcome."""

    prompt: str
    edit: Edit
    contexts: tuple[Scene, ...]
    target: Scene

    def to_json(self) -> dict[str, Any]:
        """Plain JSON with everything a scorer needs; `Example.from_json` inverts it."""
        contexts = [asdict(scene) for scene in self.contexts]
        return {"prompt": self.prompt, "edit": asdict(self.edit), "contexts": contexts, "target": asdict(self.target)}

    @staticmethod
    def from_json(record: dict[str, Any]) -> "Example":
        edit = Edit(**{**record["edit"], "kind": Kind(record["edit"]["kind"])})
        contexts = tuple(_scene_from_json(scene) for scene in record["contexts"])
        return Example(record["prompt"], edit, contexts, _scene_from_json(record["target"]))


def _scene_from_json(record: dict[str, Any]) -> Scene:
    things = tuple(Thing(**{**thing, "rgb": tuple(thing["rgb"])}) for thing in record["things"])
    return Scene(record["columns"], record["background"], tuple(record["background_rgb"]), things)


# Drawing --------------------------------------------------------------------------------------------------------------


@functools.cache
def shape_mask(shape: str, dx: int, dy: int) -> np.ndarray:
    """Coverage of one cell by a shape: [16, 16, 1] float32 in [0, 1]. Every mask leaves the cell's outer ring free."""
    fine = 8
    step_px = (np.arange(CELL_PX * fine) + 0.5) / fine - CELL_PX / 2
    y, x = np.meshgrid(step_px - dy, step_px - dx, indexing="ij")
    match shape:
        case "circle":
            inside = x**2 + y**2 <= 5.2**2
        case "square":
            inside = np.maximum(abs(x), abs(y)) <= 4.5
        case "triangle":
            inside = (abs(y) <= 5) & (abs(x) <= (y + 5) * 0.55)
        case "cross":
            inside = (np.maximum(abs(x), abs(y)) <= 5.5) & (np.minimum(abs(x), abs(y)) <= 1.75)
        case _:
            raise ValueError(f"shape={shape!r} is not one of {SHAPES}")
    coverage = inside.reshape(CELL_PX, fine, CELL_PX, fine).mean(axis=(1, 3))
    return coverage[..., None].astype(np.float32)


def draw(scene: Scene) -> np.ndarray:
    """The picture of a scene: [32, 16 * columns, 3] uint8."""
    image_HWC = np.empty((ROWS * CELL_PX, scene.columns * CELL_PX, 3), np.uint8)
    image_HWC[:] = scene.background_rgb
    background_C = np.array(scene.background_rgb, np.float32)
    for thing in scene.things:
        cell = shape_mask(thing.shape, thing.dx, thing.dy) * (np.array(thing.rgb, np.float32) - background_C)
        image_HWC[_cell_slice(thing.row, thing.column)] = cell + (
            background_C + 0.5
        )  # + 0.5: the cast to uint8 truncates
    return image_HWC


def _cell_slice(row: int, column: int) -> tuple[slice, slice]:
    return slice(row * CELL_PX, (row + 1) * CELL_PX), slice(column * CELL_PX, (column + 1) * CELL_PX)


# Edits ----------------------------------------------------------------------------------------------------------------


def apply_edit(scene: Scene, edit: Edit, reference: Scene | None = None) -> Scene:
    """The one right outcome. `reference` is the second context image of `match_background`.

    Raises ValueError when it cannot be done in this scene (nothing of that name, no free cell there, no reference).
    """
    match edit.kind:
        case Kind.BACKGROUND:
            return replace(scene, background=edit.argument, background_rgb=BACKGROUNDS[edit.argument])
        case Kind.MATCH_BACKGROUND:
            if reference is None:
                raise ValueError("edit.kind=match_background needs `reference`, the scene of the second context image")
            return replace(scene, background=reference.background, background_rgb=reference.background_rgb)
        case Kind.RECOLOUR | Kind.REMOVE | Kind.MOVE:
            return _edit_thing(scene, edit)
        case Kind.DESCRIBE:
            raise ValueError("edit.kind=describe has no scene to edit: it is text-to-image")
        case _:
            raise ValueError(f"edit.kind={edit.kind!r} is not one of {list(Kind)}")


def _edit_thing(scene: Scene, edit: Edit) -> Scene:
    thing = scene.find(edit.shape, edit.colour)
    if thing is None:
        raise ValueError(f"{edit}: the scene has no {edit.colour} {edit.shape}")
    others = tuple(other for other in scene.things if other is not thing)
    if edit.kind is Kind.REMOVE:
        return replace(scene, things=others)
    if edit.kind is Kind.RECOLOUR:
        if scene.find(edit.shape, edit.argument) is not None:
            raise ValueError(f"{edit}: the scene already has a {edit.argument} {edit.shape}")
        return replace(scene, things=(*others, replace(thing, colour=edit.argument, rgb=COLOURS[edit.argument])))
    rows, columns = DIRECTIONS[edit.argument]
    cell = (thing.row + rows, thing.column + columns)
    if cell not in scene.free_cells():
        raise ValueError(f"{edit}: cell {cell} is outside the picture or taken")
    return replace(scene, things=(*others, replace(thing, row=cell[0], column=cell[1])))


def is_held_out(edit: Edit) -> bool:
    """Whether (kind, shape, colour, argument) is kept from training: 1 in 8, by a hash blind to the wording."""
    if edit.kind not in COMBINATION_KINDS:
        return False
    name = f"{HELD_OUT_SALT}/{edit.kind.value}/{edit.shape}/{edit.colour}/{edit.argument}"
    return hashlib.blake2b(name.encode(), digest_size=4).digest()[0] % 8 == 0


@functools.cache
def combinations(kind: Kind, held_out: bool) -> tuple[Edit, ...]:
    """All edits of a kind that names a thing, either the held-out ones or the trained ones."""
    arguments = {Kind.RECOLOUR: tuple(COLOURS), Kind.REMOVE: ("",), Kind.MOVE: tuple(DIRECTIONS)}[kind]
    every = (Edit(kind, shape, colour, word) for shape in SHAPES for colour in COLOURS for word in arguments)
    return tuple(edit for edit in every if edit.argument != edit.colour and is_held_out(edit) == held_out)


def valid_edits(scene: Scene, kind: Kind) -> Iterator[Edit]:
    """Every trained single-context edit of `kind` that this scene allows and that changes it."""
    if kind is Kind.BACKGROUND:
        yield from (Edit(kind, argument=name) for name in BACKGROUNDS if name != scene.background)
        return
    for edit in combinations(kind, held_out=False):
        thing = scene.find(edit.shape, edit.colour)
        if thing is None or (kind is Kind.REMOVE and len(scene.things) < 2):
            continue
        if kind is Kind.RECOLOUR and scene.find(edit.shape, edit.argument) is not None:
            continue
        if kind is Kind.MOVE:
            rows, columns = DIRECTIONS[edit.argument]
            if (thing.row + rows, thing.column + columns) not in scene.free_cells():
                continue
        yield edit


def sample_chain(rng: np.random.Generator, scene: Scene, turns: int) -> list[Edit]:
    """`turns` single-context edits to be done one after the other, each valid on the outcome of those before it."""
    edits: list[Edit] = []
    for _ in range(turns):
        kinds = [kind for kind in SINGLE_CONTEXT_KINDS if any(True for _ in valid_edits(scene, kind))]
        edit = _pick(rng, list(valid_edits(scene, _pick(rng, kinds))))
        edits.append(edit)
        scene = apply_edit(scene, edit)
    return edits


# Sampling -------------------------------------------------------------------------------------------------------------


def example_rng(seed: int, split: Split, index: int) -> np.random.Generator:
    """The generator of sample `index`: a function of its arguments, so samples can be made alone and in any order."""
    return np.random.default_rng([seed, list(Split).index(split), index])


def sample_example(
    rng: np.random.Generator, split: Split, kind: Kind | None = None, columns: int | None = None
) -> Example:
    """One sample; `kind` None: an edit kind, all equally likely; `columns` None: 2 or 3, equally likely.

    Raises ValueError for a kind without held-out combinations in that split.
    """
    held_out = split is Split.HELDOUT_COMBINATIONS
    if kind is None:
        kind = _pick(rng, COMBINATION_KINDS if held_out else EDIT_KINDS)
    if held_out and kind not in COMBINATION_KINDS:
        raise ValueError(
            f"kind={kind.value} has no held-out combinations; choose one of {[k.value for k in COMBINATION_KINDS]}"
        )
    columns = columns or _pick(rng, COLUMNS)
    if kind is Kind.DESCRIBE:
        scene = sample_scene(rng, columns, max_things=MAX_DESCRIBED_THINGS)
        return Example(describe(scene, rng), Edit(kind), (), scene)
    if kind in COMBINATION_KINDS:
        edit = _pick(
            rng, combinations(kind, held_out)
        )  # the combination first: no rejection, so nothing is under-sampled
        scene = scene_for(rng, columns, edit)
        return Example(phrase(edit, rng), edit, (scene,), apply_edit(scene, edit))
    scene = sample_scene(rng, columns)
    others = [name for name in BACKGROUNDS if name != scene.background]
    if kind is Kind.BACKGROUND:
        edit = Edit(kind, argument=_pick(rng, others))
        return Example(phrase(edit, rng), edit, (scene,), apply_edit(scene, edit))
    edit = Edit(kind)
    reference = sample_scene(rng, _pick(rng, COLUMNS), backgrounds=others)
    return Example(phrase(edit, rng), edit, (scene, reference), apply_edit(scene, edit, reference))


def sample_scene(
    rng: np.random.Generator, columns: int, max_things: int | None = None, backgrounds: list[str] | None = None
) -> Scene:
    """A random scene: 1-3 things on 2 columns, 2-4 on 3, at most `max_things`; a background out of `backgrounds`."""
    count = int(rng.integers(columns - 1, min(columns + 1, max_things or columns + 1) + 1))
    cells = [(row, column) for row in range(ROWS) for column in range(columns)]
    return _fill(rng, columns, _choose(rng, cells, count), [], set(), backgrounds)


def scene_for(rng: np.random.Generator, columns: int, edit: Edit) -> Scene:
    """A random scene in which a thing-naming `edit` can be done."""
    cells = [(row, column) for row in range(ROWS) for column in range(columns)]
    free: tuple[int, int] | None = None
    if edit.kind is Kind.MOVE:
        rows, steps = DIRECTIONS[edit.argument]
        cell = _pick(rng, [(row, column) for row, column in cells if (row + rows, column + steps) in cells])
        free = (cell[0] + rows, cell[1] + steps)
    else:
        cell = _pick(rng, cells)
    fewest = 2 if edit.kind is Kind.REMOVE else columns - 1
    count = int(rng.integers(fewest, columns + 2))
    others = _choose(rng, [other for other in cells if other not in (cell, free)], count - 1)
    outcome = (edit.shape, edit.argument if edit.kind is Kind.RECOLOUR else edit.colour)
    first = _sample_thing(rng, (edit.shape, edit.colour), cell)
    return _fill(rng, columns, others, [first], {(edit.shape, edit.colour), outcome}, None)


def _fill(
    rng: np.random.Generator,
    columns: int,
    cells: list[tuple[int, int]],
    things: list[Thing],
    taken: set[tuple[str, str]],
    backgrounds: list[str] | None,
) -> Scene:
    """A scene of `things` and, in each of `cells`, a new thing whose (shape, colour) is not `taken`."""
    pairs = _choose(rng, [pair for pair in _PAIRS if pair not in taken], len(cells))
    things = things + [_sample_thing(rng, pair, cell) for pair, cell in zip(pairs, cells, strict=True)]
    name = _pick(rng, backgrounds or tuple(BACKGROUNDS))
    return Scene(columns, name, _jitter(rng, BACKGROUNDS[name], BACKGROUND_JITTER), tuple(things))


_PAIRS = [(shape, colour) for shape in SHAPES for colour in COLOURS]


def _sample_thing(rng: np.random.Generator, pair: tuple[str, str], cell: tuple[int, int]) -> Thing:
    shape, colour = pair
    return Thing(
        shape,
        colour,
        _jitter(rng, COLOURS[colour], COLOUR_JITTER),
        *cell,
        _pick(rng, PLACE_JITTER),
        _pick(rng, PLACE_JITTER),
    )


def _jitter(rng: np.random.Generator, rgb: Rgb, amount: int) -> Rgb:
    red, green, blue = rng.integers(-amount, amount + 1, 3).tolist()
    return rgb[0] + red, rgb[1] + green, rgb[2] + blue


def _pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.random() * len(options))]  # Generator.choice costs 20 times as much


def _choose(rng: np.random.Generator, options: list[Any], count: int) -> list[Any]:
    """`count` different options in random order."""
    return [options[i] for i in rng.permutation(len(options))[:count]]


# Prompts --------------------------------------------------------------------------------------------------------------


def phrase(edit: Edit, rng: np.random.Generator) -> str:
    """One wording of an edit."""
    return str(_pick(rng, WORDINGS[edit.kind])).format(shape=edit.shape, colour=edit.colour, argument=edit.argument)


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """A text-to-image prompt: all things in random order and the background, no places. At most 3 things (tokens)."""
    if len(scene.things) > MAX_DESCRIBED_THINGS:
        raise ValueError(f"a prompt describes at most {MAX_DESCRIBED_THINGS} things, the scene has {len(scene.things)}")
    names = [f"{thing.colour} {thing.shape}" for thing in _choose(rng, list(scene.things), len(scene.things))]
    if len(names) == MAX_DESCRIBED_THINGS:
        return f"a {names[0]}, {names[1]} and {names[2]} on {scene.background}"
    ending = _pick(rng, (f"on a {scene.background} background", f"on {scene.background}"))
    return f"{' and '.join(f'a {name}' for name in names)} {ending}"
