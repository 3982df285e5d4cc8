"""Decodes every image of a folder of shards and reports what is broken, doubled, or out of proportion."""

import argparse
import hashlib
import io
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from data_tools.check_report import write_report
from data_tools.check_statistics import MEASURES, Checked
from data_tools.command import add_out, add_processes, at_least, command_parser, exit_status
from data_tools.scanning import scan, shard_digest
from data_tools.shard_writing import SCRATCH, Task, growing_folder, replacing, run_tasks
from kontext_train.data.encoding import ENCODING_NAME
from kontext_train.data.index import folder_shards
from kontext_train.data.shard import IMAGE_FORMATS, Problem, ScannedSample, Span, parse_sample_json
from kontext_train.safety.hashes import perceptual_hash

_EXAMPLES = """examples:
  python -m data_tools.check_shards /data/edits --out report
  python -m data_tools.check_shards /data/edits --out report --tokenizer FLUX.1-dev/tokenizer_2 --t5-tokens 512
  python -m data_tools.check_shards /data/edits --out report --duplicate-distance 0 --processes 2

Writes to OUT, which appears when all is done:
  report.html       one page that needs nothing else: numbers, plots, thumbnails
  report.json       the same numbers for programs
  broken.jsonl      everything unreadable: shard, key, reason
  duplicates.jsonl  targets that look like an earlier one: shard, key, that one, bits that differ, same prompt or not
  identical.jsonl   samples whose target is one of their own context images, pixel for pixel
filter_shards --drop-list takes each of these lists. Two targets look alike if their 64-bit DCT hashes (pHash) differ in
at most --duplicate-distance bits; images of one colour have no such hash. Until all is done .OUT.partial grows, and the
same command goes on from there if it was interrupted. Exit status: 0 nothing is broken; 1 something is, or an error."""


@dataclass(slots=True)
class _Shard:
    """What a process is given."""

    source: Path
    measures: Path  # the file to write
    tokenizer: Path | None


def check_shards(
    folder: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    t5_tokens: int = 512,
    duplicate_distance: int = 4,
    processes: int = 1,
) -> dict[str, Any]:
    """Writes the report on `folder` to `out` and returns what its report.json holds.

    Args:
        folder: shards, with or without an index.
        out: the new folder. It must not exist or be empty.
        tokenizer: folder of a T5 tokenizer, for prompt lengths in tokens.
        t5_tokens: the length that prompts are cut to in training (encoders.t5_tokens).
        duplicate_distance: bits of 64; at most 8, as beyond that unlike images are found.
        processes: how many look at shards at the same time.

    Raises:
        ValueError: a bad argument, or a folder without shards.
        OSError: files could not be read or written.
    """
    if not 0 <= duplicate_distance <= 8:
        raise ValueError(f"duplicate_distance is {duplicate_distance}; it must be 0 to 8 bits")
    if tokenizer is not None and not tokenizer.is_dir():
        raise ValueError(f"tokenizer is {tokenizer}, which is not a folder. Give a released model's tokenizer_2")
    shards = folder_shards(folder)
    if (folder / ENCODING_NAME).exists():
        raise ValueError(f"{folder} holds encoded shards (it has {ENCODING_NAME}). Give the images they were made from")
    with growing_folder(out) as partial:
        tasks = []
        for shard in shards:
            given = _Shard(shard, partial / SCRATCH / f"{shard.name}.parquet", tokenizer)
            tasks.append(Task(shard.name, given, shard_digest(shard, str(tokenizer)), shard.stat().st_size))
        total = sum(task.size for task in tasks)
        results = run_tasks(_check, tasks, partial, processes=processes, total=total, label="check", unit="B")
        broken = []
        with closing(results):
            for task, result in results:
                broken += [{"shard": task.name, **problem} for problem in result["problems"]]
        broken.sort(key=lambda problem: problem["shard"])
        checked = Checked(folder, [task.given.measures for task in tasks], broken)
        return write_report(checked, partial, duplicate_distance, t5_tokens if tokenizer is not None else None)


