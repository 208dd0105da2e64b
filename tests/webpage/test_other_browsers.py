"""The page in Firefox, and in WebKit, of which Safari is made: the answers of `Predictor`.

Firefox wants Node.js and the npm package puppeteer-core, whose folder is named in PUPPETEER; WebKit wants Selenium,
WebKitGTK with its driver (Debian's webkit2gtk-driver), and a display (xvfb-run).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from watched_page import ARTIFACTS, ENGINE_ANSWER, TASKS, same_answer, serve_folder

from mobilevit.runtime.predictor import Predictor

Look = Callable[[str, Path, list[Path]], list[dict[str, Any]]]
"""From an address, a file for a screenshot, and images: of each image the engine's answer, and the rows shown."""


@pytest.fixture(scope="session")
def firefox() -> Look:
    node, program = shutil.which("node"), shutil.which("firefox") or shutil.which("firefox-esr")
    puppeteer = os.environ.get("PUPPETEER")
    if not (node and program and puppeteer):
        pytest.skip("wants Firefox, Node.js, and puppeteer-core's folder in PUPPETEER")

    def look(address: str, screenshot: Path, images: list[Path]) -> list[dict[str, Any]]:
        script = Path(__file__).with_name("firefox.mjs")
        command = [node, script, puppeteer, program, address, screenshot, ENGINE_ANSWER, *images]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    return look


@pytest.fixture(scope="session")
def webkit() -> Look:
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed: pip install selenium")
    driver = shutil.which("WebKitWebDriver")
    browsers = sorted(Path("/usr").glob("lib*/**/webkit2gtk-4*/MiniBrowser"))
    if not (driver and browsers and "DISPLAY" in os.environ):
        pytest.skip("wants WebKitGTK, its driver, and a display")

    def look(address: str, screenshot: Path, images: list[Path]) -> list[dict[str, Any]]:
        options = webdriver.WebKitGTKOptions()
        options.binary_location = str(browsers[-1])
        options.add_argument("--automation")
        browser = webdriver.WebKitGTK(options=options, service=webdriver.WebKitGTKService(driver))
        try:
            browser.set_script_timeout(60)
            browser.get(address)
            wait_for(lambda: browser.execute_script("return document.documentElement.dataset.ready") == "true")
            found = []
            for image in images:
                script = (
                    f"const done = arguments[1]; ({ENGINE_ANSWER})(arguments[0]).then(done, (e) => done(String(e)))"
                )
                answer = browser.execute_async_script(script, list(image.read_bytes()))
                browser.find_element("id", "file").send_keys(str(image))
                wait_for(lambda: browser.find_element("id", "status").text.endswith(" ms"))
                rows = [name.text for name in browser.find_elements("css selector", "#results .name")]
                found.append({"answer": answer, "rows": rows})
            browser.save_screenshot(str(screenshot))
        finally:
            browser.quit()
        return found

    return look


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("browser", ["firefox", "webkit"])
def test_the_answers_are_those_of_the_predictor(
    browser: str, task: str, request: pytest.FixtureRequest, checkpoints: dict[str, Path], images: list[Path]
) -> None:
    look = request.getfixturevalue(browser)
    site = serve_folder(request.getfixturevalue("apps")[task])
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    try:
        found = look(site.address, ARTIFACTS / f"{browser}-{task}.png", images)
    finally:
        site.stop()
    for one, image in zip(found, images, strict=True):
        expected = Predictor(checkpoints[task])(str(image))
        same_answer(one["answer"], expected)
        if task == "classification":
            assert one["rows"] == [label for label, _ in expected.top(5)]
        else:
            assert one["rows"] != []
