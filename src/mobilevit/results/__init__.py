"""Typed results of the three tasks, made from the arrays that an engine returns. numpy and Pillow only."""

from __future__ import annotations

from mobilevit.card import Task
from mobilevit.results.base import Result
from mobilevit.results.classification import ClassificationResult
from mobilevit.results.detection import DetectionResult
from mobilevit.results.segmentation import SegmentationResult

RESULT_TYPES: dict[Task, type[Result]] = {
    "classification": ClassificationResult,
    "detection": DetectionResult,
    "segmentation": SegmentationResult,
}
"""The type that `Predictor` returns, by task."""
