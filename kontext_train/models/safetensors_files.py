"""safetensors files as they lie on disk: read by name and rows, written one tensor at a time. Knows no model.

Files are memory-mapped: what is read occupies page cache, which the system takes back when it must, and no memory of
the process. What is written is as large as one tensor in memory, however large the file.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# Names as in the header of the format.
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a network: a file itself, or those of a folder, by its index if it has one.

    Of a folder with `transformer/` inside (a diffusers pipeline) that is taken. Raises ValueError if files are missing
    or more than one index could be meant.
    """
    folder = Path(path)
    if folder.is_file():
        return [folder]
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise ValueError(f"{folder}: holds several indexes, {[i.name for i in indexes]}. Leave the one that is meant")
    if not indexes:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{path}: no safetensors file there. Give a .safetensors file or a folder of them")
        return files
    try:
        names = sorted(set(json.loads(indexes[0].read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{indexes[0]}: is no index of safetensors files ({error!r}). Fetch it again") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: {missing[0]} is missing, which {indexes[0].name} names. Fetch the folder again")
    return [folder / name for name in names]


def holds_weights(path: Path) -> bool:
    """Whether `weight_files` would find any."""
    patterns = ("*.safetensors", "transformer/*.safetensors")
    return path.suffix == ".safetensors" if path.is_file() else any(any(path.glob(p)) for p in patterns)


def read_metadata(path: str | Path) -> dict[str, str]:
    """What the header of the first file says besides its tensors."""
    return _open(weight_files(path)[0]).metadata() or {}


class StoredTensors:
    """The tensors of `weight_files(path)`. Opening reads headers only.

    Raises ValueError naming the file that is damaged, or the tensor that two files hold.
    """

    def __init__(self, path: str | Path) -> None:
        self._slices: dict[str, Any] = {}
        for file in weight_files(path):
            opened = _open(file)
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                if name in self._slices:
                    raise ValueError(f"{file}: {name} is in another file of the folder too. Give one of the files")
                self._slices[name] = opened.get_slice(name)

    def names(self) -> set[str]:
        return set(self._slices)

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def is_float(self, name: str) -> bool:
        return self._slices[name].get_dtype() in _FLOATS

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start, ...] in the stored dtype: a view of the mapped file, for reading only."""
        return self._slices[name][start:stop]

    def scalar(self, name: str) -> float:
        return float(self._slices[name][...])


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: is not a whole safetensors file ({error}). Fetch it again") from error


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Spec":
        return cls(name, tuple(tensor.shape), tensor.dtype)

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_files(specs: Iterable[Spec], stem: str, max_bytes: int | None) -> dict[str, list[Spec]]:
    """File name -> its tensors. Files are filled in order up to max_bytes, a larger tensor being alone in one; None
    makes one file, which is called `stem.safetensors`, as does all that fits into one.
    """
    files: list[list[Spec]] = [[]]
    for spec in specs:
        if files[-1] and max_bytes is not None and sum(s.bytes for s in files[-1]) + spec.bytes > max_bytes:
            files.append([])
        files[-1].append(spec)
    if len(files) == 1:
        return {f"{stem}.safetensors": files[0]}
    return {f"{stem}-{i:05d}-of-{len(files):05d}.safetensors": f for i, f in enumerate(files, start=1)}


def write_files(
    folder: Path, plan: Mapping[str, Sequence[Spec]], tensors: Iterable[tuple[str, Tensor]], about: Mapping[str, str]
) -> None:
    """Write planned files from tensors that come one at a time, in any order.

    about: for the header of every file. An index, `STEM.safetensors.index.json`, is added if there are several files.
    """
    places: dict[str, tuple[Any, int, Spec]] = {}
    with ExitStack() as stack:
        for name, specs in plan.items():
            file = stack.enter_context((folder / name).open("wb"))
            header, offsets = _layout(specs, about)
            file.write(header)
            places |= {s.name: (file, len(header) + offsets[s.name], s) for s in specs}
        for name, tensor in tensors:
            file, offset, spec = places.pop(name)
            assert Spec.of(name, tensor) == spec, f"{name} is not what was planned: {spec}"
            file.seek(offset)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    assert not places, f"planned but never came: {sorted(places)[:3]}"
    if len(plan) > 1:
        size = sum(spec.bytes for specs in plan.values() for spec in specs)
        weight_map = {spec.name: name for name, specs in plan.items() for spec in specs}
        stem = next(iter(plan)).rpartition("-of-")[0].rpartition("-")[0]
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _layout(specs: Sequence[Spec], about: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header of a file, with its length before it, and where behind it each tensor begins.

    Wide types come first, so that every tensor is aligned to its type: readers view the mapped file.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **about}}
    offsets, end = {}, 0
    for spec in sorted(specs, key=lambda s: -s.dtype.itemsize):
        offsets[spec.name], end = end, end + spec.bytes
        place = [offsets[spec.name], end]
        entries[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": place}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, offsets
