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
from mobilevit.data import shapes as drawn
from mobilevit.exporting.executorch import lower
from mobilevit.exporting.export import export
from mobilevit.exporting.graph import ExportGraph
from mobilevit.exporting.plan import Plan
from mobilevit.inference.artefact import Artefact
from mobilevit.models.card import card_of
from mobilevit.preprocessing import find_images

pytest.importorskip("executorch", reason="executorch is not installed")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    drawn.write_folder(folder, num_images=36, size=96)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_it_answers_as_the_model(task: Any, pictures: Path, tmp_path: Path) -> None:
    model = make(task)
    report = export(model, tmp_path, format="executorch", pictures=find_images(pictures)[:3])
    assert report.verified == "yes"
    assert report.parity is not None
    assert report.parity.max_difference is not None
    assert report.parity.max_difference < 1e-4
    picture = find_images(pictures)[0]
    before, after = mobilevit.Predictor(model)(picture), mobilevit.Predictor(report.path, threads=1)(picture)
    assert type(before) is type(after)
    if task == "classification":
        assert np.abs(before.probabilities - after.probabilities).max() < 1e-4


def test_hardly_anything_is_left_outside_of_xnnpack() -> None:
    model = make("classification")
    graph = ExportGraph(model, image_size=SIZE).eval()
    artefact = Artefact(
        format="executorch", precision="fp32", card=card_of(model), batch_size=1, image_size=SIZE, baked=False,
        outputs=graph.output_names,
    )  # fmt: skip
    with torch.no_grad():
        edge = lower(Plan(graph=graph, artefact=artefact, example=graph.example(1, SIZE)))
    calls = Counter(str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function")
    outside = {name: count for name, count in calls.items() if "delegate" not in name and "getitem" not in name}
    assert sum(count for name, count in calls.items() if "delegate" in name) <= 3
    assert sum(outside.values()) <= 4, outside


def test_int8_is_smaller_and_agrees(pictures: Path, tmp_path: Path) -> None:
    model = make("classification")
    whole = export(model, tmp_path, format="executorch", pictures=find_images(pictures)[:3])
    small = export(model, tmp_path, format="executorch", precision="int8", calibration=pictures, verify=False)
    assert small.num_bytes < 0.5 * whole.num_bytes
    paths = find_images(pictures)
    one, other = (mobilevit.Predictor(report.path, threads=1)(paths) for report in (whole, small))
    difference = [np.abs(a.probabilities - b.probabilities).max() for a, b in zip(one, other, strict=True)]
    assert np.median(difference) < 0.1
