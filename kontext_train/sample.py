"""kontext-sample: edit or make a picture with a trained model. Several prompts in a row edit over several turns."""

import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kontext_train.errors import ConfigError
from kontext_train.flow.config import SamplerConfig

USAGE = """\
kontext-sample checkpoint=PATH prompt=TEXT [prompt=TEXT ...] [context=IMAGE ...] [key=value ...]

  checkpoint=PATH        a run folder, a step folder, or what kontext-export wrote (a file or a folder)
  prompt=TEXT            what to make or change; each further prompt edits the result of the one before
  context=IMAGE          an image to edit or refer to; give several, or none for text-to-image
  out=FILE               sample.png by default; with several prompts sample.0.png, sample.1.png, ...
  seed=0                 the same seed gives the same picture
  height=, width=        pixels; the size of the first context if not given
  sampler.steps=28  sampler.guidance=1.0  sampler.embedded_guidance=2.5
  sampler.stochastic=false   new noise at every step, for students of few steps (docs/distillation.md)
  ema=true               averaged weights, where the run kept them
  gate=FILE              a safety policy for prompts, context images and results (docs/safety.md); what it blocks is not
                         written, and the exit status is 3
  provenance=true        say in the file that a model made it (XMP, IPTC's digital source type)
  encoders=PATH          where the encoders are now, if not where the run had them

  kontext-sample checkpoint=outputs/quickstart/run prompt="recolor the red circle to blue" context=scene.png
"""


BLOCKED = 3  # exit status of a request that a safety policy stopped


class Blocked(Exception):
    """A rule of the policy holds for a prompt, a context image or a result, which is not written."""


@dataclass(slots=True)
class SampleConfig:
    checkpoint: str = ""
    prompt: list[str] = field(default_factory=list)
    context: list[str] = field(default_factory=list)
    out: str = "sample.png"
    seed: int = 0
    height: int | None = None
    width: int | None = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    ema: bool = True
    encoders: str | None = None
    gate: str | None = None
    provenance: bool = True

    def check(self) -> None:
        """ConfigError by key unless there is something to do."""
        if not self.checkpoint:
            raise ConfigError("checkpoint", self.checkpoint, "must be given", "A run folder, for example")
        if not self.prompt:
            raise ConfigError("prompt", self.prompt, "must be given at least once", 'For example prompt="add a hat"')
        for file in self.context:
            if not Path(file).is_file():
                raise ConfigError("context", file, "must be an image file", "Check the path")
        if Path(self.out).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise ConfigError("out", self.out, "must end in .png, .jpg or .webp", "For example out=edited.png")


def parse(arguments: list[str]) -> SampleConfig:
    """key=value arguments. Prompts and file names are taken as they are: commas and quotes mean nothing here."""
    texts: dict[str, list[str]] = {"prompt": [], "context": [], "out": [], "checkpoint": [], "encoders": [], "gate": []}
    options = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError("argument", argument, "is not key=value", "kontext-sample --help shows the keys")
        if key in texts:
            texts[key].append(value)
        else:
            options.append(argument)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(SampleConfig), OmegaConf.from_dotlist(options))
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError) as error:
        what = str(error).splitlines()[0]
        raise ConfigError("arguments", options, what, "kontext-sample --help shows the keys") from error
    assert isinstance(config, SampleConfig)
    config.prompt, config.context = texts["prompt"], texts["context"]
    for key in ("out", "checkpoint", "encoders", "gate"):
        if texts[key]:
            setattr(config, key, texts[key][-1])
    config.check()
    return config


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]) or len(sys.argv) == 1:
        print(USAGE)
        return
    try:
        for file in sample(parse(sys.argv[1:])):
            print(file)
    except ConfigError as error:
        print(f"kontext-sample: {error}", file=sys.stderr)
        sys.exit(2)
    except Blocked as error:
        print(f"kontext-sample: {error}", file=sys.stderr)
        sys.exit(BLOCKED)


