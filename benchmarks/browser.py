"""One image in a headless Chromium, WASM with one and two threads, beside ONNX Runtime natively; in turns, medians.

    python benchmarks/browser.py                    # XXS at 256 pixels with random weights; two minutes
    python benchmarks/browser.py --models mobilevit_xxs mobilevit_s

Needs a Chromium, the package playwright, and npm for the runtime. Times are of the model alone, on ready bytes, and of
the whole answer: decoding, resizing and the model.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mobilevit
import record
from mobilevit.data.shapes import render_scene
from mobilevit.exporting.web import RUNTIME_VERSION
from mobilevit.runtime.session import ArtifactSession

SCRIPT = """async ({ threads, rounds, side, image }) => {
    const ort = await import(new URL("runtime/ort.wasm.min.mjs", location.href).href);
    const engine = await import(new URL("engine.js", location.href).href);
    ort.env.wasm.wasmPaths = new URL("runtime/", location.href).href;
    ort.env.wasm.numThreads = threads;
    const session = await ort.InferenceSession.create(new URL("model.onnx", location.href).href);
    const pixels = new Uint8Array(side * side * 3).map((_, n) => (n * 7919) % 256);
    const feeds = { [session.inputNames[0]]: new ort.Tensor("uint8", pixels, [1, side, side, 3]) };
    const blob = await (await fetch(image)).blob();
    const model = [], whole = [];
    for (let n = 0; n < rounds + 3; n++) {
        let begun = performance.now();
        await session.run(feeds);
        if (n >= 3) model.push(performance.now() - begun);
        begun = performance.now();
        await engine.predict(null, blob);
        if (n >= 3) whole.push(performance.now() - begun);
    }
    return { model, whole };
}"""


class Isolated(http.server.SimpleHTTPRequestHandler):
    """Static files with the headers that allow threads."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # noqa: RUF012

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mobilevit_xxs"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name in arguments.models:
            for precision in ("fp32", "int8"):
                figures[f"{name} {precision}"] = measure(name, precision, Path(place), browser, arguments)
                print(name, precision, figures[f"{name} {precision}"], flush=True)
        version = browser.version
        browser.close()
    record.write(
        "browser", {"unit": "ms, median", "chromium": version, "onnxruntime-web": RUNTIME_VERSION, "figures": figures}
    )


def measure(name: str, precision: str, place: Path, browser: Any, arguments: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    model = mobilevit.create_model(name, classes=[str(number) for number in range(1000)])
    images = [np.asarray(render_scene(n, size=256).image) for n in range(32)]
    calibration = {} if precision == "fp32" else {"calibration": images}
    folder = mobilevit.export(
        model, place, format="web", precision=precision, name=name, verify=False, **calibration
    ).path
    sessions = {}
    for threads in (1, 2):
        copied = place / f"{name}-{precision}-{threads}"
        mobilevit.export(
            model, copied, format="onnx", precision=precision, bake_preprocessing=True, verify=False, **calibration
        )
        sessions[threads] = ArtifactSession(next(copied.glob("*.onnx")), threads=threads)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Isolated, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    spent: dict[str, list[float]] = {}
    pixels = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    for _ in range(arguments.rounds):
        for threads in (1, 2):
            context = browser.new_context()
            page = context.new_page()
            page.goto(f"http://localhost:{server.server_port}/")
            page.wait_for_selector("html[data-ready=true]", timeout=60_000)
            told = {"threads": threads, "rounds": arguments.repeats, "side": 256, "image": "gallery/cat.jpg"}
            found = page.evaluate(SCRIPT, told)
            spent.setdefault(f"browser, {threads} threads", []).append(statistics.median(found["model"]))
            spent.setdefault(f"browser with image, {threads} threads", []).append(statistics.median(found["whole"]))
            context.close()
            spent.setdefault(f"native, {threads} threads", []).append(
                native(sessions[threads], pixels, arguments.repeats)
            )
    server.shutdown()
    return {side: round(statistics.median(times), 2) for side, times in spent.items()}


def native(session: ArtifactSession, pixels: torch.Tensor, repeats: int) -> float:
    times = []
    for number in range(repeats + 3):
        start = time.perf_counter()
        session.raw(pixels)
        if number >= 3:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    main()
