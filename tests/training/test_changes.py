"""What a checkpoint's record says about options that it was written without."""

from pathlib import Path
from typing import Any

import pytest

from kontext_train.config import defaults_of, plain
from kontext_train.errors import ConfigError
from kontext_train.training.changes import check_resumable
from tests.runs import compose_config


def resumed(missing: str, *options: str) -> None:
    """A run with `options`, from a checkpoint of the time before there was objective.`missing`."""
    config = compose_config("stage=ladd", "data.train=shards", "weights.teacher=teacher", *options)
    saved: dict[str, Any] = {"config": plain(config), "plan": "a"}
    saved["config"] = saved["config"] | {"objective": dict(saved["config"]["objective"])}
    del saved["config"]["objective"][missing]
    check_resumable(Path("step_1"), saved, {"config": plain(config), "plan": "a"}, defaults_of(config))


def test_an_option_that_is_new_was_at_its_default() -> None:
    changed = r"backward_simulation \(was 0\.0, now 1\.0\)"
    with pytest.raises(ConfigError, match=rf"run\.allow_changes=\[\]: does not name all .*: objective\.{changed}"):
        resumed("backward_simulation", "objective.backward_simulation=1")
    resumed("backward_simulation")
    resumed("backward_simulation", "objective.backward_simulation=1", "run.allow_changes=[objective]")
    resumed("renoise_mean")
