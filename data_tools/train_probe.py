"""Fits a linear probe on CLIP features of labelled shards, and chooses its threshold on samples kept apart."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import IO, Any

from PIL import Image

from data_tools.command import at_least, command_parser, exit_status
from data_tools.expression import parse_clauses
from data_tools.filter_safety import decoded, has_label
from data_tools.filter_shards import sample_values
from data_tools.scanning import flat_rows, scan
from data_tools.shard_writing import replacing
from kontext_train.data.index import ShardIndex
from kontext_train.data.shard import Problem, Span

_EXAMPLES = """examples:
  python -m data_tools.train_probe /data/labelled --clip CLIP --on target --labels "json.unsafe == 1" --out image.probe
  python -m data_tools.train_probe /data/labelled --clip CLIP --on prompt --labels "json.unsafe == 1" --out text.probe

--clip is a folder in the released CLIP layout (config.json, model.safetensors, tokenizer). One sample in --held-out is
not trained on: the threshold with the highest recall at no more than --max-false-positives of these is stored in the
probe, and its precision and recall are printed and written beside it (OUT.json). A policy names the probe as `head`
(docs/safety.md)."""

_AT_ONCE = 64


def train_probe(
    folder: Path, clip: Path, on: str, labels: str, out: Path, *, held_out: int = 4, max_false_positives: float = 0.02
) -> dict[str, Any]:
    """Writes the probe and its calibration; returns the latter.

    Args:
        folder: indexed shards of images.
        on: target, context (an image of each) or prompt.
        labels: an expression of `data_tools.expression` that holds for what the probe is to find.
        held_out: one sample in so many is kept for the threshold, by its key.

    Raises:
        ValueError: a bad argument, a class is missing, or no threshold does on what the probe was not trained on.
        OSError: files could not be read or written.
    """
    import torch

    from kontext_train.safety.clip import ImageTower, TextTower
    from kontext_train.safety.heads import Head, calibration, clip_digest, fit_probe, save_head

    if on not in ("target", "context", "prompt"):
        raise ValueError(f"on is {on!r}; it must be target, context or prompt")
    clauses = parse_clauses(labels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tower: Any = TextTower(clip, device) if on == "prompt" else ImageTower(clip, device)
    features, label, apart = [], list[bool](), list[bool]()
    found = _contents(folder, on)
    while chunk := list(islice(found, _AT_ONCE)):
        features += tower.features([content for _, content in chunk])
        label += [has_label(clauses, values) for values, _ in chunk]
        apart += [blake2b(values["key"].encode()).digest()[0] % held_out == 0 for values, _ in chunk]
    train = torch.tensor(apart).logical_not()
    mean_nF = torch.stack([tiles.mean(0) for tiles in features]) if features else torch.zeros(0, 1)
    weight_F, bias = fit_probe(mean_nF[train], torch.tensor(label)[train])
    head = Head("text" if on == "prompt" else "image", clip_digest(clip), None, weight_F, bias, None)
    held = [(head.score(tiles), is_one) for tiles, is_one, kept in zip(features, label, apart, strict=True) if kept]
    try:
        made = calibration([score for score, _ in held], [is_one for _, is_one in held], max_false_positives)
    except ValueError as error:
        raise ValueError(f"{out} is not written: of the samples kept apart, {error}") from error
    head.threshold = made["chosen"]["threshold"]
    save_head(out, head)
    report = {"labels": labels, "on": on, "trained_on": int(train.sum()), **made}
    with replacing(out.with_name(f"{out.name}.json")) as file:
        file.write(json.dumps(report, indent=2).encode())
    return report


def _contents(folder: Path, on: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """Values of each sample for an expression, and what the tower reads of it."""
    index = ShardIndex.open(folder)
    if index.encoding is not None:
        raise ValueError(f"{folder} holds encoded shards. Give the images that they were made from")
    for name, _ in flat_rows(index):
        with open(folder / name, "rb") as file:
            for sample in scan(folder / name):
                if isinstance(sample, Problem):
                    continue
                values = sample_values(sample, name, file)
                if on == "prompt":
                    yield values, values["prompt"]
                else:
                    spans = [sample.target] if on == "target" else sample.contexts
                    yield from ((values, _image(file, span, f"{name}: {sample.key}", on)) for span in spans)


def _image(file: IO[bytes], span: Span, where: str, on: str) -> Image.Image:
    try:
        return decoded(file, span)
    except Exception as error:  # Pillow raises a dozen kinds on bad bytes
        hint = "python -m data_tools.check_shards finds all such; filter_shards --drop-list leaves them out"
        raise ValueError(f"{where}: its {on} image cannot be decoded ({type(error).__name__}). {hint}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_parser("train_probe", __doc__, _EXAMPLES)
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="a folder of labelled shards of images (*.tar) with their index")
    add("--clip", metavar="DIR", type=Path, required=True, help="a CLIP model")
    add("--on", choices=["target", "context", "prompt"], required=True, help="what the probe reads")
    add("--labels", metavar="EXPRESSION", required=True, help="holds for what the probe is to find")
    add("--out", metavar="FILE", type=Path, required=True, help="the probe")
    add("--held-out", metavar="N", type=at_least(2), default=4, help="one sample in N sets the threshold (default: 4)")
    add("--max-false-positives", metavar="SHARE", type=float, default=0.02, help="of the others (default: 0.02)")
    arguments = parser.parse_args(argv)
    return exit_status(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    report = train_probe(
        arguments.folder,
        arguments.clip,
        arguments.on,
        arguments.labels,
        arguments.out,
        held_out=arguments.held_out,
        max_false_positives=arguments.max_false_positives,
    )
    point = report["chosen"]
    print(f"{arguments.out}: trained on {report['trained_on']:,}, threshold {point['threshold']:.4f} from the other")
    print(f"  {report['samples']:,}: recall {point['recall']:.3f}, precision {point['precision']:.3f}, ", end="")
    print(f"false positives {point['false_positives']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
