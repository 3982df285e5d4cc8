"""What a step keeps and moves, found by running the project's own model without data and without a GPU.

Two simulations. `trace_parts` runs one block of each kind, and what lies around the blocks, on fake tensors: what each
part keeps until backward, its peaks, its FLOPs and its memory traffic. `simulate_step` runs a whole sharded step on a
process group of any size that moves nothing. The first takes seconds, the second up to minutes.

All that torch calls private and this project uses for estimates is imported in this file. It was run on torch 2.13.
"""

import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kontext_train.data.batch import PackedBatch
from kontext_train.distributed.activation import checkpointed
from kontext_train.distributed.config import Float8, ParallelConfig
from kontext_train.distributed.context_parallel import split_sequence, ulysses
from kontext_train.distributed.parallelize import parallelize
from kontext_train.distributed.setup import forget_meshes
from kontext_train.estimation.memory import Heads, PartCost
from kontext_train.flow.config import ShiftConfig
from kontext_train.models.attention import AttentionFunction
from kontext_train.models.config import FluxConfig, LoraConfig, lora_targets
from kontext_train.models.discriminator import Discriminator
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import Conditioning
from kontext_train.models.layers import rope
from kontext_train.models.lora import FrozenLinear, exchange_linears
from kontext_train.models.sequence import LayoutPart, SampleShape, SequenceLayout, build_layout
from kontext_train.objectives.config import LaddConfig
from kontext_train.objectives.flow_matching import velocity_error
from kontext_train.objectives.ladd import Ladd
from kontext_train.training.config import OptimizerConfig
from kontext_train.training.optimizer import PhaseOptimizer

try:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore
except ImportError as error:  # private names move
    raise ImportError(
        f"torch {torch.__version__} has moved a private part that estimates are simulated with ({error}). "
        "It was written for torch 2.13. Adapt kontext_train/estimation/simulation.py, the only user of them"
    ) from error


@dataclass(frozen=True, slots=True)
class Parts:
    double: PartCost
    single: PartCost
    ends: PartCost  # embedders, modulation vector, rotary angles, last layer, loss
    batch: int  # bytes of what the encoders gave
    heads: Heads | None = None  # of a stage that trains a discriminator


_EXCHANGES = (torch.ops.kontext_train.all_to_all_tokens, torch.ops.kontext_train.all_to_all_heads)
AttentionFormulas = dict[Any, Callable[..., int]]  # operator -> its FLOPs, as torch's counter takes them


