"""filter_safety and train_probe: a planted stand-in is found wherever it is, and nothing is kept unseen."""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import encode_shards, filter_safety, filter_shards, train_probe
from data_tools.shard_writing import write_shard
from kontext_train.data.config import DataConfig
from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import build_index
from kontext_train.data.sample import SampleReader
from kontext_train.data.sources import open_sources
from kontext_train.data.transforms import Transform
from kontext_train.errors import ConfigError
from kontext_train.models.config import EncodersConfig
from kontext_train.safety.hashes import perceptual_hash
from kontext_train.safety.judge import Judge, Subject, rules_digest
from kontext_train.safety.rules import read_rules
from tests.runs import ENCODERS, overwrite
from tests.safety.planted import PHRASE, SIDE, picture, sample, with_sign, write_clip, write_planted

SAMPLES, PER_PLACE = 720, 12  # 5 % planted: in context only, target only and prompt only


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model, probes fitted on labelled shards, and a policy."""
    room = tmp_path_factory.mktemp("safety")
    write_clip(room / "clip")
    labelled = ["target" if i % 2 else "" for i in range(1600)]
    write_planted(room / "labelled", labelled, 2, seed=1)
    train_probe.train_probe(
        room / "labelled", room / "clip", "target", "json.planted == 'target'", room / "image.probe",
        max_false_positives=0.01,
    )  # fmt: skip
    (room / "words.txt").write_text(f"# what nobody may ask for\n{PHRASE}\n")
    write_policy(room)
    return room


def write_policy(room: Path) -> None:
    rules = [
        "{name: words, kind: words, list: words.txt, policy: quarantine}",
        "{name: sign, kind: clip_image, clip: clip, head: image.probe, policy: drop}",
    ]
    (room / "policy.yaml").write_text("name: no-signs\nrules:\n" + "".join(f"  - {rule}\n" for rule in rules))


@pytest.fixture(scope="module")
def planted(room: Path) -> Path:
    places = (
        ["context"] * PER_PLACE + ["target"] * PER_PLACE + ["prompt"] * PER_PLACE + [""] * (SAMPLES - 3 * PER_PLACE)
    )
    order = np.random.default_rng(2).permutation(len(places))
    return write_planted(room / "planted", [places[i] for i in order], 3, seed=3)


@pytest.fixture(scope="module")
def filtered(room: Path, planted: Path) -> Path:
    filter_safety.filter_safety(planted, room / "filtered", room / "policy.yaml", processes=1)
    return room / "filtered"


def places(folder: Path) -> Counter[str]:
    """How many samples of each kind a folder holds."""
    index = ShardIndex.open(folder)
    reader = SampleReader(index, Transform.of(DataConfig(), 16, 0))
    return Counter(reader.read(i).metadata["planted"] for i in range(len(index)))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_planted_is_removed_and_little_else(planted: Path, filtered: Path) -> None:
    before, after = places(planted), places(filtered)
    assert before == {"": SAMPLES - 3 * PER_PLACE, "context": PER_PLACE, "target": PER_PLACE, "prompt": PER_PLACE}
    for place in ("context", "target", "prompt"):
        assert after[place] <= 0.02 * PER_PLACE, place
    assert after[""] >= 0.98 * before[""]
    report = json.loads((filtered / "filter_safety.json").read_text())
    assert report["kept"] + report["dropped"] + report["quarantined"] == SAMPLES
    assert {rule["rule"]: rule["found"] for rule in report["rules"]}["words"] == PER_PLACE


def test_a_rule_that_looks_elsewhere_does_not_find_it(room: Path, planted: Path, tmp_path: Path) -> None:
    """The control: what is planted in the context is found there, and by nothing else."""
    policy = room / "targets.yaml"
    rule = "{name: sign, kind: clip_image, clip: clip, head: image.probe, parts: [target], policy: drop}"
    policy.write_text(f"name: targets\nrules:\n  - {rule}\n")
    filter_safety.filter_safety(planted, tmp_path / "out", policy)
    left = places(tmp_path / "out")
    assert left["target"] == 0
    assert left["context"] >= PER_PLACE - 1
    assert left["prompt"] >= PER_PLACE - 1


def test_a_wide_or_tall_picture_is_seen_everywhere(room: Path) -> None:
    """A sign in a picture of up to 12:1, also where squares that only touched each other would cut it in two."""
    judge = Judge(read_rules(room / "policy.yaml"), torch.device("cpu"))
    rng = np.random.default_rng(5)

    def found(shift: float | None, ratio: int) -> bool:
        strip = Image.new("RGB", (ratio * SIDE, SIDE))
        for i in range(ratio):
            strip.paste(picture(rng).resize((SIDE, SIDE)), (i * SIDE, 0))
        if shift is not None:
            left = int((rng.integers(1, ratio) - shift) * SIDE)
            box = (left, 0, left + SIDE, SIDE)
            strip.paste(with_sign(strip.crop(box), rng), box)
        shown = strip if rng.random() < 0.5 else strip.transpose(Image.Transpose.TRANSPOSE)
        (verdict,) = judge.judge([Subject(None, {"target": shown})])
        return verdict.blocking() is not None

    for shift in (0.5, 0.25, 1.0):  # cut by the edge of two squares, off it, and in the middle of a square
        assert np.mean([found(shift, ratio) for ratio in (2, 3, 8, 12) for _ in range(25)]) >= 0.98, shift
    assert np.mean([found(None, ratio) for ratio in (2, 3) for _ in range(40)]) <= 0.1


@pytest.mark.parametrize("place", ["target", "context.0", "context.1", "context.2"])
def test_one_of_several_context_images_is_found_and_named(room: Path, tmp_path: Path, place: str) -> None:
    rng = np.random.default_rng(11)
    members = {key: sample(rng, "" if key == "clean" else place, contexts=3) for key in ("clean", "planted")}
    (tmp_path / "source").mkdir()
    write_shard(tmp_path / "source" / "0.tar", list(members.items()))
    build_index(tmp_path / "source")
    file = members["planted"][f"{place}.png"]
    known = perceptual_hash(Image.open(io.BytesIO(file)).convert("RGB"))
    (room / "known.txt").write_text(f"{known:016x}\n")
    (room / "files.txt").write_text(hashlib.md5(file).hexdigest())
    policy = room / "several.yaml"
    rules = (
        "{name: known, kind: image_hash, list: known.txt, distance: 2, policy: drop}",
        "{name: file, kind: file_hash, list: files.txt, policy: drop}",
        "{name: sign, kind: clip_image, clip: clip, head: image.probe, policy: drop}",
    )
    for number, rule in enumerate(rules):  # each alone
        policy.write_text(f"name: several\nrules:\n  - {rule}\n")
        filter_safety.filter_safety(tmp_path / "source", tmp_path / str(number), policy)
        assert [(line["key"], line["part"]) for line in lines(tmp_path / str(number) / "audit.jsonl")] == [
            ("planted", place)
        ]
        assert len(ShardIndex.open(tmp_path / str(number))) == 1


def test_a_listed_file_is_found_though_it_does_not_decode(tmp_path: Path) -> None:
    source = write_planted(tmp_path / "source", [""] * 4, 1, seed=4)
    where = ShardIndex.open(source).location(2)
    overwrite(where.shard, where.target.offset + where.target.size // 2, bytes(where.target.size // 2))
    with open(where.shard, "rb") as shard:
        shard.seek(where.target.offset)
        file = shard.read(where.target.size)
    (tmp_path / "files.csv").write_text(f"Name,SHA256\nx,{hashlib.sha256(file).hexdigest().upper()}\n")
    policy = tmp_path / "policy.yaml"
    policy.write_text("name: files\nrules:\n  - {name: file, kind: file_hash, list: files.csv, policy: drop}\n")
    filter_safety.filter_safety(source, tmp_path / "out", policy)
    audit = [(line["key"], line["rule"], line["part"]) for line in lines(tmp_path / "out" / "audit.jsonl")]
    assert audit == [(where.key, "file", "target"), (where.key, "unreadable", "sample")]


def test_the_audit_names_rule_and_part_and_holds_neither_image_nor_prompt(filtered: Path) -> None:
    audit = lines(filtered / "audit.jsonl")
    assert all(
        line.keys() == {"shard", "key", "rule", "policy", "part", "score", "threshold", "reason"} for line in audit
    )
    assert {line["part"] for line in audit} == {"prompt", "target", "context.0"}
    assert PHRASE not in (filtered / "audit.jsonl").read_text()
    words = {(line["shard"], line["key"]) for line in audit if line["rule"] == "words"}
    dropped = {(line["shard"], line["key"]) for line in audit if line["policy"] == "drop"}
    listed = {(line["shard"], line["key"]) for line in lines(filtered / "quarantine.jsonl")}
    assert listed == words - dropped


def test_calibration_says_what_thresholds_find(room: Path, planted: Path, tmp_path: Path) -> None:
    report = filter_safety.filter_safety(
        planted, tmp_path / "out", room / "policy.yaml", labels="json.planted != ''", max_false_positives=0.02
    )
    chosen = report["calibration"]["sign"]["chosen"]
    assert chosen["recall"] >= 2 / 3  # the prompt's third is not for images to find
    assert chosen["recall"] <= 0.75
    assert chosen["false_positives"] <= 0.02
    assert report["calibration"]["words"]["chosen"]["recall"] == pytest.approx(1 / 3)
    assert report["calibration"]["policy"]["recall"] >= 0.98
    assert report["calibration"]["policy"]["false_positives"] <= 0.02


def test_labels_of_one_class_leave_a_rule_without_calibration(tmp_path: Path) -> None:
    source = write_planted(tmp_path / "source", ["", "", "prompt"], 1, seed=8)
    (tmp_path / "words.txt").write_text(f"{PHRASE}\n")
    policy = tmp_path / "policy.yaml"
    policy.write_text("name: words\nrules:\n  - {name: words, kind: words, list: words.txt, policy: drop}\n")
    found = {"json.planted == 'prompt'": 1.0, "json.planted == 'nothing'": None, "json.planted != 'prompt'": None}
    for number, (labels, recall) in enumerate(found.items()):  # the last: what it finds is never what has the label
        report = filter_safety.filter_safety(source, tmp_path / str(number), policy, labels=labels)
        words = report["calibration"]["words"]
        assert (words and words["chosen"]["recall"]) == recall


def test_a_scorer_that_fails_on_a_sample_quarantines_it(tmp_path: Path) -> None:
    """Whatever the rule's policy: an image that does not decode, an expression that cannot be worked out."""
    source = write_planted(tmp_path / "source", [""] * 6, 1, seed=4)
    where = ShardIndex.open(source).location(2)
    overwrite(where.shard, where.target.offset + where.target.size // 2, bytes(where.target.size // 2))
    (tmp_path / "words.txt").write_text(f"{PHRASE}\n")
    words = "{name: words, kind: words, list: words.txt, policy: drop}"
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"name: words\nrules:\n  - {words}\n")
    report = filter_safety.filter_safety(source, tmp_path / "one", policy)
    assert (report["kept"], report["quarantined"], report["unreadable"]) == (5, 1, 1)
    assert [line["key"] for line in lines(tmp_path / "one" / "quarantine.jsonl")] == [where.key]
    order = "{name: order, kind: metadata, where: json.planted > 1, policy: report}"  # text above a number
    policy.write_text(f"name: words\nrules:\n  - {words}\n  - {order}\n")
    with pytest.raises(ValueError, match="nothing is kept"):
        filter_safety.filter_safety(source, tmp_path / "two", policy)


