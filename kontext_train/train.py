"""kontext-train: one run from configuration to last checkpoint. Read it from top to bottom."""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from kontext_train.config import (
    TrainConfig,
    as_yaml,
    check,
    check_weights,
    plain,
    register_schemas,
    typed,
    with_absolute_paths,
)
from kontext_train.distributed.config import Reshard, world_size_from_environment
from kontext_train.errors import ConfigError

REQUEUE = 75  # exit status of a run that a signal stopped and that can be resumed (sysexits' EX_TEMPFAIL)
INTERRUPTED = "KONTEXT_TRAIN_INTERRUPTED"  # names a file that says the same where torchrun would say 1

register_schemas()


def main() -> None:
    """`kontext-train --resume-run DIR [key=value ...]`, or everything else that Hydra understands."""
    if any(argument.partition("=")[0] == "--resume-run" for argument in sys.argv[1:]):
        start(lambda: of_run(sys.argv[1:]))
    else:
        composed_by_hydra()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def composed_by_hydra(composed: DictConfig) -> None:
    def configured() -> TrainConfig:
        config = typed(composed)
        config.run.dir = str(Path(config.run.dir, sweep_member(HydraConfig.get())))
        if HydraConfig.get().mode == RunMode.MULTIRUN and config.checkpoint.folder is not None:
            rule = "would be one folder for all members of a sweep, which would resume and remove each other's"
            folder, hint = config.checkpoint.folder, "Leave it: each member has its run.dir"
            raise ConfigError("checkpoint.folder", folder, rule, hint)
        return config

    start(configured)


def start(configured: Callable[[], TrainConfig]) -> None:
    if told_by := os.environ.get(INTERRUPTED):
        Path(told_by).unlink(missing_ok=True)  # of ranks before these, which torchrun has started again
    try:
        config = with_absolute_paths(configured())
        check(config, world_size_from_environment())
        train(config)
    except ConfigError as error:
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise  # Hydra goes on with the other members, and fails at the end
        print(f"kontext-train: {error}", file=sys.stderr)
        sys.exit(2)


def of_run(arguments: Sequence[str]) -> TrainConfig:
    """The configuration of the run folder that --resume-run names; the run goes on there. Others are key=value."""
    parser = ArgumentParser("kontext-train", usage="kontext-train --resume-run DIR [key=value ...]", allow_abbrev=False)
    parser.add_argument("--resume-run", type=Path, required=True)
    given, overrides = parser.parse_known_args(arguments)
    folder: Path = given.resume_run
    if not (folder / "config.yaml").is_file():
        rule = "must be a folder that kontext-train wrote, with its config.yaml"
        raise ConfigError("--resume-run", str(folder), rule, "kontext-train --resume-run DIR [key=value ...]")
    # A change that was allowed stays so until something else changes: a checkpoint may still be of before.
    changes = ["run.allow_changes=[]", *overrides] if overrides else []
    try:
        with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
            config = typed(compose("config", overrides=changes))
    except HydraException as error:
        raise ConfigError("--resume-run", " ".join(arguments), str(error), "Correct it") from error
    config.run.dir = str(folder)
    if config.run.resume == "none":  # it was a new folder then
        config.run.resume = "auto"
    return config


def sweep_member(hydra_config: HydraConf) -> str:
    """Folder of one member of a sweep below run.dir, named by what it varies; "" outside of sweeps."""
    if hydra_config.mode != RunMode.MULTIRUN:
        return ""
    arguments = [a for a in sys.argv[1:] if "=" in a and not a.startswith("-")]
    return member_name(arguments, hydra_config.overrides.task, hydra_config.job.num)


def member_name(arguments: Sequence[str], task: Sequence[str], number: int) -> str:
    """Folder of a member of the sweep that `arguments` ask for; task: the member's own values.

    What run.dir says for itself, as outputs/${optimizer.lr} does, is not said again.
    """
    given = OverridesParser.create().parse_overrides(list(arguments))
    said = next((o.input_line or "" for o in given if o.key_or_group == "run.dir"), "")
    fixed = {o.key_or_group for o in given if not o.is_sweep_override()}
    varied = {o.lstrip("+").split("=")[0]: o.lstrip("+") for o in task}
    named = [v for key, v in varied.items() if key not in fixed | {"run.dir"} and f"${{{key}}}" not in said]
    name = ",".join(named).replace("/", "_")
    return name if len(name) <= 200 else f"{name[:190]}_{number}"  # file systems stop at 255


