"""Encodes shards of images once, so that training neither decodes images nor runs the frozen encoders."""

import argparse
import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data_tools.command import at_least, command_parser, exit_status
from data_tools.scanning import flat_rows
from data_tools.shard_writing import replacing, write_shard
from data_tools.shared_job import JobReport, share_of
from kontext_train.data.config import DataConfig, Resize
from kontext_train.data.encode import Encoders, load_encoders, map_by_size
from kontext_train.data.encoded import StoredText, describe_encoding, encoding_bytes, to_bytes
from kontext_train.data.encoding import ENCODING_NAME, digest_of
from kontext_train.data.index import ShardIndex, read_encoding
from kontext_train.data.sample import BadSample, RawSample, SampleReader
from kontext_train.data.transforms import Transform
from kontext_train.models.config import EncoderDtype, EncodersConfig

_EXAMPLES = """examples:
  python -m data_tools.encode_shards /data/edits --out /data/edits_encoded --encoders FLUX.1-dev
  python -m data_tools.encode_shards /data/edits --out /data/edits_encoded --encoders FLUX.1-dev --t5 --resize kontext
  torchrun --nproc-per-node 8 -m data_tools.encode_shards /data/edits --out /data/edits_encoded --encoders FLUX.1-dev
  sbatch --array=0-63 --gpus=1 --wrap "python -m data_tools.encode_shards /data/edits --out ... --encoders FLUX.1-dev"

Every shard becomes one of the same name in --out. Processes (torchrun's, a Slurm array's, or both) share the shards out
among themselves. After a kill, run the same command again: finished shards are kept, the others are made. Whoever
finishes last writes the index. Then train with data.train=OUT, the same encoders and the same data settings; others are
refused (docs/encoding.md). Exit status: 0 all is encoded, or what is left is others'; 1 bad samples are left out
(said by whoever finishes last), or an error."""


def encode_shards(
    source: Path,
    out: Path,
    encoders: EncodersConfig,
    data: DataConfig,
    *,
    t5: bool,
    share: tuple[int, int] = (0, 1),
    samples_at_once: int = 4,
    processes: int = 4,
) -> JobReport:
    """Encodes this process's share of the shards of `source`, as far as they are not in `out` yet.

    Args:
        source: folder of indexed shards of images.
        out: folder of encoded shards; made if it is not there.
        data: its geometry (resize, max_pixels, max_upscale, background) counts. Crops are centred.
        t5: store T5's tokens too (t5_tokens * 8 KiB a sample for T5-XXL); without, T5 runs while training.
        share: (number of this process, processes).

    Raises:
        ValueError: a bad argument, or `out` holds shards of another source or other settings.
        OSError: files could not be read or written. Finished shards stay.
    """
    index = ShardIndex.open(source)
    if index.encoding is not None:
        raise ValueError(f"{source} holds encoded shards already. Give the folder of shards that they were made from")
    shards = flat_rows(index)
    transform = Transform.of(data, encoders.pixels_per_token(), seed=0)
    encoding = describe_encoding(encoders, transform, t5, index.digest)
    out.mkdir(parents=True, exist_ok=True)
    begun = _check_same(out, encoding)
    number, sharers = share
    mine = shards[number::sharers]
    todo = [(name, rows) for name, rows in mine if not (out / name).exists()]
    report = JobReport(kept=len(mine) - len(todo))
    if todo:
        models = load_encoders(encoders, _device())
        if not begun:
            with replacing(out / ENCODING_NAME) as file:  # several processes may at once: they write the same
                file.write(encoding_bytes(encoding, _encode_prompts([""], models, t5)[0]))
        samples = _read(SampleReader(index, transform), [row for _, rows in todo for row in rows], processes)
        total = sum(len(rows) for _, rows in todo)
        with tqdm(total=total, unit="sample", desc=f"process {number}", disable=None) as bar:
            for name, rows in todo:
                read = _without_bad(islice(samples, len(rows)), report.bad, bar)
                encoded = _encode(read, models, t5, samples_at_once)
                write_shard(out / name, _members(encoded, digest_of(encoding), transform))
                for left in out.glob(f".{glob.escape(name)}.*.tmp"):  # of a run that was killed
                    left.unlink(missing_ok=True)
                report.shards += 1
        report.samples = sum(len(rows) for _, rows in todo) - len(report.bad)
    if all((out / name).exists() for name, _ in shards):
        report.index(index, out, index.safety_filter)  # what is encoded passed it too
    return report


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _check_same(out: Path, encoding: dict[str, Any]) -> bool:
    """Whether `out` has an encoding, which must be this one. ValueError if it holds anything else."""
    begun = read_encoding(str(out))
    if begun is None:
        if strangers := sorted(path.name for path in out.glob("*.tar")):
            raise ValueError(f"{out} holds {strangers[0]}, which encode_shards did not write. Give another folder")
        return False
    differ = [key for key in encoding if begun.get(key) != encoding[key]]
    if differ:
        raise ValueError(
            f"{out} was begun with another {differ[0]}: {begun.get(differ[0])!r} there, {encoding[differ[0]]!r} now. "
            "Use the same settings and source, or give another folder"
        )
    return True


