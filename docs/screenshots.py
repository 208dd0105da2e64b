"""Makes the images of a run that README and tutorials show, into docs/images/.

    python docs/screenshots.py  # runs `mobilevit demo` first: some minutes
    python docs/screenshots.py --from demo  # takes them from the folder of a demo that has been run
    python docs/screenshots.py --task detection --from FOLDER  # from one of `mobilevit demo --task detection`
    python docs/screenshots.py --task segmentation --from FOLDER
    python docs/screenshots.py --page FOLDER FOLDER FOLDER  # the web page before the models of demos, by Chromium

The drawings of how the model works are made by docs/figures.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

from PIL import Image

import mobilevit
from mobilevit.data.check import contact_sheet
from mobilevit.data.datasets import find_splits
from mobilevit.data.shapes import render_scene

FOLDER = Path(__file__).parent / "images"
IMAGES = {
    "classification": {
        "demo.png": "unseen.png",
        "curves.png": "run/curves.png",
        "confusion_matrix.png": "run/confusion_matrix.png",
    },
    "detection": {
        "detection-demo.png": "unseen.png",
        "detection-pr-curves.png": "run/pr_curves.png",
    },
    "segmentation": {
        "segmentation-demo.png": "unseen.png",
        "segmentation-iou.png": "run/per_class_iou.png",
    },
}
"""By task: name in docs/images/, file in the folder of a demo."""
SHEET = "unseen.png"
"""The others are plots, which a palette of 256 colors keeps small."""
MOST_COLUMNS = 1400
"""Wider images are made smaller."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(IMAGES), default="classification", help="whose images to make")
    parser.add_argument("--from", dest="demo", type=Path, metavar="FOLDER", help="a folder that `mobilevit demo` wrote")
    parser.add_argument("--page", type=Path, nargs="+", metavar="FOLDER", help="demos whose models the web page shows")
    arguments = parser.parse_args()
    if arguments.page is not None:
        take_page(arguments.page)
        return
    if arguments.demo is not None:
        take(arguments.demo, arguments.task)
        return
    from mobilevit.demo import run_demo

    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder) / "demo"
        run_demo(demo, arguments.task, epochs=None, num_images=None, seed=0)
        take(demo, arguments.task)


def take(demo: Path, task: str) -> None:
    """Copy a demo's images, and draw what `mobilevit data check` shows of its boxes or masks."""
    FOLDER.mkdir(exist_ok=True)
    for name, source in IMAGES[task].items():
        save(Image.open(demo / source), name, few_colors=source != SHEET)
    if task == "detection":
        image = sorted((demo / "data").rglob("*.png"))[1]
        explanation = mobilevit.explain(mobilevit.load(demo / "run" / "best.safetensors"), image)
        save(explanation.draw(), "explain-attention.png", few_colors=True)
        save(explanation.draw_patches(), "explain-patches.png", few_colors=True)
    if task != "classification":
        sheet = contact_sheet(find_splits(demo / "data"), num_images=6, cell=220)
        save(sheet, f"{task}-check.png", few_colors=False)


def take_page(demos: list[Path]) -> None:
    """The page of `mobilevit serve` with an image that each demo's model has not seen, side by side."""
    from playwright.sync_api import sync_playwright

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    models = [f"{demo.name}={demo / 'run' / 'best.safetensors'}" for demo in demos]
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    shots = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver, serving(models, port):
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 460, "height": 760}, device_scale_factor=1.5)
        for number in range(len(demos)):
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_selector("html[data-ready=true]")
            page.select_option("#model", str(number))
            photo = Path(folder) / "scene.png"
            render_scene(900_009, size=256, num_objects=3 if number else 1).image.save(photo)
            page.set_input_files("#file", str(photo))
            page.wait_for_selector("#results .row")
            page.wait_for_timeout(500)
            shots.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
        browser.close()
    sheet = Image.new("RGB", (sum(shot.width for shot in shots), shots[0].height))
    for number, shot in enumerate(shots):
        sheet.paste(shot, (number * shot.width, 0))
    save(sheet, "page.png", few_colors=False)


@contextlib.contextmanager
def serving(models: list[str], port: int) -> Iterator[None]:
    """Meanwhile, `mobilevit serve` answers."""
    server = subprocess.Popen([sys.executable, "-m", "mobilevit", "serve", *models, "--port", str(port)])
    try:
        wait_for(f"http://127.0.0.1:{port}/readyz")
        yield
    finally:
        server.terminate()
        server.wait()


def wait_for(address: str) -> None:
    """Until it answers."""
    for _ in range(600):
        with contextlib.suppress(OSError):
            urlopen(address, timeout=1).close()
            return
        time.sleep(0.1)
    raise TimeoutError(address)


def save(image: Image.Image, name: str, *, few_colors: bool) -> None:
    image = image.convert("RGB")
    image.thumbnail((MOST_COLUMNS, 10 * MOST_COLUMNS), Image.Resampling.LANCZOS)
    if few_colors:
        image = image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    path = FOLDER / name
    image.save(path, optimize=True)
    print(f"docs/images/{name}: {image.width} x {image.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
