"""filter_shards: the language says what Python says and nothing else; samples come through byte for byte."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import encode_shards, filter_shards
from data_tools.expression import MissingField, parse_clauses
from kontext_train.data.config import DataConfig
from kontext_train.data.index import ShardIndex
from kontext_train.data.index_build import build_index
from kontext_train.models.config import EncodersConfig
from tests.runs import ENCODERS

SAMPLE: dict[str, Any] = {
    "key": "cats/7",
    "shard": "a.tar",
    "prompt": "The Sky is red",
    "width": 640,
    "height": 480,
    "contexts": 1,
    "json": {
        "score": 5.5,
        "text": "6",
        "tags": ["a", "b"],
        "deep": {"x y": 3},
        "none": None,
        "prompt": "The Sky is red",
    },
}


def holds(expression: str) -> bool:
    return all(clause.holds(SAMPLE) for clause in parse_clauses(expression))


TRUE = [
    "width >= 512 and contexts == 1 and json.score > 5 and 'sky' in lower(prompt)",
    "480 <= height < 512 <= width",
    "width / height > 1.3 and width * height == 307200 and width % 100 == 40 and width - height + 1 == 161",
    "-width < 0",
    "not contexts == 2 or width == 0",
    "json.deep['x y'] == 3 and json['score'] == 5.5",
    "number(json.text) > 5 and len(prompt) == 14 and len(json.tags) == 2",
    "key in ('cats/7', 'cats/8') and shard not in ['b.tar']",
    "'a' in json.tags and 'c' not in json.tags",
    "matches(prompt, r'S.y') and matches(key, '^cats/') and not matches(prompt, '^Sky')",
    "has(json.score) and not has(json.none) and not has(json.deep.a.b) and (not has(json.no) or json.no > 1)",
]


@pytest.mark.parametrize("expression", TRUE)
def test_true(expression: str) -> None:
    assert holds(expression)
    assert not holds(f"not ({expression})")


@pytest.mark.parametrize(
    "expression",
    ["json.no > 1", "not json.no > 1", "json.none == 1", "json.tags.a == 1", "json.no.deep == 1 or width > 1"],
)
def test_missing_field_never_satisfies(expression: str) -> None:
    (clause,) = parse_clauses(expression)
    with pytest.raises(MissingField, match=r"no|a|none|deep"):
        clause.holds(SAMPLE)


REFUSED = {
    "heigt > 5": r"'heigt' is no name; known are key, shard, prompt, width, height, contexts, json, with",
    "json": r"json stands with a field",
    "__import__('os').system('true')": r"is not part of the language",
    "(lambda: 1)()": r"is not part of the language",
    "[x for x in prompt]": r"is not part of the language",
    "prompt.__class__": r"fields are those of json",
    "len.__self__": r"fields are those of json",
    "json[key] == 1": r"fields are those of json",
    "width ** 99 > 1": r"is not part of the language",
    "width << 9999": r"is not part of the language",
    "f'{prompt}' == ''": r"is not part of the language",
    "(width := 3) == 3": r"is not part of the language",
    "json.a == None": r"is not part of the language",
    "open('x')": r"open with 1 arguments is not a function here; known are len",
    "matches(prompt, key)": r"matches with 2 arguments is not a function",
    "matches(prompt, '(')": r"'\(' is not a regular expression",
    "has(width)": r"has with 1 arguments is not a function",
    "width >": r"is not an expression \(invalid syntax",
    "": r"is not an expression",
    "width = 3": r"is not an expression",
    "(" * 5000 + "1" + ")" * 5000: r"is not an expression",
    "not " * 5000 + "1": r"is not an expression",
    "width\0": r"is not an expression",
}


@pytest.mark.parametrize("expression", REFUSED, ids=lambda text: text[:20])
def test_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[expression]):
        parse_clauses(expression)


@pytest.mark.parametrize(
    "expression",
    ["json.text > 5", "'a' * width == ''", "width / (contexts - 1) > 1", "number(prompt) > 1", "lower(width) == ''"],
)
def test_what_cannot_be_worked_out_is_an_error(expression: str) -> None:
    (clause,) = parse_clauses(expression)
    with pytest.raises(ValueError, match="cannot be worked out"):
        clause.holds(SAMPLE)


_names = st.sampled_from(["width", "height", "contexts", "3", "0.5", "-7"])
_arithmetic = st.recursive(
    _names, lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda parts: f"({' '.join(parts)})")
)
_comparisons = st.tuples(_arithmetic, st.sampled_from(["<", "<=", "==", "!=", ">=", ">"]), _arithmetic).map(" ".join)
_conditions = st.recursive(
    _comparisons,
    lambda inner: (
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda parts: f"({' '.join(parts)})")
        | inner.map(lambda text: f"not ({text})")
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(expression=_conditions)
def test_says_what_python_says(expression: str) -> None:
    names = {name: SAMPLE[name] for name in ("width", "height", "contexts")}
    assert holds(expression) == bool(eval(expression, {"__builtins__": {}}, names))


# ------------------------------------------------------------------------------------------------------------- shards


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    """Some of the quickstart's samples in three shards of odd tar forms, with owners and long names."""
    folder = tmp_path / "in"
    folder.mkdir()
    with tarfile.open(next(shards.glob("*.tar"))) as source:
        members = source.getmembers()[: 3 * 90]
        keys = sorted({member.name.split(".")[0] for member in members})[:-1]  # the last may be cut
        for number, form in enumerate([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]):
            with tarfile.open(folder / f"s-{number}.tar", "w", format=form) as out:
                for member in members:
                    key = member.name.split(".")[0]
                    if key not in keys[number::3]:
                        continue
                    content = source.extractfile(member)
                    if form != tarfile.USTAR_FORMAT:
                        member.name = f"{'long' * 40}/ü{member.name}"
                    member.mtime, member.uname, member.mode = 1.5e9 + number / 4, "someone", 0o640
                    out.addfile(member, content)
    build_index(folder)
    return folder


