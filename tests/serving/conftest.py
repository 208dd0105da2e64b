from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import mobilevit
from golden_weights import fill_with_golden_weights
from mobilevit.card import TaskName
from running_server import Server

TASKS: tuple[TaskName, ...] = ("classification", "detection", "segmentation")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model of each task, by its name."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for task in TASKS:
        model = fill_with_golden_weights(mobilevit.create_model("mobilevit_xxs", task=task, num_classes=6))
        resize_mode = "crop" if task == "classification" else "stretch"
        found[task] = mobilevit.save(
            model,
            folder / f"{task}.safetensors",
            classes=["a", "b", "c", "d", "e", "f"],
            preprocessing=mobilevit.Preprocessing(size=(64, 96), resize_mode=resize_mode),
        )
    return found


@pytest.fixture(scope="session")
def server(checkpoints: dict[str, Path]) -> Iterator[Server]:
    """All three tasks, default settings."""
    running = Server([*checkpoints.values(), "--threads", "1", "--max-pixels", "1000000", "--max-body-mb", "2"])
    yield running
    assert running.stop() == 0
