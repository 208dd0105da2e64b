"""A folder of static files that runs an exported model in a browser: the ONNX file, its runtime, and one page."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from mobilevit.card import ModelCard
from mobilevit.errors import MobileViTError
from mobilevit.files import cache_folder, write_bytes, write_json, write_text
from mobilevit.imaging.drawing import class_colors
from mobilevit.runtime.artifact import read_sidecar, sidecar_of
from mobilevit.webpage import page_files

log = logging.getLogger("mobilevit")

RUNTIME_VERSION = "1.30.0"
_RUNTIME = f"onnxruntime-web@{RUNTIME_VERSION}"
RUNTIME_VARIABLE = "MOBILEVIT_WEB_RUNTIME"
"""Environment variable with the folder of an unpacked package, for machines without a network."""

_AT_ONCE = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""The runtime for processors, which every visitor loads."""
_FOR_GPU = ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm")
"""The runtime for graphics cards, loaded when a visitor chooses it."""
_MODEL = "model.onnx"


def write_page(artifact: Path, final: Path, runtime: Path) -> int:
    """Write a folder of static files, a page and what it needs to run the model; returns its size in bytes.

    The artifact is an .onnx file with preprocessing inside, and with `selected` boxes if it detects. What stood at
    `final` is replaced.
    """
    card = read_sidecar(artifact).card
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".export-") as aside:
        folder = Path(aside) / final.name
        model = write_bytes(folder / _MODEL, artifact.read_bytes())
        described = json.loads(sidecar_of(artifact).read_text(encoding="utf-8"))
        colors = [f"rgb({red} {green} {blue})" for red, green, blue in class_colors(len(card.classes))]
        extra = {"file": _MODEL, "bytes": model.stat().st_size, "colors": colors}
        write_json(folder / "model.json", described | extra)
        page = page_files("browser")
        readme = page.pop("README.txt").decode()
        for path, data in page.items():
            write_bytes(folder / path, data)
        for file in (*_AT_ONCE, *_FOR_GPU):
            write_bytes(folder / "runtime" / file, (runtime / "dist" / file).read_bytes())
        terms = next((path for path in runtime.iterdir() if path.name.lower().startswith("license")), None)
        write_text(folder / "runtime" / "LICENSE", terms.read_text() if terms else "MIT, see onnxruntime.ai\n")
        num_bytes = _write_index(folder, card, readme)
        if final.exists():
            final.rename(Path(aside) / "old")
        folder.rename(final)
    return num_bytes


def _write_index(folder: Path, card: ModelCard, readme: str) -> int:
    """Write the files that name all others, and return the size of these."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode() + (folder / name).read_bytes())
    version = digest.hexdigest()[:16]
    at_once = [name for name in names if Path(name).name not in _FOR_GPU]
    write_json(folder / "files.json", {"version": version, "files": ["./", *at_once]})
    worker = folder / "service_worker.js"
    write_text(worker, worker.read_text(encoding="utf-8").replace('VERSION = "unknown"', f'VERSION = "{version}"'))
    total = sum(path.stat().st_size for path in files)
    text = readme.format(
        name=card.name,
        task=card.task,
        count=len(card.classes),
        megabytes=total / 1e6,
        first=sum((folder / name).stat().st_size for name in at_once) / 1e6,
        version=RUNTIME_VERSION,
    )
    write_text(folder / "README.txt", text)
    return total


def find_runtime() -> Path:
    """Find the folder of the unpacked runtime: named by an environment variable, kept from before, or fetched by npm.

    Raises:
        MobileViTError: it is not complete, or npm is missing or fails.
    """
    told = os.environ.get(RUNTIME_VARIABLE)
    folder = Path(told) if told else cache_folder() / _RUNTIME.replace("@", "-")
    if not told and not folder.exists():
        _fetch(folder)
    missing = [name for name in (*_AT_ONCE, *_FOR_GPU) if not (folder / "dist" / name).is_file()]
    if missing:
        raise MobileViTError(
            f"{folder}: not an unpacked {_RUNTIME} (dist/{missing[0]} is missing); unpack it anew and name its folder "
            f"in {RUNTIME_VARIABLE}"
        )
    return folder


def _fetch(folder: Path) -> None:
    """Fetch the package by npm, which checks its digest."""
    remedy = f"or unpack {_RUNTIME} yourself and name its folder in {RUNTIME_VARIABLE}"
    npm = shutil.which("npm")
    if npm is None:
        raise MobileViTError(f"a page takes {_RUNTIME} from npm, which is not installed; install Node.js, {remedy}")
    log.info("fetching %s by npm, once", _RUNTIME)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as aside:
        try:
            done = subprocess.run(
                [npm, "pack", _RUNTIME, "--silent"], cwd=aside, capture_output=True, text=True, timeout=600, check=True
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            lines = [line for line in str(error.stderr or "").splitlines() if line.strip()]
            reason = lines[-1] if lines else type(error).__name__
            raise MobileViTError(f"npm could not fetch {_RUNTIME} ({reason}); connect to a network, {remedy}") from None
        archive = Path(aside) / done.stdout.split()[-1]
        shutil.unpack_archive(archive, aside, filter="data")
        (Path(aside) / "package").rename(folder)
