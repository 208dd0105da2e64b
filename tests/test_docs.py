"""Every code block of README and docs runs, in order, in a folder such as a reader would have.

```python blocks are executed, each line of ```bash blocks is run; ```console and others are for reading.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import mobilevit
from mobilevit.cli import main
from mobilevit.data.shapes import render_scene

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "README.zh-CN.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
FLOWERS = ("daisy", "rose", "tulip")


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, code) of each fenced block, indented ones included."""
    found = re.findall(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    return [(language, re.sub(f"^{indent}", "", code, flags=re.M)) for indent, language, code in found]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with labelled flowers, a few photos and a cat; public weights lie where a reader may place them."""
    for number in range(15):
        picture = render_scene(number % 3, size=64).image
        for path in (
            f"flowers/{FLOWERS[number % 3]}/{number}.jpg",
            f"photos/{number}.jpg" if number < 3 else "cat.jpg",
        ):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / path)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("mobilevit_xxs", "mobilevit_xs", "mobilevit_s"):
        mobilevit.save(mobilevit.create_model(name), home / f"{name}.cvnets_in1k.safetensors")
    monkeypatch.setenv("MOBILEVIT_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


def run_line(line: str) -> None:
    """A plain `mobilevit` command in this process, which is quick; anything with a shell's signs in a shell."""
    if not line or line.startswith("#"):
        return
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
def test_links_and_pictures_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [t for t in targets if not re.match(r"\w+:", t) and not ((ROOT / page).parent / t).exists()]
    assert missing == []


def test_pictures_can_be_opened() -> None:
    for path in (ROOT / "docs" / "images").glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 100


def test_tables_are_those_of_the_result_files() -> None:
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], check=True, cwd=ROOT)