def members(shard: Path) -> dict[str, tuple[bytes, float, str]]:
    with tarfile.open(shard) as tar:
        return {m.name: (tar.extractfile(m).read(), m.mtime, m.uname) for m in tar}  # type: ignore[union-attr]


def test_keeps_what_the_expression_says_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    report = filter_shards.filter_shards(folder, tmp_path / "out", ["contexts == 1 and json.kind != 'describe'"])
    index, kept = ShardIndex.open(folder), ShardIndex.open(tmp_path / "out")
    wanted = [i for i in range(len(index)) if index.context_start[i + 1] - index.context_start[i] == 1]
    assert [kept.location(i).key for i in range(len(kept))] == [index.location(i).key for i in wanted]
    assert 0 < report["kept"] == len(wanted) < len(index)
    for shard in folder.glob("*.tar"):
        before, after = members(shard), members(tmp_path / "out" / shard.name)
        assert after == {name: value for name, value in before.items() if name in after}
        # Also the headers: each sample's run of bytes is in the old shard as it is in the new.
        at = [kept.location(i) for i in range(len(kept)) if kept.location(i).shard.name == shard.name]
        old, new = shard.read_bytes(), (tmp_path / "out" / shard.name).read_bytes()
        assert new[: at[0].target.offset] in old
        assert len(new) % tarfile.RECORDSIZE == 0


def test_provenance_and_counts(folder: Path, tmp_path: Path) -> None:
    where = ["contexts == 1 and json.no == 3", "width > 1"]
    with pytest.raises(ValueError, match=r"nothing is kept of .*\"missing\": \[0, \d+, 0\]"):
        filter_shards.filter_shards(folder, tmp_path / "out", where)
    drop = tmp_path / "drop.jsonl"
    index = ShardIndex.open(folder)
    drop.write_text(
        "".join(json.dumps({"shard": "s-1.tar", "key": index.location(i).key}) + "\n" for i in range(len(index)))
    )
    report = filter_shards.filter_shards(folder, tmp_path / "out", ["contexts > 0", "contexts < 2"], [drop])
    assert report == json.loads((tmp_path / "out" / filter_shards.REPORT_NAME).read_text())
    assert report["source"] == {"folder": str(folder), "digest": index.digest, "samples": len(index)}
    assert report["where"] == ["contexts > 0", "contexts < 2"]
    dropped = sum(clause["dropped"] for clause in report["clauses"])
    assert report["kept"] + report["listed"] + dropped == len(index)
    assert report["listed"] > 0
    assert [path.name for path in sorted((tmp_path / "out").glob("*.tar"))] == ["s-0.tar", "s-2.tar"]


