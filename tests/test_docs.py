"""Every code block of README and docs runs, in order, in a folder such as a reader would have.

```python blocks are executed, each line of ```bash blocks is run; ```console and others are for reading. Training runs
for one epoch, classifiers at 64 pixels, and measurements for two rounds, whatever the page says.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import mobilevit
from mobilevit.cli import main
from mobilevit.data.shapes import CLASSES, render_scene

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "README.zh-CN.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
FLOWERS = ("daisy", "rose", "tulip")


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, code) of each fenced block, indented ones included."""
    found = re.findall(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    return [(language, re.sub(f"^{indent}", "", code, flags=re.M)) for indent, language, code in found]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with labeled flowers, cells in boxes, streets in masks, a few photos and single images.

    Public weights lie where a reader may place them.
    """
    write_cells(tmp_path / "cells")
    write_streets(tmp_path / "streets")
    for name in ("smear.jpg", "street.jpg"):
        render_scene(40, size=96, num_objects=3).image.save(tmp_path / name)
    for number in range(36):  # as many as int8 is calibrated on
        image = render_scene(number % 3, size=64).image
        for path in (
            f"flowers/{FLOWERS[number % 3]}/{number}.jpg",
            f"photos/{number}.jpg" if number < 3 else "cat.jpg",
        ):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / path)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("mobilevit_xxs", "mobilevit_xs", "mobilevit_s"):
        mobilevit.save(mobilevit.create_model(name), home / f"{name}.cvnets_in1k.safetensors")
    monkeypatch.setenv("MOBILEVIT_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


PARTS = ("train", "train", "train", "train", "val", "test")


def write_cells(folder: Path) -> None:
    """Boxes as Pascal VOC has them, in three parts."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for number in range(12):
        scene = render_scene(number, size=96, num_objects=2)
        scene.image.save(folder / "JPEGImages" / f"{number:04d}.jpg")
        sides = ("xmin", "ymin", "xmax", "ymax")
        objects = "".join(
            f"<object><name>{CLASSES[label]}</name><bndbox>"
            + "".join(f"<{side}>{value:.0f}</{side}>" for side, value in zip(sides, box, strict=True))
            + "</bndbox></object>"
            for label, box in zip(scene.labels, scene.boxes_xyxy, strict=True)
        )
        size = "<size><width>96</width><height>96</height></size>"
        annotation = folder / "Annotations" / f"{number:04d}.xml"
        annotation.write_text(f"<annotation>{size}{objects}</annotation>")
        with (folder / "ImageSets" / "Main" / f"{PARTS[number % len(PARTS)]}.txt").open("a") as names:
            names.write(f"{number:04d}\n")


def write_streets(folder: Path) -> None:
    """Images and masks, in three parts."""
    for number in range(12):
        scene = render_scene(number, size=96, num_objects=2)
        part = PARTS[number % len(PARTS)]
        for kind in ("images", "masks"):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
        scene.image.save(folder / "images" / part / f"{number:04d}.jpg")
        Image.fromarray(scene.mask).save(folder / "masks" / part / f"{number:04d}.png")
    (folder / "classes.txt").write_text("\n".join(("background", *CLASSES)))


# The Chinese README has the blocks of the English one, as a test below makes sure.
RUNNABLE = [
    page
    for page in PAGES
    if page != "README.zh-CN.md" and {"python", "bash"} & {language for language, _ in blocks(page)}
]


@pytest.mark.parametrize("page", RUNNABLE)
def test_code_blocks_run(page: str, reader: Path) -> None:
    names: dict[str, object] = {"__name__": page}
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, f"{page}: {code.splitlines()[0]}", "exec"), names)
        elif language == "bash":
            for line in code.replace("\\\n", " ").splitlines():
                run_line(line.partition(" #")[0].strip())


_SERVERS: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _servers_end_with_their_page() -> Iterator[None]:
    yield
    while _SERVERS:
        server = _SERVERS.pop()
        server.terminate()
        assert server.wait(60) == 0


def start_server(line: str) -> None:
    """What a reader leaves running: a page's other blocks ask it."""
    command = [sys.executable, "-m", *shlex.split(line.rstrip("& "))]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    _SERVERS.append(server)
    assert server.stdout is not None
    assert server.stdout.readline().startswith("serving at http"), line


def run_line(line: str) -> None:
    """A plain `mobilevit` command in this process, which is quick; anything with a shell's signs in a shell."""
    if not line or line.startswith("#"):
        return
    if line.startswith("mobilevit serve "):
        start_server(line)
        return
    if line.startswith("mobilevit train ") and "--resume" not in line and "--recipe list" not in line:
        line = re.sub(r" --epochs \d+", "", line) + " --epochs 1"
        if "--recipe" not in line and "--config" not in line and "--image-size" not in line:
            line += " --image-size 64"
    if line.startswith("mobilevit benchmark "):
        line += " --engines eager onnx --rounds 2 --no-peers"
    if line.startswith("mobilevit tune "):
        line += " --engines onnx --rounds 2 --threads 1"
    if line.startswith("mobilevit ") and not re.search(r"[|<>$*]", line):
        assert main(shlex.split(line)[1:]) == 0, line
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    told = subprocess.run(["bash", "-ec", line], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert told.returncode == 0, f"{line}\n{told.stderr}"


def test_readmes_have_the_same_code() -> None:
    english, chinese = ([block for block in blocks(page) if block[0] in ("python", "bash")] for page in PAGES[:2])
    strip = re.compile(r"\s*#.*")
    assert [(k, strip.sub("", c)) for k, c in english] == [(k, strip.sub("", c)) for k, c in chinese]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [t for t in targets if not re.match(r"\w+:", t) and not ((ROOT / page).parent / t).exists()]
    assert missing == []


def test_images_can_be_opened() -> None:
    for path in (ROOT / "docs" / "images").glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 100


@pytest.mark.parametrize("page", ["docs/detection.md", "docs/segmentation.md"])
def test_messages_are_those_of_the_code(page: str) -> None:
    """The first column of the tables of what to do about messages."""
    section = (ROOT / page).read_text(encoding="utf-8").partition("## When the data are not right")[2]
    messages = re.findall(r"^\| `([^`]+)` \|", section.partition("\n## ")[0], re.M)
    source = "".join(file.read_text() for file in (ROOT / "src" / "mobilevit").rglob("*.py"))
    assert len(messages) > 5
    assert [message for message in messages if message not in source] == []


def test_tables_are_those_of_the_result_files() -> None:
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], check=True, cwd=ROOT)
