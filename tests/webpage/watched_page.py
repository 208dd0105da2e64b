"""A page in a browser that is watched, and a server of static files."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pytest

from mobilevit.card import TaskName

TASKS: tuple[TaskName, ...] = get_args(TaskName)

ENGINE_ANSWER = """async (bytes) => {
    const engine = await import(new URL("engine.js", location.href).href);
    const { task, item, labels } = await engine.predict(null, new Blob([new Uint8Array(bytes)]));
    return { task, item, labels: labels ? Array.from(labels) : null };
}"""
"""What the page's engine says of a file, in full, as a function of the file's bytes."""

ARTIFACTS = Path(__file__).parents[2] / "runs" / "browser-tests"
"""Where screenshots are kept, to be looked at."""


@dataclass
class Watched:
    """A page of the browser, and what has to stay empty."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def keep(self, name: str, *, full: bool = True) -> None:
        """A screenshot."""
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=ARTIFACTS / f"{name}.png", full_page=full)

    def open(self, address: str) -> None:
        """Wait until the model is ready."""
        self.page.goto(address)
        self.page.wait_for_selector("html[data-ready=true]", timeout=60_000)

    def show(self, *files: Path) -> None:
        """Give images to the page, and wait for the answer to the first."""
        before = self.page.locator("#status").text_content()
        self.page.set_input_files("#file", [str(file) for file in files])
        self.page.wait_for_function(
            "before => { const s = document.querySelector('#status').textContent;"
            " return s.endsWith(' ms') && document.querySelector('#results').children.length > 0; }",
            arg=before,
            timeout=60_000,
        )

    def rows(self) -> list[tuple[str, float]]:
        """Label and share of each row beside the image."""
        return [
            (row.locator(".name").text_content().strip(), float(row.locator(".value").text_content().split()[0]) / 100)
            for row in self.page.locator("#results .row").all()
        ]


class _Quiet(SimpleHTTPRequestHandler):
    extensions_map: ClassVar[dict[str, str]] = {
        **SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript", ".wasm": "application/wasm",
    }  # fmt: skip

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@dataclass
class Site:
    """A server of static files that can be stopped."""

    address: str
    server: ThreadingHTTPServer

    def stop(self) -> None:
        """No answers from now on."""
        self.server.shutdown()
        self.server.server_close()


def serve_folder(folder: Path) -> Site:
    """As any web server would, without special headers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return Site(address=f"http://localhost:{server.server_port}/", server=server)


def same_answer(found: dict[str, Any], expected: Any) -> None:
    """Whether the engine's answer is `Predictor`'s."""
    if found["task"] == "classification":
        for ours, theirs in zip(found["item"]["top"], expected.to_dict(top=5)["top"], strict=True):
            assert ours["label"] == theirs["label"]
            assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-3)
    elif found["task"] == "detection":
        theirs = expected.to_dict(min_score=0.0)["detections"]
        assert len(theirs) > 0
        assert len(found["item"]["detections"]) == pytest.approx(len(theirs), abs=2)
        for ours, other in zip(found["item"]["detections"][:20], theirs[:20], strict=True):
            assert ours["score"] == pytest.approx(other["score"], abs=1e-3)
            if ours["label"] == other["label"] and abs(ours["score"] - other["score"]) < 1e-6:
                assert ours["box_xyxy"] == pytest.approx(other["box_xyxy"], abs=0.5)
    else:
        labels = np.array(found["labels"], np.uint8).reshape(expected.label_map.shape)
        assert (labels == expected.label_map).mean() > 0.999
