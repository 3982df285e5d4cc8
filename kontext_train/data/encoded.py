"""Encoded shards: what the frozen encoders made of the images and prompts, stored beside the prompts.

A sample is KEY.json and KEY.encoded.safetensors. Beside the shards lies `encoding.safetensors`: how they were made, and
the encoding of the empty prompt, which prompt dropout needs. Format: docs/data_format.md; page: docs/encoding.md.

Legend: C latent channels, h, w latents, P pooled channels, L text tokens, E text channels.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kontext_train.data.encoding import ENCODING_NAME, METADATA_KEY, parse_encoding
from kontext_train.data.index import ShardIndex
from kontext_train.data.storage import read_whole
from kontext_train.data.transforms import Transform
from kontext_train.errors import ConfigError
from kontext_train.models.config import EncodersConfig

FORMAT_VERSION = 1
_BLOCK_BYTES, _BLOCKS = 1 << 20, 512


class StoredText(NamedTuple):
    """Prompts as the text encoders left them; of one sample, or of several with a dimension S in front."""

    clip_P: Tensor  # float32
    t5_LE: Tensor | None  # bfloat16; None: T5 runs while training

    def tensors(self) -> dict[str, Tensor]:
        return {"clip": self.clip_P} | ({} if self.t5_LE is None else {"t5": self.t5_LE})


def to_bytes(moments: Sequence[Tensor], text: StoredText, encoding: str, pixels_per_latent: int) -> bytes:
    """The content of KEY.encoded.safetensors.

    moments: of the target, then of each context image, [2, C, h, w]: mean and log-variance as the autoencoder gives
    them, before scale and shift. encoding: `digest_of` the folder's encoding.
    """
    tensors = {f"context.{i - 1}" if i else "target": image for i, image in enumerate(moments)}
    tensors |= text.tensors()
    about = json.dumps({"encoding": encoding, "pixels_per_latent": pixels_per_latent})
    return save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, {METADATA_KEY: about})


def from_bytes(raw: bytes) -> tuple[list[Tensor], StoredText]:
    """(moments, text), the inverse of `to_bytes`. Raises ValueError with the reason."""
    try:
        tensors = load(raw)
        text = StoredText(tensors.pop("clip"), tensors.pop("t5", None))
        return [tensors.pop("target"), *(tensors[f"context.{i}"] for i in range(len(tensors)))], text
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"cannot be read ({type(error).__name__}: {error})") from error


def describe_encoding(config: EncodersConfig, transform: Transform, t5: bool, source: str) -> dict[str, Any]:
    """All that decides what is in encoded shards, by config key. source: digest of the index they are made from."""
    path = Path(config.path)
    digests = {
        "vae": weights_digest([path / "vae"]),
        "text_encoder": weights_digest([path / "text_encoder", path / "tokenizer"]),
    }
    if t5:  # T5 that runs while training may be any
        digests["text_encoder_2"] = weights_digest([path / "text_encoder_2", path / "tokenizer_2"])
    return {
        "format_version": FORMAT_VERSION,
        "source": source,
        "t5": t5,
        "encoders.path": digests,
        "latent_channels": config.token_sizes()["in_channels"] // 4,
        "encoders.dtype": config.dtype.value,
        **({"encoders.t5_tokens": config.t5_tokens} if t5 else {}),
        "data.resize": transform.resize.value,
        "data.max_pixels": transform.max_pixels,
        "data.max_upscale": transform.max_upscale,
        "data.background": list(transform.background),
        "data.crop": transform.crop.value,
    }


def weights_digest(folders: Sequence[Path]) -> str:
    """Names the weights and tokenizer files of some folders: SHA-256 over names, sizes and contents.

    Of a file above 512 MiB, 512 blocks of 1 MiB at even distances stand for the whole, so that T5-XXL takes a second.
    Retrained or merged weights differ everywhere. Settings in config.json are left out: libraries note versions there.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.glob("*")):
            if file.suffix in (".safetensors", ".txt", ".model") or file.name == "tokenizer.json":
                size = file.stat().st_size
                digest.update(f"{file.name} {size}\n".encode())
                with open(file, "rb") as opened:
                    for offset in range(0, size, max(_BLOCK_BYTES, size // _BLOCKS)):
                        opened.seek(offset)
                        digest.update(opened.read(_BLOCK_BYTES))
    return digest.hexdigest()


def check_encoding(key: str, index: ShardIndex, config: EncodersConfig, transform: Transform) -> None:
    """ConfigError by key if a run would encode otherwise than its shards were. key: that of the data, `data.train`.

    Shards of images pass.
    """
    folder, stored = index.folder, index.encoding
    if stored is None:
        return
    if stored["format_version"] != FORMAT_VERSION:
        rule = f"was encoded in format version {stored['format_version']}, this program reads {FORMAT_VERSION}"
        raise ConfigError(key, folder, rule, "Encode it again: python -m data_tools.encode_shards --help")
    ours = describe_encoding(config, transform, stored["t5"], stored["source"])
    hint = f"Use that, or encode the pixel shards again ({key} is a folder of encoded shards)"
    for setting, value in ours.items():
        if setting == "encoders.path":
            other = [part for part, digest in value.items() if digest != stored[setting][part]]
            if other:
                rule = f"has another {other[0]} than {folder} was encoded with"
                raise ConfigError(setting, config.path, rule, hint)
        elif value != stored[setting]:
            raise ConfigError(setting, value, f"but {folder} was encoded with {stored[setting]!r}", hint)


def encoding_bytes(encoding: dict[str, Any], empty_prompt: StoredText) -> bytes:
    """The content of `encoding.safetensors`; see `read_empty_prompt`."""
    return save(empty_prompt.tensors(), {METADATA_KEY: json.dumps(encoding)})


def read_empty_prompt(index: ShardIndex) -> StoredText:
    """The empty prompt's encoding beside encoded shards.

    Raises:
        OSError: `encoding.safetensors` is gone, or its storage failed.
        ValueError: it is damaged, or not the one that was indexed.
    """
    path = f"{index.base}/{ENCODING_NAME}"
    raw = read_whole(path, index.storage)
    if parse_encoding(path, raw) != index.encoding:
        raise ValueError(f"{path} was replaced after the shards beside it were indexed. Index them again")
    try:
        tensors = load(raw)
        return StoredText(tensors["clip"], tensors.get("t5"))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}). Copy it again") from error
