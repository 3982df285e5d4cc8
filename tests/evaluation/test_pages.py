"""The report and the arena in a real Chromium, from disk and from their server."""

import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from kontext_train.errors import ConfigError
from kontext_train.evaluation.arena import Arena, arena_server
from kontext_train.evaluation.config import ArenaConfig, MakingConfig
from kontext_train.evaluation.metrics.base import LeftOut, Shown, Unmeasured
from kontext_train.evaluation.metrics.pixels import Pixels
from kontext_train.evaluation.report import gathered, write_report
from kontext_train.evaluation.results import Results, open_results
from kontext_train.evaluation.scoring import read_scores, score
from quickstart.benchmark import Exact, StandIn, make_stand_in, write_benchmark
from tests.evaluation.cases import Inverter, benchmark, line, make

SHOTS = os.environ.get("KONTEXT_TRAIN_TEST_SHOTS")  # a folder for screenshots, to look at


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    script = ["bash", str(Path(__file__).with_name("install_test_chromium.sh"))]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = f"no Chromium to test with: {done.stderr.strip()}"
        assert os.environ.get("KONTEXT_TRAIN_TEST_ALL") != "1", reason
        pytest.skip(reason)
    with sync_playwright() as playwright:
        # --no-sandbox: Chromium's own needs a user that is not root
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails its test if its script does, or if it asks for anything that is not there."""
    found = browser.new_page(viewport={"width": 1300, "height": 900})
    wrong: list[str] = []
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    # a picture that is still loading when its page goes is no failure
    found.on("requestfailed", lambda r: wrong.append(r.url) if r.failure != "net::ERR_ABORTED" else None)
    yield found
    found.close()
    assert wrong == []


def shoot(page: Page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """Truth, copy and noise on the scenes; of the copy, one image is not there and one is of another size."""
    folder = tmp_path_factory.mktemp("models")
    write_benchmark(folder / "scenes", samples=10, chains=4)
    found = []
    for kind in (StandIn.TRUTH, StandIn.COPY, StandIn.NOISE):
        results = open_results(make_stand_in(kind, folder / "scenes", folder / kind.value))
        if kind is StandIn.COPY:
            first, second, *_ = results.benchmark.pairs
            results.image(first.key, 0).unlink()
            shutil.copy(results.image("chain_0001.turn_1", 0), results.image(second.key, 0))
        score(results, [Exact(folder / "scenes"), Pixels()])
        found.append(results)
    return found


@pytest.fixture
def report(models: list[Results], tmp_path: Path, page: Page) -> Page:
    page.goto(write_report(models, tmp_path / "report").as_uri())
    return page


def shown_image(page: Page) -> str:
    return page.locator("#big").get_attribute("src") or ""


def test_a_report_opens_from_disk_with_failures_first(report: Page, models: list[Results]) -> None:
    assert report.title() == "scenes: truth, copy, noise"
    alarms = report.locator("#failures details summary").all_text_contents()
    asked = len(models[1].images())
    assert alarms[0] == f"copy: 1 of {asked} images were not made. No mean includes them."
    assert report.locator("#failures li").first.text_content() == "recolour_0000@0: its file is gone"
    first = report.locator("#rows .row").first
    assert first.locator(".gone").text_content() == "copy: its file is gone"
    first.scroll_into_view_if_needed()
    report.wait_for_function("[...document.querySelectorAll('.row:first-child img')].every((i) => i.naturalWidth > 0)")
    shoot(report, "report")


def test_the_table_has_every_number_with_its_interval(report: Page, models: list[Results]) -> None:
    summary = json.loads((models[2].folder / "summary.json").read_text())
    estimate = summary["numbers"]["target_mae"]["categories"]["all"]
    row = report.locator("#numbers tr", has_text="target_mae")
    cell = row.locator("td").nth(2).inner_text()
    assert f"{estimate['value']:.4g} [{estimate['low']:.4g}, {estimate['high']:.4g}]" in cell
    assert f"n={estimate['n']}" in cell
    assert row.locator("td").nth(2).locator("small.worse").count() == 1, "noise is worse than the truth, and surely so"
    assert row.locator("td").nth(0).locator("small.worse").count() == 0
    home = report.locator("#numbers tr", has_text="cycle_mae, turn 6").locator("td")
    assert home.first.inner_text().startswith("0 "), "the truth comes home"
    latency = report.locator("#latency tr")
    assert latency.nth(1).inner_text() == "no machine", "what it ran on"
    assert latency.nth(2).locator("td").first.inner_text() == str(len(models[0].images()))
    assert latency.filter(has_text="median").locator("td").count() == 3
    timed = summary["latency"]["no machine"]["median_s"]
    assert f"n={timed['n']}" in latency.filter(has_text="median").locator("td").nth(2).inner_text()
    assert "untouched_ssim: torchmetrics" in (report.locator("#origin").text_content() or "")
    assert models[0].benchmark.digest in (report.locator("#origin pre").first.text_content() or "")
    report.select_option("#category", "recolour")
    recoloured = summary["numbers"]["target_mae"]["categories"]["recolour"]
    assert f"n={recoloured['n']}" in row.locator("td").nth(2).inner_text()


def test_rows_follow_category_and_order(report: Page, models: list[Results]) -> None:
    chains = len(models[0].benchmark.chains)
    expect(report.locator("#count")).to_have_text(f"{len(models[0].benchmark.pairs) + chains} rows")
    report.select_option("#category", "chains")
    expect(report.locator("#count")).to_have_text(f"{chains} rows")
    assert report.locator("#rows .row").first.locator(".strip").count() == 3, "a strip of turns for each model"
    report.select_option("#category", "all")
    report.select_option("#order", label="target_mae of noise, worst first")
    captions = report.locator("#rows .row p").all_text_contents()
    found = read_scores(models[2])["pixels"].values
    worst = max((name for name in found if "target_mae" in found[name]), key=lambda name: found[name]["target_mae"])
    assert worst.split(".")[0].split("@")[0] in captions[0]
    assert "describe" in captions[-1], "what has no such number comes last"


def test_keys_enlarge_flicker_and_step(report: Page, models: list[Results]) -> None:
    report.select_option("#category", "recolour")
    report.select_option("#order", label="as in the benchmark")
    report.keyboard.press("j")
    report.keyboard.press("j")
    report.keyboard.press("Enter")
    assert report.locator("#viewer").evaluate("(dialog) => dialog.open")
    second = [case for case in models[0].benchmark.pairs if case.category == "recolour"][1]
    assert shown_image(report) == f"images/model_0/seed_0/{second.key}.png"
    report.keyboard.press("3")
    assert shown_image(report) == f"images/model_2/seed_0/{second.key}.png"
    shoot(report, "viewer")
    for expected in ("images/benchmark/images/", "images/model_2/", "images/benchmark/images/"):
        report.keyboard.press(" ")
        assert shown_image(report).startswith(expected), "the space bar goes back and forth between context and image"
    report.keyboard.press("t")
    assert shown_image(report).endswith(f"{second.key}.target.png")
    report.keyboard.press("2")
    report.keyboard.press("f")
    report.wait_for_function("document.getElementById('big').src.includes('benchmark')")
    report.wait_for_function("document.getElementById('big').src.includes('model_1')")
    report.keyboard.press("f")
    report.keyboard.press("1")
    report.keyboard.press("3")
    for expected in ("images/model_0/", "images/model_2/", "images/model_0/"):
        report.keyboard.press("x")
        assert shown_image(report).startswith(expected), "x goes back and forth between the two chosen last"
    report.keyboard.press("g")
    for expected in ("model_2", "model_0"):
        report.wait_for_function(f"document.getElementById('big').src.includes('{expected}')")
    report.keyboard.press("g")
    report.keyboard.press("1")
    report.keyboard.press("ArrowLeft")
    assert shown_image(report) == f"images/model_0/seed_0/{models[0].benchmark.pairs[0].key}.png"
    report.keyboard.press("z")
    assert report.locator("#stage").evaluate("(stage) => stage.scrollWidth > stage.clientWidth")
    shoot(report, "zoomed")
    report.keyboard.press("Escape")
    assert not report.locator("#viewer").evaluate("(dialog) => dialog.open")


def test_drift_is_drawn_for_every_model(report: Page) -> None:
    chart = report.locator("#drift svg[aria-label='target_mae by turn']")
    assert chart.locator("polyline").count() == 3
    lines = chart.locator("polyline").evaluate_all("(lines) => lines.map((line) => line.getAttribute('points'))")
    heights = [[float(point.split(",")[1]) for point in line.split()] for line in lines]
    assert chart.locator("text.n").all_text_contents() == ["n=4"] * 6, "how many chains each turn is of"
    assert len(set(heights[0])) == 1, "the truth does not drift"
    assert heights[1][-1] < heights[1][0], "a copy's distance to the truth rises, which is up on the screen"
    chart.scroll_into_view_if_needed()
    shoot(report, "drift")


def test_instructions_are_text_and_never_markup(tmp_path: Path, page: Page) -> None:
    words = "</script><script>throw new Error('run')</script><img src=x onerror=\"throw new Error('run')\">"
    folder = benchmark(tmp_path / "b", [line(0, instruction=words), line(1)])
    make(Inverter(), folder, tmp_path / "out", name="<b>bold</b>")
    results = open_results(tmp_path / "out")
    score(results, [Pixels()])
    page.goto(write_report([results], tmp_path / "report").as_uri())
    assert words in (page.locator("#rows").text_content() or "")
    assert page.title() == "hats: <b>bold</b>"


def test_a_report_is_of_the_images_of_now(tmp_path: Path) -> None:
    make(Inverter(), benchmark(tmp_path / "b", [line(i) for i in range(3)]), tmp_path / "out")
    score(open_results(tmp_path / "out"), [Pixels()])
    (tmp_path / "out" / "images" / "seed_0" / "0001.png").unlink()
    (tmp_path / "report").mkdir()
    (model,) = gathered([open_results(tmp_path / "out")], ["out"], tmp_path / "report")["models"]
    assert model["not_made"] == {"0001@0": "its file is gone"}
    assert model["numbers"]["colour_shift"]["categories"]["all"]["n"] == 2


def test_numbers_of_two_metric_models_are_not_subtracted(tmp_path: Path, page: Page) -> None:
    folder, found = benchmark(tmp_path / "b", [line(i) for i in range(5)]), []
    for name, about in (("a", "torchmetrics 1"), ("b", "torchmetrics 2"), ("c", "torchmetrics 1")):
        metric = Pixels()
        metric.about = about
        make(Inverter(), folder, tmp_path / name)
        found.append(open_results(tmp_path / name))
        score(found[-1], [metric])
    page.goto(write_report(found, tmp_path / "report").as_uri())
    row = page.locator("#numbers tr", has_text="colour_shift")
    expect(row.locator("th")).to_contain_text("not comparable: torchmetrics 1 | torchmetrics 2")
    assert "\n" not in row.locator("td").nth(1).inner_text(), "no difference is shown"
    assert "0 [0, 0]" in row.locator("td").nth(2).inner_text()


def test_two_copies_of_one_benchmark_are_compared(tmp_path: Path) -> None:
    """Each model's pictures are looked for in its own."""
    found = []
    for name, count in (("a", 1), ("b", None)):
        folder = benchmark(tmp_path / f"copy_{name}", [line(i) for i in range(3)])
        make(Inverter(), folder, tmp_path / name, MakingConfig(per_category=count))
        found.append(open_results(tmp_path / name))
        score(found[-1], [Pixels()])
    write_report(found, tmp_path / "report")
    assert len(list((tmp_path / "report" / "images" / "benchmark" / "images").iterdir())) == 3


