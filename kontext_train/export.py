"""kontext-export: the weights of a checkpoint in the form that other programs read."""

import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kontext_train.errors import ConfigError

USAGE = """\
kontext-export checkpoint=PATH out=PATH [format=bfl|diffusers|lora] [key=value ...]

  checkpoint=PATH     a run folder (its newest checkpoint), a step folder, or an earlier export
  format=bfl          names of the released FLUX.1 files (default); out=FILE.safetensors is one file, out=FOLDER has
                      parts with an index
  format=diffusers    out=FOLDER, which diffusers.FluxKontextPipeline.from_pretrained loads
  format=lora         the adapters of a LoRA run, out=FILE.safetensors, as diffusers' load_lora_weights reads them; the
                      other formats hold them merged into the weights that they adapt
  weights=ema         averaged weights where the run kept them (default), or raw
  dtype=bfloat16      as released (default), float32, or (bfl) float8: e4m3 with a scale for each matrix of the blocks
  max_shard_gb=10     size of the files in a folder, 10^9 bytes
  encoders=PATH       (diffusers) where autoencoder, text encoders and tokenizers are copied from, if not from the run's
                      encoders.path; encoders=none writes the transformer alone

The training config and the digest of the data are in the files and in the model card. Needs no GPU, not the number of
processes that trained, and memory for a few GB of weights. See docs/weights.md.
"""
DEFAULT_SHARD_GB = 10.0


class Format(Enum):
    bfl = "bfl"
    diffusers = "diffusers"
    lora = "lora"


class Weights(Enum):
    ema = "ema"
    raw = "raw"


class StorageDtype(Enum):
    bfloat16 = "bfloat16"
    float32 = "float32"
    float8 = "float8"


@dataclass(slots=True)
class ExportConfig:
    checkpoint: str = ""
    out: str = ""
    weights: Weights = Weights.ema
    dtype: StorageDtype = StorageDtype.bfloat16
    format: Format = Format.bfl
    max_shard_gb: float | None = None  # DEFAULT_SHARD_GB in a folder
    encoders: str | None = None  # the run's

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("checkpoint", self.checkpoint, "must be given", "A run folder, for example")
        if not self.out:
            raise ConfigError("out", self.out, "must be given", "For example out=model.safetensors")
        if self.max_shard_gb is not None and not self.max_shard_gb > 0:
            raise ConfigError("max_shard_gb", self.max_shard_gb, "must be above 0", "10 is usual")
        if self.one_file and self.max_shard_gb is not None:
            rule = f"splits what goes into a folder, and out={self.out} is one file"
            raise ConfigError("max_shard_gb", self.max_shard_gb, rule, "Give a folder as out, or leave it out")
        out = Path(self.out)
        if self.one_file and out.is_dir():
            raise ConfigError("out", self.out, "is a folder, and one file is asked for by its name", "Give another")
        if not self.one_file and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
            raise ConfigError("out", self.out, "exists and is not an empty folder", "Give a new folder")
        if self.format is Format.diffusers:
            self._check_diffusers()
        elif self.encoders is not None:
            rule = f"are part of a diffusers pipeline, and format={self.format.value} holds none"
            raise ConfigError("encoders", self.encoders, rule, "Leave it out, or use format=diffusers")
        if self.format is Format.lora and not self.one_file:
            raise ConfigError("out", self.out, "must end in .safetensors with format=lora", "out=lora.safetensors")
        if self.format is Format.lora and self.dtype is StorageDtype.float8:
            raise ConfigError("dtype", "float8", "is too coarse for adapters", "Use bfloat16 or float32")

    def _check_diffusers(self) -> None:
        if self.one_file:
            raise ConfigError("out", self.out, "must be a folder with format=diffusers", "For example out=pipeline")
        if self.dtype is StorageDtype.float8:
            rule = "is not for format=diffusers, which has no place for scales, and small weights need them"
            hint = "Export bfloat16 and call transformer.enable_layerwise_casting(), or use format=bfl"
            raise ConfigError("dtype", self.dtype.value, rule, hint)

    @property
    def one_file(self) -> bool:
        return self.out.endswith(".safetensors")

    @property
    def max_shard_bytes(self) -> int:
        return int((self.max_shard_gb or DEFAULT_SHARD_GB) * 1e9)


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]) or len(sys.argv) == 1:
        print(USAGE)
        return
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ExportConfig), OmegaConf.from_dotlist(sys.argv[1:]))
        config = OmegaConf.to_object(merged)
        assert isinstance(config, ExportConfig)
        export(config)
    except (OmegaConfBaseException, YAMLError) as error:
        print(f"kontext-export: {str(error).splitlines()[0]}. kontext-export --help shows the keys", file=sys.stderr)
        sys.exit(2)
    except ValueError as error:  # a ConfigError, or a file that is not what it should be
        print(f"kontext-export: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"kontext-export: not written: {error}", file=sys.stderr)
        sys.exit(1)


def export(config: ExportConfig) -> None:
    """Write what is asked for; says in one line what that was."""
    import torch

    from kontext_train.evaluation.exported import Source, check_encoders, write_lora, write_pipeline, write_released
    from kontext_train.evaluation.trained import is_checkpoint, resolve
    from kontext_train.training.checkpoint_files import damage

    dtypes = {
        StorageDtype.bfloat16: torch.bfloat16,
        StorageDtype.float32: torch.float32,
        StorageDtype.float8: torch.float8_e4m3fn,
    }
    dtype = dtypes[config.dtype]
    path = resolve(config.checkpoint)
    if is_checkpoint(path) and (damaged := damage(path)):
        raise ConfigError("checkpoint", str(path), f"is damaged: {'; '.join(damaged)}", "Give an older step folder")
    source = Source.of(path, ema=config.weights is Weights.ema)
    base = source.config["weights"]["student"]
    if base is not None and Path(base).resolve() == Path(config.out).resolve():
        rule = "is the file that the run started from, which a LoRA's checkpoints need"
        raise ConfigError("out", config.out, rule, "Give another name")
    if config.weights is Weights.raw and source.origin.weights == "ema":
        rule = f"but {source.path} is an export of averaged weights"
        raise ConfigError("weights", "raw", rule, "Export from the checkpoint")
    out = Path(config.out)
    match config.format:
        case Format.bfl:
            count = write_released(source, out, dtype, None if config.one_file else config.max_shard_bytes)
            what = "released names"
        case Format.diffusers:
            encoders = None
            if config.encoders != "none":
                encoders = Path(config.encoders or source.config["encoders"]["path"])
                check_encoders(encoders)
            count = write_pipeline(source, out, dtype, config.max_shard_bytes, encoders)
            what = "a diffusers pipeline" if encoders else "the transformer of a diffusers pipeline"
        case Format.lora:
            count = write_lora(source, out, dtype)
            what = "adapters"
    print(f"{out}: {what}, {count:,} parameters, {config.dtype.value}, {source.origin.weights}, from {source.path}")


if __name__ == "__main__":
    main()
