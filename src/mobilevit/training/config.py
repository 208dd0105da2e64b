"""Training settings: one typed tree whose leaves have unique names; a field's docstring is also its --help."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mobilevit.errors import MobileViTError
from mobilevit.tasks.settings import (
    DEFAULTS,
    ClassificationSettings,
    DetectionSettings,
    ResizeMode,
    SegmentationSettings,
)

if TYPE_CHECKING:
    from mobilevit.card import TaskName
    from mobilevit.data.loaders import SizedBatch


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Optimizer, the learning rate's schedule, and the moving average of the weights."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with momentum 0.9, which needs a --learning-rate of its own."""
    grad_accum_steps: int = 1
    """Batches whose gradients are added up for one update."""
    warmup_fraction: float = 0.1
    """Share of all updates over which the learning rate rises to its peak; 3,000 updates in the paper."""
    warmup_steps: int | None = None
    """Updates over which the learning rate rises to its peak, in place of --warmup-fraction."""
    initial_lr_fraction: float = 0.1
    """Learning rate at the start of the warm-up, as a share of its peak; the paper's value."""
    final_lr_fraction: float = 0.01
    """Learning rate at the end of the cosine, as a share of its peak; 0.1 in the paper; 1 keeps it at the peak."""
    weight_decay: float = 0.01
    """Weight decay; the paper's value, for AdamW."""
    decay_norm_and_bias: bool = True
    """Decay normalization weights and biases, too, as in the paper."""
    head_lr_factor: float | None = None
    """Learning rate of the classifier or head, relative to the rest. Default: 10 for masks on a trained backbone, as
    published, else 1."""
    layer_decay: float = 1.0
    """Learning rate of each stage relative to the next one's, for fine-tuning; 0.8 is usual, 1 is off."""
    clip_grad_norm: float | None = None
    """Largest norm of the gradients; larger ones are scaled down."""
    ema: bool = True
    """Evaluate and keep an exponential moving average of the weights, as the paper does."""
    ema_momentum: float = 5e-4
    """Share of the current weights in each update of the average; larger in the first updates. The paper's value."""


@dataclass(frozen=True, kw_only=True)
class SizeSettings:
    """Input sizes that vary from step to step; for classification."""

    multi_scale: Literal["off", "paper", "never_below_base"] = "off"
    """Draw the input size of each step anew, with a batch to match. paper: fewer images above the image size;
    never_below_base: as many, as the code published with the paper."""
    train_sizes: tuple[tuple[int, int], ...] | None = None
    """Heights and widths that --multi-scale draws from. Default: the paper's 160 160, 192 192, 256 256, 288 288 and
    320 320, relative to its 256."""
    max_batch_size: int | None = None
    """With --multi-scale: most images in a step of one process, however small they are."""


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """Learning from a larger model; for classification."""

    teacher: str | None = None
    """Learn from this model, too: timm/NAME, torchvision/NAME, or a checkpoint; of the same classes."""
    teacher_weights: str | Path | None = None
    """A .safetensors or .pth of the timm or torchvision teacher, fine-tuned on these classes. Default: the published
    weights."""
    distillation_share: float = 0.5
    """With --teacher: its part in the loss; the labels have the rest."""
    distillation_temperature: float = 2.0
    """With --teacher: how much both outputs are softened before they are compared; 1 to 4 is usual."""


