"""The proof's yardsticks: right pictures count, averages of right pictures do not, and the control sees true pairs."""

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
from kontext_train.evaluation.trained import load_trained
from kontext_train.export import ExportConfig, StorageDtype, export
from kontext_train.flow.config import SamplerConfig
from kontext_train.flow.timesteps import mu_for_tokens, sampling_schedule
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import Conditioning, latent_from_tokens, predict_velocity
from kontext_train.models.sequence import SampleShape, build_layout
from quickstart import distill, scenes
from quickstart.benchmark import picture
from quickstart.distill import Result, judged, one_thing, pairs, table, write_one_thing
from quickstart.scenes import Split
from tests.runs import run, small_config

THINGS = [one_thing(5, Split.HELDOUT_SCENES, i) for i in range(200)]


def test_truth_is_right_in_all_four_places_and_a_mean_of_places_is_wrong() -> None:
    found = judged([picture(e.target) for e in THINGS], THINGS)
    assert found.accuracy == 1
    assert found.entropy == pytest.approx(np.log(4), abs=0.02)
    assert {len(e.target.things) for e in THINGS} == {1}
    blurred = []
    for example in THINGS[:50]:
        scene, (thing,) = example.target, example.target.things
        moved = [replace(scene, things=(replace(thing, row=r, column=c),)) for r, c in scene.cells()]
        mean = np.mean([scenes.draw(s) for s in moved], axis=0).round().astype(np.uint8)
        blurred.append(torch.from_numpy(mean).permute(2, 0, 1))
    assert judged(blurred, THINGS[:50]).accuracy == 0


def test_the_interval_is_wilsons() -> None:
    """8 of 10: the textbook's 0.490 to 0.943."""
    found = Result(8, 10, {0: 8})  # type: ignore[arg-type]
    assert found.interval() == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert found.entropy == 0
    assert "| student | 4 | 0.800 | 0.490 to 0.943 | 0.000 |" in table({("student", 4): found})


def test_the_control_is_given_the_noise_that_its_pictures_were_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of the teacher from that noise is the stored picture; from other noise it is not. The plain control is
    given other noise, at the student's times.
    """
    write_one_thing(tmp_path / "things", 6)
    build_index(tmp_path / "things")
    run(small_config(tmp_path / "things", tmp_path / "run", "run.steps=2", "optimizer.lr=1e-2"))
    teacher = tmp_path / "teacher.safetensors"
    export(ExportConfig(str(tmp_path / "run"), str(teacher), dtype=StorageDtype.float32))
    generate_targets(tmp_path / "things", tmp_path / "targets", teacher, SamplerConfig(steps=1))
    trained = load_trained(teacher)
    index = ShardIndex.open(tmp_path / "targets")
    samples = [SampleReader(index, trained.transform).read(i) for i in range(6)]
    noise_NMC, x_NMC, prompts = pairs(trained, samples)
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
