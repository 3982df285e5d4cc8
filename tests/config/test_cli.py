"""What a user sees on the command line, in real processes and in-process where that shows the same."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

from kontext_train.config import check, check_relations, check_weights, with_absolute_paths
from kontext_train.errors import ConfigError
from kontext_train.export import main as export_main
from kontext_train.objectives.config import SafetyConfig
from kontext_train.overrides import check_overrides
from kontext_train.sample import main as sample_main
from kontext_train.sample import parse
from kontext_train.train import sweep_member, train
from tests.runs import SMALL, compose_config, small_config


def kontext_train(*arguments: str, processes: int | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "", "WORLD_SIZE": str(processes or 1)}
    command = [sys.executable, "-m", "kontext_train.train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]])
def test_help_and_config_answer_without_anything_heavy(arguments: list[str]) -> None:
    done = kontext_train(*arguments)
    assert done.returncode == 0, done.stderr
    assert "tokens_per_pack: 32768" in done.stdout
    assert "reduce_dtype: float32" in done.stdout
    if arguments == ["--help"]:
        assert "run.dir='outputs/lr_${optimizer.lr}'" in done.stdout
    code = (
        "import sys, kontext_train.train; print({'torch', 'numpy', 'pyarrow', 'wandb', 'diffusers'} & set(sys.modules))"
    )
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert imported.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.stepz=3", r"run\.stepz='3': stepz is no option\. Known here: allow_changes, .* Did you mean steps\?$"),
        ("optimiser.lr=1", r"optimiser\.lr='1': optimiser is no option\. Known here: .* Did you mean optimizer\?$"),
        ("objective.zzz=1", r"objective\.zzz='1': zzz is no option\. Known here: guidance\. Check the spelling$"),
        ("optimizer.lr=fast", r"optimizer\.lr='fast': Value 'fast' of type 'str' could not be converted to Float\. "),
        ("optimizer.name=adam", r"optimizer\.name='adam': Invalid value 'adam', expected one of \[adamw, muon\]\. "),
        ("model=tinyy", r"model='tinyy': is none of flux_12b, tiny\. Did you mean tiny\?$"),
        (
            "data.sources.a.path=b",
            r"\.a\.path='b': a is not there yet\. To add it: \+data\.sources\.a\.path=b$",
        ),
        ("optimizer.lr", r"argument='optimizer\.lr': .*\. It must be key=value; "),
        ("run.dir=a=b", r"argument='run\.dir=a=b': .*; quote a value that has = , "),
        ("optimizer.lr=1,2", r"arguments='optimizer\.lr=1,2': .* add --multirun to your command line\. "),
        ("~optimizer.lr", r"optimizer\.lr=None: .* does not support deletion\. "),
    ],
)
def test_what_hydra_refuses_is_told_by_key_and_with_what_to_do(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_overrides("train", [override])
    check_overrides("train", ["optimizer.lr=1e-4"])
    check_overrides("train", ["-m", override])  # Hydra's own business


@pytest.mark.parametrize("entry", ["train", "estimate"])
def test_a_typo_is_one_line_and_status_2(entry: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"kontext_train.{entry}", "run.stepz=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"kontext-{entry}: run.stepz='3': stepz is no option. ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+run.stepz=3", r"run\.stepz=3: is no option"),
        ("+anything=3", r"anything=3: is no option"),
        ("run.steps=0", r"run\.steps=0: must be at least 1"),
        ("model.num_heads=7", r"model\.num_heads=7: must divide model\.hidden_size=3072"),
        ("model.axes_dim=[16,56,55]", r"model\.axes_dim=\[16, 56, 55\]: must be three even numbers that sum to"),
        ("data.prompt_dropout=1.5", r"data\.prompt_dropout=1\.5: is a probability"),
        ("parallel.dp_shard=0", r"parallel\.dp_shard=0"),
        ("checkpoint.keep_last=0", r"checkpoint\.keep_last=0: must be at least 1"),
        ("parallel.timeout_s=0", r"parallel\.timeout_s=0"),
        ("parallel.float8_emulate=true", r"parallel\.float8_emulate=True: emulates parallel\.float8, which is none"),
        ("optimizer={name: muon, moments: int8}", r"optimizer\.moments='int8': is for AdamW"),
        ("parallel={float8: tensorwise, cpu_offload: true}", r"parallel\.float8='tensorwise': needs its scales where"),
        ("parallel.float8_min_features=0", r"parallel\.float8_min_features=0: must be at least 1"),
        ("optimizer.lr=nan", r"optimizer\.lr=nan"),
        ("+health.spike_mad=3", r"health\.spike_mad=3: is no option"),
        ("optimizer.betas=[0.9,1.5]", r"optimizer\.betas=.*1\.5.*must be at least 0 and below 1"),
        ("schedule.final_factor=-3", r"schedule\.final_factor=-3"),
        ("data.max_bad_fraction=2", r"data\.max_bad_fraction=2\.0: is a probability"),
        ("+data.sources.web.pth=x", r"data\.sources\.web\.pth='x': is no option. Known here: context_dropout"),
        ("+data.sources.web={path: x, wieght: 1}", r"data\.sources\.web\.wieght=1: is no option"),
        ("+data.sources.web=x", r"data\.sources\.web='x': must hold options of one source"),
        ("+data.sources.web={path: x, weight: much}", r"data\.sources\.web\.weight='much': has the wrong type"),
        ("+data.sources.web={path: x, weight: 0}", r"data\.sources\.web\.weight=0\.0: must be above 0"),
        ("+data.sources.web.weight=1", r"data\.sources\.web\.path='': must be given"),
        ("data=mixture", r"data\.sources\.edits\.path='': must be given"),
    ],
)
def test_bad_values_are_refused_by_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_config(override)


@pytest.mark.parametrize(
    ("override", "world", "message"),
    [
        ("data.train=/nowhere", 1, r"data\.train='/nowhere': must be a folder of indexed shards"),
        ("data.validation=/nowhere", 1, r"data\.validation='/nowhere': must be a folder"),
        ("encoders.path=/nowhere", 1, r"encoders\.path='/nowhere': .*vae/config\.json is missing"),
        ("weights.guidance_in=drop", 1, r"weights\.guidance_in='drop': is about weights that are read"),
        ("weights={student: x, guidance_in: add}", 1, r"guidance_in='add': contradicts model\.guidance_embed=false"),
        ("profiler={steps: 1, ranks: [0, 1]}", 1, r"profiler\.ranks=\[0, 1\]: must be some of the ranks 0 to 0"),
        ("schedule.warmup_steps=2000", 1, r"schedule\.warmup_steps=2000: must not exceed run\.steps=1000"),
        (
            "checkpoint.keep_every_steps=1500",
            1,
            r"keep_every_steps=1500: must be a multiple of run\.save_every",
        ),
        ("checkpoint.keep_best=1", 1, r"checkpoint\.keep_best=1: needs data\.validation, and run\.save_every_steps"),
        ("data.max_pixels=100", 1, r"data\.max_pixels=100: must hold at least one token of 16 x 16"),
        ("model.context_in_dim=32", 1, r"model\.context_in_dim=32: must be what the encoders in .* give, 64"),
        (
            "parallel.master_dtype=bfloat16",
            1,
            r"parallel\.master_dtype='bfloat16': rounds to nearest, .*stochastic_rounding=true",
        ),
        (
            "optimizer.stochastic_rounding=true",
            1,
            r"optimizer\.stochastic_rounding=True: is of weights kept in bfloat16",
        ),
        ("parallel.dp_replicate=3", 4, r"dp_shard, cp=\(3, -1, 1\): dp_replicate x cp = 3 must divide the 4 processes"),
        ("+data.sources.web.path=/nowhere", 1, r"data\.sources\.web\.path='/nowhere': must be a folder"),
        ("+data.sources.web={path: /, max_pixels: 99}", 1, r"data\.sources\.web\.max_pixels=99: must hold at least"),
        ("weights.teacher=x", 1, r"weights\.teacher='x': has no effect: this stage has no teacher"),
        ("weights.frozen_dtype=float32", 1, r"weights\.frozen_dtype='float32': has no effect"),
        ("discriminator_optimizer.lr=1", 1, r"discriminator_optimizer\.lr=1\.0: has no effect: this stage trains no"),
        ("parallel.dp_shard=2", 4, r"dp_shard, cp=\(1, 2, 1\): .* must be the number of processes, 4"),
    ],
)
def test_relations_are_checked(shards: Path, tmp_path: Path, override: str, world: int, message: str) -> None:
    source = "data.train=''" if "sources" in override else f"data.train={shards}"
    with pytest.raises(ConfigError, match=message):
        check(small_config(shards, tmp_path, source, override), world)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=ladd"], r"weights\.teacher=None: must be given: this stage learns from a frozen teacher"),
        (["stage=ladd", "weights.teacher=/nowhere"], r"weights\.teacher='/nowhere': must exist"),
        (["stage=ladd", "weights.reference=x"], r"weights\.reference='x': has no effect: this stage has no reference"),
        (["stage=ladd", "parallel.cp=2"], r"parallel\.cp=2: gives each rank some tokens of a picture, and the heads"),
        (["stage=ladd", "objective.discriminator.blocks=[7]"], r"discriminator\.blocks=\[7\]: must be below 2"),
        (
            ["stage=ladd", "objective.discriminator.blocks=[1,0]"],
            r"discriminator\.blocks=\[1, 0\]: must be .* ascending",
        ),
        (["stage=ladd", "objective.times=[0.5,1]"], r"objective\.times=\[0\.5, 1\.0\]: must be falling"),
        (
            ["stage=ladd", "objective.probabilities=[1]"],
            r"objective\.probabilities=\[1\.0\]: must be a probability for",
        ),
        (["stage=ladd", "discriminator_optimizer.lr=0"], r"discriminator_optimizer\.lr=0\.0: must be positive"),
        (
            ["stage=guidance_distillation", "model.guidance_embed=false", "weights.guidance_in=require"],
            r"model\.guidance_embed=False: but guidance_distillation trains a student that is told",
        ),
        (
            ["stage=ladd", "objective.student_guidance=4"],
            r"student_guidance=4\.0: has no effect: model\.",
        ),
        (["stage=ladd", "objective.backward_simulation=1.5"], r"backward_simulation=1\.5: must be a share"),
        *(
            (
                ["stage=ladd", "objective.backward_simulation=1", option],
                r"backward_simulation=1\.0: is of students that",
            )
            for option in (
                "objective.times=[0.9,0.5,0.4,0.3]",
                "objective.probabilities=[1,0,0,0]",
                "objective.probabilities=[0,0.5,0.5,0]",
            )
        ),
        (["stage=ladd", "objective.gradient_penalty_std=0.5"], r"_penalty_std=0\.5: has no effect: .*_penalty is 0"),
        (
            ["stage=ladd", "checkpoint.keep_best=1", "checkpoint.best_by=validation/loss_t3"],
            r"checkpoint\.best_by='validation/loss_t3': is the velocity's, which says nothing about a student",
        ),
        (
            ["stage=ladd", "weights.teacher=quickstart/encoders", "weights.student=null"],
            r"weights\.student=None: must be given: this stage goes on from weights that exist",
        ),
        (["stage=ladd", "data.prompt_dropout=0.1"], r"data\.prompt_dropout=0\.1: must be 0: what this stage trains"),
        (
            ["stage=guidance_distillation", "+data.sources.a={path: /, prompt_dropout: 0.2}", "data.train=''"],
            r"data\.sources\.a\.prompt_dropout=0\.2: must be 0: what this stage trains",
        ),
        (["stage=guidance_distillation", "objective.guidance=[4,2]"], r"objective\.guidance=.*: must be a lower and a"),
        (["stage=guidance_distillation", "objective.interval=[0,2]"], r"objective\.interval=.*: must be an earlier"),
    ],
)
def test_stages_check_their_roles_and_options(shards: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(small_config(shards, tmp_path, "weights.student=quickstart/encoders", *overrides), 2)


@pytest.mark.parametrize("stage", ["ladd", "guidance_distillation"])
def test_a_student_of_distillation_begins_as_its_teacher(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/tmp")
    config = with_absolute_paths(compose_config(f"stage={stage}", "weights.teacher=t.safetensors"))
    assert config.weights.student == config.weights.teacher == "/tmp/t.safetensors"
    assert compose_config(f"stage={stage}", "weights={teacher: t, student: s}").weights.student == "s"


@pytest.mark.parametrize("stage", ["ladd", "guidance_distillation"])
def test_a_mixture_keeps_the_prompts_of_distillation(stage: str) -> None:
    paths = ("data=mixture", "data.sources.edits.path=/a", "data.sources.text_to_image.path=/b")
    with pytest.raises(ConfigError, match=r"data\.sources\.text_to_image\.prompt_dropout=0\.2: must be 0"):
        check_relations(compose_config(f"stage={stage}", *paths), 1)
    check_relations(compose_config(f"stage={stage}", *paths, "data.sources.text_to_image.prompt_dropout=0"), 1)


def test_weights_to_begin_with_must_exist() -> None:
    with pytest.raises(ConfigError, match=r"weights\.student='/nowhere': must exist"):
        check_weights(compose_config("weights.student=/nowhere"))


def test_what_a_run_records_names_the_same_files_from_any_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("data=mixture", "data.sources.edits.path=a", "data.sources.text_to_image.path=s3://bucket/b")
    given += ("weights.student=w.safetensors", "checkpoint.folder=kept", "run.resume=old/step_00000001", "run.dir=out")
    monkeypatch.chdir("/tmp")
    config = with_absolute_paths(compose_config(*given, "encoders.path=../usr"))
    assert [source.path for source in config.data.sources.values()] == ["/tmp/a", "s3://bucket/b"]
    assert (config.weights.student, config.checkpoint.folder) == ("/tmp/w.safetensors", "/tmp/kept")
    assert (config.run.resume, config.encoders.path) == ("/tmp/old/step_00000001", "/tmp/../usr")
    assert (config.run.dir, config.data.train, config.data.validation) == ("out", "", None)
    others = (
        "weights.reference=r",
        "objective.concepts=c.jsonl",
        "evaluation.benchmark=b",
        "evaluation.metrics.clip=.",
    )
    config = with_absolute_paths(compose_config("stage=safety", *others))
    assert (config.weights.reference, config.evaluation.benchmark) == ("/tmp/r", "/tmp/b")
    assert isinstance(config.objective, SafetyConfig)
    assert (config.objective.concepts, config.evaluation.metrics.clip) == ("/tmp/c.jsonl", "/tmp")
    assert with_absolute_paths(compose_config("run.resume=none")).run.resume == "none"


def test_sources_come_from_a_recipe_and_from_the_command_line() -> None:
    paths = ("data.sources.edits.path=a", "data.sources.text_to_image.path=b", "+data.sources.more.path=c")
    config = compose_config("data=mixture", *paths, "+data.sources.more.weight=1", "data.sources.edits.weight=2")
    assert {name: (s.path, s.weight) for name, s in config.data.sources.items()} == {
        "edits": ("a", 2.0),
        "text_to_image": ("b", 0.3),
        "more": ("c", 1.0),
    }
    filled = config.data.of_sources()
    assert [filled[name].prompt_dropout for name in filled] == [0.1, 0.2, 0.1]
    with pytest.raises(ConfigError, match=r"data\.train='x': cannot be given together with data\.sources \(edits, "):
        compose_config("data=mixture", *paths, "+data.sources.more.weight=1", "data.train=x")
    with pytest.raises(ConfigError, match=r"data\.sources\.more=.*but data\.sources\.edits has a weight"):
        compose_config("data=mixture", *paths)


def test_int8_moments_are_not_kept_in_host_memory(shards: Path, tmp_path: Path) -> None:
    config = small_config(shards, tmp_path, "optimizer.moments=int8", "parallel.cpu_offload=true")
    with pytest.raises(ConfigError, match=r"optimizer\.moments='int8': saves GPU memory"):
        check(config, 1)


def test_what_only_the_shards_know_is_refused_by_key(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before any process group starts."""
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *a, **k: pytest.fail("a process group started"))
    with pytest.raises(ConfigError, match=r"data\.tokens_per_pack=20: must hold the largest sample"):
        train(small_config(shards, tmp_path, "data.tokens_per_pack=20"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"data\.train=.*empty': must be a folder of indexed shards"):
        train(small_config(tmp_path / "empty", tmp_path))
    with pytest.raises(ConfigError, match=r"validation\.samples=500: but data\.validation holds 200 samples"):
        train(small_config(shards, tmp_path, f"data.validation={shards}", "validation.samples=500"))


def test_a_refusal_is_one_line_and_status_2(shards: Path, tmp_path: Path) -> None:
    done = kontext_train(*SMALL, f"data.train={shards}", f"run.dir={tmp_path}", "parallel.dp_shard=2", processes=4)
    assert done.returncode == 2
    assert done.stderr.startswith("kontext-train: parallel.dp_replicate, dp_shard, cp=(1, 2, 1)")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_prompts_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    prompt = 'make it "bright", a=b: {x} ${y} ???'
    config = parse(
        [
            "checkpoint=007",
            "out=[a] #1.png",
            f"prompt={prompt}",
            "prompt=two",
            f"context={tmp_path}/a.png",
            "sampler.steps=3",
        ]
    )
    assert config.prompt == [prompt, "two"]
    assert (config.checkpoint, config.out) == ("007", "[a] #1.png")
    assert config.sampler.steps == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompt=x"], r"checkpoint='': must be given"),
        (["checkpoint=x"], r"prompt=\[\]: must be given"),
        (["checkpoint=x", "prompt=x", "context=/nowhere.png"], r"context='/nowhere\.png': must be an image"),
        (["checkpoint=x", "prompt=x", "stepz=3"], r"Key 'stepz' not in 'SampleConfig'"),
        (["checkpoint=x", "prompt=x", "seed=abc"], r"could not be converted to Integer"),
        (["checkpoint=x", "help"], r"argument='help': is not key=value"),
        (["checkpoint=x", "prompt=x", "sampler.steps=0"], r"sampler\.steps=0: must be at least 1"),
        (["checkpoint=x", "prompt=x", "out=edited"], r"out='edited': must end in"),
        (["checkpoint=x", "prompt=x", "seed=[1"], r"arguments="),
    ],
)
def test_sample_refuses_by_key(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(arguments)


@pytest.mark.parametrize("entry", [sample_main, export_main])
def test_entries_print_one_line_and_status_2(
    entry: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = ["out=x.safetensors"] if entry is export_main else ["out=x.png", "prompt=x"]
    monkeypatch.setattr(sys, "argv", ["entry", f"checkpoint={tmp_path}", *own])
    with pytest.raises(SystemExit) as stopped:
        entry()  # type: ignore[operator]
    assert stopped.value.code == 2
    assert "is not a complete checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["optimizer.lr=1e-4,3e-4", "run.seed=1"], "optimizer.lr=0.0001"),
        (["optimizer.lr=1e-4,3e-4", "run.seed=1,2", "run.dir=out/${optimizer.lr}"], "run.seed=1"),
        (["optimizer.lr=1e-4,3e-4", "run.dir=${oc.env:HOME}/x"], "optimizer.lr=0.0001"),
        (["optimizer.lr=1e-4,3e-4", "run.dir=out/${optimizer.lr}"], ""),
        (["run.dir=a,b"], ""),
        ([f"data.train={'x' * 300},{'x' * 300}y"], f"data.train={'x' * 179}_7"),
    ],
)
def test_members_of_a_sweep_do_not_share_a_folder(
    arguments: list[str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {"optimizer.lr": "0.0001", "run.seed": "1", "run.dir": "a", "data.train": "x" * 300}
    task = [f"{key}={first[key]}" for key in (a.split("=")[0] for a in arguments)]
    monkeypatch.setattr(sys, "argv", ["kontext-train", "-m", *arguments])
    member = OmegaConf.create({"mode": RunMode.MULTIRUN, "overrides": {"task": task}, "job": {"num": 7}})
    assert sweep_member(member) == folder  # type: ignore[arg-type]


def test_members_of_a_sweep_do_not_share_checkpoints(tmp_path: Path) -> None:
    done = kontext_train("-m", f"run.dir={tmp_path}", "checkpoint.folder=/shared", "optimizer.lr=1e-5,2e-5")
    assert done.returncode != 0
    assert "checkpoint.folder='/shared': would be one folder for all members of a sweep" in done.stdout + done.stderr
