"""The training run, top to bottom: data, model, steps, epochs, record."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from mobilevit.card import TaskName
from mobilevit.data.datasets import load_train_val
from mobilevit.data.imageset import report_problems
from mobilevit.data.loaders import BatchLoader, Segment, ahead_on, default_num_workers
from mobilevit.devices import keep_freed_memory, peak_memory_mb
from mobilevit.errors import MobileViTError
from mobilevit.evaluation import evaluation_loader, measure, report_unreadable, write_evaluation
from mobilevit.progress import Progress
from mobilevit.tasks.report import Report
from mobilevit.torch_session import TorchSession
from mobilevit.training import distributed
from mobilevit.training.config import TrainConfig
from mobilevit.training.distributed import World
from mobilevit.training.learner import Learner, Network, learning_rate, warmup_share
from mobilevit.training.run_folder import RunFolder, State, TrainingInterrupted

log = logging.getLogger("mobilevit")

_STEPS_BETWEEN_LOOKS = 20  # at the loss, on a GPU: looking makes the host wait for the device


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The outcome of a run."""

    task: TaskName
    report: Report
    """Figures of the best weights on the validation images."""
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
        config: all settings.
        resume: continue from the run folder's last checkpoint.
        overwrite: replace another run in the folder.
        network: makes another network than `config.model` from the number of classes (B, 3, H, W -> B, K), to compare
            with; its `best.safetensors` does not describe itself.

    Raises:
        MobileViTError: a mistake in settings, data or files.
        TrainingInterrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    config.validate()
    with distributed.joined(config.device) as (world, device):
        again = world.is_restart and RunFolder(config.out).config.exists()
        # The first process decides: others may be on machines that do not see the run folder.
        resume, again = distributed.on_first(world, lambda: (resume or again, again))
        run = Run(config, world, device, network=network)
        state = distributed.on_first(world, lambda: run.folder.reopen(run.config, run.fingerprint) if resume else None)
        if state is not None:
            _restore(run, state)
        else:
            if not resume:
                distributed.on_first(world, lambda: run.folder.create(run.config, overwrite=overwrite and not again))
            _log_start(run)
        if world.is_first:
            run.folder.open_tensorboard(run.position.epoch)
        with _stop_signals(world) as stop:
            while run.position.epoch < config.epochs and not _is_stuck(run):
                rate = _train_epoch(run, stop)
                _evaluate_epoch(run, rate)
                if distributed.any_of(world, stop.requested)[0] and run.position.epoch < config.epochs:
                    raise TrainingInterrupted(run.folder.config) if world.is_first else SystemExit(1)
        return _finish(run)


@dataclass(kw_only=True)
class Position:
    """How far a run has come."""

    epoch: int = 0
    step: int = 0
    """Steps of this epoch that are done, or of its last segment."""
    images: int = 0
    """Images of this epoch that are done, by all processes."""
    segments: list[Segment] = field(default_factory=list)
    """Parts of this epoch done by other numbers of processes."""
    loss_sum: float = 0.0
    loss_count: int = 0
    best_score: float = -1.0
    best_epoch: int = -1

    @property
    def loss(self) -> float:
        """Mean training loss of this epoch so far."""
        return self.loss_sum / max(self.loss_count, 1)