def test_what_a_metric_failed_on_comes_first(tmp_path: Path, page: Page) -> None:
    make(Inverter(), benchmark(tmp_path / "b", [line(i) for i in range(4)]), tmp_path / "out")
    results = open_results(tmp_path / "out")

    class Weak(Pixels):
        def measure(self, shown: Shown) -> dict[str, float]:
            if shown.case.key == "0002":
                raise Unmeasured("cannot see")
            return super().measure(shown)

    score(results, [Weak()])
    page.goto(write_report([results], tmp_path / "report").as_uri())
    expect(page.locator("#rows .row p").first).to_contain_text("0002@0")


def test_the_viewer_shows_references_and_no_other_pairs_image(tmp_path: Path, page: Page) -> None:
    rows = [line(0, reference_file_names=["images/r1.png", "images/r2.png"]), line(1, file_name=None)]
    make(Inverter(), benchmark(tmp_path / "b", rows), tmp_path / "out")
    results = open_results(tmp_path / "out")
    score(results, [Pixels()])
    results.image("0001", 0).unlink()
    page.goto(write_report([results], tmp_path / "report").as_uri())
    page.select_option("#order", label="as in the benchmark")
    page.locator("#rows .row").first.locator("img").nth(2).click()
    assert shown_image(page).endswith("r2.png"), "the one that was clicked"
    for expected in ("r1.png", "r2.png"):
        page.keyboard.press("r")
        assert shown_image(page).endswith(expected)
    page.keyboard.press("1")
    for expected in ("r2.png", "model_0/seed_0/0000.png"):
        page.keyboard.press("x")
        assert shown_image(page).endswith(expected), "a reference and an image back and forth"
    shoot(page, "references")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#caption")).to_have_text("0001@0: nothing to show")
    assert shown_image(page) == ""
    assert page.locator("#choices button").count() == 0


