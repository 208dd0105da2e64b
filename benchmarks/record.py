"""What every benchmark script writes beside its figures: where, with what, and how they were measured."""

from __future__ import annotations

import platform
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


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write `results/NAME.json` and say so."""
    packages = {package: version for package in PACKAGES if (version := version_of(package))}
    record = {
        "command": command(),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": {"processor": processor(), "threads": torch.get_num_threads(), "gpus": gpus()},
        "packages": packages | {"python": platform.python_version()},
        **figures,
    }
    path = write_json(RESULTS / f"{name}.json", record)
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def command() -> str:
    """The command line without folders of this machine."""
    words = [sys.argv[0], *sys.argv[1:]]
    places = {number + 1 for number, word in enumerate(words) if word in ("--data", "--out", "--from")}
    return " ".join(["python", *("FOLDER" if number in places else word for number, word in enumerate(words))])


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
