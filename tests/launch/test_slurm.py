"""Jobs on a real Slurm: preempted, bereft of a node, in arrays and in chains, they end as if nothing had happened."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra import initialize_config_module

from kontext_train.errors import ConfigError
from kontext_train.evaluation.trained import load_model, read_config, resolve
from launch import runs
from launch.slurm.submission import Job
from launch.status import report
from launch.sweep import table
from tests.launch.cluster import Cluster, until
from tests.launch.conftest import ROOT, Straight
from tests.runs import SMALL

PATIENCE_S = 200  # for a whole job, on a machine that does other things too


def submitted(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.slurm.submit", "--cpu-ranks=1", "--time=20", *arguments]
    return subprocess.run(command, env=cluster.env, capture_output=True, text=True, check=False, timeout=60)


def job_id(run_dir: Path, job: str = "0") -> str:
    return (run_dir / "launch" / "0001" / "jobs" / job / "job_id").read_text().strip()


def output(run_dir: Path, job: str = "0") -> str:
    return (run_dir / "launch" / "0001" / "jobs" / job / "output.log").read_text()


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    path = resolve(run_dir)
    return {k: v.detach() for k, v in load_model(path, read_config(path), ema=False).named_parameters()}


def same(run_dir: Path, other: Path) -> bool:
    ours, theirs = weights(run_dir), weights(other)
    return all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def wait_for_step(run_dir: Path, step: int) -> None:
    until(lambda: runs.read(run_dir).step >= step, PATIENCE_S, f"{run_dir} did not reach step {step}")


def small(shards: Path) -> list[str]:
    """Three steps with no say about the learning rate."""
    return [*(o for o in SMALL if not o.startswith("optimizer.lr")), f"data.train={shards}", "run.steps=3"]


@dataclass(slots=True)
class Background:
    """Jobs that run on n6 while other tests go on."""

    sweep: Path
    chain: Path


@pytest.fixture(scope="module")
def background(slurm: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Background:
    folder = tmp_path_factory.mktemp("background")
    options = ("--sbatch=--nodelist=n6", *small(shards))
    sweep = ("-m", "--at-once=2", SWEPT, f"run.dir={folder}/sweep", "--max-restarts=0")
    (folder / "chain.yaml").write_text(CHAIN)
    (folder / "env.sh").write_text("export OF_ENV=environment\nSRUN=(--export=ALL,OF_SRUN=options)\n")
    chain = (f"--chain={folder}/chain.yaml", f"--env={folder}/env.sh", f"run.dir={folder}/chain")
    for arguments in (sweep, chain):
        done = submitted(slurm, *options, *arguments)
        assert done.returncode == 0, done.stderr
    return Background(folder / "sweep", folder / "chain")


SWEPT = "optimizer.lr=1e-3,1e30,1e-2"
CHAIN = """\
stages:
  - {name: finetune}
  - {name: sharpen, overrides: [optimizer.lr=1e-12, run.steps=1]}
  - {name: evaluate, command: "cp {export} {root}/evaluated.safetensors; ls {run}/checkpoints; echo $OF_ENV $OF_SRUN"}
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.stepz=3"], "Could not override 'run.stepz'"),
        (["run.steps=0"], "run.steps=0: must be at least 1"),
        (["--nodes=3", "parallel.dp_replicate=2"], r"parallel.dp_replicate, dp_shard, cp=(2, -1, 1)"),
        (["run.resume=none"], "run.resume='none': would end a job that is queued again"),
        (["checkpoint.folder=/shared"], "checkpoint.folder='/shared': is not looked into by job scripts"),
        ([f"run.dir={ROOT}"], "is the checkout, of which each submission keeps a copy"),
        (["-m", "run.steps=1,0"], "run.steps=0: must be at least 1"),
        ([], "PATH='': has no sbatch. Submit on a login node"),
        (["--env=nowhere.sh"], "--env='nowhere.sh': must be a file"),
    ],
)
def test_what_cannot_run_is_refused_before_sbatch(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    from launch.slurm.submit import main

    argv = ["submit", "--cpu-ranks=1", *SMALL, f"data.train={shards}", f"run.dir={tmp_path / 'run'}", *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.setenv("PATH", "")  # no sbatch to be found
        with pytest.raises(SystemExit, match="2"):
            main()
    said = capsys.readouterr().err
    assert message in said
    assert "Nothing was queued" in said
    assert not (tmp_path / "run").exists()


def test_what_a_requeue_or_a_later_stage_would_stumble_over(shards: Path, tmp_path: Path) -> None:
    """A start from the run's own checkpoint; and guidance_in, which is of the file that the first stage reads."""
    from launch.slurm.submit import Request, _jobs, parser

    def jobs(*arguments: str) -> list[Job]:
        options = ["--cpu-ranks=1", *SMALL, f"data.train={shards}", f"run.dir={tmp_path / 'run'}", *arguments]
        with initialize_config_module("kontext_train.conf", version_base="1.3"):
            return _jobs(Request(**vars(parser().parse_intermixed_args(options))))[1]

    with pytest.raises(ConfigError, match=r"run\.resume='.*step_00000005': is one of the run's own checkpoints"):
        jobs(f"run.resume={tmp_path}/run/checkpoints/step_00000005")
    (tmp_path / "chain.yaml").write_text("stages: [{name: one}, {name: two}]")
    weights = ("model.guidance_embed=true", f"weights.student={tmp_path}", "weights.guidance_in=add")
    chained = jobs(f"--chain={tmp_path}/chain.yaml", *weights)
    assert [job.config.weights.guidance_in.value for job in chained if job.config] == ["add", "require"]


@pytest.mark.slow
def test_a_preempted_job_saves_is_queued_again_and_ends_bitwise_the_same(
    slurm: Cluster, background: Background, straight: Straight, tmp_path: Path
) -> None:
    """Two nodes. A job of a higher partition takes one: Slurm sends the signal, the ranks save, both runs end."""
    run_dir = tmp_path / "run"
    arguments = ("--nodes=2", "--sbatch=--nodelist=n1,n2", *straight.slow, f"run.dir={run_dir}")
    assert submitted(slurm, *arguments).returncode == 0
    again = submitted(slurm, *arguments)
    assert again.returncode == 2
    assert "is written by job" in again.stderr
    wait_for_step(run_dir, 7)
    higher = slurm("sbatch", "--parsable", "-phigh", "-wn1", "--exclusive", "-o/dev/null", "--wrap=sleep 1").strip()
    assert slurm.finish(higher, PATIENCE_S)["JobState"] == "COMPLETED"
    assert not same(run_dir, straight.run_dir), "it had not ended, and another step has other weights"
    ended = slurm.finish(job_id(run_dir), PATIENCE_S)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output(run_dir)
    assert "stopped by SIGUSR1 after step" in output(run_dir)
    assert "stopped by a signal and saved; queued again" in output(run_dir)
    assert same(run_dir, straight.run_dir)
    (first, *_) = report(run_dir)
    assert first == f"{run_dir}: job {job_id(run_dir)}, finished"


@pytest.mark.slow
def test_a_job_that_loses_a_node_goes_on_elsewhere_and_ends_bitwise_the_same(
    slurm: Cluster, straight: Straight, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    where = "--sbatch=--exclude=n1,n2,n6"
    assert submitted(slurm, "--nodes=2", where, *straight.slow, f"run.dir={run_dir}").returncode == 0
    wait_for_step(run_dir, 7)
    assert slurm.job(job_id(run_dir))["NodeList"] == "n[3-4]"
    slurm.kill_node("n4")
    ended = slurm.finish(job_id(run_dir), PATIENCE_S)
    assert (ended["JobState"], ended["NodeList"]) == ("COMPLETED", "n[3,5]"), output(run_dir)
    starts = [line for line in output(run_dir).splitlines() if "starts from" in line]
    assert len(starts) == 2
    assert "starts from scratch" in starts[0]
    assert "checkpoints/step_" in starts[1]
    assert same(run_dir, straight.run_dir)


@pytest.mark.slow
def test_a_failed_member_does_not_take_the_sweep_with_it(slurm: Cluster, background: Background) -> None:
    sweep = background.sweep
    states = [slurm.finish(job_id(sweep, str(i)), PATIENCE_S)["JobState"] for i in range(3)]
    assert states == ["COMPLETED", "FAILED", "COMPLETED"]
    told = output(sweep, "1")
    assert "gradient norm is" in told, told
    rows = table(runs.runs_below(sweep))
    assert [(row["member"], row["finished"]) for row in rows[:2]] == [
        ("optimizer.lr=0.01", True),
        ("optimizer.lr=0.001", True),
    ]
    assert (rows[2]["member"], rows[2]["finished"]) == ("optimizer.lr=1e+30", False)
    found = [line for line in report(sweep) if not line.startswith(" ")]
    assert [line.rsplit(", ")[-1] for line in found] == ["finished", "finished", "not queued"]


@pytest.mark.slow
def test_a_sweep_is_submitted_again_for_its_unfinished_members_alone(
    slurm: Cluster, background: Background, shards: Path
) -> None:
    for i in range(3):
        slurm.finish(job_id(background.sweep, str(i)), PATIENCE_S)
    again = submitted(slurm, "-m", "--dry-run", SWEPT, *small(shards), f"run.dir={background.sweep}")
    assert again.stdout == f"submit: {background.sweep}/optimizer.lr=1e+30\n", again.stderr


@pytest.mark.slow
def test_a_chain_hands_its_weights_on(slurm: Cluster, background: Background) -> None:
    chain = background.chain
    states = [slurm.finish(job_id(chain, name), PATIENCE_S)["JobState"] for name in ("finetune", "sharpen", "evaluate")]
    assert states == ["COMPLETED"] * 3, [output(chain, "finetune"), output(chain, "sharpen"), output(chain, "evaluate")]
    first, second = weights(chain / "finetune"), weights(chain / "sharpen")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor.bfloat16().float(), rtol=0, atol=1e-9)
    assert (chain / "evaluated.safetensors").read_bytes() == (chain / "sharpen" / "export.safetensors").read_bytes()
    assert output(chain, "evaluate") == "step_00000001\nenvironment options\n"
    record = json.loads((resolve(chain / "sharpen") / "record.json").read_text())
    assert record["config"]["weights"]["student"] == f"{chain}/finetune/export.safetensors"


@pytest.mark.slow
def test_a_chain_ends_with_a_stage_that_fails(slurm: Cluster, shards: Path, tmp_path: Path) -> None:
    """Its weights cannot be loaded; what follows is cancelled and does not wait for ever."""
    (tmp_path / "chain.yaml").write_text(CHAIN)
    (tmp_path / "weights").mkdir()
    options = (*SMALL, f"data.train={shards}", "run.steps=1", f"weights.student={tmp_path}/weights", "--max-restarts=0")
    done = submitted(
        slurm, "--sbatch=--nodelist=n6", f"--chain={tmp_path}/chain.yaml", f"run.dir={tmp_path}/c", *options
    )
    assert done.returncode == 0, done.stderr
    assert slurm.finish(job_id(tmp_path / "c", "finetune"), PATIENCE_S)["JobState"] == "FAILED"
    for name in ("sharpen", "evaluate"):
        assert slurm.finish(job_id(tmp_path / "c", name), 30)["JobState"] == "CANCELLED"
    assert "weights.student" in "\n".join(report(tmp_path / "c"))
