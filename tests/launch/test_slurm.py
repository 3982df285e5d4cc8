"""Jobs on a real Slurm: preempted, bereft of a node, in arrays and in chains, they end as if nothing had happened."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra import initialize_config_module

from kontext_train.config import register_schemas
from kontext_train.errors import ConfigError
from kontext_train.evaluation.trained import resolve
from kontext_train.objectives.config import FlowMatchingConfig
from launch import runs
from launch.slurm.chain import Stage
from launch.slurm.submission import Job, create
from launch.slurm.submit import Request, _jobs, _roles, parser
from launch.slurm.submit import main as submit_main
from launch.status import report
from launch.sweep import table
from tests.launch.cluster import Cluster, until
from tests.launch.conftest import OPTIONS, PATIENCE_S, ROOT, Straight, same, wait_for_step, weights
from tests.runs import SMALL, compose_config


def submit(*arguments: str, env: Mapping[str, str] | None = None) -> None:
    """python -m launch.slurm.submit, in this process. SystemExit with its status if it refuses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["submit", "--cpu-ranks=1", "--time=20", *arguments])
        for key, value in (env or {}).items():
            patch.setenv(key, value)
        submit_main()


def job_id(run_dir: Path, job: str = "0") -> str:
    return (run_dir / "launch" / "0001" / "jobs" / job / "job_id").read_text().strip()


def output(run_dir: Path, job: str = "0") -> str:
    return (run_dir / "launch" / "0001" / "jobs" / job / "output.log").read_text()


def small(shards: Path) -> list[str]:
    """Three steps with no say about the learning rate."""
    return [*(o for o in SMALL if not o.startswith("optimizer.lr")), f"data.train={shards}", "run.steps=3"]


@dataclass(slots=True)
class Background:
    """Jobs that run on n4 while other tests go on."""

    sweep: Path
    chain: Path
    broken: Path  # a chain whose first stage fails


@pytest.fixture(scope="module")
def background(slurm: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Background:
    folder = tmp_path_factory.mktemp("background")
    made = Background(folder / "sweep", folder / "chain", folder / "broken")
    (folder / "chain.yaml").write_text(CHAIN)
    (folder / "env.sh").write_text("export OF_ENV=environment\nSRUN=(--export=ALL,OF_SRUN=options)\n")
    (folder / "broken.sh").write_text("export NCCL_DEBUG=VERBOSE\n")
    options = ("--sbatch=--nodelist=n4", *small(shards), "--max-restarts=0")
    chain = f"--chain={folder}/chain.yaml"
    for arguments in (
        (chain, f"--env={folder}/env.sh", f"run.dir={made.chain}"),
        (chain, f"--env={folder}/broken.sh", f"run.dir={made.broken}"),
        ("-m", "--at-once=1", SWEPT, f"run.dir={made.sweep}"),
    ):
        submit(*options, *arguments, env=slurm.env)
    return made


SWEPT = "optimizer.lr=1e30,1e-2"
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
        (["checkpoint.folder=s3://bucket"], "checkpoint.folder='s3://bucket': is a URL, which job scripts cannot look"),
        (["-m", "run.seed=0,1", "checkpoint.folder=/shared"], "checkpoint.folder='/shared': is the folder of two jobs"),
        ([f"run.dir={ROOT}"], "is the checkout, of which each submission keeps a copy"),
        (["-m", "run.steps=1,0"], "run.steps=0: must be at least 1"),
        ([], "PATH='': has no sbatch. Submit on a login node"),
        (["--env=nowhere.sh"], "--env='nowhere.sh': must be a file"),
        (["data.train=kontext_train/conf"], "kontext_train/conf': "),
        (["--cpu-ranks=0"], "--cpu-ranks=0: must be at least 1"),
        (["-m", "--at-once=0"], "--at-once=0: must be at least 1"),
        (["--at-once=2"], "--at-once=2: is of a sweep's members"),
        (["--max-restarts=-1"], "--max-restarts=-1: must be at least 0"),
        (["--save-s=1200"], "--save-s=1200: must be below --time=20"),
        (["--time=0-01:30", "--save-s=5400"], "--save-s=5400: must be below --time=0-01:30"),
        (["--sbatch=--nodes=2"], "--sbatch='--nodes=2': is set by submit itself"),
        (["--sbatch=-N2"], "--sbatch='-N2': is set by submit itself"),
        (["--sbatch=--sig=USR2@9"], "--sbatch='--sig=USR2@9': is set by submit itself"),
        (["--sbatch=--gpus-per-task=1"], "--sbatch='--gpus-per-task=1': is set by submit itself"),
    ],
)
def test_what_cannot_run_is_refused_before_sbatch(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):  # no sbatch is to be found
        submit(*SMALL, f"data.train={shards}", f"run.dir={tmp_path / 'run'}", *arguments, env={"PATH": ""})
    said = capsys.readouterr().err
    assert message in said
    assert "Nothing was queued" in said
    assert not (tmp_path / "run").exists()


