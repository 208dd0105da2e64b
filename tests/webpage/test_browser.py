"""The page in a real browser: with the model in it, and with the service behind it."""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from watched_page import ARTIFACTS, ENGINE_ANSWER, TASKS, Site, Watched, same_answer, serve_folder

from mobilevit.data.shapes import render_scene
from mobilevit.runtime.predictor import Predictor
from running_server import Server

pytestmark = pytest.mark.usefixtures("chromium")


@pytest.fixture
def site(apps: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Site]:
    served = serve_folder(apps[request.param])
    yield served
    served.stop()


def engine_answer(watched: Watched, image: Path) -> dict[str, Any]:
    """What the page's engine says of a file, in full."""
    found: dict[str, Any] = watched.page.evaluate(ENGINE_ANSWER, list(image.read_bytes()))
    return found


@pytest.mark.parametrize("site", TASKS, indirect=True)
def test_the_model_in_the_browser_answers_as_the_predictor(
    site: Site, watched: Watched, checkpoints: dict[str, Path], images: list[Path], request: pytest.FixtureRequest
) -> None:
    task = request.node.callspec.params["site"]
    predictor = Predictor(checkpoints[task])
    watched.open(site.address)
    for image in images:
        watched.show(image)
        found, expected = engine_answer(watched, image), predictor(str(image))
        same_answer(found, expected)
        if task == "classification":
            shown = [(label, round(share, 3)) for label, share in watched.rows()]
            assert shown == [(label, pytest.approx(share, abs=1e-3)) for label, share in expected.top(5)]
    watched.keep(f"app-{task}")


def drawn_difference(watched: Watched) -> float:
    """Share of the canvas that the answer has changed: with and without it."""
    share: float = watched.page.evaluate("""async () => {
        const canvas = document.querySelector("#canvas");
        const read = (c) => c.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        const drawn = read(canvas), plain = new OffscreenCanvas(canvas.width, canvas.height);
        const bitmap = await createImageBitmap(window.lastImage);
        plain.getContext("2d").drawImage(bitmap, 0, 0);
        const before = read(plain);
        let changed = 0;
        for (let at = 0; at < drawn.length; at += 4) changed += Math.abs(drawn[at] - before[at]) > 8;
        return changed / (drawn.length / 4);
    }""")
    return share


@pytest.mark.parametrize("site", ["detection", "segmentation"], indirect=True)
def test_boxes_and_masks_are_drawn(site: Site, watched: Watched, images: list[Path]) -> None:
    watched.open(site.address)
    data = images[0].read_bytes()
    watched.page.evaluate("bytes => { window.lastImage = new Blob([new Uint8Array(bytes)]); }", list(data))
    watched.show(images[0])
    if watched.page.locator("#score-control").is_visible():
        set_slider(watched, "#score", 0.0)
        assert drawn_difference(watched) > 0.01
        set_slider(watched, "#score", 1.0)
        assert drawn_difference(watched) < 0.001
    else:
        set_slider(watched, "#opacity", 0.9)
        assert drawn_difference(watched) > 0.3
        set_slider(watched, "#opacity", 0.0)
        assert drawn_difference(watched) < 0.001


def set_slider(watched: Watched, name: str, value: float) -> None:
    watched.page.eval_on_selector(
        name, "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
    )


@pytest.mark.parametrize("site", ["classification"], indirect=True)
def test_after_the_first_visit_it_works_without_a_network(site: Site, watched: Watched, images: list[Path]) -> None:
    watched.open(site.address)
    assert watched.page.evaluate("() => self.crossOriginIsolated"), "threads, on a server without special headers"
    assert "thread" in watched.page.locator("#footer").text_content()
    watched.show(images[0])
    before = watched.rows()
    site.stop()
    watched.open(site.address)
    watched.show(images[0])
    assert watched.rows() == before


def test_a_new_version_reaches_those_who_come_back(apps: dict[str, Path], watched: Watched, tmp_path: Path) -> None:
    folder = tmp_path / "app"
    shutil.copytree(apps["classification"], folder)
    site = serve_folder(folder)
    try:
        watched.open(site.address)
        assert "classification" in watched.page.locator("#about").text_content()
        watched.page.evaluate("() => caches.open('of another page of this site')")
        before = watched.page.evaluate("() => caches.keys()")
        shutil.copytree(apps["detection"], folder, dirs_exist_ok=True)
        watched.open(site.address)  # still the old one, while the new one is fetched
        for _ in range(100):
            now = watched.page.evaluate("() => caches.keys()")
            if len(now) == 2 and set(now) != set(before):
                break
            watched.page.wait_for_timeout(100)
        else:
            pytest.fail(f"the new version was not fetched: {now}")
        assert "of another page of this site" in watched.page.evaluate("() => caches.keys()")
        watched.open(site.address)
        assert "detection" in watched.page.locator("#about").text_content()
    finally:
        site.stop()


