"""Images are made once, with their settings beside them, by any number of processes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kontext_train.errors import ConfigError
from kontext_train.evaluation.config import MakingConfig, Resolution
from kontext_train.evaluation.make_images import request_seed
from kontext_train.evaluation.results import latencies, not_made, open_results, write_json
from kontext_train.evaluation.scoring import latency
from kontext_train.flow.config import SamplerConfig
from tests.evaluation.cases import Inverter, benchmark, line, make, save_image

CHAIN = {"key": "c", "file_name": "images/c.png", "instructions": ["a", "b", "c"]}


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def test_every_image_is_made_once_with_its_settings(tmp_path: Path) -> None:
    folder, out, model = benchmark(tmp_path / "b", [line(i) for i in range(5)], [CHAIN]), tmp_path / "out", Inverter()
    made = make(model, folder, out, MakingConfig(seeds=2, at_once=4))
    assert (made.new, made.kept, made.failed) == (16, 0, {})
    assert len({request.seed for request in model.asked}) == 16, "every image has noise of its own"
    results = open_results(out)
    assert not_made(results) == {}
    record = results.record("0003", 1)
    assert record is not None
    assert (record["instruction"], record["height"], record["width"]) == ("add hat 3", 32, 48)
    assert record["request_seed"] == request_seed("0003", 1)
    assert (record["model"], record["made_on"]) == ({"weights": "none"}, "paper")
    assert record["sampler"] == {"steps": 28, "guidance": 1.0, "embedded_guidance": 2.5, "stochastic": False}
    np.testing.assert_array_equal(pixels(results.image("0003", 1)), 255 - pixels(folder / "images" / "0003.png"))
    again = Inverter()
    made = make(again, folder, out, MakingConfig(seeds=3, at_once=4))
    assert (made.new, made.kept) == (8, 16), "another seed adds to what is there"
    assert {request.seed for request in again.asked} & {request.seed for request in model.asked} == set()


def test_a_turn_edits_the_turn_before_also_after_a_stop(tmp_path: Path) -> None:
    folder, out = benchmark(tmp_path / "b", [line(0)], [CHAIN]), tmp_path / "out"
    make(Inverter(), folder, out)
    results, start = open_results(out), pixels(folder / "images" / "c.png")
    turns = [pixels(results.image(f"c.turn_{turn}", 0)) for turn in (1, 2, 3)]
    for turn, expected in zip(turns, (255 - start, start, 255 - start), strict=True):
        np.testing.assert_array_equal(turn, expected)
    results.image("c.turn_2", 0).unlink()
    assert not_made(results) == {"c.turn_2@0": "its file is gone"}
    model = Inverter()
    assert make(model, folder, out).new == 1
    np.testing.assert_array_equal(model.asked[0].contexts[0].permute(1, 2, 0).numpy(), turns[0])


def test_processes_share_the_work_out(tmp_path: Path) -> None:
    folder, out = (
        benchmark(tmp_path / "b", [line(i) for i in range(7)], [CHAIN, CHAIN | {"key": "d"}]),
        tmp_path / "out",
    )
    made = [make(Inverter(), folder, out, rank=rank, ranks=3) for rank in range(3)]
    assert sum(m.new for m in made) == 13
    assert all(m.new and not m.kept for m in made)
    assert not_made(open_results(out)) == {}
    assert make(Inverter(), folder, out).kept == 13, "one process goes on where three were"


@pytest.mark.parametrize(
    ("making", "model", "message"),
    [
        (MakingConfig(sampler=SamplerConfig(steps=4)), {}, r"sampler\.steps \(was 28, now 4\)"),
        (MakingConfig(resolution=Resolution.kontext), {}, r"resolution \(was 'trained', now 'kontext'\)"),
        (MakingConfig(), {"step": 7}, r"model\.step \(was None, now 7\)"),
    ],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, making: MakingConfig, model: dict[str, int], message: str
) -> None:
    folder, out = benchmark(tmp_path / "b", [line(0)]), tmp_path / "out"
    make(Inverter(), folder, out)
    with pytest.raises(ConfigError, match=f"holds images of other settings: {message}"):
        make(Inverter(), folder, out, making, **model)


def test_what_changed_in_a_benchmark_is_made_anew_and_what_moved_is_not(tmp_path: Path) -> None:
    folder, out = benchmark(tmp_path / "b", [line(0), line(1), line(2)], [CHAIN]), tmp_path / "out"
    make(Inverter(), folder, out)
    moved = folder.rename(tmp_path / "moved")
    assert make(Inverter(), moved, out).kept == 6
    save_image(moved / "images" / "0000.png", seed=99)
    for file, old, new in (("metadata", "hat 1", "coat"), ("chains", '"b"', '"d"')):
        whole = moved / f"{file}.jsonl"
        whole.write_text(whole.read_text().replace(old, new))
    changed = {"0000@0", "0001@0", "c.turn_2@0", "c.turn_3@0"}
    reason = "its instruction or context has changed since it was made; run again"
    assert not_made(open_results(out)) == dict.fromkeys(changed, reason)
    made = make(Inverter(), moved, out)
    assert (made.new, made.kept) == (4, 2)
    assert not_made(open_results(out)) == {}
    np.testing.assert_array_equal(pixels(out / "images/seed_0/0000.png"), 255 - pixels(moved / "images" / "0000.png"))


def test_a_context_that_cannot_be_read_fails_its_images_by_name(tmp_path: Path) -> None:
    folder, out = benchmark(tmp_path / "b", [line(i) for i in range(3)], [CHAIN]), tmp_path / "out"
    for name in ("0001", "c"):
        (folder / "images" / f"{name}.png").write_bytes(b"no picture")
    made = make(Inverter(), folder, out)
    assert made.new == 2
    assert set(made.failed) == {"0001@0", "c.turn_1@0", "c.turn_2@0", "c.turn_3@0"}
    assert "0001.png: cannot be decoded" in made.failed["0001@0"]
    assert made.failed["c.turn_2@0"] == "the turn before, c.turn_1.png, was not made"
    assert not_made(open_results(out)) == made.failed
    assert set(make(Inverter(), folder, out).failed) == set(made.failed), "they are tried again"
    save_image(folder / "images" / "0001.png", seed=1)
    mended = make(Inverter(), folder, out)
    assert (mended.new, mended.kept, len(mended.failed)) == (1, 2, 3), "put in its place, it is made"


def test_latency_is_of_single_images_after_a_warm_up(tmp_path: Path) -> None:
    folder = benchmark(tmp_path / "b", [line(i) for i in range(3)])
    model = Inverter()
    make(model, folder, tmp_path / "single", MakingConfig(at_once=1))
    assert model.calls == 4, "the first image is made twice"
    (seconds,) = latencies(open_results(tmp_path / "single")).values()
    assert len(seconds) == 3
    assert all(value is not None and value > 0 for value in seconds)
    make(Inverter(), folder, tmp_path / "together", MakingConfig(at_once=2))
    assert latencies(open_results(tmp_path / "together")) == {"paper": [None, None, None]}
    assert latency(open_results(tmp_path / "together")) == {"paper": {"median_s": None, "p95_s": None, "images": 3}}


def test_latency_is_told_for_each_machine(tmp_path: Path) -> None:
    folder, model = benchmark(tmp_path / "b", [line(i) for i in range(6)]), Inverter()
    for rank, machine in enumerate(("H100, bfloat16, torch 2.13", "A100, bfloat16, torch 2.13")):
        model.made_on = machine
        make(model, folder, tmp_path / "out", MakingConfig(at_once=1), rank, ranks=2)
    results = open_results(tmp_path / "out")
    assert {name: len(seconds) for name, seconds in latencies(results).items()} == {
        "H100, bfloat16, torch 2.13": 3,
        "A100, bfloat16, torch 2.13": 3,
    }
    record = results.record("0001", 0)
    assert record is not None
    assert record["made_on"] == "A100, bfloat16, torch 2.13"
    record["latency_s"] = 100.0
    write_json(results.image("0001", 0).with_suffix(".json"), record)
    told = latency(results)
    assert told["A100, bfloat16, torch 2.13"]["p95_s"]["value"] > 50
    assert told["H100, bfloat16, torch 2.13"]["p95_s"]["value"] < 50, "another machine's slow image is none of its own"
    assert told["H100, bfloat16, torch 2.13"]["median_s"]["n"] == 3


def test_sizes_follow_the_policy(tmp_path: Path) -> None:
    rows = [line(0), line(1) | {"file_name": None}, line(2) | {"file_name": None, "height": 32, "width": 64}]
    folder = benchmark(tmp_path / "b", rows)
    save_image(folder / "images" / "0000.png", 0, height=100, width=50)

    def sizes(**making: object) -> list[tuple[int, int]]:
        model = Inverter()
        make(model, folder, tmp_path / str(making), MakingConfig(at_once=8, **making))  # type: ignore[arg-type]
        return [(request.height, request.width) for request in model.asked]

    assert sizes() == [(96, 48), (1024, 1024), (32, 64)]
    # released inference takes the nearest of its 17 sizes by aspect ratio, however small the image is
    assert sizes(resolution=Resolution.kontext, height=512, width=768) == [(1456, 720), (512, 768), (32, 64)]
    with pytest.raises(ConfigError, match=r"of 0001 must be multiples of 16, the pixels of a token"):
        sizes(height=500)
    refused = tmp_path / str({"height": 500})
    assert not list(refused.rglob("*.png")), "0000 before it was not made either"
    assert make(Inverter(), folder, refused, MakingConfig(at_once=8, height=512)).new == 3, "nor is the folder taken"


def test_records_are_whole_or_not_there(tmp_path: Path) -> None:
    folder, out = benchmark(tmp_path / "b", [line(0)]), tmp_path / "out"
    make(Inverter(), folder, out)
    names = {file.name for file in out.rglob("*") if file.is_file()}
    assert names == {"settings.json", "asked.json", "0000.png", "0000.json"}
    assert json.loads((out / "asked.json").read_text()) == {"seeds": 1, "per_category": None}


STANDS_IN = """
import os, sys, time
import kontext_train.evaluation.trained as trained
from kontext_train import evaluate
from tests.evaluation.cases import Inverter

class Slow(Inverter):
    def generate(self, requests, sampler):
        time.sleep(0.5)
        return super().generate(requests, sampler)

trained.describe_model = lambda *_: {"weights": "none"}
trained.load_trained = lambda *_, **__: Slow()
evaluate.main()
"""


@pytest.mark.slow
def test_a_process_with_a_bad_image_does_not_end_the_others(tmp_path: Path) -> None:
    """torchrun ends all as soon as one fails. The first of two is done at once, and has nothing but a bad image."""
    folder = benchmark(tmp_path / "b", [line(i) for i in range(20)])
    for i in range(0, 20, 2):  # the share of the first
        (folder / "images" / f"{i:04d}.png").write_bytes(b"no picture")
    (tmp_path / "stands_in.py").write_text(STANDS_IN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "stands_in.py"), "run", "checkpoint=none", f"benchmark={folder}"]
    done = subprocess.run(
        [*command, f"out={tmp_path / 'out'}"], capture_output=True, text=True, timeout=300, check=False
    )
    assert "10 images made, 0 were there, 0 failed (process 1 of 2)" in done.stdout, done.stderr
    assert "0 images made, 0 were there, 10 failed (process 0 of 2)" in done.stdout
    assert done.returncode == 1
