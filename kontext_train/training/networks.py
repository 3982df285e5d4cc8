"""The networks of a run beside its student, in the one order of construction: meta, parallelize, to_empty, filled."""

from dataclasses import replace

import torch
from torch.distributed.fsdp import register_fsdp_forward_method

from kontext_train.distributed.config import Float8, ParallelConfig, Precision, Reshard
from kontext_train.distributed.context_parallel import split_sequence, ulysses
from kontext_train.distributed.parallelize import parallelize, shard
from kontext_train.distributed.setup import World
from kontext_train.errors import ConfigError
from kontext_train.models.attention import AttentionFunction
from kontext_train.models.config import DiscriminatorConfig, FluxConfig
from kontext_train.models.discriminator import Discriminator
from kontext_train.models.flux import Flux
from kontext_train.models.weights import embeds_guidance, initialise, load


def frozen_network(
    role: str,
    path: str,
    model: FluxConfig,
    parallel: ParallelConfig,
    dtype: Precision,
    attention: AttentionFunction,
    world: World,
    static_tokens: int | None,
) -> Flux:
    """The network of a role that never trains, sharded as the student is. Gradients pass through it to its inputs.

    path: as for `models.weights.load`. model: the student's shape; whether this network embeds guidance, its file
    says. dtype: in which it is kept. Raises ConfigError naming weights.ROLE if the file is of another shape.
    """
    try:
        model = replace(model, guidance_embed=embeds_guidance(path))
        with torch.device("meta"):
            network = Flux(model, attention if world.cp_group is None else ulysses(attention, world.cp_group))
        network.requires_grad_(False).to(getattr(torch, dtype.value))
        if world.cp_group is not None:
            split_sequence(network, world.cp_group)
        parallelize(network, world.mesh, _as_frozen(parallel), static_tokens)
        register_fsdp_forward_method(network, "features")
        network.to_empty(device="cpu" if parallel.cpu_offload else world.device)
        load(network, path)
    except ValueError as error:
        rule = "must hold a network of the student's shape"
        raise ConfigError(f"weights.{role}", path, rule, str(error)) from error
    return network


def new_discriminator(
    config: DiscriminatorConfig, model: FluxConfig, parallel: ParallelConfig, world: World, seed: int
) -> Discriminator:
    """Heads on the blocks of a network of the shape `model`, sharded like it.

    They compute in float32, whatever the network does: a gradient penalty is the difference of two verdicts on features
    a hundredth apart, which bfloat16 rounds away. They are a hundredth of a step's cost.
    """
    with torch.device("meta"):
        heads = len(config.blocks_of(model))
        discriminator = Discriminator(heads, model.hidden_size, config.channels, model.vec_in_dim)
    shard(discriminator, world.mesh, parallel)
    discriminator.to_empty(device="cpu" if parallel.cpu_offload else world.device)
    initialise(discriminator, model.init, seed)
    return discriminator


def _as_frozen(parallel: ParallelConfig) -> ParallelConfig:
    """Nothing of it stays gathered between its many forward passes, and no weight of it has a second form."""
    return replace(
        parallel,
        master_dtype=Precision.float32,
        float8=Float8.none,
        float8_emulate=False,
        reshard_after_forward=Reshard.always,
    )
