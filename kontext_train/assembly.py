"""The parts of a run, each made of its options. `train.py` says which there are and in what order they come."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from kontext_train.config import TrainConfig, as_yaml, check_weights, defaults_of, plain
from kontext_train.data.config import Crop
from kontext_train.data.encode import Encoders, encode_empty_prompt, load_encoders
from kontext_train.data.encoded import check_encoding
from kontext_train.data.loader import PackReader, rank_packs
from kontext_train.data.plan import Planner, plan_digest
from kontext_train.data.sources import Mixture, Source, check_edits_only, open_sources, open_validation
from kontext_train.data.transforms import Transform
from kontext_train.distributed.config import Reshard
from kontext_train.distributed.context_parallel import split_sequence, ulysses
from kontext_train.distributed.parallelize import HasBlocks, parallelize, shard
from kontext_train.distributed.setup import World
from kontext_train.distributed.watchdog import Watch
from kontext_train.errors import ConfigError
from kontext_train.evaluation.in_training import BenchmarkSlice
from kontext_train.models.attention import AttentionFunction, usable_backend
from kontext_train.models.config import AttentionBackend
from kontext_train.models.flops import forward_flops
from kontext_train.models.flux import Flux
from kontext_train.models.lora import adapt, base_digest
from kontext_train.models.weights import initialise, initialise_adapters, load
from kontext_train.objectives.base import Objective
from kontext_train.objectives.build import build_objective
from kontext_train.objectives.concept_list import concepts_digest, read_concepts
from kontext_train.objectives.concepts import encode_concepts
from kontext_train.objectives.config import LaddConfig, SafetyConfig
from kontext_train.trainer import Trainer
from kontext_train.training import checkpoint
from kontext_train.training.bad_samples import BadSamples
from kontext_train.training.changes import check_resumable
from kontext_train.training.checkpoint_files import put
from kontext_train.training.checkpoint_saver import Saver
from kontext_train.training.config import OptimizerConfig, ScheduleConfig
from kontext_train.training.ema import EMA
from kontext_train.training.health import Health
from kontext_train.training.heartbeat import Heartbeat
from kontext_train.training.networks import frozen_network, new_discriminator
from kontext_train.training.optimizer import PhaseOptimizer
from kontext_train.training.profiling import Profiler
from kontext_train.training.run_folder import record_start
from kontext_train.training.run_lock import cannot_be_written
from kontext_train.training.stability import Stability
from kontext_train.training.stragglers import Stragglers
from kontext_train.training.validation import Validation

# -- before any process group starts -----------------------------------------------------------------------------


def training_data(config: TrainConfig) -> tuple[Planner, PackReader]:
    """Which samples there are, in which packs they come, and who reads these. ConfigError by key."""
    sources = open_sources(config.data, config.encoders.pixels_per_token(), config.run.seed)
    if config.objective.edits_only:
        check_edits_only(sources)
    return _planned(config, sources, holes=config.data.max_bad_fraction > 0)


def held_out_data(config: TrainConfig) -> tuple[Planner, PackReader] | None:
    """The same of data.validation, where it is given."""
    if not config.data.validation:
        return None
    source = open_validation(config.data, config.data.validation, config.encoders.pixels_per_token())
    if config.validation.samples > len(source.index):
        rule = f"but data.validation holds {len(source.index)} samples"
        raise ConfigError("validation.samples", config.validation.samples, rule, "Lower it")
    return _planned(config, [source], holes=False)


def _planned(config: TrainConfig, sources: list[Source], *, holes: bool) -> tuple[Planner, PackReader]:
    for source in sources:
        check_encoding(source.key, source.index, config.encoders, source.transform)
    mixture = Mixture(sources, config.encoders.t5_tokens)
    mixture.check_budget(config.data.tokens_per_pack)
    planner = Planner(mixture, config.data, config.run.seed, forward_flops(config.model).of_tokens)
    pad_to = config.data.tokens_per_pack if config.data.pad_packs else None
    return planner, PackReader(mixture, holes=holes, pad_to=pad_to)


def record_of(config: TrainConfig, planner: Planner) -> dict[str, Any]:
    """What every checkpoint notes besides step and position: how the run came about."""
    record = {"config": plain(config), "plan": plan_digest(planner.mixture, config.data, config.run.seed)}
    if config.lora.rank and config.weights.student is not None:
        record["base"] = base_digest(config.weights.student)  # which checkpoints do not hold
    if config.objective.frozen:  # nor do they hold these
        paths = {role: getattr(config.weights, role) for role in config.objective.frozen}
        record["frozen"] = {role: base_digest(path, f"weights.{role}") for role, path in paths.items()}
    if isinstance(config.objective, SafetyConfig):  # nor the list
        record["concepts"] = concepts_digest(read_concepts(config.objective.concepts))
    return record


def attention_backend(config: TrainConfig) -> AttentionBackend:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, config.parallel.param_dtype.value)
    return usable_backend(config.model.attention, device, dtype, config.model.head_dim)


def check_beginning(config: TrainConfig, checkpoints: Path, record: dict[str, Any]) -> None:
    """ConfigError if the run cannot go on from its newest checkpoint, or has nothing to begin with."""
    newest = checkpoint.newest_readable(checkpoint.find_resume(config.run.resume, checkpoints))
    if newest is not None:
        check_resumable(newest, checkpoint.read_record(newest), record, defaults_of(config))
    else:
        check_weights(config)
    if config.health.memory_history and not torch.cuda.is_available():
        rule = "is of a GPU's allocator, and there is no GPU"
        raise ConfigError("health.memory_history", config.health.memory_history, rule, "Leave it 0")


# -- by all ranks ------------------------------------------------------------------------------------------------


def checkpoint_to_go_on_from(config: TrainConfig, checkpoints: Path, record: dict[str, Any]) -> Path | None:
    """The newest that is whole, the same on every rank."""
    # Found again: the process that ran here before may have finished its last save meanwhile.
    resume = checkpoint.newest_whole(config.run.resume, checkpoint.find_resume(config.run.resume, checkpoints))
    if resume is not None:
        check_resumable(resume, checkpoint.read_record(resume), record, defaults_of(config))
    return resume


def describe_start(config: TrainConfig, world: World, backend: AttentionBackend, resume: Path | None) -> None:
    """What run.dir says of this start. Raises ConfigError if it cannot."""
    folder = Path(config.run.dir)
    try:
        if world.is_main:
            put(folder / "config.yaml", as_yaml(config).encode())
            print(f"kontext-train: attention by {backend.value}", file=sys.stderr)
        record_start(folder, world, as_yaml(config), resume)
    except OSError as error:
        raise cannot_be_written(config.run.dir, error) from error


def frozen_encoders(config: TrainConfig, world: World, sources: Sequence[Source]) -> Encoders:
    """sources: all that the run reads, held-out ones too."""
    draws = config.validation.pictures > 0 or config.evaluation.benchmark is not None
    # Text encoders have nothing to do where T5's tokens are stored, unless pictures are drawn.
    all_stored = all(source.index.encoding is not None and source.index.encoding["t5"] for source in sources)
    has_prompts = isinstance(config.objective, SafetyConfig)
    needs_text = not all_stored or (config.data.validation is not None and draws) or has_prompts
    encoders = load_encoders(config.encoders, world.device, text=needs_text)
    if encoders.text is not None and config.parallel.shard_encoders and world.mesh["dp_shard"].size() > 1:
        shard(encoders.text, world.mesh, replace(config.parallel, reshard_after_forward=Reshard.always))
    return encoders


def student_network(config: TrainConfig, world: World, attention: AttentionFunction, resume: Path | None) -> Flux:
    """resume: a checkpoint that fills it later, but for the base of adapters."""
    with torch.device("meta"):
        student = Flux(config.model, attention if world.cp_group is None else ulysses(attention, world.cp_group))
    adapt(student, config.lora)
    if world.cp_group is not None:
        split_sequence(student, world.cp_group)
    parallelize(student, world.mesh, config.parallel, _static_tokens(config, world))
    student.to_empty(device="cpu" if config.parallel.cpu_offload else world.device)
    if resume is not None and config.lora.rank == 0:
        pass  # trainer.load fills every parameter, or raises
    elif config.weights.student is not None:
        try:
            load(student, config.weights.student, config.weights.guidance_in, config.run.seed)
        except ValueError as error:
            rule = "must hold exactly this model's parameters"
            raise ConfigError("weights.student", config.weights.student, rule, str(error)) from error
    else:
        initialise(student, config.model.init, config.run.seed)
    initialise_adapters(student, config.run.seed)
    return student


def other_networks(config: TrainConfig, world: World, attention: AttentionFunction) -> dict[str, nn.Module]:
    """Those of the stage beside its student, by role."""
    model, parallel, dtype = config.model, config.parallel, config.weights.frozen_dtype
    tokens = _static_tokens(config, world)
    networks: dict[str, nn.Module] = {}
    for role in config.objective.frozen:
        path = getattr(config.weights, role)
        networks[role] = frozen_network(role, path, model, parallel, dtype, attention, world, tokens)
    if isinstance(config.objective, LaddConfig):
        heads = config.objective.discriminator
        networks["discriminator"] = new_discriminator(heads, model, parallel, world, config.run.seed)
    return networks


def _static_tokens(config: TrainConfig, world: World) -> int | None:
    return config.data.tokens_per_pack // world.cp if config.data.pad_packs else None


def stage(
    config: TrainConfig, networks: Mapping[str, nn.Module], encoders: Encoders, reader: PackReader, world: World
) -> Objective:
    """networks: by role. reader: of the training data, which may have the empty prompt stored."""
    empty_prompt = concepts = None
    if config.objective.needs_empty_prompt:
        empty_prompt = encode_empty_prompt(encoders, reader.readers[0], world.device)
    if isinstance(config.objective, SafetyConfig):
        transform = Transform.of(config.data, config.encoders.pixels_per_token(), config.run.seed)
        concepts = encode_concepts(read_concepts(config.objective.concepts), encoders, transform, world.device)
    return build_objective(config.objective, networks, config.model, config.flow, empty_prompt, concepts)


def new_trainer(
    config: TrainConfig,
    world: World,
    watch: Watch,
    beats: Heartbeat,
    networks: Iterable[nn.Module],
    objective: Objective,
    encoders: Encoders,
    saver: Saver,
    record: dict[str, Any],
) -> Trainer:
    """networks: all, frozen ones too. record: `record_of`."""
    folder, student = Path(config.run.dir), objective.modules["student"]
    turns: dict[str, tuple[OptimizerConfig, ScheduleConfig]] = {
        "student": (config.optimizer, config.schedule),
        "discriminator": (config.discriminator_optimizer, config.discriminator_schedule),
    }
    return Trainer(
        config.run,
        {phase: turns[phase][1] for phase in objective.phases},
        world,
        watch,
        objective,
        {p: PhaseOptimizer(objective.modules[p], turns[p][0], config.run.seed) for p in objective.phases},
        EMA(student, config.ema.half_life_images) if config.ema.half_life_images else None,
        encoders,
        forward_flops(config.model),
        BadSamples(config.data.max_bad_fraction, folder, world.is_main),
        Health(
            Stability(config.health, folder, world),
            Stragglers(config.health.straggler_factor, world, [encoders, *cast(Iterable[HasBlocks], networks)]),
            beats,
            Profiler(config.profiler, folder, world.rank),
        ),
        saver,
        record,
    )


def held_out_validation(
    config: TrainConfig, planner: Planner, reader: PackReader, encoders: Encoders, world: World
) -> Validation:
    """planner, reader: of `held_out_data`."""
    fixed = rank_packs(planner.fixed(config.validation.samples, world.dp_size), world.dp_rank, world.dp_size)
    pictured = planner.fixed(config.validation.pictures, 1) if config.validation.pictures else []
    benchmark = benchmark_slice(config, encoders, world) if config.evaluation.benchmark is not None else None
    return Validation(
        [reader[pack] for pack in fixed],
        [reader[pack] for (pack,) in pictured],
        encoders,
        config.validation,
        config.flow,
        pixels_per_token=config.encoders.pixels_per_token(),
        guidance=config.validation.guidance if config.model.guidance_embed else None,
        device=world.device,
        holders=world.cp,
        benchmark=benchmark,
    )


def benchmark_slice(config: TrainConfig, encoders: Encoders, world: World) -> BenchmarkSlice:
    transform = Transform.of(config.data, config.encoders.pixels_per_token(), seed=0)
    return BenchmarkSlice(
        config.evaluation,
        encoders,
        config.validation.sampler,
        config.flow,
        replace(transform, crop=Crop.center),
        best_by=config.checkpoint.best_by,
        guidance_embed=config.model.guidance_embed,
        world=world,
        run_dir=Path(config.run.dir),
    )
