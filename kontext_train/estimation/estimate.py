"""From a run's options and a cluster to what one GPU will hold, receive and compute in a step."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from kontext_train.distributed.config import KEPT, Checkpointing, Float8, ParallelConfig, Precision, Reshard
from kontext_train.distributed.float8 import CAPABILITY, converted_linears
from kontext_train.errors import ConfigError
from kontext_train.estimation import encoders as released
from kontext_train.estimation.config import ClusterConfig
from kontext_train.estimation.gpus import DATA_SHEETS
from kontext_train.estimation.memory import (
    GIB,
    Group,
    Heads,
    Memory,
    Moment,
    Network,
    PartCost,
    Role,
    Sharding,
    held,
    largest,
    moments,
    moments_of_heads,
)
from kontext_train.estimation.packs import RELEASED_PIXELS_PER_TOKEN, TokenMix
from kontext_train.estimation.roofline import StepTime, Work, step_time
from kontext_train.estimation.simulation import Parts, fused_attention, trace_heads, trace_parts
from kontext_train.estimation.traffic import Collective, collectives
from kontext_train.models.attention import AttentionFunction
from kontext_train.models.config import EncoderDtype, EncodersConfig, FluxConfig, LoraConfig
from kontext_train.models.discriminator import Discriminator
from kontext_train.models.flux import Flux
from kontext_train.models.lora import adapt
from kontext_train.models.sequence import SampleShape
from kontext_train.objectives.config import FlowMatchingConfig, LaddConfig, ObjectiveConfig
from kontext_train.training.config import (
    DiscriminatorOptimizerConfig,
    MomentDtype,
    OptimizerConfig,
    OptimizerName,
)

BYTES = {Precision.float32: 4, Precision.bfloat16: 2}


@dataclass(slots=True)
class Setup:
    """The options of a run that decide what it costs, and its packs."""

    model: FluxConfig
    encoders: EncodersConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig
    ema: bool
    microbatches: int  # packs that each rank accumulates before an update
    mix: TokenMix
    lora: LoraConfig = field(default_factory=LoraConfig)
    text_stored: bool = False  # shards hold the text encoders' output: a run does not load them
    stage: ObjectiveConfig = field(default_factory=FlowMatchingConfig)
    frozen_dtype: Precision = Precision.bfloat16  # of the networks that the stage freezes
    heads: OptimizerConfig = field(default_factory=DiscriminatorOptimizerConfig)  # of a discriminator

    @property
    def beside(self) -> tuple[SampleShape, ...]:
        """What the stage puts beside the largest pack, as if it were as large as what is in that."""
        return self.mix.largest[: self.stage.samples_beside(len(self.mix.largest))]

    @property
    def share_beside(self) -> float:
        """How much that is, in packs."""
        return len(self.beside) / len(self.mix.largest)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one step on one GPU."""

    peak: Moment
    host: float  # bytes in the memory of the host, for each GPU
    checkpoint: float  # bytes that all ranks write together
    collectives: tuple[Collective, ...]
    useful_flops: float  # forward, backward and what else the stage runs; no recomputation
    computed_flops: float  # recomputation included
    recomputed_flops: float  # of the blocks, by activation checkpointing
    kept: tuple[int, int]  # bytes that a double-stream and a single-stream block keep for backward
    time: StepTime
    fits: bool
    free: float  # bytes left beside the reserve; negative if it does not fit
    samples_per_s: float  # on one GPU
    mfu: float


