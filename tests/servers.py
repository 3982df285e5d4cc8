"""A web server with faults and an S3 server, for tests of remote storage."""

import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUCKET = "bucket"


class FaultyServer(ThreadingHTTPServer):
    """Serves a folder with ranges and ETags. `fault(number of the request, path)` names what goes wrong, or nothing."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_port}"
        self.fault: Callable[[int, str], str | None] = lambda number, path: None
        self.slow_s = 1.0
        self.delay_s = 0.0
        self.requests: list[tuple[str, str]] = []  # (path, range)
        self.sent_bytes = 0
        self.now = self.most_at_once = 0
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what these tests are about."""


class _Handler(SimpleHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def translate_path(self, path: str) -> str:
        return str(self.server.folder / path.lstrip("/"))

    def log_message(self, *arguments: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        if not asked:
            super().do_GET()  # the folder's listing
            return
        server = self.server
        with server.lock:
            number = len(server.requests)
            server.requests.append((self.path, asked))
            server.now += 1
            server.most_at_once = max(server.most_at_once, server.now)
        try:
            time.sleep(server.delay_s)
            self._range(asked, server.fault(number, self.path))
        finally:
            with server.lock:
                server.now -= 1

    def _range(self, asked: str, fault: str | None) -> None:
        path = Path(self.translate_path(self.path))
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        assert match is not None
        if not path.exists():
            self._answer("404 Not Found", {}, b"")
            return
        raw, state, first = path.read_bytes(), path.stat(), int(match[1])
        body = raw[first : int(match[2]) + 1]
        about = {"ETag": f'"{state.st_size:x}-{state.st_mtime_ns:x}"'}
        whole = about | {"Content-Range": f"bytes {first}-{first + len(body) - 1}/{len(raw)}"}
        match fault:
            case _ if not body:
                self._answer("416 Range Not Satisfiable", about | {"Content-Range": f"bytes */{len(raw)}"}, b"")
            case None:
                self._answer("206 Partial Content", whole, body)
            case "503" | "429" | "403":
                self._answer(f"{fault} Refused", {}, b"not now")
            case "slow":
                time.sleep(self.server.slow_s)
                self._answer("206 Partial Content", whole, body)
            case "short":  # an answer that is consistent in itself
                self._answer("206 Partial Content", whole, body[: len(body) // 2])
            case "cut":  # Content-Length promises more than comes
                self._answer("206 Partial Content", whole, body[: len(body) // 2], length=len(body))
            case "reset":
                self._answer("206 Partial Content", whole, body[: len(body) // 2], length=len(body))
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            case "wrong range":
                first += 7 if first == 0 else -7
                body = raw[first : first + len(body)]
                end = first + len(body) - 1
                self._answer("206 Partial Content", about | {"Content-Range": f"bytes {first}-{end}/{len(raw)}"}, body)
            case "whole":
                self._answer("200 OK", about, raw)
            case _:
                raise AssertionError(fault)

    def _answer(self, status: str, headers: dict[str, str], body: bytes, length: int | None = None) -> None:
        self.close_connection = length is not None
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        with self.server.lock:
            self.server.sent_bytes += len(body)  # before the client can know that it has them
        self.wfile.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.wfile.flush()


FAULTS = ("503", "429", "short", "cut", "reset", "wrong range")


def often(share: float) -> Callable[[int, str], str | None]:
    """A fault of a random kind in this share of the requests, the same ones each time."""

    def fault(number: int, path: str) -> str | None:
        rng = random.Random(number)
        return rng.choice(FAULTS) if rng.random() < share else None

    return fault


@contextmanager
def web_server(folder: Path) -> Iterator[FaultyServer]:
    server = FaultyServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """moto's server in a process of its own, with one bucket. Yields the environment that leads to it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | environment
    )
    try:
        _wait_for(port, process)
        yield environment
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        assert process.poll() is None, "moto's server ended"
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("moto's server does not answer")
