"""What a run reads: its images, to train on and held out, and the order and sizes in which they come."""

from __future__ import annotations

from typing import Any

import torch

from mobilevit.data.datasets import load_train_val
from mobilevit.data.imageset import ImageSet
from mobilevit.data.loaders import BatchLoader
from mobilevit.evaluation import default_num_workers
from mobilevit.training import distributed
from mobilevit.training.config import TrainConfig
from mobilevit.training.distributed import World
from mobilevit.training.learner import Learner


def load_images(config: TrainConfig, world: World) -> tuple[TrainConfig, ImageSet[Any], ImageSet[Any]]:
    """The settings with nothing left open, the images to train on, and those held out.

    Raises:
        ValueError: no such data, or settings that do not go with them.
    """
    train_set, val_set = load_train_val(
        config.data,
        task=None if config.task == "auto" else config.task,
        val_path=config.val_data,
        val_fraction=config.val_fraction,
        seed=config.seed,
    )
    config = config.resolve(train_set.task, world.size)
    config.validate()
    return config, train_set, val_set


def training_loader(config: TrainConfig, data: ImageSet[Any], learner: Learner, world: World) -> BatchLoader:
    """The images to train on, in an order and at sizes that depend on nothing but the seed."""
    return BatchLoader(
        data,
        learner.objective.transform,
        collate=learner.objective.collate,
        batch_size=config.batch_size,
        num_workers=num_reading_processes(config, learner.device),
        shuffle_seed=config.seed,
        sizes=config.step_sizes(),
        pin_memory=learner.device.type == "cuda",
        shard=(world.rank, world.size),
    )


def num_reading_processes(config: TrainConfig, device: torch.device) -> int:
    """As the settings say, or by the cores that this process has to itself."""
    if config.num_workers is not None:
        return config.num_workers
    return default_num_workers(device, sharing=distributed.local_size())
