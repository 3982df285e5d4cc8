"""Policies: what is wrong with one is said by key; what a rule says holds, of lists, hashes, heads and combinations."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kontext_train.errors import ConfigError
from kontext_train.safety.clip import ImageTower, TextTower
from kontext_train.safety.hashes import DigestList, HashList, perceptual_hash
from kontext_train.safety.heads import Head, clip_digest, load_head, operating_point, save_head
from kontext_train.safety.judge import Judge, Subject, rules_digest
from kontext_train.safety.rules import read_rules
from kontext_train.safety.words import WordList
from tests.safety.planted import picture, write_clip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("room")
    write_clip(room / "clip")
    (room / "words.txt").write_text("bad\n")
    (room / "hashes.txt").write_text("0123456789abcdef\n")
    own = clip_digest(room / "clip")
    save_head(room / "image.probe", Head("image", own, 0.6, torch.zeros(128), 0.0, None))  # every score is 0.5
    save_head(room / "text.probe", Head("text", own, 0.6, torch.zeros(128), 0.0, None))
    save_head(room / "open.probe", Head("image", own, None, torch.zeros(128), 0.0, None))
    save_head(room / "broken.probe", Head("image", own, 0.6, torch.full((128,), float("nan")), 0.0, None))
    save_head(room / "other.probe", Head("image", "other", 0.6, torch.zeros(128), 0.0, None))
    return room


def judge(room: Path, *rules: str) -> Judge:
    (room / "policy.yaml").write_text("name: p\nrules:\n" + "".join(f"  - {rule}\n" for rule in rules))
    return Judge(read_rules(room / "policy.yaml"), CPU)


WORDS = "{name: w, kind: words, list: words.txt, policy: drop}"
IMAGE = "{name: i, kind: clip_image, clip: clip, head: image.probe, policy: drop}"
TEXT = "{name: t, kind: clip_text, clip: clip, head: text.probe, policy: drop}"


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("{name: w, kind: wrods, policy: drop}", r"rules\.rules\[0\]\.kind='wrods': is not known"),
        ("{name: w, kind: words, list: words.txt, policy: shred}", r"policy='shred': is not known"),
        ("{name: w, kind: words, policy: drop}", r"list=None: must be given for kind=words"),
        ("{name: w, kind: words, list: no.txt, policy: drop}", r"list='no\.txt': must exist"),
        ("{name: w, kind: words, list: words.txt, threshold: 1, policy: drop}", "threshold=1: has no effect"),
        ("{name: h, kind: image_hash, list: hashes.txt, distance: 40, policy: drop}", "distance=40: must be 0 to 16"),
        ("{name: h, kind: image_hash, list: words.txt, distance: 2, policy: drop}", "'bad' is no 64-bit hash"),
        ("{name: f, kind: file_hash, list: words.txt, policy: drop}", r"words\.txt, line 1: 'bad' is no MD5, SHA-1 or"),
        ("{name: f, kind: file_hash, list: words.txt, parts: [], policy: drop}", r"parts=\[\]: looks at nothing"),
        (IMAGE.replace("head", "parts: [prompt], head"), "parts='prompt': is no kind of image"),
        (IMAGE.replace("image.probe", "text.probe"), "reads text features"),
        (IMAGE.replace("image.probe", "other.probe"), "belongs to other weights than"),
        (IMAGE.replace("image.probe", "open.probe"), r"threshold=None: must be given: its head was not calibrated"),
        (IMAGE.replace("image.probe", "words.txt"), "is no head of train_probe"),
        (
            "{name: c, kind: combination, of: [i, t], threshold: 1, policy: drop}",
            "must name at least two rules above it",
        ),
    ],
)
def test_a_bad_policy_is_refused_by_key(room: Path, rule: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        judge(room, rule)


@pytest.mark.parametrize("threshold", ["0", "-0.1", "1.01", ".nan", ".inf", "true", "'0.5'"])
def test_a_threshold_that_decides_nothing_is_refused(room: Path, threshold: str) -> None:
    together = "{name: c, kind: combination, of: [i, t], threshold: %s, policy: drop}"
    told = "threshold=.*: must be above 0 and at most 1"
    with pytest.raises(ConfigError, match=rf"rules\[0\]\.{told}"):
        judge(room, IMAGE.replace("policy", f"threshold: {threshold}, policy"))
    for given in (threshold, "null"):
        with pytest.raises(ConfigError, match=rf"rules\[2\]\.{told}"):
            judge(room, IMAGE, TEXT, together % given)
    judge(room, IMAGE.replace("policy", "threshold: 1, policy"), TEXT, together % 1.0)


@pytest.mark.parametrize("threshold", [0.0, float("nan"), 1.5, True])
def test_a_head_with_such_a_threshold_is_refused(room: Path, tmp_path: Path, threshold: float) -> None:
    save_head(tmp_path / "a.probe", Head("image", "x", threshold, torch.zeros(128), 0.0, None))
    with pytest.raises(ValueError, match=r"a\.probe is no head of train_probe .*its threshold .* is not above 0"):
        load_head(tmp_path / "a.probe")


def test_concepts_score_by_cosine_whatever_their_length(room: Path) -> None:
    """Longer than 1 they would score above 1, and find everything that is a little like them."""
    image = picture(np.random.default_rng(1)).resize((32, 32))
    (feature,) = ImageTower(room / "clip", CPU).features([image])
    other_F = torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(0)), dim=0)
    concepts = torch.stack([-5 * feature[0], 100 * other_F])
    save_head(room / "concepts.head", Head("image", clip_digest(room / "clip"), None, None, 0.0, concepts))
    rule = IMAGE.replace("image.probe", "concepts.head").replace("policy", "threshold: 1, policy")
    (verdict,) = judge(room, rule).judge([Subject(None, {"target": image})])
    assert verdict.findings == []
    assert verdict.scores["i"]["target"] == pytest.approx(float(feature[0] @ other_F), abs=1e-5)


@pytest.mark.parametrize(
    ("embeddings", "told"),
    [
        (torch.ones(2, 64), r"head='.*concepts\.head': reads 64 features of 128"),
        (torch.stack([torch.ones(128), torch.zeros(128)]), "its embeddings are not rows of finite numbers"),
        (torch.ones(128), "its embeddings are not rows"),
        (torch.full((1, 128), float("inf")), "its embeddings are not rows of finite numbers"),
    ],
)
def test_concepts_that_cannot_score_are_refused(room: Path, embeddings: torch.Tensor, told: str) -> None:
    save_head(room / "concepts.head", Head("image", clip_digest(room / "clip"), 0.5, None, 0.0, embeddings))
    with pytest.raises(ConfigError, match=told):
        judge(room, IMAGE.replace("image.probe", "concepts.head"))


def test_names_are_used_once(room: Path) -> None:
    with pytest.raises(ConfigError, match=r"rules\[1\]\.name='w': must be a name that no other rule has"):
        judge(room, WORDS, WORDS)


def test_words_are_whole_words_and_hide_in_no_spelling(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("# comment\n\nred circle\ncafé\nre:colou?r(ed)? round\nre:thé\n", "utf-8")
    words = WordList(tmp_path / "list")
    hidden = [
        "r\u200bed cir\u00adcle",
        "réd circ\u0323le",
        "r-e-d_c_i_r_c_l_e",
        "red\u2011circle",
        "the_red_circle_now",
    ]
    for text in ("a RED  circle!", "ｒｅｄ circle", "a Coloured round thing", "CAFE", "cafe\u0301", "THÉ", *hidden):
        assert words.matches(text), text
    for text in ("a red circlet", "red and circle", "hundred circles", "red, circle", "hundred-circle", ""):
        assert not words.matches(text), text
    (tmp_path / "list").write_text("-_\n")
    with pytest.raises(ValueError, match="line 1: '-_' has no letters"):
        WordList(tmp_path / "list")
    (tmp_path / "list").write_text("re:(\n")
    with pytest.raises(ValueError, match=r"line 1: 're:.*' is not a regular expression"):
        WordList(tmp_path / "list")


CONTROL = ("\0", "\x08", "\x1f", "\x9f")
FORMAT = ("\u200b", "\u00ad")
PRIVATE, UNASSIGNED, HALF = ("\ue000", "\U000f0000"), ("\u0378",), ("\ud800",)
FILLERS = ("\u115f", "\u1160", "\u3164", "\uffa0", "\u2800", "\U0001d159")
JOINER = "\u034f"


@pytest.mark.parametrize(
    "unseen", [*CONTROL, *FORMAT, *PRIVATE, *UNASSIGNED, *HALF, *FILLERS, JOINER], ids=lambda text: f"{ord(text):x}"
)
def test_characters_that_show_nothing_hide_nothing(tmp_path: Path, unseen: str) -> None:
    (tmp_path / "list").write_text("red circle\nre:blue\\s?round\n한국\n", "utf-8")
    words = WordList(tmp_path / "list")
    hidden = [unseen.join("red circle"), f"the red {unseen}circle", f"r{unseen * 2}ed\ncircle"]
    hidden += [unseen.join("blueround"), unseen.join("한국"), f"\u1112{unseen}\u1161\u11ab국"]
    if unseen != JOINER:  # a mark on the letter before it, between words too
        hidden += [f"red{unseen}circle", unseen.join("redcircle"), f"blue{unseen}round"]
    for text in hidden:
        assert words.matches(text), ascii(text)
    for text in (f"red{unseen}and circle", f"a {unseen}red circlet", unseen):
        assert not words.matches(text), ascii(text)
    (tmp_path / "list").write_bytes(f"r{unseen}ed circle\n".encode("utf-8", "surrogatepass"))
    if unseen not in HALF:  # no UTF-8
        assert WordList(tmp_path / "list").matches("a red circle")


def test_white_space_separates_words(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("red circle\n")
    words = WordList(tmp_path / "list")
    for space in "\t\n\v\f\r\x85\u2028\u3000":
        assert words.matches(f"red{space}circle"), ascii(space)
        assert not words.matches(f"r{space}ed circle"), ascii(space)


def test_hash_lists_find_resized_copies_and_no_other_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    known, *others = [picture(rng).resize((64, 64)) for _ in range(40)]
    own = perceptual_hash(known)
    for content in (f"# list\n{own:016X}\n", f"name,phash\nx,{own:016x}\n", f"0x{own:016x}\n"):
        (tmp_path / "list").write_text(content)
        hashes = HashList(tmp_path / "list")
        assert hashes.distance(own) == 0
        smaller = perceptual_hash(known.resize((48, 48), Image.Resampling.LANCZOS))
        assert smaller is not None
        assert hashes.distance(smaller) <= 6
    found = [perceptual_hash(other) for other in others]
    assert np.mean([hashes.distance(h) <= 6 for h in found if h is not None]) <= 0.05
    (tmp_path / "list").write_text("name,md5\nx,y\n")
    with pytest.raises(ValueError, match="one must be phash or hash"):
        HashList(tmp_path / "list")


@pytest.mark.parametrize("name", ["md5", "sha1", "sha256"])
def test_lists_of_files_are_read_in_common_formats(tmp_path: Path, name: str) -> None:
    file, list_of = b"a file", tmp_path / "list"
    digest = hashlib.new(name, file).hexdigest()
    table = f'path,{name.upper()},size\n"a, b",{"0" * len(digest)},1\n\nc,{digest},6\n'
    for content in (f"# known\n\n{digest}\n", digest.upper(), f"{digest}  a, b.png\n", table, f"{name}\n{digest}\n"):
        list_of.write_text(content)
        digests = DigestList(list_of)
        assert digests.holds(file)
        assert not digests.holds(file + b"\n")


def test_bad_lists_of_files_are_refused_by_line(tmp_path: Path) -> None:
    file, list_of = b"a file", tmp_path / "list"
    md5, sha256 = hashlib.md5(file).hexdigest(), hashlib.sha256(b"another").hexdigest()
    list_of.write_text(f"md5,sha256\n{md5},\n,{sha256}\n")  # a row fills one at least
    assert all(DigestList(list_of).holds(content) for content in (file, b"another"))
    bad = {
        "": "holds no digests",
        f"# x\n\n{md5[:-1]}\n": r"line 3: '\w{31}' is no MD5, SHA-1 or SHA-256 of 32, 40 or 64",
        f"{md5[:-1]}g\n": r"line 1: '\w{32}' is no MD5",
        f"md5,sha256\n# x\n{md5},\n,\n": r"line 4: '' is no MD5",
        "name,photodna\nx,y\n": r"has columns \['name', 'photodna'\]; one must be md5 or sha1 or sha256",
    }
    for content, told in bad.items():
        list_of.write_text(content)
        with pytest.raises(ValueError, match=told):
            DigestList(list_of)


def test_combined_scores_are_those_of_either(room: Path) -> None:
    """Three parts of 0.5 each: 1 - 0.5^3; no rule alone reaches its threshold."""
    combined = "{name: c, kind: combination, of: [i, t], threshold: 0.87, policy: drop}"
    image = Image.new("RGB", (32, 32), (200, 0, 0))
    subject = Subject("a prompt", {"target": image, "context.0": image})
    (verdict,) = judge(room, IMAGE, TEXT, combined).judge([subject])
    assert [(f.rule, f.part, f.score) for f in verdict.findings] == [("c", "sample", 0.875)]
    (verdict,) = judge(room, IMAGE, TEXT, combined).judge([Subject("a prompt", {"target": image})])
    assert verdict.findings == []


def test_a_scorer_that_fails_blocks_and_spares_its_neighbours(room: Path) -> None:
    image = Image.new("RGB", (32, 32))
    rule = IMAGE.replace("policy: drop", "policy: report").replace("image.probe", "broken.probe")
    with_image, without = judge(room, rule).judge([Subject("x", {"target": image}), Subject("x", {})])
    found = with_image.blocking()
    assert found is not None
    assert (found.policy.value, found.score) == ("quarantine", None)
    assert found.reason == "failed with ValueError"
    assert without.findings == []


def test_a_failed_scorer_quotes_no_prompt(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: WordList, text: str) -> bool:
        raise UnicodeError(f"cannot read {text}")

    judged = judge(room, WORDS)
    monkeypatch.setattr(WordList, "matches", fails)
    (verdict,) = judged.judge([Subject("a secret", {})])
    assert [finding.reason for finding in verdict.findings] == ["failed with UnicodeError"]


def test_a_policy_is_named_by_what_it_decides_by(room: Path) -> None:
    def digest(*rules: str) -> str:
        judge(room, *rules)
        return rules_digest(read_rules(room / "policy.yaml"))

    first = digest(WORDS, IMAGE)
    assert digest(WORDS, IMAGE) == first
    assert digest(WORDS, IMAGE.replace("drop", "report")) != first
    (room / "words.txt").write_text("bad\nworse\n")
    assert digest(WORDS, IMAGE) != first
    (room / "words.txt").write_text("bad\n")


def test_towers_equal_transformers_and_see_the_ends_of_a_wide_picture(room: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPModel

    image = picture(np.random.default_rng(1)).resize((32, 32))
    model = CLIPModel.from_pretrained(room / "clip").eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        vision = model.vision_model(processor(image, return_tensors="pt")["pixel_values"]).pooler_output
        theirs = torch.nn.functional.normalize(model.visual_projection(vision), dim=1)
    tower = ImageTower(room / "clip", CPU)
    (ours,) = tower.features([image])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    wide = Image.new("RGB", (96, 32))
    wide.paste(image, (64, 0))
    (parts,) = tower.features([wide])
    assert parts.shape == (5, 128)
    torch.testing.assert_close(parts[4:], theirs, atol=1e-4, rtol=0)


def test_long_texts_are_read_to_their_end(room: Path) -> None:
    tower = TextTower(room / "clip", CPU)
    short, long = tower.features(["red", "red circle on gray " * 30])
    assert len(short) == 1
    assert len(long) > 1


def test_no_phrase_is_cut_in_two_between_windows(room: Path) -> None:
    tower = TextTower(room / "clip", CPU)
    phrase = tower._windows("a red sign")[0][1:-1]
    half = (tower.tokens - 2) // 2
    assert 1 < len(phrase) <= half
    for before in range(3 * tower.tokens):
        text = "a " * before + "a red sign" + " a" * 40
        windows = [window[1:-1] for window in tower._windows(text)]
        assert all(len(window) <= tower.tokens - 2 for window in windows)
        assert any(window[i : i + len(phrase)] == phrase for window in windows for i in range(len(window))), before


def test_a_folder_without_the_projection_is_refused(room: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    options = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**options, image_size=32, patch_size=16)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks visual_projection"):
        ImageTower(tmp_path, CPU)


def test_a_clip_folder_is_named_by_all_that_makes_its_features(room: Path, tmp_path: Path) -> None:
    own = clip_digest(room / "clip")
    shutil.copytree(room / "clip", tmp_path / "clip")
    assert clip_digest(tmp_path / "clip") == own
    (tmp_path / "clip" / "README.md").write_text("nothing to do with it")
    assert clip_digest(tmp_path / "clip") == own
    preparation = tmp_path / "clip" / "preprocessor_config.json"
    for file in (tmp_path / "clip" / "config.json", preparation, tmp_path / "clip" / "tokenizer_config.json"):
        before = clip_digest(tmp_path / "clip")
        file.write_text((file.read_text() if file.is_file() else "{}") + "\n")
        assert clip_digest(tmp_path / "clip") != before, file


def test_a_clip_folder_without_safetensors_is_refused(room: Path, tmp_path: Path) -> None:
    """Its digest would be that of nothing, and every such folder's the same."""
    shutil.copytree(room / "clip", tmp_path / "clip")
    weights = tmp_path / "clip" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "clip" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match=r"clip holds no \*\.safetensors"):
        clip_digest(tmp_path / "clip")
    with pytest.raises(ValueError, match="clip is no CLIP model"):
        ImageTower(tmp_path / "clip", CPU)
    (tmp_path / "policy.yaml").write_text(f"name: p\nrules:\n  - {IMAGE}\n")
    shutil.copy(room / "image.probe", tmp_path)
    with pytest.raises(ConfigError, match=r"rules\.rules\[0\]=.*clip holds no \*\.safetensors"):
        Judge(read_rules(tmp_path / "policy.yaml"), CPU)


def test_operating_points_are_counted() -> None:
    scores, labels = [0.9, 0.8, 0.7, 0.4, 0.6, 0.3, 0.2, 0.1], [True, True, True, True, False, False, False, False]
    strict, loose = (operating_point(scores, labels, share) for share in (0.0, 0.25))
    assert (strict.recall, strict.false_positives, strict.precision) == (0.75, 0.0, 1.0)
    assert strict.threshold == pytest.approx(0.65)
    assert (loose.recall, loose.false_positives, loose.precision) == (1.0, 0.25, 0.8)
    with pytest.raises(ValueError, match="Both classes are needed"):
        operating_point(scores, [True] * 8, 0.1)
    with pytest.raises(ValueError, match=r"no threshold finds one of 1 samples with .* 0 of the 2 others"):
        operating_point([0.1, 0.9, 0.5], [True, False, False], 0.0)
