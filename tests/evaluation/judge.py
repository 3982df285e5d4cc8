"""An OpenAI-compatible endpoint on this machine."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | int | Callable[[dict[str, Any]], str]  # a number is an HTTP status; a function gets the request


class Judge(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint that answers what it is told to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Asked)
        self.answers: list[Answer] = []  # in turn, the last for ever; a number is an HTTP status
        self.requests: list[tuple[dict[str, Any], str | None]] = []
        self.released = threading.Event()  # those whom "nothing" answers


class _Asked(BaseHTTPRequestHandler):
    server: Judge

    def log_message(self, *arguments: object) -> None:
        """Silent."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((body, self.headers.get("Authorization")))
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        answer = answer(body) if callable(answer) else answer
        if self.path != "/v1/chat/completions" or isinstance(answer, int):
            self.send_error(answer if isinstance(answer, int) else 404)
            return
        raw = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        if answer == "no status":
            self.wfile.write(b"?\r\n\r\n")
            return
        if answer == "nothing":
            self.server.released.wait()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw) + 10 * (answer == "cut")))
        self.end_headers()
        self.wfile.write(raw)


@contextmanager
def judging() -> Iterator[Judge]:
    server = Judge()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