def test_metadata_that_lacks_quarantines_a_sample_unless_the_rule_asks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    about = {"both": {"source": "forum", "age": 40}, "young": {"age": 12}, "fine": {"source": "own", "age": 40}}
    samples = [(key, sample(rng, "", **fields)) for key, fields in about.items()]
    (tmp_path / "source").mkdir()
    write_shard(tmp_path / "source" / "0.tar", samples)
    build_index(tmp_path / "source")

    def left_out(name: str, where: str) -> tuple[int, list[str]]:
        policy = tmp_path / "policy.yaml"
        rule = f'{{name: source, kind: metadata, where: "{where}", policy: drop}}'
        policy.write_text(f"name: metadata\nrules:\n  - {rule}\n")
        report = filter_safety.filter_safety(tmp_path / "source", tmp_path / name, policy)
        return report["dropped"], [line["key"] for line in lines(tmp_path / name / "quarantine.jsonl")]

    assert left_out("one", "json.source == 'forum' or json.age < 18") == (1, ["young"])
    assert left_out("three", "has(json.source) and number(prompt) > 3") == (0, ["both", "fine"])
    audit = lines(tmp_path / "three" / "audit.jsonl")
    assert {line["reason"] for line in audit} == {"cannot be worked out (ValueError)"}  # its text quotes the prompt
    assert left_out("two", "(has(json.source) and json.source == 'forum') or json.age < 18") == (2, [])


