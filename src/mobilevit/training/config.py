"""What a training run can be told, in one typed place; a field's description is also its --help."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mobilevit.errors import MobileViTError

if TYPE_CHECKING:
    from mobilevit.card import Task
    from mobilevit.data.samplers import SizedBatch

ResizeMode = Literal["auto", "crop", "stretch", "pad"]

_INPUTS: dict[Task, tuple[int, ResizeMode]] = {
    "classification": (256, "crop"),
    "detection": (320, "stretch"),
    "segmentation": (512, "pad"),
}
"""Side of the input and resize mode where a user says nothing."""


_ONLY_FOR: dict[str, tuple[Task, ...]] = {
    **dict.fromkeys(("min_crop_area", "randaugment", "mixup", "cutmix", "random_erasing"), ("classification",)),
    **dict.fromkeys(("label_smoothing", "class_weights", "decode"), ("classification",)),
    **dict.fromkeys(("multi_scale", "train_sizes", "max_batch_size"), ("classification",)),
    **dict.fromkeys(("teacher", "teacher_weights"), ("classification",)),
    **dict.fromkeys(("distillation_share", "distillation_temperature"), ("classification",)),
    **dict.fromkeys(("zoom_out", "iou_crop"), ("detection",)),
    **dict.fromkeys(("crop_size", "scale_range", "rotation"), ("segmentation",)),
    **dict.fromkeys(("output_stride", "aspp_channels", "aux_head", "aux_weight"), ("segmentation",)),
    "photometric_distortion": ("detection", "segmentation"),
}
"""Settings that not every task has."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run. Defaults suit a few thousand photographs; the paper's values are named where they differ."""

    data: str | Path
    """Folder with one sub-folder per class, .csv, .parquet or shards, also by URL; VOC, COCO or YOLO boxes; masks."""
    task: Literal["auto", "classification", "detection", "segmentation"] = "auto"
    """What to learn. auto: what the data are labeled for."""
    out: Path = Path("runs/train")
    """Run folder: configuration, metrics, curves, checkpoints, model card."""
    val_data: str | Path | None = None
    """Data to validate on, in any of the forms of --data. Without it, val/ beside train/, else a split of the data."""
    val_fraction: float = 0.2
    """Share of every class held out for validation where the data are not divided."""

    model: str = "mobilevit_xxs"
    """mobilevit_xxs, mobilevit_xs or mobilevit_s."""
    weights: str | None = None
    """Start from "pretrained" (ImageNet weights of this model), a name, or a checkpoint. Without it, from scratch."""
    patch_size: tuple[int, int, int] = (2, 2, 2)
    """Patch sides at strides 8, 16 and 32. 8 4 2 is the paper's configuration B: faster, coarser."""
    freeze_backbone: bool = False
    """Train the classifier or head alone; the backbone's weights and statistics stay."""
    output_stride: int | None = None
    """Segmentation: 16, or 8 for twice as fine maps at three times the cost. Without it, 16."""
    aspp_channels: int | None = None
    """Segmentation: width of the head. Without it, that of the weights, or the paper's 256."""
    aux_head: bool = False
    """Segmentation: train a second classifier on the map before the last, which is not used afterwards."""

    image_size: int | tuple[int, int] | None = None
    """Side of the model's input in pixels, or height and width. Without it: 256, for boxes 320, for masks 512."""
    resize_mode: ResizeMode = "auto"
    """How images become input: a centered crop, stretched, or whole with a margin. auto: crop for classification,
    stretch for boxes, pad for masks."""
    crop_fraction: float = 256 / 288
    """Share of the shorter side that evaluation keeps; the paper's 256 of 288."""
    min_crop_area: float = 0.35
    """Classification: smallest share of the area a training crop may have; 0.08 in the paper, for ImageNet's million
    images."""
    zoom_out: float = 0.5
    """Boxes: probability that a training image is shown smaller, on a gray ground; 0 is off."""
    iou_crop: bool = True
    """Boxes: train on crops that hold some object by various shares."""
    crop_size: int | tuple[int, int] | None = None
    """Masks: side of the training crops, or height and width. Without it, the image size."""
    scale_range: tuple[float, float] = (0.5, 1.5)
    """Masks: size of training images before the crop, relative to their size in evaluation."""
    rotation: float = 10.0
    """Masks: turn half of the training images by up to this many degrees."""
    photometric_distortion: bool = True
    """Boxes and masks: vary brightness, contrast, saturation and hue."""
    flip: bool = True
    """Mirror half of the training images. Off for text, digits, or where left and right matter."""
    randaugment: int = 0
    """Classification: strength of RandAugment, 0 to 30; 0 is off, 9 is usual."""
    mixup: float = 0.0
    """Classification: alpha of MixUp; 0 is off, 0.2 is usual."""
    cutmix: float = 0.0
    """Classification: alpha of CutMix; 0 is off, 1.0 is usual."""
    random_erasing: float = 0.0
    """Classification: probability that a rectangle of a training image is blanked; 0 is off, 0.25 is usual."""

    epochs: int = 20
    """Passes over the training data; 300 in the paper."""
    batch_size: int = 32
    """Images in a step of one process; 128 on each of 8 GPUs in the paper."""
    multi_scale: Literal["off", "paper", "never_below_base"] = "off"
    """Classification: draw the input size of each step anew, with a batch to match. paper: fewer images above the
    image size; never_below_base: as many, as the code published with the paper."""
    train_sizes: tuple[tuple[int, int], ...] | None = None
    """The heights and widths that --multi-scale draws from. Without it, the paper's 160 160, 192 192, 256 256, 288 288
    and 320 320, relative to its 256."""
    max_batch_size: int | None = None
    """With --multi-scale: images in a step of one process, however small they are."""
    grad_accum_steps: int = 1
    """Batches whose gradients are added up for one update."""
    learning_rate: float | None = None
    """Peak learning rate. Without it, the paper's (2e-3 at batch 1024; boxes and masks 9e-4 at 128), scaled by the
    square root of the batch."""
    warmup_fraction: float = 0.1
    """Share of all updates over which the learning rate rises from a tenth of its peak; 3,000 updates in the paper."""
    final_lr_fraction: float = 0.01
    """Learning rate at the end of the cosine, as a share of its peak; 0.1 in the paper."""
    weight_decay: float = 0.01
    """Of AdamW; the paper's value."""
    decay_norm_and_bias: bool = True
    """Whether normalization weights and biases decay too, as in the paper."""
    head_lr_factor: float | None = None
    """Learning rate of the classifier or head, relative to the rest. Without it: 10 for masks on a trained backbone, as
    published, else 1."""
    layer_decay: float = 1.0
    """Each stage's learning rate relative to the next one's, for fine-tuning; 0.8 is usual, 1 is off."""
    clip_grad_norm: float | None = None
    """Largest norm of the gradients; larger ones are scaled down."""
    label_smoothing: float = 0.1
    """Classification: share of the target spread over all classes; the paper's value."""
    class_weights: Literal["none", "balanced"] = "none"
    """Classification. "balanced": classes count alike in the loss, however many images each has."""
    teacher: str | None = None
    """Classification: learn from this model, too: timm/NAME, torchvision/NAME, or a checkpoint; of the same classes."""
    teacher_weights: Path | None = None
    """A .safetensors or .pth of the timm or torchvision teacher, fine-tuned on these classes. Without it, the
    published ones."""
    distillation_share: float = 0.5
    """With --teacher: its part in the loss; the labels have the rest."""
    distillation_temperature: float = 2.0
    """With --teacher: how much the answers of both are softened before they are compared; 1 to 4 is usual."""
    ema: bool = True
    """Evaluate and keep an exponential moving average of the weights, as the paper does."""
    ema_momentum: float = 5e-4
    """Share of the current weights in each update of the average; larger in the first updates. The paper's value."""
    aux_weight: float = 0.4
    """Masks: weight of the auxiliary head's loss."""
    early_stopping: int | None = None
    """Stop after this many epochs without a better top-1, AP or mean IoU."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Mixed precision. auto: bf16 on GPUs that have it, off elsewhere."""
    sync_batch_norm: bool = False
    """Several GPUs: statistics over the batches of all of them, as published for boxes and masks."""
    compile: bool = False
    """Compile the model with torch.compile: minutes at first, faster after."""
    decode: Literal["cpu", "device"] = "cpu"
    """Classification: where JPEGs are decoded and cropped. device: on the GPU, if reading processes cannot keep up."""
    num_workers: int | None = None
    """Processes that read images; 0 reads in the main one. Without it, by the number of cores."""
    seed: int = 0
    """Decides initial weights, split, order, augmentation and dropout."""
    checkpoint_minutes: float = 5.0
    """Save for --resume at least this often (and after every epoch); 0 saves after every step."""

    def __post_init__(self) -> None:
        # As a `Path`, a URL would lose one of its slashes.
        for name in ("data", "val_data"):
            place = getattr(self, name)
            if isinstance(place, str) and "://" not in place:
                object.__setattr__(self, name, Path(place))

    @property
    def data_name(self) -> str:
        """What to call the data: the last part of their path or URL."""
        return Path(self.data).name

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate given, or the paper's scaled to this batch: by the square root, the rule for Adam.

        Source: arXiv:2205.10287.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        peak, batch = (2e-3, 1024) if self.task in ("auto", "classification") else (9e-4, 128)
        return peak * math.sqrt(self.batch_size * self.grad_accum_steps / batch)

    def resolve(self, task: Task, num_processes: int = 1) -> TrainConfig:
        """The same settings with everything decided that depends on the task and on who else trains.

        Raises:
            ValueError: something is set that this task does not have.
        """
        for field in dataclasses.fields(self):
            tasks = _ONLY_FOR.get(field.name, (task,))
            if task not in tasks and getattr(self, field.name) != field.default:
                flag = field.name.replace("_", "-")
                raise MobileViTError(f"--{flag} is for {' and '.join(tasks)}; this is {task}, so leave it out")
        size, mode = _INPUTS[task]
        image_size = _height_width(size if self.image_size is None else self.image_size)
        head_lr_factor = self.head_lr_factor
        if head_lr_factor is None:
            head_lr_factor = 10.0 if task == "segmentation" and self.weights is not None else 1.0
        learning_rate = self.learning_rate
        if learning_rate is None and num_processes > 1:
            learning_rate = self.peak_learning_rate * math.sqrt(num_processes)
        return dataclasses.replace(
            self,
            task=task,
            learning_rate=learning_rate,
            image_size=image_size,
            resize_mode=mode if self.resize_mode == "auto" else self.resize_mode,
            head_lr_factor=head_lr_factor,
        )

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the model's input, once the task is known."""
        assert self.image_size is not None, "resolve() comes first"
        return _height_width(self.image_size)

    @property
    def training_crop(self) -> tuple[int, int]:
        """(height, width) of segmentation's training crops, once the task is known."""
        return self.input_size if self.crop_size is None else _height_width(self.crop_size)

    def step_sizes(self) -> tuple[SizedBatch, ...]:
        """What --multi-scale draws from, once the task is known; nothing if it is off."""
        if self.multi_scale == "off":
            return ()
        from mobilevit.data.samplers import level_batches, multi_scale_sizes

        sizes = self.train_sizes or multi_scale_sizes(self.input_size)
        return level_batches(
            self.input_size,
            self.batch_size,
            sizes,
            never_below=self.multi_scale == "never_below_base",
            most=self.max_batch_size,
        )

    def validate(self) -> None:
        """Check every value that can be checked without looking at data or devices.

        Raises:
            ValueError: with the flag, its value and what it may be.
        """
        positive = ("epochs", "grad_accum_steps")
        not_negative = (
            "weight_decay",
            "mixup",
            "cutmix",
            "checkpoint_minutes",
            "randaugment",
            "rotation",
            "aux_weight",
        )
        shares = (
            "zoom_out",
            "warmup_fraction",
            "final_lr_fraction",
            "random_erasing",
            "label_smoothing",
            "distillation_share",
            "ema_momentum",
        )
        for name in positive:
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name in not_negative:
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in shares:
            self._require(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        for name in ("min_crop_area", "crop_fraction", "layer_decay"):
            self._require(name, 0 < getattr(self, name) <= 1, "above 0 and at most 1")
        for name in ("learning_rate", "clip_grad_norm", "early_stopping"):
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "above 0")
        self._require("val_fraction", 0 < self.val_fraction < 1, "between 0 and 1")
        self._require("batch_size", self.batch_size >= 2, "2 or more, for the statistics of BatchNorm")
        for name in ("teacher_weights", "distillation_share", "distillation_temperature"):
            told = getattr(self, name) == getattr(type(self), name) or self.teacher is not None
            self._require(name, told, "left out without --teacher")
        self._require("distillation_temperature", self.distillation_temperature > 0, "above 0")
        for name in ("train_sizes", "max_batch_size"):
            told = getattr(self, name) is None or self.multi_scale != "off"
            self._require(name, told, "left out without --multi-scale")
        self._require("max_batch_size", self.max_batch_size is None or self.max_batch_size >= 2, "2 or more")
        for side in (side for size in self.train_sizes or () for side in size):
            self._require("train_sizes", side >= 32 and side % 32 == 0, "multiples of 32, height and width in turn")
        for name in ("image_size", "crop_size"):
            size = getattr(self, name)
            self._require(name, size is None or min(_height_width(size)) >= 32, "32 or more")
        self._require("scale_range", 0 < self.scale_range[0] <= self.scale_range[1], "two numbers above 0, in order")
        self._require("head_lr_factor", self.head_lr_factor is None or self.head_lr_factor >= 0, "0 or more")
        self._require("aspp_channels", self.aspp_channels is None or self.aspp_channels >= 1, "1 or more")
        self._require(
            "resize_mode", self.task != "segmentation" or self.resize_mode != "crop", "stretch or pad for masks"
        )
        self._require("randaugment", self.randaugment <= 30, "at most 30")
        for name in ("randaugment", "random_erasing"):
            self._require(name, self.decode == "cpu" or getattr(self, name) == 0, "0 with --decode device")
        self._require("seed", 0 <= self.seed < 2**32, "from 0 to 4294967295")
        self._require("num_workers", self.num_workers is None or self.num_workers >= 0, "0 or more")
        self._require("patch_size", min(self.patch_size) >= 1, "three sizes of 1 or more")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise MobileViTError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {allowed}")

    def to_json(self) -> str:
        """Indented JSON; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> TrainConfig:
        """Read what `to_json` wrote.

        Raises:
            ValueError: no such file, not JSON, or fields that do not exist or have the wrong type.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            hints = typing.get_type_hints(cls)
            if unknown := sorted(set(values) - set(hints)):
                raise MobileViTError(f"unknown setting {', '.join(unknown)}")
            return cls(**{name: _as_type(name, value, hints[name]) for name, value in values.items()})
        except OSError:
            raise MobileViTError(
                f"{path}: no such configuration; --config takes the config.json of a run folder"
            ) from None
        except (ValueError, TypeError) as error:
            raise MobileViTError(f"{path}: not the configuration of a run ({error})") from None


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _as_type(name: str, value: Any, hint: Any) -> Any:
    """A JSON value as the field's type: lists stand for tuples, strings for paths, and nothing else is bent."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in options:
        if kind is type(None) and value is None:
            return None
        if kind is Path and isinstance(value, str):
            return Path(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if typing.get_origin(kind) is tuple and isinstance(value, list):
            inner = typing.get_args(kind)
            if inner[-1] is Ellipsis:
                return tuple(_as_type(name, item, inner[0]) for item in value)
            if len(value) == len(inner):
                return tuple(value)
        if typing.get_origin(kind) is Literal and value in typing.get_args(kind):
            return value
        if isinstance(kind, type) and type(value) is kind:
            return value
    raise MobileViTError(f"{name} is {value!r}")
