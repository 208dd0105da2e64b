"""What every benchmark script writes beside its figures: where, with what, and how they were measured."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mobilevit.files import write_json

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch", "torchvision", "timm", "transformers", "pillow", "numpy", "onnx", "onnxruntime", "openvino", "nncf",
    "executorch", "torchao", "ray", "pyarrow", "litert-torch", "ai-edge-litert", "ai-edge-quantizer", "triton",
)  # fmt: skip


def write(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `NAME.json` into a folder and say so."""
    packages = {package: version for package in PACKAGES if (version := version_of(package))}
    record = {
        "command": command(),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": {"processor": processor(), "threads": torch.get_num_threads(), "gpus": gpus()},
        "packages": packages | {"python": platform.python_version()} | cuda(),
        **figures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = write_json(folder / f"{name}.json", record)
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}", flush=True)
    return path


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def command() -> str:
    """The command line without folders of this machine."""
    words, flag = ["python"], ""
    for word in sys.argv:
        flag = word if word.startswith("--") else flag
        is_place = flag in ("--data", "--out", "--from", "--before", "--imagenette", "--cifar10") and word != flag
        words.append("FOLDER" if is_place else shlex.quote(word))
    return " ".join(words)


def processor() -> str:
    """The processor's name and instruction sets that matter here."""
    try:
        text = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    kinds = [k for k in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16") if k in fields.get("Flags", "")]
    return f"{fields.get('Model name', '?').strip()}, {fields.get('CPU(s)', '?').strip()} cores, {' '.join(kinds)}"


def gpus() -> list[str]:
    """Names of the GPUs PyTorch sees."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def cuda() -> dict[str, str]:
    """Versions of what computes on a GPU; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    return {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
