"""Typed results of the three tasks, made from the arrays that an engine returns, with numpy and Pillow."""

from __future__ import annotations

from collections.abc import Iterable

from mobilevit.card import TaskName
from mobilevit.errors import MobileViTError
from mobilevit.results.base import Result
from mobilevit.results.classification import ClassificationResult
from mobilevit.results.detection import DetectionResult
from mobilevit.results.segmentation import SegmentationResult

RESULT_TYPES: dict[TaskName, type[Result]] = {
    "classification": ClassificationResult,
    "detection": DetectionResult,
    "segmentation": SegmentationResult,
}
"""The type that `Predictor` returns, by task."""


def check_options(task: TaskName, options: Iterable[str]) -> None:
    """Refuse options that have a meaning for another task only.

    Raises:
        MobileViTError: there is such an option.
    """
    for name in options:
        owners = [owner for owner, result_type in RESULT_TYPES.items() if name in result_type.options]
        if owners and task not in owners:
            raise MobileViTError(f"`{name}` is for {' and '.join(owners)}; this model does {task}")
