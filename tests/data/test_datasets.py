import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numbered_images import numbers, write_folder, write_image
from PIL import Image

from mobilevit.card import TaskName
from mobilevit.data.datasets import find_splits, load_train_val
from mobilevit.data.shapes import CLASSES, write_boxes, write_masks


def write_voc(folder: Path, names: str = "a", classes: str = "cat", lists: str = "") -> Path:
    """An image of 4 x 3 with one box for each letter of `names`; each is in the part that `lists` has there."""
    for number, name in enumerate(names):
        write_image(folder / f"JPEGImages/{name}.png", number)
        box = "<bndbox><xmin>0</xmin><ymin>0</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>"
        (folder / "Annotations").mkdir(exist_ok=True)
        (folder / f"Annotations/{name}.xml").write_text(
            f"<annotation><object><name>{classes}</name>{box}</object></annotation>"
        )
    for name, part in zip(names, lists, strict=False):
        (folder / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        with (folder / "ImageSets/Main" / {"t": "train.txt", "v": "val.txt"}[part]).open("a") as file:
            file.write(f"{name}\n")
    return folder


def write_yolo(folder: Path, lines: dict[str, str], classes: str = "cat dog") -> Path:
    """An image of 4 x 3 for each name, with a square box for each number in its line."""
    (folder / "labels").mkdir(parents=True)
    for number, (name, labels) in enumerate(lines.items()):
        write_image(folder / f"images/{name}.png", number)
        (folder / f"labels/{name}.txt").write_text("".join(f"{n} 0.5 0.5 0.5 0.5\n" for n in labels.split()))
    (folder / "classes.txt").write_text("\n".join(classes.split()))
    return folder


def write_pairs(folder: Path, names: str = "ab", masks: str = "masks") -> Path:
    """An image of 4 x 3 and a mask of 0 and 1 for each letter."""
    for number, name in enumerate(names):
        write_image(folder / f"images/{name}.png", number)
        (folder / masks).mkdir(exist_ok=True)
        Image.fromarray(np.tile(np.array([0, 0, 1, 1], np.uint8), (3, 1))).save(folder / masks / f"{name}.png")
    return folder


# -- the task ---------------------------------------------------------------------------------------------------------


def class_folders(folder: Path) -> Path:
    return write_folder(folder, {"cat": 1, "dog": 1})


def csv_file(folder: Path) -> Path:
    (folder / "data.csv").write_text("path,label\na.png,cat\n")
    return folder / "data.csv"


def coco_folder(folder: Path) -> Path:
    write_boxes(folder, num_images=2, size=32)
    return folder


def coco_file(folder: Path) -> Path:
    return coco_folder(folder) / "annotations.json"


def yolo_folder(folder: Path) -> Path:
    return write_yolo(folder / "yolo", {"a": "0"})


def yolo_file(folder: Path) -> Path:
    yolo_folder(folder)
    (folder / "x.yaml").write_text("names: [cat, dog]\ntrain: yolo/images\n")
    return folder / "x.yaml"


def voc_masks(folder: Path) -> Path:
    write_pairs(folder / "VOC2012", "a", masks="SegmentationClass")
    (folder / "VOC2012/images").rename(folder / "VOC2012/JPEGImages")
    return folder


@pytest.mark.parametrize(
    ("write", "task"),
    [
        (class_folders, "classification"),
        (csv_file, "classification"),
        (write_voc, "detection"),
        (coco_folder, "detection"),
        (coco_file, "detection"),
        (yolo_folder, "detection"),
        (yolo_file, "detection"),
        (write_pairs, "segmentation"),
        (voc_masks, "segmentation"),
    ],
)
def test_the_task_is_recognized_by_the_layout(tmp_path: Path, write: Callable[[Path], Path], task: TaskName) -> None:
    (data,) = find_splits(write(tmp_path)).values()
    assert data.task.name == task


def test_boxes_and_masks_alike_need_a_choice(tmp_path: Path) -> None:
    write_pairs(write_yolo(tmp_path / "x", {"a": "0 1", "b": "0"}))
    with pytest.raises(ValueError, match="x: has both boxes and masks; choose `task` detection or segmentation"):
        find_splits(tmp_path / "x")
    for task in ("detection", "segmentation"):
        (data,) = find_splits(tmp_path / "x", task).values()
        assert (data.task.name, len(data)) == (task, 2)


def test_a_chosen_task_that_the_data_are_not_for(tmp_path: Path) -> None:
    class_folders(tmp_path)
    with pytest.raises(ValueError, match="no boxes found; the layouts are Pascal VOC"):
        find_splits(tmp_path, "detection")
    with pytest.raises(ValueError, match="no masks found; the layouts are images/"):
        find_splits(tmp_path, "segmentation")


# -- data to train and validate on ------------------------------------------------------------------------------------


def test_val_data_from_elsewhere(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", {"cat": 2, "dog": 2})
    write_folder(tmp_path / "b", {"dog": 3})
    write_folder(tmp_path / "c/train", {"cat": 1, "dog": 1})
    write_folder(tmp_path / "c/val", {"dog": 1, "cat": 2})
    train, val = load_train_val(tmp_path / "a", val_path=tmp_path / "b", val_fraction=0.5, seed=0)
    assert (len(train), val.targets, val.classes) == (4, [1, 1, 1], ("cat", "dog"))
    train, val = load_train_val(tmp_path / "c", val_path=tmp_path / "a", val_fraction=0.5, seed=0)
    assert (train.targets, val.targets) == ([0, 1], [0, 0, 1, 1])
    _, val = load_train_val(tmp_path / "a", val_path=tmp_path / "c", val_fraction=0.5, seed=0)
    assert val.targets == [0, 0, 1]


def test_missing_path_and_other_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing: no such file or folder; `data` takes a folder"):
        find_splits(tmp_path / "nothing")
    (tmp_path / "data.zip").touch()
    with pytest.raises(ValueError, match=r"data\.zip: no kind of data; give a folder, a \.csv"):
        find_splits(tmp_path / "data.zip")


def test_load_train_val_divides_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 10, "dog": 5})
    train, val = load_train_val(tmp_path, val_path=None, val_fraction=0.2, seed=0)
    assert (Counter(train.targets), Counter(val.targets)) == ({0: 8, 1: 4}, {0: 2, 1: 1})
    assert sorted(numbers(train) + numbers(val)) == [*range(10), *range(20, 25)]


