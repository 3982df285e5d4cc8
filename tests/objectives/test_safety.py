"""The attack stays in its ball and finds something; the loss is the one that the paper's formulas say."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kontext_train.data.batch import PackedBatch
from kontext_train.data.config import DataConfig
from kontext_train.data.encode import load_encoders
from kontext_train.data.transforms import Transform
from kontext_train.flow.config import ShiftConfig
from kontext_train.flow.timesteps import mu_for_tokens, sampling_schedule
from kontext_train.models.config import EncoderDtype, EncodersConfig
from kontext_train.models.flops import forward_flops
from kontext_train.models.kontext import Conditioning, predict_velocity
from kontext_train.models.sequence import SampleShape, build_layout
from kontext_train.objectives.concept_list import Concept
from kontext_train.objectives.concepts import ConceptBank, EncodedConcept, encode_concepts
from kontext_train.objectives.conditioning_attack import Budget, attacked
from kontext_train.objectives.config import SafetyConfig
from kontext_train.objectives.safety import Safety
from kontext_train.randomness import VisitRandom
from quickstart.make_dataset import to_png
from tests.models.flux_cases import random_flux
from tests.runs import ENCODERS, small_config

RANDOM, VISITS = VisitRandom(0), [7, 8]
WAYS = [8, 7]  # visits whose way leads to the goal and to the anchor


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    torch.manual_seed(0)
    return random_flux(small_config(Path(), Path()).model)


@pytest.fixture(scope="module")
def other(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(3)
    return random_flux(model.config)  # type: ignore[arg-type]


def conditioning() -> Conditioning:
    torch.manual_seed(1)
    layout = build_layout([SampleShape(12, (2, 2), ((2, 3),)), SampleShape(12, (2, 3))])
    return Conditioning(torch.randn(24, 64), torch.randn(2, 64), torch.randn(6, 64), layout)


def distance(model: torch.nn.Module, cond: Conditioning, wanted: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (predict_velocity(model, z, torch.full((2,), 0.9), cond) - wanted).square().sum()


def test_the_attack_stays_within_its_budget_and_gains_with_steps(model: torch.nn.Module) -> None:
    cond, budget = conditioning(), Budget(0.3, 0.2, 0.1)
    z, wanted = torch.randn(10, 64), torch.randn(10, 64)
    found = {}
    for steps in (0, 2, 10):
        told = attacked(lambda c: distance(model, c, wanted, z), cond, budget, steps, RANDOM, VISITS)
        for part, allowed in (("txt_TE", 0.3), ("vec_SP", 0.2), ("context_KC", 0.1)):
            clean, moved = getattr(cond, part), getattr(told, part)
            share = (moved - clean).norm(dim=1) / clean.norm(dim=1)
            assert share.max() <= allowed * (1 + 1e-5)
            assert share.min() > 0
            assert not moved.requires_grad
        found[steps] = float(distance(model, told, wanted, z).detach())
    assert found[10] < found[2] < found[0]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_has_no_budget_stays_as_it_is_and_samples_do_not_disturb_each_other(model: torch.nn.Module) -> None:
    cond, z, wanted = conditioning(), torch.randn(10, 64), torch.randn(10, 64)
    told = attacked(lambda c: distance(model, c, wanted, z), cond, Budget(0.3, 0, 0), 3, RANDOM, VISITS)
    assert torch.equal(told.vec_SP, cond.vec_SP)
    assert torch.equal(told.context_KC, cond.context_KC)
    other = wanted.clone()
    other[4:] = 5.0  # the second sample's
    again = attacked(lambda c: distance(model, c, other, z), cond, Budget(0.3, 0, 0), 3, RANDOM, VISITS)
    torch.testing.assert_close(again.txt_TE[:12], told.txt_TE[:12])
    assert not torch.allclose(again.txt_TE[12:], told.txt_TE[12:])


def test_text_to_image_is_not_moved_by_a_budget_for_context_but_takes_the_same_passes(model: torch.nn.Module) -> None:
    """As many as a pack with contexts takes: on another rank of a sharded model that one would wait for them."""
    torch.manual_seed(1)
    layout = build_layout([SampleShape(12, (2, 2)), SampleShape(12, (2, 3))])
    alone = Conditioning(torch.randn(24, 64), torch.randn(2, 64), torch.zeros(0, 64), layout)
    z, wanted, passes, back = torch.randn(10, 64), torch.randn(10, 64), [0, 0], [0, 0]

    def counted(number: int, cond: Conditioning) -> torch.Tensor:
        passes[number] += 1
        loss = distance(model, cond, wanted, z)
        loss.register_hook(lambda _: back.__setitem__(number, back[number] + 1))
        return loss

    budget = Budget(0, 0, 0.1)
    told = attacked(lambda c: counted(0, c), alone, budget, 3, RANDOM, VISITS)
    with_context = attacked(lambda c: counted(1, c), conditioning(), budget, 3, RANDOM, VISITS)
    assert torch.equal(told.txt_TE, alone.txt_TE)
    assert torch.equal(told.vec_SP, alone.vec_SP)
    assert told.context_KC.shape == (0, 64)
    assert not torch.equal(with_context.context_KC, conditioning().context_KC)
    assert passes == back == [3, 3]


def stage(model: torch.nn.Module, reference: torch.nn.Module, goal: bool = False, **options: float) -> Safety:
    """goal: other than the concept's own prompt."""
    cond, encoded = conditioning(), []
    for i, shape in enumerate(cond.layout.shapes):
        context = cond.context_KC if shape.contexts else cond.context_KC[:0]
        txt_3LE, vec_3P = torch.randn(3, 12, 64), torch.randn(3, 64)
        if not goal:
            txt_3LE[2], vec_3P[2] = txt_3LE[0], vec_3P[0]
        encoded.append(EncodedConcept(shape, txt_3LE, vec_3P, context, turned=i == 1))
    config = SafetyConfig(concepts="list", **options)  # type: ignore[arg-type]
    return Safety(model, reference, ConceptBank(encoded, torch.device("cpu")), config, ShiftConfig())