@dataclass(frozen=True, kw_only=True)
class HardwareSettings:
    """How the device is used."""

    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Mixed precision. auto: bf16 on GPUs that have it, off elsewhere."""
    sync_batch_norm: bool = False
    """Several GPUs: statistics over the batches of all of them, as published for boxes and masks."""
    compile: bool = False
    """Compile the model with torch.compile: minutes at first, faster after."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run. Defaults suit a few thousand photographs; the paper's values are named where they differ."""

    data: str | Path
    """Folder with one sub-folder per class, .csv, .parquet or shards, also by URL; VOC, COCO or YOLO boxes; masks."""
    task: Literal["auto", "classification", "detection", "segmentation"] = "auto"
    """Task to train for. auto: the one that the data are labeled for."""
    out: str | Path = Path("runs/train")
    """Run folder: configuration, metrics, curves, checkpoints, model card."""
    val_data: str | Path | None = None
    """Data to validate on, in any of the forms of --data. Default: val/ beside train/, else a split of the data."""
    val_fraction: float = 0.2
    """Share of every class held out for validation where the data are not divided."""

    model: str = "mobilevit_xxs"
    """mobilevit_xxs, mobilevit_xs, mobilevit_s, or mobilevitv2_050 to mobilevitv2_200 in steps of 25."""
    weights: str | None = None
    """Start from "pretrained" (ImageNet weights of this model), a name, or a checkpoint. Default: from scratch."""
    patch_size: tuple[int, int, int] = (2, 2, 2)
    """Patch sides at strides 8, 16 and 32. 8 4 2 is the paper's configuration B: faster, coarser."""
    freeze_backbone: bool = False
    """Train the classifier or head alone; the backbone's weights and statistics stay."""

    image_size: int | tuple[int, int] | None = None
    """Side of the model's input in pixels, or height and width. Default: 256, for boxes 320, for masks 512."""
    resize_mode: ResizeMode = "auto"
    """How images become input: a centered crop, stretched, or whole with a margin. auto: crop for classification,
    stretch for boxes, pad for masks."""
    crop_fraction: float = 256 / 288
    """Share of the shorter side that evaluation keeps; the paper's 256 of 288."""
    flip: bool = True
    """Mirror half of the training images. Off for text, digits, or where left and right matter."""
    photometric_distortion: bool = True
    """Boxes and masks: vary brightness, contrast, saturation and hue."""

    epochs: int = 20
    """Passes over the training data; 300 in the paper."""
    batch_size: int = 32
    """Images in a step of one process; 128 on each of 8 GPUs in the paper."""
    learning_rate: float | None = None
    """Peak learning rate. Default: the paper's (2e-3 at batch 1024; boxes and masks 9e-4 at 128), scaled by the square
    root of the batch."""
    early_stopping: int | None = None
    """Stop after this many epochs without a better top-1, AP or mean IoU."""
    seed: int = 0
    """Decides initial weights, split, order, augmentation and dropout."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    num_workers: int | None = None
    """Processes that read images; 0 reads in the main one. Default: by the number of cores."""
    checkpoint_minutes: float = 5.0
    """Save for --resume at least this often (and after every epoch); 0 saves after every step."""

    classification: ClassificationSettings = field(default_factory=ClassificationSettings)
    detection: DetectionSettings = field(default_factory=DetectionSettings)
    segmentation: SegmentationSettings = field(default_factory=SegmentationSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    sizes: SizeSettings = field(default_factory=SizeSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    hardware: HardwareSettings = field(default_factory=HardwareSettings)

    def __post_init__(self) -> None:
        for name in ("data", "val_data", "out"):
            place = getattr(self, name)
            if isinstance(place, str) and "://" not in place:  # as a `Path`, a URL would lose one of its slashes
                object.__setattr__(self, name, Path(place))

    @property
    def known_task(self) -> TaskName | None:
        """The task; None if it is still to be recognized by the data."""
        return None if self.task == "auto" else self.task

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate given, or the paper's scaled to this batch: by the square root, the rule for Adam.

        Source: arXiv:2205.10287.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        published = DEFAULTS[self.known_task or "classification"]
        images = self.batch_size * self.optimizer.grad_accum_steps
        return published.learning_rate * math.sqrt(images / published.batch_size)

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the model's input, once the task is known."""
        assert self.image_size is not None, "resolve() comes first"
        return _height_width(self.image_size)

    @property
    def training_size(self) -> tuple[int, int]:
        """(height, width) of training images where `multi_scale` is off, once the task is known."""
        crop = self.segmentation.crop_size
        return self.input_size if crop is None else _height_width(crop)

    def step_sizes(self) -> tuple[SizedBatch, ...]:
        """Sizes that `multi_scale` draws from, with their batches, once the task is known; none if it is off."""
        if self.sizes.multi_scale == "off":
            return ()
        from mobilevit.data.loaders import level_batches, multi_scale_sizes

        return level_batches(
            self.input_size,
            self.batch_size,
            self.sizes.train_sizes or multi_scale_sizes(self.input_size),
            never_below=self.sizes.multi_scale == "never_below_base",
            most=self.sizes.max_batch_size,
        )

    def resolve(self, task: TaskName, num_processes: int = 1) -> TrainConfig:
        """Decide everything that depends on the task and on the number of processes.

        Raises:
            MobileViTError: something is set that this task does not have.
        """
        self._refuse_other_tasks(task)
        defaults = DEFAULTS[task]
        head_lr_factor = self.optimizer.head_lr_factor
        if head_lr_factor is None:
            head_lr_factor = 1.0 if self.weights is None else defaults.head_lr_factor
        learning_rate = self.learning_rate
        if learning_rate is None and num_processes > 1:
            learning_rate = dataclasses.replace(self, task=task).peak_learning_rate * math.sqrt(num_processes)
        return dataclasses.replace(
            self,
            task=task,
            learning_rate=learning_rate,
            image_size=_height_width(defaults.image_size if self.image_size is None else self.image_size),
            resize_mode=defaults.resize_mode if self.resize_mode == "auto" else self.resize_mode,
            optimizer=dataclasses.replace(self.optimizer, head_lr_factor=head_lr_factor),
        )

    def _refuse_other_tasks(self, task: TaskName) -> None:
        changes = self.changes()
        for name in sorted({name for defaults in DEFAULTS.values() for name in defaults.settings}):
            value = getattr(self, name)
            settings = [one.name for one in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else [name]
            changed = [setting for setting in settings if setting in changes]
            if changed and name not in DEFAULTS[task].settings:
                others = " and ".join(other for other, defaults in DEFAULTS.items() if name in defaults.settings)
                raise MobileViTError(f"`{changed[0]}` is for {others}; this is {task}, so leave it out")

    def validate(self) -> None:
        """Check every value that can be checked without looking at data or devices.

        Raises:
            MobileViTError: names the setting, its value and what it must be.
        """
        values, changes = self.flat(), self.changes()

        def require(name: str, allowed: str, holds: bool) -> None:
            if not holds:
                raise MobileViTError(f"`{name}` is {values[name]}; it must be {allowed}")

        for names, allowed, holds in _ALLOWED:
            for name in names.split():
                require(name, allowed, all(holds(number) for number in _numbers(values[name])))
        for name in ("scale_range", "short_side_range"):
            low, high = getattr(self.segmentation, name) or (1, 1)
            require(name, "two numbers above 0, in order", 0 < low <= high)
        is_possible = self.resize_mode != "crop" or self.known_task is None or DEFAULTS[self.known_task].can_crop
        require("resize_mode", "stretch or pad for masks", is_possible)
        is_known = self.learning_rate is not None or self.optimizer.optimizer == "adamw"
        require("learning_rate", "given for `optimizer` sgd, as the default is for adamw", is_known)
        is_free = self.segmentation.head != "pspnet" or self.segmentation.aspp_channels is None
        require("aspp_channels", "left out with `head` pspnet", is_free)
        for names, needed, is_given in (
            ("teacher_weights distillation_share distillation_temperature", "teacher", self.distillation.teacher),
            ("train_sizes max_batch_size", "multi_scale", self.sizes.multi_scale != "off"),
            ("max_long_side", "short_side_range", self.segmentation.short_side_range),
        ):
            for name in names.split():
                require(name, f"left out without `{needed}`", bool(is_given) or name not in changes)

    def flat(self) -> dict[str, object]:
        """All settings by name, those of the groups among them; the command line's flags are the same names."""
        return {name: value for name, value, _ in _leaves(self)}

    def changes(self) -> dict[str, object]:
        """The settings that differ from their defaults, by name."""
        return {name: value for name, value, default in _leaves(self) if value != default}

    def to_json(self) -> str:
        """Write indented JSON that `from_json` reads back."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> TrainConfig:
        """Read what `to_json` wrote, in version 0.1, too, where the settings of all groups lay side by side.

        Raises:
            MobileViTError: no such file, not JSON, or fields that do not exist or have the wrong type.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict) or "data" not in values:
                raise MobileViTError("it names no data")
            if values.pop("decode", "cpu") != "cpu":  # a setting of version 0.1
                raise MobileViTError("decode is device, which only version 0.1 had; remove it")
            return _from_values(cls, values)
        except OSError:
            raise MobileViTError(
                f"{path}: no such configuration; `config` takes the config.json of a run folder"
            ) from None
        except ValueError as error:
            raise MobileViTError(f"{path}: not the configuration of a run ({error})") from None


