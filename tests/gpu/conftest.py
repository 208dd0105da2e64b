"""Tests that a CUDA GPU must pass: `pytest -m gpu`.

MOBILEVIT_GPU_TESTS_DEVICE=cpu runs those on the CPU that do not need a GPU, so that a mistake in them is found without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mobilevit
from mobilevit.data import shapes

# Read when the first matrix product runs; without it, cuBLAS may add up in another order in every run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

SIZE = 64
WRITE: dict[str, Callable[..., None]] = {
    "classification": shapes.write_folder,
    "detection": shapes.write_boxes,
    "segmentation": shapes.write_masks,
}


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    chosen = torch.device(os.environ.get("MOBILEVIT_GPU_TESTS_DEVICE", "cuda"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA GPU")
    return chosen


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """For what only a GPU has."""
    if device.type != "cuda":
        pytest.skip("only a CUDA GPU has this")
    return device


@pytest.fixture(autouse=True)
def _exact_float32(device: torch.device) -> Iterator[None]:
    """Convolutions in float32, not in TF32, and compiled ones as they are on a CPU, where compiling takes minutes."""
    tf32, stance = torch.backends.cudnn.allow_tf32, "default" if device.type == "cuda" else "force_eager"
    torch.backends.cudnn.allow_tf32 = False
    with torch.compiler.set_stance(stance):
        yield
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture(scope="session")
def data_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of 24 labeled images for a task, written once."""
    written: dict[str, Path] = {}

    def write(task: str) -> Path:
        if task not in written:
            written[task] = tmp_path_factory.mktemp("data") / task
            WRITE[task](written[task], num_images=24, size=SIZE)
        return written[task]

    return write


@pytest.fixture(scope="session")
def trained(data_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint for a task, trained a little on the CPU, once."""
    runs: dict[str, Path] = {}

    def train(task: str) -> Path:
        if task not in runs:
            settings: dict[str, Any] = {"image_size": SIZE, "epochs": 1, "batch_size": 6, "num_workers": 0}
            out = tmp_path_factory.mktemp("runs") / task
            config = mobilevit.TrainConfig(data=data_of(task), out=out, device="cpu", learning_rate=1e-3, **settings)
            runs[task] = Path(mobilevit.train(config).best)
        return runs[task]

    return train