def measure_shard(shard: Path) -> tuple[list[dict[str, Any]], list[Problem]]:
    """A row of `MEASURES` for each sample that can be read in full, and the problems of the others."""
    rows: list[dict[str, Any]] = []
    problems: list[Problem] = []
    with open(shard, "rb") as file:
        for found in scan(shard):
            if isinstance(found, Problem):
                problems.append(found)
                continue
            try:
                rows.append(_measured(found, file))
            except ValueError as error:
                problems.append(Problem(shard.name, found.key, str(error)))
    return rows, problems


def _check(given: _Shard) -> dict[str, Any]:
    """Measures one shard, and returns its problems."""
    rows, problems = measure_shard(given.source)
    if given.tokenizer is not None and rows:
        tokens = _tokenizer(given.tokenizer)([row["prompt"] for row in rows]).input_ids
        for row, ids in zip(rows, tokens, strict=True):
            row["t5_tokens"] = len(ids)
    with replacing(given.measures) as out:
        pq.write_table(pa.Table.from_pylist(rows, MEASURES), out)
    return {"problems": [{"key": problem.key, "reason": problem.reason} for problem in problems]}


def _measured(sample: ScannedSample, file: IO[bytes]) -> dict[str, Any]:
    """A row of `MEASURES`. Raises ValueError that says which member cannot be read and why."""
    prompt = parse_sample_json(_content(file, sample.json))["prompt"]
    raw = _content(file, sample.target)
    target = _decoded("target", raw, sample.target_hw)
    identical = False
    for number, (span, hw) in enumerate(zip(sample.contexts, sample.context_hw, strict=True)):
        context = _decoded(f"context.{number}", _content(file, span), hw)
        identical = identical or (context.size == target.size and context.tobytes() == target.tobytes())
    return {
        "key": sample.key,
        "prompt": prompt,
        "prompt_id": int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "little"),
        "prompt_chars": len(prompt),
        "height": sample.target_hw[0],
        "width": sample.target_hw[1],
        "target_id": int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little"),
        "target_hash": perceptual_hash(target),
        "identical": identical,
        "target": list(sample.target),
        "contexts": [list(span) for span in sample.contexts],
    }


def _content(file: IO[bytes], span: Span) -> bytes:
    file.seek(span.offset)
    return file.read(span.size)


def _decoded(role: str, raw: bytes, hw: tuple[int, int]) -> Image.Image:
    """The image, upright, in RGB. Raises ValueError with role and reason."""
    try:
        with Image.open(io.BytesIO(raw), formats=IMAGE_FORMATS) as encoded:
            image = ImageOps.exif_transpose(encoded).convert("RGB")
    except Exception as error:  # Pillow raises a dozen kinds on bad bytes, SyntaxError and struct.error among them
        raise ValueError(f"{role} cannot be decoded ({type(error).__name__}: {error})") from error
    if (image.height, image.width) != hw:
        raise ValueError(f"{role} decodes to {image.height}×{image.width}, its header says {hw[0]}×{hw[1]}")
    return image


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer  # seconds to import
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns of prompts longer than T5's own 512 tokens; the report counts them
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_parser("check_shards", __doc__, _EXAMPLES)
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder of shards (*.tar)")
    add_out(parser, "the folder of the report")
    parser.add_argument("--tokenizer", metavar="DIR", type=Path, help="a T5 tokenizer, to count prompts in tokens too")
    parser.add_argument(
        "--t5-tokens", metavar="N", type=at_least(1), default=512, help="where training cuts prompts (default: 512)"
    )
    parser.add_argument(
        "--duplicate-distance", metavar="BITS", type=at_least(0), default=4, help="0 to 8 of 64 (default: 4)"
    )
    add_processes(parser)
    arguments = parser.parse_args(argv)
    return exit_status(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    report = check_shards(
        arguments.folder,
        arguments.out,
        tokenizer=arguments.tokenizer,
        t5_tokens=arguments.t5_tokens,
        duplicate_distance=arguments.duplicate_distance,
        processes=arguments.processes,
    )
    print(f"{arguments.out}/report.html: {report['samples']:,} good samples in {report['shards']:,} shards")
    print(f"  broken      {report['broken']:>10,}")
    print(f"  duplicates  {report['duplicates']:>10,}")
    print(f"  identical   {report['identical']:>10,}  (target is a context image)")
    print(f"  empty       {report['prompts']['empty']:>10,}  (prompts)")
    return int(report["broken"] > 0)


if __name__ == "__main__":
    sys.exit(main())
