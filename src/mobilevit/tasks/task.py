"""`Task`: the interface through which generic code handles data, training and evaluation of any task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mobilevit.card import TaskName
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models.deeplabv3 import DeepLabv3Config
from mobilevit.models.pspnet import PSPNetConfig
from mobilevit.results.base import Result
from mobilevit.tasks.report import Meter, Truth
from mobilevit.tasks.settings import ClassificationSettings, DetectionSettings, SegmentationSettings

Target = TypeVar("Target")
"""Label of an image: the index of its class, its `Boxes` or its `Mask`."""
Transform = Callable[..., tuple[Tensor, object]]
"""From what `open_image` returns, its target and, if steps differ in size, (H, W), to uint8 (3, H, W) and the target
that the batch holds."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """How a model is trained for a task."""

    transform: Transform
    """Random changes of a training image and its target."""
    collate: Callable[[list[Any]], object]
    """Make one thing of the changed targets of a batch: a tensor, or a named tuple of tensors."""
    loss: Callable[[Any, Any], Tensor]
    """(output of the model, collated targets) -> scalar in float32, the mean over the images."""
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """Random changes of a whole batch, normalized, and its targets, on the device."""


class TrainingSettings(Protocol):
    """The settings of training that depend on the task; `TrainConfig` has them."""

    @property
    def flip(self) -> bool: ...
    @property
    def photometric_distortion(self) -> bool: ...
    @property
    def training_size(self) -> tuple[int, int]: ...
    @property
    def classification(self) -> ClassificationSettings: ...
    @property
    def detection(self) -> DetectionSettings: ...
    @property
    def segmentation(self) -> SegmentationSettings: ...


class Task(ABC, Generic[Target, Truth]):
    """A task: how its data are read, a model is trained and evaluated, and results are described."""

    name: ClassVar[TaskName]
    result_type: ClassVar[type[Result]]
    score_name: ClassVar[str]
    score_title: ClassVar[str]
    """The figure that decides which weights are best, as records name it and as people write it."""
    limits: ClassVar[str]
    """A sentence of the model card on what the model cannot do."""
    usage: ClassVar[str]
    """An expression in Python that shows a `result`."""
    counted: ClassVar[str]
    """Unit of the counts in the table of `mobilevit data check`."""
    needs_all_classes: ClassVar[bool] = False
    """Whether training needs images of every class, and validation, too."""
    most_in_legend: ClassVar[int] = 0
    """Up to as many classes, a legend explains the colors of drawn targets."""

    # -- data ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def check_classes(self, origin: str, classes: Sequence[str], targets: Sequence[Target]) -> None:
        """Refuse data that nothing can be learned from.

        Raises:
            MobileViTError: no image or object of some class, or too few or too many classes.
        """

    def count(self, targets: Sequence[Target], num_classes: int) -> list[int] | None:
        """Count the images or objects of each class; None if that takes opening files."""
        return None

    def stratum(self, target: Target, counts: Sequence[int]) -> int | None:
        """Choose the class by which an image is divided into train and val, if any, by the counts of all images."""
        return None

    @abstractmethod
    def describe_target(self, target: Target, classes: Sequence[str]) -> str:
        """Write a target as text, equal for equal targets, for fingerprints."""

    @abstractmethod
    def relabel(self, target: Target, new: NDArray[np.int64]) -> Target:
        """Renumber the classes of a target; `new` has the new index of each, or -1."""

    @abstractmethod
    def draw_target(
        self, target: Target, image: Image.Image, scale: float, classes: Sequence[str]
    ) -> tuple[Image.Image, set[int]]:
        """Draw a target on its image, which has been resized by `scale`, and return the classes it shows.

        Raises:
            ImageError: the target is in a file that cannot be read.
        """

    def caption(self, target: Target, classes: Sequence[str]) -> list[str]:
        """Lines to write below an image, for what is not drawn on it."""
        return []

    # -- training -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def objective(
        self,
        settings: TrainingSettings,
        preprocessing: Preprocessing,
        *,
        num_classes: int,
        targets: Sequence[Target],
        device: torch.device,
    ) -> Objective:
        """Choose random changes and loss by the settings of a run, and by the targets of all its training images."""

    @abstractmethod
    def head(self, settings: TrainingSettings) -> DeepLabv3Config | PSPNetConfig | None:
        """The head that the settings ask for; None leaves it to the weights, or the default."""

    # -- evaluation ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def read_truth(self, target: Target, size: tuple[int, int]) -> Truth:
        """Read what predictions for an image of (height, width) pixels are compared with.

        Raises:
            ImageError: it is in a file that cannot be read, or that does not fit the image.
        """

    @abstractmethod
    def new_meter(self, classes: Sequence[str]) -> Meter[Truth]:
        """Make a meter of the task's figures."""


AnyTask = Task[Any, Any]