class _Rows(Dataset[RawSample | BadSample]):
    """Samples by number; a bad one comes as its error, so that the rest are still read."""

    def __init__(self, reader: SampleReader) -> None:
        self.reader = reader

    def __getitem__(self, i: int) -> RawSample | BadSample:
        try:
            return self.reader.read(i)
        except BadSample as error:
            return error


def _read(reader: SampleReader, rows: Sequence[int], processes: int) -> Iterator[RawSample | BadSample]:
    """Samples in the order of `rows`, decoded ahead in processes of their own."""
    # collate_fn: without a batch torch would turn arrays into tensors, here they go as they are
    options: dict[str, Any] = {"num_workers": processes, "collate_fn": _as_is}
    return iter(DataLoader(_Rows(reader), batch_size=None, sampler=rows, **options))


def _as_is(sample: RawSample | BadSample) -> RawSample | BadSample:
    return sample


def _without_bad(samples: Iterable[RawSample | BadSample], bad: list[str], bar: "tqdm[Any]") -> Iterator[RawSample]:
    for sample in samples:
        if isinstance(sample, BadSample):
            bad.append(str(sample))
            bar.write(f"left out: {sample}", file=sys.stderr)
        else:
            yield sample
        bar.update()


def _encode(
    samples: Iterator[RawSample], encoders: Encoders, t5: bool, at_once: int
) -> Iterator[tuple[RawSample, list[Tensor], StoredText]]:
    """Each sample, the moments of its target and contexts, and its prompt."""
    while raws := list(islice(samples, at_once)):
        arrays = [image for raw in raws for image in (raw.target, *raw.contexts)]
        images = [torch.as_tensor(array).permute(2, 0, 1) for array in arrays]
        moments = iter(map_by_size(images, encoders.autoencoder.moments))
        for raw, text in zip(raws, _encode_prompts([raw.prompt for raw in raws], encoders, t5), strict=True):
            own = list(islice(moments, 1 + len(raw.contexts)))
            if not all(torch.isfinite(image).all() for image in own):
                raise ValueError(f"{raw.shard}:{raw.key}: the autoencoder gives values that are not finite")
            yield raw, own, text


@torch.no_grad()
def _encode_prompts(prompts: list[str], encoders: Encoders, t5: bool) -> list[StoredText]:
    assert encoders.text is not None
    tokens = encoders.text.tokens(prompts).bfloat16() if t5 else [None] * len(prompts)
    return [StoredText(clip, t) for clip, t in zip(encoders.text.pooled(prompts), tokens, strict=True)]


def _members(
    encoded: Iterable[tuple[RawSample, list[Tensor], StoredText]], encoding: str, transform: Transform
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of each sample, for `write_shard`."""
    for raw, moments, text in encoded:
        about = json.dumps({"prompt": raw.prompt, **raw.metadata}).encode()
        content = to_bytes(moments, text, encoding, transform.multiple // 2)
        yield raw.key, {"json": about, "encoded.safetensors": content}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_parser("encode_shards", __doc__, _EXAMPLES)
    data, encoders = DataConfig(), EncodersConfig()
    add = parser.add_argument
    add("source", metavar="DIR", type=Path, help="a folder of indexed shards of images")
    add("--out", metavar="DIR", type=Path, required=True, help="the folder of encoded shards")
    add("--encoders", metavar="DIR", required=True, help="as encoders.path: holds vae/, text_encoder/, ...")
    add("--t5", action="store_true", help="store T5's tokens; without, T5 runs while training")
    add("--t5-tokens", metavar="N", type=int, default=encoders.t5_tokens, help="(default: %(default)s)")
    add("--dtype", choices=[d.value for d in EncoderDtype], default=encoders.dtype.value, help="(default: %(default)s)")
    add("--resize", choices=[r.value for r in Resize], default=data.resize.value, help="(default: %(default)s)")
    add("--max-pixels", metavar="N", type=int, default=data.max_pixels, help="(default: %(default)s)")
    add("--max-upscale", metavar="X", type=float, default=data.max_upscale, help="(default: %(default)s)")
    add("--background", metavar="V", type=int, nargs=3, default=data.background, help="RGB (default: 255 255 255)")
    add("--samples-at-once", metavar="N", type=at_least(1), default=4, help="in one pass (default: %(default)s)")
    add(
        "--processes",
        metavar="N",
        type=at_least(0),
        default=min(4, os.cpu_count() or 1),
        help="that read images (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    return exit_status(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    report = encode_shards(
        arguments.source,
        arguments.out,
        EncodersConfig(arguments.encoders, arguments.t5_tokens, EncoderDtype(arguments.dtype)),
        DataConfig(
            resize=Resize(arguments.resize),
            max_pixels=arguments.max_pixels,
            max_upscale=arguments.max_upscale,
            background=arguments.background,
        ),
        t5=arguments.t5,
        share=share_of(os.environ),
        samples_at_once=arguments.samples_at_once,
        processes=arguments.processes,
    )
    return report.told(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
