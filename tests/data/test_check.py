import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobilevit.data.check import CheckReport, SplitStatistics, check, contact_sheet
from mobilevit.data.datasets import find_splits

SHARED = Path(__file__).parents[3] / "shared" / "data"


def write_image(path: Path, color: int, size: tuple[int, int] = (200, 150), orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (color, 9, 9)).save(path, **({"exif": exif} if orientation > 1 else {}))


def write_mask(path: Path, values: list[int], size: tuple[int, int] = (200, 150)) -> None:
    """Columns of equal width, one for each value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = np.repeat(np.array(values, np.uint8), size[0] // len(values))
    Image.fromarray(np.tile(row, (size[1], 1))).save(path)


def write_yolo(folder: Path, part: str, name: str, lines: list[str], color: int) -> None:
    write_image(folder / f"images/{part}/{name}.png", color)
    (folder / f"labels/{part}").mkdir(parents=True, exist_ok=True)
    (folder / f"labels/{part}/{name}.txt").write_text("\n".join(lines))


def problems(report: CheckReport, folder: Path) -> list[str]:
    return [str(problem).replace(f"{folder}/", "") for problem in report.problems]


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    """Five images of 200 x 150 in two parts, with nothing wrong."""
    small, medium, large = "0 0.5 0.5 0.1 0.1", "1 0.5 0.5 0.2 0.2", "1 0.5 0.5 0.8 0.8"  # 20 x 15, 40 x 30, 160 x 120
    write_yolo(tmp_path, "train", "a", [small, medium, large], 1)
    write_yolo(tmp_path, "train", "b", [small, small], 2)
    write_yolo(tmp_path, "train", "c", [], 3)
    write_yolo(tmp_path, "val", "d", [small, medium], 4)
    write_yolo(tmp_path, "val", "e", [large], 5)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    return tmp_path


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """Four images of 200 x 150 in two parts, with nothing wrong."""
    for number, (name, values) in enumerate(
        {"train/a": [0, 1], "train/b": [0, 0, 0, 255], "val/c": [0, 1, 2, 2], "val/d": [2]}.items()
    ):
        write_image(tmp_path / f"images/{name}.png", number)
        write_mask(tmp_path / f"masks/{name}.png", values)
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    return tmp_path


def test_detection(boxes: Path) -> None:
    report = check(boxes)
    assert (report.path, report.task, report.classes) == (str(boxes), "detection", ("cat", "dog"))
    assert report.problems == ()
    assert report.statistics["train"] == SplitStatistics(
        images=3,
        readable=3,
        smallest=(200, 150),
        largest=(200, 150),
        images_of={"cat": 2, "dog": 1},
        objects_of={"cat": 3, "dog": 2},
        without_objects=1,
        box_sizes={"small": 3, "medium": 1, "large": 1},
    )
    assert report.statistics["val"].objects_of == {"cat": 1, "dog": 2}
    assert report.headline() == [
        f"{boxes}: detection, 2 classes, 5 images",
        "  train: 3 images, 200 x 150, 5 objects (3 small, 1 medium, 1 large), 1 images without any",
        "  val: 2 images, 200 x 150, 3 objects (1 small, 1 medium, 1 large), 0 images without any",
    ]
    assert report.table() == (
        ["class, objects (images)", "train", "val"],
        [["cat", "3 (2)", "1 (1)"], ["dog", "2 (1)", "2 (2)"]],
    )
    assert report.problem_lines() == ["no problems found"]


def test_segmentation(masks: Path) -> None:
    report = check(masks)
    assert report.task == "segmentation"
    train, val = report.statistics["train"], report.statistics["val"]
    assert train.pixels_of == pytest.approx({"sky": 5 / 7, "road": 2 / 7, "car": 0})
    assert train.images_of == {"sky": 2, "road": 1, "car": 0}
    assert train.void == pytest.approx(1 / 8)
    assert val.pixels_of == pytest.approx({"sky": 1 / 8, "road": 1 / 8, "car": 6 / 8})
    assert val.void == 0
    assert problems(report, masks) == ["images/train: class without images (car)"]
    assert report.headline()[1] == "  train: 2 images, 200 x 150, 12.50% of the pixels void"
    heading, rows = report.table()
    assert heading == ["class, pixels (images)", "train", "val"]
    assert rows[:2] == [["sky", "71.43% (2)", "12.50% (1)"], ["road", "28.57% (1)", "12.50% (1)"]]
    assert report.problem_lines() == ["1 problem", "  class without images: 1", f"    {masks}/images/train: car"]


def test_classification(shapes: Path) -> None:
    report = check(shapes)
    assert report.task == "classification"
    (statistics,) = report.statistics.values()
    assert (statistics.images, statistics.readable, statistics.largest) == (60, 60, (32, 32))
    assert statistics.images_of == dict.fromkeys(report.classes, 10)
    assert report.problems == ()
    heading, rows = report.table()
    assert (heading, rows[0]) == (["class, images", "all"], [report.classes[0], "10"])


def test_the_task_can_be_given(boxes: Path) -> None:
    assert check(boxes, "classification").task == "classification"


def test_the_report_is_json(boxes: Path) -> None:
    shutil.copy(boxes / "images/train/a.png", boxes / "images/val/d.png")
    report = json.loads(json.dumps(check(boxes).to_dict()))
    assert set(report) == {"path", "task", "classes", "splits", "problem_counts", "problems"}
    assert report["splits"]["val"]["box_sizes"] == {"small": 1, "medium": 1, "large": 1}
    assert report["problem_counts"] == {"same image in two parts": 1}
    assert report["problems"][0]["file"] == str(boxes / "images/val/d.png")


def test_images_in_two_parts_and_twice_in_one(boxes: Path) -> None:
    shutil.copy(boxes / "images/train/a.png", boxes / "images/val/d.png")
    shutil.copy(boxes / "images/train/b.png", boxes / "images/train/c.png")
    assert problems(check(boxes), boxes) == [
        "images/train/c.png: same image twice (also images/train/b.png); remove one of them",
        "images/val/d.png: same image in two parts (also in train: images/train/a.png); remove one of them, or what "
        "is measured on val will be too good",
    ]


def test_images_in_two_classes_and_odd_files(shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    shutil.copytree(shapes, folder)
    first, second = sorted(p for p in folder.iterdir() if p.is_dir())[:2]
    image = sorted(first.iterdir())[0]
    shutil.copy(image, second / f"x{image.suffix}")
    (first / "notes.doc").write_text("no image")
    (folder / "readme.txt").write_text("not in the folder of a class")
    (folder / "empty").mkdir()
    assert problems(check(folder), folder) == [
        f"{second.name}/x{image.suffix}: same image in two classes (also {first.name}/{image.name}); keep the "
        "one that is right",
        f"{first.name}/notes.doc: file of no known kind of image; passed over",
        f"{folder}: class without images (empty)",
    ]


def test_images_that_cannot_be_read(boxes: Path) -> None:
    file = boxes / "images/train/b.png"
    Image.effect_noise((200, 150), 50).save(file)
    file.write_bytes(file.read_bytes()[:3000])
    report = check(boxes)
    assert report.statistics["train"].readable == 2
    assert "  train: 3 images, 1 of them unreadable, 200 x 150" in "\n".join(report.headline())
    (line,) = problems(report, boxes)
    assert line.startswith("images/train/b.png: image that cannot be read (")
    assert line.endswith("; training leaves it out; remove or replace it")
    file.unlink()
    file.symlink_to(boxes / "nowhere.png")
    assert problems(check(boxes), boxes)[0] == "images/train/b.png: listed image that is missing; left out"


def test_coco_sizes_are_compared_with_the_images(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg", 1, orientation=6)
    write_image(tmp_path / "b.jpg", 2)
    write_image(tmp_path / "c.jpg", 3)
    sizes = {"a.jpg": (200, 150), "b.jpg": (100, 75), "c.jpg": (200, 150)}
    content = {
        "images": [{"id": i, "file_name": n, "width": w, "height": h} for i, (n, (w, h)) in enumerate(sizes.items())],
        "annotations": [{"id": 1, "image_id": 2, "category_id": 1, "bbox": [1, 1, 50, 50], "iscrowd": crowd}
                        for crowd in (0, 1)],
        "categories": [{"id": 1, "name": "cat"}],
    }  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(content))
    report = check(tmp_path)
    assert problems(report, tmp_path) == [
        "a.jpg: annotation of another size than its image (200 x 150, the image 150 x 200); boxes taken as they "
        "are, though the image seems to have been turned (EXIF) since; draw them again",
        "b.jpg: annotation of another size than its image (100 x 75, the image 200 x 150); boxes taken as they "
        "are; look at them",
    ]
    assert report.statistics["all"].crowds == 1
    assert "2 images without any, 1 crowds, not counted" in report.headline()[1]


def test_bad_masks(masks: Path) -> None:
    write_mask(masks / "masks/train/a.png", [0, 1], size=(100, 75))
    write_mask(masks / "masks/train/b.png", [0, 1], size=(150, 200))
    write_image(masks / "masks/val/c.png", 0)
    write_mask(masks / "masks/val/d.png", [2, 9, 7, 2])
    report = check(masks)
    remedy = "treated as void: neither trained on nor counted; name it in classes.txt or leave it so"
    assert sorted(problems(report, masks)) == sorted([
        "masks/train/a.png: mask of another size than its image (100 x 75, the image 200 x 150); save it in the "
        "image's size",
        "masks/train/b.png: mask of another size than its image (150 x 200, the image 200 x 150); the image has "
        "been turned (EXIF) since; turn the mask",
        "masks/val/c.png: mask that cannot be used (a mask in RGB; save it as a gray or palette PNG whose values are "
        "class numbers)",
        f"{masks}: value without a class (7); {remedy}",
        f"{masks}: value without a class (9); {remedy}",
        "images/train: class without images (car)",
        "images/val: class without images (sky)",
        "images/val: class without images (road)",
    ])  # fmt: skip
    assert report.statistics["val"].void == 0.5


def test_values_that_only_some_masks_have_are_found(tmp_path: Path) -> None:
    for number in range(50):
        write_image(tmp_path / f"images/{number:02}.png", number, size=(8, 8))
        write_mask(tmp_path / f"masks/{number:02}.png", [0, 1, 1, 5 if number == 1 else 1], size=(8, 8))
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    assert find_splits(tmp_path)["all"].problems == ()
    assert [(p.kind, p.detail) for p in check(tmp_path).problems] == [("value without a class", "5")]


def test_ten_of_a_kind_are_printed(boxes: Path) -> None:
    for number in range(13):
        write_yolo(boxes, "train", f"x{number:02}", ["7 0.5 0.5 0.1 0.1"], 100 + number)
    lines = check(boxes).problem_lines()
    assert lines[:3] == [
        "13 problems",
        "  label without a class: 13",
        f"    {boxes}/labels/train/x00.txt, line 1: 7; left out; add it to the class names or correct it",
    ]
    assert lines[-1] == "    and 3 more"


def test_many_classes_are_cut_short(tmp_path: Path) -> None:
    for number in range(43):
        write_image(tmp_path / f"class{number:02}/a.png", number, size=(8, 8))
    _, rows = check(tmp_path).table()
    assert rows[39:] == [["class39", "1"], ["and 3 more classes", ""]]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        check(tmp_path / "nothing")


def has_color(image: Image.Image, color: tuple[int, int, int]) -> bool:
    return bool((np.asarray(image) == color).all(axis=-1).any())


def test_contact_sheet_of_boxes(boxes: Path) -> None:
    from mobilevit.imaging.drawing import class_colors

    splits = find_splits(boxes)
    cat, dog = class_colors(2)
    sheet = contact_sheet(splits, columns=3, cell=100)
    assert sheet.width == 3 * 108 + 8
    assert sheet.height > 2 * 108 + 8
    assert has_color(sheet, cat)
    assert has_color(sheet, dog)
    only_cats = contact_sheet({"train": splits["train"].subset([1])}, cell=100)
    assert has_color(only_cats, cat)
    assert not has_color(only_cats, dog)


def test_contact_sheet_names_many_classes_at_the_boxes(boxes: Path) -> None:
    few = contact_sheet(find_splits(boxes))
    (boxes / "classes.txt").write_text("\n".join(["cat", "dog", *(f"class{i}" for i in range(20))]))
    many = contact_sheet(find_splits(boxes))
    assert few.height > many.height  # by the legend
    assert many.tobytes() != few.crop((0, 0, *many.size)).tobytes()


def test_contact_sheet_of_masks(masks: Path) -> None:
    sheet = contact_sheet(find_splits(masks), columns=2, cell=120)
    plain = contact_sheet(find_splits(masks, "classification"), columns=2, cell=120)
    assert sheet.width == plain.width
    assert sheet.getpixel((20, 60)) != plain.getpixel((20, 60))


def test_contact_sheet_passes_over_what_cannot_be_read(boxes: Path) -> None:
    splits = find_splits(boxes)
    whole = contact_sheet(splits, columns=1, cell=50)
    (boxes / "images/train/a.png").write_bytes(b"")
    assert contact_sheet(splits, columns=1, cell=50).height < whole.height


def test_contact_sheet_takes_images_evenly(shapes: Path) -> None:
    sheet = contact_sheet(find_splits(shapes), num_images=6, columns=6, cell=64)
    first = contact_sheet({"all": find_splits(shapes)["all"].subset([0, 12, 24, 35, 47, 59])}, columns=6, cell=64)
    assert sheet.tobytes() == first.tobytes()


@pytest.mark.skipif(not (SHARED / "camvid").is_dir(), reason=f"no road scenes in {SHARED}")
def test_road_scenes() -> None:
    report = check(SHARED / "camvid")
    assert [(problem.kind, problem.detail) for problem in report.problems] == [("value without a class", "11")]
    assert report.statistics["train"].pixels_of["road"] == pytest.approx(0.3296, abs=1e-4)
    assert sum(report.statistics["val"].pixels_of.values()) == pytest.approx(1)


@pytest.mark.skipif(not (SHARED / "bccd").is_dir(), reason=f"no blood cells in {SHARED}")
def test_blood_cells() -> None:
    report = check(SHARED / "bccd")
    assert {kind: len(found) for kind, found in report.by_kind().items()} == {"box without area": 2}
    assert report.statistics["train"].objects_of == {"Platelets": 209, "RBC": 2381, "WBC": 214}
    assert report.statistics["test"].smallest == (640, 480)
