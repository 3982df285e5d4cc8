"""A blind pairwise arena on a local web page: two images of one pair, their models' names nowhere, and a vote.

Votes are lines of a file, written as they are given, so a session goes on where it was. The order of comparisons and
which model is on which side are functions of the seed. Several people may vote at once: each browser has a name of its
own, no two are shown the same comparison while there are others, and each takes back its own votes alone.
"""

import json
import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path
from typing import Any

from kontext_train.errors import ConfigError
from kontext_train.evaluation.benchmark import Case, some
from kontext_train.evaluation.config import ArenaConfig
from kontext_train.evaluation.rating import Vote, ratings
from kontext_train.evaluation.report import PAGES, check_comparable
from kontext_train.evaluation.results import Results, image_id, not_made
from kontext_train.randomness import key_of

SCORES = {"left": 1.0, "right": 0.0, "tie": 0.5, "skip": None}  # of the model on the left
MOST_BYTES = 10_000  # of a request


@dataclass(frozen=True, slots=True)
class Comparison:
    case: Case
    image: str  # key@seed
    left: int  # models, by number
    right: int
    left_file: Path
    right_file: Path

    @property
    def name(self) -> str:
        """The same whoever is on the left."""
        return f"{self.image}:{min(self.left, self.right)}-{max(self.left, self.right)}"


class Arena:
    """The comparisons and what was voted on them. Thread-safe."""

    def __init__(self, models: Sequence[Results], votes: Path, seed: int) -> None:
        """Raises ConfigError if the models cannot be compared, or the votes are of others."""
        self.models, self.file = check_comparable(models), votes
        self.comparisons = _comparisons(models, seed)
        if not self.comparisons:
            rule = "have no pair that two of them made an image of"
            raise ConfigError("results", [str(m.folder) for m in models], rule, "kontext-evaluate run makes them")
        self.lock = threading.Lock()
        self.votes: dict[str, dict[str, Any]] = {}  # by comparison, in the order of the votes
        self.shown: dict[str, int] = {}  # comparisons before voters' eyes
        self.settings = [model.settings_digest for model in models]
        self.left_out: dict[str, str] = {}  # comparisons whose vote in the file is of other images, and why
        self._read()

    def _read(self) -> None:
        known = {comparison.name: comparison for comparison in self.comparisons}
        lines = self.file.read_bytes().removesuffix(b"\n").split(b"\n") if self.file.is_file() else []
        for number, line in enumerate(lines if lines != [b""] else [], start=1):
            try:
                vote = _parsed(line)
                name, theirs = vote["comparison"], vote["models"]
            except (ValueError, KeyError, TypeError) as error:
                rule = f"line {number} is no vote ({error!r})"
                raise ConfigError("votes", str(self.file), rule, "Remove the line, or give another file") from error
            if theirs != self.models:
                rule = f"line {number} is of other models ({', '.join(theirs)})"
                raise ConfigError("votes", str(self.file), rule, "Give another file")
            if (reason := self._is_of_others(vote, known.get(name))) is None:
                self._take(vote)
            else:
                self.left_out[name] = reason

    def _is_of_others(self, vote: dict[str, Any], comparison: Comparison | None) -> str | None:
        """Why a vote is not on what is shown now."""
        if comparison is None:
            return "its images are not there"
        if vote["winner"] is not None and vote["inputs"] != comparison.case.inputs:
            return "its instruction or context has changed"
        sides = (comparison.left, comparison.right)
        changed = [self.models[i] for i in sides if vote["settings"][i] != self.settings[i]]
        return f"{', '.join(changed)} had other settings" if changed else None

    def _take(self, vote: dict[str, Any]) -> None:
        self.votes.pop(vote["comparison"], None)
        if vote["winner"] is not None:
            self.votes[vote["comparison"]] = vote

    def vote(self, number: int, winner: str, voter: str) -> None:
        """Write down a vote on comparison `number`. The first one counts."""
        comparison = self.comparisons[number]
        with self.lock:
            if comparison.name not in self.votes:
                self._write(comparison.name, winner, voter, comparison)

    def undo(self, voter: str) -> None:
        """Take this voter's last vote back: it is asked again."""
        with self.lock:
            own = [name for name, vote in self.votes.items() if vote.get("voter", voter) == voter]
            if own:
                self._write(own[-1], None, voter, None)
                self.shown[voter] = next(i for i, c in enumerate(self.comparisons) if c.name == own[-1])

    def _write(self, name: str, winner: str | None, voter: str, comparison: Comparison | None) -> None:
        vote: dict[str, Any] = {"comparison": name, "models": self.models, "settings": self.settings}
        vote |= {"winner": winner, "voter": voter, "time": round(time.time())}
        if comparison is not None:
            left, right = self.models[comparison.left], self.models[comparison.right]
            vote |= {"left": left, "right": right, "base": comparison.case.base, "category": comparison.case.category}
            vote["inputs"] = comparison.case.inputs
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(vote) + "\n")
        self._take(vote)

    def next(self, voter: str) -> dict[str, Any]:
        """What the page shows: nothing in it tells the models."""
        with self.lock:
            done, number = len(self.votes), self._number_for(voter)
        progress = {"done": done, "total": len(self.comparisons)}
        if number is None:
            return {"finished": True, **progress}
        case = self.comparisons[number].case
        contexts = [f"/image/{number}/{i}" for i in range(len(case.contexts))]
        images = {side: f"/image/{number}/{side}" for side in ("left", "right")}
        return {"number": number, "instruction": case.instruction, "contexts": contexts, **images, **progress}

    def _number_for(self, voter: str) -> int | None:
        """What this voter is looking at, or the first that nobody else is; near the end, any that is left."""
        left = [i for i, comparison in enumerate(self.comparisons) if comparison.name not in self.votes]
        others = {number for other, number in self.shown.items() if other != voter}
        own = self.shown.get(voter)
        if own not in left:
            own = next((i for i in left if i not in others), left[0] if left else None)
        if own is not None:
            self.shown[voter] = own
        return own

    def picture(self, number: int, which: str) -> Path:
        comparison = self.comparisons[number]
        match which:
            case "left":
                return comparison.left_file
            case "right":
                return comparison.right_file
            case _:
                return comparison.case.contexts[int(which)]

    def export(self) -> dict[str, Any]:
        """Votes and ratings, over all and by category. Here models have their names."""
        with self.lock:
            given = list(self.votes.values())
        categories = sorted({vote["category"] for vote in given})
        return {
            "models": self.models,
            "ratings": ratings(self.models, _scored(given)),
            "by_category": {
                c: ratings(self.models, _scored([v for v in given if v["category"] == c])) for c in categories
            },
            "total": len(self.comparisons),
            "votes": given,
            "left_out": self.left_out,
        }