def test_what_a_requeue_or_a_later_stage_would_stumble_over(shards: Path, tmp_path: Path) -> None:
    """A start from the run's own checkpoint; and guidance_in, which is of the file that the first stage reads."""

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


def test_the_chain_of_the_documentation_composes(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is printed, with files of these names."""
    page = (ROOT / "docs" / "launch.md").read_text().partition("### Chains")[2]
    (tmp_path / "stages.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    line = page.partition("`python -m launch.slurm.submit --chain stages.yaml ")[2].partition("`")[0]
    sizes = {
        "vae": {"latent_channels": 16, "block_out_channels": [128, 256, 512, 512]},
        "text_encoder": {"hidden_size": 768},
        "text_encoder_2": {"d_model": 4096},
    }
    for part, config in sizes.items():
        (tmp_path / "FLUX" / part).mkdir(parents=True)
        (tmp_path / "FLUX" / part / "config.json").write_text(json.dumps(config))
    (tmp_path / "FLUX" / "flux1-dev.safetensors").touch()
    (tmp_path / "EDITS").symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    request = Request(**vars(parser().parse_intermixed_args(["--chain=stages.yaml", *line.split()])))
    register_schemas()
    with initialize_config_module("kontext_train.conf", version_base="1.3"):
        finetuned, distilled, measured = _jobs(request)[1]
    assert finetuned.config is not None
    assert distilled.config is not None
    export = f"{tmp_path}/outputs/chain/max/export.safetensors"
    given, made = finetuned.config.weights, distilled.config.weights
    assert (given.student, given.guidance_in.value) == (f"{tmp_path}/FLUX/flux1-dev.safetensors", "drop")
    assert (made.student, made.teacher, made.guidance_in.value) == (export, export, "add")
    assert f"checkpoint={tmp_path}/outputs/chain/dev/export.safetensors" in measured.command


def test_a_stage_takes_every_role_that_it_needs_from_the_export_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the stage had a frozen teacher."""
    monkeypatch.setattr(FlowMatchingConfig, "frozen", ("teacher",))
    request = Request(**vars(parser().parse_intermixed_args(["weights.student=of_the_first"])))
    register_schemas()
    with initialize_config_module("kontext_train.conf", version_base="1.3"):
        assert _roles(Stage("one"), request) == ["student", "teacher"]
        assert _roles(Stage("one", ["weights.student=pro"]), request) == ["teacher"]
        assert _roles(Stage("one", weights=[]), request) == []


@pytest.mark.slow
def test_options_that_do_not_fit_the_checkpoint_are_refused_before_sbatch(
    straight: Straight, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--dry-run", *SMALL, *OPTIONS, f"run.dir={straight.run_dir}")
    submit(*options, f"data.train={shards}")
    assert "is trained" in capsys.readouterr().out, "it fits, and has nothing left to do"
    for change, message in {
        "optimizer.lr=1e-2": "run.allow_changes=[]: does not name all that changed since",
        "data.tokens_per_pack=256": "was planned with other data settings",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            submit(*options, f"data.train={shards}", "run.steps=41", change)
        assert message in capsys.readouterr().err
    submit(*options, f"data.train={shards}", "run.steps=41", "optimizer.lr=1e-2", "run.allow_changes=[optimizer.lr]")
    assert capsys.readouterr().out == f"submit: {straight.run_dir}\n"


def test_a_folder_that_a_job_writes_is_refused_whatever_is_submitted_for(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job is of a run; what is submitted is a sweep, one of whose members has the run's folder."""
    run_dir = tmp_path / "run.seed=1"
    job = Job("0", run_dir, [], compose_config(*SMALL, f"run.dir='{run_dir}'"))
    (create(run_dir, [job], {}, None) / "jobs" / "0" / "job_id").write_text("17\n")
    (tmp_path / "squeue").write_text("#!/bin/sh\necho '17|RUNNING|None'; echo '18|PENDING|Priority'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    options = ("--dry-run", *SMALL, f"data.train={shards}", f"run.dir={tmp_path}", "-m")
    submit(*options, "run.seed=2,3")
    assert "run.seed=3" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        submit(*options, "run.seed=0,1")
    assert f"run.dir='{run_dir}': is written by job 17, RUNNING" in capsys.readouterr().err


def stand_in(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_a_chain_is_queued_whole_or_not_at_all(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stand-ins for Slurm. The user's dependency is the first stage's, and does not undo that of the others."""
    (tmp_path / "chain.yaml").write_text("stages: [{name: one}, {name: two}, {name: three}]")
    stand_in(tmp_path, "scancel", f'echo "$@" >"{tmp_path}/cancelled"')
    stand_in(tmp_path, "squeue", "")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    asked = ["--sbatch=--dependency=afterany:5", "--sbatch=--qos=high", *SMALL, f"data.train={shards}"]
    asked += [f"--chain={tmp_path}/chain.yaml", f"run.dir={tmp_path}/run"]
    count = f'echo "$@" >>"{tmp_path}/asked"; n=$(wc -l <"{tmp_path}/asked")'
    stand_in(tmp_path, "sbatch", f"{count}; echo $((n + 10))")
    submit(*asked)
    options = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    found = [[option for option in line if option.startswith("--dependency=")] for line in options]
    assert found == [["--dependency=afterany:5"], ["--dependency=afterok:11"], ["--dependency=afterok:12"]]
    assert all("--qos=high" in line for line in options)

    stand_in(tmp_path, "sbatch", f'{count}; [ "$n" -lt 6 ] || {{ echo "invalid qos" >&2; exit 1; }}; echo $((n + 10))')
    with pytest.raises(SystemExit, match="1"):
        submit(*asked)
    said = capsys.readouterr().err
    assert "submit: sbatch refused a job. Cancelling 14, 15, queued before" in said
    assert "submit: invalid qos" in said
    assert (tmp_path / "cancelled").read_text() == "14 15\n"


def test_a_queue_that_does_not_answer_is_not_an_empty_one(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job("0", tmp_path / "run", [], compose_config(*SMALL, f"run.dir={tmp_path}/run"))
    (create(tmp_path / "run", [job], {}, None) / "jobs" / "0" / "job_id").write_text("17\n")
    stand_in(tmp_path, "squeue", 'echo "Unable to contact slurm controller" >&2; exit 1')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SystemExit, match="1"):
        submit("--dry-run", *SMALL, f"data.train={shards}", f"run.dir={tmp_path}/run")
    assert "Unable to contact slurm controller" in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_that_is_preempted_and_then_loses_a_node_ends_bitwise_the_same(
    slurm: Cluster,
    background: Background,
    straight: Straight,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two nodes of three. A job of a higher partition takes one: Slurm sends the signal, the ranks save, both run to
    their ends. In the second start a node dies. The checkpoints have a folder of their own.
    """
    run_dir = tmp_path / "run"
    arguments = ("--nodes=2", "--sbatch=--exclude=n4", *straight.slow, f"run.dir={run_dir}")
    arguments += (f"checkpoint.folder={tmp_path}/saved",)
    submit(*arguments, env=slurm.env)
    number = job_id(run_dir)
    with pytest.raises(SystemExit, match="2"):
        submit(*arguments, env=slurm.env)
    assert f"is written by job {number}, " in capsys.readouterr().err

    wait_for_step(run_dir, 6)
    higher = slurm("sbatch", "--parsable", "-phigh", "-wn1", "--exclusive", "-o/dev/null", "--wrap=sleep 1").strip()
    assert slurm.finish(higher, PATIENCE_S)["JobState"] == "COMPLETED"
    until(lambda: "going on from" in output(run_dir), PATIENCE_S, lambda: output(run_dir))
    saved = runs.read(run_dir).checkpoint
    assert saved is not None
    wait_for_step(run_dir, int(saved.name.removeprefix("step_")) + 1)
    assert not same(run_dir, straight.run_dir), "it had not ended, and another step has other weights"
    assert slurm.job(number)["NodeList"] == "n[1-2]"
    slurm.kill_node("n2")
    straight.server.delay_s = 0
    ended = slurm.finish(number, PATIENCE_S)
    assert (ended["JobState"], ended["NodeList"], ended["Restarts"]) == ("COMPLETED", "n[1,3]", "2"), output(run_dir)
    assert "stopped by SIGUSR1 after step" in output(run_dir)
    assert "stopped by a signal and saved; queued again" in output(run_dir)
    starts = [line.partition("starts from ")[2] for line in output(run_dir).splitlines() if "starts from" in line]
    assert starts[0] == "scratch"
    assert [Path(start).parts[-3] for start in starts[1:]] == ["saved", "saved"]
    assert same(run_dir, straight.run_dir)
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    assert report(run_dir)[0] == f"{run_dir}: job {number}, finished"


@pytest.mark.slow
def test_a_failed_member_does_not_take_the_sweep_with_it(
    slurm: Cluster,
    background: Background,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep = background.sweep
    states = [slurm.finish(job_id(sweep, str(i)), PATIENCE_S)["JobState"] for i in range(2)]
    assert states == ["FAILED", "COMPLETED"]
    rows = [(row["member"], row["finished"]) for row in table(runs.runs_below(sweep))]
    assert rows == [("optimizer.lr=0.01", True), ("optimizer.lr=1e+30", False)]
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    told = report(sweep)
    found = [line for line in told if not line.startswith(" ")]
    assert [line.rsplit(", ")[-1] for line in found] == ["finished", "FAILED (NonZeroExitCode)"]
    assert any("gradient norm is" in line for line in told), output(sweep, "0")
    submit("-m", "--dry-run", SWEPT, *small(shards), f"run.dir={sweep}")
    assert capsys.readouterr().out == f"submit: {sweep}/optimizer.lr=1e+30\n"


@pytest.mark.slow
def test_a_chain_hands_its_weights_on(slurm: Cluster, background: Background, shards: Path) -> None:
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
    again = ("--dry-run", f"--chain={chain.parent}/chain.yaml", *small(shards), f"run.dir={chain}")
    submit(*again, env=slurm.env)  # it would go on


@pytest.mark.slow
def test_a_chain_ends_with_a_stage_that_fails(
    slurm: Cluster, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host is refused by check_host.py; what follows is cancelled and does not wait for ever."""
    chain = background.broken
    assert slurm.finish(job_id(chain, "finetune"), PATIENCE_S)["JobState"] == "FAILED"
    for name in ("sharpen", "evaluate"):
        assert slurm.finish(job_id(chain, name), 30)["JobState"] == "CANCELLED"
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    told = "\n".join(report(chain))
    assert "NCCL_DEBUG=VERBOSE must be one of" in told
    assert "FAILED (NonZeroExitCode)" in told
    assert told.count(", CANCELLED (DependencyNeverSatisfied)") == 2, told
