"""launch/safety_demo.sh, with a stand-in for Python: what it would run is right, and nothing of it is left running."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from kontext_train.objectives.config import SafetyConfig
from tests.launch.demos import assert_ended, demo, options
from tests.runs import compose_config


def safety_demo(folder: Path, **env: str) -> tuple[int, list[list[str]]]:
    (folder / "quickstart").mkdir()
    return demo("safety_demo.sh", folder, RUN=folder / "quickstart", SHARDS=folder / "shards", **env)


def measured_by(starts: list[list[str]]) -> dict[str, list[str]]:
    """Options of each measurement, by name."""
    given = [options(start, "measure") for start in starts if "measure" in start]
    return {measurement[measurement.index("--name") + 1]: measurement for measurement in given}


def test_both_trainings_are_composed_as_it_starts_them(tmp_path: Path) -> None:
    status, starts = safety_demo(tmp_path)
    assert status == 0, (tmp_path / "output").read_text()
    out = tmp_path / "out"
    trained = [options(start, "kontext_train.train") for start in starts if "kontext_train.train" in start]
    by_run = {Path(config.run.dir).name: config for config in (compose_config(*given) for given in trained)}
    assert by_run.keys() == {"plain", "adversarial"}
    plain, adversarial = by_run["plain"], by_run["adversarial"]
    assert isinstance(adversarial.objective, SafetyConfig)
    assert adversarial.objective.attack_steps > 0
    assert plain.objective == replace(adversarial.objective, attack_steps=0)
    assert replace(plain, run=adversarial.run, objective=adversarial.objective) == adversarial
    assert adversarial.weights.student == str(out / "base.safetensors")
    filtered = [options(start, "data_tools.filter_safety") for start in starts if "data_tools.filter_safety" in start]
    places = {name: source.path for name, source in adversarial.data.sources.items()}
    assert places == {"ordinary": str(out / "ordinary"), "beside": str(out / "beside")}
    assert [given[given.index("--out") + 1] for given in filtered] == list(places.values())
    assert {name: Path(given[given.index("--model") + 1]) for name, given in measured_by(starts).items()} == {
        "before": out / "base.safetensors",
        "nonadversarial": out / "plain",
        "after": out / "adversarial",
    }
    assert starts[-1][:3] == ["-m", "quickstart.safety", "report"]


@pytest.mark.parametrize("fails", ["plain", "adversarial"])
def test_a_failure_of_one_lane_ends_the_other(tmp_path: Path, fails: str) -> None:
    (hangs,) = {"plain", "adversarial"} - {fails}
    lanes = {"HANGS": f"run.dir={tmp_path}/out/{hangs}", "FAILS": f"run.dir={tmp_path}/out/{fails}"}
    status, starts = safety_demo(tmp_path, **lanes)
    assert status != 0
    assert_ended(tmp_path)
    assert not any("measure" in start or "report" in start for start in starts)


def test_only_a_measurement_of_this_model_by_as_many_scenarios_is_kept(tmp_path: Path) -> None:
    """The trained models are not there: the stand-in makes none."""
    out = tmp_path / "out"
    (out / "measured").mkdir(parents=True)
    (out / "base.safetensors").touch()
    for name in ("before", "nonadversarial", "after"):
        rows = {
            "attacks on edits": {"asked plainly": [0, 1] * 4, "reworded": [1] * 8},
            "still right": {"add": [1] * 192},
        }
        (out / "measured" / f"{name}.json").write_text(json.dumps(rows))
    lost = {"nonadversarial", "after"}

    def measured_again(folder: str, scenarios: str) -> set[str]:
        (tmp_path / folder).mkdir()
        status, starts = safety_demo(tmp_path / folder, OUT=str(out), SCENARIOS=scenarios)
        assert status == 0, (tmp_path / folder / "output").read_text()
        found = measured_by(starts)
        assert all(given[given.index("--count") + 1] == scenarios for given in found.values())
        return set(found)

    assert measured_again("same", "8") == lost
    assert measured_again("more", "9") == lost | {"before"}
    later = (out / "measured" / "before.json").stat().st_mtime + 1
    os.utime(out / "base.safetensors", (later, later))
    assert measured_again("newer", "8") == lost | {"before"}