def test_keys_are_shown(report: Page) -> None:
    report.keyboard.press("?")
    expect(report.locator("#help")).to_be_visible()
    expect(report.locator("#viewer")).to_be_hidden()
    shoot(report, "help")
    report.keyboard.press("j")
    report.keyboard.press("?")
    expect(report.locator("#help")).to_be_hidden()
    report.keyboard.press("Enter")
    report.keyboard.press("?")
    expect(report.locator("#help")).to_be_visible()
    report.keyboard.press("Escape")
    expect(report.locator("#viewer")).to_be_visible()


def test_a_curve_of_fewer_and_fewer_chains_is_drawn_of_the_same_ones_too(tmp_path: Path, page: Page) -> None:
    chains = [{"key": f"c{i}", "file_name": f"images/c{i}.png", "instructions": ["a", "b", "c"]} for i in range(6)]

    class Fading(Pixels):
        """Chains are 1, 2, ... at every turn: none drifts; those with small numbers are lost."""

        def measure(self, shown: Shown) -> dict[str, float]:
            chain = int(shown.case.key[1])
            if chain < 2 * (shown.case.turn - 1):
                raise LeftOut("nothing is untouched")
            return {"untouched_mae": float(chain)}

    make(Inverter(), benchmark(tmp_path / "b", [line(0)], chains), tmp_path / "out")
    results = open_results(tmp_path / "out")
    for case in results.benchmark.pairs:
        results.image(case.key, 0).unlink()
    score(results, [Fading()])
    page.goto(write_report([results], tmp_path / "report").as_uri())
    chart = page.locator("#drift svg[aria-label='untouched_mae by turn']")
    assert chart.locator("text.n").all_text_contents() == ["n=6", "n=4", "n=2"]
    points = chart.locator("polyline").evaluate_all("(lines) => lines.map((line) => line.getAttribute('points'))")
    every, same = ([float(point.split(",")[1]) for point in line.split()] for line in points)
    assert every[0] > every[1] > every[2], "who remains is worse: this is no drift"
    assert len(set(same)) == 1
    chart.scroll_into_view_if_needed()
    shoot(page, "same_chains")


