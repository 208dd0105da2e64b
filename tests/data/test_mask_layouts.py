import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mobilevit.class_names import IGNORE, VOC_CLASSES
from mobilevit.data.datasets import find_splits, has_boxes
from mobilevit.data.imageset import ImageSet
from mobilevit.data.mask_layouts import has_masks, segmentation_splits
from mobilevit.imaging.decode import read_image
from mobilevit.tasks.targets import Mask

SHARED = Path(__file__).parents[3] / "shared" / "data"


def write_image(path: Path, size: tuple[int, int] = (4, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 9, 9)).save(path)


def write_mask(path: Path, *values: int, mode: str = "L") -> None:
    """4 x 3 pixels, a column for each of up to four values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = np.array([values[min(i, len(values) - 1)] for i in range(4)], np.uint8)
    image = Image.fromarray(np.tile(row, (3, 1)))
    if mode == "P":
        image.putpalette([7] * 768)
    image.save(path)


def write_pair(folder: Path, name: str, *values: int, folders: tuple[str, str] = ("images", "masks")) -> None:
    write_image(folder / folders[0] / f"{name}.jpg")
    write_mask(folder / folders[1] / f"{name}.png", *values)


def write_classes(folder: Path, *names: str) -> None:
    (folder / "classes.txt").write_text("\n".join(names) + "\n")


def read(path: Path, part: str = "all") -> ImageSet[Mask]:
    return segmentation_splits(path)[part]


def rows(data: ImageSet[Mask]) -> list[list[int]]:
    """The first row of each mask."""
    return [target.read()[0].tolist() for target in data.targets]


def problems(data: ImageSet[Any], folder: Path) -> list[str]:
    return [str(problem).replace(f"{folder}/", "") for problem in data.problems]


@pytest.mark.parametrize("folders", [("images", "masks"), ("Images", "annotations"), ("JPEGImages", "labels")])
def test_folders(tmp_path: Path, folders: tuple[str, str]) -> None:
    write_pair(tmp_path, "a", 0, 1, 2, 255, folders=folders)
    write_pair(tmp_path, "city/b", 2, folders=folders)
    write_classes(tmp_path, "sky", "road", "car")
    assert has_masks(tmp_path)
    assert not has_boxes(tmp_path)
    data = read(tmp_path)
    assert data.task.name == "segmentation"
    assert data.classes == ("sky", "road", "car")
    assert data.names == [f"{folders[0]}/a.jpg", f"{folders[0]}/city/b.jpg"]
    assert rows(data) == [[0, 1, 2, IGNORE], [2, 2, 2, 2]]
    assert data.targets[0].read().shape == (3, 4)
    assert data.problems == ()
    assert read_image(pickle.loads(pickle.dumps(data.open))(1)).size == (4, 3)


@pytest.mark.parametrize(
    ("images", "masks"), [("images/{}", "masks/{}"), ("{}/images", "{}/masks"), ("images/{}", "masks")]
)
def test_parts(tmp_path: Path, images: str, masks: str) -> None:
    for part in ("train", "val", "test"):
        write_pair(tmp_path, f"{part}1", 0, 1, folders=(images.format(part), masks.format(part)))
    write_classes(tmp_path, "sky", "road")
    splits = segmentation_splits(tmp_path)
    assert {part: data.names for part, data in splits.items()} == {
        part: [f"{images.format(part)}/{part}1.jpg"] for part in ("train", "val", "test")
    }
    assert all(rows(data) == [[0, 1, 1, 1]] and data.problems == () for data in splits.values())


def test_images_to_test_on_may_lack_masks_altogether(tmp_path: Path) -> None:
    for part in ("training", "validation"):
        write_pair(tmp_path, "a", 0, 1, folders=(f"images/{part}", f"annotations/{part}"))
    write_image(tmp_path / "images/test/a.jpg")
    write_classes(tmp_path, "sky", "road")
    assert list(segmentation_splits(tmp_path)) == ["train", "val"]


def test_a_part_without_masks(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", 0, 1, folders=("images/train", "masks/train"))
    write_image(tmp_path / "images/val/b.jpg")
    with pytest.raises(ValueError, match=r"not one image of val has a mask \(.*b.jpg: image without a mask"):
        segmentation_splits(tmp_path)


@pytest.mark.parametrize("deeper", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc(tmp_path: Path, deeper: str) -> None:
    folder = tmp_path / deeper
    for name in "abc":
        write_image(folder / f"JPEGImages/{name}.jpg")
        write_mask(folder / f"SegmentationClass/{name}.png", 0, 255, 20, mode="P")
    write_image(folder / "JPEGImages/for_boxes_only.jpg")
    write_image(folder / "JPEGImages/maskless.jpg")
    lists = folder / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("b\na\nmaskless\n")
    (lists / "val.txt").write_text("c\ngone\n")
    assert has_masks(tmp_path)
    splits = segmentation_splits(tmp_path)
    assert {part: data.names for part, data in splits.items()} == {
        "train": ["JPEGImages/b.jpg", "JPEGImages/a.jpg"],
        "val": ["JPEGImages/c.jpg"],
    }
    assert splits["val"].classes == VOC_CLASSES
    assert len(VOC_CLASSES) == 21
    assert rows(splits["val"]) == [[0, IGNORE, 20, 20]]
    assert problems(splits["train"], folder) == ["JPEGImages/maskless.jpg: image without a mask; left out"]
    assert problems(splits["val"], lists) == ["val.txt: listed image that is missing (gone); left out"]


def test_voc_with_a_class_list_and_without_lists(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", 0, 1, folders=("JPEGImages", "SegmentationClass"))
    write_classes(tmp_path, "ground", "tree")
    assert read(tmp_path).classes == ("ground", "tree")


@pytest.mark.parametrize(
    ("content", "row"),
    [
        (["a", "b", "c"], [0, 1, 2, IGNORE]),
        ({"0": "a", "2": "b", "255": "c"}, [0, IGNORE, 1, 2]),
        ({"2": "c", "1": "b", "0": "a"}, [0, 1, 2, IGNORE]),
    ],
)
def test_classes_in_json(tmp_path: Path, content: Any, row: list[int]) -> None:
    write_pair(tmp_path, "a", 0, 1, 2, 255)
    (tmp_path / "classes.json").write_text(json.dumps(content))
    data = read(tmp_path)
    assert data.classes == ("a", "b", "c")
    assert rows(data) == [row]


def test_ade20k_begins_at_1(tmp_path: Path) -> None:
    for part, value in (("training", 1), ("validation", 2)):
        write_image(tmp_path / "images" / part / "ADE_1.jpg")
        write_mask(tmp_path / "annotations" / part / "ADE_1.png", 0, value, 2)
    table = "Idx\tRatio\tTrain\tVal\tName\n1\t0.1576\t11664\t1172\twall\n2\t0.1072\t6046\t612\tbuilding, edifice\n"
    (tmp_path / "objectInfo150.txt").write_text(table)
    train, val = (read(tmp_path, part) for part in ("train", "val"))
    assert train.classes == val.classes == ("wall", "building")
    assert (rows(train), rows(val)) == ([[IGNORE, 0, 1, 1]], [[IGNORE, 1, 1, 1]])
    assert train.problems == val.problems == ()


def test_values_with_the_same_name_are_one_class(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", 0, 1, 2)
    write_classes(tmp_path, "ground", "car", "ground")
    data = read(tmp_path)
    assert data.classes == ("ground", "car")
    assert rows(data) == [[0, 1, 0, 0]]


def test_values_without_a_class_are_void(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", 0, 1, 11, 3)
    write_pair(tmp_path, "b", 0, 11)
    write_classes(tmp_path, "sky", "road")
    data = read(tmp_path)
    assert rows(data)[0] == [0, 1, IGNORE, IGNORE]
    assert problems(data, tmp_path) == [
        f"classes.txt: value without a class ({value}); treated as void: neither trained on nor counted; name it in "
        "classes.txt or leave it so"
        for value in (3, 11)
    ]


def test_without_a_class_list_the_values_are_the_classes(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", 0, 7)
    write_pair(tmp_path, "b", 3, 255)
    data = read(tmp_path)
    assert data.classes == ("class_0", "class_3", "class_7")
    assert rows(data) == [[0, 2, 2, 2], [1, IGNORE, IGNORE, IGNORE]]
    assert problems(data, tmp_path) == [
        f"{tmp_path}: no class names (values 0, 3, 7); classes are numbered; add a classes.txt with a name a line"
    ]


def test_masks_in_black_and_white(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", 0, 255)
    with pytest.raises(ValueError, match=r"only the values 0, 255; add classes.json to name it, such as {"):
        segmentation_splits(tmp_path)
    write_classes(tmp_path, "ground", "car")
    assert problems(read(tmp_path), tmp_path) == [
        'masks: masks of 0 and 255 only; 255 is not counted; add classes.json to name it, such as {"0": "background", '
        '"255": "object"}'
    ]
    (tmp_path / "classes.json").write_text('{"0": "ground", "255": "car"}')
    assert rows(read(tmp_path)) == [[0, 1, 1, 1]]
    assert read(tmp_path).problems == ()


def test_files_that_do_not_match(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", 0, 1)
    write_image(tmp_path / "images/alone.jpg")
    write_mask(tmp_path / "masks/gone.png", 0)
    write_image(tmp_path / "images/colored.jpg")
    write_image(tmp_path / "masks/colored.png")
    write_classes(tmp_path, "sky", "road")
    data = read(tmp_path)
    assert data.names == ["images/a.jpg", "images/colored.jpg"]
    assert problems(data, tmp_path) == [
        "images/alone.jpg: image without a mask; left out",
        "masks/gone.png: mask without an image; left out",
        "masks/colored.png: mask that cannot be used (a mask in RGB; save it as a gray or palette PNG whose values "
        "are class numbers)",
    ]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("classes.txt", "", "names are missing"),
        ("classes.txt", "sky\n\nroad\n", "names are missing"),
        ("classes.txt", "\n".join(map(str, range(256))), "256 classes; a mask can have 255"),
        ("classes.json", "3", 'cannot be read; it needs a list of names, or {"0": "name"}'),
        ("classes.json", '{"sky": 0}', "cannot be read; it needs a list"),
        ("classes.json", '{"256": "sky"}', "values outside 0..255"),
        ("classes.json", "{", "cannot be read"),
        ("objectInfo150.txt", "Idx\tName\nwall\n", "cannot be read; it needs lines of a number, a tab and a name"),
    ],
)
def test_useless_class_lists(tmp_path: Path, name: str, text: str, reason: str) -> None:
    write_pair(tmp_path, "a", 0, 1)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}.*: .*{reason}"):
        segmentation_splits(tmp_path)


def write_files(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        write_image(folder / name)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["images/a.jpg"], "no masks found; the layouts are images/ and masks/"),
        (["images/a.jpg", "masks/a.jpg"], "no masks found"),
        (["images/a.jpg", "masks/b.png"], r"not one image of all has a mask \(.*a.jpg: image without a mask"),
        (["images/a.jpg", "masks/a.png"], "masks/a.png: a mask in RGB; save it as a gray or palette PNG"),
        (["VOC2007/JPEGImages/a.jpg", "VOC2007/SegmentationClass/a.png",
          "VOC2012/JPEGImages/a.jpg", "VOC2012/SegmentationClass/a.png"], "VOC2012; give the path of one"),
    ],
)  # fmt: skip
def test_useless_folders(tmp_path: Path, files: list[str], reason: str) -> None:
    write_files(tmp_path, files)
    with pytest.raises(ValueError, match=reason) as error:
        segmentation_splits(tmp_path)
    assert "\n" not in str(error.value)


def test_other_data_have_no_masks(tmp_path: Path, shapes: Path) -> None:
    assert not has_masks(shapes)
    assert not has_masks(tmp_path / "nothing")
    write_image(tmp_path / "images/a.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.5")
    assert not has_masks(tmp_path)
    assert not has_masks(tmp_path / "labels/a.txt")


@pytest.mark.skipif(not (SHARED / "camvid").is_dir(), reason=f"no road scenes in {SHARED}")
def test_road_scenes() -> None:
    splits = find_splits(SHARED / "camvid")
    assert {part: len(data) for part, data in splits.items()} == {"train": 367, "val": 101, "test": 233}
    assert {len(data.classes) for data in splits.values()} == {11}
    assert splits["train"].classes[:3] == ("sky", "building", "pole")
    assert [problem.detail for data in splits.values() for problem in data.problems] == ["11"]
    mask = splits["val"].targets[0].read()
    assert mask.shape == (360, 480)
    assert set(np.unique(mask)) == {*range(11), IGNORE}


def test_voc_with_the_masks_of_sbd(tmp_path: Path) -> None:
    """SBD's masks go into a folder of their own, and its images into a list of their own."""
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for name in "abcd":
        Image.new("RGB", (8, 8)).save(root / f"JPEGImages/{name}.jpg")
        Image.new("L", (8, 8), 1).save(root / f"SegmentationClassAug/{name}.png")
    Image.new("L", (8, 8), 2).save(root / "SegmentationClass/a.png")
    lists = root / "ImageSets/Segmentation"
    (lists / "train.txt").write_text("a\n")
    (lists / "trainaug.txt").write_text("a\nb\nc\nd\n")
    (lists / "val.txt").write_text("d\n")
    splits = segmentation_splits(root)
    assert list(splits["train"].names) == ["JPEGImages/a.jpg", "JPEGImages/b.jpg", "JPEGImages/c.jpg"]
    assert list(splits["val"].names) == ["JPEGImages/d.jpg"]
    assert splits["train"].targets[0].read().max() == 1