def estimate(setup: Setup, cluster: ClusterConfig, parts: Parts) -> Estimate:
    """parts: what `traced` gave for this setup."""
    assert (parts.heads is not None) == isinstance(setup.stage, LaddConfig), "parts of another stage"
    gpu, assume, parallel = DATA_SHEETS[cluster.gpu], cluster.assume, setup.parallel
    network = network_of(setup.model, parallel, cluster.world, parts, setup.lora)
    sharding = sharding_of(setup.model, parallel, cluster.world)
    in_run = roles(setup, network, sharding)
    everything = held(in_run, parts.batch)
    base = _without_offloaded(everything) if parallel.cpu_offload else everything
    accumulating = setup.microbatches > 1
    peak = largest([_encoding(setup, base), *moments_of_step(base, network, sharding, parts.heads, accumulating)])
    sent = (
        *collectives(network, sharding, parallel.cp, setup.microbatches, _more_gathers(setup)),
        *_optimizer_collectives(setup, network, sharding),
    )
    work = _work(setup, parts, everything)
    if parallel.float8 is not Float8.none:
        if gpu.capability < CAPABILITY[parallel.float8]:
            raise ConfigError(
                "parallel.float8", parallel.float8.value, f"has no units on an {cluster.gpu.value}", "none"
            )
        if not work.float8_flops:
            rule = f"fits no linear of this model: float8_min_features={parallel.float8_min_features} leaves none"
            raise ConfigError("parallel.float8", parallel.float8.value, rule, "Lower it, or use none")
    time = step_time(work, sent, gpu, cluster.gpus_per_node, assume, parallel.compile)
    forward = setup.mix.forward_flops * setup.microbatches / parallel.cp
    blocks = setup.model.depth + setup.model.depth_single_blocks
    student = forward * (1 + setup.share_beside)
    extra = forward * (setup.stage.extra_passes() + setup.share_beside * setup.stage.extra_passes_beside())
    useful = student + _backward(setup, student, blocks * setup.microbatches) + extra
    free = (gpu.memory_gib - assume.reserve_gib) * GIB - peak.memory.total
    return Estimate(
        peak=peak,
        host=everything.total - base.total,
        checkpoint=sum(r.elements * (r.weights + r.optimizer + r.ema) for r in in_run if r.gradients),
        collectives=sent,
        useful_flops=useful,
        computed_flops=work.matrix_flops + work.float8_flops + work.attention_flops,
        recomputed_flops=_recomputed(setup, parts) * setup.microbatches,
        kept=(parts.double.kept, parts.single.kept),
        time=time,
        fits=free >= 0,
        free=free,
        samples_per_s=setup.mix.samples * setup.microbatches / parallel.cp / time.total,
        mfu=useful / time.total / (gpu.bfloat16_tflops * 1e12),
    )


def moments_of_step(
    base: Memory, network: Network, sharding: Sharding, heads: Heads | None, accumulating: bool
) -> Iterator[Moment]:
    """All turns of a step."""
    if heads is not None:
        yield from moments_of_heads(base, network, sharding, heads, accumulating)
    yield from moments(base, network, sharding, accumulating)


def _recomputed(setup: Setup, parts: Parts) -> float:
    """What a backward pass costs beyond its own products is forward again."""
    double, single = (p.backward_flops - _backward(setup, p.forward_flops, 1) for p in (parts.double, parts.single))
    return setup.model.depth * double + setup.model.depth_single_blocks * single


def _backward(setup: Setup, forward: float, blocks: int) -> float:
    """FLOPs of backward through so many blocks, without recomputation. Of frozen weights, only what they multiply has
    gradients; attention costs twice its forward pass all the same.
    """
    if setup.lora.rank == 0:
        return 2 * forward
    tokens = sum(shape.tokens**2 for shape in (*setup.mix.largest, *setup.beside))
    return forward + blocks * 4 * setup.model.hidden_size * tokens / setup.parallel.cp


def traced(setup: Setup, attention: AttentionFunction = fused_attention) -> Parts:
    """Seconds of work, which does not depend on the cluster."""
    shapes, parallel, pad_to = (*setup.mix.largest, *setup.beside), setup.parallel, setup.mix.pad_to
    if pad_to is not None:
        pad_to += sum(shape.tokens for shape in setup.beside)
    parts = trace_parts(setup.model, shapes, parallel, attention, pad_to, setup.lora)
    if isinstance(setup.stage, LaddConfig):
        parts = replace(parts, heads=trace_heads(setup.model, setup.stage, shapes, parallel))
    return parts


def with_checkpointing(setup: Setup, policy: Checkpointing) -> Setup:
    """What `selective` keeps is the setup's own if that is selective, and the default if not."""
    keep = setup.parallel.keep_outputs if policy is Checkpointing.selective else KEPT
    return replace(setup, parallel=replace(setup.parallel, activation_checkpointing=policy, keep_outputs=keep))


def network_of(
    model: FluxConfig, parallel: ParallelConfig, world: int, parts: Parts, lora: LoraConfig | None = None
) -> Network:
    """Parameters of each group that FSDP gathers, padded as it pads them, with what computing with them costs."""
    _, shard, cp = parallel.mesh_shape(world)

    network = _whole(model, lora or LoraConfig())

    def group(name: str, parameters: Iterable[nn.Parameter], cost: PartCost) -> Group:
        sizes = [(_padded(p, shard * cp), p.requires_grad) for p in parameters]
        return Group(name, sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains), cost)

    blocks = [group("double", block.parameters(), parts.double) for block in network.double_blocks]
    blocks += [group("single", block.parameters(), parts.single) for block in network.single_blocks]
    outer = (p for name, p in network.named_parameters() if "_blocks." not in name)
    last = group("last layer", network.final_layer.parameters(), parts.ends)
    return Network(group("ends", outer, parts.ends), last.trained, tuple(blocks))


