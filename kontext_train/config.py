"""The whole configuration of a run: every room's dataclass under one key, checked before any process group starts.

Defaults stand in those dataclasses and nowhere else; `conf/` holds choices. Importing this file imports no torch, so
that `--help` and `--cfg job` answer at once.
"""

import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kontext_train.data.config import DataConfig, SourceConfig, is_url
from kontext_train.distributed.config import Float8, ParallelConfig, Precision
from kontext_train.errors import ConfigError
from kontext_train.evaluation.config import METRIC_FILES, InTrainingConfig
from kontext_train.flow.config import ShiftConfig
from kontext_train.models.config import (
    EncodersConfig,
    FluxConfig,
    GuidanceIn,
    LoraConfig,
    block_linears,
    lora_targets,
)
from kontext_train.objectives.concept_list import read_concepts
from kontext_train.objectives.config import (
    UNGUIDED,
    FlowMatchingConfig,
    GuidanceDistillationConfig,
    LaddConfig,
    ObjectiveConfig,
    SafetyConfig,
)
from kontext_train.training.config import (
    CheckpointConfig,
    DiscriminatorOptimizerConfig,
    DiscriminatorScheduleConfig,
    EMAConfig,
    HealthConfig,
    LoggingConfig,
    MomentDtype,
    OptimizerConfig,
    OptimizerName,
    ProfilerConfig,
    RunConfig,
    ScheduleConfig,
    ValidationConfig,
)


@dataclass(slots=True)
class WeightsConfig:
    """Where each role starts from."""

    student: str | None = None  # a released file, a diffusers folder or an export; none starts from random weights
    guidance_in: GuidanceIn = GuidanceIn.require  # whether the student's guidance embedding is the file's
    # Frozen networks of the student's shape, for the stages that have such a role. Whether they embed guidance, their
    # files say. No checkpoint holds them.
    teacher: str | None = None
    reference: str | None = None
    frozen_dtype: Precision = Precision.bfloat16  # in which they are kept