def sample(config: SampleConfig) -> list[Path]:
    """Writes one picture for each prompt; returns the files. Raises Blocked if the policy stops the request."""
    import torch
    from PIL import Image

    from kontext_train.evaluation.trained import load_trained
    from kontext_train.generate import Request
    from kontext_train.safety.provenance import save_with_provenance

    check = _gate(config.gate)
    for prompt in config.prompt:  # before the model is loaded
        check("prompt", prompt, {}, {})
    trained = load_trained(config.checkpoint, ema=config.ema, encoders_path=config.encoders)
    side = trained.pixels_per_token
    contexts = [_read(name, trained.transform) for name in config.context]
    default_height, default_width = contexts[0].pixels.shape[1:] if contexts else (1024, 1024)
    height = default_height if config.height is None else config.height
    width = default_width if config.width is None else config.width
    for key, value in (("height", height), ("width", width)):
        if value < side or value % side:
            raise ConfigError(key, value, f"must be a multiple of {side}, the pixels of a token", "Round it")

    def shown(pixels: torch.Tensor) -> Image.Image:
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())

    written = []
    for turn, prompt in enumerate(config.prompt):
        parts = {f"context.{i}": context for i, context in enumerate(contexts)}
        whole = {part: context.whole for part, context in parts.items()}
        seen = {part: shown(context.pixels) for part, context in parts.items()}  # by the model
        files = {part: context.file for part, context in parts.items() if context.file is not None}
        views = (whole, seen) if contexts else ({},)  # apart: a picture that is looked at twice counts once
        for images in views:
            check(f"request {prompt!r}", prompt, images, files)
        pixels = [context.pixels for context in contexts]
        request = Request(prompt, pixels, height, width, seed=config.seed + turn)
        (image,) = trained.generate([request], config.sampler)
        out = Path(config.out)
        file = out if len(config.prompt) == 1 else out.with_suffix(f".{turn}{out.suffix}")
        picture = shown(image)
        for images in views:
            check(f"result of {prompt!r}", prompt, {**images, "target": picture}, files)
        file.parent.mkdir(parents=True, exist_ok=True)
        if config.provenance:
            save_with_provenance(picture, file, edited=bool(contexts), tool="kontext_train")
        else:
            picture.save(file)
        written.append(file)
        # the next prompt edits this result; further references stay
        contexts = [_Context(image, picture, None), *contexts[1:]]
    return written


@dataclass(slots=True)
class _Context:
    """A picture that prompts are about."""

    pixels: Any  # uint8 [3, H, W], as the model sees it
    whole: Any  # the PIL image as it was given: scaling and cropping may hide what a policy knows
    file: bytes | None  # that it was given as; None for a result


def _read(name: str, transform: Any) -> _Context:
    import torch

    from kontext_train.data.transforms import decode_image

    try:
        file = Path(name).read_bytes()  # once: what is judged is what is used
        pixels = torch.from_numpy(transform.apply(io.BytesIO(file))).permute(2, 0, 1)
        return _Context(pixels, decode_image(io.BytesIO(file), transform.background), file)
    except (OSError, ValueError) as error:
        raise ConfigError("context", name, str(error), "Give a PNG, JPEG or WebP file") from error


def _gate(path: str | None) -> Callable[[str, str | None, Mapping[str, Any], Mapping[str, bytes]], None]:
    """A function of (what it is, prompt, RGB images and files by part) that raises Blocked where a rule holds."""
    if path is None:
        return lambda what, prompt, images, files: None
    import torch

    from kontext_train.safety.judge import Judge, Subject
    from kontext_train.safety.rules import Kind, Policy, read_rules

    judge = Judge(read_rules(path, "gate"), torch.device("cuda" if torch.cuda.is_available() else "cpu"), "gate")
    # a result was no file before: what looks for files of targets sees nothing here
    rules = [rule for rule in judge.rules if rule.kind is not Kind.file_hash or "context" in rule.parts]
    if not rules:
        rule = "has no rule that applies here: those on metadata and on files of targets look at shards alone"
        raise ConfigError("gate", path, rule, "Give one with rules on prompts or images: docs/safety.md")
    if all(rule.policy is Policy.report for rule in rules):
        raise ConfigError(
            "gate", path, "blocks nothing: its rules here only report", "Give one with drop or quarantine"
        )

    def check(what: str, prompt: str | None, images: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        (verdict,) = judge.judge([Subject(prompt, images, files)])
        if (found := verdict.blocking()) is not None:
            why = found.reason
            if found.score is not None:
                why = f"{found.part} scores {found.score:.4g}, threshold {found.threshold:.4g}"
            said = f"blocked: {what}, by rule {found.rule} of {path} ({why})"
            raise Blocked(f"{said}. Nothing of it is written, and a file from before stays")

    return check


if __name__ == "__main__":
    main()