def test_a_rare_class_of_boxes_is_in_both_parts(tmp_path: Path) -> None:
    lines = {f"{i:02d}": "0 1 1" if i % 9 == 0 else "0 0" for i in range(36)}  # dogs in 4 of 36 images
    write_yolo(tmp_path / "x", lines | {"empty1": "", "empty2": ""})
    for seed in range(10):
        train, val = load_train_val(tmp_path / "x", val_path=None, val_fraction=0.25, seed=seed)
        assert sorted([*train.names, *val.names]) == sorted(find_splits(tmp_path / "x")["all"].names)
        assert (train.class_counts(), val.class_counts()) == ([51, 6], [17, 2])
        assert sum(not boxes.labels.size for boxes in val.targets) == 1
        assert train.task.name == "detection"
    again = load_train_val(tmp_path / "x", val_path=None, val_fraction=0.25, seed=9)
    assert [part.names for part in again] == [train.names, val.names]


def test_masks_are_divided(tmp_path: Path) -> None:
    write_pairs(tmp_path, "abcdefgh")
    train, val = load_train_val(tmp_path, val_path=None, val_fraction=0.25, seed=0)
    assert (len(train), len(val), train.task.name, train.classes) == (6, 2, "segmentation", ("class_0", "class_1"))
    assert sorted(numbers(train) + numbers(val)) == list(range(8))
    for part in (train, val):
        assert [target.path.stem for target in part.targets] == [Path(name).stem for name in part.names]


def test_divided_boxes_stay_as_they_are(tmp_path: Path) -> None:
    write_voc(tmp_path, "abc", lists="tvt")
    train, val = load_train_val(tmp_path, val_path=None, val_fraction=0.5, seed=0)
    assert (numbers(train), numbers(val)) == ([0, 2], [1])


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_val_without_train(tmp_path: Path, task: TaskName) -> None:
    if task == "detection":
        write_voc(tmp_path / "x", "a", lists="v")
        (tmp_path / "x/ImageSets/Main/test.txt").write_text("a\n")
    else:
        for part in ("val", "test"):
            write_pairs(tmp_path / "x" / part)
    with pytest.raises(ValueError, match="x: holds val and test, but nothing to train on; add a train part"):
        load_train_val(tmp_path / "x", val_path=None, val_fraction=0.5, seed=0)


def test_boxes_to_validate_on_from_elsewhere(tmp_path: Path) -> None:
    write_yolo(tmp_path / "x", {"a": "0", "b": "1"}, "cat dog")
    write_yolo(tmp_path / "y", {"c": "0"}, "dog cat")
    train, val = load_train_val(tmp_path / "x", val_path=tmp_path / "y", val_fraction=0.5, seed=0)
    assert (len(train), val.classes, val.targets[0].labels.tolist()) == (2, ("cat", "dog"), [1])
    write_pairs(tmp_path / "z")
    with pytest.raises(ValueError, match="z: no boxes found"):
        load_train_val(tmp_path / "x", val_path=tmp_path / "z", val_fraction=0.5, seed=0)


def test_a_single_image_cannot_be_divided(tmp_path: Path) -> None:
    write_pairs(tmp_path / "x", "a")
    with pytest.raises(ValueError, match="images: there is only one image; two are needed"):
        load_train_val(tmp_path / "x", val_path=None, val_fraction=0.5, seed=0)


def test_masks_of_one_class_only(tmp_path: Path) -> None:
    write_pairs(tmp_path / "x")
    (tmp_path / "x/classes.txt").write_text("ground\n")
    with pytest.raises(ValueError, match=r"x.*: only one class \(ground\); segmentation needs two or more"):
        load_train_val(tmp_path / "x", val_path=None, val_fraction=0.5, seed=0)


# -- the built-in drawings as files -----------------------------------------------------------------------------------


def test_drawn_boxes_are_divided_with_every_class_in_both(tmp_path: Path) -> None:
    write_boxes(tmp_path, num_images=24, size=32)
    assert json.loads((tmp_path / "annotations.json").read_text())["categories"][0] == {"id": 1, "name": CLASSES[0]}
    train, val = load_train_val(tmp_path, val_path=None, val_fraction=0.25, seed=0)
    assert min(train.class_counts()) > 0
    assert len(train) + len(val) == 24


def test_drawn_masks_are_divided(tmp_path: Path) -> None:
    write_masks(tmp_path, num_images=8, size=32)
    train, val = load_train_val(tmp_path, val_path=None, val_fraction=0.25, seed=0)
    assert (len(train), len(val), train.classes) == (6, 2, ("background", *CLASSES))
