from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilevit.card import ModelCard
from mobilevit.runtime.artifact import Artifact
from mobilevit.runtime.engine import Engine, Run


class BoxOfEachImage(Engine):
    """Finds one box in each image, whose number in the part and class it selects."""

    def _streams(self, count: int) -> Sequence[Run]:
        return [self._run_part] * count

    def _run_part(self, part: Any) -> list[Any]:
        rows = [[number, int(image[0]), 0] for number, image in enumerate(part)]
        return [part[:, None], part[:, None, None], np.array(rows)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_parts_are_joined_in_order(batch_size: int | None, threads: int) -> None:
    artifact = Artifact(
        format="onnx", precision="fp32", card=ModelCard(name="a", task="detection", classes=("a",) * 6),
        batch_size=batch_size, image_size=None, baked=False, outputs=("boxes_xyxy", "scores", "selected"),
    )  # fmt: skip
    images = np.arange(6.0)[:, None] * np.ones(4)
    boxes, scores, selected = BoxOfEachImage(Path("a.onnx"), artifact, threads, "cpu").run(images)
    assert np.array_equal(boxes[:, 0], images)
    assert np.array_equal(scores[:, 0, 0], images)
    assert selected.tolist() == [[number, number, 0] for number in range(6)]
