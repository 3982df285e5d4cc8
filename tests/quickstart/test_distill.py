"""The proof's yardsticks: right pictures count, averages of right pictures do not, and the control sees true pairs."""

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.generate_targets import generate_targets
from kontext_train.data.encode import conditioning
from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import build_index
from kontext_train.data.sample import SampleReader
from kontext_train.evaluation.trained import Trained, load_trained
from kontext_train.export import ExportConfig, StorageDtype, export
from kontext_train.flow.config import SamplerConfig
from kontext_train.flow.timesteps import mu_for_tokens, sampling_schedule
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import Conditioning, latent_from_tokens, predict_velocity
from kontext_train.models.sequence import SampleShape, build_layout
from quickstart import bars, distill, scenes
from quickstart.benchmark import picture
from quickstart.distill import (
    CONTROLS,
    STUDENT_STEPS,
    TEACHER_STEPS,
    Cost,
    Guidance,
    Result,
    few_steps,
    judged,
    noise_of,
    one_thing,
    questions,
    summarised,
    table,
    tokens,
    write_one_thing,
)
from quickstart.scenes import Example, Split
from tests.runs import run, small_config

QUARTERS = (0.25, 0.25, 0.25, 0.25)
THINGS = [one_thing(5, Split.HELDOUT_SCENES, i) for i in range(200)]


def test_truth_is_right_in_all_four_places_and_a_mean_of_places_is_wrong() -> None:
    found = judged([picture(e.target) for e in THINGS], THINGS)
    assert found.accuracy == 1
    assert distill.entropy(sum(found.places.values(), Counter[int]())) == pytest.approx(np.log(4), abs=0.02)
    assert {len(e.target.things) for e in THINGS} == {1}
    assert found.off == 0
    assert found.right_N == [True] * 200
    lighter = [(picture(e.target).int() + 24).clamp(max=255).to(torch.uint8) for e in THINGS]
    # A channel is uniform over 61 values, of which those above 9 are now beyond 33; white's end at 255, which is not.
    not_white = sum(e.target.background != "white" for e in THINGS) / len(THINGS)
    assert judged(lighter, THINGS).off == pytest.approx(not_white * (1 - (40 / 61) ** 3), abs=0.07)
    blurred = []
    for example in THINGS[:50]:
        scene, (thing,) = example.target, example.target.things
        moved = [replace(scene, things=(replace(thing, row=r, column=c),)) for r, c in scene.cells()]
        mean = np.mean([scenes.draw(s) for s in moved], axis=0).round().astype(np.uint8)
        blurred.append(torch.from_numpy(mean).permute(2, 0, 1))
    assert judged(blurred, THINGS[:50]).accuracy == 0


def test_the_interval_is_wilsons() -> None:
    """8 of 10: the textbook's 0.490 to 0.943."""
    found = Result(8, 10, {"a red circle on gray": Counter({0: 8})}, off=0.0625)
    assert found.interval() == pytest.approx((0.4902, 0.9433), abs=1e-4)
    row = "| student | 4 | 0.800 (0.490 to 0.943) | 0.000 (0.000 to 0.000) | 0.062 | 0.500 (0.237 to 0.763) |"
    assert row in table({("student", 4): found}, {("student", 4): Result(5, 10)}, QUARTERS)
    assert "| 0.000 (0.000 to 0.000) | 0.062 |  |" in table({("student", 4): found}, {}, QUARTERS)


def placed(cells: Sequence[int], examples: Sequence[Example]) -> Result:
    """Of pictures that are right, with the thing of the i-th in cells[i]."""
    images = []
    for cell, example in zip(cells, examples, strict=True):
        scene, (thing,) = example.target, example.target.things
        row, column = scene.cells()[cell]
        images.append(picture(replace(scene, things=(replace(thing, row=row, column=column),))))
    return judged(images, examples)


