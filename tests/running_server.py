"""A real `mobilevit serve` in a process of its own, and a client that shows answers as they are on the wire."""

from __future__ import annotations

import http.client
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from PIL import Image


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """Starts at once; `stop` sends SIGTERM and returns the exit status."""

    def __init__(self, arguments: Sequence[str | Path], *, environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "mobilevit", "serve", *map(str, arguments), "--port", "0"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=env
        )
        self.log: list[str] = []
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=self.log.extend, args=(self.process.stderr,), daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert said.startswith("serving at http://"), (said, self.log)
        self.address = said.split()[-1]
        self.host, self.port = urlsplit(self.address).hostname or "", urlsplit(self.address).port or 0

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, data: bytes, kind: str = "image/png", headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("POST", path, data, {"Content-Type": kind, **(headers or {})})

    def post_files(
        self, path: str, files: Sequence[tuple[str, bytes]], headers: Mapping[str, str] | None = None
    ) -> Answer:
        body, kind = form(files)
        return self.post(path, body, kind, headers)

    def metric(self, name: str) -> float:
        """The sum over all labels."""
        lines = self.get("/metrics").body.decode().splitlines()
        values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
        assert values, name
        return sum(values)

    def access(self) -> list[dict[str, Any]]:
        """The log's lines of requests."""
        lines = [json.loads(line) for line in list(self.log)]
        return [line for line in lines if "request_id" in line]

    def stop(self) -> int:
        self.process.terminate()
        try:
            status = self.process.wait(60)
        finally:
            self.process.kill()
        self._reader.join(10)
        return status


def form(files: Sequence[tuple[str, bytes]], field: str = "files") -> tuple[bytes, str]:
    """A multipart body and its content type."""
    boundary = "a-boundary-that-occurs-nowhere"
    body = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n'
        f"Content-Type: application/octet-stream\r\n\r\n".encode()
        + data
        + b"\r\n"
        for name, data in files
    )
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def image(number: int = 0, size: tuple[int, int] = (80, 60), kind: str = "PNG") -> bytes:
    """An encoded image of (width, height) pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def until(true: Any, seconds: float = 30.0) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
