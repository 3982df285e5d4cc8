"""Schedule, optimizers, EMA, FLOPs, metrics: each alone, against code we did not write where there is any."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kontext_train.errors import ConfigError
from kontext_train.models.flops import forward_flops
from kontext_train.models.kontext import predict_velocity
from kontext_train.training import muon
from kontext_train.training.config import EMAConfig, OptimizerConfig, OptimizerName, ScheduleConfig, ScheduleName
from kontext_train.training.ema import EMA
from kontext_train.training.metrics import draw_loss, read_metrics
from kontext_train.training.muon import Muon
from kontext_train.training.optimizer import PhaseOptimizer
from kontext_train.training.rounding import StochasticRounding
from kontext_train.training.schedule import lr_factor
from tests.models.flux_cases import SHAPES, TINY, pack, random_flux, random_sample


def test_schedules() -> None:
    cosine = ScheduleConfig(name=ScheduleName.cosine, warmup_steps=10, final_factor=0.1)
    assert lr_factor(0, 110, cosine) == pytest.approx(0.1)
    assert lr_factor(9, 110, cosine) == 1.0
    assert lr_factor(60, 110, cosine) == pytest.approx(0.1 + 0.9 * 0.5)
    assert lr_factor(110, 110, cosine) == pytest.approx(0.1)
    linear = ScheduleConfig(name=ScheduleName.linear, warmup_steps=0)
    assert [lr_factor(s, 4, linear) for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    constant = ScheduleConfig(name=ScheduleName.constant, warmup_steps=2)
    assert [lr_factor(s, 9, constant) for s in (0, 1, 2, 8)] == [0.5, 1.0, 1.0, 1.0]


def test_muon_equals_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "_iteration_dtype", lambda device: torch.bfloat16)  # as torch's
    weights = [torch.randn(24, 16), torch.randn(8, 40)]
    ours = [nn.Parameter(w.clone()) for w in weights]
    theirs = [nn.Parameter(w.clone()) for w in weights]
    rounding = StochasticRounding(0, torch.device("cpu"))
    a = Muon(ours, lr=0.02, momentum=0.95, weight_decay=0.1, rounding=rounding)
    b = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert not torch.equal(ours[0], weights[0])


@pytest.mark.parametrize(("name", "expected"), [("adamw", 1), ("muon", 2)])
def test_optimizers_share_out_every_parameter_once(name: str, expected: int) -> None:
    model = random_flux()
    config = OptimizerConfig(name=OptimizerName(name), weight_decay=0.1)
    optimizers = PhaseOptimizer(model, config, seed=0).optimizers
    assert len(optimizers) == expected
    held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    for group in (g for o in optimizers for g in o.param_groups):
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}


def test_adamw_follows_torchs_and_the_schedule_scales_it() -> None:
    model, reference = nn.Linear(4, 4), nn.Linear(4, 4)
    reference.load_state_dict(model.state_dict())
    ours = PhaseOptimizer(model, OptimizerConfig(lr=1e-2), seed=0)
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2 * 0.5, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        for m in (model, reference):
            m.zero_grad()
            m(torch.ones(2, 4)).square().sum().backward()
        ours.step(lr_factor=0.5)
        theirs.step()
    torch.testing.assert_close(model.weight, reference.weight, rtol=1e-6, atol=1e-7)


def test_clipping_is_by_global_norm() -> None:
    model = nn.Linear(4, 4)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    norm = PhaseOptimizer(model, OptimizerConfig(max_grad_norm=1.0), seed=0).clip()
    assert norm.item() == pytest.approx(3 * math.sqrt(20))
    assert torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    ).norm().item() == pytest.approx(1)


def test_ema_halves_after_its_half_life_and_gives_the_weights_back() -> None:
    model = nn.Linear(2, 2)
    start = model.weight.detach().clone()
    ema = EMA(model, half_life_images=100)
    with torch.no_grad():
        model.weight.add_(1.0)
    for _ in range(10):
        ema.update(images=10)
    torch.testing.assert_close(ema.average["weight"], start + 0.5)
    trained = model.weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(model.weight.detach(), start + 0.5)
    assert torch.equal(model.weight, trained)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """One segment by plain matrix products, which torch's counter has formulas for."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return (torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_flops_equal_torchs_counter(shape: object, guidance: bool) -> None:
    model = random_flux(guidance_embed=guidance)
    for block in model.blocks():
        block.attention = dense_attention
    z, t, cond = pack([random_sample(shape)], guidance)  # type: ignore[arg-type]
    with FlopCounterMode(display=False) as counter:
        predict_velocity(model, z, t, cond)
    ours = forward_flops(model.config).sample(shape)  # type: ignore[arg-type]
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_flops_of_a_training_sample_at_12b_are_the_yardsticks() -> None:
    """496 TFLOP: one 1024² edit with one 1024² context; 223: 1024² text-to-image (DESIGN, derived there by hand)."""
    from kontext_train.models.config import FluxConfig
    from kontext_train.models.sequence import SampleShape

    flops = forward_flops(FluxConfig(guidance_embed=True))
    edit = SampleShape(512, (64, 64), ((64, 64),))
    assert 3 * flops.sample(edit) / 1e12 == pytest.approx(496, rel=0.01)
    assert 3 * flops.sample(SampleShape(512, (64, 64))) / 1e12 == pytest.approx(223, rel=0.01)
    assert flops.per_token_pair * edit.tokens**2 / flops.sample(edit) == pytest.approx(0.32, abs=0.01)


def test_flops_that_count_attention_as_causal_would_be_seen() -> None:
    shape = SHAPES[2]
    flops = forward_flops(TINY)
    causal = flops.sample(shape) - flops.per_token_pair * shape.tokens**2 // 2
    assert causal != pytest.approx(flops.sample(shape), rel=0.01)


def test_metrics_survive_a_torn_last_line_and_draw(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert [r["step"] for r in read_metrics(file)] == [1, 2]
    draw_loss(file, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: OptimizerConfig(lr=0), r"optimizer\.lr=0"),
        (lambda: OptimizerConfig(weight_decay=-1), r"optimizer\.weight_decay=-1"),
        (lambda: ScheduleConfig(warmup_steps=-1), r"schedule\.warmup_steps=-1"),
        (lambda: EMAConfig(half_life_images=-1), r"ema\.half_life_images=-1"),
    ],
)
def test_bad_values_are_refused_by_key(make: object, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        make()  # type: ignore[operator]