def test_a_place_for_each_prompt_is_no_diversity() -> None:
    """Though all four are used equally often: the control. Chance draws as the data does, and misses no entropy."""
    asked = questions(768)
    assert len({example.prompt for example in asked}) == 192
    prompts = sorted({example.prompt for example in asked})
    hashed = placed([prompts.index(e.prompt) % 4 for e in asked], asked)
    assert sum(hashed.places.values(), Counter[int]()) == {0: 192, 1: 192, 2: 192, 3: 192}
    assert hashed.accuracy == 1
    assert hashed.entropy_ratio(QUARTERS) == (0, 0, 0)
    chance = placed(np.random.default_rng(0).integers(4, size=768).tolist(), asked)
    ratio, low, high = chance.entropy_ratio(QUARTERS)
    assert ratio == pytest.approx(1, abs=0.05)
    assert ratio - 0.08 < low < ratio < high < ratio + 0.08
    two = placed(np.random.default_rng(0).integers(2, size=768).tolist(), asked)
    assert two.entropy_ratio(QUARTERS)[0] == pytest.approx(0.59, abs=0.05)  # 0.541 of 0.918 nats: of 4 draws
    assert Result(0, 512).entropy_ratio(QUARTERS) == (0, 0, 0)


def test_few_draws_have_as_little_entropy_as_is_expected_of_them() -> None:
    """By simulation, of places that are not equally likely."""
    frequencies, random = (0.5, 0.3, 0.2), np.random.default_rng(0)
    for draws in (1, 2, 16):
        simulated = [distill.entropy(Counter(random.choice(3, draws, p=frequencies).tolist())) for _ in range(4000)]
        assert distill.expected_entropy(draws, frequencies) == pytest.approx(np.mean(simulated), abs=0.02)
    assert distill.frequencies_of_data() == pytest.approx(QUARTERS, abs=0.02)


def test_the_questions_are_those_of_the_data() -> None:
    """What is new is the noise: the seed of a question is its number, the seeds of targets have 63 bits."""
    every = {example.prompt for example in questions(768)}
    assert every == {example.prompt for example in map(distill.trained_thing, range(distill.ASKED))}
    assert len(every) == 192


