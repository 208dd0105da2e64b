"""ExecuTorch: the same answers, all of it in XNNPACK, and int8 that is int8."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_export import SIZE, TASKS, make

import mobilevit
from mobilevit.card import card_of
from mobilevit.data import shapes as drawn
from mobilevit.exporting.executorch import lower
from mobilevit.exporting.export import export
from mobilevit.exporting.graph import Plan, export_graph
from mobilevit.imaging.decode import find_images
from mobilevit.runtime.artifact import Artifact

pytest.importorskip("executorch", reason="executorch is not installed")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    drawn.write_folder(folder, num_images=36, size=96)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_it_answers_as_the_model(task: Any, images: Path, tmp_path: Path) -> None:
    model = make(task)
    report = export(model, tmp_path, format="executorch", images=find_images(images)[:3])
    assert report.verified == "yes"
    assert report.parity is not None
    assert report.parity.max_difference is not None
    assert report.parity.max_difference < 1e-4
    image = find_images(images)[0]
    before, after = mobilevit.Predictor(model)(image), mobilevit.Predictor(report.path, threads=1)(image)
    assert type(before) is type(after)
    if task == "classification":
        assert np.abs(before.probabilities - after.probabilities).max() < 1e-4


def test_hardly_anything_is_left_outside_of_xnnpack() -> None:
    model = make("classification")
    graph = export_graph(model, image_size=SIZE)
    artifact = Artifact(
        format="executorch", precision="fp32", card=card_of(model), batch_size=1, image_size=SIZE, baked=False,
        outputs=graph.output_names,
    )  # fmt: skip
    with torch.no_grad():
        edge = lower(Plan(graph=graph, artifact=artifact, example=graph.example(1, SIZE)))
    calls = Counter(str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function")
    outside = {name: count for name, count in calls.items() if "delegate" not in name and "getitem" not in name}
    assert sum(count for name, count in calls.items() if "delegate" in name) <= 3
    assert sum(outside.values()) <= 4, outside


def test_int8_is_smaller_and_agrees(images: Path, tmp_path: Path) -> None:
    model = make("classification")
    whole = export(model, tmp_path, format="executorch", images=find_images(images)[:3])
    small = export(model, tmp_path, format="executorch", precision="int8", calibration=images, verify=False)
    assert small.num_bytes < 0.5 * whole.num_bytes
    paths = find_images(images)
    one, other = (mobilevit.Predictor(report.path, threads=1)(paths) for report in (whole, small))
    difference = [np.abs(a.probabilities - b.probabilities).max() for a, b in zip(one, other, strict=True)]
    assert np.median(difference) < 0.1
