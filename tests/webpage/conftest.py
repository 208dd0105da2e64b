"""A headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from watched_page import Watched


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"],
        )
        yield browser
        browser.close()


@pytest.fixture
def watched(chromium: Any) -> Iterator[Watched]:
    context = chromium.new_context(viewport={"width": 1200, "height": 850}, permissions=["camera"])
    page = context.new_page()
    seen = Watched(page)

    def listen(said: Any) -> None:
        # The browser's own words: on a machine without a graphics card, and on tests that look at the canvas.
        expected = ("No available adapters.", "Canvas2D: Multiple readback")
        if said.type in ("error", "warning") and not said.text.startswith(expected):
            seen.complaints.append(said.text)

    page.on("console", listen)
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))

    def note(request: Any) -> None:
        if not request.url.startswith(("http://localhost:", "http://127.0.0.1:", "blob:", "data:")):
            seen.outside.append(request.url)

    context.on("request", note)
    yield seen
    context.close()
    assert seen.complaints == []
    assert seen.outside == []
