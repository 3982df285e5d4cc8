"""An estimate as text. Every line says whether it is traced (the project's own code on fake tensors) or a formula."""

from collections.abc import Iterator, Mapping
from dataclasses import fields

from kontext_train.distributed.config import Checkpointing
from kontext_train.estimation.config import Assumptions, ClusterConfig
from kontext_train.estimation.estimate import Estimate, Setup
from kontext_train.estimation.gpus import DATA_SHEETS
from kontext_train.estimation.memory import GIB, Memory
from kontext_train.estimation.simulation import SimulatedStep

MEMORY_LINES = {
    "parameters": ("parameters, sharded", "formula"),
    "gradients": ("gradients, sharded", "formula"),
    "optimizer": ("optimizer states", "formula"),
    "ema": ("EMA", "formula"),
    "frozen": ("frozen roles and encoders", "formula"),
    "gathered": ("gathered weights and the next", "formula"),
    "reducing": ("gradients being reduced", "formula"),
    "activations": ("activations", "traced blocks, formula over them"),
    "batch": ("batch", "traced"),
}
TIME_LINES = {
    "matrix": "matrix products",
    "attention": "attention",
    "elementwise": "everything else in the network",
    "encoders": "frozen encoders",
    "optimizer": "optimizer and EMA",
    "waiting": "waiting for collectives",
}
assert MEMORY_LINES.keys() == {f.name for f in fields(Memory)}


def report(
    setup: Setup, cluster: ClusterConfig, estimates: Mapping[Checkpointing, Estimate], simulated: SimulatedStep | None
) -> str:
    """estimates: of the same setup with each checkpointing policy; the configured one is marked."""
    policy = setup.parallel.activation_checkpointing
    return "\n".join(
        [
            *_header(setup, cluster),
            *_memory(policy, cluster, estimates),
            *_speed(policy, setup, estimates),
            *_collectives(cluster, estimates[policy]),
            *(_simulated(simulated) if simulated is not None else []),
            *_assumptions(cluster.assume, setup.parallel.compile),
        ]
    )


def _header(setup: Setup, cluster: ClusterConfig) -> Iterator[str]:
    replicate, shard, cp = setup.parallel.mesh_shape(cluster.world)
    tokens = setup.mix.pad_to or sum(shape.tokens for shape in setup.mix.largest)
    sheet = DATA_SHEETS[cluster.gpu]
    yield f"A prediction, not a measurement. {cluster.world} x {cluster.gpu.value}, {cluster.gpus_per_node} a node"
    yield f"  mesh       dp_replicate {replicate} x dp_shard {shard} x cp {cp}"
    yield f"  pack       {tokens:,} tokens in {len(setup.mix.largest)} samples ({setup.mix.source})"
    yield f"  a step     {setup.microbatches} packs for every {cp} GPUs"
    yield f"  the GPU    {sheet.memory_gib} GiB, {sheet.bfloat16_tflops} TFLOP/s bfloat16, {sheet.hbm_gb_per_s} GB/s"


def _table(
    title: str, policy: Checkpointing, columns: Mapping[Checkpointing, object], rows: list[tuple[str, list[str], str]]
) -> Iterator[str]:
    yield ""
    names = [f"[{c.value}]" if c is policy else c.value for c in columns]
    width = max(18, *(len(value) for _, values, _ in rows for value in values))
    yield f"{title:36}" + "".join(f"  {name:>{width}}" for name in names)
    for label, values, source in rows:
        yield f"  {label:34}" + "".join(f"  {value:>{width}}" for value in values) + f"   {source}"


