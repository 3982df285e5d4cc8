"""Replaces the targets of shards by pictures that a teacher makes, for distillation (docs/distillation.md)."""

import argparse
import glob
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data_tools.command import at_least, command_parser, exit_status
from data_tools.scanning import flat_rows
from data_tools.shard_writing import replacing, write_shard
from data_tools.shared_job import JobReport, share_of
from kontext_train.data.index import ShardIndex
from kontext_train.data.sample import BadSample, RawSample, SampleReader
from kontext_train.errors import ConfigError
from kontext_train.evaluation.trained import Trained, describe_model, load_trained
from kontext_train.flow.config import SamplerConfig
from kontext_train.generate import Request
from kontext_train.randomness import key_of

_EXAMPLES = """examples:
  python -m data_tools.generate_targets /data/edits --out /data/targets --teacher max.safetensors --guidance 3
  torchrun --nproc-per-node 8 -m data_tools.generate_targets /data/edits --out /data/targets --teacher max.safetensors
  sbatch --array=0-63 --gpus=1 --wrap "python -m data_tools.generate_targets /data/edits --out ... --teacher ..."

Every shard becomes one of the same name in --out, with the same keys, prompts and contexts, and with targets that the
teacher made of them at one constant guidance. A sample's picture is a function of (--seed, its shard's name, its key,
the teacher and the sampler). Processes (torchrun's, a Slurm array's, or both) share the shards out among themselves;
each holds the whole teacher. After a kill, run the same command again: finished shards are kept, the others are made.
Whoever finishes last writes the index. The result is an ordinary folder of shards: check_shards, encode_shards and
data.train take it. Exit status: 0 all is made, or what is left is others'; 1 samples that could not be read are left
out (said by whoever finishes last, and by every later run), or an error.

The teacher is a run of kontext-train, or what kontext-export made of one: kontext-export checkpoint=RUN
out=max.safetensors. A released file does not say which encoders, sizes and schedule it goes with, and is refused."""

SETTINGS = "generated.json"  # in --out: how its targets were made


def generate_targets(
    source: Path,
    out: Path,
    teacher: Path,
    sampler: SamplerConfig,
    *,
    seed: int = 0,
    ema: bool = True,
    encoders: str | None = None,
    share: tuple[int, int] = (0, 1),
    samples_at_once: int = 4,
) -> JobReport:
    """Makes the targets of this process's share of the shards of `source`, as far as they are not in `out` yet.

    Args:
        source: folder of indexed shards of images. Contexts and sizes are as the teacher's run would read them.
        teacher: what `evaluation.trained.load_trained` takes: a run folder, a checkpoint or an export. encoders, ema:
            as there.
        share: (number of this process, processes).

    Raises:
        ValueError: a bad argument, or `out` holds shards of another source or other settings.
        OSError: files could not be read or written. Finished shards stay.
    """
    index = ShardIndex.open(source)
    if index.encoding is not None:
        raise ValueError(f"{source} holds encoded shards. Give the folder of shards that they were made from")
    shards = flat_rows(index)
    settings = {"source": index.digest, **_described(teacher, ema, encoders), "seed": seed, "sampler": asdict(sampler)}
    out.mkdir(parents=True, exist_ok=True)
    _check_same(out, settings)
    trained = load_trained(teacher, ema=ema, encoders_path=encoders)
    number, sharers = share
    mine = shards[number::sharers]
    todo = [(name, rows) for name, rows in mine if not (out / name).exists()]
    report = JobReport(kept=len(mine) - len(todo))
    reader = SampleReader(index, trained.transform)
    with tqdm(total=sum(len(rows) for _, rows in todo), unit="sample", desc=f"process {number}", disable=None) as bar:
        for name, rows in todo:
            made = _made(_readable(reader, rows, report.bad), trained, sampler, seed, samples_at_once, bar)
            report.samples += write_shard(out / name, made)
            for left in out.glob(f".{glob.escape(name)}.*.tmp"):  # of a run that was killed
                left.unlink(missing_ok=True)
            report.shards += 1
    if all((out / name).exists() for name, _ in shards):
        report.index(index, out)
    return report


