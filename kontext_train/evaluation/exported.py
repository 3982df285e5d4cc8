"""Trained weights written for others to read: released names in one file or in parts, or a diffusers pipeline.

Weights pass through one after another: an export of any size needs memory for about a gigabyte of them. What is
written appears under its name when it is whole.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from kontext_train.errors import ConfigError
from kontext_train.evaluation.trained import (
    EXPORT_CONFIG,
    EXPORT_ORIGIN,
    Origin,
    empty_model,
    load_adapters,
    read_config,
    read_origin,
    section,
    stream_parameters,
)
from kontext_train.flow.config import ShiftConfig
from kontext_train.models.config import FluxConfig, LoraConfig
from kontext_train.models.diffusers_format import to_diffusers, transformer_config
from kontext_train.models.lora_format import to_peft
from kontext_train.models.safetensors_files import Spec, plan_files, write_files
from kontext_train.models.weights import SCALED_FLOAT8, scale_name

# The parts of a pipeline that training leaves as they were, and the classes that read them.
ENCODER_PARTS = {
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
}

LORA_CONFIG = "kontext_train_lora_config"  # safetensors metadata key: the config of the run that adapters come from

Convert = Callable[[str, Tensor], dict[str, Tensor]]  # a parameter to the tensors that are stored for it


@dataclass(slots=True)
class Source:
    """Weights to export."""

    path: Path  # a checkpoint folder or an export
    config: dict[str, Any]  # the composed config of the run
    ema: bool
    origin: Origin

    @classmethod
    def of(cls, path: Path, ema: bool) -> "Source":
        config = read_config(path)
        return cls(path, config, ema, read_origin(path, config, ema))


def write_released(source: Source, out: Path, dtype: torch.dtype, max_bytes: int | None) -> int:
    """Released names: the file `out` (with a card beside it), or a folder of parts. Returns the number of parameters.

    max_bytes: of one part; None writes one file.
    """
    convert = _float8_released if dtype is torch.float8_e4m3fn else _released(dtype)
    with _whole_or_not(out) as folder:
        stem = out.stem if max_bytes is None else "model"
        count = _write(source, folder, stem, max_bytes, convert, scaled=dtype is torch.float8_e4m3fn)
        card = f"{stem}.md" if max_bytes is None else "README.md"
        usage = f'kontext-sample checkpoint={out} prompt="make it snow" context=photo.png'
        (folder / card).write_text(model_card(source, out.name, count, dtype, f"```bash\n{usage}\n```"))
    return count


def write_pipeline(source: Source, out: Path, dtype: torch.dtype, max_bytes: int, encoders: Path | None) -> int:
    """The folder of a diffusers FluxKontextPipeline. encoders: whose autoencoder, text encoders and tokenizers are
    copied; None writes `transformer/` alone, which is no pipeline yet. Returns the number of parameters.
    """
    model_config = section(FluxConfig, source.config["model"])
    described = transformer_config(model_config)
    with _whole_or_not(out) as folder:

        def convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
            return to_diffusers(name, tensor.to(dtype), model_config.hidden_size)

        transformer = folder / "transformer"
        transformer.mkdir()
        count = _write(source, transformer, "diffusion_pytorch_model", max_bytes, convert, scaled=False)
        _write_json(transformer / "config.json", described)
        if encoders is not None:
            for part in ENCODER_PARTS:
                shutil.copytree(encoders / part, folder / part)
            _write_json(folder / "model_index.json", _pipeline_index())
            (folder / "scheduler").mkdir()
            shift = section(ShiftConfig, source.config["flow"])
            _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(shift))
        usage = _pipeline_usage(source, out, dtype) if encoders is not None else _transformer_usage(out, dtype)
        (folder / "README.md").write_text(model_card(source, out.name, count, dtype, usage))
    return count


def write_lora(source: Source, out: Path, dtype: torch.dtype) -> int:
    """The adapters of a LoRA run, as diffusers and PEFT name them, with a card. Returns the number of parameters."""
    adapters = load_adapters(source.path, source.config, source.ema)
    hidden_size = section(FluxConfig, source.config["model"]).hidden_size
    tensors = to_peft(adapters, section(LoraConfig, source.config["lora"]), hidden_size)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    count = sum(tensor.numel() for tensor in tensors.values())
    about = {LORA_CONFIG: json.dumps(source.config), EXPORT_ORIGIN: json.dumps(asdict(source.origin))}
    with _whole_or_not(out) as folder:
        save_file(tensors, folder / out.name, {"format": "pt", **about})
        (folder / f"{out.stem}.md").write_text(model_card(source, out.name, count, dtype, _lora_usage(out)))
    return count


def check_encoders(path: Path) -> None:
    """ConfigError unless a folder has every part of a pipeline that is copied."""
    for part in ENCODER_PARTS:
        if not (path / part).is_dir():
            rule = f"must hold {', '.join(ENCODER_PARTS)}, but {part}/ is missing"
            hint = "Say where they are, or encoders=none for the transformer alone"
            raise ConfigError("encoders", str(path), rule, hint)


def scheduler_config(shift: ShiftConfig) -> dict[str, Any]:
    """Of diffusers' FlowMatchEulerDiscreteScheduler: the times of `flow.timesteps.sampling_schedule`."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": version("diffusers"),
        "base_image_seq_len": shift.base_tokens,
        "base_shift": shift.base_mu,
        "max_image_seq_len": shift.max_tokens,
        "max_shift": shift.max_mu,
        "num_train_timesteps": 1000,
        "shift": 3.0,  # not used with the next
        "use_dynamic_shifting": True,
    }


