"""Training settings that only one task has, and each task's defaults; a field's docstring is also its --help.

Without torch, as the command line needs these before it knows whether there is anything to train.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mobilevit.card import TaskName

ResizeMode = Literal["auto", "crop", "stretch", "pad"]


@dataclass(frozen=True, kw_only=True)
class ClassificationSettings:
    """Augmentation and loss of classification."""

    min_crop_area: float = 0.35
    """Smallest share of the area a training crop may have; 0.08 in the paper, for ImageNet's million images."""
    randaugment: int = 0
    """Strength of RandAugment, 0 to 30; 0 is off, 9 is usual."""
    mixup: float = 0.0
    """Alpha of MixUp; 0 is off, 0.2 is usual."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 is off, 1.0 is usual."""
    random_erasing: float = 0.0
    """Probability that a rectangle of a training image is blanked; 0 is off, 0.25 is usual."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes; the paper's value."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: every class counts the same in the loss, however many images it has."""


@dataclass(frozen=True, kw_only=True)
class DetectionSettings:
    """Augmentation of images with boxes."""

    zoom_out: float = 0.5
    """Probability that a training image is shrunk, on a gray background; 0 is off."""
    iou_crop: bool = True
    """Train on random crops that contain objects."""


@dataclass(frozen=True, kw_only=True)
class SegmentationSettings:
    """Augmentation of images with masks, and the segmentation head."""

    crop_size: int | tuple[int, int] | None = None
    """Side of the training crops in pixels, or height and width. Default: the image size."""
    scale_range: tuple[float, float] = (0.5, 1.5)
    """Size of training images before the crop, relative to their size in evaluation."""
    short_side_range: tuple[int, int] | None = None
    """Shorter side of training images before the crop, in pixels, in place of --scale-range."""
    max_long_side: int | None = None
    """With --short-side-range: most pixels of the longer side before the crop."""
    blur: float = 0.0
    """Probability that a training image is blurred, by a Gaussian of up to one pixel; 0 is off, 0.5 is usual."""
    rotation: float = 10.0
    """Rotate half of the training images by up to this many degrees."""
    output_stride: int | None = None
    """16, or 8 for maps twice as fine at three times the cost. Default: 16."""
    head: Literal["deeplabv3", "pspnet"] | None = None
    """Head on the backbone. Default: that of the weights, or deeplabv3."""
    aspp_channels: int | None = None
    """Width of a deeplabv3 head. Default: that of the weights, or the paper's 256, 512 for MobileViTv2."""
    aux_head: bool = False
    """Train a second classifier on the map before the last; it is dropped after training."""
    aux_weight: float = 0.4
    """Weight of the auxiliary head's loss."""


@dataclass(frozen=True, kw_only=True)
class TaskDefaults:
    """Defaults of one task, and the settings that it has and some other task does not."""

    image_size: int
    """Side of the input in pixels."""
    resize_mode: ResizeMode
    can_crop: bool = True
    """Whether an input that leaves out the border will do."""
    learning_rate: float
    """The paper's peak learning rate, at `batch_size` images in an update."""
    batch_size: int
    head_lr_factor: float = 1.0
    """Learning rate of a new head on a trained backbone, relative to the backbone's."""
    settings: frozenset[str]
    """Names of settings, and of groups of settings, in `TrainConfig`."""


DEFAULTS: dict[TaskName, TaskDefaults] = {
    "classification": TaskDefaults(
        image_size=256,
        resize_mode="crop",
        learning_rate=2e-3,
        batch_size=1024,
        settings=frozenset({"classification", "sizes", "distillation"}),
    ),
    "detection": TaskDefaults(
        image_size=320,
        resize_mode="stretch",
        learning_rate=9e-4,
        batch_size=128,
        settings=frozenset({"detection", "photometric_distortion"}),
    ),
    "segmentation": TaskDefaults(
        image_size=512,
        resize_mode="pad",
        can_crop=False,
        learning_rate=9e-4,
        batch_size=128,
        head_lr_factor=10.0,
        settings=frozenset({"segmentation", "photometric_distortion"}),
    ),
}