@pytest.mark.parametrize("site", ["classification"], indirect=True)
def test_the_keyboard_suffices(site: Site, watched: Watched) -> None:
    watched.open(site.address)
    for _ in range(12):
        watched.page.keyboard.press("Tab")
        if watched.page.evaluate("() => document.activeElement.getAttribute('aria-label')") == "Use the image coffee":
            break
    else:
        pytest.fail("Tab does not reach the gallery")
    watched.page.keyboard.press("Enter")
    watched.page.wait_for_selector("#results .row")
    assert len(watched.rows()) == 5


@pytest.mark.parametrize("site", ["classification"], indirect=True)
def test_the_camera(site: Site, watched: Watched) -> None:
    watched.open(site.address)
    watched.page.click("#camera")
    watched.page.wait_for_function("() => document.querySelector('#status').textContent.endsWith('images a second')")
    assert len(watched.rows()) == 5
    watched.page.click("#camera")
    assert watched.page.get_attribute("#camera", "aria-pressed") == "false"


@pytest.mark.parametrize("site", ["classification"], indirect=True)
def test_the_camera_starts_once(site: Site, watched: Watched) -> None:
    watched.page.add_init_script("""
        const give = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
        window.tracks = [];
        navigator.mediaDevices.getUserMedia = async (wanted) => {
          const stream = await give(wanted);
          window.tracks.push(...stream.getTracks());
          return stream;
        };
    """)
    watched.open(site.address)
    live = "window.tracks.filter((track) => track.readyState === 'live').length"
    # The other camera is asked for before the first one was allowed.
    watched.page.evaluate("document.querySelector('#camera').click(); document.querySelector('#turn').click()")
    watched.page.wait_for_function(f"() => window.tracks.length === 2 && {live} === 1")
    watched.page.click("#another")
    assert watched.page.evaluate(live) == 0


@pytest.mark.parametrize("site", ["classification"], indirect=True)
def test_images_that_are_not_looked_at_are_let_go(site: Site, watched: Watched, images: list[Path]) -> None:
    watched.page.add_init_script("""
        window.open_now = new Set();
        const make = window.createImageBitmap, close = ImageBitmap.prototype.close;
        window.createImageBitmap = async (...given) => {
          const bitmap = await make(...given);
          window.open_now.add(bitmap);
          return bitmap;
        };
        ImageBitmap.prototype.close = function () { window.open_now.delete(this); close.call(this); };
        const named = URL.createObjectURL, forget = URL.revokeObjectURL;
        URL.createObjectURL = (value) => { const url = named(value); window.open_now.add(url); return url; };
        URL.revokeObjectURL = (url) => { window.open_now.delete(url); forget(url); };
    """)
    watched.open(site.address)
    watched.show(*images)
    before = watched.page.evaluate("window.open_now.size")
    assert before == 1 + len(images)  # one image, and the addresses of all in the strip
    for number in (1, 2, 0):
        watched.page.locator("#strip button").nth(number).click()
        watched.page.wait_for_function(
            "width => canvas.width === width && document.querySelector('#status').textContent.endsWith(' ms')",
            arg=300 - 40 * number,
        )
    assert watched.page.evaluate("window.open_now.size") == before
    watched.page.click("#camera")
    watched.page.wait_for_function("() => document.querySelector('#status').textContent.endsWith(' a second')")
    watched.page.wait_for_timeout(1000)
    watched.page.click("#another")
    watched.page.wait_for_function("() => window.open_now.size === 0")


