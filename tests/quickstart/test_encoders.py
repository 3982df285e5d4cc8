"""The kept encoders load with the released layout's calls, and are good enough for everything that stands on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from quickstart import build_encoders, scenes, scoring
from quickstart.build_encoders import ATTRIBUTES, PromptBatch, sample_prompts, to_images, to_tensor
from quickstart.scenes import Edit, Example, Kind, Split

ENCODERS = Path(build_encoders.__file__).parent / "encoders"
Encode = Callable[[list[str]], Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def vae() -> Any:
    return AutoencoderKL.from_pretrained(ENCODERS / "vae").eval()


@pytest.fixture(scope="module")
def t5() -> Callable[[list[str], int], Tensor]:
    tokenizer = T5TokenizerFast.from_pretrained(ENCODERS / "tokenizer_2")
    model = T5EncoderModel.from_pretrained(ENCODERS / "text_encoder_2").eval()

    @torch.no_grad()
    def encode(prompts: list[str], length: int = scenes.MAX_PROMPT_TOKENS) -> Tensor:
        tokens = tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt")
        return model(tokens.input_ids).last_hidden_state  # no mask, as FLUX calls it

    return encode


@pytest.fixture(scope="module")
def clip() -> Encode:
    tokenizer = CLIPTokenizer.from_pretrained(ENCODERS / "tokenizer")
    model = CLIPTextModel.from_pretrained(ENCODERS / "text_encoder").eval()

    @torch.no_grad()
    def encode(prompts: list[str]) -> Tensor:
        return model(**tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt")).pooler_output

    return encode


def test_all_of_it_is_small() -> None:
    assert sum(path.stat().st_size for path in ENCODERS.rglob("*")) <= 2 * 2**20


# Autoencoder --------------------------------------------------------------------------------------------------------


def encode_pictures(vae: Any, image_BCHW: Tensor) -> Tensor:
    with torch.no_grad():
        return (vae.encode(image_BCHW).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor


def decode_latents(vae: Any, latent_BZhw: Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        return to_images(vae.decode(latent_BZhw / vae.config.scaling_factor + vae.config.shift_factor).sample)


def held_out(kind: Kind, columns: int, count: int) -> list[Example]:
    split = Split.HELDOUT_SCENES
    return [scenes.sample_example(scenes.example_rng(8, split, i), split, kind, columns) for i in range(count)]


def token_cells(latent_BZhw: Tensor) -> Tensor:
    """[B, 16, h, w] -> [B, cells, 64]: FLUX's 2 x 2 packing; one token a cell."""
    return F.unfold(latent_BZhw, 2, stride=2).transpose(1, 2)


@pytest.mark.parametrize("columns", scenes.COLUMNS)
def test_reconstructions_score_as_the_truth_does(vae: Any, columns: int) -> None:
    examples = [example for kind in Kind for example in held_out(kind, columns, 30)]
    images = [scenes.draw(example.target) for example in examples]
    latent_BZhw = encode_pictures(vae, to_tensor(images))
    rebuilt = decode_latents(vae, latent_BZhw)
    scores = [scoring.score_example(image, example) for image, example in zip(rebuilt, examples, strict=True)]
    assert np.mean([score.right for score in scores]) >= 0.99
    assert np.mean([abs(a.astype(int) - b).mean() / 255 for a, b in zip(images, rebuilt, strict=True)]) <= 0.012
    named = [s for s, e in zip(scores, examples, strict=True) if e.edit.kind in scenes.COMBINATION_KINDS]
    assert np.mean([score.edited_cell_mae for score in named]) <= 0.02
    for noise, lowest, highest in ((0.15, 0.97, 1.0), (1.0, 0.0, 0.3)):  # a model's small errors; and nonsense
        noisy = decode_latents(vae, latent_BZhw + noise * torch.randn_like(latent_BZhw))
        right = np.mean([scoring.score_example(image, e).right for image, e in zip(noisy, examples, strict=True)])
        assert lowest <= right <= highest, f"latent noise {noise}: {right}"


def test_latents_are_normalised_and_the_posterior_is_narrow(vae: Any) -> None:
    image_BCHW = to_tensor([scenes.draw(e.target) for kind in Kind for e in held_out(kind, 2, 60)])
    latent_BZhw = encode_pictures(vae, image_BCHW)
    assert abs(latent_BZhw.mean().item()) <= 0.05
    assert latent_BZhw.std().item() == pytest.approx(1, abs=0.05)
    assert (latent_BZhw.std((0, 2, 3)) >= 0.8).all()
    assert (latent_BZhw.std((0, 2, 3)) <= 1.2).all()
    assert vae.encode(image_BCHW[:1]).latent_dist.std.max() <= 0.05


