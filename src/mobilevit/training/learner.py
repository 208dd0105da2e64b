"""One training step, and what it works on: model, optimizer, learning rate and moving average of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mobilevit.card import ModelCard
from mobilevit.data.imageset import AnyImages
from mobilevit.data.loaders import Batch
from mobilevit.devices import normalize
from mobilevit.errors import MobileViTError
from mobilevit.factory import create_model
from mobilevit.models import Model
from mobilevit.training import distributed
from mobilevit.training.config import OptimizerSettings, TrainConfig
from mobilevit.training.distillation import distillation_loss, open_teacher
from mobilevit.training.distributed import World
from mobilevit.training.run_folder import State

Network = Callable[[int], nn.Module]
"""Makes another network than this package's from the number of classes: (B, 3, H, W) -> (B, K)."""


class Learner:
    """A model with initial weights on its device, and everything that changes it.

    Raises:
        MobileViTError: weights or teacher cannot be had or do not fit; something that the device does not have.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: AnyImages,
        *,
        world: World,
        device: torch.device,
        network: Network | None = None,
    ) -> None:
        self.config, self.world, self.device = config, world, device
        self.amp_dtype = _amp_dtype(config.hardware.amp, device)
        model, self.card = _build_model(config, data, network)
        self.preprocessing = self.card.preprocessing
        model = model.to(device)
        if config.freeze_backbone:
            stages_to_head = _stages_to_head(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad = stages_to_head[name] == 0
        if config.hardware.sync_batch_norm and world.size > 1:
            if device.type != "cuda":
                raise MobileViTError("`sync_batch_norm` needs GPUs; leave it out")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        self.model = model
        self.teacher: nn.Module | None = None
        if config.distillation.teacher is not None:
            with torch.random.fork_rng(devices=[]):  # a student starts from the same weights, whoever teaches it
                self.teacher = open_teacher(config.distillation, data.classes, self.preprocessing).to(device)
        self.objective = data.task.objective(
            config, self.preprocessing, num_classes=len(data.classes), targets=data.targets, device=device
        )
        self.optimizer = make_optimizer(model, config.optimizer, device)
        self.average = WeightAverage(model, config.optimizer.ema_momentum) if config.optimizer.ema else None
        # It scales the loss for fp16, and does nothing otherwise.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype is torch.float16)
        # The model, perhaps compiled, perhaps averaging gradients with other processes.
        self.forward = distributed.wrap(
            world,
            CompiledForSizes(model, _usual_shapes(config)) if config.hardware.compile else model,
            device,
            accumulates=config.optimizer.grad_accum_steps > 1,
        )
        self._last_batch: Batch | None = None

    @property
    def evaluated(self) -> nn.Module:
        """The model that is validated and kept: the average, if there is one."""
        return self.average.model if self.average is not None else self.model.eval()

    def train_mode(self) -> None:
        """Turn on dropout and the updates of statistics, except in a frozen backbone."""
        self.model.train()
        if self.config.freeze_backbone:
            for name, child in getattr(self.model, "backbone", self.model).named_children():
                if name in _STAGES:
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
        self._last_batch = batch if learns else self._last_batch
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
        with self._autocast():
            outputs = self.forward(images)
            with torch.no_grad():
                told = None if self.teacher is None else self.teacher(images)
        loss = self.objective.loss(outputs, targets)
        if told is None:
            return loss
        settings = self.config.distillation
        taught = distillation_loss(outputs, told, temperature=settings.distillation_temperature)
        return (1 - settings.distillation_share) * loss + settings.distillation_share * taught

    def _blank_loss(self) -> Tensor:
        """A loss whose gradients are multiplied by zero, before any batch could be learned from."""
        images = torch.zeros(2, 3, *self.preprocessing.size, device=self.device)
        with self._autocast():
            outputs = self.forward(images)
        parts = [outputs] if isinstance(outputs, Tensor) else [part for part in outputs if part is not None]
        return torch.stack([part.float().mean() for part in parts]).sum()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def state_dict(self) -> State:
        """Return the state that resuming needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average else None,
        }

    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def _build_model(config: TrainConfig, data: AnyImages, network: Network | None) -> tuple[nn.Module, ModelCard]:
    """Build the model of the settings, or another network, and make its card for this run."""
    model: nn.Module
    if network is None:
        model = create_model(
            config.model,
            task=data.task.name,
            classes=data.classes,
            weights=f"{config.model}.cvnets_in1k" if config.weights == "pretrained" else config.weights,
            patch_size=config.patch_size,
            output_stride=config.segmentation.output_stride,
            head=data.task.head(config),
        )
        card = model.card
    else:
        model = network(len(data.classes))
        card = ModelCard(name=config.model, task=data.task.name, classes=data.classes)
    assert config.resize_mode != "auto"
    # The weights' own normalization stays; size and crop are this run's.
    preprocessing = replace(
        card.preprocessing,
        size=config.input_size,
        resize_mode=config.resize_mode,
        crop_fraction=config.crop_fraction,
    )
    card = replace(card, preprocessing=preprocessing, metrics={})
    if isinstance(model, Model):
        model.card = card
    return model, card


