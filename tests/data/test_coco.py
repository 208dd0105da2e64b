import json
import re
from pathlib import Path
from typing import Any

import pytest

from box_files import boxes, problems, read, write_image
from mobilevit.data.datasets import detection_splits, has_boxes
from mobilevit.imaging.decode import read_image


def coco(**changes: Any) -> dict[str, Any]:
    """Two images, three annotations, categories 3 and 7."""
    content: dict[str, Any] = {
        "images": [
            {"id": 10, "file_name": "a.jpg", "width": 40, "height": 30},
            {"id": 11, "file_name": "b.jpg", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 1, "image_id": 11, "category_id": 7, "bbox": [1, 2, 10, 20], "area": 50.5, "iscrowd": 0},
            {"id": 2, "image_id": 10, "category_id": 3, "bbox": [0, 0, 4, 5]},
            {"id": 3, "image_id": 11, "category_id": 3, "bbox": [5, 5, 2, 2], "area": 4, "iscrowd": 1},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    return content | changes


def write_coco(file: Path, content: dict[str, Any], images: str | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    for entry in content["images"] if images is not None else []:
        write_image(file.parent / str(images) / Path(entry["file_name"]).name)
    return file


WANTED = {"a.jpg": [("cat", 0, 0, 4, 5)], "b.jpg": [("dog", 1, 2, 11, 22), ("cat", 5, 5, 7, 7)]}


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_train2017.json", "../train2017"),
        ("annotations/instances_train2017.json", "../images/train2017"),
        ("annotations/instances_default.json", "../images"),
        ("annotations/train.json", "../train"),
        ("labels.json", "data/../images"),
        ("_annotations.coco.json", "."),
        ("train/_annotations.coco.json", "."),
    ],
)
def test_coco_layouts(tmp_path: Path, file: str, images: str) -> None:
    write_coco(tmp_path / file, coco(), images)
    assert has_boxes(tmp_path)
    for path in (tmp_path, tmp_path / file):
        data = read(path)
        assert data.classes == ("cat", "dog")
        assert boxes(data) == WANTED
        assert data.problems == ()
    assert data.targets[1].crowd.tolist() == [False, True]
    assert data.targets[0].areas.tolist() == [20]
    assert data.targets[1].areas.tolist() == [50.5, 4]
    assert data.sizes == [(40, 30), (40, 30)]
    assert read_image(data.open(0)).size == (40, 30)


def test_coco_parts_have_the_classes_of_train(tmp_path: Path) -> None:
    other = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cow"}]
    found = [
        {"id": 8, "image_id": 10, "category_id": 1, "bbox": [1, 1, 2, 2]},
        {"id": 9, "image_id": 10, "category_id": 2, "bbox": [1, 1, 2, 2]},
    ]
    write_coco(tmp_path / "annotations/instances_train2017.json", coco(), "../train2017")
    write_coco(tmp_path / "annotations/instances_val2017.json", coco(categories=other, annotations=found), "../val2017")
    (tmp_path / "annotations/captions_train2017.json").write_text(json.dumps({"images": [], "annotations": []}))
    splits = detection_splits(tmp_path)
    assert list(splits) == ["train", "val"]
    assert splits["val"].classes == ("cat", "dog")
    assert boxes(splits["val"]) == {"a.jpg": [("dog", 1, 1, 3, 3)], "b.jpg": []}
    assert problems(splits["val"], tmp_path / "annotations") == [
        "instances_val2017.json, annotation 9: label without a class (2); left out; add it to the categories of "
        "instances_train2017.json or correct it"
    ]


def test_coco_of_roboflow(tmp_path: Path) -> None:
    categories = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        {"id": 3, "name": "cat", "supercategory": "pets"},
        {"id": 7, "name": "dog", "supercategory": "pets"},
    ]
    for part in ("train", "valid", "test"):
        write_coco(tmp_path / part / "_annotations.coco.json", coco(categories=categories), ".")
    splits = detection_splits(tmp_path)
    assert list(splits) == ["train", "val", "test"]
    assert splits["train"].classes == ("cat", "dog")
    assert boxes(splits["test"]) == WANTED
    assert problems(splits["train"], tmp_path / "train") == [
        "_annotations.coco.json: category that stands for all others (pets); not taken as a class"
    ]


