"""kontext-train: one run from configuration to last checkpoint. Read it from top to bottom."""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

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
    check,
    plain,
    register_schemas,
    typed,
    with_absolute_paths,
)
from kontext_train.distributed.config import world_size_from_environment
from kontext_train.errors import ConfigError
from kontext_train.overrides import check_overrides, refusal

REQUEUE = 75  # exit status of a run that a signal stopped and that can be resumed (sysexits' EX_TEMPFAIL)
INTERRUPTED = "KONTEXT_TRAIN_INTERRUPTED"  # names a file that says the same where torchrun would say 1

register_schemas()


def main() -> None:
    """`kontext-train --resume-run DIR [key=value ...]`, or everything else that Hydra understands."""
    if any(argument.partition("=")[0] == "--resume-run" for argument in sys.argv[1:]):
        start(lambda: of_run(sys.argv[1:]))
    else:
        try:
            check_overrides("train", sys.argv[1:])
        except ConfigError as error:
            refuse(error)
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
        refuse(error)


def refuse(error: ConfigError) -> NoReturn:
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
        raise refusal(error, overrides) from error
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
    """The run. Everything heavy is imported here, once the configuration is known to be sound."""
    import torch

    from kontext_train import assembly
    from kontext_train.data.loader import train_batches
    from kontext_train.distributed.float8 import check_hardware
    from kontext_train.distributed.memory import record_history
    from kontext_train.distributed.setup import process_group
    from kontext_train.distributed.watchdog import watchdog
    from kontext_train.models.attention import attention_function
    from kontext_train.trainer import Interrupted
    from kontext_train.training.checkpoint import checkpoints_folder
    from kontext_train.training.checkpoint_saver import Saver
    from kontext_train.training.heartbeat import heartbeat
    from kontext_train.training.metrics import RunLog
    from kontext_train.training.run_lock import run_lock
    from kontext_train.training.signals import stop_on_signals

    # What can be refused is refused before any process group starts and before weights are read.
    planner, reader = assembly.training_data(config)
    held_out = assembly.held_out_data(config)
    record = assembly.record_of(config, planner)
    check_hardware(config.parallel)
    backend = assembly.attention_backend(config)
    attention = attention_function(backend)
    folder = Path(config.run.dir)
    checkpoints = checkpoints_folder(folder, config.checkpoint.folder)
    assembly.check_beginning(config, checkpoints, record)

    with (
        process_group(config.parallel) as world,
        run_lock(config.run.dir, config.parallel.timeout_s),
        stop_on_signals() as stop,  # also while it loads: it then stops after one step
        watchdog(world, config.parallel) as watch,
        heartbeat(folder / "heartbeat.json" if world.is_main else None) as beats,
    ):
        torch.manual_seed(config.run.seed)  # nothing draws from it; were it to, runs would still repeat
        resume = assembly.checkpoint_to_go_on_from(config, checkpoints, record)
        assembly.describe_start(config, world, backend, resume)
        if config.health.memory_history:
            record_history(config.health.memory_history)
            watch.snapshot = folder / "memory" / f"rank_{world.rank:04d}.pickle"

        # Models, each in one order: meta -> parallelize -> to_empty -> fill every parameter.
        sources = [*planner.mixture.sources, *(held_out[0].mixture.sources if held_out else ())]
        encoders = assembly.frozen_encoders(config, world, sources)
        student = assembly.student_network(config, world, attention, resume)
        networks = {"student": student, **assembly.other_networks(config, world, attention)}
        objective = assembly.stage(config, networks, encoders, reader, world)

        # Training.
        saver = Saver(checkpoints, config.checkpoint)
        trainer = assembly.new_trainer(
            config, world, watch, beats, networks.values(), objective, encoders, saver, record
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
        validation = assembly.held_out_validation(config, *held_out, encoders, world) if held_out else None
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
