"""A trained model, its encoders and its settings, from a checkpoint or an export: one process, no sharding."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from torch import Tensor

from kontext_train.data.config import Crop, DataConfig
from kontext_train.data.encode import Encoders, load_encoders
from kontext_train.data.transforms import Transform
from kontext_train.errors import ConfigError
from kontext_train.flow.config import SamplerConfig, ShiftConfig
from kontext_train.generate import Request, generate
from kontext_train.models.attention import AttentionFunction, attention_function, cpu_attention, usable_backend
from kontext_train.models.config import AttentionBackend, EncodersConfig, FluxConfig
from kontext_train.models.flux import Flux
from kontext_train.models.weights import load
from kontext_train.training import checkpoint
from kontext_train.training.checkpoint_files import place

EXPORT_CONFIG = "kontext_train_config"  # safetensors metadata key of an export


@dataclass(slots=True)
class Trained:
    model: Flux
    encoders: Encoders
    shift: ShiftConfig
    pixels_per_token: int
    transform: Transform  # of context images: as the run saw them, cropped around the centre
    device: torch.device

    def generate(self, requests: Sequence[Request], sampler: SamplerConfig) -> list[Tensor]:
        """[3, H, W] uint8 images, one a request."""
        return generate(
            self.model,
            self.encoders,
            requests,
            sampler,
            self.shift,
            pixels_per_token=self.pixels_per_token,
            guidance_embed=self.model.config.guidance_embed,
            device=self.device,
        )


def resolve(path: str | Path) -> Path:
    """A checkpoint folder, or the newest complete one of a run folder or of a folder of checkpoints, or an exported
    file. ConfigError otherwise.
    """
    path = place(str(path), key="checkpoint")
    if path.suffix == ".safetensors" and path.is_file():
        return path
    newest = checkpoint.complete_checkpoints(_checkpoints_of(path)) or checkpoint.complete_checkpoints(path)
    if newest:
        return newest[-1]
    checkpoint.read_record(path)
    return path


def _checkpoints_of(run: Path) -> Path:
    config = run / "config.yaml"
    given = OmegaConf.select(OmegaConf.load(str(config)), "checkpoint.folder") if config.is_file() else None
    return checkpoint.checkpoints_folder(run, given)


def read_config(path: Path) -> dict[str, Any]:
    """The composed training config that a checkpoint or an export carries."""
    if path.is_dir():
        return checkpoint.read_record(path)["config"]
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata() or {}
    if EXPORT_CONFIG not in metadata:
        rule = "was not exported by kontext-export: it does not say which model it holds"
        raise ConfigError("checkpoint", str(path), rule, "Give a checkpoint folder or a file that kontext-export wrote")
    return json.loads(metadata[EXPORT_CONFIG])


def section(kind: type, values: dict[str, Any]) -> Any:
    """One room's dataclass from plain values, typed and checked."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))


def load_model(path: Path, config: dict[str, Any], ema: bool, attention: AttentionFunction = cpu_attention) -> Flux:
    """The float32 network of a checkpoint (of its averaged weights, if ema) or of an export, on the CPU."""
    model_config = section(FluxConfig, config["model"])
    with torch.device("meta"):
        model = Flux(model_config, attention)
    model.to_empty(device="cpu")
    if not path.is_dir():
        load(model, path)
        return model
    tensors = dict(model.named_parameters())
    averaged = ema and config["ema"]["half_life_images"] > 0
    checkpoint.load(path, {"ema": tensors} if averaged else {"modules": {"student": tensors}})
    return model


def load_trained(
    path: str | Path, *, ema: bool = True, encoders_path: str | None = None, device: torch.device | None = None
) -> Trained:
    """Ready to generate. encoders_path: where they are now, if not where the run had them."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = resolve(path)
    config = read_config(path)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    head_dim = section(FluxConfig, config["model"]).head_dim
    backend = usable_backend(AttentionBackend.auto, device, dtype, head_dim)  # this machine's, not the training's
    model = load_model(path, config, ema, attention_function(backend))
    encoders_config = section(EncodersConfig, config["encoders"] | ({"path": encoders_path} if encoders_path else {}))
    side = encoders_config.pixels_per_token()
    return Trained(
        model=model.to(device, dtype).requires_grad_(False).eval(),
        pixels_per_token=side,
        encoders=load_encoders(encoders_config, device),
        shift=section(ShiftConfig, config["flow"]),
        transform=replace(Transform.of(section(DataConfig, config["data"]), side, seed=0), crop=Crop.center),
        device=device,
    )
