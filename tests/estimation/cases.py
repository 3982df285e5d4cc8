"""Small networks and packs whose estimates several tests hold against something else."""

from kontext_train.distributed.config import ParallelConfig
from kontext_train.estimation.estimate import Setup, network_of, roles, sharding_of, traced
from kontext_train.estimation.memory import Memory, Moment, Network, Sharding, held, largest, moments
from kontext_train.estimation.packs import TokenMix
from kontext_train.estimation.simulation import fused_attention
from kontext_train.models.attention import AttentionFunction
from kontext_train.models.config import EncodersConfig, FluxConfig, LoraConfig
from kontext_train.models.sequence import SampleShape
from kontext_train.training.config import OptimizerConfig

MODEL = FluxConfig(
    hidden_size=256, num_heads=2, depth=2, depth_single_blocks=3, context_in_dim=64, vec_in_dim=32, guidance_embed=True
)
PACK = (SampleShape(64, (16, 16), ((16, 16),)), SampleShape(64, (8, 16)))


def setup(
    model: FluxConfig = MODEL,
    pack: tuple[SampleShape, ...] = PACK,
    ema: bool = False,
    lora: LoraConfig | None = None,
    **parallel: object,
) -> Setup:
    mix = TokenMix(pack, samples=len(pack), forward_flops=0.0, pad_to=None, source="test")
    config = ParallelConfig(**parallel)  # type: ignore[arg-type]
    return Setup(model, EncodersConfig(), OptimizerConfig(), config, ema, 1, mix, lora or LoraConfig())


def student_moments(
    case: Setup, world: int, attention: AttentionFunction = fused_attention
) -> tuple[list[Moment], Network, Sharding, Memory]:
    """What is estimated for the student alone, without encoders."""
    parts = traced(case, attention)
    network = network_of(case.model, case.parallel, world, parts, case.lora)
    sharding = sharding_of(case.model, case.parallel, world)
    base = held(roles(case, network, sharding)[:1], parts.batch)
    return list(moments(base, network, sharding, accumulating=False)), network, sharding, base


def estimated_peak(case: Setup, world: int, attention: AttentionFunction = fused_attention) -> float:
    return largest(student_moments(case, world, attention)[0]).memory.total
