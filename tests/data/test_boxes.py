from pathlib import Path

import pytest

from box_files import problems, write_image
from mobilevit.data.boxes import image_size
from mobilevit.data.datasets import detection_splits, find_splits, has_boxes
from mobilevit.imaging.decode import read_image

SHARED = Path(__file__).parents[3] / "shared" / "data"


def test_the_size_is_that_of_the_upright_image(tmp_path: Path) -> None:
    for suffix in ("jpg", "png", "webp", "tif"):
        path = write_image(tmp_path / f"turned.{suffix}", (40, 30), orientation=6)
        assert image_size(path) == read_image(path).size == (30, 40)


def test_other_data_have_no_boxes(tmp_path: Path, shapes: Path) -> None:
    assert not has_boxes(shapes)
    assert not has_boxes(tmp_path / "nothing")
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    write_image(tmp_path / "images/a.jpg")
    write_image(tmp_path / "labels/a.png")
    (tmp_path / "classes.txt").write_text("a\n")
    (tmp_path / "config.yaml").write_text("epochs: 3\n")
    (tmp_path / "notes.json").write_text('{"images": 3}')
    assert not has_boxes(tmp_path)
    assert not has_boxes(tmp_path / "notes.json")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"notes.txt: not a file with boxes; give a folder, a COCO .json or a YOLO"):
        detection_splits(tmp_path / "notes.txt")


@pytest.mark.skipif(not (SHARED / "bccd").is_dir(), reason=f"no blood cells in {SHARED}")
def test_blood_cells() -> None:
    splits = find_splits(SHARED / "bccd")
    assert {part: len(data) for part, data in splits.items()} == {"train": 205, "val": 87, "test": 72}
    assert {data.classes for data in splits.values()} == {("Platelets", "RBC", "WBC")}
    assert sum(sum(data.class_counts()) for data in splits.values()) == 4888 - 2
    assert [problems(data, SHARED / "bccd/Annotations") for data in splits.values()] == [
        ["BloodImage_00343.xml, object 4: box without area (181 329 181 329 in 640 x 480); left out"],
        ["BloodImage_00338.xml, object 13: box without area (504 337 504 337 in 640 x 480); left out"],
        [],
    ]
