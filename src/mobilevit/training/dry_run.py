"""Settings, steps, memory and time of a run, worked out from a few real steps."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from mobilevit.data.loaders import Batch, Size, Step, ahead_on
from mobilevit.devices import normalize, peak_memory_mb
from mobilevit.evaluation import evaluation_loader
from mobilevit.files import Json
from mobilevit.progress import Progress
from mobilevit.torch_session import TorchSession
from mobilevit.training import distributed
from mobilevit.training.config import TrainConfig
from mobilevit.training.loop import Run

SECONDS_TO_MEASURE = 60.0
STEPS_TO_MEASURE = 5
"""Steps of each size; fewer if the time is over."""


@dataclass(frozen=True, kw_only=True)
class SizePlan:
    """Steps of one image size, (height, width) in pixels."""

    size: Size
    batch_size: int
    """Images of one process."""
    steps_per_epoch: int
    """In the first epoch; where sizes are drawn, others differ a little."""
    seconds_per_step: float
    """Reading included; measured, or, if the time did not suffice, by the pixels of what was measured."""
    measured: bool


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """A run as it would be; nothing in `config` is left open."""

    config: TrainConfig
    device: str
    num_processes: int
    num_train: int
    num_val: int
    num_classes: int
    parameters: int
    trainable_parameters: int
    sizes: tuple[SizePlan, ...]
    updates: int
    """In the whole run."""
    weights_mb: float
    """Weights, gradients, optimizer and average, on each process's device."""
    activations_mb: float
    """Kept by a step of the largest batch for its backward pass."""
    peak_memory_mb: float | None
    """Taken while measuring: GPU memory, or on a CPU all memory of a process."""
    validation_seconds: float
    """After each epoch."""

    @property
    def seconds_per_epoch(self) -> float:
        """Steps and validation."""
        return sum(plan.steps_per_epoch * plan.seconds_per_step for plan in self.sizes) + self.validation_seconds

    @property
    def hours(self) -> float:
        """The whole run."""
        return self.config.epochs * self.seconds_per_epoch / 3600

    def to_dict(self) -> Json:
        """Return plain values for JSON."""
        config = json.loads(self.config.to_json())
        told = {"config": config, "seconds_per_epoch": round(self.seconds_per_epoch, 1), "hours": round(self.hours, 3)}
        return dataclasses.asdict(self) | told

    def lines(self) -> list[str]:
        """Describe the run in lines of text."""
        changed = self.config.changes()
        processes = "" if self.num_processes == 1 else f" in each of {self.num_processes} processes"
        peak = "" if self.peak_memory_mb is None else f"; {self.peak_memory_mb:,.0f} MB were taken while measuring"
        return [
            "settings (* not the default)",
            *(f"{'*' if name in changed else ' '} {name:<24} {value}" for name, value in self.config.flat().items()),
            "",
            f"{self.num_train:,} images of {self.num_classes} classes to train on, {self.num_val:,} to validate on",
            f"{self.parameters:,} parameters, {self.trainable_parameters:,} of them trained; on {self.device}",
            f"steps{processes}",
            *(
                f"  {plan.size[0]} x {plan.size[1]}, {plan.batch_size} images: {plan.steps_per_epoch:,} steps an "
                f"epoch, {plan.seconds_per_step * 1e3:,.0f} ms each{'' if plan.measured else ' (by pixels)'}"
                for plan in self.sizes
            ),
            f"updates: {self.updates:,} in {self.config.epochs} epochs",
            f"memory: {self.weights_mb:,.0f} MB for weights, gradients, optimizer and average, "
            f"{self.activations_mb:,.0f} MB for the largest step{peak}",
            f"time: {_duration(self.seconds_per_epoch)} an epoch, {_duration(self.validation_seconds)} of them to "
            f"validate; {_duration(3600 * self.hours)} in all",
        ]


