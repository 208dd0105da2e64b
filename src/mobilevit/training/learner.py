"""A model with its optimizer and its moving average, and one training step."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mobilevit import factory
from mobilevit.card import ModelCard, card_of
from mobilevit.data.imageset import AnyImages
from mobilevit.data.loaders import Batch
from mobilevit.errors import MobileViTError
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models import Model
from mobilevit.models.inputs import normalize
from mobilevit.tasks.task import Objective
from mobilevit.training import distributed
from mobilevit.training.config import TrainConfig
from mobilevit.training.distillation import distillation_loss, open_teacher
from mobilevit.training.distributed import World
from mobilevit.training.optim import WeightAverage, is_head, make_optimizer

Network = Callable[[int], nn.Module]
"""Makes another network than this package's from the number of classes: (B, 3, H, W) -> (B, K)."""


@dataclass(kw_only=True)
class Learner:
    """A model on its device with everything that changes it."""

    config: TrainConfig
    world: World
    device: torch.device
    model: nn.Module
    card: ModelCard
    objective: Objective
    optimizer: torch.optim.AdamW
    average: WeightAverage | None
    """Exponential moving average of the weights; None if it is off."""
    scaler: torch.amp.GradScaler
    """Scales the loss for fp16; does nothing otherwise."""
    amp_dtype: torch.dtype | None
    """Type that autocast computes in; None: float32."""
    forward: nn.Module
    """The model, perhaps compiled, perhaps averaging gradients with other processes."""
    teacher: nn.Module | None
    """Normalized as the model's images are, (B, 3, H, W) -> logits (B, K)."""
    _last_batch: Batch | None = field(default=None, init=False)

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become input."""
        return self.card.preprocessing

    @property
    def evaluated(self) -> nn.Module:
        """The model that is validated and kept: the average, if there is one."""
        return self.average.model if self.average is not None else self.model.eval()

    def train_mode(self) -> None:
        """Turn on dropout and the updates of statistics, except in a frozen backbone."""
        self.model.train()
        if self.config.freeze_backbone:
            for name, child in getattr(self.model, "backbone", self.model).named_children():
                if not is_head(f"{name}."):
                    child.eval()

    def step(self, batch: Batch, *, share: float, learning_rate: float | None) -> Tensor | None:
        """Learn from one batch; nothing in here waits for the device.

        Args:
            batch: images and targets, on the device.
            share: weight of the batch's mean loss in the update's; 1 where an update takes one batch.
            learning_rate: None adds up gradients, for a later call to update with.

        Returns:
            The batch's mean loss, a scalar; None if it had too few images to learn from.
        """
        learns = len(batch) > 1  # statistics of one image are none
        if learns:
            self._last_batch = batch
        loss = None
        # Other processes wait for this one's gradients, even if there are none.
        if learns or self.world.size > 1:
            ddp = self.forward if isinstance(self.forward, DistributedDataParallel) else None
            with nullcontext() if ddp is None or learning_rate is not None else ddp.no_sync():
                loss = self._blank_loss() if self._last_batch is None else self._loss(self._last_batch)
                weighted = loss * (share if learns else 0.0)
                self.scaler.scale(weighted).backward()  # type: ignore[no-untyped-call]
        if learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_factor"]
            # A scaler refuses to go on where none of the update's batches could be learned from.
            if any(parameter.grad is not None for parameter in self.model.parameters()):
                if self.config.optimizer.clip_grad_norm is not None:
                    self.scaler.unscale_(self.optimizer)
                    nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_grad_norm)
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            if self.average is not None:
                self.average.update()
        return loss.detach() if loss is not None and learns else None

    def _loss(self, batch: Batch) -> Tensor:
        """The mean loss over the batch's images."""
        images, targets = normalize(batch.images, self.preprocessing), batch.targets
        if self.objective.mix is not None:
            images, targets = self.objective.mix(images, targets)
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            outputs = self.forward(images)
            told = None
            if self.teacher is not None:
                with torch.no_grad():
                    told = self.teacher(images)
        loss = self.objective.loss(outputs, targets)
        if told is None:
            return loss
        settings = self.config.distillation
        taught = distillation_loss(outputs, told, temperature=settings.distillation_temperature)
        return (1 - settings.distillation_share) * loss + settings.distillation_share * taught

    def _blank_loss(self) -> Tensor:
        """A loss whose gradients are multiplied by zero, before any batch could be learned from."""
        images = torch.zeros(2, 3, *self.preprocessing.size, device=self.device)
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            outputs = self.forward(images)
        parts = [outputs] if isinstance(outputs, Tensor) else [part for part in outputs if part is not None]
        return torch.stack([part.float().mean() for part in parts]).sum()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that resuming needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def make_learner(
    config: TrainConfig,
    data: AnyImages,
    *,
    world: World,
    device: torch.device,
    network: Network | None = None,
) -> Learner:
    """Build a model with initial weights and everything that trains it, on the device.

    Raises:
        MobileViTError: weights or teacher cannot be had or do not fit; something that the device does not have.
    """
    amp_dtype = _amp_dtype(config.hardware.amp, device)
    if config.hardware.sync_batch_norm and world.size > 1 and device.type != "cuda":
        raise MobileViTError("`sync_batch_norm` needs GPUs; leave it out")
    if network is None:
        model: nn.Module = build_model(config, data)
        card = card_of(model)
    else:
        assert config.resize_mode != "auto"
        model = network(len(data.classes))
        preprocessing = Preprocessing(
            size=config.input_size, resize_mode=config.resize_mode, crop_fraction=config.crop_fraction
        )
        card = ModelCard(name=config.model, task=data.task.name, classes=data.classes, preprocessing=preprocessing)
    model, preprocessing = model.to(device), card.preprocessing
    if config.freeze_backbone:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = is_head(name)
    if config.hardware.sync_batch_norm and world.size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    teacher, distillation = None, config.distillation
    if distillation.teacher is not None:
        with torch.random.fork_rng(devices=[]):  # a student starts from the same weights, whoever teaches it
            teacher = open_teacher(
                distillation.teacher, data.classes, preprocessing, weights=distillation.teacher_weights
            )
        teacher = teacher.to(device)
    return Learner(
        config=config,
        world=world,
        device=device,
        model=model,
        card=card,
        objective=data.task.objective(
            config, preprocessing, num_classes=len(data.classes), targets=data.targets, device=device
        ),
        optimizer=make_optimizer(model, config.optimizer, device),
        average=WeightAverage(model, copy.deepcopy(model), config.optimizer.ema_momentum)
        if config.optimizer.ema
        else None,
        scaler=torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16),
        amp_dtype=amp_dtype,
        forward=distributed.wrap(
            world,
            CompiledForSizes(model, _usual_shapes(config)) if config.hardware.compile else model,
            device,
            accumulates=config.optimizer.grad_accum_steps > 1,
        ),
        teacher=teacher,
    )