def test_coco_category_0_that_is_used_is_a_class(tmp_path: Path) -> None:
    categories = [{"id": 0, "name": "cow", "supercategory": "none"}, {"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    entry = {"id": 1, "image_id": 10, "category_id": 0, "bbox": [1, 1, 2, 2]}
    write_coco(tmp_path / "x.json", coco(categories=categories, annotations=[entry]), ".")
    assert read(tmp_path).classes == ("cow", "cat", "dog")


def test_coco_paths_of_another_machine(tmp_path: Path) -> None:
    content = coco()
    content["images"][0]["file_name"] = "C:\\data\\a.jpg"
    content["images"][1]["file_name"] = "/home/me/data/b.jpg"
    write_coco(tmp_path / "x.json", content)
    for name in ("a.jpg", "b.jpg"):
        write_image(tmp_path / "images" / name)
    assert boxes(read(tmp_path)) == WANTED


def annotation(**changes: Any) -> dict[str, Any]:
    return {"id": 5, "image_id": 10, "category_id": 3, "bbox": [1, 1, 2, 2]} | changes


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (annotation(bbox=[1, 1, 0, 2]), "annotation 5: box without area (1 1 1 3 in 40 x 30); left out"),
        (annotation(bbox=[40, 1, 5, 2]), "annotation 5: box outside the image (40 1 45 3 in 40 x 30); left out"),
        (
            annotation(bbox=[30, 1, 15, 2]),
            "annotation 5: box partly outside the image (30 1 45 3 in 40 x 30); clippe",
        ),
        (
            annotation(bbox=[9, 9, -2, -3]),
            "annotation 5: corners in the wrong order (9 9 7 6 in 40 x 30); put in order",
        ),
        (
            annotation(category_id=4),
            "annotation 5: label without a class (4); left out; add it to the categories or co",
        ),
        (annotation(image_id=99), "annotation 5: annotation for an image that is not listed (image 99); left out"),
        (annotation(bbox=[1, 2]), "annotation 5: malformed annotation (image_id 10, category_id 3, bbox [1, 2]); left"),
        (
            annotation(bbox=None),
            "annotation 5: malformed annotation (image_id 10, category_id 3, bbox None); left out;",
        ),
        (annotation(category_id=[3]), "annotation 5: malformed annotation (image_id 10, category_id [3], bbox [1, 1"),
        (annotation(bbox=[1, 1, float("nan"), 3]), "annotation 5: coordinates that are no numbers (1 1 nan 4 in 40"),
    ],
)
def test_coco_bad_annotations(tmp_path: Path, entry: dict[str, Any], line: str) -> None:
    content = coco()
    content["annotations"].append(entry)
    write_coco(tmp_path / "x.json", content, ".")
    data = read(tmp_path)
    assert boxes(data)["b.jpg"] == WANTED["b.jpg"]
    (found,) = problems(data, tmp_path)
    assert found.startswith(f"x.json, {line}")
    assert sum(data.class_counts()) == 2 + ("clipped" in found or "in order" in found)


def test_coco_bad_images(tmp_path: Path) -> None:
    content = coco()
    content["images"] += [
        {"id": 12, "file_name": "gone.jpg", "width": 40, "height": 30},
        {"id": 13, "file_name": "a.jpg", "width": 40, "height": 30},
        {"id": 14},
        {"id": 15, "file_name": "sizeless.jpg"},
        {"id": 16, "file_name": "text.jpg"},
    ]
    content["annotations"] += [annotation(id=6, image_id=12), annotation(id=7, image_id=13)]
    write_coco(tmp_path / "x.json", content)
    for name in ("a.jpg", "b.jpg", "sizeless.jpg"):
        write_image(tmp_path / name)
    (tmp_path / "text.jpg").write_text("no image")
    data = read(tmp_path)
    assert boxes(data) == WANTED | {"a.jpg": [("cat", 0, 0, 4, 5), ("cat", 1, 1, 3, 3)], "sizeless.jpg": []}
    lines = problems(data, tmp_path)
    assert lines[:3] == [
        "x.json: images without id or file_name (1 of 7); left out",
        "x.json, image 12: annotation for a missing image (gone.jpg); left out",
        "x.json, image 13: image listed twice (a.jpg); its boxes are put together",
    ]
    assert lines[3].startswith("text.jpg: image that cannot be read")
    assert data.sizes == [(40, 30)] * 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "x.json: not JSON"),
        ("[]", "x.json: not COCO's format; it needs the lists images, annotations and categories"),
        (json.dumps(coco(images=3)), "x.json: not COCO's format"),
        (json.dumps(coco(images=[1])), "x.json: not COCO's format"),
        (json.dumps(coco(categories=[])), "x.json: no categories; list the classes there"),
        (json.dumps(coco(categories=[{"id": 1}])), "x.json: a category without id or name; each needs both"),
        (json.dumps(coco(images=[])), "x.json: lists no images"),
        (json.dumps(coco(annotations=[])), "x.json: 2 images, but not one usable box"),
        (
            json.dumps(coco()).replace(".jpg", ".png"),
            "x.json: none of its images found, such as a.png; put them into",
        ),
    ],
)
def test_useless_coco(tmp_path: Path, text: str, reason: str) -> None:
    write_coco(tmp_path / "x.json", coco(), ".")
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        detection_splits(tmp_path / "x.json")
    assert "\n" not in str(error.value)


def test_coco_files_of_the_same_part(tmp_path: Path) -> None:
    for name in ("instances_train2014", "instances_train2017"):
        write_coco(tmp_path / f"annotations/{name}.json", coco(), "../train2017")
    with pytest.raises(ValueError, match=r"instances_train2014.json, .* are of the same part; give the path of one"):
        detection_splits(tmp_path)