def test_the_summary_takes_the_teachers_better_times_and_the_fewest_steps_that_pass() -> None:
    def of(right: int) -> Result:
        places = {"a": Counter(dict.fromkeys(range(4), right // 4))}
        return Result(right, 100, places, off=right / 100, right_N=[i < right for i in range(100)])

    drawn = {("teacher", n): of(right) for n, right in zip(TEACHER_STEPS, (80, 60, 56, 40, 8), strict=True)}
    own = zip(TEACHER_STEPS, (92, 56, 48, 44, 4), strict=True)
    drawn |= {("teacher, own times", n): of(right) for n, right in own}
    drawn |= {("teacher, guided", 28): of(96), ("teacher, guided", 2): of(64), ("teacher, guided", 1): of(4)}
    drawn |= {("student", 4): of(92), ("student", 2): of(88), ("student", 1): of(84)}
    drawn |= {("student, new noise", 4): of(96), ("student, new noise", 2): of(72)}
    drawn |= {("teacher, new noise", 4): of(12), ("teacher, new noise", 2): of(52)}
    drawn |= {row: of(40 + row[1]) for name in CONTROLS for row in few_steps(name)}
    edited = {("teacher", 28): Result(70, 100), ("teacher, own times", 28): Result(90, 100)}
    edited |= {("student", n): Result(80 + n, 100) for n in STUDENT_STEPS}
    edited |= {("student, new noise", n): Result(60 + n, 100) for n in (4, 2)}
    guided = Guidance(np.array([0.1, 0.3]), np.array([0.5, 0.7]), Cost(8, 0.5), Cost(16, 1.0), 0.7, 0.8, 0.9)
    summary = summarised(drawn, edited, {2.0: guided}, QUARTERS)
    assert summary == {
        "teacher": {"28": 0.92, "8": 0.6, "4": 0.56, "2": 0.52, "1": 0.08},
        "teacher_guided": {"28": 0.96, "2": 0.64, "1": 0.04},
        "student": {"4": 0.96, "2": 0.88, "1": 0.84},
        "student_steps": 2,
        "regression_student": 0.44,
        "edit_accuracy_teacher": 0.9,
        "edit_accuracy_student": 0.82,
        "position_entropy_ratio": pytest.approx(1, abs=0.05),
        "gap": [pytest.approx(0.4), pytest.approx(0.3, abs=0.02), pytest.approx(0.5, abs=0.02)],  # 40 questions of 100
        "student_below_teacher": [pytest.approx(0.04), pytest.approx(0.01), pytest.approx(0.08)],
        "student_above_control": [pytest.approx(0.44), pytest.approx(0.34, abs=0.02), pytest.approx(0.54, abs=0.02)],
        "background_off_teacher": 0.92,
        "background_off_student": 0.88,
        "dev_guidance_error": pytest.approx(0.2),
        "unguided_guidance_error": pytest.approx(0.6),
        "dev_passes": 8,
        "guided_passes": 16,
    }
    drawn |= {row: of(84) for row in few_steps("student")}
    none_passes = summarised(drawn, edited, {2.0: guided}, QUARTERS)
    assert (none_passes["student_steps"], none_passes["edit_accuracy_student"]) == (4, 0.84)
    drawn["student, new noise", 2] = of(88)
    new_noise = summarised(drawn, edited, {2.0: guided}, QUARTERS)
    assert (new_noise["student_steps"], new_noise["edit_accuracy_student"]) == (2, 0.62)


def test_students_are_sampled_by_eulers_steps_and_with_new_noise() -> None:
    euler = {("a", n): SamplerConfig(steps=n) for n in (4, 2, 1)}
    assert few_steps("a") == euler | {("a, new noise", n): SamplerConfig(steps=n, stochastic=True) for n in (4, 2)}
    assert {sampler.guidance for sampler in few_steps("a").values()} == {1}


def test_bars_are_those_that_the_demonstration_is_for() -> None:
    good = {
        "teacher": {"28": 0.9, "2": 0.5},
        "student": {"2": 0.86},
        "student_steps": 2,
        "regression_student": 0.8,
        "edit_accuracy_teacher": 0.95,
        "edit_accuracy_student": 0.93,
        "position_entropy_ratio": 0.95,
        "dev_guidance_error": 0.0099,
        "unguided_guidance_error": 0.03,
        "dev_passes": 8,
        "guided_passes": 16,
    }
    assert all(bar.met for bar in distill.judged_by(good))
    worse = {
        "teacher": [{"28": 0.84, "2": 0.5}, {"28": 0.9, "2": 0.66}],
        "student": [{"2": 0.84}, {"2": 0.79}],
        "position_entropy_ratio": [0.89],
        "edit_accuracy_student": [0.91],
        "dev_guidance_error": [0.0101],
        "dev_passes": [9],
    }
    for key, values in worse.items():
        for value in values:
            assert not all(bar.met for bar in distill.judged_by(good | {key: value})), (key, value)
    text = bars.table([bars.at_least("a", np.float64(0.5), 0.4), bars.at_most("b", 0.5, 0.4)])
    assert "| a | 0.5 | ≥ 0.4 | met |\n| b | 0.5 | ≤ 0.4 | missed |\n" in text


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("things")
    write_one_thing(folder / "shards", 6)
    build_index(folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="module")
def teacher(things: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    run(small_config(things, folder / "run", "run.steps=2", "optimizer.lr=1e-2"))
    export(ExportConfig(str(folder / "run"), str(folder / "teacher.safetensors"), dtype=StorageDtype.float32))
    return folder / "teacher.safetensors"


def test_evaluation_of_small_models(
    things: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is there and measured; guidance takes two passes a step where the student of it takes one. Only the
    row that says so is guided.
    """
    made: list[SamplerConfig] = []

    def generate(trained: Trained, examples: Sequence[Example], sampler: SamplerConfig) -> list[torch.Tensor]:
        made.append(sampler)
        return generate_as_it_is(trained, examples, sampler)

    generate_as_it_is = distill.generate
    monkeypatch.setattr(distill, "generate", generate)
    run(small_config(things, tmp_path / "dev", "run.steps=1", "model.guidance_embed=true"))
    weights = {name: parameter.detach() for name, parameter in load_trained(teacher).model.named_parameters()}
    for name in CONTROLS:
        distill.write_whole(weights, tmp_path / f"{name}.safetensors", {})
    arguments = Namespace(out=tmp_path, teacher=teacher, student=teacher, dev=tmp_path / "dev", samples=4)
    summary = distill.evaluate(arguments)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert (summary["dev_passes"], summary["guided_passes"]) == (8, 16)
    assert [s.steps for s in made if s.guidance == distill.GUIDANCE] == [28, 2, 1]
    assert [s.guidance for s in made if s.guidance not in (1, distill.GUIDANCE)] == [2, 3, 4]
    assert (
        sum(s.stochastic for s in made) == 2 * 2 * 3 + 2
    )  # 4 and 2 steps, pictures and edits, student and controls; the teacher
    assert summary["student_steps"] == 1  # as bad as its teacher
    assert summary["edit_accuracy_teacher"] == summary["position_entropy_ratio"] == 0
    assert 0 != summary["dev_guidance_error"] != summary["unguided_guidance_error"] != 0
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "table.md").read_text().split("\n")
    ]
    judged_on_edits = {(row[0], row[1]) for row in rows if len(row) == 6 and row[5].startswith("0.000 (")}
    few = {(row[0], str(row[1])) for name in ("student", *CONTROLS) for row in few_steps(name)}
    assert judged_on_edits == few | {("teacher", "28"), ("teacher, own times", "28")}
    assert [row[3:5] for row in rows if len(row) == 10 and row[0] in "234"] == [["8", "16"]] * 3
    assert (tmp_path / "pictures.png").stat().st_size > 0


def test_a_control_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And there only for those settings and that teacher."""
    path, made_of = tmp_path / "regression.safetensors", {"mu": "0.7", "teacher": "a"}

    def killed(weights: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(distill, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            distill.write_whole({}, path, made_of)
    assert not distill.is_made_of(path, made_of)
    distill.write_whole({"a": torch.zeros(1)}, path, made_of)
    assert distill.is_made_of(path, made_of)
    assert not distill.is_made_of(path, made_of | {"teacher": "b"})


def test_the_control_is_given_the_noise_that_its_pictures_were_made_from(
    things: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of the teacher from that noise is the stored picture; from other noise it is not. The plain control is
    given other noise, at the student's times.
    """
    generate_targets(things, tmp_path / "targets", teacher, SamplerConfig(steps=1))
    trained = load_trained(teacher)
    index = ShardIndex.open(tmp_path / "targets")
    samples = [SampleReader(index, trained.transform).read(i) for i in range(6)]
    x_NMC, prompts = tokens(trained, samples), [raw.prompt for raw in samples]
    noise_NMC = noise_of(trained, samples, x_NMC)
    assert x_NMC.shape == noise_NMC.shape == (6, 4, 64)
    layout = build_layout([SampleShape(12, (2, 2))] * 6)

    def made(noise: torch.Tensor) -> torch.Tensor:
        z_MC = noise.flatten(0, 1)
        cond = conditioning(prompts, [], layout, trained.encoders, z_MC)
        x_MC = z_MC - predict_velocity(trained.model, z_MC, torch.ones(6), cond)
        latents = torch.stack([latent_from_tokens(x, 2, 2) for x in x_MC.split(4)])
        return trained.encoders.autoencoder.decode(latents).int()

    stored = torch.stack([torch.as_tensor(np.asarray(raw.target)).permute(2, 0, 1) for raw in samples]).int()
    assert (made(noise_NMC) - stored).abs().max() <= 1
    assert (made(noise_NMC.flip(0)) - stored).abs().float().mean() > 5

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(model: Flux, z_MC: torch.Tensor, t_S: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        seen.append((z_MC, t_S))
        return predict_velocity(model, z_MC, t_S, cond)

    monkeypatch.setattr(distill, "predict_velocity", watched)
    control = distill.regressed(trained, tmp_path / "targets", 1, same_noise=True)
    ((z_MC, t_S),) = seen
    assert t_S.unique().tolist() == [1]
    assert all(any(torch.equal(z, noise) for noise in noise_NMC) for z in z_MC.split(4))
    assert not torch.equal(control["img_in.weight"], load_trained(teacher).model.img_in.weight)
    seen.clear()
    distill.regressed(trained, tmp_path / "targets", 1, same_noise=False)
    ((z_MC, t_S),) = seen
    mu = mu_for_tokens(torch.tensor(4), trained.shift)
    assert set(t_S.tolist()) == set(sampling_schedule(4, mu)[:-1].tolist())
    assert not any(torch.equal(z, noise) for z in z_MC.split(4) for noise in noise_NMC)