def words_over_three_shards(folder: Path) -> tuple[Path, Path]:
    """Shards, and a policy whose list is words.txt beside it."""
    (folder / "words.txt").write_text(f"{PHRASE}\n")
    policy = folder / "words.yaml"
    policy.write_text("name: words\nrules:\n  - {name: words, kind: words, list: words.txt, policy: drop}\n")
    return write_planted(folder / "source", ["", "", "", "prompt", "", ""], 3, seed=8), policy


def test_an_interrupted_run_goes_on_and_a_changed_policy_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, policy = words_over_three_shards(tmp_path)
    whole, done = filter_safety._filter, list[str]()

    def until_killed(given: Any) -> dict[str, Any]:
        if len(done) == 2:
            raise OSError("killed")
        return noted(given)

    def noted(given: Any) -> dict[str, Any]:
        done.append(given.source.name)
        return whole(given)

    def interrupted_and_run_again(out: Path, between: Callable[[], object]) -> list[str]:
        done.clear()
        monkeypatch.setattr(filter_safety, "_filter", until_killed)
        with pytest.raises(OSError, match="killed"):
            filter_safety.filter_safety(source, out, policy)
        assert not out.exists()
        between()
        monkeypatch.setattr(filter_safety, "_filter", noted)
        filter_safety.filter_safety(source, out, policy)
        return done[2:]

    assert interrupted_and_run_again(tmp_path / "on", lambda: None) == ["002.tar"]
    monkeypatch.setattr(filter_safety, "_filter", whole)
    filter_safety.filter_safety(source, tmp_path / "straight", policy, processes=2)
    for name in ("000.tar", "audit.jsonl", "safety.json"):
        assert (tmp_path / "on" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()

    before = rules_digest(read_rules(policy))
    longer = f"{PHRASE}\nred unicorn\n"
    again = interrupted_and_run_again(tmp_path / "anew", lambda: (tmp_path / "words.txt").write_text(longer))
    assert again == ["000.tar", "001.tar", "002.tar"]
    digest = json.loads((tmp_path / "anew" / "safety.json").read_text())["digest"]
    assert digest == rules_digest(read_rules(policy)) != before


@pytest.mark.parametrize("after", [1, 3], ids=["first-shard", "last-shard"])
def test_a_list_that_changes_while_it_runs_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Else later shards pass a list that the digest beside them does not cover."""
    source, policy = words_over_three_shards(tmp_path)
    whole, done = filter_safety._filter, list[str]()

    def edited(given: Any) -> dict[str, Any]:
        result = whole(given)
        done.append(given.source.name)
        if len(done) == after:
            (tmp_path / "words.txt").write_text("something else\n")
        return result

    monkeypatch.setattr(filter_safety, "_filter", edited)
    with pytest.raises(ValueError, match=r"words\.yaml: it, or a list.* changed while the filter ran\. .*run the same"):
        filter_safety.filter_safety(source, tmp_path / "out", policy)
    assert len(done) == after
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    assert sorted(path.name for path in partial.glob("*.tar")) == done
    assert not (partial / "index.arrow").exists()
    assert not (partial / "safety.json").exists()


def test_training_takes_only_data_that_passed_the_filter(filtered: Path, planted: Path, tmp_path: Path) -> None:
    def opened(folder: Path, required: str) -> Any:
        return open_sources(DataConfig(train=str(folder), require_safety_filter=required), 16, 0)

    digest = json.loads((filtered / "safety.json").read_text())["digest"]
    assert opened(filtered, "no-signs")
    assert opened(filtered, f"no-signs@{digest[:12]}")
    with pytest.raises(ConfigError, match=r"data\.train=.*passed no safety filter, and .*no-signs"):
        opened(planted, "no-signs")
    with pytest.raises(ConfigError, match=r"passed no-signs@.*, and data\.require_safety_filter=other"):
        opened(filtered, "other")
    with pytest.raises(ConfigError, match="passed no-signs@"):
        opened(filtered, "no-signs@000000000000")
    # What is made of filtered shards has passed too; a shard that is put beside them has not.
    filter_shards.filter_shards(filtered, tmp_path / "half", ["contexts == 1"])
    assert opened(tmp_path / "half", f"no-signs@{digest}")
    shutil.copy(planted / "000.tar", tmp_path / "half" / "stranger.tar")
    with pytest.raises(ValueError, match=r"shard stranger\.tar is not as the safety filter left it"):
        build_index(tmp_path / "half")


def test_a_shard_of_the_same_size_with_other_members_is_noticed(filtered: Path, tmp_path: Path) -> None:
    """Tars are padded to 10 KiB, so another shard often has the very size."""

    def altered(name: str, change: Callable[[Path], None]) -> Path:
        folder = tmp_path / name
        shutil.copytree(filtered, folder)
        size = (folder / "000.tar").stat().st_size
        change(folder / "000.tar")
        assert (folder / "000.tar").stat().st_size == size
        return folder

    def renamed(shard: Path) -> None:
        raw = bytearray(shard.read_bytes())
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
        key = members[0].name.split(".")[0]
        for member in members:
            if member.name.startswith(f"{key}."):
                member.name = member.name.replace(key, "x" * len(key))
                raw[member.offset : member.offset_data] = member.tobuf(tarfile.USTAR_FORMAT)
        shard.write_bytes(raw)

    def swapped(shard: Path) -> None:
        index, raw = ShardIndex.open(shard.parent), shard.read_bytes()
        first, second, third = (raw.index(f"{index.location(i).key}.".encode()) for i in range(3))
        shard.write_bytes(raw[:first] + raw[second:third] + raw[first:second] + raw[third:])

    def repainted(shard: Path) -> None:
        target = ShardIndex.open(shard.parent).location(0).target
        overwrite(shard, target.offset + target.size // 2, b"x")
        os.utime(shard)

    for name, change in {"renamed": renamed, "swapped": swapped}.items():
        folder = altered(name, change)
        with pytest.raises(ValueError, match=r"000\.tar is not as the safety filter left it: its size is the same"):
            build_index(folder)
    # At another time it is the same. What members hold is not read when they are indexed: docs/safety.md says so.
    for name, change in {"touched": lambda shard: os.utime(shard), "repainted": repainted}.items():
        folder = altered(name, change)
        assert build_index(folder).scanned == 1
        assert ShardIndex.open(folder).safety_filter == ShardIndex.open(filtered).safety_filter
    record = json.loads((folder / "safety.json").read_text())
    (folder / "safety.json").write_text(json.dumps(record | {"shards": {"000.tar": 10240}}))
    with pytest.raises(ValueError, match=r"safety\.json is damaged, or of an earlier version .*filter_safety again"):
        build_index(folder)


def test_a_policy_that_only_reports_is_no_filter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_planted(tmp_path / "source", ["", "", "prompt"], 1, seed=8)
    (tmp_path / "words.txt").write_text(f"{PHRASE}\n")
    policy = tmp_path / "policy.yaml"

    def opened(name: str, *policies: str) -> Any:
        rules = [f"  - {{name: w{i}, kind: words, list: words.txt, policy: {p}}}\n" for i, p in enumerate(policies)]
        policy.write_text("name: words\nrules:\n" + "".join(rules))
        arguments = [str(source), "--rules", str(policy), "--out", str(tmp_path / name)]
        assert filter_safety.main(arguments) == 0
        # what is made of it is no better
        filter_shards.filter_shards(tmp_path / name, tmp_path / f"{name}.some", ["contexts == 1"])
        for folder in (name, f"{name}.some"):
            open_sources(DataConfig(train=str(tmp_path / folder), require_safety_filter="words"), 16, 0)

    opened("mixed", "report", "drop")
    assert "data.require_safety_filter=words@" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"data\.train='.*reports': passed words@\w+, whose rules only report"):
        opened("reports", "report", "report")
    assert "the policy only reports: data.require_safety_filter does not take" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"data\.train='.*reports\.some': passed words@\w+, whose rules only report"):
        open_sources(DataConfig(train=str(tmp_path / "reports.some"), require_safety_filter="words"), 16, 0)


def test_encoded_shards_keep_what_they_passed(room: Path, tmp_path: Path) -> None:
    source = write_planted(tmp_path / "source", [""] * 3, 1, seed=5)
    policy = room / "only_words.yaml"
    policy.write_text("name: words\nrules:\n  - {name: words, kind: words, list: words.txt, policy: drop}\n")
    filter_safety.filter_safety(source, tmp_path / "safe", policy)
    encoders = EncodersConfig(str(ENCODERS), 12)
    encode_shards.encode_shards(tmp_path / "safe", tmp_path / "encoded", encoders, DataConfig(), t5=False, processes=0)
    passed = ShardIndex.open(tmp_path / "safe").safety_filter
    assert passed is not None
    assert passed["name"] == "words"
    assert ShardIndex.open(tmp_path / "encoded").safety_filter == passed
    with pytest.raises(ValueError, match="holds encoded shards"):
        filter_safety.filter_safety(tmp_path / "encoded", tmp_path / "again", policy)


def test_a_probe_reads_prompts_too(room: Path, tmp_path: Path) -> None:
    labelled = write_planted(tmp_path / "labelled", ["prompt" if i % 2 else "" for i in range(60)], 1, seed=6)
    labels = "json.planted == 'prompt'"
    report = train_probe.train_probe(labelled, room / "clip", "prompt", labels, tmp_path / "text.probe")
    assert report["chosen"]["recall"] >= 0.98
    assert report["chosen"]["false_positives"] <= 0.02
    with pytest.raises(ValueError, match="Both classes are needed"):
        train_probe.train_probe(labelled, room / "clip", "prompt", "len(prompt) > 0", tmp_path / "none.probe")


def test_a_probe_that_tells_nothing_is_not_written(room: Path, tmp_path: Path) -> None:
    """The prompts are the same on both sides of the label."""
    rng = np.random.default_rng(7)
    members = sample(rng, "")
    prompts = [json.dumps({"prompt": "add a hat", "wanted": i % 2}).encode() for i in range(40)]
    (tmp_path / "source").mkdir()
    samples = [(f"{i:03d}", {**members, "json": prompt}) for i, prompt in enumerate(prompts)]
    write_shard(tmp_path / "source" / "0.tar", samples)
    build_index(tmp_path / "source")
    with pytest.raises(ValueError, match=r"a\.probe is not written: of the samples kept apart, no threshold finds"):
        train_probe.train_probe(tmp_path / "source", room / "clip", "prompt", "json.wanted == 1", tmp_path / "a.probe")
    assert not (tmp_path / "a.probe").exists()


def test_what_shows_through_transparency_is_judged_and_labels_must_be_there(room: Path, tmp_path: Path) -> None:
    """A picture whose colours are black and whose transparency draws the sign: training would see it on white."""
    rng = np.random.default_rng(0)
    hidden = Image.new("RGBA", (64, 64))
    hidden.putalpha(with_sign(Image.new("RGB", (64, 64)), rng).convert("L").point(lambda v: 255 if v > 0 else 0))
    (tmp_path / "source").mkdir()
    members = sample(rng, "")
    file = io.BytesIO()
    hidden.save(file, "PNG")
    write_shard(tmp_path / "source" / "0.tar", [("a", {**members, "target.png": file.getvalue()}), ("b", members)])
    build_index(tmp_path / "source")
    shown = Image.new("RGB", hidden.size, (255, 255, 255))
    shown.paste(hidden, mask=hidden)
    (tmp_path / "hashes.txt").write_text(f"{perceptual_hash(shown):016x}\n")
    policy = tmp_path / "policy.yaml"
    rule = "{name: known, kind: image_hash, list: hashes.txt, distance: 0, policy: drop}"
    policy.write_text(f"name: hashes\nrules:\n  - {rule}\n")
    report = filter_safety.filter_safety(tmp_path / "source", tmp_path / "out", policy)
    assert (report["kept"], report["dropped"]) == (1, 1)
    with pytest.raises(ValueError, match=r"0\.tar: a: has no label \(unsafe\)"):
        filter_safety.filter_safety(tmp_path / "source", tmp_path / "two", policy, labels="json.unsafe == 1")


def test_prompts_are_judged_by_a_probe_and_together_with_images(room: Path, planted: Path, tmp_path: Path) -> None:
    """The filter with clip_text, and with a combination alone: it drops what either probe sees, wherever it is."""
    labelled = write_planted(tmp_path / "labelled", ["prompt" if i % 2 else "" for i in range(60)], 1, seed=6)
    text = room / "text.probe"
    train_probe.train_probe(labelled, room / "clip", "prompt", "json.planted == 'prompt'", text)
    policy = room / "together.yaml"
    asked = "{name: asked, kind: clip_text, clip: clip, head: text.probe, policy: %s}"
    sign = "{name: sign, kind: clip_image, clip: clip, head: image.probe, policy: report}"
    together = "{name: together, kind: combination, of: [asked, sign], threshold: 0.9, policy: drop}"

    def left(name: str, *rules: str) -> tuple[Counter[str], list[dict[str, Any]]]:
        policy.write_text("name: together\nrules:\n" + "".join(f"  - {rule}\n" for rule in rules))
        filter_safety.filter_safety(planted, tmp_path / name, policy)
        return places(tmp_path / name), lines(tmp_path / name / "audit.jsonl")

    alone, found = left("alone", asked % "drop")
    assert alone["prompt"] == 0
    assert alone["target"] == alone["context"] == PER_PLACE
    assert {line["part"] for line in found} == {"prompt"}
    both, found = left("both", asked % "report", sign, together)
    assert max(both[place] for place in ("prompt", "target", "context")) <= 1
    assert both[""] >= 0.95 * (SAMPLES - 3 * PER_PLACE)
    assert {line["part"] for line in found if line["rule"] == "together"} == {"sample"}
    assert {line["rule"] for line in found if line["policy"] == "drop"} == {"together"}


def test_a_probe_names_the_image_that_it_cannot_read(room: Path, tmp_path: Path) -> None:
    write_planted(tmp_path / "labelled", ["target", ""] * 5, 1, seed=6)
    shard = tmp_path / "labelled" / "000.tar"
    raw = bytearray(shard.read_bytes())
    start = raw.index(b"IDAT")
    raw[start + 4 : start + 40] = bytes(36)
    shard.write_bytes(raw)
    build_index(tmp_path / "labelled")
    told = list[str]()
    for on in ("target", "context"):  # the broken image is one of them
        try:
            train_probe.train_probe(tmp_path / "labelled", room / "clip", on, "json.planted != ''", tmp_path / "p")
        except ValueError as error:
            told.append(str(error))
    assert any(re.match(r"000\.tar: 00000: its \w+ image cannot be decoded \(\w+\)\. python -m", text) for text in told)
