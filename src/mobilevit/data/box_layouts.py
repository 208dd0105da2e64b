"""Images with boxes around objects, in the formats of `voc`, `coco` and `yolo`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mobilevit.data.coco import find_coco, looks_like_coco, read_coco, read_coco_file
from mobilevit.data.imageset import ImageSet
from mobilevit.data.voc import find_voc, read_voc
from mobilevit.data.yolo import find_yolo, find_yolo_yaml, looks_like_yolo_yaml, read_yolo, read_yolo_yaml
from mobilevit.errors import MobileViTError, some
from mobilevit.tasks.targets import Boxes

_LAYOUTS = (
    "Pascal VOC (Annotations/*.xml, JPEGImages/), COCO (annotations/*.json, images/) or YOLO (data.yaml, or images/, "
    "labels/*.txt and classes.txt)"
)


def has_boxes(path: Path) -> bool:
    """Whether boxes lie at `path` in one of the layouts of `detection_splits`; only a few names are looked at."""
    if path.is_file():
        return (path.suffix.lower() == ".json" and looks_like_coco(path)) or looks_like_yolo_yaml(path)
    if not path.is_dir():
        return False
    return bool(find_coco(path) or find_yolo_yaml(path) or find_voc(path) or find_yolo(path))


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

    Returns:
        {"train": ..., "val": ..., "test": ...}, as far as the data are divided, else {"all": ...}.

    Raises:
        MobileViTError: none of these layouts, no image, no usable box, or a part that names nothing that exists.
    """
    splits = _read_file(path) if path.is_file() else _read_folder(path)
    if not any(boxes.labels.size for data in splits.values() for boxes in data.targets):
        first = next((f"; first trouble: {problem}" for data in splits.values() for problem in data.problems), "")
        raise MobileViTError(f"{path}: {sum(map(len, splits.values()))} images, but not one usable box{first}")
    return splits


def _read_file(path: Path) -> dict[str, ImageSet[Boxes]]:
    if path.suffix.lower() == ".json":
        return read_coco_file(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        return read_yolo_yaml(path)
    raise MobileViTError(f"{path}: not a file with boxes; give a folder, a COCO .json or a YOLO .yaml")


def _read_folder(path: Path) -> dict[str, ImageSet[Boxes]]:
    """Try the formats in this order, as a folder in one of them often holds traces of those after it."""
    if files := find_coco(path):
        return read_coco(path, files)
    if files := find_yolo_yaml(path):
        _refuse_several(path, [p.name for p in files])
        return read_yolo_yaml(files[0])
    if folders := find_voc(path):
        _refuse_several(path, [p.as_posix() for p in folders])
        return read_voc(folders[0])
    if parts := find_yolo(path):
        return read_yolo(path, parts)
    raise MobileViTError(f"{path}: no boxes found; the layouts are {_LAYOUTS}")


def _refuse_several(path: Path, names: Sequence[str]) -> None:
    if len(names) > 1:
        raise MobileViTError(f"{path}: holds {some(names)}; give the path of one of them")