@pytest.mark.parametrize(("site", "task"), [(t, t) for t in ("classification", "segmentation")], indirect=["site"])
def test_photographs_larger_than_a_canvas_of_a_phone(
    site: Site, task: str, watched: Watched, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Of more than 16.7 million pixels; there, nothing is drawn on such a canvas, and zeros are read."""
    watched.page.add_init_script("""
        window.largest = 0;
        for (const kind of [HTMLCanvasElement, OffscreenCanvas]) {
          const get = kind.prototype.getContext;
          kind.prototype.getContext = function (...given) {
            window.largest = Math.max(window.largest, this.width * this.height);
            return get.call(this, ...given);
          };
        }
    """)
    path = tmp_path / "large.png"
    render_scene(0, size=256, num_objects=3).image.resize((5000, 3500)).save(path, compress_level=1)
    watched.open(site.address)
    watched.show(path)
    width, height = watched.page.evaluate("[canvas.width, canvas.height]")
    assert 0.99 * 2**24 < width * height <= watched.page.evaluate("window.largest") <= 2**24
    assert width / height == pytest.approx(5000 / 3500, rel=1e-3)
    told = Predictor(checkpoints[task], threads=1)(path).to_dict()
    shares = told.get("shares") or {item["label"]: item["probability"] for item in told["top"]}
    for label, share in watched.rows():
        assert share == pytest.approx(shares[label], abs=0.002)


def test_it_works_where_the_files_cannot_be_kept(apps: dict[str, Path], watched: Watched, tmp_path: Path) -> None:
    folder = shutil.copytree(apps["classification"], tmp_path / "half")  # of it is the next version's already
    kept = json.loads((folder / "files.json").read_text())
    (folder / "files.json").write_text(json.dumps(kept | {"version": "another"}))
    served = serve_folder(folder)
    try:
        watched.open(served.address)
    finally:
        served.stop()


@pytest.mark.parametrize("site", ["classification"], indirect=True)
def test_what_is_no_image(site: Site, watched: Watched, tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("no image")
    watched.open(site.address)
    watched.page.set_input_files("#file", str(tmp_path / "notes.jpg"))
    watched.page.wait_for_function("() => document.querySelector('#error').textContent.length > 0")
    assert watched.page.locator("#error").text_content() == "notes.jpg is not an image that this browser can read."


@pytest.mark.parametrize("site", ["segmentation"], indirect=True)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_small_screens_and_accessibility(site: Site, watched: Watched, images: list[Path], scheme: Any) -> None:
    watched.page.set_viewport_size({"width": 390, "height": 800})
    watched.page.emulate_media(color_scheme=scheme)
    watched.open(site.address)
    violations_of(watched)
    watched.show(*images)
    assert watched.page.evaluate("() => document.documentElement.scrollWidth") <= 390
    watched.keep(f"app-390-{scheme}")
    violations_of(watched)


def violations_of(watched: Watched) -> None:
    """None, says axe-core."""
    axe = Path(os.environ.get("AXE_CORE", ARTIFACTS / "node_modules" / "axe-core")) / "axe.min.js"
    if not axe.exists():
        warnings.warn(
            "accessibility is not checked: npm install axe-core, and name its folder in AXE_CORE", stacklevel=2
        )
        return
    # As text and not as a script tag, which the page's policy forbids.
    watched.page.context.new_cdp_session(watched.page).send("Runtime.evaluate", {"expression": axe.read_text()})
    watched.page.wait_for_timeout(300)  # for transitions of color
    found = watched.page.evaluate("axe.run().then(r => r.violations.map(v => v.id + ': ' + v.nodes[0].html))")
    assert found == []


@pytest.mark.parametrize("site", ["classification"], indirect=True)
def test_another_device_and_back(site: Site, watched: Watched, images: list[Path]) -> None:
    """Where there is no graphics card, asking for it leaves the processor at work; and that may be asked for again."""
    watched.open(site.address)
    before = engine_answer(watched, images[0])
    told = watched.page.evaluate("""async () => {
        const engine = await import(new URL("engine.js", location.href).href);
        const failed = await engine.useDevice("webgpu").then(() => "", (error) => String(error));
        const between = engine.currentDevice();
        await engine.useDevice("wasm");
        return { failed, between };
    }""")
    if told["failed"]:
        assert told["between"] == "wasm"
    assert engine_answer(watched, images[0]) == before


def test_the_page_of_the_service(watched: Watched, checkpoints: dict[str, Path], images: list[Path]) -> None:
    """All three tasks, and the attention of a pixel."""
    server = Server([*checkpoints.values(), "--threads", "1"])
    try:
        address = f"http://127.0.0.1:{server.port}/"
        watched.open(address)
        violations_of(watched)
        for number, task in enumerate(TASKS):
            watched.page.select_option("#model", str(number))
            watched.show(images[0])
            watched.page.wait_for_function(
                "task => document.querySelector('#about').textContent.includes(task)", arg=task
            )
            watched.keep(f"service-{task}")
            violations_of(watched)
            if task == "classification":
                expected = Predictor(checkpoints[task])(str(images[0])).top(5)
                assert watched.rows() == [(label, pytest.approx(share, abs=1e-3)) for label, share in expected]
                watched.page.click("#canvas", position={"x": 50, "y": 60})
                watched.page.wait_for_selector("#explanation:not([hidden])", timeout=60_000)
                assert watched.page.evaluate("() => document.querySelector('#explanation-image').naturalWidth") > 500
                watched.keep("service-explanation")
        with urllib.request.urlopen(f"{address}v1/models") as told:
            assert len(json.load(told)["models"]) == 3
    finally:
        assert server.stop() == 0
