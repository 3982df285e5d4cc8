"""The safety stage as a run: sharded it is what it is whole, with all weights and with adapters; and the gate."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kontext_train.config import TrainConfig, check
from kontext_train.errors import ConfigError
from kontext_train.evaluation.trained import load_model, load_trained, read_config, resolve
from kontext_train.flow.config import SamplerConfig
from kontext_train.safety.hashes import perceptual_hash
from kontext_train.safety.heads import Head, clip_digest, save_head
from kontext_train.sample import Blocked, SampleConfig, main, sample
from kontext_train.train import train
from quickstart.make_dataset import to_png
from tests.integration.test_train import largest_difference, losses
from tests.models.flux_cases import random_flux
from tests.runs import run, small_config
from tests.safety.planted import write_clip

ADAPTERS = ("lora.rank=2", "lora.base_dtype=float32", "optimizer.lr=3e-3")


@pytest.fixture(scope="module")
def base(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose every weight is random, as a released file; beside it, a list of concepts."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    save_file(random_flux(small_config(shards, folder).model).state_dict(), folder / "base.safetensors")
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(to_png(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)))
    concepts = [
        {"prompt": "make the blue circle red", "anchor": "make the blue circle cyan", "context": ["a.png"]},
        {"prompt": "green to red", "goal": "make the green circle red", "context": ["b.png", "a.png"]},
        {"prompt": "a red circle on gray", "height": 32, "width": 32},
    ]
    (folder / "concepts.jsonl").write_text("".join(json.dumps(concept) + "\n" for concept in concepts))
    return folder / "base.safetensors"


def safety_config(shards: Path, base: Path, folder: Path, *options: str) -> TrainConfig:
    own = ("stage=safety", f"weights.student={base}", f"objective.concepts={base.parent}/concepts.jsonl")
    own += ("objective.context_budget=0.1", "objective.attack_steps=2", "weights.frozen_dtype=float32", "run.steps=2")
    return small_config(shards, folder, *own, *options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ADAPTERS], ids=["all-weights", "adapters"])
def test_two_processes_equal_one(shards: Path, base: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Also the ascent: its gradients come through the sharded student."""
    run(safety_config(shards, base, tmp_path / "one", "run.microbatches=2", *options))
    run(safety_config(shards, base, tmp_path / "two", *options), processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = (weights_of(tmp_path / name) for name in ("one", "two"))
    assert largest_difference(two, one) <= 1e-5
    assert largest_difference(one, load_file(base)) > 1e-4, "nothing was trained"
    first = losses(tmp_path / "one")[0]
    run(safety_config(shards, base, tmp_path / "calm", "objective.attack_steps=0", "run.microbatches=2", "run.steps=1"))
    assert losses(tmp_path / "calm")[0] != pytest.approx(first, rel=1e-3), "the attack did nothing"


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    path = resolve(run_dir)
    return dict(load_model(path, read_config(path), ema=False).state_dict())


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 1 is not JSON"),
        ('{"anchor": "x"}', "line 1 must be an object with a string prompt"),
        ('{"prompt": "x"}', "line 1 must have height and width"),
        ('{"prompt": "x", "context": ["no.png"]}', "line 1 names .*no.png, which is no file"),
        ('{"prompt": "x", "hight": 3}', "line 1 has 'hight', which is no field"),
        ('{"prompt": "x", "goal": 3}', "line 1 has goal 3"),
        ("", "holds no concept"),
    ],
)
def test_a_bad_list_is_refused_before_anything_starts(
    shards: Path, base: Path, tmp_path: Path, line: str, told: str
) -> None:
    (tmp_path / "list.jsonl").write_text(line + "\n")
    config = safety_config(shards, base, tmp_path, f"objective.concepts={tmp_path}/list.jsonl")
    with pytest.raises(ConfigError, match=rf"objective\.concepts=.*{told}"):
        check(config, 1)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("objective.concepts=null", r"objective\.concepts=None: must be a file of concepts"),
        ("weights.reference=null", r"weights\.reference=None: must be given"),
        ("objective.text_budget=-1", r"objective\.text_budget=-1\.0: must not be negative"),
        ("parallel.cp=2", r"parallel\.cp=2: gives each rank a share"),
    ],
)
def test_options_that_cannot_work_are_refused(shards: Path, base: Path, tmp_path: Path, option: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check(safety_config(shards, base, tmp_path, option), 2 if "cp" in option else 1)


def test_a_run_goes_on_with_the_list_it_began_with_wherever_that_lies(shards: Path, base: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    shutil.copytree(base.parent, lists)
    option = f"objective.concepts={lists}/concepts.jsonl"
    run(safety_config(shards, base, tmp_path / "run", "run.steps=1", "schedule.name=constant"))
    run(safety_config(shards, base, tmp_path / "run", "run.steps=2", "schedule.name=constant", option))
    (lists / "a.png").write_bytes((lists / "b.png").read_bytes())
    with pytest.raises(ConfigError, match=r"objective\.concepts=.*says other than the list that .* learned from"):
        train(safety_config(shards, base, tmp_path / "run", "run.steps=3", "schedule.name=constant", option))


# The gate -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_run(shards: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gate")
    run(safety_config(shards, base, folder, "run.steps=1"))
    return folder


def policy(folder: Path, *rules: str) -> str:
    (folder / "words.txt").write_text("red circle\n")
    (folder / "policy.yaml").write_text("name: p\nrules:\n" + "".join(f"  - {rule}\n" for rule in rules))
    return str(folder / "policy.yaml")


def test_the_gate_stops_prompts_images_and_results(
    trained_run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    context, out = str(base.parent / "a.png"), tmp_path / "out.png"

    def made(prompt: str, gate: str | None, context: str = context) -> Path:
        out.unlink(missing_ok=True)
        options = {"out": str(out), "sampler": SamplerConfig(steps=2), "gate": gate}
        sample(SampleConfig(str(trained_run), [prompt], [context], **options))  # type: ignore[arg-type]
        return out

    words = policy(tmp_path, "{name: asked, kind: words, list: words.txt, policy: quarantine}")
    assert made("make it blue", words).is_file()
    with pytest.raises(Blocked, match=r"prompt, by rule asked of .*policy\.yaml"):
        made("a Red  circle please", words)
    assert not out.exists()

    def listed(image: str | Path) -> str:
        own = perceptual_hash(Image.open(image).convert("RGB"))
        (tmp_path / "hashes.txt").write_text(f"{own:016x}\n")
        return policy(tmp_path, "{name: known, kind: image_hash, list: hashes.txt, distance: 2, policy: drop}")

    with pytest.raises(Blocked, match=r"request 'make it blue', by rule known .*context\.0 scores"):
        made("make it blue", listed(context))
    assert made("make it blue", listed(context), str(base.parent / "b.png")).is_file()
    result = listed(made("make it blue", None))
    with pytest.raises(Blocked, match="result of 'make it blue', by rule known"):
        made("make it blue", result)
    assert not out.exists()

    arguments = [f"checkpoint={trained_run}", "prompt=a red circle", f"gate={words}", f"out={out}"]
    policy(tmp_path, "{name: asked, kind: words, list: words.txt, policy: drop}")
    monkeypatch.setattr("sys.argv", ["kontext-sample", *arguments])
    with pytest.raises(SystemExit, match="3"):
        main()
    assert "by rule asked" in capsys.readouterr().err


def test_the_gate_sees_prompt_contexts_and_result_together(trained_run: Path, base: Path, tmp_path: Path) -> None:
    """Every probe says 0.5 of all it sees: only together do they reach a threshold."""
    clip, out = write_clip(tmp_path / "clip"), tmp_path / "out.png"
    for tower in ("image", "text"):
        save_head(tmp_path / f"{tower}.probe", Head(tower, clip_digest(clip), 0.6, torch.zeros(128), 0.0, None))
    asked = "{name: asked, kind: clip_text, clip: clip, head: text.probe, policy: drop}"
    given, shown = (
        f"{{name: {part}, kind: clip_image, clip: clip, head: image.probe, parts: [{part}], policy: drop}}"
        for part in ("context", "target")
    )
    together = "{name: c, kind: combination, of: [%s], threshold: %s, policy: drop}"
    request = (asked, given, together % ("asked, context", 0.7))
    result = (asked, given, shown, together % ("asked, context, target", 0.87))

    def made(*rules: str, context: tuple[str, ...] = (str(base.parent / "a.png"),)) -> list[Path]:
        options = {"out": str(out), "sampler": SamplerConfig(steps=1), "height": 32, "width": 48}
        gate = policy(tmp_path, *rules)
        return sample(SampleConfig(str(trained_run), ["blue"], list(context), gate=gate, **options))  # type: ignore[arg-type]

    with pytest.raises(Blocked, match="request 'blue', by rule c"):
        made(*request)
    with pytest.raises(Blocked, match="result of 'blue', by rule c"):
        made(*result)
    with pytest.raises(ConfigError, match=r"gate=.*blocks nothing: its rules here only report"):
        made(asked.replace("drop", "report"), given.replace("drop", "report"))
    for rules in (request, result):  # without a context neither is reached
        assert made(*rules, context=()) == [out]


def test_the_gate_sees_a_context_as_it_was_given_too(trained_run: Path, tmp_path: Path) -> None:
    """A wide picture, of which the model sees the middle: that is another picture by its hash."""
    file, rng = tmp_path / "wide.png", np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(0, 255, (8, 16, 3), dtype=np.uint8))
    whole = coarse.resize((79, 47), Image.Resampling.BICUBIC)
    whole.save(file)
    seen = Image.fromarray(load_trained(str(trained_run)).transform.apply(file))
    hashes = [perceptual_hash(image) for image in (whole, seen)]
    assert (hashes[0] ^ hashes[1]).bit_count() > 8  # type: ignore[operator]
    rule = "{name: known, kind: image_hash, list: hashes.txt, distance: 2, parts: [context], policy: drop}"

    def made(listed: int, *prompts: str) -> list[Path]:
        (tmp_path / "hashes.txt").write_text(f"{listed:016x}\n")
        options = {"out": str(tmp_path / "out.png"), "sampler": SamplerConfig(steps=1), "gate": policy(tmp_path, rule)}
        return sample(SampleConfig(str(trained_run), list(prompts), [str(file)], **options))  # type: ignore[arg-type]

    for listed in hashes:
        assert listed is not None
        with pytest.raises(Blocked, match=r"request 'one', by rule known .*context\.0 scores"):
            made(listed, "one")
    assert len(made(hashes[0] ^ (1 << 64) - 1, "one", "two")) == 2  # type: ignore[operator]


def test_the_gate_knows_listed_files(trained_run: Path, base: Path, tmp_path: Path) -> None:
    files = [str(base.parent / name) for name in ("a.png", "b.png")]
    rule = "{name: files, kind: file_hash, list: files.txt, policy: drop}"

    def made(known: bytes, *prompts: str) -> list[Path]:
        (tmp_path / "files.txt").write_text(f"{hashlib.md5(known).hexdigest()}\n")
        options = {"out": str(tmp_path / "out.png"), "sampler": SamplerConfig(steps=1), "gate": policy(tmp_path, rule)}
        return sample(SampleConfig(str(trained_run), list(prompts), files, **options))  # type: ignore[arg-type]

    for number, file in enumerate(files):
        with pytest.raises(Blocked, match=rf"request 'one', by rule files .*context\.{number} scores 1, threshold 1"):
            made(Path(file).read_bytes(), "one", "two")
    first, _ = made(b"another", "one", "two")
    assert len(made(first.read_bytes(), "one", "two")) == 2  # a result is no file that was given


@pytest.mark.parametrize(
    "rule",
    [
        "{name: source, kind: metadata, where: json.source == 'forum', policy: drop}",
        "{name: files, kind: file_hash, list: files.txt, parts: [target], policy: drop}",
    ],
)
def test_a_gate_that_looks_at_nothing_is_refused(tmp_path: Path, rule: str) -> None:
    (tmp_path / "files.txt").write_text("0" * 32)
    with pytest.raises(ConfigError, match=r"gate=.*policy\.yaml': has no rule that applies here"):
        sample(SampleConfig("no checkpoint", ["blue"], gate=policy(tmp_path, rule)))


def test_a_result_that_becomes_a_context_is_held_against_the_rules_for_contexts(
    trained_run: Path, base: Path, tmp_path: Path
) -> None:
    def made(gate: str | None, *prompts: str) -> list[Path]:
        options = {"out": str(tmp_path / "out.png"), "sampler": SamplerConfig(steps=1), "gate": gate}
        return sample(SampleConfig(str(trained_run), list(prompts), [str(base.parent / "a.png")], **options))  # type: ignore[arg-type]

    first = perceptual_hash(Image.open(made(None, "one")[0]).convert("RGB"))
    (tmp_path / "hashes.txt").write_text(f"{first:016x}\n")
    rule = "{name: known, kind: image_hash, list: hashes.txt, distance: 2, parts: [context], policy: drop}"
    assert len(made(policy(tmp_path, rule), "one")) == 1
    with pytest.raises(Blocked, match="request 'two', by rule known"):
        made(policy(tmp_path, rule), "one", "two")
    assert not (tmp_path / "out.1.png").exists()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_result_says_that_a_model_made_it_or_edited_with_it(
    trained_run: Path, base: Path, tmp_path: Path, suffix: str
) -> None:
    def descriptions(*prompts: str, **options: Any) -> list[str]:
        sampled = {"out": str(tmp_path / f"out.{suffix}"), "height": 32, "width": 32, "sampler": SamplerConfig(steps=1)}
        found = []
        for file in sample(SampleConfig(str(trained_run), list(prompts), **sampled, **options)):
            with Image.open(file) as image:
                found.append(str(image.info.get("xmp")))
        return found

    made, edited = (
        "digitalsourcetype/trainedAlgorithmicMedia<",
        "digitalsourcetype/compositeWithTrainedAlgorithmicMedia<",
    )
    first, second = descriptions("one", "two")
    assert made in first
    assert edited in second  # the first
    (edit,) = descriptions("one", context=[str(base.parent / "a.png")])
    assert edited in edit
    (silent,) = descriptions("one", provenance=False)
    assert "digitalsourcetype" not in silent