def _parsed(line: bytes) -> dict[str, Any]:
    """A vote, or one taken back, with all its fields. Raises ValueError, KeyError or TypeError."""
    vote = json.loads(line)
    fields = (
        ("comparison",) if vote["winner"] is None else ("comparison", "left", "right", "base", "category", "inputs")
    )
    wrong = [name for name in fields if not isinstance(vote[name], str)]
    if vote["winner"] not in (None, *SCORES):
        wrong.append("winner")
    if not isinstance(vote.get("voter", ""), str):
        wrong.append("voter")
    if not isinstance(vote["models"], list) or not all(isinstance(model, str) for model in vote["models"]):
        wrong.append("models")
    elif not isinstance(vote["settings"], list) or len(vote["settings"]) != len(vote["models"]):
        wrong.append("settings")
    elif vote["winner"] is not None:
        wrong += [side for side in ("left", "right") if vote[side] not in vote["models"]]
    if wrong:
        raise ValueError(", ".join(f"{name} {vote[name]!r}" for name in wrong))
    return vote


def _scored(votes: Sequence[dict[str, Any]]) -> list[Vote]:
    scored = ((vote, SCORES[vote["winner"]]) for vote in votes)
    return [Vote(vote["left"], vote["right"], score, vote["base"]) for vote, score in scored if score is not None]