def _described(teacher: Path, ema: bool, encoders: str | None) -> dict[str, Any]:
    """What of the teacher decides pixels, wherever it and its encoders lie."""
    try:
        found = describe_model(str(teacher), ema, encoders)
    except ConfigError as error:
        if error.key != "checkpoint":
            raise
        raise ValueError(f"--teacher takes a run, a checkpoint of one or what kontext-export wrote. {error}") from error
    of_encoders = {key: value for key, value in found["encoders"].items() if key != "path"}
    decisive = {key: found[key] for key in ("weights", "shift", "sizes", "background")}
    return {"teacher": found["digest"], **decisive, "encoders": of_encoders}


def _check_same(out: Path, settings: dict[str, Any]) -> None:
    """ValueError if `out` was begun otherwise, or holds what this tool did not write."""
    file = out / SETTINGS
    if not file.is_file():
        if strangers := sorted(path.name for path in out.glob("*.tar")):
            raise ValueError(f"{out} holds {strangers[0]}, which generate_targets did not write. Give another folder")
        with replacing(file) as opened:  # several processes may at once: they write the same
            opened.write(json.dumps(settings, indent=2).encode())
        return
    begun = json.loads(file.read_bytes())
    if differ := [key for key in settings if begun.get(key) != settings[key]]:
        key = differ[0]
        raise ValueError(
            f"{out} was begun with another {key}: {begun.get(key)!r} there, {settings[key]!r} now. Use the same, or "
            "give another folder"
        )


def _readable(reader: SampleReader, rows: Sequence[int], bad: list[str]) -> Iterator[RawSample]:
    for row in rows:
        try:
            yield reader.read(row)
        except BadSample as error:
            bad.append(str(error))


def _made(
    samples: Iterator[RawSample], trained: Trained, sampler: SamplerConfig, seed: int, at_once: int, bar: "tqdm[Any]"
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of each sample, for `write_shard`."""
    while raws := list(islice(samples, at_once)):
        requests = [_request(raw, seed) for raw in raws]
        for raw, request, image in zip(raws, requests, trained.generate(requests, sampler), strict=True):
            contexts = {f"context.{i}.png": _png(np.asarray(context)) for i, context in enumerate(raw.contexts)}
            about = raw.metadata | {"prompt": raw.prompt, "generated": {"seed": request.seed}}
            target = _png(image.permute(1, 2, 0).numpy())
            yield raw.key, {"json": json.dumps(about).encode(), "target.png": target, **contexts}
        bar.update(len(raws))


def _request(raw: RawSample, seed: int) -> Request:
    height, width = raw.target.shape[:2]
    contexts = [_as_CHW(context) for context in raw.contexts]
    own_seed = key_of(seed, "target", raw.shard, raw.key) >> 65  # 63 bits
    return Request(raw.prompt, contexts, height, width, seed=own_seed)


def _as_CHW(image: Any) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(image)).permute(2, 0, 1)


def _png(image_HWC: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_HWC)).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_parser("generate_targets", __doc__, _EXAMPLES)
    sampler = SamplerConfig()
    add = parser.add_argument
    add("source", metavar="DIR", type=Path, help="a folder of indexed shards of images")
    add("--out", metavar="DIR", type=Path, required=True, help="the folder of shards with the teacher's targets")
    add("--teacher", metavar="PATH", type=Path, required=True, help="a run, a checkpoint, or an export of ours")
    add("--steps", metavar="N", type=at_least(1), default=sampler.steps, help="(default: %(default)s)")
    add(
        "--guidance",
        metavar="W",
        type=float,
        default=3.0,
        help="with the empty prompt, 1 is off (default: %(default)s)",
    )
    add(
        "--embedded-guidance", metavar="W", type=float, default=sampler.embedded_guidance, help="(default: %(default)s)"
    )
    add("--seed", metavar="N", type=int, default=0, help="(default: %(default)s)")
    add("--raw", action="store_true", help="the teacher's weights as trained, and not their average")
    add("--encoders", metavar="DIR", help="where the encoders are now, if not where the teacher's run had them")
    add("--samples-at-once", metavar="N", type=at_least(1), default=4, help="in one pass (default: %(default)s)")
    arguments = parser.parse_args(argv)
    return exit_status(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    report = generate_targets(
        arguments.source,
        arguments.out,
        arguments.teacher,
        SamplerConfig(arguments.steps, arguments.guidance, arguments.embedded_guidance),
        seed=arguments.seed,
        ema=not arguments.raw,
        encoders=arguments.encoders,
        share=share_of(os.environ),
        samples_at_once=arguments.samples_at_once,
    )
    return report.told(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
