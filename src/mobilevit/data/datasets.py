"""From a path to the parts of a data set: to train on, to validate on, to test on, whatever the task and the layout."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mobilevit.card import TaskName
from mobilevit.data.box_layouts import detection_splits, has_boxes
from mobilevit.data.class_layouts import classification_splits
from mobilevit.data.imageset import ImageSet, split
from mobilevit.data.mask_layouts import has_masks, segmentation_splits
from mobilevit.data.shards import holds_shards, is_elsewhere_or_pattern, shard_splits
from mobilevit.errors import MobileViTError

log = logging.getLogger("mobilevit")

_READERS: dict[TaskName, Callable[[Path], dict[str, ImageSet[Any]]]] = {
    "classification": classification_splits,
    "detection": detection_splits,
    "segmentation": segmentation_splits,
}


def find_splits(path: str | os.PathLike[str], task: TaskName | None = None) -> dict[str, ImageSet[Any]]:
    """Recognize and read what lies at `path`: labels at once, images and masks when they are asked for.

    The layouts of each task are those of `classification_splits`, `detection_splits` and `segmentation_splits`.

    Args:
        path: a folder or file; for shards, also a pattern or URL.
        task: None recognizes it by the layout.

    Returns:
        {"train": ..., "val": ..., "test": ...}, as far as the data are divided, else {"all": ...}. A train part alone
        is data that are not divided.

    Raises:
        MobileViTError: nothing there, nothing usable, or both boxes and masks and no `task` to choose by.
    """
    if is_elsewhere_or_pattern(path):
        if task not in (None, "classification"):
            raise MobileViTError(f"{path}: shards are for classification; `task` {task} takes local folders")
        return shard_splits(path)
    path = Path(path)
    if not path.exists():
        raise MobileViTError(f"{path}: no such file or folder; `data` takes a folder per class, or boxes or masks")
    return _READERS[task or recognize_task(path)](path)


def recognize_task(path: Path) -> TaskName:
    """Return the task that the files at `path` are labeled for.

    Raises:
        MobileViTError: both boxes and masks.
    """
    if holds_shards(path):
        return "classification"
    boxes, masks = has_boxes(path), has_masks(path)
    if boxes and masks:
        raise MobileViTError(f"{path}: has both boxes and masks; choose with `task` detection or `task` segmentation")
    if boxes:
        return "detection"
    return "segmentation" if masks else "classification"


def load_train_val(
    path: str | os.PathLike[str],
    *,
    task: TaskName | None = None,
    val_path: str | os.PathLike[str] | None,
    val_fraction: float,
    seed: int,
) -> tuple[ImageSet[Any], ImageSet[Any]]:
    """Read the images to train on and those to choose the best epoch by.

    Without a val part, a stratified and seeded share of the train part is held out. A test part is used for neither.

    Raises:
        MobileViTError: unusable data, too few classes, or a class with too few images to hold one out.
    """
    splits = find_splits(path, task)
    train = _undivided(splits)
    if train is None:
        raise MobileViTError(f"{path}: holds {' and '.join(splits)}, but nothing to train on; add a train part")
    if val_path is not None:
        other = find_splits(val_path, train.task.name)
        val = other.get("val", _undivided(other))
        if val is None:
            raise MobileViTError(
                f"{val_path}: holds only a test part, which must not choose the best epoch; name another `val_data`"
            )
        val = val.relabel(train.classes)
    elif "val" in splits:
        val = splits["val"]
    else:
        train.check_classes()
        whole = len(train)
        train, val = split(train, val_fraction=val_fraction, seed=seed)
        if "test" in splits:
            message = (
                "%s: no val part: %d of the %d train images are held out for validation; the test part is not used"
            )
            log.info(message, path, len(val), whole)
    train.check_classes()
    return train, val


def part_to_evaluate(
    path: str | os.PathLike[str], part: str, *, task: TaskName, provenance: Mapping[str, str]
) -> tuple[ImageSet[Any], str]:
    """Read the images to measure a model on, and say in words which they are.

    Args:
        path: as for `find_splits`.
        part: "train", "val", "test", "all" (data that are not divided), or "auto": the val part if there is one; of the
            data that the model was trained on, what was held out for validation; else all there is, or the test part.
        task: of the model.
        provenance: of the model; says how its training data were divided.

    Raises:
        MobileViTError: no such data, or no such part.
    """
    splits = find_splits(path, task)
    found: dict[str, tuple[ImageSet[Any], str]] = {}
    if "val" not in splits and (whole := _undivided(splits)) is not None:
        found = _as_divided_in_training(whole, provenance)
    for name, data in splits.items():
        found.setdefault(name, (data, "all of it" if name == "all" else f"the {name} part"))
    choices = [name for name in ("val", "all", "test", "train") if name in found] if part == "auto" else [part]
    if choices[0] in found:
        return found[choices[0]]
    if "all" not in splits:
        raise MobileViTError(f"{path}: is divided into {' and '.join(splits)}; choose `split` {' or '.join(splits)}")
    if part == "test":
        raise MobileViTError(f"{path}: has no test part; leave `split` out, or choose `split` all")
    raise MobileViTError(f"{path}: not divided, and not what this checkpoint was trained on; choose `split` all")


def _undivided(splits: Mapping[str, ImageSet[Any]]) -> ImageSet[Any] | None:
    """Return the part to train on."""
    return splits.get("train", splits.get("all"))


def _as_divided_in_training(
    whole: ImageSet[Any], provenance: Mapping[str, str]
) -> dict[str, tuple[ImageSet[Any], str]]:
    """Hold out the images that training held out; {} if this is not what the model was trained on."""
    if "data_fingerprint" in provenance:
        fraction, seed = float(provenance["val_fraction"]), int(provenance["seed"])
        with suppress(MobileViTError):  # data that cannot be divided are not what it was trained on
            train, val = split(whole, val_fraction=fraction, seed=seed)
            if train.fingerprint() == provenance["data_fingerprint"]:
                which = "what was held out when it was trained on these"
                return {"train": (train, "what it was trained on"), "val": (val, which)}
    return {}