def _pipeline_index() -> dict[str, Any]:
    return {
        "_class_name": "FluxKontextPipeline",
        "_diffusers_version": version("diffusers"),
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        **{part: list(classes) for part, classes in ENCODER_PARTS.items()},
    }


def _write(source: Source, folder: Path, stem: str, max_bytes: int | None, convert: Convert, *, scaled: bool) -> int:
    """All parameters, converted, as safetensors. Shapes are known before any weight is read."""
    parameters = dict(empty_model(source.config).named_parameters())
    # Two elements tell ComfyUI to multiply in its own precision: no scales of activations were measured.
    marker = {SCALED_FLOAT8: torch.zeros(2, dtype=torch.float8_e4m3fn)} if scaled else {}
    planned = chain((item for n, p in parameters.items() for item in convert(n, p).items()), marker.items())
    stream = stream_parameters(source.path, source.config, source.ema)
    tensors = chain((item for n, p in stream for item in convert(n, p).items()), marker.items())
    about = {EXPORT_CONFIG: json.dumps(source.config), EXPORT_ORIGIN: json.dumps(asdict(source.origin))}
    with torch.no_grad():
        plan = plan_files((Spec.of(name, tensor) for name, tensor in planned), stem, max_bytes)
        write_files(folder, plan, tensors, about)
    return sum(p.numel() for p in parameters.values())


def _released(dtype: torch.dtype) -> Convert:
    return lambda name, tensor: {name: tensor.to(dtype)}


def _float8_released(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Matrices of the blocks in float8 with one scale, which fills the type's range; all else in bfloat16."""
    if tensor.ndim != 2 or not name.startswith(("double_blocks.", "single_blocks.")):
        return {name: tensor.to(torch.bfloat16)}
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = (tensor.abs().amax() / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return {name: (tensor / scale).to(torch.float8_e4m3fn), scale_name(name): scale}


@contextmanager
def _whole_or_not(out: Path) -> Iterator[Path]:
    """A folder to write into. If nothing was raised, it becomes `out`, or its files come to lie where the file `out`
    should.
    """
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if out.suffix != ".safetensors":
        partial.replace(out)
        return
    for file in partial.iterdir():
        file.replace(out.parent / file.name)
    partial.rmdir()


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


def model_card(source: Source, name: str, parameters: int, dtype: torch.dtype, usage: str) -> str:
    """README.md: what this is, where it comes from, how to run it, and the whole config of its run."""
    config, origin = source.config, source.origin
    averaged = {"ema": "averaged (EMA)", "raw": "as trained, not averaged", None: "not recorded"}[origin.weights]
    config_yaml = OmegaConf.to_yaml(OmegaConf.create(config))
    return f"""---
pipeline_tag: image-to-image
tags: [image-editing, flux, kontext]
---

# {name}

{parameters:,} parameters of an in-context image model: it makes an image from a text and any number of context images.
Trained with kontext_train {version("kontext_train")}. Whatever license its starting weights have holds for it too.

| | |
|---|---|
| weights | {averaged} |
| stored as | {str(dtype).removeprefix("torch.")} |
| training step | {"not recorded" if origin.step is None else origin.step} |
| started from | {config["weights"]["student"] or "random weights"} |
| data plan (digest of shards, shares, sizes, dropouts) | {origin.plan or "not recorded"} |
| guidance embedding | {"yes" if config["model"]["guidance_embed"] else "no"} |
| text tokens (T5) | {config["encoders"]["t5_tokens"]} |

## Use

{usage}

## Training configuration

```yaml
{config_yaml}```
"""


def _pipeline_usage(source: Source, out: Path, dtype: torch.dtype) -> str:
    return f"""```python
import torch
from diffusers import FluxKontextPipeline
from diffusers.utils import load_image

pipeline = FluxKontextPipeline.from_pretrained("{out}", torch_dtype={dtype})
image = pipeline(
    image=load_image("photo.png"), prompt="make it snow", max_sequence_length={source.config["encoders"]["t5_tokens"]}
).images[0]
```"""


def _lora_usage(out: Path) -> str:
    return f"""Adapters to the weights that the run started from.

```python
pipeline.load_lora_weights("{out.parent}", weight_name="{out.name}")
```"""


def _transformer_usage(out: Path, dtype: torch.dtype) -> str:
    return f"""The transformer alone; the other parts of a pipeline are those that it was trained with.

```python
import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel

transformer = FluxTransformer2DModel.from_pretrained("{out}", subfolder="transformer", torch_dtype={dtype})
pipeline = FluxKontextPipeline.from_pretrained("PIPELINE", transformer=transformer, torch_dtype={dtype})
```"""
