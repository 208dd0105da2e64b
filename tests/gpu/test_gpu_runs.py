"""Whole runs on a GPU: resumed exactly, measured, and used to predict and to serve as on the CPU."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mobilevit
from mobilevit.data import shapes
from mobilevit.training.dry_run import dry_run
from mobilevit.training.run_folder import RunFolder, TrainingInterrupted

pytestmark = pytest.mark.gpu

TASKS = ("classification", "detection", "segmentation")
DataOf = Callable[[str], Path]
Trained = Callable[[str], Path]


@pytest.fixture
def _deterministic() -> Iterator[None]:
    """Kernels that add up in one order; the few that have none only warn."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def config_of(data: Path, out: Path, device: torch.device, **settings: Any) -> mobilevit.TrainConfig:
    defaults = {"image_size": 64, "epochs": 2, "batch_size": 6, "num_workers": 0, "learning_rate": 1e-3}
    return mobilevit.TrainConfig(data=data, out=out, device=str(device), **{**defaults, **settings})


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("task", TASKS)
def test_resumed_is_uninterrupted(
    task: str, data_of: DataOf, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(data_of(task), tmp_path / "whole", device)
    whole = mobilevit.train(config)
    config = dataclasses.replace(config, out=tmp_path / "stopped", checkpoint_minutes=0)
    saves, save = 0, RunFolder.save_last

    def save_and_stop(run: RunFolder, state: dict[str, Any]) -> None:
        nonlocal saves
        save(run, state)
        saves += 1
        if saves == 2:  # on a GPU, after the second epoch's first look; on a CPU, in the first epoch
            raise TrainingInterrupted(run.config)

    monkeypatch.setattr(RunFolder, "save_last", save_and_stop)
    with pytest.raises(TrainingInterrupted):
        mobilevit.train(config)
    monkeypatch.undo()
    resumed = mobilevit.train(config, resume=True)
    last = [torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("whole", "stopped")]
    assert [name for name in last[0] if not torch.equal(last[0][name], last[1][name])] == []
    assert whole.report.to_dict() == resumed.report.to_dict()


@pytest.mark.parametrize("task", TASKS)
def test_a_run_says_what_the_gpu_did(task: str, data_of: DataOf, tmp_path: Path, device: torch.device) -> None:
    config = config_of(data_of(task), tmp_path / "run", device, epochs=1, num_workers=2)
    result = mobilevit.train(config)
    (row,) = RunFolder(config.out).rows()
    assert np.isfinite(row["train_loss"])
    assert row["images_per_second"] > 0
    assert row["peak_memory_mb"] > 1
    assert all(tensor.device.type == "cpu" for tensor in mobilevit.load(result.best).state_dict().values())
    plan = dry_run(config_of(data_of(task), tmp_path / "plan", device, num_workers=0))
    assert plan.device == str(device)
    assert plan.seconds_per_epoch > 0
    assert plan.activations_mb > 1
    assert not (tmp_path / "plan").exists()


# -- evaluation and prediction ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_figures_are_the_cpus(task: str, data_of: DataOf, trained: Trained, device: torch.device) -> None:
    reports = {
        place: mobilevit.evaluate(trained(task), data_of(task), split="all", device=str(place), num_workers=0)
        for place in (torch.device("cpu"), device)
    }
    wanted, ours = reports[torch.device("cpu")], reports[device]
    assert ours.num_images == wanted.num_images == 24
    assert ours.score == pytest.approx(wanted.score, abs=0.01)
    assert ours.summary == pytest.approx(wanted.summary, abs=0.01)


def scenes(count: int) -> list[Image.Image]:
    return [shapes.render_scene(number, size=80, num_objects=2).image for number in range(count)]


@pytest.mark.parametrize("task", TASKS)
def test_predictions_are_the_cpus(task: str, trained: Trained, device: torch.device) -> None:
    ours, theirs = (mobilevit.Predictor(trained(task), device=place)(scenes(5)) for place in (str(device), "cpu"))
    for result, wanted in zip(ours, theirs, strict=True):
        if task == "classification":
            np.testing.assert_allclose(result.probabilities, wanted.probabilities, atol=1e-4)
        elif task == "detection":
            # Boxes whose scores are nearly the same may change places.
            np.testing.assert_allclose(np.sort(result.scores)[-20:], np.sort(wanted.scores)[-20:], atol=1e-4)
            assert result.class_ids[0] == wanted.class_ids[0]
            np.testing.assert_allclose(result.boxes_xyxy[0], wanted.boxes_xyxy[0], atol=0.05)
        else:
            assert float((result.label_map == wanted.label_map).mean()) > 0.995


def test_a_server_answers_as_the_cpu_does(trained: Trained, device: torch.device) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("tyro")
    from running_server import Server

    (image,) = scenes(1)
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    wanted = mobilevit.Predictor(trained("classification"), device="cpu")(encoded.getvalue())
    server = Server([trained("classification"), "--device", str(device)])
    try:
        answer = server.post("/v1/predict", encoded.getvalue())
    finally:
        status = server.stop()
    assert (answer.status, status) == (200, 0), (answer, server.log)
    top = answer.json()["results"][0]["top"]
    assert [row["label"] for row in top] == [label for label, _ in wanted.top(5)]
    assert [row["probability"] for row in top] == pytest.approx([p for _, p in wanted.top(5)], abs=1e-4)