def dry_run(config: TrainConfig) -> DryRun:
    """Take a few steps of a run, on its own data and device, and work out the rest; nothing is written.

    Raises:
        MobileViTError: whatever `train` would refuse, but for the state of the run folder.
    """
    config.validate()
    with distributed.joined(config.device) as (world, device):
        run = Run(config, world, device)
        learner, steps = run.learner, run.loader.start(0)
        seconds, largest = _measure(run, steps)
        images = normalize(largest.images, learner.preprocessing)
        everything = list(learner.model.parameters())
        trained = [p for p in everything if p.requires_grad]
        bytes_of_state = sum(t.nbytes for t in (*everything, *learner.model.buffers()))
        copies = 1 + (learner.average is not None)
        return DryRun(
            config=run.config,
            device=str(device),
            num_processes=world.size,
            num_train=len(run.train_set),
            num_val=len(run.val_set),
            num_classes=len(run.train_set.classes),
            parameters=sum(p.numel() for p in everything),
            trainable_parameters=sum(p.numel() for p in trained),
            sizes=_plans(run, steps, seconds),
            updates=run.num_updates,
            weights_mb=round((copies * bytes_of_state + 3 * sum(p.nbytes for p in trained)) / 1e6, 1),
            activations_mb=round(saved_bytes(learner.model, images, amp_dtype=learner.amp_dtype) / 1e6, 1),
            peak_memory_mb=peak_memory_mb(device),
            validation_seconds=round(_validation_seconds(run), 3),
        )


def _measure(run: Run, steps: list[Step]) -> tuple[dict[Size | None, list[float]], Batch]:
    """Time steps of each size, from when the step before was done; also return the batch with most pixels."""
    times: dict[Size | None, list[float]] = {step.size: [] for step in steps}
    largest: Batch | None = None
    run.learner.train_mode()
    with Progress("measuring", STEPS_TO_MEASURE * len(times), "steps", silent=not run.world.is_first) as progress:
        spent, before = 0.0, time.monotonic()
        for batch, step in zip(ahead_on(run.device, run.loader.epoch()), steps, strict=False):
            run.learner.step(batch, share=1.0, learning_rate=1e-12)
            if run.device.type == "cuda":
                torch.cuda.synchronize(run.device)
            now = time.monotonic()
            if times[step.size]:  # in the first, things warm up, or are compiled, perhaps for minutes
                spent += now - before
                progress.advance(1)
            times[step.size].append(now - before)
            before = now
            if largest is None or batch.images.numel() > largest.images.numel():
                largest = batch
            done = all(len(found) > STEPS_TO_MEASURE for found in times.values())
            if distributed.any_of(run.world, done or spent > SECONDS_TO_MEASURE)[0]:
                break
    assert largest is not None
    warm = {size: found[1:] for size, found in times.items()}
    return warm if any(warm.values()) else times, largest


def _plans(run: Run, steps: list[Step], seconds: dict[Size | None, list[float]]) -> tuple[SizePlan, ...]:
    usual = run.config.training_size
    batch_sizes = {batch.size: batch.batch_size for batch in run.config.step_sizes()} or {None: run.config.batch_size}
    counts = Counter(step.size for step in steps)
    pixels = {size: batch * math.prod(size or usual) for size, batch in batch_sizes.items()}
    rate = statistics.median(statistics.median(found) / pixels[size] for size, found in seconds.items() if found)
    most = -(-max(step.stop for step in steps) // run.world.size)
    return tuple(
        SizePlan(
            size=size or usual,
            batch_size=min(batch_size, most),
            steps_per_epoch=counts[size],
            seconds_per_step=round(statistics.median(seconds.get(size) or [rate * pixels[size]]), 4),
            measured=bool(seconds.get(size)),
        )
        for size, batch_size in batch_sizes.items()
    )


def _validation_seconds(run: Run) -> float:
    """Estimate the time of one validation by all processes, from two batches read by this one."""
    learner = run.learner
    loader = evaluation_loader(
        run.val_set, learner.card, batch_size=2 * run.config.batch_size, num_workers=0, device=run.device
    )
    session = TorchSession(learner.evaluated, learner.card, device=run.device, amp_dtype=learner.amp_dtype)
    spent, images, before = 0.0, 0, time.monotonic()
    for number, batch in enumerate(islice(loader.epoch(), 3)):
        session.run(batch.images.permute(0, 2, 3, 1).numpy())  # which waits for the device
        now = time.monotonic()
        if number or len(loader) == 1:
            spent, images = spent + now - before, images + len(batch)
        before = now
    workers = max(1, run.num_workers) if run.device.type == "cuda" else 1
    return spent / max(images, 1) * len(run.val_set) / run.world.size / workers


def saved_bytes(model: nn.Module, images: Tensor, *, amp_dtype: torch.dtype | None = None) -> int:
    """Count the bytes that a forward pass keeps for the backward pass, each once, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype is not None),
    ):
        model(images)
    return sum(kept.values())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
