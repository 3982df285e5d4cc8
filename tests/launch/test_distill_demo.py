"""launch/distill_demo.sh, with a stand-in for Python: what it would run is right, and nothing of it is left running."""

from pathlib import Path

from kontext_train.objectives.config import GuidanceDistillationConfig, LaddConfig
from quickstart import distill
from tests.launch.demos import assert_ended, demo, options
from tests.runs import compose_config


def distill_demo(folder: Path, **env: str) -> tuple[int, list[list[str]]]:
    (folder / "quickstart" / "run").mkdir(parents=True)
    (folder / "quickstart" / "run" / "config.yaml").touch()
    return demo("distill_demo.sh", folder, QUICKSTART=folder / "quickstart", **env)


def test_both_stages_are_composed_as_it_starts_them(tmp_path: Path) -> None:
    status, starts = distill_demo(tmp_path)
    assert status == 0, (tmp_path / "output").read_text()
    trained = [options(start, "kontext_train.train") for start in starts if "kontext_train.train" in start]
    configs = [compose_config(*given) for given in trained]
    by_run = {Path(config.run.dir).name: config for config in configs}
    assert by_run.keys() == {"teacher", "dev", "pro"}
    dev, pro = by_run["dev"], by_run["pro"]
    assert isinstance(dev.objective, GuidanceDistillationConfig)
    assert isinstance(pro.objective, LaddConfig)
    assert dev.model.guidance_embed
    assert not pro.model.guidance_embed
    for config in (dev, pro):
        assert config.weights.teacher == config.weights.student == str(tmp_path / "out" / "teacher.safetensors")
        assert config.data.prompt_dropout == 0
    pictures, encoded = tmp_path / "out" / "one_thing", tmp_path / "out" / "encoded"
    assert pro.data.sources["text_to_image"].path == str(encoded / "one_thing")
    assert pro.data.sources["edits"].path == dev.data.train == str(encoded / "edits")
    encoding = [
        options(start, "data_tools.encode_shards")[:3] for start in starts if "data_tools.encode_shards" in start
    ]
    assert [str(pictures), "--out", str(encoded / "one_thing")] in encoding
    (regression,) = [start for start in starts if "regress" in start and "--same-noise" not in start]
    assert float(regression[regression.index("--mu") + 1]) == pro.flow.base_mu == pro.flow.max_mu
    assert (tuple(pro.objective.probabilities), pro.run.steps) == (distill.PROBABILITIES, distill.CONTROL_STEPS)
    learned = [start[start.index("--pictures") + 1 :] for start in starts if "regress" in start]
    assert sorted(learned, key=len) == [
        [str(pictures)],
        [str(tmp_path / "out" / "targets"), "--same-noise"],
    ]
    assert starts[-1][:3] == ["-m", "quickstart.distill", "evaluate"]


def test_a_failure_of_ladd_ends_what_runs_beside_it(tmp_path: Path) -> None:
    status, starts = distill_demo(tmp_path, HANGS="stage=guidance_distillation", FAILS="stage=ladd")
    assert status == 3
    assert_ended(tmp_path)
    assert not any("evaluate" in start for start in starts)