_ALLOWED: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("epochs grad_accum_steps early_stopping aspp_channels", "1 or more", lambda x: x >= 1),
    ("patch_size", "three sizes of 1 or more", lambda x: x >= 1),
    ("batch_size max_batch_size", "2 or more, for the statistics of BatchNorm", lambda x: x >= 2),
    ("weight_decay checkpoint_minutes head_lr_factor num_workers warmup_steps", "0 or more", lambda x: x >= 0),
    ("mixup cutmix rotation aux_weight", "0 or more", lambda x: x >= 0),
    ("learning_rate clip_grad_norm distillation_temperature", "above 0", lambda x: x > 0),
    ("zoom_out blur random_erasing label_smoothing distillation_share", "from 0 to 1", lambda x: 0 <= x <= 1),
    ("warmup_fraction initial_lr_fraction final_lr_fraction ema_momentum", "from 0 to 1", lambda x: 0 <= x <= 1),
    ("min_crop_area crop_fraction layer_decay", "above 0 and at most 1", lambda x: 0 < x <= 1),
    ("val_fraction", "between 0 and 1", lambda x: 0 < x < 1),
    ("randaugment", "from 0 to 30", lambda x: 0 <= x <= 30),
    ("image_size crop_size short_side_range max_long_side", "32 or more", lambda x: x >= 32),
    ("train_sizes", "multiples of 32, height and width in turn", lambda x: x >= 32 and x % 32 == 0),
    ("seed", "from 0 to 4294967295", lambda x: 0 <= x < 2**32),
)
"""Names of settings, what each of their numbers must be, in words and as a test. None is always allowed."""


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _leaves(group: object) -> Iterator[tuple[str, object, object]]:
    """Name, value and default of every setting of a group and of the groups in it."""
    assert dataclasses.is_dataclass(group)
    for one in dataclasses.fields(group):
        value = getattr(group, one.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value)
        else:
            yield one.name, value, one.default


