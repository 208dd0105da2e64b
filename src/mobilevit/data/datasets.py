"""From a path to the parts of a data set: to train on, to validate on, to test on, whatever the task and the layout."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from mobilevit.card import TaskName
from mobilevit.data.class_layouts import classification_splits
from mobilevit.data.coco import find_coco, looks_like_coco, read_coco, read_coco_file
from mobilevit.data.folders import part_named
from mobilevit.data.imageset import AnyImages, ImageSet, split
from mobilevit.data.mask_layouts import has_masks, segmentation_splits
from mobilevit.data.shard_files import is_pattern, name_of
from mobilevit.data.shards import holds_shards, shard_splits
from mobilevit.data.voc import find_voc, read_voc
from mobilevit.data.yolo import find_yolo, find_yolo_yaml, looks_like_yolo_yaml, read_yolo, read_yolo_yaml
from mobilevit.errors import MobileViTError, some
from mobilevit.remote import is_url
from mobilevit.tasks.targets import Boxes

log = logging.getLogger("mobilevit")

_MARKS = re.compile(
    r"annotations|labels|masks?|segmentationclass(aug)?|voc20.*|vocdevkit|classes\.txt|obj\.names"
    r"|.*\.(json|ya?ml|xml|tar|tar\.gz|tgz)",
    re.IGNORECASE,
)
"""Names of files and folders. Every layout but a folder per class, a CSV and a parquet file has one of them, at the top
or in a part."""
_BOX_LAYOUTS = (
    "Pascal VOC (Annotations/*.xml, JPEGImages/), COCO (annotations/*.json, images/) or YOLO (data.yaml, or images/, "
    "labels/*.txt and classes.txt)"
)


# -- layouts ----------------------------------------------------------------------------------------------------------


def find_splits(path: str | os.PathLike[str], task: TaskName | None = None) -> dict[str, AnyImages]:
    """Recognize and read what lies at `path`: labels at once, images and masks when they are asked for.

    The layouts of each task are those of `classification_splits` and `shard_splits`, `detection_splits` and
    `segmentation_splits`; `path` is a folder or file, or a pattern or URL of shards. `task` None recognizes it.

    Returns:
        {"train": ..., "val": ..., "test": ...}, as far as the data are divided, else {"all": ...}. A train part alone
        is data that are not divided.

    Raises:
        MobileViTError: nothing there, nothing usable, or both boxes and masks and no `task` to choose by.
    """
    if os.path.exists(path):  # noqa: PTH110, Path.exists fails on a long URL
        return _recognize(Path(path), task)(Path(path))
    place = os.fspath(path)
    if not is_url(place) and not (is_pattern(place) and ".t" in name_of(place)):  # shards elsewhere, or several
        raise MobileViTError(f"{path}: no such file or folder; `data` takes a folder per class, or boxes or masks")
    if task not in (None, "classification"):
        raise MobileViTError(f"{path}: shards are for classification; `task` {task} takes local folders")
    return shard_splits(path)


def _recognize(path: Path, task: TaskName | None) -> Callable[[Path], dict[str, AnyImages]]:
    """Choose the function that reads what lies at `path`."""
    is_marked = _is_marked(path)
    if is_marked and task in (None, "classification") and holds_shards(path):
        return shard_splits
    if is_marked and task is None:
        boxes, masks = has_boxes(path), has_masks(path)
        if boxes and masks:
            raise MobileViTError(f"{path}: has both boxes and masks; choose `task` detection or segmentation")
        task = "detection" if boxes else "segmentation" if masks else None
    return _READERS[task or "classification"]


def _is_marked(path: Path) -> bool:
    if not path.is_dir():
        return _MARKS.fullmatch(path.name) is not None
    return any(
        _MARKS.fullmatch(entry.name) or (part_named(entry.name) and entry.is_dir() and _is_marked(entry))
        for entry in path.iterdir()
    )


def has_boxes(path: Path) -> bool:
    """Whether boxes lie at `path` in one of the layouts of `detection_splits`; only a few names are looked at."""
    if path.is_file():
        return (path.suffix.lower() == ".json" and looks_like_coco(path)) or looks_like_yolo_yaml(path)
    return path.is_dir() and bool(find_coco(path) or find_yolo_yaml(path) or find_voc(path) or find_yolo(path))


def detection_splits(path: Path) -> dict[str, ImageSet[Boxes]]:
    """Recognize and read boxes in one of three layouts, given as a folder, a COCO `.json` or a YOLO `.yaml`.

    - Pascal VOC: a folder of `.xml` files (`Annotations`) and one of images (`JPEGImages`, `images`), or both in
      one folder; divided by `ImageSets/Main/{train,val,test}.txt` or by sub-folders. Coordinates are taken as they
      are: the original VOC counts pixels from 1, most tools that write its format from 0. Classes are sorted by
      name. Objects marked `difficult` become crowd.
    - COCO: `annotations/instances_{train,val}*.json` or a `.json` file in each of `train`, `valid`, `test`. Classes
      are the categories in order of their id.
    - YOLO: a `.yaml` with `names`, `train` and `val`, or `images/`, `labels/` and `classes.txt`. Polygons become the
      boxes around them.

    Whatever is wrong with single annotations is in the `problems` of the sets, with what was done about it.

    Raises:
        MobileViTError: none of these layouts, no image, no usable box, or a part that names nothing that exists.
    """
    splits = _read_boxes(path)
    if not any(boxes.labels.size for data in splits.values() for boxes in data.targets):
        first = next((f"; first trouble: {problem}" for data in splits.values() for problem in data.problems), "")
        raise MobileViTError(f"{path}: {sum(map(len, splits.values()))} images, but not one usable box{first}")
    return splits


def _read_boxes(path: Path) -> dict[str, ImageSet[Boxes]]:
    if path.is_file():
        if path.suffix.lower() == ".json":
            return read_coco_file(path)
        if path.suffix.lower() in (".yaml", ".yml"):
            return read_yolo_yaml(path)
        raise MobileViTError(f"{path}: not a file with boxes; give a folder, a COCO .json or a YOLO .yaml")
    # In this order, as a folder in one of the formats often holds traces of those after it.
    if files := find_coco(path):
        return read_coco(path, files)
    if files := find_yolo_yaml(path):
        return read_yolo_yaml(_only(path, files))
    if folders := find_voc(path):
        return read_voc(_only(path, folders))
    if parts := find_yolo(path):
        return read_yolo(path, parts)
    raise MobileViTError(f"{path}: no boxes found; the layouts are {_BOX_LAYOUTS}")


def _only(path: Path, found: list[Path]) -> Path:
    if len(found) > 1:
        raise MobileViTError(f"{path}: holds {some([str(p) for p in found])}; give the path of one of them")
    return found[0]


_READERS: dict[TaskName, Callable[[Path], dict[str, AnyImages]]] = {
    "classification": classification_splits,
    "detection": detection_splits,
    "segmentation": segmentation_splits,
}


# -- parts ------------------------------------------------------------------------------------------------------------


def load_train_val(
    path: str | os.PathLike[str],
    *,
    task: TaskName | None = None,
    val_path: str | os.PathLike[str] | None,
    val_fraction: float,
    seed: int,
) -> tuple[AnyImages, AnyImages]:
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
            held_out = f"{len(val)} of the {whole} train images are held out for validation"
            log.info("%s: no val part: %s; the test part is not used", path, held_out)
    train.check_classes()
    return train, val


def part_to_evaluate(
    path: str | os.PathLike[str], part: str, *, task: TaskName, provenance: Mapping[str, str]
) -> tuple[AnyImages, str]:
    """Read the images to measure a model on, and say in words which they are.

    Args:
        path: as for `find_splits`.
        part: "train", "val", "test", "all" (data that are not divided), or "auto": the val part if there is one; of the
            data that the model was trained on, what was held out for validation; else all there is, or the test part.
        task: of the model.
        provenance: of the model; says how its training data were divided.
    """
    splits = find_splits(path, task)
    found: dict[str, tuple[AnyImages, str]] = {}
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


def _undivided(splits: Mapping[str, AnyImages]) -> AnyImages | None:
    return splits.get("train", splits.get("all"))


def _as_divided_in_training(whole: AnyImages, provenance: Mapping[str, str]) -> dict[str, tuple[AnyImages, str]]:
    """Hold out the images that training held out; {} if this is not what the model was trained on."""
    if "data_fingerprint" in provenance:
        fraction, seed = float(provenance["val_fraction"]), int(provenance["seed"])
        with suppress(MobileViTError):  # data that cannot be divided are not what it was trained on
            train, val = split(whole, val_fraction=fraction, seed=seed)
            if train.fingerprint() == provenance["data_fingerprint"]:
                which = "what was held out when it was trained on these"
                return {"train": (train, "what it was trained on"), "val": (val, which)}
    return {}
