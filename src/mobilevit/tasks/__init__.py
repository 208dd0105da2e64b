"""One object per task, with everything that training and evaluation do differently from task to task."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mobilevit.card import TaskName
    from mobilevit.tasks.task import AnyTask


def get_task(name: TaskName) -> AnyTask:
    """Return the task of that name."""
    # Here, as the settings in this folder are also read where there is no PyTorch.
    from mobilevit.tasks.classification import CLASSIFICATION
    from mobilevit.tasks.detection import DETECTION
    from mobilevit.tasks.segmentation import SEGMENTATION

    tasks: tuple[AnyTask, ...] = (CLASSIFICATION, DETECTION, SEGMENTATION)
    return next(task for task in tasks if task.name == name)
