"""Rules applied to samples. A scorer that fails is a finding too: nothing passes because it could not be seen."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from kontext_train.errors import ConfigError
from kontext_train.safety.clip import ImageTower, TextTower
from kontext_train.safety.hashes import DigestList, HashList, perceptual_hash
from kontext_train.safety.heads import Head, clip_digest, load_head
from kontext_train.safety.rules import Kind, Policy, Rule, Rules, file_digest
from kontext_train.safety.words import WordList

HASH_BITS = 64
_T = TypeVar("_T")


@dataclass(slots=True)
class Subject:
    """What is judged: a prompt (None: there is none) and RGB images by part (target, context.0, …).

    files: the bytes that images were given as, by part; a result that was just made has none.
    """

    prompt: str | None
    images: Mapping[str, Image.Image]
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that holds for a part of a sample. score is None where it could not be worked out."""

    rule: str
    policy: Policy
    part: str  # prompt, target, context.0, … or sample
    score: float | None
    threshold: float
    reason: str = ""

    def line(self) -> dict[str, object]:
        return {**asdict(self), "policy": self.policy.value}


@dataclass(slots=True)
class Verdict:
    """scores: by rule, of every part that it looked at."""

    findings: list[Finding] = field(default_factory=list)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    def blocking(self) -> Finding | None:
        """The first finding that keeps a sample out; drop before quarantine."""
        for policy in (Policy.drop, Policy.quarantine):
            if (found := next((f for f in self.findings if f.policy is policy), None)) is not None:
                return found
        return None


class Judge:
    """All rules of a policy but those on metadata, which only shards have."""

    def __init__(self, rules: Rules, device: torch.device, key: str = "rules") -> None:
        """key: of the option that named the rules. ConfigError for a list, model or head that does not do."""
        self.rules = [rule for rule in rules.rules if rule.kind is not Kind.metadata]
        self._device = device
        self._words = dict[str, WordList]()
        self._hashes, self._digests = dict[str, HashList](), dict[str, DigestList]()
        self._heads, self._thresholds = dict[str, Head](), dict[str, float]()
        for number, rule in enumerate(rules.rules):
            if rule.kind is not Kind.metadata:
                self._prepare(f"{key}.rules[{number}]", rule)

    def _prepare(self, key: str, rule: Rule) -> None:
        try:
            match rule.kind:
                case Kind.words:
                    assert rule.list is not None
                    self._words[rule.name], self._thresholds[rule.name] = WordList(rule.list), 1.0
                case Kind.image_hash:
                    assert rule.list is not None
                    self._hashes[rule.name] = HashList(rule.list)
                    self._thresholds[rule.name] = 1 - rule.distance / HASH_BITS
                case Kind.file_hash:
                    assert rule.list is not None
                    self._digests[rule.name], self._thresholds[rule.name] = DigestList(rule.list), 1.0
                case Kind.clip_image | Kind.clip_text:
                    self._prepare_head(key, rule)
                case Kind.combination:
                    assert rule.threshold is not None
                    self._thresholds[rule.name] = rule.threshold
                    if any(self._heads[name].embeddings_nF is not None for name in rule.of):
                        raise ConfigError(f"{key}.of", list(rule.of), "must be probes", "Cosines are no probabilities")
                case _:
                    raise AssertionError(rule.kind)
        except ConfigError:
            raise
        except (ValueError, OSError) as error:
            raise ConfigError(key, rule.name, str(error), "Correct it: docs/safety.md") from error

    def _prepare_head(self, key: str, rule: Rule) -> None:
        assert rule.head is not None
        assert rule.clip is not None
        head, tower = load_head(rule.head), "image" if rule.kind is Kind.clip_image else "text"
        if head.tower != tower:
            raise ConfigError(f"{key}.head", str(rule.head), f"reads {head.tower} features", f"Give one for {tower}s")
        if head.clip != _digest_of_clip(rule.clip):
            hint = "Give the model that it was fitted on, or fit it again: python -m data_tools.train_probe --help"
            raise ConfigError(f"{key}.head", str(rule.head), f"belongs to other weights than {rule.clip}", hint)
        threshold = head.threshold if rule.threshold is None else rule.threshold
        if threshold is None:
            rule_text = "must be given: its head was not calibrated"
            raise ConfigError(f"{key}.threshold", None, rule_text, "filter_safety --labels proposes one")
        features = _tower(tower, rule.clip, self._device).width  # loaded now, not at the first sample
        if head.width != features:
            hint = "Fit it again: python -m data_tools.train_probe --help"
            raise ConfigError(f"{key}.head", str(rule.head), f"reads {head.width} features of {features}", hint)
        self._heads[rule.name], self._thresholds[rule.name] = head, threshold

    def judge(self, subjects: Sequence[Subject]) -> list[Verdict]:
        """One verdict a subject, in order."""
        verdicts = [Verdict() for _ in subjects]
        for rule in self.rules:
            for verdict, scores in zip(verdicts, self._scores(rule, subjects, verdicts), strict=True):
                self._add(rule, scores, verdict)
        return verdicts

    def _add(self, rule: Rule, scores: "dict[str, float] | str", verdict: Verdict) -> None:
        threshold = self._thresholds[rule.name]
        if isinstance(scores, str):
            # Whatever the rule's own policy: what could not be seen is looked at by somebody.
            verdict.findings.append(Finding(rule.name, Policy.quarantine, "sample", None, threshold, scores))
            return
        verdict.scores[rule.name] = scores
        for part, score in scores.items():
            if score >= threshold:
                verdict.findings.append(Finding(rule.name, rule.policy, part, round(score, 6), threshold))

    def _scores(
        self, rule: Rule, subjects: Sequence[Subject], verdicts: Sequence[Verdict]
    ) -> list[dict[str, float] | str]:
        """Scores by part of each subject, or why there are none."""
        if rule.kind is Kind.combination:
            return [_guarded(lambda v=v: {"sample": _together(rule, v)}) for v in verdicts]  # type: ignore[misc]
        try:  # all at once, which is fast; if anything fails, one by one, to see whose fault it is
            return list(self._scored(rule, subjects))
        except Exception:
            return [_guarded(lambda s=s: self._scored(rule, [s])[0]) for s in subjects]  # type: ignore[misc]

    def _scored(self, rule: Rule, subjects: Sequence[Subject]) -> list[dict[str, float]]:
        match rule.kind:
            case Kind.words:
                words = self._words[rule.name]
                return [{} if s.prompt is None else {"prompt": float(words.matches(s.prompt))} for s in subjects]
            case Kind.image_hash:
                hashes = self._hashes[rule.name]
                return [{p: _likeness(hashes, i) for p, i in _looked_at(rule, s.images).items()} for s in subjects]
            case Kind.file_hash:
                digests = self._digests[rule.name]
                return [{p: float(digests.holds(f)) for p, f in _looked_at(rule, s.files).items()} for s in subjects]
            case Kind.clip_text:
                texts = [{} if s.prompt is None else {"prompt": s.prompt} for s in subjects]
                return self._by_head(rule, "text", texts)
            case Kind.clip_image:
                return self._by_head(rule, "image", [_looked_at(rule, s.images) for s in subjects])
            case _:
                raise AssertionError(rule.kind)

    def _by_head(self, rule: Rule, tower: str, parts: Sequence[Mapping[str, object]]) -> list[dict[str, float]]:
        assert rule.clip is not None
        flat = [content for part in parts for content in part.values()]
        features = iter(_tower(tower, rule.clip, self._device).features(flat) if flat else [])  # type: ignore[arg-type]
        head = self._heads[rule.name]
        return [{name: head.score(next(features)) for name in part} for part in parts]


