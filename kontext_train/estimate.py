"""kontext-estimate: what a training config needs and how fast it can be on a cluster, without any GPU."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from kontext_train.config import TrainConfig, check_relations, register_schemas, typed
from kontext_train.errors import ConfigError
from kontext_train.estimation.config import GPU, Assumptions, ClusterConfig, Sample
from kontext_train.overrides import check_overrides


@dataclass(slots=True)
class EstimateConfig(TrainConfig):
    """All of a run's options, and the cluster that it would run on."""

    gpu: GPU = GPU.h100
    world: int = 8  # GPUs in all
    gpus_per_node: int = 8
    sample: Sample = field(default_factory=Sample)  # what packs hold, where data.train names no shards
    assume: Assumptions = field(default_factory=Assumptions)
    text_stored: bool = False  # data.train holds encoded text (docs/encoding.md), so that no text encoder is loaded
    simulate: bool = False  # also run the whole step on fake tensors: a minute at 12B, more on a thousand GPUs


register_schemas()
ConfigStore.instance().store(name="estimate_schema", node=EstimateConfig)


def main() -> None:
    with refusals_told():
        check_overrides("estimate", sys.argv[1:])
    composed_by_hydra()


@hydra.main(version_base="1.3", config_path="conf", config_name="estimate")
def composed_by_hydra(composed: DictConfig) -> None:
    with refusals_told():
        config = typed(composed)
        assert isinstance(config, EstimateConfig)
        print(estimated(config))


@contextmanager
def refusals_told() -> Iterator[None]:
    """As one line, and status 2."""
    try:
        yield
    except ConfigError as error:
        print(f"kontext-estimate: {error}", file=sys.stderr)
        sys.exit(2)


def estimated(config: EstimateConfig) -> str:
    """The printout."""
    cluster = ClusterConfig(config.gpu, config.world, config.gpus_per_node, config.sample, config.assume)
    check_relations(config, config.world)
    replicate, shard, _ = config.parallel.mesh_shape(config.world)

    from kontext_train.distributed.config import Checkpointing
    from kontext_train.estimation.estimate import Setup, estimate, traced, with_checkpointing
    from kontext_train.estimation.packs import token_mix
    from kontext_train.estimation.report import report
    from kontext_train.estimation.simulation import fused_attention, simulate_step

    packs_per_step = replicate * shard * config.run.microbatches
    mix = token_mix(config.data, config.encoders, config.model, config.sample, packs_per_step, config.run.seed)
    setup = Setup(
        config.model,
        config.encoders,
        config.optimizer,
        config.parallel,
        ema=config.ema.half_life_images > 0,
        microbatches=config.run.microbatches,
        mix=mix,
        lora=config.lora,
        text_stored=config.text_stored,
        stage=config.objective,
        frozen_dtype=config.weights.frozen_dtype,
        heads=config.discriminator_optimizer,
    )
    choices = {policy: with_checkpointing(setup, policy) for policy in Checkpointing}
    estimates = {policy: estimate(choice, cluster, traced(choice)) for policy, choice in choices.items()}
    simulated = None
    if config.simulate and config.objective.frozen:
        raise ConfigError("simulate", True, "is of the student alone, and this stage has more", "Use simulate=false")
    if config.simulate and config.lora.rank:
        raise ConfigError("simulate", True, "is of runs that train all weights", "Use simulate=false, or lora.rank=0")
    if config.simulate:
        simulated = simulate_step(
            config.model, config.optimizer, config.parallel, mix.largest, config.world, fused_attention, mix.pad_to
        )
    return report(setup, cluster, estimates, simulated)


if __name__ == "__main__":
    main()