def _padded(parameter: nn.Parameter, shards: int) -> int:
    return -(-len(parameter) // shards) * shards * (parameter.numel() // len(parameter))


def sharding_of(model: FluxConfig, parallel: ParallelConfig, world: int) -> Sharding:
    replicate, shard, cp = parallel.mesh_shape(world)
    weight = BYTES[parallel.param_dtype]
    in_float8 = _float8_share(model, parallel, of_products=False) if parallel.float8 is Float8.tensorwise else 0.0
    return Sharding(
        shards=shard * cp,
        replicas=replicate,
        weight_bytes=weight,
        wire_bytes=weight - (weight - 1) * in_float8,
        reduce_bytes=BYTES[parallel.reduce_dtype],
        last_stays=parallel.reshard_after_forward is not Reshard.always,
        all_stay=parallel.reshard_after_forward is Reshard.never,
        ahead_forward=parallel.prefetch_forward,
        ahead_backward=parallel.prefetch_backward or 1,
    )


def roles(setup: Setup, network: Network, sharding: Sharding) -> list[Role]:
    """Every network of the run. A stage with a teacher has one more that is frozen."""
    master = BYTES[setup.parallel.master_dtype]
    student = Role(
        "student",
        network.trained,
        weights=master,
        gradients=master,
        optimizer=_optimizer_bytes(setup.optimizer, network),
        ema=4.0 if setup.ema else 0.0,
        shards=sharding.shards,
        base=_base_bytes(setup, sharding),
    )
    size = 2 if setup.encoders.dtype is EncoderDtype.bfloat16 else 4
    text, images = _encoder_elements(setup.encoders)
    spread = sharding.shards if setup.parallel.shard_encoders else 1
    encoders = [Role("text encoders", text, size, shards=spread)] if not setup.text_stored else []
    frozen = BYTES[setup.frozen_dtype]
    others = [Role(role, network.elements, frozen, shards=sharding.shards) for role in setup.stage.frozen]
    return [student, *others, *_discriminator(setup, sharding), *encoders, Role("autoencoder", images, size)]


def _discriminator(setup: Setup, sharding: Sharding) -> Iterator[Role]:
    if isinstance(setup.stage, LaddConfig):
        model, heads = setup.model, setup.stage.discriminator
        with torch.device("meta"):
            network = Discriminator(len(heads.blocks_of(model)), model.hidden_size, heads.channels, model.vec_in_dim)
        elements = sum(_padded(p, sharding.shards) for p in network.parameters())
        states = 8.0 if setup.heads.moments is MomentDtype.float32 else 2 * (1 + 4 / 256)
        yield Role("discriminator", elements, 4, 4, states, shards=sharding.shards)


def _more_gathers(setup: Setup) -> int:
    """Of the whole network, beside those of the student's forward and backward."""
    own, beside = setup.stage.extra_passes(), setup.stage.extra_passes_beside()
    return own + beside + 2 * bool(setup.beside)  # the student's forward and backward pass on what is beside


def _base_bytes(setup: Setup, sharding: Sharding) -> float:
    """Of the frozen network that LoRA adapts, on all shards together."""
    frozen = (p for p in _whole(setup.model, setup.lora).parameters() if not p.requires_grad)
    return sum(_padded(p, sharding.shards) * p.element_size() for p in frozen)


def _optimizer_bytes(optimizer: OptimizerConfig, network: Network) -> float:
    """For each element, on average."""
    match optimizer.name, optimizer.moments:
        case OptimizerName.adamw, MomentDtype.float32:
            return 8.0
        case OptimizerName.adamw, MomentDtype.int8:
            return 2 * (1 + 4 / 256)  # codes, and a scale for each block of 256
        case OptimizerName.muon, MomentDtype.float32:
            return (8.0 * network.ends.trained + 4.0 * (network.trained - network.ends.trained)) / network.trained
    raise AssertionError(optimizer)


def _encoder_elements(config: EncodersConfig) -> tuple[int, int]:
    """Parameters of (text encoders, autoencoder): of encoders.path, or of the released ones where none is given."""
    if not config.path:
        return released.T5_PARAMETERS + released.CLIP_PARAMETERS, released.AUTOENCODER_PARAMETERS
    return _stored(config, "text_encoder") + _stored(config, "text_encoder_2"), _stored(config, "vae")


def _stored(config: EncodersConfig, part: str) -> int:
    files = sorted(Path(config.path, part).glob("*.safetensors"))
    if not files:
        rule = f"must be a folder in the layout of the released FLUX.1 repositories, but {part}/ has no safetensors"
        raise ConfigError("encoders.path", config.path, rule, "Leave it empty to count the released encoders")
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            total += sum(torch.Size(opened.get_slice(name).get_shape()).numel() for name in opened.keys())  # noqa: SIM118
    return total


def _encoding(setup: Setup, base: Memory) -> Moment:
    """Gradients of the step before are still there while targets are encoded, then contexts."""
    shapes = setup.mix.largest
    tokens = max(sum(s.target_tokens for s in shapes), sum(s.context_tokens for s in shapes))
    pixels = tokens * RELEASED_PIXELS_PER_TOKEN**2
    size = 1 if setup.encoders.dtype is EncoderDtype.bfloat16 else 2
    return Moment("encoding", replace(base, activations=size * pixels * released.AUTOENCODER_PEAK_BYTES_PER_PIXEL))


def _without_offloaded(memory: Memory) -> Memory:
    return replace(memory, parameters=0.0, gradients=0.0, optimizer=0.0, ema=0.0)


def _work(setup: Setup, parts: Parts, memory: Memory) -> Work:
    model, packs = setup.model, setup.microbatches
    costs = [(parts.double, model.depth), (parts.single, model.depth_single_blocks), (parts.ends, 1)]
    flops = sum(n * (c.forward_flops + c.backward_flops) for c, n in costs)
    attention = sum(n * c.attention_flops for c, n in costs)
    traffic = sum(n * c.traffic for c, n in costs)
    # A pass through a frozen role, forward and back to its inputs, has as many products as the student's backward: that
    # makes gradients of inputs and of weights. Both compute forward again where there is recomputation.
    forward = sum(n * c.forward_flops for c, n in costs)
    through = flops - forward
    without, through_frozen = setup.stage.passes()
    without_beside, through_beside = setup.stage.passes_beside()
    of_pack = without * forward + through_frozen * through
    of_beside = without_beside * forward + through_beside * through
    share = setup.share_beside
    grown = 1 + (of_pack + share * of_beside) / (1 + share) / flops  # flops are of the pack and of what is beside it
    in_blocks = grown * (flops - attention - parts.ends.forward_flops - parts.ends.backward_flops)
    in_float8 = in_blocks * _float8_share(model, setup.parallel, of_products=True)
    pixels = sum(s.target_tokens + s.context_tokens for s in setup.mix.largest) * RELEASED_PIXELS_PER_TOKEN**2
    encoding = released.encoding_flops(len(setup.mix.largest), setup.encoders.t5_tokens, pixels)
    state = memory.parameters + memory.optimizer + memory.ema  # read and written; gradients also for their norm
    return Work(
        matrix_flops=packs * (grown * (flops - attention) - in_float8),
        float8_flops=packs * in_float8,
        attention_flops=packs * grown * attention,
        encoder_flops=packs * encoding,
        elementwise_bytes=packs * grown * traffic,
        optimizer_bytes=2 * state + 3 * memory.gradients,
    )


def _optimizer_collectives(setup: Setup, network: Network, sharding: Sharding) -> Iterator[Collective]:
    """Muon brings each matrix to one rank in bfloat16, and its change back in float32."""
    if setup.optimizer.name is OptimizerName.muon and sharding.shards > 1:
        local = (network.trained - network.ends.trained) / sharding.shards
        yield Collective("all-to-all of Muon", sharding.shards, 1, (2 + 4) * local, hidden=False)


def _float8_share(model: FluxConfig, parallel: ParallelConfig, *, of_products: bool) -> float:
    """Share of all parameters, or of those that multiply every token in the blocks, that do it in float8."""
    if parallel.float8 is Float8.none:
        return 0.0
    network = _meta(model)

    def in_all_blocks(names: Iterable[str]) -> int:
        sizes = {name: network.get_parameter(f"{name}.weight").numel() for name in names}
        double = sum(n for name, n in sizes.items() if name.startswith("double_blocks."))
        return model.depth * double + model.depth_single_blocks * (sum(sizes.values()) - double)

    converted = in_all_blocks(converted_linears(network, parallel))
    if of_products:
        products = {id(linear) for linear in network.token_linears()}
        return converted / in_all_blocks(name for name, m in network.named_modules() if id(m) in products)
    blocks = [sum(p.numel() for p in b.parameters()) for b in network.blocks()]
    whole = sum(p.numel() for p in network.parameters()) - sum(blocks)
    return converted / (whole + model.depth * blocks[0] + model.depth_single_blocks * blocks[1])


def _whole(model: FluxConfig, lora: LoraConfig) -> Flux:
    with torch.device("meta"):
        network = Flux(model)
    adapt(network, lora)
    return network


def _meta(model: FluxConfig) -> Flux:
    """One block of each kind."""
    with torch.device("meta"):
        return Flux(replace(model, depth=1, depth_single_blocks=1))