def _comparisons(models: Sequence[Results], seed: int) -> list[Comparison]:
    """Of single edits: every image with every two models that made it, in an order of chance, sides by chance."""
    asked = [{image_id(case.key, seed): (case, seed) for case, seed in model.images()} for model in models]
    missing = [not_made(model) for model in models]
    found = []
    for name, (case, image_seed) in {name: image for images in asked for name, image in images.items()}.items():
        made = [i for i in range(len(models)) if name in asked[i] and name not in missing[i]]
        for a, b in combinations([] if case.turn else made, 2):
            left, right = (a, b) if key_of("side", seed, name, a, b) % 2 else (b, a)
            files = (models[i].image(case.key, image_seed) for i in (left, right))
            found.append(Comparison(case, name, left, right, *files))
    random.Random(key_of("order", seed)).shuffle(found)
    return found


def _is_voter(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[0-9a-z]{1,32}", name) is not None


def _is_length(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", text) is not None and int(text) <= MOST_BYTES


def arena_server(arena: Arena, host: str, port: int) -> ThreadingHTTPServer:
    """A server, not started yet."""
    page = (PAGES / "arena.html").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Silent."""

        def do_GET(self) -> None:
            match self.path.strip("/").split("/"):
                case [""]:
                    self._answer(page, "text/html; charset=utf-8")
                case ["next", voter] if _is_voter(voter):
                    self._json(arena.next(voter))
                case ["export"]:
                    self._json(arena.export())
                case ["image", number, which] if self._is_image(number, which):
                    self._picture(arena.picture(int(number), which))
                case _:
                    self.send_error(HTTPStatus.NOT_FOUND)

        def _picture(self, file: Path) -> None:
            try:
                self._answer(file.read_bytes(), "application/octet-stream")
            except FileNotFoundError:
                self.send_error(HTTPStatus.NOT_FOUND, "The image's file is gone")

        @staticmethod
        def _is_image(number: str, which: str) -> bool:
            if not number.isdecimal() or int(number) >= len(arena.comparisons):
                return False
            contexts = len(arena.comparisons[int(number)].case.contexts)
            return which in ("left", "right") or (which.isdecimal() and int(which) < contexts)

        @staticmethod
        def _is_number(number: object) -> bool:
            return type(number) is int and 0 <= number < len(arena.comparisons)  # true is an int to isinstance

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            # Another site's page could send a form here, but no JSON without asking first.
            if not _is_length(length) or self.headers.get_content_type() != "application/json":
                self.send_error(HTTPStatus.BAD_REQUEST)
                return
            try:
                given = json.loads(self.rfile.read(int(length)))
                voter = given["voter"]
                if not _is_voter(voter):
                    raise ValueError(voter)
                if self.path == "/undo":
                    arena.undo(voter)
                elif self.path == "/vote" and given["winner"] in SCORES and self._is_number(given["number"]):
                    arena.vote(given["number"], given["winner"], voter)
                else:
                    raise ValueError(self.path)
            except (ValueError, KeyError, TypeError):
                self.send_error(HTTPStatus.BAD_REQUEST)
                return
            self._json(arena.next(voter))

        def _json(self, value: dict[str, Any]) -> None:
            self._answer(json.dumps(value).encode(), "application/json")

        def _answer(self, body: bytes, kind: str) -> None:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

    return ThreadingHTTPServer((host, port), Handler)


def serve(models: Sequence[Results], config: ArenaConfig) -> None:
    """Serve the arena until Ctrl-C."""
    arena = Arena(models, Path(config.votes), config.seed)
    try:
        server = arena_server(arena, config.host, config.port)
    except OSError as error:
        raise ConfigError("port", config.port, f"cannot be served on: {error}", "Give another port=, or 0") from error
    address = f"http://{config.host}:{server.server_port}/"
    print(f"{address}   {len(arena.votes)} of {len(arena.comparisons)} votes are in {config.votes}", flush=True)
    if arena.left_out:
        told = some([f"{name} ({reason})" for name, reason in arena.left_out.items()])
        print(f"{len(arena.left_out)} votes there are of other images and do not count: {told}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(f"{len(arena.votes)} of {len(arena.comparisons)} votes; the same command goes on")
    finally:
        server.server_close()
