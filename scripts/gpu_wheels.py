"""Collect what benchmarks/gpu_session.py needs and a bare machine lacks, as wheels for Linux on x86-64.

    python scripts/gpu_wheels.py                       # into gpu-session/wheels, for Python 3.12
    python scripts/gpu_wheels.py --there packages.txt  # what `pip freeze` prints on that machine

On the machine, with nothing to download from:

    python3 -m pip install -q --no-index --no-deps --target /tmp/site gpu-session/wheels/*.whl
    PYTHONPATH=src:/tmp/site python3 benchmarks/gpu_session.py

Wheels are taken without what they need in turn; what of that is neither there nor collected is taken next, until
nothing is missing. Wheels and the files under version control must fit into --limit together.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("train", "serve", "peers")
TESTS = ("pytest", "pytest-xdist", "psutil")
THERE = (
    "torch", "torchvision", "triton", "numpy", "pillow", "safetensors", "huggingface-hub", "pyyaml", "rich",
    "torchmetrics", "tensorboard", "matplotlib", "pyarrow", "fsspec", "aiohttp", "timm", "transformers", "pytest",
    "pytest-xdist", "psutil", "prometheus-client", "uvloop", "anyio", "click", "h11", "typing-extensions",
    "annotated-doc", "idna", "packaging", "attrs",
)  # fmt: skip
"""What comes with an image for PyTorch, timm and transformers."""
GLIBC = (17, 24, 27, 28, 31, 34, 35)
"""Minor versions whose wheels the machine takes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-session" / "wheels")
    parser.add_argument("--python", default="3.12", help="version on the machine")
    parser.add_argument("--there", type=Path, help="file that names what it has, one a line")
    parser.add_argument("--limit", type=float, default=64.0, help="MiB for wheels and files under version control")
    arguments = parser.parse_args()
    there = set(THERE)
    if arguments.there is not None:
        there = {canonical(re.split(r"[ =<>@;]", line)[0]) for line in arguments.there.read_text().splitlines()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for old in arguments.out.glob("*.whl"):
        old.unlink()
    collected: set[str] = set()
    wanted = [need for need in needs_of_the_project() if canonical(need.name) not in there]
    while wanted:
        download(wanted, arguments.out, arguments.python)
        collected |= {canonical(need.name) for need in wanted}
        needs = {canonical(need.name): need for need in needs_of_wheels(arguments.out, arguments.python)}
        wanted = [need for name, need in needs.items() if name not in there | collected]
    wheels = sorted(arguments.out.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:8.2f} MiB  {wheel.name}")
    total = sum(file.stat().st_size for file in [*wheels, *tracked()]) / 2**20
    print(f"{total:8.2f} MiB  with the files under version control")
    if total > arguments.limit:
        sys.exit(f"more than {arguments.limit} MiB")


def canonical(name: str) -> str:
    """The name as all tools compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needs_of_the_project() -> Iterator[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in extras.get(extra, ())), *TESTS]
    for need in map(Requirement, lines):
        if need.name != project["name"] and (need.marker is None or need.marker.evaluate({"sys_platform": "linux"})):
            yield need


def needs_of_wheels(folder: Path, python: str) -> Iterator[Requirement]:
    """What the wheels' metadata ask for on that machine, without extras."""
    machine = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "extra": "",
    }
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            metadata = HeaderParser().parsestr(archive.read(name).decode())
        for need in map(Requirement, metadata.get_all("Requires-Dist") or ()):
            if need.marker is None or need.marker.evaluate(machine):
                yield need


def download(needs: Iterable[Requirement], out: Path, python: str) -> None:
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC]
    platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    names = [f"{need.name}{need.specifier}" for need in needs]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += [f"--python-version={python}", "--implementation=cp", *platforms, f"--dest={out}", *names]
    subprocess.run(command, check=True)


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in filter(None, listed.split("\0")) if (path := ROOT / name).is_file()]


if __name__ == "__main__":
    main()
