"""The training run, top to bottom: data, model, steps, epochs, record."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mobilevit import factory
from mobilevit.card import Task
from mobilevit.data.imageset import ImageSet
from mobilevit.data.loaders import ahead_on
from mobilevit.data.samplers import Segment
from mobilevit.devices import peak_memory_mb
from mobilevit.errors import MobileViTError
from mobilevit.evaluation import (
    evaluate,
    evaluation_loader,
    report_problems,
    report_unreadable,
    write_evaluation,
)
from mobilevit.models import Model
from mobilevit.progress import Progress
from mobilevit.tasks.report import Report
from mobilevit.torch_session import TorchSession
from mobilevit.training import distributed
from mobilevit.training.config import TrainConfig
from mobilevit.training.distributed import World
from mobilevit.training.learner import Network, make_learner
from mobilevit.training.loading import load_images, num_reading_processes, training_loader
from mobilevit.training.optim import learning_rate
from mobilevit.training.run_folder import RunFolder, StopSignals, TrainingInterrupted

log = logging.getLogger("mobilevit")

_STEPS_BETWEEN_LOOKS = 20  # at the loss, on a GPU: looking makes the host wait for the device


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What came of a run."""

    task: Task
    """What was trained for."""
    report: Report
    """Of the best weights on the validation images."""
    best: Path
    """The checkpoint to use."""
    epochs: int
    """Epochs run."""
    images_per_second: float
    """Training throughput of the last epoch run, data loading included."""


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    network: Network | None = None,
) -> TrainResult:
    """Train, evaluate after every epoch, keep the best weights, and write the run folder.

    The same config on the same machine gives the same weights, interrupted and resumed or not.

    Args:
        config: everything there is to set.
        resume: go on from the run folder's last checkpoint.
        overwrite: replace another run in the folder.
        network: makes another network than `config.model` from the number of classes (B, 3, H, W -> B, K), to compare
            with; its `best.safetensors` does not describe itself.

    Raises:
        ValueError: a user's mistake in settings, data or files, in one line.
        TrainingInterrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    config.validate()
    with distributed.joined(config.device) as (world, device):
        again = world.is_restart and RunFolder(config.out).config.exists()
        # The first process decides: others may be on machines that do not see the run folder.
        resume, again = distributed.on_first(world, lambda: (resume or again, again))
        return _train(config, world, device, resume=resume, overwrite=overwrite and not again, network=network)


def _train(
    config: TrainConfig,
    world: World,
    device: torch.device,
    *,
    resume: bool,
    overwrite: bool,
    network: Network | None,
) -> TrainResult:
    config, train_set, val_set = load_images(config, world)
    fingerprint = train_set.fingerprint()
    if world.size > 1:
        settings = {f"`{name}`": value for name, value in config.flat().items()}
        distributed.require_same(world, "a setting", {**settings, "the data": fingerprint})
    run = RunFolder(config.out)
    state = distributed.on_first(world, lambda: run.reopen(config) if resume else None)
    if state is not None and state["data"] != fingerprint:
        raise MobileViTError(f"{config.data}: not the images this run began with; resume with the same data")

    # -- model --------------------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    random.seed(config.seed)
    np.random.seed(config.seed)
    learner = make_learner(config, train_set, world=world, device=device, network=network)
    model, preprocessing = learner.model, learner.preprocessing
    if not world.is_first:
        torch.manual_seed(distributed.seed_of(world, config.seed))  # dropout, and mixing of images

    # -- data ---------------------------------------------------------------------------------------------------------
    num_workers = num_reading_processes(config, device)
    loader = training_loader(config, train_set, learner, world)
    val_loader = evaluation_loader(
        val_set, preprocessing, batch_size=2 * config.batch_size, num_workers=num_workers, device=device
    )

    # -- state --------------------------------------------------------------------------------------------------------
    position = _Position()
    if state is not None:
        learner.load_state_dict(state)
        position = _Position(**state["position"])
        if len(state["ranks"]) == world.size:
            own = state["ranks"][world.rank]
            _set_random_state(own["random"], device)
            position.loss_sum, position.loss_count = own["loss"]
        else:
            log.info("begun by %d processes, goes on with %d", len(state["ranks"]), world.size)
            position.end_segment(len(state["ranks"]))
        if world.is_first:
            run.forget_from(position.epoch)
    else:
        if not resume:
            distributed.on_first(world, lambda: run.create(config, overwrite=overwrite))
        _say_what_is_trained(config, model, train_set, val_set, device, world)
    writer = _tensorboard(run.path, position.epoch) if world.is_first else None

    def save_state() -> None:
        own = {"random": _random_state(device), "loss": (position.loss_sum, position.loss_count)}
        ranks = distributed.gathered(world, own)
        if world.is_first:
            run.save_last(
                {
                    **learner.state_dict(),
                    "position": dataclasses.asdict(position),
                    "ranks": ranks,
                    "data": fingerprint,
                }
            )

    # -- epochs -------------------------------------------------------------------------------------------------------
    accumulate = config.optimizer.grad_accum_steps
    steps_between_looks = accumulate * max(1, _STEPS_BETWEEN_LOOKS // accumulate)  # so that an update ends there
    images_per_second = 0.0
    unreadable: set[str] = set()
    reported: set[str] = set()
    last_saved = time.monotonic()
    with StopSignals(then=distributed.end_soon if world.size > 1 else None) as stop:
        while position.epoch < config.epochs and not _is_stuck(position, config):
            epoch = position.epoch
            steps = loader.start(epoch, position.segments, position.step)
            learner.train_mode()
            unseen: list[tuple[Tensor, list[int]]] = []  # losses the host has not looked at yet, and their images
            label = f"epoch {epoch + 1}/{config.epochs}"
            before = loader.num_images - (steps[-1].stop if steps else 0)  # in segments that have ended
            first_of_update = [before + steps[n // accumulate * accumulate].start for n in range(len(steps))]
            rates = [
                learning_rate((epoch + done / loader.num_images) / config.epochs, config) for done in first_of_update
            ]
            with _progress(world, label, loader.num_images, position.images) as progress:
                batches = ahead_on(device, loader.epoch())
                for index, batch in enumerate(batches, start=position.step):
                    step = steps[index]
                    unreadable.update(batch.errors)
                    last_of_update = (index + 1) % accumulate == 0 or index + 1 == len(steps)
                    # The mean over all processes is that over all images, also where one has an image more.
                    share = (len(batch) + len(batch.errors)) * world.size / (step.stop - step.start)
                    group_size = min(accumulate, len(steps) - index // accumulate * accumulate)
                    loss = learner.step(
                        batch, share=share / group_size, learning_rate=rates[index] if last_of_update else None
                    )
                    if loss is not None:
                        unseen.append((loss, batch.indices))
                    position.step, position.images = index + 1, before + step.stop
                    look = (
                        device.type == "cpu"
                        or (index + 1) % steps_between_looks == 0
                        or index + 1 == len(steps)
                        or (world.size == 1 and stop.requested)
                    )
                    stop_now = save_now = False
                    if look:
                        position.add_losses(unseen, train_set)
                        unseen.clear()
                        if last_of_update:
                            is_due = time.monotonic() - last_saved >= config.checkpoint_minutes * 60
                            stop_now, save_now = distributed.any_of(world, stop.requested, is_due)
                    progress.advance(
                        position.images - progress.done, f"loss {position.loss:.4f}  lr {rates[index]:.2e}"
                    )
                    if save_now or stop_now:
                        save_state()
                        last_saved = time.monotonic()
                    if stop_now:
                        raise TrainingInterrupted(run.config) if world.is_first else SystemExit(1)
                if progress.per_second:
                    images_per_second = progress.per_second
            unreadable = set().union(*distributed.gathered(world, unreadable))
            position.sum_losses(world)
            if position.loss_count == 0:
                raise MobileViTError(f"{train_set.origin}: no image to train on can be read; {min(unreadable)}")

            # -- evaluation, record -----------------------------------------------------------------------------------
            evaluated = learner.evaluated
            distributed.spread(world, evaluated)  # statistics of BatchNorm are each process's own
            session = TorchSession(evaluated, learner.card, device=device, amp_dtype=learner.amp_dtype)
            report = evaluate(session, val_loader, label=f"{label}, validation").report
            row = {
                "epoch": epoch,
                "train_loss": round(position.loss, 6),
                **report.summary,
                "learning_rate": rates[-1] if rates else learner.optimizer.param_groups[0]["lr"],
                "images_per_second": round(images_per_second, 2),
                "peak_memory_mb": peak_memory_mb(device),
            }
            if report.score > position.best_score:
                position.best_score, position.best_epoch = report.score, epoch
                if world.is_first:
                    run.save_best(evaluated, report, _provenance(config, fingerprint, epoch))
            if writer is not None:
                run.append(row)
                for name, value in row.items():
                    if value is not None:  # as memory is where the system does not tell
                        writer.add_scalar(name, value, epoch)
                writer.flush()
            log.info(
                "%s  loss %.4f  validation %s %.2f %%%s  %.1f images/s",
                label, position.loss, report.score_name, 100 * report.score,
                " (best)" if position.best_epoch == epoch else "", images_per_second,
            )  # fmt: skip
            report_unreadable(unreadable - reported, "training", len(train_set))
            reported |= unreadable
            position = _Position(epoch=epoch + 1, best_score=position.best_score, best_epoch=position.best_epoch)
            save_state()
            last_saved = time.monotonic()
            if epoch % 10 == 9 and world.is_first:
                run.draw_curves()
            if distributed.any_of(world, stop.requested)[0] and position.epoch < config.epochs:
                raise TrainingInterrupted(run.config) if world.is_first else SystemExit(1)

    # -- end ----------------------------------------------------------------------------------------------------------
    best = _load_best(run, model) if world.is_first else copy.deepcopy(model).eval()
    distributed.spread(world, best.to(device))
    session = TorchSession(best, learner.card, device=device, amp_dtype=learner.amp_dtype)
    evaluation = evaluate(session, val_loader)
    if writer is not None:
        writer.close()
        run.draw_curves()
        write_evaluation(evaluation, val_set, run.path)
        report_unreadable(evaluation.errors, "validation", len(val_set))
        if isinstance(best, Model):
            run.write_model_card(best, config, {"train": len(train_set), "val": len(val_set)})
    return TrainResult(
        task=train_set.task,
        report=evaluation.report,
        best=run.best,
        epochs=position.epoch,
        images_per_second=images_per_second,
    )


@dataclass(kw_only=True)
class _Position:
    """Where a run stands."""

    epoch: int = 0
    step: int = 0
    """Steps of this epoch that are done, or of its last segment."""
    images: int = 0
    """Images of this epoch that are done, by all processes."""
    segments: list[Segment] = field(default_factory=list)
    """What other numbers of processes have done of this epoch."""
    loss_sum: float = 0.0
    loss_count: int = 0
    best_score: float = -1.0
    best_epoch: int = -1

    @property
    def loss(self) -> float:
        """Mean training loss of this epoch so far."""
        return self.loss_sum / max(self.loss_count, 1)

    def add_losses(self, losses: list[tuple[Tensor, list[int]]], data: ImageSet[Any]) -> None:
        """Take in what the device has computed.

        Raises:
            ValueError: a loss is not finite; the batch's images are named.
        """
        values = torch.stack([loss for loss, _ in losses]).tolist() if losses else []  # one wait for the device
        for value, (_, indices) in zip(values, losses, strict=True):
            if not math.isfinite(value):
                names = ", ".join(data.names[i] for i in indices)
                raise MobileViTError(
                    f"the loss became {value} in epoch {self.epoch + 1}; lower `learning_rate`, set "
                    f"`clip_grad_norm` to 1, or look at the images of this batch: {names}"
                )
            self.loss_sum += value
            self.loss_count += 1

    def end_segment(self, world_size: int) -> None:
        """Go on with another number of processes than that which has come so far."""
        if self.step:
            done = self.images - sum(images for _, images in self.segments)
            self.segments.append((world_size, done))
            self.step = 0

    def sum_losses(self, world: World) -> None:
        """Take in those of other processes."""
        sums = distributed.gathered(world, (self.loss_sum, self.loss_count))
        self.loss_sum, self.loss_count = sum(one for one, _ in sums), sum(count for _, count in sums)


def _progress(world: World, label: str, total: int, done: int) -> Progress:
    return Progress(label, total, done=done, silent=not world.is_first)


def _is_stuck(position: _Position, config: TrainConfig) -> bool:
    patience = config.early_stopping
    if patience is None or position.step or position.epoch - 1 - position.best_epoch < patience:
        return False
    log.info("no better result for %d epochs: stopping early", patience)
    return True


def _load_best(run: RunFolder, model: nn.Module) -> nn.Module:
    if isinstance(model, Model):
        return factory.load(run.best)
    from safetensors.torch import load_file

    model.load_state_dict(load_file(run.best))
    return model.eval()


def _provenance(config: TrainConfig, fingerprint: str, epoch: int) -> dict[str, str]:
    """What `mobilevit eval` needs to find the images that were held out, and a reader to know the rest."""
    return {
        "data_fingerprint": fingerprint,
        "val_fraction": str(config.val_fraction),
        "seed": str(config.seed),
        "epoch": str(epoch + 1),
        "trained_on": config.data_name,
    }


def _say_what_is_trained(
    config: TrainConfig,
    model: nn.Module,
    train_set: ImageSet[Any],
    val_set: ImageSet[Any],
    device: torch.device,
    world: World,
) -> None:
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(
        "%s: %d images of %d classes to train on, %d to validate on; %s trainable parameters; %s; run folder %s",
        config.data, len(train_set), len(train_set.classes), len(val_set), f"{count:,}",
        device if world.size == 1 else f"{world.size} processes on {device.type}", config.out,
    )  # fmt: skip
    for data in (train_set, val_set):
        report_problems(data)
    if config.weights is None and len(train_set) < 20_000:
        log.info("training from scratch; on data this small, pretrained weights usually reach far more")


def _tensorboard(folder: Path, first_epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MobileViTError("training needs more packages; pip install 'mobilevit[train]'") from None
    return SummaryWriter(str(folder), purge_step=first_epoch or None)


def _random_state(device: torch.device) -> dict[str, Any]:
    # Of its own GPU only: a run may go on where there are fewer, or on another one.
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if isinstance(state["cuda"], Tensor) and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