class Meter(TorchDispatchMode):
    """Bytes of all storages that came to be inside and are still alive, their peak, FLOPs, and bytes moved.

    torch's own FSDPMemTracker and FlopCounterMode give the same without checkpointing. With it, the module hooks of
    both keep recomputed tensors alive: up to 1.7 times the memory that a real process needs.
    """

    def __init__(self, attention: AttentionFormulas) -> None:
        super().__init__()
        self.live = self.peak = self.traffic = self.flops = self.attention_flops = self.exchanged = 0
        self._formulas = {**flop_registry, **attention}
        self._attention = attention
        self._size: weakref.WeakKeyDictionary[torch.UntypedStorage, list[int]] = weakref.WeakKeyDictionary()
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> Self:
        def resize(storage: torch.UntypedStorage, size: int) -> Any:  # how FSDP frees weights and takes them back
            result = self._resize(storage, size)
            if (counted := self._size.get(storage)) is not None and counted[0] >= 0:
                self.live += size - counted[0]
                counted[0] = size
                self.peak = max(self.peak, self.live)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [_local(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in inputs:
            self._size.setdefault(tensor.untyped_storage(), [NOT_COUNTED])  # it was there before
        result = func(*args, **(kwargs or {}))
        outputs = [_local(t) for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in outputs:
            if tensor.device.type != "meta":
                self._add(tensor.untyped_storage())
        operator = func._overloadpacket
        if operator in self._formulas:
            flops = self._formulas[operator](*args, **(kwargs or {}), out_val=result)
            self.flops += flops
            self.attention_flops += flops if operator in self._attention else 0
        elif operator in _EXCHANGES:
            self.exchanged += sum(t.numel() * t.element_size() for t in outputs)
        elif not func.is_view:
            self.traffic += sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._size:
            size = self._size[storage] = [storage.nbytes()]
            self.live += size[0]
            weakref.finalize(storage, self._freed, size)

    def _freed(self, size: list[int]) -> None:
        self.live -= size[0]


NOT_COUNTED = -1


def fused_attention(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Stands for FlashAttention in a simulation: keeps q, k, v, the output and one number for each token and head."""
    out_NHD, _ = torch.ops.kontext_train.cpu_attention(q_NHD, k_NHD, v_NHD, cu_seqlens, max_seqlen)
    return out_NHD


def trace_parts(
    model: FluxConfig,
    shapes: Sequence[SampleShape],
    parallel: ParallelConfig,
    attention: AttentionFunction,
    pad_to: int | None = None,
    lora: LoraConfig | None = None,
) -> Parts:
    """Cost of each part for one pack, with the checkpointing that `parallel` asks for, uncompiled and in param_dtype.

    attention: what runs inside; `fused_attention` for a GPU. Must run without a process group.
    """
    layout, part = _layouts(shapes, pad_to, parallel.cp)
    with _fake_group(parallel.cp) as group, FakeTensorMode() as fake:
        layout, mine = _faked(fake, layout, part)
        with _default_dtype(getattr(torch, parallel.param_dtype.value)):
            inside = attention if parallel.cp == 1 else ulysses(attention, group)
            network = Flux(replace(model, depth=1, depth_single_blocks=1), inside)
            if lora is not None and lora.rank:
                _adapt_as_gathered(network, lora, model)
        double, single = network.double_blocks[0], network.single_blocks[0]
        dtype = network.img_in.weight.dtype
        stream = (len(mine.sample_of_img_I), mine.txt_tokens)
        learns = network.time_in.in_layer.weight.requires_grad
        vec_SD = torch.zeros(len(shapes), model.hidden_size, dtype=dtype, requires_grad=learns)
        img_ID, txt_TD, x_ND = (
            torch.zeros(n, model.hidden_size, dtype=dtype, requires_grad=True) for n in (*stream, sum(stream))
        )
        angles = rope(mine.ids_N3, model.axes_dim, model.theta)
        run_double, run_single = (checkpointed(block.forward, block, parallel) for block in (double, single))
        network.double_blocks, network.single_blocks = nn.ModuleList(), nn.ModuleList()
        if parallel.cp > 1:
            split_sequence(network, group)
        batch = _fake_batch(model, layout)
        formulas = _attention_formulas(shapes, model.hidden_size, parallel.cp)
        return Parts(
            double=_cost(lambda: run_double(img_ID, txt_TD, vec_SD, angles, mine), formulas),
            single=_cost(lambda: (run_single(x_ND, vec_SD, angles, mine),), formulas),
            ends=_cost(lambda: (_loss(network, batch),), formulas),
            batch=_batch_bytes(batch),
        )


def trace_heads(model: FluxConfig, stage: LaddConfig, shapes: Sequence[SampleShape], parallel: ParallelConfig) -> Heads:
    """Cost of all heads of a stage's discriminator together for one pack: float32, on features in param_dtype."""
    with FakeTensorMode() as fake:
        layout, _ = _faked(fake, build_layout(shapes), None)
        dtype = getattr(torch, parallel.param_dtype.value)
        with torch.device("meta"):
            teacher = Flux(model)
        blocks = stage.discriminator.blocks_of(model)
        heads = Discriminator(len(blocks), model.hidden_size, stage.discriminator.channels, model.vec_in_dim)
        ladd = Ladd(stage, nn.Identity(), teacher, heads, ShiftConfig(), None)
        batch, t_S = _fake_batch(model, layout), torch.rand(len(shapes))
        size = (layout.targets, model.hidden_size)
        said = [torch.zeros(size, dtype=dtype, requires_grad=True) for _ in blocks]

        def learn() -> tuple[Tensor, ...]:
            views = [[s.detach().clone() for s in said] for _ in range(2)]
            if stage.gradient_penalty:
                views.append([s.detach().float() for s in said])
            return tuple(ladd.judge(views, t_S, batch))

        def teach() -> tuple[Tensor, ...]:
            return tuple(ladd.judge([[s.clone() for s in said]], t_S, batch))

        return Heads(sum(s.nbytes for s in said), learn=_cost(learn, {}), teach=_cost(teach, {}))


def _adapt_as_gathered(network: Flux, lora: LoraConfig, model: FluxConfig) -> None:
    """Frozen with adapters, in the dtype that is computed in: a block of each kind with all that its kind has anywhere.

    What comes into the last layer has a gradient, though the blocks that give it one are taken out of `network`.
    """
    kinds = {re.sub(r"\.\d+\.", ".0.", name, count=1) for name in lora_targets(lora, model)}
    network.requires_grad_(False)
    exchange_linears(network, replace(lora, targets=sorted(kinds)))
    for module in [m for m in network.modules() if isinstance(m, FrozenLinear)]:
        for name, kept in list(module.named_parameters()):
            gathered = torch.empty_like(kept, dtype=torch.get_default_dtype())
            setattr(module, name, nn.Parameter(gathered, requires_grad=kept.requires_grad))
    network.img_in.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


def _cost(forward: Callable[[], tuple[Tensor, ...]], formulas: AttentionFormulas) -> PartCost:
    meter = Meter(formulas)
    with meter:
        outputs = forward()
        kept, forward_peak, forward_flops = meter.live, meter.peak, meter.flops
        edges = [get_gradient_edge(output) for output in outputs]
        gradients = [torch.empty_like(output) for output in outputs]
        del outputs
        meter.peak = meter.live
        torch.autograd.backward(edges, gradients)
    return PartCost(
        kept=kept,
        forward_peak=forward_peak,
        backward_peak=meter.peak,
        forward_flops=forward_flops,
        backward_flops=meter.flops - forward_flops,
        attention_flops=meter.attention_flops,
        traffic=meter.traffic,
        exchanged=meter.exchanged,
    )


def _attention_formulas(shapes: Sequence[SampleShape], hidden: int, cp: int) -> AttentionFormulas:
    """FLOPs of attention, which depend on how the pack is cut into samples: q k^T and p v, and twice that backward.

    That FlashAttention computes q k^T once more backward is counted by nobody; it lowers the speed that one measures.
    """
    products = 4 * sum(shape.tokens**2 for shape in shapes) * hidden // cp  # each rank has a share of the heads
    operators = torch.ops.kontext_train
    return {
        operators.cpu_attention: lambda *_, **__: products,
        operators.cpu_attention_backward: lambda *_, **__: 2 * products,
    }


def _loss(network: nn.Module, batch: PackedBatch) -> Tensor:
    """The flow objective's, with fake draws."""
    t_S, noise_MC = torch.rand(len(batch.visits)), torch.randn_like(batch.x_MC)
    guidance_S = torch.ones_like(t_S) if network.guidance_in is not None else None
    return (velocity_error(network, batch, t_S, noise_MC, guidance_S) * batch.token_weight_M()).sum()


def _layouts(shapes: Sequence[SampleShape], pad_to: int | None, cp: int) -> tuple[SequenceLayout, LayoutPart | None]:
    """Of a pack, and of the share that the first of `cp` ranks has of it."""
    layout = build_layout(shapes, pad_to)
    return layout, layout.part(0, cp) if cp > 1 else None


def _faked(
    fake: FakeTensorMode, layout: SequenceLayout, part: LayoutPart | None
) -> tuple[SequenceLayout, SequenceLayout]:
    """Layout and share without contents. A share is not computed anew from a layout that has none."""

    def without_contents(of: Any) -> dict[str, Any]:
        values = {f.name: getattr(of, f.name) for f in fields(of)}
        return {k: fake.from_tensor(v) for k, v in values.items() if isinstance(v, Tensor)}

    layout = replace(layout, **without_contents(layout))
    if part is None:
        return layout, layout
    own = replace(part.layout, **without_contents(part.layout))
    part = replace(part, layout=own, **without_contents(part))
    layout.part = lambda rank, ranks: part  # type: ignore[method-assign]
    return layout, own


def _fake_batch(model: FluxConfig, layout: SequenceLayout) -> PackedBatch:
    """A pack as encoders give it, without contents."""
    samples = len(layout.shapes)
    cond = Conditioning(
        txt_TE=torch.zeros(layout.txt_tokens, model.context_in_dim),
        vec_SP=torch.zeros(samples, model.vec_in_dim),
        context_KC=torch.zeros(sum(s.context_tokens for s in layout.shapes), model.in_channels),
        layout=layout,
    )
    x_MC = torch.zeros(layout.targets, model.in_channels)
    return PackedBatch(x_MC, cond, list(range(samples)), torch.ones(samples), [""] * samples)


@contextmanager
def _fake_group(ranks: int) -> Iterator[dist.ProcessGroup]:
    """A process group that moves nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
        forget_meshes()


def _batch_bytes(batch: PackedBatch) -> int:
    tensors = [batch.x_MC, batch.weight_S, batch.cond.txt_TE, batch.cond.vec_SP, batch.cond.context_KC]
    tensors += [v for f in fields(SequenceLayout) if isinstance(v := getattr(batch.layout, f.name), Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """.to(dtype) does not work on fake modules."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """What torch's tracker and a spy on collectives saw on rank 0 of a whole step."""

    parameters: int  # bytes
    gradients: int
    optimizer: int
    peak: int  # most bytes alive during forward and backward, the optimizer's not included
    sent: dict[tuple[str, int], int]  # (kind of collective, ranks in its group) -> bytes of its whole tensor, summed
    flops: int


def simulate_step(
    model: FluxConfig,
    optimizer: OptimizerConfig,
    parallel: ParallelConfig,
    shapes: Sequence[SampleShape],
    world_size: int,
    attention: AttentionFunction,
    pad_to: int | None = None,
) -> SimulatedStep:
    """One pack, forward and backward, on a process group that moves nothing; seconds to minutes.

    Must run without a process group. Compile and float8 are left out.
    """
    replicate, shard, cp = parallel.mesh_shape(world_size)
    layout, part = _layouts(shapes, pad_to, cp)
    meter, spy = Meter(_attention_formulas(shapes, model.hidden_size, cp)), CollectiveSpy()
    with _fake_group(world_size):
        mesh = init_device_mesh("cpu", (replicate, shard * cp), mesh_dim_names=("dp_replicate", "dp_shard"))
        by_sequence = init_device_mesh("cpu", (replicate * shard, cp), mesh_dim_names=("dp", "cp"))
        group = by_sequence["cp"].get_group()
        with FakeTensorMode() as fake, meter:
            with torch.device("meta"):
                network = Flux(model, attention if cp == 1 else ulysses(attention, group))
            if cp > 1:
                split_sequence(network, group)
            parallelize(network, mesh, replace(parallel, compile=False, float8=Float8.none))
            network.to_empty(device="cpu")
            layout, _ = _faked(fake, layout, part)
            with spy:
                _loss(network, _fake_batch(model, layout)).backward()
        with fake:  # not metered: DTensor asks on fake tensors of full size how a fused update's result is sharded
            phase = PhaseOptimizer(network, optimizer, seed=0)
            phase.step(lr_factor=1.0)
        states = [t for o in phase.optimizers for s in o.state.values() for t in s.values() if isinstance(t, Tensor)]
        return SimulatedStep(
            parameters=sum(_local_bytes(p) for p in network.parameters()),
            gradients=sum(_local_bytes(p.grad) for p in network.parameters() if p.grad is not None),
            optimizer=sum(_local_bytes(t) for t in states),
            peak=meter.peak,
            sent=dict(spy.sent),
            flops=meter.flops,
        )


class CollectiveSpy(TorchDispatchMode):
    """Bytes that collectives work on: of the whole gathered, scattered or reduced tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[tuple[str, int], int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = next((kind for name, kind in _COLLECTIVES.items() if name in str(func)), None)
        if kind is not None:
            sizes = [t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor)]
            self.sent[kind, _ranks(args)] += max(sizes)
        return func(*args, **(kwargs or {}))


def _ranks(args: Sequence[Any]) -> int:
    """Size of the group among a collective's arguments: an object, or a name in the functional ones."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            return dist.ProcessGroup.unbox(argument).size()
        if isinstance(argument, str):
            return dist.distributed_c10d._resolve_process_group(argument).size()  # type: ignore[arg-type]
    raise AssertionError(args)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _local_bytes(tensor: Tensor) -> int:
    return _local(tensor).numel() * tensor.element_size()


_COLLECTIVES = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "kontext_train.all_to_all_": "all-to-all",  # of context parallelism: the exchange inside is not simulated
}
