"""What the 12B needs on 8 to 1,024 H100s, predicted: `python -m benchmarks.scaling_table > docs/scaling.md`."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from kontext_train.data.config import DataConfig
from kontext_train.distributed.config import Checkpointing, ParallelConfig
from kontext_train.estimation.config import Assumptions, ClusterConfig, Sample
from kontext_train.estimation.estimate import Estimate, Setup, estimate, traced
from kontext_train.estimation.memory import GIB, Heads, PartCost
from kontext_train.estimation.packs import token_mix
from kontext_train.estimation.simulation import Parts
from kontext_train.models.config import DiscriminatorConfig, EncodersConfig, FluxConfig
from kontext_train.objectives.config import (
    FlowMatchingConfig,
    GuidanceDistillationConfig,
    LaddConfig,
    ObjectiveConfig,
)
from kontext_train.training.config import MomentDtype, OptimizerConfig

TOKENS = 8704  # of a 1024² edit with one context image of 1024² and 512 text tokens
WORLDS = (8, 64, 256, 1024)
MOST = 16  # samples in a pack that are tried

LADD = LaddConfig(
    discriminator=DiscriminatorConfig(blocks=[3, 8, 13, 18, 26, 34, 42, 50], channels=256), gradient_penalty=1e-3
)

INTRODUCTION = """\
# Scaling the 12B: predictions

**These are predictions, not measurements.** Nothing on this page has run on a GPU. It is what `kontext-estimate` says
of FLUX.1 12B (guidance embedding, bfloat16 compute, float32 master weights and gradients), trained on 1024² edits with
one 1024² context image: {tokens:,} tokens and 496 TFLOP a sample. Cluster: H100 SXM, 8 a node, 450 GB/s NVLink and one
400 Gb/s card for each GPU. Written by

    python -m benchmarks.scaling_table > docs/scaling.md

Memory is *traced*: blocks of true width run on fake tensors, and a formula puts them together. On small models it is
within a tenth of what real gloo processes hold (`tests/estimation/test_against_measured.py`). It is that of
uncompiled blocks, and so an upper bound for `parallel.compile=true`. Speed is a *roofline* of compiled blocks over
these assumptions, none of which has been measured here: {assumptions}.
Change one with `kontext-estimate assume.KEY=VALUE`.

A pack fits if {reserve} GiB of an H100's 79.1 stay free, for CUDA's context, NCCL and fragmentation. The frozen
encoders count: T5 and CLIP sharded, the autoencoder whole. With cp=2 two GPUs share a pack. LADD (as `experiment=pro`:
eight heads of 256 channels, with a gradient penalty) and guidance distillation have a frozen teacher in bfloat16, and
cost 8 and 5 forward passes a sample where fine-tuning costs 3. Columns:

- *GiB at one*: at the peak of a step with one sample a pack;
- *largest*: most samples of {tokens:,} tokens in a pack that fit, up to {most}; what follows is at that size;
- *samples/s*: of one GPU; *GB*: received by one GPU in a step, within its node, and from other nodes."""


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    parallel: dict[str, object] = field(default_factory=dict)
    ema: bool = False
    int8: bool = False
    stage: ObjectiveConfig = field(default_factory=FlowMatchingConfig)


class Tracer:
    """Traces do not depend on the cluster: few are made, and used for all."""

    def __init__(self) -> None:
        self.model = FluxConfig(guidance_embed=True)
        self.made: dict[tuple[Checkpointing, int, int, type], Parts] = {}

    def parts(self, row: Row, policy: Checkpointing, samples: int) -> Parts:
        """Traced for two and four samples; more of the same cost more in a straight line."""
        if samples == 1:
            return self.trace(row, policy, 1)
        two, four = self.trace(row, policy, 2), self.trace(row, policy, 4)
        blocks = {part: _between(two, four, part, samples) for part in ("double", "single", "ends")}
        heads = None
        if two.heads is not None and four.heads is not None:
            turns = {turn: _between(two.heads, four.heads, turn, samples) for turn in ("learn", "teach")}
            heads = Heads(_line(two.heads.features, four.heads.features, samples), **turns)
        return Parts(**blocks, batch=_line(two.batch, four.batch, samples), heads=heads)

    def trace(self, row: Row, policy: Checkpointing, samples: int) -> Parts:
        setup = self.setup(row, policy, samples)
        key = (policy, samples, setup.parallel.cp, type(row.stage))
        if key not in self.made:
            self.made[key] = traced(setup)
        return self.made[key]

    def setup(self, row: Row, policy: Checkpointing, samples: int) -> Setup:
        parallel = ParallelConfig(activation_checkpointing=policy, compile=True, **row.parallel)  # type: ignore[arg-type]
        data = DataConfig(tokens_per_pack=samples * TOKENS)
        mix = token_mix(data, EncodersConfig(), self.model, Sample(), packs_per_step=1, seed=0)
        optimizer = OptimizerConfig(moments=MomentDtype.int8 if row.int8 else MomentDtype.float32)
        return Setup(
            self.model, EncodersConfig(), optimizer, parallel, row.ema, microbatches=1, mix=mix, stage=row.stage
        )

    def estimate(self, row: Row, policy: Checkpointing, samples: int, world: int) -> Estimate:
        setup = self.setup(row, policy, samples)
        return estimate(setup, ClusterConfig(world=world), self.parts(row, policy, samples))

    def largest(self, row: Row, policy: Checkpointing, world: int) -> int:
        """Most samples in a pack that fit; 0 if not even one does."""
        fitting = 0
        while fitting < MOST and self.estimate(row, policy, fitting + 1, world).fits:
            fitting += 1
        return fitting


def _between(two: Parts | Heads, four: Parts | Heads, part: str, samples: int) -> PartCost:
    a, b = getattr(two, part), getattr(four, part)
    return PartCost(*(_line(getattr(a, f.name), getattr(b, f.name), samples) for f in fields(PartCost)))


def _line(at_two: int, at_four: int, samples: int) -> int:
    return at_two + (at_four - at_two) * (samples - 2) // 2


def rows(world: int) -> Iterator[Row]:
    yield Row("FSDP")
    yield Row("FSDP, EMA", ema=True)
    if world == 8:
        yield Row("FSDP, 8-bit moments", int8=True)
        yield Row("FSDP, EMA, 8-bit moments", ema=True, int8=True)
    else:
        yield Row("HSDP, a copy a node, EMA", {"dp_replicate": world // 8}, ema=True)
    if world > 64:
        yield Row("HSDP, a copy on 8 nodes, EMA", {"dp_replicate": world // 64}, ema=True)
    yield Row("FSDP, cp=2, EMA", {"cp": 2}, ema=True)
    yield Row("guidance distillation: FSDP, EMA", ema=True, stage=GuidanceDistillationConfig())
    yield Row("LADD: FSDP, EMA", ema=True, stage=LADD)


def table() -> Iterator[str]:
    tracer, assume = Tracer(), Assumptions()
    named = ", ".join(f"{key} {getattr(assume, key)}" for key in assume.__slots__)
    yield INTRODUCTION.format(tokens=TOKENS, assumptions=named, reserve=assume.reserve_gib, most=MOST)
    for world in WORLDS:
        yield f"\n## {world} H100s\n"
        yield "| sharding | checkpointing | GiB at one | largest | GiB | s a step | MFU | samples/s | GB in, between |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for row in rows(world):
            for policy in Checkpointing:
                yield line(tracer, row, policy, world)


def line(tracer: Tracer, row: Row, policy: Checkpointing, world: int) -> str:
    one = tracer.estimate(row, policy, 1, world)
    start = f"| {row.name} | {policy.value} | {one.peak.memory.total / GIB:.1f} |"
    most = tracer.largest(row, policy, world)
    if most == 0:
        return f"{start} does not fit | | | | | |"
    best = tracer.estimate(row, policy, most, world)
    links = [c.by_link(8) for c in best.collectives]
    within, between = (sum(side) / 1e9 for side in zip(*links, strict=True))
    size = f"{most}{' or more' if most == MOST else ''}"
    return (
        f"{start} {size} | {best.peak.memory.total / GIB:.1f} | {best.time.total:.2f} | {best.mfu:.2f} | "
        f"**{best.samples_per_s:.2f}** | {within:.0f}, {between:.0f} |"
    )


if __name__ == "__main__":
    for text in table():
        print(text, flush=True)