def batch() -> PackedBatch:
    return PackedBatch(torch.randn(10, 64), conditioning(), VISITS, torch.full((2,), 0.5), ["", ""])


@pytest.mark.parametrize(("attack_steps", "concepts_per_pack"), [(0, 2), (4, 2), (4, 1)])
def test_flops_are_what_torch_counts(
    model: torch.nn.Module, other: torch.nn.Module, attack_steps: int, concepts_per_pack: int
) -> None:
    """Concepts included, relative to a forward pass of the pack. The control is an attack of one step more."""
    options = {"attack_steps": attack_steps, "concepts_per_pack": concepts_per_pack}
    safety, pack, forward = stage(model, other, **options), batch(), forward_flops(model.config)  # type: ignore[arg-type]
    safety.concepts.encoded = safety.concepts.encoded[1:]  # of one size, whichever is drawn
    with FlopCounterMode(display=False) as once, torch.no_grad():
        predict_velocity(model, pack.x_MC, torch.full((2,), 0.5), pack.cond)
    with FlopCounterMode(display=False) as counter:
        loss = safety.loss("student", pack, RANDOM, 0).value
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    counted, shapes = counter.get_total_flops() / once.get_total_flops(), pack.layout.shapes
    assert safety.flops(shapes, forward, 3) / forward.samples(shapes) == pytest.approx(counted, rel=0.02)
    safety.config.attack_steps += 1
    assert safety.flops(shapes, forward, 3) / forward.samples(shapes) > 1.05 * counted


def test_a_student_that_is_the_reference_keeps_everything_and_has_the_concept(model: torch.nn.Module) -> None:
    loss = stage(model, model, attack_steps=0).loss("student", batch(), RANDOM, 0)
    assert loss.metrics["retain"] == 0
    assert loss.metrics["distance_to_concept"] == 0
    assert loss.metrics["suppress"] == pytest.approx(float(loss.metrics["distance_of_anchor"]))
    assert loss.metrics["suppress"] > 0


