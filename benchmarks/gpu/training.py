"""Training steps of the FLUX transformer: true-width blocks at a depth that fits, the whole 12B, and diffusers.

A step is forward, loss and backward, with FSDP2 on a mesh of one, as a run has it: float32 master weights, gathered in
bfloat16, gradients reduced in float32. The optimizer is timed in the whole step only: on many GPUs each updates a
share of the weights, so its time at a cut depth on one GPU says nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.gpu.measure import GIB, TRIPLET_TFLOP, Result, Setting, Step, options, race, row
from kontext_train.distributed.config import ParallelConfig
from kontext_train.distributed.parallelize import parallelize
from kontext_train.distributed.setup import World, process_group
from kontext_train.models.attention import attention_function, usable_backend
from kontext_train.models.config import AttentionBackend, FluxConfig
from kontext_train.models.diffusers_format import transformer_config
from kontext_train.models.flops import forward_flops
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import Conditioning, predict_velocity
from kontext_train.models.sequence import build_layout
from kontext_train.training.config import OptimizerConfig
from kontext_train.training.optimizer import PhaseOptimizer

CUT_DEPTH = (2, 4)  # double and single blocks, in the 12B's proportion


def run_blocks(setting: Setting) -> None:
    """Cut depth: every checkpointing policy, eager and compiled, float8, and diffusers; each group is one race."""
    depth, singles = (1, 1) if setting.tiny else CUT_DEPTH
    config = replace(setting.model, depth=depth, depth_single_blocks=singles)
    with process_group(ParallelConfig()) as world:
        ours, theirs = partial(_ours, config, world, setting), partial(_diffusers, config, world, setting)
        selective = partial(ours, activation_checkpointing="selective")
        full = partial(ours, activation_checkpointing="full")
        eager: dict[str, Callable[[], Step]] = {
            "ours, none": ours,
            "ours, selective": selective,
            "ours, full": full,
            "diffusers": theirs,
            "diffusers, checkpointing": partial(theirs, checkpointing=True),
        }
        compiled = {  # most important first: compiling takes its time, and who comes last may find none left
            "ours, selective": partial(selective, compile=True),
            "diffusers, bf16 weights without FSDP, cuDNN": partial(
                theirs, True, sharded=False, attention="_native_cudnn"
            ),
            "ours, selective, float8 tensorwise": partial(selective, compile=True, float8="tensorwise"),
            "ours, none": partial(ours, compile=True),
            "diffusers, cuDNN": partial(theirs, True, attention="_native_cudnn"),
            "ours, selective, float8 rowwise": partial(selective, compile=True, float8="rowwise"),
            "ours, full": partial(full, compile=True),
            "diffusers": partial(theirs, True),
            "diffusers, checkpointing, cuDNN": partial(theirs, True, checkpointing=True, attention="_native_cudnn"),
        }
        _race("blocks, eager", eager, config, setting)
        _race("blocks, compiled", compiled, config, setting)


def run_whole(setting: Setting) -> None:
    """All 57 blocks in bfloat16: forward and backward, and with 8-bit AdamW a whole step where memory allows."""
    config = setting.model
    if setting.tiny:
        config = replace(config, depth=1, depth_single_blocks=1)
    bf16 = {"master_dtype": "bfloat16", "compile": True}
    step8 = {"moments": "int8", "stochastic_rounding": True}
    with process_group(ParallelConfig()) as world:
        for name, needs_gib, chosen, optimizer in (
            ("forward + backward, full checkpointing", 70, bf16 | {"activation_checkpointing": "full"}, None),
            ("step, 8-bit AdamW, full checkpointing", 100, bf16 | {"activation_checkpointing": "full"}, step8),
            ("forward + backward, selective", 100, bf16 | {"activation_checkpointing": "selective"}, None),
        ):
            build = partial(_fitting, needs_gib, setting, partial(_ours, config, world, setting, optimizer, **chosen))
            _race("whole 12B", {f"ours, {name}": build}, config, setting)


def _race(section: str, builders: Mapping[str, Callable[[], Step]], config: FluxConfig, setting: Setting) -> None:
    tflop = 3 * forward_flops(config).sample(setting.triplet) / 1e12
    derived = config.depth + config.depth_single_blocks < 57
    backend = usable_backend(AttentionBackend.auto, setting.device, setting.dtype, config.head_dim).value
    for name, result in race(builders, setting).items():
        values = row(section, name, result, tflop, depth=[config.depth, config.depth_single_blocks])
        if name.startswith("ours"):
            values["attention"] = backend
        if isinstance(result, Result):
            values |= {"triplets_per_s": values["tflops"] / TRIPLET_TFLOP, "derived": derived}
        setting.emit(values)
    torch.compiler.reset()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


def _fitting(needs_gib: int, setting: Setting, build: Callable[[], Step]) -> Step:
    if setting.device.type == "cuda":
        has_gib = torch.cuda.get_device_properties(setting.device).total_memory / GIB
        if has_gib < needs_gib:
            raise MemoryError(f"needs about {needs_gib} GiB, and this card has {has_gib:.0f}")
    return build()


def _ours(
    config: FluxConfig, world: World, setting: Setting, optimizer: dict[str, Any] | None = None, **chosen: Any
) -> Step:
    parallel = options(ParallelConfig, **chosen)
    backend = usable_backend(AttentionBackend.auto, setting.device, setting.dtype, config.head_dim)
    with torch.device("meta"):
        model = Flux(config, attention_function(backend))
    parallelize(model, world.mesh, parallel, static_tokens=setting.triplet.tokens)
    model.to_empty(device=setting.device)
    _fill(model)
    turn = PhaseOptimizer(model, options(OptimizerConfig, **optimizer), seed=0) if optimizer is not None else None
    z_MC, t_S, cond = _inputs(config, setting)

    def step() -> Tensor:
        loss = predict_velocity(model, z_MC, t_S, cond).float().square().mean()
        loss.backward()
        if turn is not None:
            turn.clip()
            turn.step(1.0)
        _drop_gradients(model)
        return loss.detach()

    return step


def _inputs(config: FluxConfig, setting: Setting) -> tuple[Tensor, Tensor, Conditioning]:
    shape, device = setting.triplet, setting.device
    cond = Conditioning(
        txt_TE=torch.randn(shape.txt, config.context_in_dim, device=device),
        vec_SP=torch.randn(1, config.vec_in_dim, device=device),
        context_KC=torch.randn(shape.context_tokens, config.in_channels, device=device),
        layout=build_layout([shape]).to(device),
    )
    z_MC = torch.randn(shape.target_tokens, config.in_channels, device=device)
    return z_MC, torch.rand(1, device=device), cond


def _diffusers(
    config: FluxConfig,
    world: World,
    setting: Setting,
    compiled: bool = False,
    checkpointing: bool = False,
    sharded: bool = True,
    attention: str = "native",
) -> Step:
    """The same network and tokens by diffusers, with what it offers: regional compilation, its own gradient
    checkpointing, and its choice of torch's attention kernels. `sharded`: by FSDP2 block by block, as ours is, with
    float32 weights gathered in bfloat16; else its weights are plain bfloat16, which skips that work.
    """
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(transformer_config(config))
    model.train()
    model.set_attention_backend(attention)
    if checkpointing:
        model.enable_gradient_checkpointing()
    if compiled:
        model.compile_repeated_blocks(fullgraph=True)
    if sharded:
        policy = MixedPrecisionPolicy(param_dtype=setting.dtype, reduce_dtype=torch.float32)
        for part in (*chain(model.transformer_blocks, model.single_transformer_blocks), model):
            fully_shard(part, mesh=world.mesh["dp_shard"], mp_policy=policy)
    else:
        model.to(setting.dtype)
    model.to_empty(device=setting.device)
    _fill(model)
    inputs = _diffusers_inputs(config, setting)
    targets = setting.triplet.target_tokens

    def step() -> Tensor:
        loss = model(**inputs).sample[:, :targets].float().square().mean()
        loss.backward()
        _drop_gradients(model)
        return loss.detach()

    return step


def _diffusers_inputs(config: FluxConfig, setting: Setting) -> dict[str, Tensor]:
    shape = setting.triplet
    random = partial(torch.randn, device=setting.device, dtype=setting.dtype)
    grids = list(_grids(shape.target, *shape.contexts))
    return {
        "hidden_states": random(1, shape.target_tokens + shape.context_tokens, config.in_channels),
        "encoder_hidden_states": random(1, shape.txt, config.context_in_dim),
        "pooled_projections": random(1, config.vec_in_dim),
        "timestep": torch.rand(1, device=setting.device, dtype=setting.dtype),
        "img_ids": torch.cat(grids).to(setting.device),
        "txt_ids": torch.zeros(shape.txt, 3, device=setting.device),
    }


def _grids(*sizes: tuple[int, int]) -> Iterator[Tensor]:
    for i, (h, w) in enumerate(sizes):
        yield torch.cartesian_prod(torch.tensor([float(i)]), torch.arange(float(h)), torch.arange(float(w)))


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Random weights of the size that trained ones have; drawn on the device, for speed."""
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.ndim == 1:
            local.fill_(1.0 if "norm" in name or name.endswith(".scale") else 0.0)
        else:
            local.normal_(0.0, 0.02)


def _drop_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None
