"""Traffic, time and constants: each against a number got in another way."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from kontext_train.data.config import DataConfig
from kontext_train.distributed.config import Checkpointing
from kontext_train.errors import ConfigError
from kontext_train.estimation import encoders as released
from kontext_train.estimation.config import GPU, Assumptions, ClusterConfig, Sample
from kontext_train.estimation.estimate import estimate, network_of, roles, sharding_of, traced
from kontext_train.estimation.gpus import DATA_SHEETS
from kontext_train.estimation.memory import held, largest, moments, moments_of_heads
from kontext_train.estimation.packs import token_mix
from kontext_train.estimation.roofline import Work, step_time
from kontext_train.estimation.simulation import Meter
from kontext_train.estimation.traffic import Collective
from kontext_train.models.config import BaseDtype, EncodersConfig, FluxConfig, LoraConfig
from kontext_train.models.flux import Flux
from kontext_train.models.lora import adapt
from kontext_train.objectives.config import LaddConfig
from tests.estimation.cases import MODEL, PACK, setup
from tests.runs import ENCODERS


@pytest.mark.parametrize(
    ("kind", "ranks", "stride", "within", "between"),
    [
        ("all-gather", 8, 1, 700, 0),  # 7/8 of 800, none over the network
        ("all-gather", 16, 1, 656.25, 93.75),  # 15/16 of 800; each of 8 cards brings an eighth of it
        ("all-reduce", 8, 8, 0, 1400),  # one GPU a node: all over its own card, twice
        ("all-reduce", 4, 4, 600, 600),  # two GPUs a node
        ("all-to-all", 2, 1, 400, 0),
    ],
)
def test_bytes_by_link(kind: str, ranks: int, stride: int, within: float, between: float) -> None:
    assert Collective(kind, ranks, stride, 800.0, hidden=True).by_link(8) == pytest.approx((within, between))


def test_each_part_of_a_step_takes_its_time_and_collectives_hide_behind_computation() -> None:
    gpu, sure = DATA_SHEETS[GPU.h100], Assumptions(matmul=1.0, attention=0.5, memory=1.0, links=1.0, overlap=1.0)
    work = Work(989e12, 1979e12 * 0.60, 989e12, 0.0, 3350e9, 0.0)
    hidden = Collective("all-gather", 2, 1, 2 * 450e9 * 4, hidden=True)  # four seconds on NVLink
    time = step_time(work, [hidden], gpu, 8, sure, compiled=False)
    assert (time.matrix, time.attention, time.elementwise, time.waiting) == pytest.approx((2.0, 2.0, 1.0, 0.0))
    longer = Collective("all-gather", 2, 1, 2 * 450e9 * 7, hidden=True)
    assert step_time(work, [longer], gpu, 8, sure, compiled=False).waiting == pytest.approx(2.0)
    open_ = Collective("all-to-all", 2, 1, 2 * 450e9 * 4, hidden=False)
    assert step_time(work, [open_], gpu, 8, sure, compiled=False).waiting == pytest.approx(4.0)
    compiled = step_time(work, [], gpu, 8, sure, compiled=True).elementwise
    assert compiled == pytest.approx(sure.compiled_traffic)


def test_ladd_adds_a_teacher_its_activations_its_gathers_and_heads() -> None:
    """What the student kept waits while as much again is kept for the way through the teacher."""
    plain = setup()
    ladd = replace(plain, stage=LaddConfig())
    cluster, parts = ClusterConfig(world=4), traced(ladd)
    assert parts.heads is not None
    network = network_of(plain.model, plain.parallel, cluster.world, parts)
    sharding = sharding_of(plain.model, plain.parallel, cluster.world)
    base = held(roles(plain, network, sharding), 0.0)
    alone = largest(m for m in moments(base, network, sharding, False) if not m.name.startswith("reducing"))
    of_blocks = [
        moment
        for moment in moments_of_heads(base, network, sharding, parts.heads, False)
        if moment.name.startswith(("teacher: forward", "teacher: backward"))
    ]
    kept = network.ends.cost.kept + sum(block.cost.kept for block in network.blocks)
    activations = largest(of_blocks).memory.activations - parts.heads.features
    assert kept < activations <= alone.memory.activations + kept

    names = [{role.name for role in roles(case, network, sharding)} for case in (plain, ladd)]
    assert names[1] - names[0] == {"teacher", "discriminator"}
    frozen = held(roles(ladd, network, sharding), 0.0).frozen - base.frozen
    assert frozen == pytest.approx(2 * network.elements / 4)
    gathers = {c.kind: c.whole for c in estimate(ladd, cluster, parts).collectives}["all-gather"]
    before = {c.kind: c.whole for c in estimate(plain, cluster, replace(parts, heads=None)).collectives}["all-gather"]
    assert gathers - before == pytest.approx(
        5 * sharding.wire_bytes * network.elements
    )  # 3 forward, 2 of there and back


def test_a_checkpoint_has_weights_moments_and_average_once_however_it_is_sharded() -> None:
    parameters = sum(p.numel() for p in Flux(MODEL).parameters())
    for parallel in ({}, {"dp_replicate": 2}, {"cp": 2}, {"cpu_offload": True}):
        case = setup(ema=True, **parallel)
        found = estimate(case, ClusterConfig(world=4), traced(case)).checkpoint
        assert found == pytest.approx(16 * parameters, rel=0.01)  # rows are shared out unequally
    for base in BaseDtype:  # which no checkpoint holds
        case = setup(ema=True, lora=LoraConfig(rank=8, base_dtype=base))
        with torch.device("meta"):
            adapted = Flux(MODEL)
        adapt(adapted, case.lora)
        adapters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        found = estimate(case, ClusterConfig(world=4), traced(case)).checkpoint
        assert found == pytest.approx(16 * adapters, rel=0.01)


def test_float8_needs_its_units() -> None:
    with pytest.raises(ValueError, match="no float8 units"):
        step_time(Work(0, 1, 0, 0, 0, 0), [], DATA_SHEETS[GPU.a100], 8, Assumptions(), compiled=False)


T5 = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def flops(model: torch.nn.Module, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


def test_released_encoders_are_as_large_and_as_dear_as_said() -> None:
    """Counted on the classes that run, in the released shapes (google/t5-v1_1-xxl, openai/clip-vit-large-patch14)."""
    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
        vae = AutoencoderKL(**VAE)
        ids = torch.zeros(1, 512, dtype=torch.long)
        image = torch.zeros(1, 3, 1024, 1024)
    sizes = (released.T5_PARAMETERS, released.CLIP_PARAMETERS, released.AUTOENCODER_PARAMETERS)
    assert tuple(map(parameters, (t5, clip, vae))) == sizes
    assert flops(t5, ids) == 512 * released.T5_FLOPS_PER_TOKEN
    assert flops(clip, ids[:, :77]) == released.CLIP_FLOPS
    assert flops(vae.encoder, image) == pytest.approx(1024**2 * released.AUTOENCODER_FLOPS_PER_PIXEL, rel=1e-4)


def test_the_autoencoder_needs_as_much_memory_as_said() -> None:
    with FakeTensorMode(), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        try:
            vae = AutoencoderKL(**VAE)
        finally:
            torch.set_default_dtype(torch.float32)
        for images in (1, 2):
            with Meter({}) as meter:
                vae.encode(torch.zeros(images, 3, 256, 256, dtype=torch.bfloat16))
            assert meter.peak == pytest.approx(images * 256**2 * released.AUTOENCODER_PEAK_BYTES_PER_PIXEL, rel=0.02)


def test_the_typical_sample_is_the_yardstick() -> None:
    model = FluxConfig(guidance_embed=True)
    mix = token_mix(DataConfig(tokens_per_pack=20_000), EncodersConfig(), model, Sample(), packs_per_step=1, seed=0)
    assert [shape.tokens for shape in mix.largest] == [8704, 8704]
    assert 3 * mix.forward_flops / 2 == pytest.approx(496e12, rel=0.01)
    with pytest.raises(ConfigError, match=r"data\.tokens_per_pack=8000: must hold the typical sample.* 8704 tokens"):
        token_mix(DataConfig(tokens_per_pack=8000), EncodersConfig(), model, Sample(), packs_per_step=1, seed=0)


def test_an_index_gives_its_own_mix(shards: Path) -> None:
    data = DataConfig(train=str(shards), tokens_per_pack=128, window_samples=64)
    encoders = EncodersConfig(path=str(ENCODERS), t5_tokens=12)
    mix = token_mix(data, encoders, FluxConfig(), Sample(), packs_per_step=2, seed=0)
    largest = sum(shape.tokens for shape in mix.largest)
    assert 100 < largest <= 128
    assert mix.samples > 1


def test_bytes_kept_and_arithmetic_done_again_are_what_the_policy_says() -> None:
    """The two lines of the report: between the policies, the named outputs and their products."""
    cases = {p: setup(activation_checkpointing=p) for p in Checkpointing}
    told = {policy: estimate(case, ClusterConfig(), traced(case)) for policy, case in cases.items()}
    selective, full = told[Checkpointing.selective], told[Checkpointing.full]
    d, mlp, tokens = MODEL.hidden_size, MODEL.mlp_hidden, sum(shape.tokens for shape in PACK)

    kept = tokens * (2 * d * 2 + MODEL.num_heads * 4)  # attention and mlp.2 or linear2 in bfloat16; log-sum-exp
    assert [s - f for s, f in zip(selective.kept, full.kept, strict=True)] == [kept, kept]
    products = 2 * tokens * (MODEL.depth * d * mlp + MODEL.depth_single_blocks * d * (d + mlp))
    attention = (MODEL.depth + MODEL.depth_single_blocks) * 4 * d * sum(shape.tokens**2 for shape in PACK)
    assert full.recomputed_flops - selective.recomputed_flops == products + attention
    assert told[Checkpointing.none].recomputed_flops < 0.01 * full.recomputed_flops