def _guarded(work: Callable[[], dict[str, float]]) -> dict[str, float] | str:
    try:
        return work()
    except Exception as error:  # a scorer may fail in any way: it fails closed. Its text may quote the prompt
        return f"failed with {type(error).__name__}"


def _together(rule: Rule, verdict: Verdict) -> float:
    """1 - Π (1 - score) over the parts that the named probes saw: that at least one is right, were they independent."""
    if missing := [name for name in rule.of if name not in verdict.scores]:
        raise ValueError(f"{missing[0]} has no score")
    return 1 - float(np.prod([1 - score for name in rule.of for score in verdict.scores[name].values()]))


def _looked_at(rule: Rule, given: Mapping[str, _T]) -> dict[str, _T]:
    return {part: content for part, content in given.items() if part.split(".")[0] in rule.parts}


def _likeness(hashes: HashList, image: Image.Image) -> float:
    """1 - the share of bits in which the nearest listed hash differs; 0 for an image of one colour: it has no hash."""
    own = perceptual_hash(image)
    return 0.0 if own is None else 1 - hashes.distance(own) / HASH_BITS


@lru_cache(maxsize=4)
def _tower(kind: str, folder: Path, device: torch.device) -> ImageTower | TextTower:
    return ImageTower(folder, device) if kind == "image" else TextTower(folder, device)


@lru_cache(maxsize=4)
def _digest_of_clip(folder: Path) -> str:
    return clip_digest(folder)


def rules_digest(rules: Rules) -> str:
    """Names a policy by all that it decides by: rules, the content of lists and heads, the weights of towers."""
    described = []
    for rule in rules.rules:
        plain = asdict(rule) | {"kind": rule.kind.value, "policy": rule.policy.value, "clip": None}
        for part in ("list", "head"):
            path = getattr(rule, part)
            plain[part] = None if path is None else file_digest(path)
        if rule.clip is not None:
            plain["clip"] = _digest_of_clip(rule.clip)
        described.append(plain)
    return hashlib.sha256(json.dumps([rules.name, described], sort_keys=True).encode()).hexdigest()[:32]
