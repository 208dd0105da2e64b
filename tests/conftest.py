"""Fixtures for all tests; that this file exists also puts its folder on the import path (`golden_weights`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mobilevit.data.shapes import write_folder
from mobilevit.training.config import TrainConfig


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 images of six classes, 32 pixels wide; not to be written into."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_folder(folder, num_images=60, size=32)
    return folder


@pytest.fixture
def tiny(shapes: Path, tmp_path: Path) -> TrainConfig:
    """A run of two epochs of six steps each, in seconds."""
    return TrainConfig(
        data=shapes, out=tmp_path / "run", image_size=32, epochs=2, batch_size=8, num_workers=0, learning_rate=1e-3
    )
