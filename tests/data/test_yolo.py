import re
from pathlib import Path

import numpy as np
import pytest

from box_files import boxes, problems, read, write_image
from mobilevit.data.datasets import detection_splits, has_boxes


def write_yolo(image: Path, text: str | None, size: tuple[int, int] = (40, 30)) -> None:
    write_image(image, size)
    if text is not None:
        above, _, below = str(image.with_suffix(".txt")).rpartition("images")
        label = Path(f"{above}labels{below}")
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(text)


DOG = "1 0.5 0.5 0.25 0.5\n"  # 15, 7.5, 25, 22.5 of 40 x 30


def test_yolo_folders(tmp_path: Path) -> None:
    write_yolo(tmp_path / "images/a.jpg", DOG + "0 0.25 0.25 0.5 0.5\n\n")
    write_yolo(tmp_path / "images/b.png", "")
    write_yolo(tmp_path / "images/c.jpg", "0 0.1 0.1 0.5 0.1 0.5 0.9 0.1 0.9\n")
    (tmp_path / "labels/classes.txt").write_text("cat\ndog\n")
    assert has_boxes(tmp_path)
    data = read(tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.names == ["images/a.jpg", "images/b.png", "images/c.jpg"]
    assert boxes(data)["a.jpg"] == [("dog", 15, 7.5, 25, 22.5), ("cat", 0, 0, 20, 15)]
    assert boxes(data)["b.png"] == []
    np.testing.assert_allclose(data.targets[2].xyxy, [[4, 3, 20, 27]], rtol=1e-6)
    assert data.problems == ()


def test_yolo_sizes_are_those_of_the_upright_image(tmp_path: Path) -> None:
    write_yolo(tmp_path / "images/a.jpg", DOG)
    write_image(tmp_path / "images/a.jpg", (40, 30), orientation=6)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert boxes(read(tmp_path)) == {"a.jpg": [("dog", 11.25, 10, 18.75, 30)]}


@pytest.mark.parametrize("order", ["images/{}", "{}/images"])
def test_yolo_parts(tmp_path: Path, order: str) -> None:
    for part in ("train", "val", "test"):
        write_yolo(tmp_path / order.format(part) / f"{part}.jpg", DOG)
    (tmp_path / "obj.names").write_text("cat\ndog\n")
    splits = detection_splits(tmp_path)
    assert {part: [Path(n).name for n in data.names] for part, data in splits.items()} == {
        part: [f"{part}.jpg"] for part in ("train", "val", "test")
    }
    assert all(data.class_counts() == [0, 1] for data in splits.values())


def test_yolo_text_beside_the_images(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text(DOG)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert has_boxes(tmp_path)
    assert boxes(read(tmp_path)) == {"a.jpg": [("dog", 15, 7.5, 25, 22.5)]}


@pytest.mark.parametrize(
    "text",
    [
        "path: .\ntrain: images/train\nval: images/val\ntest: images/test\nnames: [cat, dog]\nnc: 2\n",
        "train: ../images/train\nval: ../images/val\nnames:\n  0: cat\n  1: dog\n",
        "path: ../elsewhere\ntrain: [images/train]\nval: val.txt\nnames:\n  1: dog\n  0: cat\n",
    ],
)
def test_yolo_yaml(tmp_path: Path, text: str) -> None:
    write_yolo(tmp_path / "images/train/a.jpg", DOG)
    write_yolo(tmp_path / "images/val/b.jpg", DOG)
    (tmp_path / "val.txt").write_text("./images/val/b.jpg\n")
    (tmp_path / "data.yaml").write_text(text)
    assert has_boxes(tmp_path)
    assert has_boxes(tmp_path / "data.yaml")
    for path in (tmp_path, tmp_path / "data.yaml"):
        splits = detection_splits(path)
        assert {part: data.names for part, data in splits.items()} == {
            "train": ["images/train/a.jpg"],
            "val": ["images/val/b.jpg"],
        }
        assert splits["val"].classes == ("cat", "dog")
        assert boxes(splits["val"]) == {"b.jpg": [("dog", 15, 7.5, 25, 22.5)]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("names: [", "data.yaml: not YAML"),
        ("!!python/object/apply:os.system [exit]", "data.yaml: not YAML"),
        ("- 3", "data.yaml: no class names; list them under names"),
        ("names: {cat: 0}\ntrain: images", "data.yaml: no class names"),
        ("names: [cat]\ntrain: nowhere", "data.yaml: train: nowhere has no images; correct the path"),
        ("names: [cat]\n", "data.yaml: names no images; give folders or lists under train and val"),
    ],
)
def test_useless_yaml(tmp_path: Path, text: str, reason: str) -> None:
    write_yolo(tmp_path / "images/a.jpg", DOG)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        detection_splits(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("2 0.5 0.5 0.1 0.1", "line 2: label without a class (2); left out; add it to the class names or correct it"),
        (
            "1 0.5 0.5 0.1",
            "line 2: malformed line (1 0.5 0.5 0.1); left out; a line is: class, center x, center y, wid",
        ),
        ("dog 0.5 0.5 0.1 0.1", "line 2: malformed line (dog 0.5 0.5 0.1 0.1); left out"),
        ("1.5 0.5 0.5 0.1 0.1", "line 2: malformed line (1.5 0.5 0.5 0.1 0.1); left out"),
        ("1 nan 0.5 0.1 0.1", "line 2: coordinates that are no numbers (nan 13.5 nan 16.5 in 40 x 30); left out"),
        (
            "1 20 15 10 10",
            "line 2: coordinates not in 0..1 (1 20 15 10 10); left out; divide by the image's width an",
        ),
        ("1 0.5 0.5 0 0.1", "line 2: box without area (20 13.5 20 16.5 in 40 x 30); left out"),
        ("1 1.5 0.5 0.5 0.1", "line 2: box outside the image (50 13.5 70 16.5 in 40 x 30); left out"),
        ("1 1 0.5 0.5 0.1", "line 2: box partly outside the image (30 13.5 50 16.5 in 40 x 30); clipped"),
        ("1 0.5 0.5 -0.5 0.1", "line 2: corners in the wrong order (30 13.5 10 16.5 in 40 x 30); put in order"),
    ],
)
def test_yolo_bad_lines(tmp_path: Path, text: str, line: str) -> None:
    write_yolo(tmp_path / "images/a.jpg", DOG + text)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    data = read(tmp_path)
    (found,) = problems(data, tmp_path)
    assert found.startswith(f"labels/a.txt, {line}")
    assert data.class_counts() == [0, 1 + ("clipped" in found or "in order" in found)]