def _memory(
    policy: Checkpointing, cluster: ClusterConfig, estimates: Mapping[Checkpointing, Estimate]
) -> Iterator[str]:
    values = list(estimates.values())
    rows = [
        (label, [_gib(getattr(e.peak.memory, name)) for e in values], source)
        for name, (label, source) in MEMORY_LINES.items()
    ]
    rows += [
        ("total at the peak", [_gib(e.peak.memory.total) for e in values], ""),
        ("the peak is in", [e.peak.name for e in values], ""),
        ("reserve", [f"{cluster.assume.reserve_gib:.2f}"] * len(values), "assumed: CUDA context, NCCL, fragmentation"),
        ("left", [_gib(e.free) for e in values], ""),
        ("fits", ["yes" if e.fits else "NO" for e in values], ""),
    ]
    kinds = ("double", "single")
    rows += [
        (f"kept by a {kind}-stream block", [_gib(e.kept[i]) for e in values], "traced") for i, kind in enumerate(kinds)
    ]
    rows.append(("a checkpoint, of all ranks", [_gib(e.checkpoint) for e in values], "formula"))
    if any(e.host for e in values):
        rows.append(("in the host's memory", [_gib(e.host) for e in values], "formula"))
    yield from _table("memory of one GPU, GiB", policy, estimates, rows)


def _speed(policy: Checkpointing, setup: Setup, estimates: Mapping[Checkpointing, Estimate]) -> Iterator[str]:
    values = list(estimates.values())
    forward = setup.mix.forward_flops * setup.microbatches / setup.parallel.cp
    rows = [
        ("useful TFLOP", [f"{e.useful_flops / 1e12:.1f}" for e in values], "formula: without recomputation"),
        ("in forward passes", [f"{e.useful_flops / forward:.2f}" for e in values], "formula: of the student"),
        ("computed TFLOP", [f"{e.computed_flops / 1e12:.1f}" for e in values], "traced: recomputation included"),
        ("of it recomputed in blocks", [f"{e.recomputed_flops / 1e12:.1f}" for e in values], "traced"),
    ]
    rows += [
        (label, [f"{getattr(e.time, name):.3f}" for e in values], "roofline") for name, label in TIME_LINES.items()
    ]
    rows += [
        ("seconds a step", [f"{e.time.total:.3f}" for e in values], "roofline"),
        ("MFU", [f"{e.mfu:.3f}" for e in values], "roofline"),
        ("samples a second and GPU", [f"{e.samples_per_s:.3f}" for e in values], "roofline"),
    ]
    yield from _table("a step on one GPU, seconds", policy, estimates, rows)
    if setup.parallel.cpu_offload:
        yield "  cpu_offload: the time of moving weights and of updating on the host is not predicted"


def _collectives(cluster: ClusterConfig, chosen: Estimate) -> Iterator[str]:
    yield ""
    yield f"{'received by one GPU in a step, GB':36}{'ranks':>20}{'in the node':>20}{'between nodes':>20}"
    for c in chosen.collectives:
        within, between = c.by_link(cluster.gpus_per_node)
        yield f"  {c.kind:34}{c.ranks:>20}{within / 1e9:>20.2f}{between / 1e9:>20.2f}   formula"


def _simulated(step: SimulatedStep) -> Iterator[str]:
    yield ""
    yield "the whole step simulated on fake tensors and a process group that moves nothing, uncompiled, one pack"
    yield f"  {'parameters, GiB':34}{_gib(step.parameters):>20}"
    yield f"  {'gradients, GiB':34}{_gib(step.gradients):>20}"
    yield f"  {'optimizer states, GiB':34}{_gib(step.optimizer):>20}"
    yield f"  {'peak of forward and backward, GiB':34}{_gib(step.peak):>20}   of the student, without its states"
    yield f"  {'computed TFLOP':34}{step.flops / 1e12:>20.1f}"
    for (kind, ranks), whole in sorted(step.sent.items()):
        yield f"  {f'{kind} of {ranks} ranks, GB':34}{whole / 1e9:>20.2f}   of whole tensors"


def _assumptions(assume: Assumptions, compiled: bool) -> Iterator[str]:
    yield ""
    yield "assumed (assume.KEY=VALUE): " + ", ".join(f"{f.name} {getattr(assume, f.name)}" for f in fields(assume))
    if compiled:
        yield "activations are those of uncompiled blocks: compiled ones keep less, so this is an upper bound"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
