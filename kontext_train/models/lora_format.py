"""Adapters as diffusers and PEFT name them: what `FluxKontextPipeline.load_lora_weights` reads.

A released matrix is one of diffusers' or several, one above the other (models/diffusers_format.py). So U is cut like
the matrix itself, and each part has all of D. alpha / rank is multiplied into U: a file without alphas is scaled by 1.
"""

from collections.abc import Mapping

from torch import Tensor

from kontext_train.models.config import LoraConfig
from kontext_train.models.diffusers_format import to_diffusers
from kontext_train.models.lora import DOWN, UP


def to_peft(adapters: Mapping[str, Tensor], config: LoraConfig, hidden_size: int) -> dict[str, Tensor]:
    """Adapters by the names of models/lora.py -> lora_A [R, X] and lora_B [Y, R] by PEFT's."""
    tensors = {}
    for name in adapters:
        if not name.endswith(UP):
            continue
        linear = name.removesuffix(UP)
        for weight, up_YR in to_diffusers(f"{linear}.weight", adapters[name], hidden_size).items():
            layer = f"transformer.{weight.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = adapters[linear + DOWN].t()
            tensors[f"{layer}.lora_B.weight"] = up_YR * config.scale
    return tensors
