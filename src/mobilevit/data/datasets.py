"""From a path to data to train and validate on, whatever the task and the layout."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobilevit.card import Task
from mobilevit.data.classification import classification_splits
from mobilevit.data.detection import detection_splits, has_boxes
from mobilevit.data.imageset import ImageSet, check_classes, split
from mobilevit.data.segmentation import has_masks, segmentation_splits
from mobilevit.data.shards import holds_shards, is_elsewhere_or_pattern, shard_splits
from mobilevit.errors import MobileViTError

_READERS: dict[Task, Callable[[Path], dict[str, ImageSet[Any]]]] = {
    "classification": classification_splits,
    "detection": detection_splits,
    "segmentation": segmentation_splits,
}


def find_splits(path: str | os.PathLike[str], task: Task | None = None) -> dict[str, ImageSet[Any]]:
    """Recognize what lies at `path` and read it: labels at once, images and masks when they are asked for.

    The layouts of each task are those of `classification_splits`, `detection_splits` and `segmentation_splits`.

    Args:
        path: a folder or file; of shards, also a pattern or URL.
        task: None recognizes it by the layout.

    Returns:
        {"train": ..., "val": ..., "test": ...}, as far as the data are divided, else {"all": ...}.

    Raises:
        ValueError: nothing there, nothing usable, or boxes and masks alike and no `task` to choose by.
    """
    if is_elsewhere_or_pattern(path):
        if task not in (None, "classification"):
            raise MobileViTError(f"{path}: shards are for classification; --task {task} takes local folders")
        return shard_splits(path)
    path = Path(path)
    if not path.exists():
        raise MobileViTError(f"{path}: no such file or folder; --data takes a folder per class, or boxes or masks")
    return _READERS[task or recognize_task(path)](path)


def recognize_task(path: Path) -> Task:
    """The task that the files at `path` are labeled for.

    Raises:
        ValueError: boxes and masks alike.
    """
    if holds_shards(path):
        return "classification"
    boxes, masks = has_boxes(path), has_masks(path)
    if boxes and masks:
        raise MobileViTError(f"{path}: has both boxes and masks; choose with --task detection or --task segmentation")
    if boxes:
        return "detection"
    return "segmentation" if masks else "classification"


def load_train_val(
    path: str | os.PathLike[str],
    *,
    task: Task | None = None,
    val_path: str | os.PathLike[str] | None,
    val_fraction: float,
    seed: int,
) -> tuple[ImageSet[Any], ImageSet[Any]]:
    """Data to train on and data to validate on; data that are not divided are split, stratified and seeded.

    Raises:
        ValueError: unusable data, too few classes, or a class too small to be divided.
    """
    splits = find_splits(path, task)
    if "all" not in splits and "train" not in splits:
        raise MobileViTError(f"{path}: holds {' and '.join(splits)}, but nothing to train on; add a train part")
    if val_path is not None:
        train = splits.get("train") or splits["all"]
        other = find_splits(val_path, train.task)
        val = (other.get("val") or other.get("all") or other["train"]).relabel(train.classes)
    elif "val" in splits:
        train, val = splits["train"], splits["val"]
    else:
        undivided = splits.get("all") or splits["train"]
        check_classes(undivided)
        train, val = split(undivided, val_fraction=val_fraction, seed=seed)
    check_classes(train)
    return train, val