class Run:
    """Everything a run works with, on one process: labels, model, reading processes; nothing is written yet.

    Raises:
        MobileViTError: data, weights or a teacher cannot be had, or settings that do not go with them or the device.
    """

    def __init__(
        self, config: TrainConfig, world: World, device: torch.device, *, network: Network | None = None
    ) -> None:
        self.train_set, self.val_set = load_train_val(
            config.data,
            task=config.known_task,
            val_path=config.val_data,
            val_fraction=config.val_fraction,
            seed=config.seed,
        )
        config = config.resolve(self.train_set.task.name, world.size)
        config.validate()
        self.config, self.world, self.device, self.folder = config, world, device, RunFolder(config.out)
        self.fingerprint = self.train_set.fingerprint()
        settings = {f"`{name}`": value for name, value in config.flat().items()}
        distributed.require_same(world, "a setting", settings | {"the data": self.fingerprint})

        if device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        np.random.seed(config.seed)
        self.learner = Learner(config, self.train_set, world=world, device=device, network=network)
        if not world.is_first:
            torch.manual_seed(distributed.seed_of(world, config.seed))  # dropout, and mixing of images

        num_workers = config.num_workers
        if num_workers is None:
            num_workers = default_num_workers(device, sharing=distributed.local_size())
        self.num_workers = num_workers
        # In an order and at sizes that depend on nothing but the seed.
        self.loader = BatchLoader(
            self.train_set,
            self.learner.objective.transform,
            collate=self.learner.objective.collate,
            batch_size=config.batch_size,
            num_workers=num_workers,
            shuffle_seed=config.seed,
            sizes=config.step_sizes(),
            pin_memory=device.type == "cuda",
            shard=(world.rank, world.size),
        )
        self.num_updates = config.epochs * -(-len(self.loader.start(0)) // config.optimizer.grad_accum_steps)
        """In the whole run; where sizes vary, other epochs may have some more or fewer than the first."""
        self.warmup = warmup_share(config, self.num_updates)
        self.position = Position()
        self.unreadable: set[str] = set()
        """One line for each training image that could not be read, in the epochs before this one."""
        self.images_per_second = 0.0
        self.last_saved = time.monotonic()

    @property
    def label(self) -> str:
        """Label of progress bars."""
        return f"epoch {self.position.epoch + 1}/{self.config.epochs}"

    @cached_property
    def val_loader(self) -> BatchLoader:
        """The images to validate on, in their order."""
        return evaluation_loader(
            self.val_set,
            self.learner.card,
            batch_size=2 * self.config.batch_size,
            num_workers=self.num_workers,
            device=self.device,
        )


def _log_start(run: Run) -> None:
    train_set, val_set, world = run.train_set, run.val_set, run.world
    count = sum(p.numel() for p in run.learner.model.parameters() if p.requires_grad)
    log.info(
        "%s: %d images of %d classes to train on, %d to validate on; %s trainable parameters; %s; run folder %s",
        run.config.data, len(train_set), len(train_set.classes), len(val_set), f"{count:,}",
        run.device if world.size == 1 else f"{world.size} processes on {run.device.type}", run.config.out,
    )  # fmt: skip
    for data in (train_set, val_set):
        report_problems(data)
    if run.config.weights is None and len(train_set) < 20_000:
        log.info("training from scratch; on data this small, pretrained weights usually give much higher accuracy")


# -- one epoch --------------------------------------------------------------------------------------------------------


def _train_epoch(run: Run, stop: _Stop) -> float:
    """Learn from every image once, or from those that are left of the epoch; return the last learning rate."""
    config, world, learner, position = run.config, run.world, run.learner, run.position
    num_images, accumulate = run.loader.num_images, config.optimizer.grad_accum_steps
    steps = run.loader.start(position.epoch, position.segments, position.step)
    before = num_images - (steps[-1].stop if steps else 0)  # in segments that have ended

    def rate_at(index: int) -> float:
        """Learning rate of the update that a step is part of."""
        seen = before + steps[index - index % accumulate].start
        return learning_rate((position.epoch + seen / num_images) / config.epochs, config, run.warmup)

    steps_between_looks = accumulate * max(1, _STEPS_BETWEEN_LOOKS // accumulate)  # so that an update ends there
    learner.train_mode()
    unseen: list[tuple[Tensor, list[int]]] = []  # losses the host has not looked at yet, and their images
    errors: set[str] = set()
    with Progress(run.label, num_images, done=position.images, silent=not world.is_first) as progress:
        for index, batch in enumerate(ahead_on(run.device, run.loader.epoch()), start=position.step):
            step, rate, is_last = steps[index], rate_at(index), index + 1 == len(steps)
            first = index - index % accumulate
            num_batches = min(accumulate, len(steps) - first)  # whose gradients make one update
            is_update = index + 1 == first + num_batches
            errors.update(batch.errors)
            # The mean over all processes is that over all images, also where one has an image more.
            share = (len(batch) + len(batch.errors)) * world.size / (step.stop - step.start) / num_batches
            loss = learner.step(batch, share=share, learning_rate=rate if is_update else None)
            if loss is not None:
                unseen.append((loss, batch.indices))
            position.step, position.images = index + 1, before + step.stop
            asked = world.size == 1 and stop.requested  # several processes have to look at the same time
            if run.device.type == "cpu" or (index + 1) % steps_between_looks == 0 or is_last or asked:
                _take_losses(run, unseen)
                unseen.clear()
                if is_update:
                    is_due = time.monotonic() - run.last_saved >= config.checkpoint_minutes * 60
                    must_stop, must_save = distributed.any_of(world, stop.requested, is_due)
                    if must_stop or must_save:
                        _save(run)
                    if must_stop:
                        raise TrainingInterrupted(run.folder.config) if world.is_first else SystemExit(1)
            progress.advance(position.images - progress.done, f"loss {position.loss:.4f}  lr {rate:.2e}")
        run.images_per_second = progress.per_second or run.images_per_second
    _close_epoch(run, errors)
    return rate_at(len(steps) - 1) if steps else float(learner.optimizer.param_groups[0]["lr"])


def _take_losses(run: Run, losses: list[tuple[Tensor, list[int]]]) -> None:
    """Add the losses of batches to the epoch's, and refuse those that are not finite; wait for the device once."""
    values = torch.stack([loss for loss, _ in losses]).tolist() if losses else []
    for value, (_, indices) in zip(values, losses, strict=True):
        if not math.isfinite(value):
            names = ", ".join(run.train_set.names[i] for i in indices)
            raise MobileViTError(
                f"the loss became {value} in epoch {run.position.epoch + 1}; lower `learning_rate`, set "
                f"`clip_grad_norm` to 1, or look at the images of this batch: {names}"
            )
        run.position.loss_sum += value
        run.position.loss_count += 1


def _close_epoch(run: Run, errors: set[str]) -> None:
    """Add up the losses of all processes, and report which images none of them could read."""
    position = run.position
    errors = set().union(*distributed.gathered(run.world, errors))
    sums = distributed.gathered(run.world, (position.loss_sum, position.loss_count))
    position.loss_sum, position.loss_count = sum(one for one, _ in sums), sum(count for _, count in sums)
    if position.loss_count == 0:
        reason = f"no image to train on can be read; {min(errors)}" if errors else "too few images to train on"
        raise MobileViTError(f"{run.train_set.origin}: {reason}")
    report_unreadable(errors - run.unreadable, "training", len(run.train_set))
    run.unreadable |= errors


def _evaluate_epoch(run: Run, learning_rate: float) -> None:
    """Measure what was learned, keep it if it is the best so far, and write the epoch into the record."""
    position, learner, epoch = run.position, run.learner, run.position.epoch
    distributed.spread(run.world, learner.evaluated)  # statistics of BatchNorm are each process's own
    session = TorchSession(learner.evaluated, learner.card, device=run.device, amp_dtype=learner.amp_dtype)
    report = measure(session, run.val_loader, label=f"{run.label}, validation").report
    if report.score > position.best_score:
        position.best_score, position.best_epoch = report.score, epoch
        if run.world.is_first:
            provenance = {  # to find the held-out images again, and where the weights come from
                "data_fingerprint": run.fingerprint,
                "val_fraction": str(run.config.val_fraction),
                "seed": str(run.config.seed),
                "epoch": str(epoch + 1),
                "trained_on": Path(run.config.data).name,
            }
            run.folder.save_best(learner.evaluated, report, provenance)
    if run.world.is_first:
        run.folder.append(
            {
                "epoch": epoch,
                "train_loss": round(position.loss, 6),
                **report.summary,
                "learning_rate": learning_rate,
                "images_per_second": round(run.images_per_second, 2),
                "peak_memory_mb": peak_memory_mb(run.device),
            }
        )
    log.info(
        "%s  loss %.4f  validation %s %.2f %%%s  %.1f images/s",
        run.label, position.loss, report.score_name, 100 * report.score,
        " (best)" if position.best_epoch == epoch else "", run.images_per_second,
    )  # fmt: skip
    run.position = Position(epoch=epoch + 1, best_score=position.best_score, best_epoch=position.best_epoch)
    _save(run)
    if epoch % 10 == 9 and run.world.is_first:
        run.folder.draw_curves(run.train_set.task)


def _is_stuck(run: Run) -> bool:
    patience, position = run.config.early_stopping, run.position
    if patience is None or position.step or position.epoch - 1 - position.best_epoch < patience:
        return False
    log.info("no better result for %d epochs: stopping early", patience)
    return True


# -- stopping, resuming, ending ---------------------------------------------------------------------------------------


@dataclass
class _Stop:
    requested: bool = False


@contextmanager
def _stop_signals(world: World) -> Iterator[_Stop]:
    """Let Ctrl-C and SIGTERM ask for an end instead of ending the process; a second Ctrl-C ends it."""
    stop = _Stop()

    def request(number: int, _: FrameType | None) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if world.size > 1 and not stop.requested:
            distributed.end_soon()
        stop.requested = True
        print("\nstopping after this step; press Ctrl-C again to stop without saving", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():  # which alone handles signals
        yield stop
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _save(run: Run) -> None:
    """Write the state of all processes, to be restored exactly."""
    own = {"random": _random_state(run.device), "loss": (run.position.loss_sum, run.position.loss_count)}
    ranks = distributed.gathered(run.world, own)
    if run.world.is_first:
        state = {"position": dataclasses.asdict(run.position), "ranks": ranks, "data": run.fingerprint}
        run.folder.save_last(run.learner.state_dict() | state)
    run.last_saved = time.monotonic()


def _restore(run: Run, state: State) -> None:
    """Continue from what `_save` wrote, perhaps by another number of processes."""
    run.learner.load_state_dict(state)
    position, ranks = Position(**state["position"]), state["ranks"]
    if len(ranks) == run.world.size:
        own = ranks[run.world.rank]
        _set_random_state(own["random"], run.device)
        position.loss_sum, position.loss_count = own["loss"]
    else:
        log.info("started with %d processes, continues with %d", len(ranks), run.world.size)
        if position.step:
            done = position.images - sum(images for _, images in position.segments)
            position.segments.append((len(ranks), done))
            position.step = 0
    run.position = position
    if run.world.is_first:
        run.folder.forget_from(position.epoch)


def _random_state(device: torch.device) -> State:
    # Of its own GPU only: a run may go on where there are fewer, or on another one.
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: State, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _finish(run: Run) -> TrainResult:
    """Measure the best weights once more, with everything that the record shows of them."""
    learner, folder = run.learner, run.folder
    best = folder.load_best(learner.model) if run.world.is_first else copy.deepcopy(learner.model).eval()
    distributed.spread(run.world, best.to(run.device))
    session = TorchSession(best, learner.card, device=run.device, amp_dtype=learner.amp_dtype)
    evaluation = measure(session, run.val_loader)
    if run.world.is_first:
        folder.close()
        folder.draw_curves(run.train_set.task)
        write_evaluation(evaluation, run.val_set, folder.path)
        report_unreadable(evaluation.errors, "validation", len(run.val_set))
        folder.write_model_card(
            best, run.config, run.train_set.task, {"train": len(run.train_set), "val": len(run.val_set)}
        )
    return TrainResult(
        task=run.train_set.task.name,
        report=evaluation.report,
        best=folder.best,
        epochs=run.position.epoch,
        images_per_second=run.images_per_second,
    )
