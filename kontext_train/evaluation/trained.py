"""A trained model, its encoders and its settings, from a checkpoint or an export: one process, no sharding."""

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from kontext_train.data.config import Crop, DataConfig
from kontext_train.data.encode import Encoders, load_encoders
from kontext_train.data.transforms import Transform
from kontext_train.errors import ConfigError
from kontext_train.flow.config import SamplerConfig, ShiftConfig
from kontext_train.generate import Request, generate
from kontext_train.models.attention import AttentionFunction, attention_function, cpu_attention, usable_backend
from kontext_train.models.config import AttentionBackend, EncodersConfig, FluxConfig, GuidanceIn, LoraConfig
from kontext_train.models.flux import Flux
from kontext_train.models.lora import base_digest, empty_adapters, merged
from kontext_train.models.safetensors_files import holds_weights, read_metadata
from kontext_train.models.weights import StoredParameters, assign, load
from kontext_train.training import checkpoint
from kontext_train.training.checkpoint_files import COMPLETE, place

# safetensors metadata keys of an export, both JSON
EXPORT_CONFIG = "kontext_train_config"
EXPORT_ORIGIN = "kontext_train_origin"
GROUP_BYTES = 2**30  # of float32 weights that `stream_parameters` holds at once
ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")  # folders


@dataclass(slots=True)
class Trained:
    model: Flux
    encoders: Encoders
    shift: ShiftConfig
    pixels_per_token: int
    transform: Transform  # of context images: as the run saw them, cropped around the centre
    device: torch.device

    @property
    def made_on(self) -> str:
        return machine(self.device, next(self.model.parameters()).dtype)

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


@dataclass(slots=True)
class Origin:
    """Where exported weights come from. None: an export of an early release does not say."""

    weights: str | None = None  # ema or raw
    step: int | None = None
    plan: str | None = None  # digest of the data plan: shards, shares, sizes and dropouts


def resolve(path: str | Path) -> Path:
    """A checkpoint folder, or the newest complete one of a run folder or of a folder of checkpoints, or an export.
    ConfigError otherwise.
    """
    path = place(str(path), key="checkpoint")
    newest = checkpoint.complete_checkpoints(_checkpoints_of(path))  # even where an export lies beside them
    newest = newest or checkpoint.complete_checkpoints(path)
    if newest:
        return newest[-1]
    if not holds_weights(path):
        checkpoint.read_record(path)
    return path


def describe_model(checkpoint: str, ema: bool, encoders_path: str | None = None) -> dict[str, Any]:
    """All of a trained model that decides pixels, as JSON-able values: whose weights, which encoders, what schedule.

    encoders_path: as for `load_trained`.
    """
    path = resolve(checkpoint)
    config = read_config(path)
    origin = asdict(read_origin(path, config, ema))
    weights = (path / COMPLETE).read_text().strip() if is_checkpoint(path) else base_digest(path)
    encoders = _encoders_config(config, encoders_path)
    of_encoders = {"digest": encoders_digest(encoders.path), "dtype": encoders.dtype.value}
    shift, transform = asdict(section(ShiftConfig, config["flow"])), _transform(config, encoders.pixels_per_token())
    return {
        "checkpoint": str(path),
        "digest": weights,
        **origin,
        "encoders": {"path": encoders.path, **of_encoders, "t5_tokens": encoders.t5_tokens},
        "shift": shift,
        "sizes": list(transform.decides_size()),
        "background": list(transform.background),
    }


def encoders_digest(folder: str | Path) -> str:
    """Of autoencoder, text encoders and tokenizers: small files by each byte, weights as `base_digest` reads them."""
    digest = hashlib.blake2b(digest_size=16)
    for part in ENCODERS:
        for file in sorted(f for f in (Path(folder) / part).glob("[!.]*") if f.is_file()):
            digest.update(f"{part}/{file.name} {_file_digest(file)}".encode())
    return digest.hexdigest()


def _file_digest(file: Path) -> str:
    if file.suffix == ".safetensors":
        return base_digest(file, key="encoders.path")
    with file.open("rb") as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()


def machine(device: torch.device, dtype: torch.dtype) -> str:
    """What images are made on, in words: latencies of two such are not of one sample."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{name}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}"


@cache
def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def is_checkpoint(path: Path) -> bool:
    return (path / COMPLETE).is_file()


def _checkpoints_of(run: Path) -> Path:
    config = run / "config.yaml"
    given = OmegaConf.select(OmegaConf.load(str(config)), "checkpoint.folder") if config.is_file() else None
    return checkpoint.checkpoints_folder(run, given)


def read_config(path: Path) -> dict[str, Any]:
    """The composed training config that a checkpoint or an export carries."""
    if is_checkpoint(path):
        return checkpoint.read_record(path)["config"]
    try:
        metadata = read_metadata(path)
    except ValueError as error:
        raise ConfigError("checkpoint", str(path), "cannot be read", str(error)) from error
    if EXPORT_CONFIG not in metadata:
        rule = "was not exported by kontext-export: it does not say which model it holds"
        raise ConfigError("checkpoint", str(path), rule, "Give a checkpoint folder or what kontext-export wrote")
    return json.loads(metadata[EXPORT_CONFIG])


def read_origin(path: Path, config: dict[str, Any], ema: bool) -> Origin:
    """Of the weights that `load_model` and `stream_parameters` would give."""
    if not is_checkpoint(path):
        return Origin(**json.loads(read_metadata(path).get(EXPORT_ORIGIN, "{}")))
    record = checkpoint.read_record(path)
    return Origin("ema" if _averaged(config, ema) else "raw", record["step"], record["plan"])


def section(kind: type, values: dict[str, Any]) -> Any:
    """One room's dataclass from plain values, typed and checked."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))


