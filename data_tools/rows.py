"""One row of a table becomes the members of one sample, or an error that names column, value, rule and what to do."""

import io
import json
import os
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from PIL import Image

from data_tools import tables
from data_tools.tables import Row, Table
from kontext_train.data.shard import IMAGE_FORMATS, IMAGE_SUFFIXES, parse_sample_json, read_image_hw

_SUFFIX = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
_TEXT_SEPARATOR = ";"


@dataclass(slots=True)
class Columns:
    """Which column is what. Of several names for one role the first that a row has counts.

    `context` of the user's is different: all of its columns are read, in order. `keep`: columns that go into the
    sample's JSON; None takes all that are left, except images inside a Parquet file.
    """

    target: tuple[str, ...] = ("target", "edited_image", "image", "file_name")
    prompt: tuple[str, ...] = ("prompt", "edit_prompt", "text")
    context: tuple[str, ...] = ()
    keep: tuple[str, ...] | None = None


CONTEXT_DEFAULTS = ("context", "input_image", "original_image")


class BadRow(ValueError):
    """One value of a row that breaks a rule."""

    def __init__(self, column: str, value: Any, rule: str) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= 200 else shown[:200] + "…"
        super().__init__(f"column {column} is {shown}; {rule}")
        self.column = column


def check_columns(table: Table, wanted: Columns) -> None:
    """For tables that say their columns once: are those wanted there? Rows of others are looked at one by one."""
    names = tables.columns(table)
    if names is None:
        return
    for role, candidates in {"target": wanted.target, "prompt": wanted.prompt}.items():
        if not set(candidates) & set(names):
            rule = f"one must be {' or '.join(map(repr, candidates))}, or give --{role}"
            raise ValueError(f"{table.path}: columns are {names}; {rule}")
    for name in (*wanted.context, *(wanted.keep or ())):
        if name not in names:
            raise ValueError(f"{table.path}: columns are {names}; there is no {name!r}")


def sample_members(row: Row, images: Path, columns: Columns) -> dict[str, bytes]:
    """Content of each member of a sample by suffix. Raises ValueError: column, value, rule and what to do."""
    if isinstance(row, ValueError):
        raise row
    target, prompt = _first(row, columns.target), _first(row, columns.prompt)
    context = columns.context or tuple(name for name in CONTEXT_DEFAULTS if name in row)[:1]
    members = {"json": _sample_json(row, prompt, {target, prompt, *context}, columns.keep)}
    paths = [("target", target, row.get(target))]
    values = [(name, value) for name in context for value in _context_values(name, row.get(name))]
    paths += [(f"context.{number}", name, value) for number, (name, value) in enumerate(values)]
    for role, column, value in paths:
        suffix, content = _image(images, column, value)
        members[f"{role}.{suffix}"] = content
    return members


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in row), names[0])


def _sample_json(row: dict[str, Any], prompt: str, used: set[str], keep: tuple[str, ...] | None) -> bytes:
    if not isinstance(row.get(prompt), str):
        raise BadRow(prompt, row.get(prompt), "it must be a string. Write '' for an empty prompt")
    if keep is None:
        rest = {name: value for name, value in row.items() if name not in used and not _is_embedded(value)}
    else:
        rest = {name: row[name] for name in keep if name in row}
    if "prompt" in rest and prompt != "prompt":
        raise BadRow("prompt", rest["prompt"], f"the sample's prompt is in {prompt!r}. Name the columns to --keep")
    for name, value in rest.items():
        try:
            json.dumps(value, default=_plain, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise BadRow(
                name, value, f"JSON cannot hold it ({error}). Correct it or name the columns to --keep"
            ) from error
    raw = json.dumps({**rest, "prompt": row[prompt]}, default=_plain).encode()
    try:
        parse_sample_json(raw)
    except ValueError as error:
        raise BadRow(prompt, row[prompt], f"{error}. Correct the text") from error
    return raw


def _plain(value: Any) -> str | float:
    """Values of Parquet that JSON has no type for: times in ISO 8601, decimals as numbers."""
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    raise TypeError(f"it is {type(value).__name__}")


def _is_embedded(value: Any) -> bool:
    """Whether it is bytes, or an image as Hugging Face datasets store it, or a list of these."""
    if isinstance(value, list):
        return any(map(_is_embedded, value))
    return isinstance(value, bytes) or (isinstance(value, dict) and value.keys() == {"bytes", "path"})


def _context_values(column: str, value: Any) -> list[Any]:
    match value:
        case None | "":
            return []
        case str():
            return [path.strip() for path in value.split(_TEXT_SEPARATOR)]
        case list():
            return value
        case bytes() | dict():
            return [value]
        case _:
            rule = "it must be an image or a list of images: paths, or a string of paths with ';'"
            raise BadRow(column, value, rule)


def _image(images: Path, column: str, value: Any) -> tuple[str, bytes]:
    """Suffix and content of an image that is a path, bytes, or a struct of both."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        suffix, content = None, value
    else:
        path = _checked_path(images, column, value)
        suffix, content = path.suffix[1:].lower(), path.read_bytes()
    try:
        read_image_hw(io.BytesIO(content))
    except ValueError as error:
        raise BadRow(column, value, f"it is {error}. Replace the image or remove the row") from error
    if suffix is None:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            suffix = _SUFFIX[image.format or ""]
    return suffix, content


def _checked_path(images: Path, column: str, value: Any) -> Path:
    if not isinstance(value, str) or not value:
        raise BadRow(column, value, "it must be the path of an image. Fill it in")
    if "\0" in value:
        raise BadRow(column, value, "it must be the path of an image, which has no NUL. Correct it")
    path = Path(os.path.abspath(images / value))
    if not path.is_relative_to(os.path.abspath(images)):
        raise BadRow(
            column, value, f"it must stay inside {images}. Move the file there or give a higher --images folder"
        )
    if path.suffix[1:].lower() not in IMAGE_SUFFIXES:
        raise BadRow(column, value, f"it must end in {', '.join(IMAGE_SUFFIXES)}. Convert the image")
    if not path.is_file():
        raise BadRow(column, value, f"there is no such file in {images}. Correct the path or remove the row")
    return path
