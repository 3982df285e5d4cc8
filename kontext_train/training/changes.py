"""Whether a checkpoint fits the configuration that resumes it."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kontext_train.errors import ConfigError

# May differ from session to session. They say where things are, what is shown and kept, and on which machines a run
# goes on, not what it learns: the plan's digest holds the shards, wherever they are.
FREE = (
    "run.dir",
    "run.resume",
    "run.allow_changes",
    "run.*_every_steps",
    "checkpoint.*",
    "logging.*",
    "health.straggler_factor",
    "health.memory_history",
    "health.max_rollbacks",
    "profiler.*",
    "weights.teacher",  # wherever it is now, its digest must be the same
    "weights.reference",
    "objective.concepts",  # likewise
    "validation.*",
    "evaluation.*",
    "data.validation",
    "data.train",
    "data.sources.*.path",
    "data.workers",
    "data.prefetch",
    "data.storage.*",
    "data.max_bad_fraction",
    "data.require_safety_filter",
    "parallel.*",
    "model.attention",
)
PRECISIONS = ("parallel.*_dtype", "parallel.float8*")  # what is computed, unlike the rest of parallel


def check_resumable(path: Path, saved: dict[str, Any], now: dict[str, Any], defaults: dict[str, Any]) -> None:
    """ConfigError unless a checkpoint's record fits the run that resumes it, naming every option that changed.

    The plan and the tensors must be the same; other options must be free to change, or named in run.allow_changes.
    defaults: of all options; what there was no option for when the checkpoint was written went by its default.
    """
    was, wanted = _flat(defaults) | _flat(saved["config"]), _flat(now["config"])
    allowed = now["config"]["run"]["allow_changes"]
    for name in allowed:
        if not any(_within(key, [name]) for key in wanted):
            raise ConfigError("run.allow_changes", allowed, f"{name} is no option", "Check the spelling")
    changed = [key for key in wanted if key in was and was[key] != wanted[key] and not _is_free(key, now["config"])]
    listed = ", ".join(f"{key} (was {was[key]!r}, now {wanted[key]!r})" for key in changed)
    start_anew = "start a new run.dir with weights.student"
    if saved["plan"] != now["plan"]:
        rule = f"but {path} was planned with other data settings (shards, run.seed, data.*, encoders.t5_tokens)"
        hint = f"Samples would be lost or repeated. Restore them, or {start_anew}"
        raise ConfigError("run.resume", str(path), f"{rule}. Changed: {listed}" if listed else rule, hint)
    for key in changed:
        if _decides_tensors(key, was[key], wanted[key]):
            rule = f"but {path} was saved with {was[key]!r}, and its tensors are of that. Changed: {listed}"
            raise ConfigError(key, wanted[key], rule, f"Restore it, or {start_anew}")
    if saved.get("base") != now.get("base"):
        given, rule = now["config"]["weights"]["student"], f"holds other weights than those that {path} adapts"
        raise ConfigError("weights.student", given, rule, "Give the file that the run began with, wherever it is now")
    for role, digest in now.get("frozen", {}).items():
        if saved.get("frozen", {}).get(role) != digest:
            given, rule = now["config"]["weights"][role], f"holds other weights than those that {path} learned from"
            raise ConfigError(f"weights.{role}", given, rule, "Give the file that the run began with")
    if saved.get("concepts") != now.get("concepts"):
        given, rule = now["config"]["objective"]["concepts"], f"says other than the list that {path} learned from"
        raise ConfigError("objective.concepts", given, rule, "Restore list and images, or start a new run.dir")
    if refused := [key for key in changed if not _within(key, allowed)]:
        rule = f"does not name all that changed since {path}: {listed}"
        hint = f"Restore them, or say run.allow_changes=[{','.join([*allowed, *refused])}]"
        raise ConfigError("run.allow_changes", allowed, rule, hint)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat = dict[str, Any]()
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _within(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _is_free(key: str, now: dict[str, Any]) -> bool:
    if key == "run.steps":  # a longer run is a longer run, unless the rate is a function of its length
        return now["schedule"]["name"] == now["discriminator_schedule"]["name"] == "constant"
    if key == "weights.student":  # the start of a run of all weights has no effect any more; adapters' base is known
        return now["lora"]["rank"] > 0
    return any(fnmatchcase(key, p) for p in FREE) and not any(fnmatchcase(key, p) for p in PRECISIONS)


def _decides_tensors(key: str, was: Any, now: Any) -> bool:
    if key == "ema.half_life_images":
        return not (was > 0 and now > 0)
    named = ("optimizer.name", "optimizer.moments", "lora.rank", "lora.targets")
    return key.removeprefix("discriminator_") in named or (
        key.startswith(("model.", "objective.discriminator.")) and not key.startswith("model.init.")
    )