def test_names_of_files_may_have_any_sign(tmp_path: Path, page: Page) -> None:
    make(Inverter(), benchmark(tmp_path / "b", [line(0, key="a#b?c%20 d")]), tmp_path / "out")
    results = open_results(tmp_path / "out")
    score(results, [Pixels()])
    page.goto(write_report([results], tmp_path / "report").as_uri())
    pictures = "[...document.querySelectorAll('#rows img')]"
    page.wait_for_function(f"{pictures}.length === 2 && {pictures}.every((i) => i.naturalWidth > 0)")


def test_what_cannot_be_compared_is_refused(tmp_path: Path, models: list[Results]) -> None:
    folder = benchmark(tmp_path / "b", [line(0)])
    make(Inverter(), folder, tmp_path / "out")
    other = open_results(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"are of two benchmarks"):
        write_report([models[0], other], tmp_path / "report")
    with pytest.raises(ConfigError, match=r"need names that differ; they are truth, truth"):
        write_report([models[0], models[0]], tmp_path / "report")
    with pytest.raises(ConfigError, match=r"was not measured: it has no scores"):
        write_report([other], tmp_path / "report")


# The arena ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(models: list[Results], tmp_path: Path) -> Iterator[tuple[Arena, str]]:
    arena = Arena(models, tmp_path / "votes.jsonl", seed=0)
    server = arena_server(arena, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield arena, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def press(page: Page, key: str, count: int) -> None:
    page.keyboard.press(key)
    expect(page.locator("#count")).to_have_text(f"{count} of {page.locator('#progress').get_attribute('max')}")


def better(arena: Arena) -> str:
    """The key of the model that comes first in the list: truth, copy, noise."""
    (number,) = arena.shown.values()
    comparison = arena.comparisons[number]
    return "ArrowLeft" if comparison.left < comparison.right else "ArrowRight"


def test_votes_by_keys_are_blind_undone_and_rated(served: tuple[Arena, str], page: Page, tmp_path: Path) -> None:
    arena, address = served
    seen: list[str] = []
    page.on("request", lambda request: seen.append(request.url + (request.post_data or "")))
    page.on("response", lambda response: seen.append(response.text()) if "/next" in response.url else None)
    page.goto(address)
    expect(page.locator("figure.made img")).to_have_count(2)
    page.wait_for_function("[...document.images].length && [...document.images].every((i) => i.naturalWidth > 0)")
    shoot(page, "arena")
    for count in range(1, 13):
        press(page, better(arena), count)
    assert not any(name in text for text in [*seen, page.content()] for name in arena.models), "names are hidden"
    press(page, "u", 11)
    press(page, "=", 12)
    press(page, "s", 13)
    lines = [json.loads(row) for row in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert [row["winner"] for row in lines[-3:]] == [None, "tie", "skip"]
    page.click("#reveal")
    expect(page.locator("#table td").first).to_have_text("truth")
    shoot(page, "ratings")
    ratings = arena.export()["ratings"]
    assert ratings["truth"]["value"] > ratings["copy"]["value"] > ratings["noise"]["value"]
    assert sum(estimate["n"] for estimate in ratings.values()) == 2 * 12, "who cannot say does not vote"


def test_a_session_goes_on_where_it_was(served: tuple[Arena, str], models: list[Results], page: Page) -> None:
    arena, address = served
    page.goto(address)
    expect(page.locator("figure.made img")).to_have_count(2)
    for count in range(1, 4):
        press(page, better(arena), count)
    again = Arena(models, arena.file, seed=0)
    (voter,) = arena.shown
    assert again.next(voter) == arena.next(voter)
    assert again.export() == arena.export()
    page.reload()
    expect(page.locator("#count")).to_have_text(f"3 of {len(arena.comparisons)}")
    page.click("#reveal")
    expect(page.locator("#ratings")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    page.reload()
    expect(page.locator("#count")).to_have_text(f"3 of {len(arena.comparisons)}")
    page.click("#reveal")
    expect(page.locator("#reveal")).to_have_text("go on voting")
    page.click("#reveal")
    expect(page.locator("figure.made img")).to_have_count(2)
    expect(page.locator("#ratings")).to_be_hidden()
    with arena.file.open("a") as file:
        file.write('{"comp')
    with pytest.raises(ConfigError, match=r"line 4 is no vote"):
        Arena(models, arena.file, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"winner": "nobody"}, r"winner 'nobody'"),
        ({"left": "stranger"}, r"left 'stranger'"),
        ({"models": "ab"}, r"models 'ab'"),
        ({"models": [1, 2]}, r"models \[1, 2\]"),
        ({"settings": ["x"]}, r"settings \['x'\]"),
        ({"base": None}, r"base None"),
        ({"category": []}, r"category \[\]"),
        ({"comparison": ["x"]}, r"comparison \['x'\]"),
    ],
)
def test_a_damaged_vote_is_named_by_its_line(
    models: list[Results], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    file = tmp_path / "votes.jsonl"
    arena = Arena(models, file, seed=0)
    for number in (0, 1):
        arena.vote(number, "left", "me")
    first, second = file.read_text().splitlines()
    file.write_text(f"{first}\n{json.dumps(json.loads(second) | change)}\n")
    with pytest.raises(ConfigError, match=rf"line 2 is no vote \(ValueError\(.*{message}"):
        Arena(models, file, seed=0)
    file.write_bytes(first.encode() + b"\n\xff\n")
    with pytest.raises(ConfigError, match=r"line 2 is no vote"):
        Arena(models, file, seed=0)


def test_two_people_vote_at_once(served: tuple[Arena, str], browser: Browser) -> None:
    """No vote is given twice or lost, and each takes back its own."""
    arena, address = served
    pages = [browser.new_context().new_page() for _ in range(2)]
    for one in pages:
        one.goto(address)
        expect(one.locator("figure.made img")).to_have_count(2)
    assert len(set(arena.shown.values())) == 2, "they look at two comparisons"
    for count in range(1, 4):
        for i, one in enumerate(pages):
            press(one, "ArrowLeft", 2 * count - 1 + i)
    first, second = arena.shown
    assert [vote["voter"] for vote in arena.votes.values()] == [first, second] * 3
    last = [name for name, vote in arena.votes.items() if vote["voter"] == first][-1]
    with pages[0].expect_response(lambda answer: answer.request.method == "POST"):  # it says 5 before as well
        pages[0].keyboard.press("u")
    assert last not in arena.votes, "not the other's, which came later"
    assert arena.comparisons[arena.shown[first]].name == last, "it is asked again"
    for one in pages:
        one.context.close()


def test_the_last_comparison_is_anyones(models: list[Results], tmp_path: Path) -> None:
    """Who closed the page may hold one for ever."""
    arena = Arena(models, tmp_path / "votes.jsonl", seed=0)
    gone = arena.next("gone")["number"]
    for _ in range(len(arena.comparisons) - 1):
        number = arena.next("here")["number"]
        assert number != gone
        arena.vote(number, "left", "here")
    assert arena.next("here")["number"] == gone
    arena.vote(gone, "right", "here")
    assert arena.next("here")["finished"]
    arena.vote(gone, "left", "gone")
    assert arena.votes[arena.comparisons[gone].name]["winner"] == "right", "the first vote counts"
    assert len(arena.file.read_text().splitlines()) == len(arena.comparisons)


def test_what_a_metric_leaves_out_is_listed(tmp_path: Path, page: Page) -> None:
    make(Inverter(), benchmark(tmp_path / "b", [line(0), line(1)]), tmp_path / "out")
    results = open_results(tmp_path / "out")

    class Picky(Pixels):
        def measure(self, shown: Shown) -> dict[str, float]:
            if shown.case.key == "0001":
                raise LeftOut("no hat in sight")
            return super().measure(shown)

    score(results, [Picky()])
    page.goto(write_report([results], tmp_path / "report").as_uri())
    expect(page.locator("#left_out summary").first).to_contain_text(
        "out: not asked of 2: untouched_mae, untouched_psnr"
    )
    assert "0001@0: no hat in sight" in page.locator("#left_out li").all_text_contents()
    expect(page.locator("#failures")).to_contain_text("Every image was made")


def test_votes_on_images_of_other_settings_do_not_count(models: list[Results], tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    before = Arena(models, file, seed=0)
    for number in range(len(before.comparisons)):
        before.vote(number, "left", "me")
    truth, copy, noise = models
    again = Arena([truth, copy, replace(noise, settings=noise.settings | {"making": "another"})], file, seed=0)
    of_noise = {c.name for c in before.comparisons if 2 in (c.left, c.right)}
    assert again.left_out == dict.fromkeys(of_noise, "noise had other settings")
    assert again.votes.keys() == before.votes.keys() - of_noise
    assert again.export()["left_out"] == again.left_out
    moved = replace(noise, settings=noise.settings | {"name": "noise"})
    assert Arena([truth, copy, moved], file, seed=0).left_out == {}
    gone = before.comparisons[0]
    shown = Arena(models, file, seed=0)
    file.write_text(file.read_text().replace(gone.name, "0000@7:0-1"))
    shown = Arena(models, file, seed=0)
    assert shown.left_out == {"0000@7:0-1": "its images are not there"}
    other = before.comparisons[1]
    file.write_text(file.read_text().replace(f'"inputs": "{other.case.inputs}"', '"inputs": "another instruction"'))
    assert Arena(models, file, seed=0).left_out[other.name] == "its instruction or context has changed"


def test_sides_and_order_are_by_chance_and_by_seed(models: list[Results], tmp_path: Path) -> None:
    one, same, other = (Arena(models, tmp_path / "votes.jsonl", seed).comparisons for seed in (0, 0, 1))
    assert one == same
    assert [c.name for c in one] != [c.name for c in other]
    assert sorted(c.name for c in one) == sorted(c.name for c in other)
    lefts = sum(c.left < c.right for c in one)
    assert 0.25 < lefts / len(one) < 0.75
    assert not any("turn" in c.name for c in one)
    assert not any("recolour_0000@0" in c.name and 1 in (c.left, c.right) for c in one), "the copy's image is gone"


def test_only_images_that_both_were_asked_for_are_compared(tmp_path: Path) -> None:
    rows = [line(0), line(1), line(2), line(3, "coats")]
    folder = benchmark(tmp_path / "b", rows)
    few, all_of_it, two_seeds = MakingConfig(per_category=1), MakingConfig(), MakingConfig(seeds=2, per_category=2)
    found = []
    for name, making in (("a", few), ("b", all_of_it), ("c", two_seeds)):
        make(Inverter(), folder, tmp_path / name, making)
        found.append(open_results(tmp_path / name))
    comparisons = Arena(found, tmp_path / "votes.jsonl", seed=0).comparisons
    assert all(c.left_file.is_file() and c.right_file.is_file() for c in comparisons)
    names = {name for image in ("0000@0", "0003@0") for name in (f"{image}:0-1", f"{image}:0-2", f"{image}:1-2")}
    assert {c.name for c in comparisons} == names | {"0001@0:1-2"}, "the first model's slice is not the arena's"


def test_every_comparison_ends_with_ratings(served: tuple[Arena, str], page: Page) -> None:
    arena, address = served
    for number in range(len(arena.comparisons)):
        arena.vote(number, "tie", "me")
    page.goto(address)
    expect(page.locator("#ratings")).to_be_visible()
    assert {e["value"] for e in arena.export()["ratings"].values()} == {1000.0}
    first = arena.votes[arena.comparisons[0].name]
    arena.vote(0, "left", "me")
    assert arena.votes[arena.comparisons[0].name] == first, "the first vote counts"


def test_the_server_gives_nothing_else(served: tuple[Arena, str], page: Page) -> None:
    arena, address = served
    request = page.request
    last = len(arena.comparisons)
    for path in ("etc/passwd", f"image/{last}/left", "image/0/7", "image/-1/left", "image/0/../../settings.json"):
        assert request.get(address + path).status == 404, path
    wrong = [{"number": 0, "winner": "truth"}, {"number": last, "winner": "left"}, {"winner": "left"}]
    wrong += [{"number": True, "winner": "left"}, {"number": 0.0, "winner": "left"}]
    wrong = [data | {"voter": "me"} for data in wrong]
    wrong += [{"number": 0, "winner": "left"}, {"number": 0, "winner": "left", "voter": "../me"}]
    for data in (*wrong, [1]):
        assert request.post(f"{address}vote", data=data).status == 400, data
    form = request.post(f"{address}vote", form={"number": "0", "winner": "left"})
    assert form.status == 400, "another site's form is no vote"
    for length in ("x", "-1", "99999999", "²"):
        with socket.create_connection(("127.0.0.1", int(address.rstrip("/").rsplit(":", 1)[1])), timeout=10) as raw:
            head = f"POST /vote HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
            raw.sendall(head.encode("latin-1"))
            assert b" 400 " in raw.recv(100), length
    arena.comparisons[0] = replace(arena.comparisons[0], left_file=Path("gone.png"))
    gone = request.get(f"{address}image/0/left")
    assert (gone.status, gone.status_text) == (404, "The image's file is gone")
    assert arena.votes == {}


def test_two_models_are_needed() -> None:
    with pytest.raises(ConfigError, match=r"must be two result folders or more"):
        ArenaConfig(results=["a"], votes="votes.jsonl")
