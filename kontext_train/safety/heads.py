"""What turns CLIP features into a score: a linear probe, or the nearest of some concepts' embeddings. And thresholds.

A head is a safetensors file: `weight` [F] and `bias` [1] of a probe, whose score is a probability, or `embeddings`
[n, F] of concepts, whose score is the highest cosine. Its metadata says what made the features, so that it meets no
other tower.

Legend: n samples (or concepts), F features.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kontext_train.safety.rules import file_digest, is_threshold

_METADATA_KEY = "kontext_train"
_CURVE_POINTS = 33
_CLIP_FILES = (
    *("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)


@dataclass(slots=True)
class Head:
    tower: str  # image or text
    clip: str  # `clip_digest` of the folder
    threshold: float | None  # None: nobody has calibrated it
    weight_F: Tensor | None
    bias: float
    embeddings_nF: Tensor | None  # unit vectors, or the score is no cosine

    @property
    def width(self) -> int:
        """F, the features that it reads."""
        rows = self.weight_F if self.embeddings_nF is None else self.embeddings_nF
        assert rows is not None
        return rows.shape[-1]

    def score(self, features_kF: Tensor) -> float:
        """The highest over tiles or windows. ValueError if it is not finite."""
        if self.embeddings_nF is not None:
            score = float((features_kF @ self.embeddings_nF.T).max())
        else:
            assert self.weight_F is not None
            score = float(torch.sigmoid(features_kF @ self.weight_F + self.bias).max())
        if not np.isfinite(score):
            raise ValueError("its score is not finite")
        return score


def clip_digest(folder: Path) -> str:
    """Names a CLIP folder by all that its features come from: weights, configuration, preparation, tokenizer.

    ValueError without weights in safetensors: there would be nothing to name.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder} holds no *.safetensors. Save the model again with transformers' save_pretrained")
    digest = hashlib.sha256()
    for file in [*weights, *(folder / name for name in _CLIP_FILES if (folder / name).is_file())]:
        digest.update(f"{file.name} {file_digest(file)} ".encode())
    return digest.hexdigest()


def save_head(path: Path, head: Head) -> None:
    about = {"tower": head.tower, "clip": head.clip, "threshold": head.threshold}
    if head.embeddings_nF is not None:
        tensors = {"embeddings": head.embeddings_nF.contiguous()}
    else:
        assert head.weight_F is not None
        tensors = {"weight": head.weight_F.contiguous(), "bias": torch.tensor([head.bias])}
    save_file(tensors, path, {_METADATA_KEY: json.dumps(about)})


def load_head(path: Path) -> Head:
    """Embeddings are made unit vectors. ValueError for what `save_head` did not write, or what cannot score."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()[_METADATA_KEY])
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        threshold = about["threshold"]
        if threshold is not None and not is_threshold(threshold):
            raise ValueError(f"its threshold {threshold!r} is not above 0 and at most 1")
        if tensors.keys() not in ({"weight", "bias"}, {"embeddings"}):
            raise ValueError(f"it holds {sorted(tensors)}")
        if "weight" in tensors:
            return Head(about["tower"], about["clip"], threshold, tensors["weight"], float(tensors["bias"]), None)
        embeddings_nF = tensors["embeddings"]
        length_n = embeddings_nF.norm(dim=-1)
        if embeddings_nF.ndim != 2 or not len(length_n) or not ((length_n > 0) & length_n.isfinite()).all():
            raise ValueError("its embeddings are not rows of finite numbers that are not all 0")
        return Head(about["tower"], about["clip"], threshold, None, 0.0, embeddings_nF / length_n[:, None])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no head of train_probe ({type(error).__name__}: {error})") from error


def fit_probe(features_nF: Tensor, labels_n: Tensor, l2: float = 1e-5) -> tuple[Tensor, float]:
    """(weight [F], bias) of the logistic regression in which both classes weigh the same, by L-BFGS in float64.

    features: unit vectors. labels: bool. ValueError if all samples are of one class.
    """
    labels_n = labels_n.bool()
    if labels_n.all() or not labels_n.any():
        raise ValueError(f"all {len(labels_n)} samples have the label {bool(labels_n.any())}. Both classes are needed")
    mean_F, std_F = features_nF.double().mean(0), features_nF.double().std(0).clamp(min=1e-6)
    x_nF = (features_nF.double() - mean_F) / std_F
    weight_n = torch.where(labels_n, 0.5 / labels_n.sum(), 0.5 / (~labels_n).sum())
    weight_F = torch.zeros(x_nF.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_F, bias], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses_n = nn.functional.binary_cross_entropy_with_logits(
            x_nF @ weight_F + bias, labels_n.double(), reduction="none"
        )
        loss = (losses_n * weight_n).sum() + l2 * weight_F.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    plain_F = (weight_F / std_F).detach()
    return plain_F.float(), float(bias.detach() - plain_F @ mean_F)


@dataclass(frozen=True, slots=True)
class Operating:
    """What a threshold means on a labelled set: a sample is found if its score is at least the threshold."""

    threshold: float
    recall: float
    precision: float
    false_positives: float  # share of the samples without the label


def operating_point(scores: Sequence[float], labels: Sequence[bool], max_false_positives: float) -> Operating:
    """The threshold with the highest recall among those that find at most that share of the others.

    Between two neighbouring scores it stands half way: either side has room. ValueError if one class is missing, or if
    no such threshold finds anything.
    """
    allowed = [cut for cut in _cuts(scores, labels) if cut.false_positives <= max_false_positives and cut.recall > 0]
    if not allowed:
        raise ValueError(
            f"no threshold finds one of {int(np.sum(labels))} samples with the label and at most a share of "
            f"{max_false_positives:g} of the {len(labels) - int(np.sum(labels))} others"
        )
    return max(allowed, key=lambda cut: (cut.recall, cut.threshold))


def calibration(scores: Sequence[float], labels: Sequence[bool], max_false_positives: float) -> dict[str, Any]:
    """The chosen operating point and the curve it was chosen from, as JSON has it. ValueError if there is none."""
    cuts = _cuts(scores, labels)
    shown = np.unique(np.linspace(0, len(cuts) - 1, _CURVE_POINTS).round().astype(int)).tolist()
    return {
        "samples": len(labels),
        "with_label": int(np.sum(labels)),
        "max_false_positives": max_false_positives,
        "chosen": asdict(operating_point(scores, labels, max_false_positives)),
        "curve": [asdict(cuts[i]) for i in shown],
    }


def _cuts(scores: Sequence[float], labels: Sequence[bool]) -> list[Operating]:
    score_n, label_n = np.asarray(scores, float), np.asarray(labels, bool)
    if label_n.all() or not label_n.any():
        raise ValueError(f"of {len(label_n)} samples {int(label_n.sum())} have the label. Both classes are needed")
    values = np.unique(score_n)
    thresholds = [*((values[:-1] + values[1:]) / 2).tolist(), float(np.nextafter(values[-1], np.inf))]
    thresholds = [float(values[0]), *thresholds]
    order = np.sort(score_n[label_n]), np.sort(score_n[~label_n])
    cuts = []
    for threshold in thresholds:
        found, others = (len(part) - int(np.searchsorted(part, threshold)) for part in order)
        precision = found / (found + others) if found + others else 1.0
        cuts.append(Operating(threshold, found / len(order[0]), precision, others / len(order[1])))
    return cuts
