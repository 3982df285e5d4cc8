"""kontext-export: the weights of a checkpoint as one safetensors file with released names."""

import json
import sys
from dataclasses import dataclass
from enum import Enum

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kontext_train.errors import ConfigError

USAGE = """\
kontext-export checkpoint=PATH out=FILE.safetensors [weights=ema|raw] [dtype=bfloat16|float32]

  checkpoint=PATH   a run folder (its newest checkpoint) or a step folder
  out=FILE          one file with the parameter names of the released FLUX.1 files; it carries the training config
  weights=ema       averaged weights where the run kept them (default), or raw
  dtype=bfloat16    as released (default), or float32

Needs no GPU and not the number of processes that trained.
"""


class Weights(Enum):
    ema = "ema"
    raw = "raw"


class StorageDtype(Enum):
    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass(slots=True)
class ExportConfig:
    checkpoint: str = ""
    out: str = ""
    weights: Weights = Weights.ema
    dtype: StorageDtype = StorageDtype.bfloat16

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("checkpoint", self.checkpoint, "must be given", "A run folder, for example")
        if not self.out.endswith(".safetensors"):
            raise ConfigError("out", self.out, "must end in .safetensors", "For example out=model.safetensors")


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
    except ConfigError as error:
        print(f"kontext-export: {error}", file=sys.stderr)
        sys.exit(2)


def export(config: ExportConfig) -> None:
    import torch

    from kontext_train.evaluation.trained import EXPORT_CONFIG, load_model, read_config, resolve
    from kontext_train.models.weights import save

    path = resolve(config.checkpoint)
    run = read_config(path)
    model = load_model(path, run, ema=config.weights is Weights.ema)
    dtype = getattr(torch, config.dtype.value)
    tensors = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    save(tensors, config.out, {EXPORT_CONFIG: json.dumps(run)})
    print(f"{config.out}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} parameters, from {path}")


if __name__ == "__main__":
    main()