def test_error_names_shard_and_key(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"s-0\.tar: .*train_\d+: 'json\.kind > 1' cannot be worked out"):
        filter_shards.filter_shards(folder, tmp_path / "out", ["json.kind > 1"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 1: b'\{'; it must be a JSON object with \"shard\" and \"key\""),
        ('{"key": "a"}', r"it must be a JSON object"),
        ('{"shard": "x.tar", "key": "a"}', r"shard is 'x\.tar', which is not in the folder that is filtered"),
    ],
)
def test_bad_lists(folder: Path, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "drop.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        filter_shards.filter_shards(folder, tmp_path / "out", drop_lists=[tmp_path / "drop.jsonl"])


def test_goes_on_and_processes_do_not_change_a_byte(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filter_shards.filter_shards(folder, tmp_path / "two", ["contexts == 1"], processes=2)
    real, done = filter_shards._filter, list[str]()

    def once(given: Any) -> dict[str, Any]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(given.source.name)
        return real(given)

    monkeypatch.setattr(filter_shards, "_filter", once)
    assert (
        filter_shards.main(
            [str(folder), "--out", str(tmp_path / "one"), "--where", "contexts == 1", "--processes", "1"]
        )
        == 130
    )
    assert not (tmp_path / "one").exists()
    done.remove("s-0.tar")
    filter_shards.filter_shards(folder, tmp_path / "one", ["contexts == 1"])
    assert done == ["s-1.tar", "s-2.tar"]
    for path in (tmp_path / "two").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()


def test_command_counts_by_clause(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder), "--out", str(tmp_path / "out"), "--processes", "1"]
    assert filter_shards.main(arguments) == 1
    assert "error: there is neither an expression" in capsys.readouterr().err
    assert filter_shards.main([*arguments, "--where", "contexts == 1 or json.no == 1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "samples kept, indexed" in lines[0]
    assert "not contexts == 1 or json.no == 1" in lines[1]
    assert lines[1].endswith("of them lack a field)")


def test_shards_in_subfolders_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    """Two of one name would be one in the output."""
    for shard in folder.glob("*.tar"):
        for place in ("a", "b"):
            (folder / place).mkdir(exist_ok=True)
            shutil.copy(shard, folder / place)
    build_index(folder, shards=sorted(folder.rglob("*/*.tar")))
    refused = r"shard a/\S+\.tar lies in a subfolder of .*ln -s"
    with pytest.raises(ValueError, match=refused):
        filter_shards.filter_shards(folder, tmp_path / "out", where=["width > 0"])
    with pytest.raises(ValueError, match=refused):
        encode_shards.encode_shards(
            folder, tmp_path / "out", EncodersConfig(path=str(ENCODERS)), DataConfig(), t5=False
        )
    assert not (tmp_path / "out").exists()


def test_shards_that_the_index_leaves_out_are_left_out(folder: Path, tmp_path: Path) -> None:
    """They may be held out on purpose."""
    one = sorted(folder.glob("*.tar"))[:1]
    build_index(folder, shards=one)
    kept = filter_shards.filter_shards(folder, tmp_path / "out", where=["contexts >= 0"])["kept"]
    assert kept == len(ShardIndex.open(folder)) > 0
    assert len(list((tmp_path / "out").glob("*.tar"))) == 1
    assert len(list(folder.glob("*.tar"))) > 1, "nothing was left out, so this test shows nothing"