_Group = typing.TypeVar("_Group")


def _from_values(group: type[_Group], values: dict[str, Any]) -> _Group:
    """A group of settings from JSON; what belongs into a group of it may also lie beside that group."""
    rest = dict(values)
    arguments: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(group).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            inner = rest.pop(name, {})
            if not isinstance(inner, dict):
                raise MobileViTError(f"{name} is {inner!r}; it is a group of settings")
            beside = {one.name: rest.pop(one.name) for one in dataclasses.fields(hint) if one.name in rest}
            arguments[name] = _from_values(hint, inner | beside)
        elif name in rest:
            arguments[name] = _with_tuples(rest.pop(name))
            if not _fits(arguments[name], hint):
                raise MobileViTError(f"{name} is {values[name]!r}")
    if rest:
        raise MobileViTError(f"unknown setting {', '.join(sorted(rest))}")
    return group(**arguments)


def _with_tuples(value: object) -> object:
    """A value from JSON, where lists stand for tuples."""
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list) else value


def _fits(value: object, hint: object) -> bool:
    """Whether a value is of a field's type; true and 1 are not the same."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # the latter with a Literal in it
        return any(_fits(value, kind) for kind in inner)
    if typing.get_origin(hint) is Literal:
        return value in inner
    if typing.get_origin(hint) is not tuple:
        return type(value) is hint or (hint is float and type(value) is int)
    if not isinstance(value, tuple):
        return False
    kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
    return len(value) == len(kinds) and all(map(_fits, value, kinds))