class CompiledForSizes(nn.Module):
    """A model with one compiled graph for each of some input shapes; others, such as a last batch, run as they are.

    Left to itself, the compiler makes one slower graph for all sizes, or gives up after a few. Shapes are (B, H, W).
    """

    def __init__(self, model: nn.Module, shapes: Collection[tuple[int, int, int]]) -> None:
        super().__init__()
        self.model, self._shapes = model, frozenset(shapes)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(shapes) + 2)
        self._compiled = torch.compile(model, dynamic=False)

    def forward(self, x: Tensor) -> object:
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


# -- optimizer, learning rate, moving average -------------------------------------------------------------------------

# From input to output, the head after them; `layer_decay` lowers the learning rate by one power for each step back.
_STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "layer5", "head_conv")


def _stages_to_head(model: nn.Module) -> dict[str, int]:
    """Count the stages from each parameter to the head; 0 for what a task adds to the backbone."""
    stages = {name: name.removeprefix("backbone.").partition(".")[0] for name, _ in model.named_parameters()}
    present = [stage for stage in _STAGES if stage in stages.values()]
    return {name: len(present) - present.index(stage) if stage in present else 0 for name, stage in stages.items()}


def make_optimizer(model: nn.Module, settings: OptimizerSettings, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) or SGD as published, fused into one kernel where the device has one.

    Trainable parameters are grouped by weight decay and by learning rate relative to the schedule's (`lr_factor`).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    stages_to_head = _stages_to_head(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = settings.decay_norm_and_bias or parameter.ndim > 1
        factor = settings.layer_decay ** stages_to_head[name]
        if stages_to_head[name] == 0 and settings.head_lr_factor is not None:
            factor = settings.head_lr_factor
        groups.setdefault((factor, settings.weight_decay if decays else 0.0), []).append(parameter)
    told = [
        {"params": parameters, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in groups.items()
    ]
    fused = device.type in ("cpu", "cuda")
    if settings.optimizer == "sgd":
        return torch.optim.SGD(told, momentum=0.9, fused=fused)
    return torch.optim.AdamW(told, betas=(0.9, 0.999), fused=fused)


def warmup_share(config: TrainConfig, num_updates: int) -> float:
    """Share of a run of so many updates over which the learning rate rises.

    Raises:
        MobileViTError: its steps are more than there are updates.
    """
    steps = config.optimizer.warmup_steps
    if steps is None:
        return config.optimizer.warmup_fraction
    if steps > num_updates:
        raise MobileViTError(
            f"`warmup_steps` is {steps}, but the run has {num_updates} updates; lower it, or raise `epochs`"
        )
    return steps / num_updates


def learning_rate(progress: float, config: TrainConfig, warmup: float) -> float:
    """Linear warm-up from `initial_lr_fraction` of the peak, then half a cosine down to `final_lr_fraction` of it.

    `progress` is the share of all images of the run, each counted once an epoch, that were seen before the update. It
    counts images, as updates take more or fewer of them where their size varies. `warmup` is the share to rise over.
    """
    peak, start, end = (
        config.peak_learning_rate, config.optimizer.initial_lr_fraction, config.optimizer.final_lr_fraction
    )  # fmt: skip
    if progress < warmup:
        return peak * (start + (1 - start) * progress / warmup)
    progress = (progress - warmup) / max(1 - warmup, 1e-9)
    return peak * (end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2)


class WeightAverage:
    """Exponential moving average of a model's weights and buffers, kept in a second model.

    The published momentum averages over about 2,000 updates; a run of 1,000 would never leave its initial weights. So
    the momentum starts high and falls to the published one: max(momentum, 9 / (10 + updates)).
    """

    def __init__(self, model: nn.Module, momentum: float) -> None:
        self.momentum, self.updates = momentum, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        copied = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._averaged, self._current = ([pair[side] for pair in averaged] for side in (0, 1))
        self._copies, self._counters = ([pair[side] for pair in copied] for side in (0, 1))

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the current weights; counters (integers) are copied."""
        momentum = max(self.momentum, 9 / (10 + self.updates))
        torch._foreach_lerp_(self._averaged, self._current, momentum)
        if self._copies:
            torch._foreach_copy_(self._copies, self._counters)
        self.updates += 1

    def state_dict(self) -> State:
        """Return the state that resuming needs."""
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` returned; tensors are filled in place, so the lists stay as they are."""
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
