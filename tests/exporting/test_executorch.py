"""ExecuTorch: the same answers, all of it in XNNPACK, and int8 that is int8."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_export import NAMES, TASKS, make

import mobilevit
from mobilevit.data import shapes as drawn
from mobilevit.exporting import executorch
from mobilevit.exporting.export import ExportReport, export
from mobilevit.exporting.graph import Plan
from mobilevit.imaging.decode import find_images
from mobilevit.models import Model

pytest.importorskip("executorch", reason="executorch is not installed")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    drawn.write_folder(folder, num_images=36, size=96)
    return folder


@dataclass(frozen=True)
class Exported:
    """A model, its file, and how many operators of each name are in it."""

    model: Model
    report: ExportReport
    calls: Counter[str]


def exported(task: Any, name: str, images: Path, folder: Path) -> Exported:
    calls: Counter[str] = Counter()
    lower = executorch.lower

    def counted(plan: Plan) -> Any:
        edge = lower(plan)
        nodes = edge.exported_program().graph.nodes
        calls.update(str(node.target) for node in nodes if node.op == "call_function")
        return edge

    model = make(task, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executorch, "lower", counted)
        report = export(model, folder, format="executorch", images=find_images(images)[:3])
    return Exported(model, report, calls)


@pytest.fixture(scope="module", params=NAMES)
def classifier(images: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Exported:
    return exported("classification", request.param, images, tmp_path_factory.mktemp("classifier"))


def test_it_answers_as_the_model(classifier: Exported, images: Path) -> None:
    report = _same_answers(classifier, images)
    image = find_images(images)[0]
    before, after = mobilevit.Predictor(classifier.model)(image), mobilevit.Predictor(report.path, threads=1)(image)
    assert np.abs(before.probabilities - after.probabilities).max() < 1e-4


@pytest.mark.parametrize(("task", "name"), list(zip(TASKS[1:], NAMES, strict=True)))
def test_it_answers_as_the_model_in_other_tasks(task: Any, name: str, images: Path, tmp_path: Path) -> None:
    _same_answers(exported(task, name, images, tmp_path), images)


def _same_answers(found: Exported, images: Path) -> ExportReport:
    report = found.report
    assert report.verified == "yes"
    assert report.parity is not None
    assert report.parity.max_difference is not None
    assert report.parity.max_difference < 1e-4
    image = find_images(images)[0]
    before, after = mobilevit.Predictor(found.model)(image), mobilevit.Predictor(report.path, threads=1)(image)
    assert type(before) is type(after)
    return report


def test_hardly_anything_is_left_outside_of_xnnpack(classifier: Exported) -> None:
    calls = classifier.calls
    outside = {name: count for name, count in calls.items() if "delegate" not in name and "getitem" not in name}
    assert 1 <= sum(count for name, count in calls.items() if "delegate" in name) <= 3
    assert sum(outside.values()) <= 4, outside


def test_int8_is_smaller_and_agrees(classifier: Exported, images: Path, tmp_path: Path) -> None:
    whole = classifier.report
    small = export(classifier.model, tmp_path, format="executorch", precision="int8", calibration=images, verify=False)
    # More of MobileViTv2's weights stay in float, and a shallow model has few others.
    assert small.num_bytes < (0.5 if classifier.model.card.name == "mobilevit_xxs" else 0.75) * whole.num_bytes
    paths = find_images(images)
    one, other = (mobilevit.Predictor(report.path, threads=1)(paths) for report in (whole, small))
    difference = [np.abs(a.probabilities - b.probabilities).max() for a, b in zip(one, other, strict=True)]
    assert np.median(difference) < 0.1