class CompiledForSizes(nn.Module):
    """A model with one compiled graph for each of some input shapes; others, such as a last batch, run as they are.

    Left to itself, the compiler makes one slower graph for all sizes, or gives up after a few.

    Args:
        model: whose parameters these are, too.
        shapes: (B, H, W) of each.
    """

    def __init__(self, model: nn.Module, shapes: Collection[tuple[int, int, int]]) -> None:
        super().__init__()
        self.model, self._shapes = model, frozenset(shapes)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(shapes) + 2)
        self._compiled = torch.compile(model, dynamic=False)

    def forward(self, x: Tensor) -> Any:
        batch, _, height, width = x.shape
        return (self._compiled if (batch, height, width) in self._shapes else self.model)(x)


def _usual_shapes(config: TrainConfig) -> set[tuple[int, int, int]]:
    """(B, H, W) of all batches but an epoch's last."""
    sizes = config.step_sizes()
    if sizes:
        return {(batch.batch_size, *batch.size) for batch in sizes if batch.size is not None}
    return {(config.batch_size, *config.training_size)}


def _amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    if amp == "auto":
        # What older GPUs (before Ampere) only emulate is slower than float32.
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else None
    if amp == "fp16" and device.type == "cpu":
        raise MobileViTError("`amp` fp16 needs a GPU; on a CPU use bf16 or off")
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def build_model(config: TrainConfig, data: AnyImages) -> Model:
    """Build the model of the settings, with a card for this run."""
    weights = f"{config.model}.cvnets_in1k" if config.weights == "pretrained" else config.weights
    model = factory.create_model(
        config.model,
        task=data.task.name,
        classes=data.classes,
        weights=weights,
        patch_size=config.patch_size,
        output_stride=config.segmentation.output_stride,
        head=data.task.head(config),
    )
    card = card_of(model)
    assert config.resize_mode != "auto"
    # The weights' own normalization stays; size and crop are this run's.
    preprocessing = dataclasses.replace(
        card.preprocessing,
        size=config.input_size,
        resize_mode=config.resize_mode,
        crop_fraction=config.crop_fraction,
    )
    model.card = dataclasses.replace(card, preprocessing=preprocessing, metrics={})
    return model
