"""kontext-train: one run from configuration to last checkpoint. Read it from top to bottom."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from kontext_train.config import TrainConfig, check, plain, register_schemas, typed
from kontext_train.distributed.config import world_size_from_environment
from kontext_train.errors import ConfigError

REQUEUE = 75  # exit status of a run that a signal stopped and that can be resumed (sysexits' EX_TEMPFAIL)

register_schemas()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(composed: DictConfig) -> None:
    try:
        config = typed(composed)
        check(config, world_size_from_environment())
        train(config, OmegaConf.to_yaml(composed, resolve=True))
    except ConfigError as error:
        print(f"kontext-train: {error}", file=sys.stderr)
        sys.exit(2)


def train(config: TrainConfig, config_yaml: str = "") -> None:
    """Everything heavy is imported here, once the configuration is known to be sound."""
    import torch

    from kontext_train.data.encode import load_encoders
    from kontext_train.data.index import ShardIndex
    from kontext_train.data.loader import PackReader, rank_packs, train_batches
    from kontext_train.data.plan import Planner, check_budget, plan_digest, sample_sizes
    from kontext_train.data.sample import SampleReader
    from kontext_train.distributed.parallelize import parallelize
    from kontext_train.distributed.setup import process_group
    from kontext_train.models.attention import attention_function
    from kontext_train.models.flops import forward_flops
    from kontext_train.models.flux import Flux
    from kontext_train.models.weights import initialise, load
    from kontext_train.objectives.build import build_objective
    from kontext_train.trainer import Interrupted, Trainer
    from kontext_train.training.checkpoint import find_resume
    from kontext_train.training.ema import EMA
    from kontext_train.training.metrics import RunLog
    from kontext_train.training.optimizer import PhaseOptimizer
    from kontext_train.training.validation import Validation

    # Data: which samples there are and in which packs they come, known before any process group starts.
    pixels_per_token = config.encoders.pixels_per_token()
    flops = forward_flops(config.model)

    def source(key: str, folder: str) -> tuple[Planner, PackReader, str]:
        try:
            index = ShardIndex.open(folder)
        except ValueError as error:
            raise ConfigError(key, folder, "must be a folder of indexed shards", str(error)) from error
        sizes = sample_sizes(index, config.data.max_pixels, pixels_per_token, config.encoders.t5_tokens)
        check_budget(sizes, config.data)
        planner = Planner(sizes, config.data, config.run.seed, flops.by_tokens)
        reader = PackReader(
            SampleReader(index, config.data.max_pixels, pixels_per_token),
            sizes,
            pad_to=config.data.tokens_per_pack if config.data.pad_packs else None,
        )
        return planner, reader, plan_digest(index, sizes, config.data, config.run.seed)

    planner, reader, plan = source("data.train", config.data.train)
    held_out = source("data.validation", config.data.validation) if config.data.validation else None
    resume = find_resume(config.run.resume, Path(config.run.dir) / "checkpoints")

    with process_group(config.parallel) as world:
        torch.manual_seed(config.run.seed)  # nothing draws from it; were it to, runs would still repeat
        folder = Path(config.run.dir)
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(config_yaml)

        # Models: meta -> parallelize -> to_empty -> fill every parameter.
        encoders = load_encoders(config.encoders, world.device)
        with torch.device("meta"):
            student = Flux(config.model, attention_function(config.model.attention, world.device))
        parallelize(student, world.mesh, config.parallel)
        student.to_empty(device=world.device)
        if resume is not None:
            pass  # trainer.load fills every parameter, or raises
        elif config.weights.student is not None:
            load(student, config.weights.student)
        else:
            initialise(student, config.model.init, config.run.seed)

        # Training.
        objective = build_objective(config.objective, student, config.model, config.flow)
        trainer = Trainer(
            config.run,
            config.schedule,
            world,
            objective,
            {phase: PhaseOptimizer(objective.modules[phase], config.optimizer) for phase in objective.phases},
            EMA(student, config.ema.half_life_images) if config.ema.half_life_images else None,
            encoders,
            flops,
            record={"config": plain(config), "plan": plan},
        )
        if resume is not None:
            trainer.load(resume)
        batches = train_batches(
            planner, reader, config.data, trainer.position, world.rank, world.size, config.run.microbatches
        )
        validation = None
        if held_out is not None:
            its_planner, its_reader, _ = held_out
            fixed = rank_packs(its_planner.fixed(config.validation.samples, world.size), world.rank, microbatches=1)
            pictured = its_planner.fixed(config.validation.pictures, 1) if config.validation.pictures else []
            validation = Validation(
                [its_reader[pack] for pack in fixed],
                [its_reader[pack] for (pack,) in pictured],
                encoders,
                config.validation,
                config.flow,
                pixels_per_token=pixels_per_token,
                guidance=1.0 if config.model.guidance_embed else None,
                device=world.device,
            )
        log = RunLog(folder, config.logging, plain(config), config.run.steps, trainer.step, world.is_main)
        try:
            trainer.run(batches, validation, log)
        except Interrupted as stopped:
            print(f"kontext-train: {stopped}", file=sys.stderr)
            sys.exit(REQUEUE)
        finally:
            log.close()


if __name__ == "__main__":
    main()