def test_the_anchor_is_the_prompt_given_or_the_concept_turned_round(model: torch.nn.Module) -> None:
    """Worked out once more, concept by concept: the target of the second is v(∅) - η (v(c) - v(∅))."""
    torch.manual_seed(3)
    other = random_flux(model.config)  # type: ignore[attr-defined]
    safety = stage(other, model, attack_steps=0, negative_guidance=2.0)
    revival = safety._revive(batch(), RANDOM)
    pack = safety.concepts.pack(VISITS, RANDOM)
    anchor = replace(revival.cond, txt_TE=pack.anchor.txt_TE, vec_SP=pack.anchor.vec_SP)
    with torch.no_grad():
        to_concept = predict_velocity(model, revival.z_MC, revival.t_S, revival.cond)
        to_anchor = predict_velocity(model, revival.z_MC, revival.t_S, anchor)
    turned = pack.turned_S[pack.concept.layout.sample_of_target_M][:, None]
    expected = torch.where(turned, 3 * to_anchor - 2 * to_concept, to_anchor)
    torch.testing.assert_close(revival.benign_MC, expected)
    loss = safety.loss("student", batch(), RANDOM, 0)
    error = predict_velocity(other, revival.z_MC, revival.t_S, revival.cond) - expected
    means = [part.square().mean() for part in error.split(pack.concept.layout.target_lengths)]
    assert loss.metrics["suppress"] == pytest.approx(float(sum(means) / 2), rel=1e-5)


def test_the_attack_is_after_the_goal_and_leads_from_the_prompt(model: torch.nn.Module) -> None:
    safety = stage(model, model, goal=True, attack_steps=0)
    revival, pack = safety._revive(batch(), RANDOM), safety.concepts.pack(VISITS, RANDOM)
    assert torch.equal(revival.cond.txt_TE, pack.concept.txt_TE)
    assert not torch.equal(pack.goal.txt_TE, pack.concept.txt_TE)
    with torch.no_grad():
        shown_MC = predict_velocity(model, revival.z_MC, revival.t_S, pack.goal)
    torch.testing.assert_close(revival.revived_MC, shown_MC)
    attacking = stage(model, model, goal=True, attack_steps=10).loss("student", batch(), RANDOM, 0)
    calm = stage(model, model, goal=True, attack_steps=0).loss("student", batch(), RANDOM, 0)
    assert attacking.metrics["distance_to_concept"] < 0.9 * calm.metrics["distance_to_concept"]


def test_gradients_reach_the_student_alone_and_not_through_the_attack(model: torch.nn.Module) -> None:
    torch.manual_seed(3)
    student = random_flux(model.config)  # type: ignore[attr-defined]
    safety = stage(student, model, attack_steps=2, context_budget=0.1)
    torch.manual_seed(4)
    given = batch()
    safety.loss("student", given, RANDOM, 0).value.backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    revival = safety._revive(given, RANDOM)  # as a constant
    safety._revive = lambda *_: revival  # type: ignore[method-assign]
    student.zero_grad()
    safety.loss("student", given, RANDOM, 0).value.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, found[name], msg=name)


def test_the_loss_is_what_is_kept_and_the_weighted_suppression(model: torch.nn.Module, other: torch.nn.Module) -> None:
    safety, given = stage(other, model, attack_steps=0, suppress_weight=3.0), batch()
    loss = safety.loss("student", given, RANDOM, 0)
    layout = given.layout
    t_S, noise_MC = safety._times_and_noise("", layout, VISITS, 64, RANDOM)
    t_M1 = t_S[layout.sample_of_target_M][:, None]
    z_MC = (1 - t_M1) * given.x_MC + t_M1 * noise_MC
    with torch.no_grad():
        apart_MC = predict_velocity(other, z_MC, t_S, given.cond) - predict_velocity(model, z_MC, t_S, given.cond)
    retain = float(sum(part.square().mean() for part in apart_MC.split(layout.target_lengths)) / 2)
    assert retain > 0
    assert loss.metrics["retain"] == pytest.approx(retain, rel=1e-5)
    assert float(loss.value.detach()) == pytest.approx(retain + 3 * float(loss.metrics["suppress"]), rel=1e-5)