@dataclass(slots=True)
class TrainConfig:
    run: RunConfig = field(default_factory=RunConfig)
    objective: ObjectiveConfig = MISSING
    model: FluxConfig = field(default_factory=FluxConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: ShiftConfig = field(default_factory=ShiftConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    discriminator_optimizer: DiscriminatorOptimizerConfig = field(default_factory=DiscriminatorOptimizerConfig)
    discriminator_schedule: DiscriminatorScheduleConfig = field(default_factory=DiscriminatorScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: InTrainingConfig = field(default_factory=InTrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    profiler: ProfilerConfig = field(default_factory=ProfilerConfig)


ROLES = ("teacher", "reference")  # that a stage may have beside what it trains

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "flow_matching": FlowMatchingConfig,
    "guidance_distillation": GuidanceDistillationConfig,
    "ladd": LaddConfig,
    "safety": SafetyConfig,
}


def register_schemas() -> None:
    """Make Hydra compose onto these dataclasses, so that it refuses unknown keys and wrong types by dotted key."""
    store = ConfigStore.instance()
    store.store(name="schema", node=TrainConfig)
    for name, objective in OBJECTIVES.items():
        store.store(group="schema/objective", name=name, node=objective)


def typed(composed: DictConfig) -> TrainConfig:
    """The one merge from Hydra's tree to dataclasses; each of them checks its own values."""
    kind = OmegaConf.get_type(composed)
    assert kind is not None
    _refuse_added_keys(composed, kind, "")
    for name, given in composed.data.sources.items():
        composed.data.sources[name] = _typed_source(f"data.sources.{name}", given)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, TrainConfig), type(config)
    return config


def _refuse_added_keys(node: DictConfig, kind: type, prefix: str) -> None:
    """Hydra's `+key=value` can add to a dataclass what it does not have; say so by dotted key."""
    known = {f.name for f in fields(kind)}
    for key in map(str, node):
        if key not in known:
            rule = f"is no option. Known here: {', '.join(sorted(known))}"
            raise ConfigError(f"{prefix}{key}", node._get_node(key), rule, "Check the spelling")
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            inner = OmegaConf.get_type(child)
            if inner is not None and is_dataclass(inner):
                _refuse_added_keys(child, inner, f"{prefix}{key}.")


def _typed_source(key: str, given: Any) -> DictConfig:
    """Hydra cannot add to a dict of dataclasses, so the sources come untyped."""
    if not isinstance(given, DictConfig):
        hint = f"For example +{key}.path=SHARDS"
        raise ConfigError(key, given, "must hold options of one source", hint)
    _refuse_added_keys(given, SourceConfig, f"{key}.")
    typed = OmegaConf.structured(SourceConfig)
    for name in map(str, given):
        try:
            typed[name] = given[name]
        except OmegaConfBaseException as error:
            raise ConfigError(
                f"{key}.{name}", given[name], f"has the wrong type: {str(error).splitlines()[0]}", "Correct it"
            ) from error
    return typed


def plain(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON-able values, for checkpoints and logs."""
    return _plain(asdict(config))


def defaults_of(config: TrainConfig) -> dict[str, Any]:
    """What `plain` gives where no option is set, for the same stage."""
    return plain(TrainConfig(objective=type(config.objective)()))


def as_yaml(config: TrainConfig) -> str:
    """The config as a file that Hydra composes to the same again."""
    (objective,) = (name for name, kind in OBJECTIVES.items() if kind is type(config.objective))
    defaults = ["schema", {"schema/objective@objective": objective}, "_self_"]
    return OmegaConf.to_yaml(OmegaConf.create({"defaults": defaults, **plain(config)}))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.value if isinstance(value, Enum) else value


def check_relations(config: TrainConfig, world_size: int) -> None:
    """Relations between rooms, whatever lies on disk. Raises ConfigError by dotted key."""
    config.parallel.mesh_shape(world_size)
    config.parallel.check_keep_outputs(block_linears(config.model))
    if config.model.num_heads % config.parallel.cp:
        rule = f"must divide model.num_heads={config.model.num_heads}, which the ranks of a sequence share out"
        raise ConfigError("parallel.cp", config.parallel.cp, rule, "Use a divisor")
    if config.data.pad_packs and config.data.tokens_per_pack % config.parallel.cp:
        rule = f"must be a multiple of parallel.cp={config.parallel.cp}, so that all ranks have equal parts"
        raise ConfigError("data.tokens_per_pack", config.data.tokens_per_pack, rule, "Round it")
    _check_master_dtype(config)
    _check_guidance_in(config)
    _check_lora(config)
    for optimizer in (config.optimizer, config.discriminator_optimizer):
        if optimizer.moments is MomentDtype.int8 and config.parallel.cpu_offload:
            rule, hint = (
                "saves GPU memory, and parallel.cpu_offload keeps the moments in host memory",
                "Use one of them",
            )
            raise ConfigError(f"{optimizer.key}.moments", "int8", rule, hint)
    outside = [rank for rank in config.profiler.ranks if not 0 <= rank < world_size]
    if config.profiler.steps and (outside or not config.profiler.ranks):
        rule = f"must be some of the ranks 0 to {world_size - 1}"
        raise ConfigError("profiler.ranks", config.profiler.ranks, rule, "Use [0]")
    for schedule in (config.schedule, config.discriminator_schedule):
        if schedule.warmup_steps > config.run.steps and (schedule is config.schedule or trains_discriminator(config)):
            rule = f"must not exceed run.steps={config.run.steps}"
            raise ConfigError(f"{schedule.key}.warmup_steps", schedule.warmup_steps, rule, "Lower it")
    _check_roles(config)
    if isinstance(config.objective, SafetyConfig) and config.parallel.cp > 1:
        rule = "gives each rank a share of the conditioning's gradient, and stage=safety attacks along the whole of it"
        raise ConfigError("parallel.cp", config.parallel.cp, rule, "Use parallel.cp=1")
    _check_keeping(config)


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The same files and folders, named so that they are found from any working directory.

    What a run records of itself must not depend on where it was started. run.dir stays as given: a run folder may move.
    """
    places: list[tuple[Any, str]] = [(config.encoders, "path"), (config.checkpoint, "folder")]
    places += [(config.weights, role) for role in ("student", *ROLES)]
    places += [(config.data, "train"), (config.data, "validation"), (config.evaluation, "benchmark")]
    places += [(config.evaluation.metrics, name) for name in METRIC_FILES]
    places += [(config.data.storage, "cache_dir"), *((source, "path") for source in config.data.sources.values())]
    if isinstance(config.objective, SafetyConfig):
        places.append((config.objective, "concepts"))
    if config.run.resume not in ("auto", "none"):
        places.append((config.run, "resume"))
    for owner, name in places:
        path = getattr(owner, name)
        if path and not is_url(path):
            setattr(owner, name, str(Path(path).absolute()))
    return config


def check(config: TrainConfig, world_size: int) -> None:
    """All relations, and everything outside that a run needs. Raises ConfigError by dotted key."""
    check_relations(config, world_size)
    side = config.encoders.pixels_per_token()
    own_pixels = {f"data.sources.{name}.max_pixels": s.max_pixels for name, s in config.data.sources.items()}
    for key, pixels in {"data.max_pixels": config.data.max_pixels, **own_pixels}.items():
        if pixels is not None and pixels < side**2:
            rule = f"must hold at least one token of {side} x {side} pixels"
            raise ConfigError(key, pixels, rule, "1048576 is one megapixel")
    for key, size in config.encoders.token_sizes().items():
        if getattr(config.model, key) != size:
            rule = f"must be what the encoders in {config.encoders.path} give, {size}"
            raise ConfigError(f"model.{key}", getattr(config.model, key), rule, "Pick the model that fits them")
    if config.weights.guidance_in is not GuidanceIn.require and config.weights.student is None:
        rule = "is about weights that are read, and weights.student is not given"
        raise ConfigError(
            "weights.guidance_in", config.weights.guidance_in.value, rule, "Give weights.student, or use require"
        )
    for role in config.objective.frozen:
        if (given := getattr(config.weights, role)) is None:
            rule = f"must be given: this stage learns from a frozen {role}"
            raise ConfigError(f"weights.{role}", None, rule, "Give a safetensors file or folder")
        if not Path(given).exists():
            raise ConfigError(f"weights.{role}", given, "must exist", "Give a safetensors file or folder")
    if config.objective.frozen and config.weights.student is None:
        rule = "must be given: this stage goes on from weights that exist"
        raise ConfigError("weights.student", None, rule, "Give a safetensors file or folder")
    if isinstance(config.objective, SafetyConfig):
        read_concepts(config.objective.concepts)
    if config.lora.rank and config.weights.student is None:
        rule = "must be given, because lora.rank > 0 adapts weights that exist"
        raise ConfigError("weights.student", None, rule, "Give a safetensors file, or set lora.rank=0")
    folders = {f"data.sources.{name}.path": source.path for name, source in config.data.sources.items()}
    folders = folders or {"data.train": config.data.train}
    if config.data.validation is not None:
        folders["data.validation"] = config.data.validation
    for key, folder in folders.items():
        if not (folder and (is_url(folder) or Path(folder).is_dir())):
            raise ConfigError(key, folder, "must be a folder of indexed shards", "See docs/data_format.md")


def check_weights(config: TrainConfig) -> None:
    """What a run begins with. A run that goes on from its own checkpoint may have outlived these files."""
    if config.weights.student is not None and not Path(config.weights.student).exists():
        raise ConfigError("weights.student", config.weights.student, "must exist", "Give a safetensors file or folder")


def _check_guidance_in(config: TrainConfig) -> None:
    choice, embeds = config.weights.guidance_in, config.model.guidance_embed
    if (choice is GuidanceIn.add and not embeds) or (choice is GuidanceIn.drop and embeds):
        rule = f"contradicts model.guidance_embed={str(embeds).lower()}"
        hint = f"Set model.guidance_embed={str(not embeds).lower()}, or weights.guidance_in=require"
        raise ConfigError("weights.guidance_in", choice.value, rule, hint)


def _check_roles(config: TrainConfig) -> None:
    """Options of roles that the stage has not."""
    for role in ROLES:
        if role not in config.objective.frozen and (given := getattr(config.weights, role)) is not None:
            raise ConfigError(f"weights.{role}", given, f"has no effect: this stage has no {role}", "Leave it out")
    if not config.objective.frozen and config.weights.frozen_dtype is not WeightsConfig().frozen_dtype:
        given = config.weights.frozen_dtype.value
        raise ConfigError("weights.frozen_dtype", given, "has no effect: this stage has no frozen role", "Leave it out")
    match config.objective:
        case GuidanceDistillationConfig() if not config.model.guidance_embed:
            rule = "but guidance_distillation trains a student that is told its guidance"
            raise ConfigError("model.guidance_embed", False, rule, "Set it true, with weights.guidance_in=add")
        case LaddConfig():
            config.objective.discriminator.blocks_of(config.model)
            if config.parallel.cp > 1:
                rule = "gives each rank some tokens of a picture, and the heads of ladd read whole pictures"
                raise ConfigError("parallel.cp", config.parallel.cp, rule, "Use cp=1")
            if config.objective.student_guidance != UNGUIDED and not config.model.guidance_embed:
                rule = "has no effect: model.guidance_embed is false"
                raise ConfigError("objective.student_guidance", config.objective.student_guidance, rule, "Leave it out")
            if config.checkpoint.keep_best and config.checkpoint.best_by.startswith("validation/loss"):
                rule = "is the velocity's, which says nothing about a student of few steps"
                hint = "Use a number of evaluation.benchmark, or keep_best=0 and judge pictures"
                raise ConfigError("checkpoint.best_by", config.checkpoint.best_by, rule, hint)
    if isinstance(config.objective, GuidanceDistillationConfig | LaddConfig):
        _check_prompts_stay(config)
    heads = config.discriminator_optimizer
    if heads.stochastic_rounding:
        rule = "is of weights kept in bfloat16, and a discriminator's are always float32"
        raise ConfigError(f"{heads.key}.stochastic_rounding", True, rule, "Leave it out")
    if not trains_discriminator(config):
        for options in (config.discriminator_optimizer, config.discriminator_schedule):
            given, defaults = _plain(asdict(options)), _plain(asdict(type(options)()))
            for name in (name for name in given if given[name] != defaults[name]):
                rule = "has no effect: this stage trains no discriminator"
                raise ConfigError(f"{options.key}.{name}", given[name], rule, "Leave it out")


def _check_prompts_stay(config: TrainConfig) -> None:
    """Guidance needs the empty prompt, and a student of distillation is not guided. A source may say otherwise."""
    given = {"data": config.data.prompt_dropout}
    given |= {f"data.sources.{name}": source.prompt_dropout for name, source in config.data.sources.items()}
    for key, share in given.items():
        if share:
            rule = "must be 0: what this stage trains is not guided away from the empty prompt"
            raise ConfigError(f"{key}.prompt_dropout", share, rule, "Set it to 0")


def trains_discriminator(config: TrainConfig) -> bool:
    return "discriminator" in config.objective.trained


def _check_lora(config: TrainConfig) -> None:
    if config.lora.rank == 0:
        if config.lora != LoraConfig():
            raise ConfigError("lora.rank", 0, "trains all weights, so other options of lora have no effect", "Set it")
        return
    lora_targets(config.lora, config.model)
    if config.parallel.master_dtype is not Precision.float32:
        rule = "is of trained weights, and adapters are always float32"
        hint = "Leave it; lora.base_dtype says how the frozen weights are kept"
        raise ConfigError("parallel.master_dtype", config.parallel.master_dtype.value, rule, hint)
    if config.optimizer.name is OptimizerName.muon:
        rule = "orthogonalises the updates of whole matrices, and adapters are factors of them"
        raise ConfigError("optimizer.name", "muon", rule, "Use adamw with lora.rank > 0")
    if config.weights.guidance_in is GuidanceIn.add:
        rule = "adds weights that say nothing until they train, and lora.rank > 0 freezes them"
        raise ConfigError("weights.guidance_in", "add", rule, "Use model.guidance_embed=false and require")
    if config.parallel.float8 is not Float8.none:
        rule = "is for weights that train, and lora.rank > 0 freezes them"
        hint = "Use parallel.float8=none; lora.base_dtype=float8 keeps frozen weights in a byte each"
        raise ConfigError("parallel.float8", config.parallel.float8.value, rule, hint)


def _check_keeping(config: TrainConfig) -> None:
    save_every, validate_every = config.run.save_every_steps, config.run.validate_every_steps
    if config.checkpoint.keep_every_steps % save_every:
        rule = f"must be a multiple of run.save_every_steps={save_every}, or none of these steps is saved"
        raise ConfigError("checkpoint.keep_every_steps", config.checkpoint.keep_every_steps, rule, "Round it")
    if config.checkpoint.keep_best and (config.data.validation is None or save_every % validate_every):
        rule = "needs data.validation, and run.save_every_steps to be a multiple of run.validate_every_steps"
        raise ConfigError("checkpoint.keep_best", config.checkpoint.keep_best, rule, "Validate at each save")
    if config.evaluation.benchmark is not None and config.data.validation is None:
        rule = "is made when a run validates, and data.validation is not given"
        raise ConfigError("evaluation.benchmark", config.evaluation.benchmark, rule, "Give data.validation")
    best_by = config.checkpoint.best_by
    if not re.fullmatch(r"validation/loss(_t[0-7])?|benchmark/.+", best_by):
        rule = "is no number of validation"
        raise ConfigError("checkpoint.best_by", best_by, rule, "validation/loss, or benchmark/target_mae for example")
    if best_by.startswith("benchmark/") and config.evaluation.benchmark is None:
        rule = "is measured on evaluation.benchmark, which is not given"
        raise ConfigError("checkpoint.best_by", best_by, rule, "Give it, or use validation/loss")


def _check_master_dtype(config: TrainConfig) -> None:
    kept, rounded = config.parallel.master_dtype, config.optimizer.stochastic_rounding
    if kept is Precision.bfloat16 and not rounded:
        rule = "rounds to nearest, which loses updates below 1/512 of their weight"
        hint = "Set optimizer.stochastic_rounding=true, or keep float32"
        raise ConfigError("parallel.master_dtype", kept.value, rule, hint)
    if rounded and kept is not Precision.bfloat16:
        rule = f"is of weights kept in bfloat16, and parallel.master_dtype={kept.value}"
        raise ConfigError("optimizer.stochastic_rounding", True, rule, "Set parallel.master_dtype=bfloat16")