def leak(vae: Any, examples: list[Example]) -> float:
    """RMS change of the untouched cells' latents over that of the edited ones', whose pixels alone change."""
    before = token_cells(encode_pictures(vae, to_tensor([scenes.draw(e.contexts[0]) for e in examples])))
    after = token_cells(encode_pictures(vae, to_tensor([scenes.draw(e.target) for e in examples])))
    cells = [[e.contexts[0].at(*c) != e.target.at(*c) for c in e.target.cells()] for e in examples]
    change_BN = (after - before).square().mean(-1)
    edited_BN = torch.tensor(cells)
    return (change_BN[~edited_BN].mean() / change_BN[edited_BN].mean()).sqrt().item()


def test_an_edit_changes_the_tokens_of_the_edited_cells_alone(vae: Any) -> None:
    examples = held_out(Kind.MOVE, 3, 60)
    assert leak(vae, examples) <= 0.02
    assert leak(build_encoders.new_vae().eval(), examples) >= 0.05  # untrained convolutions do mix cells


def test_a_moved_thing_keeps_its_token(vae: Any) -> None:
    """The latent of a cell does not depend on where the cell is: moving is copying."""
    examples = held_out(Kind.MOVE, 2, 60)
    before = token_cells(encode_pictures(vae, to_tensor([scenes.draw(e.contexts[0]) for e in examples])))
    after = token_cells(encode_pictures(vae, to_tensor([scenes.draw(e.target) for e in examples])))
    changed = [
        [c for c, cell in enumerate(e.target.cells()) if e.contexts[0].at(*cell) != e.target.at(*cell)]
        for e in examples
    ]
    for b, (first, second) in enumerate(changed):
        assert (after[b, [first, second]] - before[b, [second, first]]).square().mean().sqrt() <= 0.03
        assert (after[b, first] - before[b, first]).square().mean().sqrt() >= 0.1


def test_bf16_encoding_is_close(vae: Any) -> None:
    image_BCHW = to_tensor([scenes.draw(e.target) for e in held_out(Kind.MOVE, 2, 20)])
    half = AutoencoderKL.from_pretrained(ENCODERS / "vae", torch_dtype=torch.bfloat16)
    assert (
        encode_pictures(half, image_BCHW.bfloat16()) - encode_pictures(vae, image_BCHW)
    ).square().mean() ** 0.5 <= 0.03


# Text ---------------------------------------------------------------------------------------------------------------


def probe(encode: Encode, train: PromptBatch, test: PromptBatch) -> dict[str, float]:
    """Accuracy of least-squares readers fitted on `train`'s outputs; `things`: all of a description's things right."""
    x_BD, y_BD = (F.pad(encode(batch.prompts), (0, 1), value=1.0) for batch in (train, test))
    gram_DD = x_BD.T @ x_BD + 1e-3 * torch.eye(x_BD.shape[1])

    def read(target_BO: Tensor) -> Tensor:
        return y_BD @ torch.linalg.solve(gram_DD, x_BD.T @ target_BO)

    accuracy = {}
    for a, (name, options) in enumerate(ATTRIBUTES.items()):
        guess_B = read(F.one_hot(train.attribute_BA[:, a], len(options)).float()).argmax(1)
        accuracy[name] = (guess_B == test.attribute_BA[:, a]).float().mean().item()
    listed_BP = read(train.thing_BP) > 0.5
    accuracy["things"] = (listed_BP == test.thing_BP.bool()).all(1).float().mean().item()
    return accuracy


@pytest.mark.parametrize("where", ["t5 mean", "t5 first token", "t5 padding", "clip"])
@pytest.mark.parametrize("split", [Split.HELDOUT_SCENES, Split.HELDOUT_COMBINATIONS])
def test_what_a_prompt_says_is_linearly_readable(where: str, split: Split, t5: Any, clip: Encode) -> None:
    encoders: dict[str, Encode] = {
        "t5 mean": lambda prompts: t5(prompts).mean(1),
        "t5 first token": lambda prompts: t5(prompts)[:, 0],
        "t5 padding": lambda prompts: t5(prompts, 16)[:, -1],
        "clip": clip,
    }
    accuracy = probe(encoders[where], sample_prompts(11, 0, 1500), sample_prompts(12, 0, 600, split))
    things = accuracy.pop("things")
    assert min(accuracy.values()) >= 0.99, accuracy
    assert things >= 0.95


