"""launch/distill_demo.sh, with a stand-in for Python: what it would run is right, and nothing of it is left running."""

import json
import os
import subprocess
from pathlib import Path

from kontext_train.objectives.config import GuidanceDistillationConfig, LaddConfig
from quickstart import distill
from tests.launch.cluster import until
from tests.launch.conftest import ROOT
from tests.launch.leftovers import command_line
from tests.runs import compose_config

STAND_IN = """#!/usr/bin/env bash
python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@" >> "$LOG"
case "$*" in
  *stage=guidance_distillation*) if [ "$FAILS" ]; then sleep 600 & echo $! > "$LOG.sleeper"; wait; fi ;;
  *stage=ladd*) if [ "$FAILS" ]; then until [ -s "$LOG.sleeper" ]; do sleep 0.05; done; exit 3; fi ;;
  *evaluate*) touch "$OUT/table.md" ;;
esac
"""


def demo(folder: Path, fails: str) -> tuple[int, list[list[str]]]:
    """Exit status, and the arguments of each start of Python."""
    stand_in = folder / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    (folder / "quickstart" / "run").mkdir(parents=True)
    (folder / "quickstart" / "run" / "config.yaml").touch()
    given = {"PYTHON": stand_in, "OUT": folder / "out", "QUICKSTART": folder / "quickstart", "LOG": folder / "log"}
    env = os.environ | {name: str(path) for name, path in given.items()} | {"FAILS": fails}
    # not through pipes: what is left running would hold them open
    with (folder / "output").open("wb") as output:
        command = ["bash", str(ROOT / "launch" / "distill_demo.sh")]
        status = subprocess.run(command, env=env, stdout=output, stderr=output, timeout=100).returncode
    return status, [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def test_both_stages_are_composed_as_it_starts_them(tmp_path: Path) -> None:
    status, starts = demo(tmp_path, fails="")
    assert status == 0, (tmp_path / "output").read_text()
    trained = [start for start in starts if "kontext_train.train" in start]
    configs = [compose_config(*start[start.index("kontext_train.train") + 1 :]) for start in trained]
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
    assert pro.data.sources["text_to_image"].path == str(tmp_path / "out" / "one_thing")
    (regression,) = [start for start in starts if "regress" in start and "--same-noise" not in start]
    assert float(regression[regression.index("--mu") + 1]) == pro.flow.base_mu == pro.flow.max_mu
    assert (tuple(pro.objective.probabilities), pro.run.steps) == (distill.PROBABILITIES, distill.CONTROL_STEPS)
    learned = [start[start.index("--pictures") + 1 :] for start in starts if "regress" in start]
    assert sorted(learned, key=len) == [
        [pro.data.sources["text_to_image"].path],
        [str(tmp_path / "out" / "targets"), "--same-noise"],
    ]
    assert starts[-1][:3] == ["-m", "quickstart.distill", "evaluate"]


def test_a_failure_of_ladd_ends_what_runs_beside_it(tmp_path: Path) -> None:
    status, starts = demo(tmp_path, fails="yes")
    assert status == 3
    sleeper = int((tmp_path / "log.sleeper").read_text())
    until(lambda: not command_line(sleeper), 10, "the other lane is left running")
    assert not any("evaluate" in start for start in starts)