def train(config: TrainConfig) -> None:
    """Everything heavy is imported here, once the configuration is known to be sound."""
    import torch
    from torch import nn

    from kontext_train.data.config import Crop
    from kontext_train.data.encode import encode_empty_prompt, load_encoders
    from kontext_train.data.encoded import check_encoding
    from kontext_train.data.loader import PackReader, rank_packs, train_batches
    from kontext_train.data.plan import Planner, plan_digest
    from kontext_train.data.sources import Mixture, Source, check_edits_only, open_sources, open_validation
    from kontext_train.data.transforms import Transform
    from kontext_train.distributed.context_parallel import split_sequence, ulysses
    from kontext_train.distributed.float8 import check_hardware
    from kontext_train.distributed.memory import record_history
    from kontext_train.distributed.parallelize import parallelize, shard
    from kontext_train.distributed.setup import process_group
    from kontext_train.distributed.watchdog import watchdog
    from kontext_train.evaluation.in_training import BenchmarkSlice
    from kontext_train.models.attention import attention_function, usable_backend
    from kontext_train.models.flops import forward_flops
    from kontext_train.models.flux import Flux
    from kontext_train.models.lora import adapt, base_digest
    from kontext_train.models.weights import initialise, initialise_adapters, load
    from kontext_train.objectives.build import build_objective
    from kontext_train.objectives.concept_list import concepts_digest, read_concepts
    from kontext_train.objectives.concepts import encode_concepts
    from kontext_train.objectives.config import LaddConfig, SafetyConfig
    from kontext_train.trainer import Interrupted, Trainer
    from kontext_train.training import checkpoint
    from kontext_train.training.bad_samples import BadSamples
    from kontext_train.training.changes import check_resumable
    from kontext_train.training.checkpoint_files import put
    from kontext_train.training.checkpoint_saver import Saver
    from kontext_train.training.config import OptimizerConfig, ScheduleConfig
    from kontext_train.training.ema import EMA
    from kontext_train.training.health import Health
    from kontext_train.training.heartbeat import heartbeat
    from kontext_train.training.metrics import RunLog
    from kontext_train.training.networks import frozen_network, new_discriminator
    from kontext_train.training.optimizer import PhaseOptimizer
    from kontext_train.training.profiling import Profiler
    from kontext_train.training.run_folder import record_start
    from kontext_train.training.signals import stop_on_signals
    from kontext_train.training.stability import Stability
    from kontext_train.training.stragglers import Stragglers
    from kontext_train.training.validation import Validation

    # Data: which samples there are and in which packs they come, known before any process group starts.
    pixels_per_token = config.encoders.pixels_per_token()
    flops = forward_flops(config.model)

    def planned(sources: list[Source], *, holes: bool) -> tuple[Planner, PackReader]:
        for source in sources:
            check_encoding(source.key, source.index, config.encoders, source.transform)
        mixture = Mixture(sources, config.encoders.t5_tokens)
        mixture.check_budget(config.data.tokens_per_pack)
        planner = Planner(mixture, config.data, config.run.seed, flops.of_tokens)
        pad_to = config.data.tokens_per_pack if config.data.pad_packs else None
        return planner, PackReader(mixture, holes=holes, pad_to=pad_to)

    sources = open_sources(config.data, pixels_per_token, config.run.seed)
    if config.objective.edits_only:
        check_edits_only(sources)
    planner, reader = planned(sources, holes=config.data.max_bad_fraction > 0)
    held_out = None
    if config.data.validation:
        its_source = open_validation(config.data, config.data.validation, pixels_per_token)
        if config.validation.samples > len(its_source.index):
            rule = f"but data.validation holds {len(its_source.index)} samples"
            raise ConfigError("validation.samples", config.validation.samples, rule, "Lower it")
        held_out = planned([its_source], holes=False)
        sources = [*sources, its_source]
    # Text encoders have nothing to do where T5's tokens are stored, unless pictures are drawn.
    all_stored = all(source.index.encoding is not None and source.index.encoding["t5"] for source in sources)
    draws = config.validation.pictures > 0 or config.evaluation.benchmark is not None
    has_prompts = isinstance(config.objective, SafetyConfig)
    needs_text = not all_stored or (held_out is not None and draws) or has_prompts
    record = {"config": plain(config), "plan": plan_digest(planner.mixture, config.data, config.run.seed)}
    if config.lora.rank and config.weights.student is not None:
        record["base"] = base_digest(config.weights.student)  # which checkpoints do not hold
    sources_of = {role: getattr(config.weights, role) for role in config.objective.frozen}
    if sources_of:  # nor do they hold these
        record["frozen"] = {role: base_digest(path, f"weights.{role}") for role, path in sources_of.items()}
    if isinstance(config.objective, SafetyConfig):
        concept_list = read_concepts(config.objective.concepts)
        record["concepts"] = concepts_digest(concept_list)
    folder = Path(config.run.dir)
    check_hardware(config.parallel)
    backend = usable_backend(
        config.model.attention,
        "cuda" if torch.cuda.is_available() else "cpu",
        getattr(torch, config.parallel.param_dtype.value),
        config.model.head_dim,
    )
    attention = attention_function(backend)
    checkpoints = checkpoint.checkpoints_folder(folder, config.checkpoint.folder)
    candidates = checkpoint.find_resume(config.run.resume, checkpoints)
    newest = checkpoint.newest_readable(candidates)
    if newest is not None:
        check_resumable(newest, checkpoint.read_record(newest), record)
    else:
        check_weights(config)

    if config.health.memory_history and not torch.cuda.is_available():
        rule = "is of a GPU's allocator, and there is no GPU"
        raise ConfigError("health.memory_history", config.health.memory_history, rule, "Leave it 0")

    with (
        process_group(config.parallel) as world,
        stop_on_signals() as stop,  # also while it loads: it then stops after one step
        watchdog(world, config.parallel) as watch,
        heartbeat(folder / "heartbeat.json" if world.is_main else None) as beats,
    ):
        torch.manual_seed(config.run.seed)  # nothing draws from it; were it to, runs would still repeat
        resume = checkpoint.newest_whole(config.run.resume, candidates)
        if resume is not None:
            check_resumable(resume, checkpoint.read_record(resume), record)
        try:
            if world.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                put(folder / "config.yaml", as_yaml(config).encode())
                print(f"kontext-train: attention by {backend.value}", file=sys.stderr)
            record_start(folder, world, as_yaml(config), resume)
        except OSError as error:
            hint = "Give a folder on a disk with room, which all ranks share and may write to"
            raise ConfigError("run.dir", config.run.dir, f"cannot be written to: {error}", hint) from error
        if config.health.memory_history:
            record_history(config.health.memory_history)
            watch.snapshot = folder / "memory" / f"rank_{world.rank:04d}.pickle"
        saver = Saver(checkpoints, config.checkpoint)

        # Models: meta -> parallelize -> to_empty -> fill every parameter.
        encoders = load_encoders(config.encoders, world.device, text=needs_text)
        if encoders.text is not None and config.parallel.shard_encoders and world.mesh["dp_shard"].size() > 1:
            shard(encoders.text, world.mesh, replace(config.parallel, reshard_after_forward=Reshard.always))
        empty_prompt = None
        if config.objective.needs_empty_prompt:
            empty_prompt = encode_empty_prompt(encoders, reader.readers[0], world.device)
        with torch.device("meta"):
            student = Flux(config.model, attention if world.cp_group is None else ulysses(attention, world.cp_group))
        adapt(student, config.lora)
        if world.cp_group is not None:
            split_sequence(student, world.cp_group)
        static_tokens = config.data.tokens_per_pack // world.cp if config.data.pad_packs else None
        parallelize(student, world.mesh, config.parallel, static_tokens)
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
        dtype = config.weights.frozen_dtype
        frozen = {
            role: frozen_network(role, path, config.model, config.parallel, dtype, attention, world, static_tokens)
            for role, path in sources_of.items()
        }

        # Training.
        networks: dict[str, nn.Module] = {"student": student, **frozen}
        if isinstance(config.objective, LaddConfig):
            heads = config.objective.discriminator
            networks["discriminator"] = new_discriminator(heads, config.model, config.parallel, world, config.run.seed)
        concepts = None
        if isinstance(config.objective, SafetyConfig):
            transform = Transform.of(config.data, pixels_per_token, config.run.seed)
            concepts = encode_concepts(concept_list, encoders, transform, world.device)
        objective = build_objective(config.objective, networks, config.model, config.flow, empty_prompt, concepts)
        turns: dict[str, tuple[OptimizerConfig, ScheduleConfig]] = {
            "student": (config.optimizer, config.schedule),
            "discriminator": (config.discriminator_optimizer, config.discriminator_schedule),
        }
        trainer = Trainer(
            config.run,
            {phase: turns[phase][1] for phase in objective.phases},
            world,
            watch,
            objective,
            {p: PhaseOptimizer(objective.modules[p], turns[p][0], config.run.seed) for p in objective.phases},
            EMA(student, config.ema.half_life_images) if config.ema.half_life_images else None,
            encoders,
            flops,
            BadSamples(config.data.max_bad_fraction, folder, world.is_main),
            Health(
                Stability(config.health, folder, world),
                Stragglers(config.health.straggler_factor, world, objective.modules.values()),
                beats,
                Profiler(config.profiler, folder, world.rank),
            ),
            saver,
            record,
        )
        if resume is not None:
            trainer.load(resume)
            if world.is_main:
                print(f"kontext-train: going on from {resume}", file=sys.stderr)
        batches = train_batches(
            planner,
            reader,
            config.data,
            trainer.position,
            rank=world.dp_rank,
            ranks=world.dp_size,
            microbatches=config.run.microbatches,
        )
        validation = None
        if held_out is not None:
            its_planner, its_reader = held_out
            steps = its_planner.fixed(config.validation.samples, world.dp_size)
            fixed = rank_packs(steps, world.dp_rank, world.dp_size)
            pictured = its_planner.fixed(config.validation.pictures, 1) if config.validation.pictures else []
            benchmark = None
            if config.evaluation.benchmark is not None:
                benchmark = BenchmarkSlice(
                    config.evaluation,
                    encoders,
                    config.validation.sampler,
                    config.flow,
                    replace(Transform.of(config.data, pixels_per_token, seed=0), crop=Crop.center),
                    best_by=config.checkpoint.best_by,
                    guidance_embed=config.model.guidance_embed,
                    world=world,
                    run_dir=folder,
                )
            validation = Validation(
                [its_reader[pack] for pack in fixed],
                [its_reader[pack] for (pack,) in pictured],
                encoders,
                config.validation,
                config.flow,
                pixels_per_token=pixels_per_token,
                guidance=config.validation.guidance if config.model.guidance_embed else None,
                device=world.device,
                holders=world.cp,
                benchmark=benchmark,
            )
        log = RunLog(folder, config.logging, plain(config), config.run.steps, trainer.step, world.is_main)
        failed = True
        try:
            trainer.run(batches, validation, log, stop)
            failed = False
        except Interrupted as stopped:
            print(f"kontext-train: {stopped}", file=sys.stderr)
            sys.exit(interrupted_status())
        finally:
            batches.close()
            log.close(failed)


def interrupted_status() -> int:
    """REQUEUE. Where launch/torchrun.sh names a file, that tells it: torchrun would restart ranks that leave so."""
    told_by = os.environ.get(INTERRUPTED)
    if told_by is None:
        return REQUEUE
    Path(told_by).touch()
    return 0


if __name__ == "__main__":
    main()