def who_becomes_what(encode: Encode) -> float:
    """Share of pairs "A to B", "B to A" of held-out combinations whose source a linear reader gets right in both."""
    colours = list(scenes.COLOURS)
    edits = [Edit(Kind.RECOLOUR, s, a, b) for s in scenes.SHAPES for a in colours for b in colours if a != b]
    wordings = scenes.WORDINGS[Kind.RECOLOUR]
    train = [e for e in edits if not scenes.is_held_out(e)]
    pairs = [p for e in edits if scenes.is_held_out(e) for p in (e, Edit(e.kind, e.shape, e.argument, e.colour))]

    def outputs(chosen: list[Edit]) -> tuple[Tensor, Tensor]:
        texts = [w.format(shape=e.shape, colour=e.colour, argument=e.argument) for w in wordings for e in chosen]
        source_B = torch.tensor([colours.index(e.colour) for _ in wordings for e in chosen])
        return F.pad(encode(texts), (0, 1), value=1.0), source_B

    x_BD, source_B = outputs(train)
    y_BD, truth_B = outputs(pairs)
    solved = torch.linalg.solve(x_BD.T @ x_BD + 1e-3 * torch.eye(x_BD.shape[1]), x_BD.T @ F.one_hot(source_B).float())
    right_B = (y_BD @ solved).argmax(1) == truth_B
    return (right_B[0::2] & right_B[1::2]).float().mean().item()


def test_who_becomes_what_is_readable_on_held_out_combinations(t5: Any, clip: Encode) -> None:
    assert who_becomes_what(lambda prompts: t5(prompts).mean(1)) >= 0.99
    assert who_becomes_what(clip) >= 0.99
    tokenizer = T5TokenizerFast.from_pretrained(ENCODERS / "tokenizer_2")
    table = torch.randn(len(tokenizer), 64)

    def bag_of_words(prompts: list[str]) -> Tensor:
        return table[tokenizer(prompts, padding="max_length", max_length=12, return_tensors="pt").input_ids].mean(1)

    assert who_becomes_what(bag_of_words) <= 0.5  # control: without word order it cannot be told


def test_prompts_fit_their_budget_without_unknown_words() -> None:
    t5_tokenizer = T5TokenizerFast.from_pretrained(ENCODERS / "tokenizer_2")
    clip_tokenizer = CLIPTokenizer.from_pretrained(ENCODERS / "tokenizer")
    prompts = sorted(
        {*sample_prompts(0, 0, 3000).prompts, *sample_prompts(0, 0, 600, Split.HELDOUT_COMBINATIONS).prompts}
    )
    words = [len(prompt.replace(",", " ,").split()) for prompt in prompts]
    t5_ids, clip_ids = t5_tokenizer(prompts).input_ids, clip_tokenizer(prompts).input_ids
    assert [len(ids) - 1 for ids in t5_ids] == words  # a token a word, and the end
    assert [len(ids) - 2 for ids in clip_ids] == words
    assert max(words) + 1 == scenes.MAX_PROMPT_TOKENS
    assert not any(t5_tokenizer.unk_token_id in ids for ids in t5_ids)
    assert t5_tokenizer.unk_token_id in t5_tokenizer("remove the zebra").input_ids
    assert t5_tokenizer.model_max_length == clip_tokenizer.model_max_length == 16


def test_outputs_have_unit_scale(t5: Any, clip: Encode) -> None:
    prompts = sample_prompts(13, 0, 300).prompts
    assert t5(prompts).std().item() == pytest.approx(1, abs=0.1)
    assert clip(prompts).std().item() == pytest.approx(1, abs=0.1)


def test_training_prompts_hold_no_held_out_combination() -> None:
    texts = {
        wording.format(shape=e.shape, colour=e.colour, argument=e.argument)
        for kind in scenes.COMBINATION_KINDS
        for e in scenes.combinations(kind, held_out=True)
        for wording in scenes.WORDINGS[kind]
    }
    assert not texts & set(sample_prompts(0, 0, 5000).prompts)
    assert texts >= set(sample_prompts(0, 0, 300, Split.HELDOUT_COMBINATIONS).prompts)


def test_the_build_command_makes_what_loads(tmp_path: Path) -> None:
    build_encoders.build_vae(steps=2, seed=0).save_pretrained(tmp_path / "vae")
    build_encoders.build_t5(tmp_path, steps=2, seed=0)
    build_encoders.build_clip(tmp_path, steps=2, seed=0)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")}
    assert made == {path.relative_to(ENCODERS) for path in ENCODERS.rglob("*.*")}
    fresh, kept = (AutoencoderKL.from_pretrained(folder / "vae") for folder in (tmp_path, ENCODERS))
    for name, weight in fresh.encoder.state_dict().items():  # closed form: the kept encoder is this code's, to rounding
        torch.testing.assert_close(weight.abs(), kept.encoder.state_dict()[name].abs(), atol=1e-2, rtol=1e-2)