def empty_model(config: dict[str, Any], attention: AttentionFunction = cpu_attention) -> Flux:
    """The network of a run, on the meta device."""
    with torch.device("meta"):
        return Flux(section(FluxConfig, config["model"]), attention)


def load_model(path: Path, config: dict[str, Any], ema: bool, attention: AttentionFunction = cpu_attention) -> Flux:
    """The float32 network of a checkpoint (of its averaged weights, if ema) or of an export, on the CPU."""
    model = empty_model(config, attention)
    model.to_empty(device="cpu")
    if not is_checkpoint(path):
        load(model, path)
    elif lora_config(config) is None:
        _load_checkpoint(path, config, ema, dict(model.named_parameters()))
    else:
        for name, value in _stream_merged(model, path, config, ema):
            assign(model.get_parameter(name), value)
    return model


def lora_config(config: dict[str, Any]) -> LoraConfig | None:
    """None if the run trained all weights."""
    lora = section(LoraConfig, config.get("lora", {}))
    return lora if lora.rank else None


def load_adapters(path: Path, config: dict[str, Any], ema: bool) -> dict[str, Tensor]:
    """float32 adapters of a LoRA run's checkpoint, by the names of models/lora.py. ConfigError if it is none."""
    lora = lora_config(config)
    if lora is None or not is_checkpoint(path):
        rule = "has no adapters: its run trained all weights, or it is an export"
        raise ConfigError("checkpoint", str(path), rule, "Give a checkpoint of a LoRA run")
    adapters = empty_adapters(empty_model(config), lora)
    _load_checkpoint(path, config, ema, adapters)
    return adapters


def _stream_merged(model: Flux, path: Path, config: dict[str, Any], ema: bool) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a LoRA run's checkpoint, which holds adapters alone: those of its base, adapters merged in."""
    base, guidance_in = config["weights"]["student"], GuidanceIn(config["weights"]["guidance_in"])
    hint = "Put back the file that the run began with"
    if not Path(base).exists():
        raise ConfigError("weights.student", base, f"is gone, and {path} holds only adapters to it", hint)
    if base_digest(base) != checkpoint.read_record(path)["base"]:
        raise ConfigError("weights.student", base, f"holds other weights than those that {path} adapts", hint)
    stored, adapters = StoredParameters(model, base, guidance_in), load_adapters(path, config, ema)
    lora = section(LoraConfig, config["lora"])
    for name, parameter in model.named_parameters():
        yield name, merged(name, stored.rows(name, 0, parameter.shape[0]).float(), adapters, lora)


def stream_parameters(path: Path, config: dict[str, Any], ema: bool) -> Iterator[tuple[str, Tensor]]:
    """The parameters of `load_model` by name, without ever holding more than GROUP_BYTES or the largest of them."""
    model = empty_model(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if not is_checkpoint(path):
        stored = StoredParameters(model, path)
        for name, shape in shapes.items():
            yield name, stored.rows(name, 0, shape[0]).float()
        return
    if lora_config(config) is not None:
        yield from _stream_merged(model, path, config, ema)
        return
    for group in _groups(shapes):
        tensors = {name: torch.empty(shapes[name]) for name in group}
        _load_checkpoint(path, config, ema, tensors)
        while tensors:
            name = next(iter(tensors))
            yield name, tensors.pop(name)


def _groups(shapes: dict[str, torch.Size]) -> list[list[str]]:
    """Names in order, as many together as GROUP_BYTES allow: each load of a checkpoint reads its index again."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = 4 * shape.numel()
        if groups[-1] and held + size > GROUP_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _load_checkpoint(path: Path, config: dict[str, Any], ema: bool, tensors: dict[str, Tensor]) -> None:
    averaged = _averaged(config, ema)
    checkpoint.load(path, {"ema": tensors} if averaged else {"modules": {"student": tensors}})


def _averaged(config: dict[str, Any], ema: bool) -> bool:
    return ema and config["ema"]["half_life_images"] > 0


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
    model = empty_model(config, attention_function(backend)).to(dtype).to_empty(device=device)
    for name, value in stream_parameters(path, config, ema):  # the host holds a part of the float32 weights at a time
        assign(model.get_parameter(name).data, value)
    encoders_config = _encoders_config(config, encoders_path)
    side = encoders_config.pixels_per_token()
    return Trained(
        model=model.requires_grad_(False).eval(),
        pixels_per_token=side,
        encoders=load_encoders(encoders_config, device),
        shift=section(ShiftConfig, config["flow"]),
        transform=_transform(config, side),
        device=device,
    )


def _encoders_config(config: dict[str, Any], path: str | None) -> EncodersConfig:
    found: EncodersConfig = section(EncodersConfig, config["encoders"] | ({"path": path} if path else {}))
    return found


def _transform(config: dict[str, Any], pixels_per_token: int) -> Transform:
    data = config["data"] | {"sources": {}}  # plain values are no sources, and no shards are read
    return replace(Transform.of(section(DataConfig, data), pixels_per_token, seed=0), crop=Crop.center)