def test_yolo_files_that_do_not_match(tmp_path: Path) -> None:
    write_yolo(tmp_path / "images/a.jpg", DOG)
    write_yolo(tmp_path / "images/b.jpg", None)
    (tmp_path / "images/c.jpg").write_bytes(b"")
    (tmp_path / "labels/gone.txt").write_text(DOG)
    data = read(tmp_path)
    assert data.classes == ("class_1",)
    assert boxes(data) == {"a.jpg": [("class_1", 15, 7.5, 25, 22.5)], "b.jpg": []}
    lines = problems(data, tmp_path)
    assert lines[0] == "images/b.jpg: image without an annotation file; taken as one without objects"
    assert lines[1].startswith("images/c.jpg: image that cannot be read")
    assert lines[2] == "labels/gone.txt: annotation for a missing image; left out"
    assert lines[3].endswith("no class names (1 classes); numbered; add a classes.txt with a name a line")


def test_yolo_missing_images_of_a_list(tmp_path: Path) -> None:
    write_yolo(tmp_path / "images/a.jpg", DOG)
    (tmp_path / "train.txt").write_text("images/a.jpg\nimages/gone.jpg\n")
    (tmp_path / "x.yaml").write_text("names: [cat, dog]\ntrain: train.txt\n")
    data = read(tmp_path)
    assert data.names == ["images/a.jpg"]
    assert problems(data, tmp_path) == ["images/gone.jpg: listed image that is missing; left out"]
