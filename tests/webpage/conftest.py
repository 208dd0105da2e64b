"""Models, their pages, and a headless Chromium to look at them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from watched_page import TASKS, Watched

import mobilevit
from golden_weights import fill_with_golden_weights
from mobilevit.data.shapes import render_scene
from mobilevit.exporting.web import find_runtime
from mobilevit.imaging.preprocessing import Preprocessing

CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")
MODES: dict[str, Any] = {"classification": "crop", "detection": "stretch", "segmentation": "pad"}


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


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each task, whose answers are anything but even."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for task in TASKS:
        model = mobilevit.create_model("mobilevit_xxs", task=task, classes=CLASSES)
        model = fill_with_golden_weights(model)
        preprocessing = Preprocessing(size=(128, 192), resize_mode=MODES[task])
        model.card = replace(model.card, preprocessing=preprocessing, score_threshold=0.02)
        found[task] = folder / f"{task}.safetensors"
        mobilevit.save(model, found[task], classes=CLASSES, preprocessing=preprocessing)
    return found


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """PNGs, which every decoder reads alike."""
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for number in range(3):
        path = folder / f"scene{number}.png"
        render_scene(number, size=240, num_objects=3).image.resize((300 - 40 * number, 200 + 30 * number)).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def apps(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each task's page."""
    try:
        find_runtime()
    except ValueError as error:
        pytest.skip(f"the runtime for browsers cannot be had: {error}")
    out = tmp_path_factory.mktemp("apps")
    return {
        task: mobilevit.export(path, out, format="web", name=task, verify=False).path
        for task, path in checkpoints.items()
    }