def test_the_attack_is_on_the_student_as_it_is_with_each_part_s_own_budget(
    model: torch.nn.Module, other: torch.nn.Module
) -> None:
    """Done once more with losses written out; the controls are another model's, and no attack."""
    options = {"text_budget": 0.3, "pooled_budget": 0.2, "context_budget": 0.1}
    revival = stage(other, model, goal=True, attack_steps=5, **options)._revive(batch(), RANDOM)
    clean = stage(other, model, goal=True, attack_steps=0, **options)._revive(batch(), RANDOM)

    def missed(attacked_model: torch.nn.Module, told: Conditioning) -> torch.Tensor:
        found_MC = predict_velocity(attacked_model, clean.z_MC, clean.t_S, told)
        return (found_MC - clean.revived_MC).square().mean(dim=1).sum()

    expected, of_reference = (
        attacked(lambda c, m=m: missed(m, c), clean.cond, Budget(0.3, 0.2, 0.1), 5, RANDOM, VISITS)  # type: ignore[misc]
        for m in (other, model)
    )
    for part in ("txt_TE", "vec_SP", "context_KC"):
        torch.testing.assert_close(getattr(revival.cond, part), getattr(expected, part))
        if part != "context_KC":  # this batch has none
            assert not torch.allclose(getattr(of_reference, part), getattr(expected, part))
    with torch.no_grad():
        assert missed(other, revival.cond) < 0.95 * missed(other, clean.cond)


def test_the_way_to_t_ends_at_what_the_reference_makes_of_goal_or_anchor(
    model: torch.nn.Module, other: torch.nn.Module
) -> None:
    """Of the goal where the visit's draw is above 0; three steps, written out."""
    safety = stage(other, model, goal=True, attack_steps=0)
    given = replace(batch(), visits=WAYS)
    pack, layout = safety.concepts.pack(WAYS, RANDOM), safety.concepts.pack(WAYS, RANDOM).concept.layout
    to_goal_S = RANDOM.normal_per_visit("concept way", WAYS) > 0
    assert to_goal_S.tolist() == [True, False]
    t_S, noise_MC = safety._times_and_noise("concept ", layout, WAYS, 64, RANDOM)
    mu_S = mu_for_tokens(torch.tensor(layout.target_lengths, dtype=torch.float32), ShiftConfig())
    times = sampling_schedule(3, mu_S)

    def made(told: Conditioning) -> torch.Tensor:
        x_MC = noise_MC
        for now_S, next_S in pairwise(times):
            with torch.no_grad():
                v_MC = predict_velocity(model, x_MC, now_S, told)
            x_MC = x_MC + (next_S - now_S)[layout.sample_of_target_M][:, None] * v_MC
        return x_MC

    first_M1 = (layout.sample_of_target_M == 0)[:, None]
    x_MC = torch.where(first_M1, made(pack.goal), made(pack.anchor))
    t_M1 = t_S[layout.sample_of_target_M][:, None]
    expected_MC = (1 - t_M1) * x_MC + t_M1 * noise_MC
    torch.testing.assert_close(safety._revive(given, RANDOM).z_MC, expected_MC, atol=1e-4, rtol=1e-4)


def test_concepts_are_encoded_as_they_are_listed(tmp_path: Path) -> None:
    """Prompt, anchor and goal in this order (another would teach the concept), and every context in its order."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(to_png(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)))
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    concepts = [
        Concept("let it be red", "make it cyan", "make it red", (a, b), None),
        Concept("a red circle", None, None, (), (32, 48)),
        Concept("red, please", "", None, (b, a), (32, 32)),
    ]
    encoders = load_encoders(
        EncodersConfig(path=str(ENCODERS), t5_tokens=16, dtype=EncoderDtype.float32), torch.device("cpu")
    )
    transform = Transform.of(DataConfig(), 16, 0)
    bank = encode_concepts(concepts, encoders, transform, torch.device("cpu"))
    assert encoders.text is not None
    texts = [("let it be red", "make it cyan", "make it red"), ("a red circle", "", "a red circle")]
    texts += [("red, please", "", "red, please")]
    for one, three in zip(bank.encoded, texts, strict=True):
        for row, text in enumerate(three):
            txt_1LE, vec_1P = encoders.text([text])
            assert vec_1P is not None
            torch.testing.assert_close(one.txt_3LE[row], txt_1LE[0])
            torch.testing.assert_close(one.vec_3P[row], vec_1P[0])
    assert [one.turned for one in bank.encoded] == [False, True, False]
    first, none, last = (one.context_KC for one in bank.encoded)
    half = len(first) // 2
    assert half > 0
    assert len(none) == 0
    assert not torch.allclose(first[:half], first[half:])
    torch.testing.assert_close(last, torch.cat([first[half:], first[:half]]))
    assert [len(one.shape.contexts) for one in bank.encoded] == [2, 0, 2]
