import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from box_files import boxes, problems, read, write_image
from mobilevit.data.datasets import detection_splits, has_boxes
from mobilevit.imaging.decode import read_image


def voc_object(name: str, box: tuple[Any, ...], difficult: int = 0) -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=False))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


def write_xml(path: Path, *objects: str, size: tuple[int, int] = (40, 30), filename: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    stated = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    name = f"<filename>{filename or path.stem + '.jpg'}</filename>"
    path.write_text(f"<annotation>{name}{stated}{''.join(objects)}</annotation>")
    return path


def write_voc(folder: Path, **objects: list[str]) -> Path:
    """An image of 40 x 30 and an annotation for each name."""
    for name, found in objects.items():
        write_image(folder / f"JPEGImages/{name}.jpg")
        write_xml(folder / f"Annotations/{name}.xml", *found)
    return folder


GOOD = voc_object("dog", (1, 2, 11, 22))


def test_voc(tmp_path: Path) -> None:
    crowd = voc_object("cat", (5, 5, 9, 9), difficult=1)
    write_voc(tmp_path, a=[GOOD, voc_object("cat", (0, 0, 40, 30)), crowd], b=[])
    assert has_boxes(tmp_path)
    data = read(tmp_path)
    assert data.task.name == "detection"
    assert data.classes == ("cat", "dog")
    assert data.names == ["JPEGImages/a.jpg", "JPEGImages/b.jpg"]
    assert boxes(data) == {"a.jpg": [("dog", 1, 2, 11, 22), ("cat", 0, 0, 40, 30), ("cat", 5, 5, 9, 9)], "b.jpg": []}
    assert data.targets[0].crowd.tolist() == [False, False, True]
    assert data.targets[0].areas.tolist() == [200, 1200, 16]
    assert [data.targets[1].xyxy.shape, data.targets[1].labels.dtype] == [(0, 4), np.int64]
    assert data.problems == ()
    assert data.class_counts() == [1, 1]
    assert read_image(pickle.loads(pickle.dumps(data.open))(1)).size == (40, 30)
    assert data.subset([1]).sizes == [(40, 30)]


def test_voc_lists_divide_and_all_parts_share_the_classes(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOCdevkit/VOC2012", a=[GOOD], b=[voc_object("cat", (1, 1, 9, 9))], c=[GOOD], d=[GOOD])
    lists = tmp_path / "VOCdevkit/VOC2012/ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("b\na\n")
    (lists / "val.txt").write_text("c  1\nmissing\n")
    splits = detection_splits(tmp_path)
    assert {part: [Path(n).stem for n in data.names] for part, data in splits.items()} == {
        "train": ["b", "a"],
        "val": ["c"],
    }
    assert {data.classes for data in splits.values()} == {("cat", "dog")}
    assert problems(splits["train"], lists.parents[1]) == []
    assert problems(splits["val"], lists) == ["val.txt: listed image that is missing (missing); left out"]
    assert [p.detail for p in splits["val"].problems if p.kind == "class without objects"] == ["cat"]
    assert splits["val"].origin == str(lists / "val.txt")


def test_voc_trainval_is_for_training_where_train_is_missing(tmp_path: Path) -> None:
    write_voc(tmp_path, a=[GOOD], b=[GOOD])
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/trainval.txt").write_text("a")
    (tmp_path / "ImageSets/Main/test.txt").write_text("b")
    assert {part: data.names for part, data in detection_splits(tmp_path).items()} == {
        "train": ["JPEGImages/a.jpg"],
        "test": ["JPEGImages/b.jpg"],
    }


def test_voc_beside_the_images_and_in_parts(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        write_image(tmp_path / part / "x.png")
        write_xml(tmp_path / part / "x.xml", GOOD)
    assert has_boxes(tmp_path)
    splits = detection_splits(tmp_path)
    assert {part: data.names for part, data in splits.items()} == {"train": ["train/x.png"], "val": ["valid/x.png"]}
    assert boxes(read(tmp_path / "train")) == {"x.png": [("dog", 1, 2, 11, 22)]}


def test_voc_other_folder_names_and_a_class_list(tmp_path: Path) -> None:
    write_image(tmp_path / "images/x.jpg")
    write_xml(tmp_path / "annotations/xmls/x.xml", GOOD, voc_object("cow", (1, 1, 5, 5)))
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    data = read(tmp_path)
    assert data.classes == ("dog", "cat")
    assert boxes(data) == {"x.jpg": [("dog", 1, 2, 11, 22)]}
    assert [str(p).replace(f"{tmp_path}/", "") for p in data.problems] == [
        "annotations/xmls/x.xml, object 2: label without a class (cow); left out; add it to classes.txt or correct it",
        f"{tmp_path}: class without objects (cat); it cannot be learned or measured here",
    ]


def test_voc_finds_a_renamed_image_by_its_filename(tmp_path: Path) -> None:
    write_image(tmp_path / "JPEGImages/old.jpg")
    write_xml(tmp_path / "Annotations/new.xml", GOOD, filename="old.jpg")
    assert read(tmp_path).names == ["JPEGImages/old.jpg"]
    assert read(tmp_path).problems == ()


@pytest.mark.parametrize(
    ("box", "kept", "line"),
    [
        ((10, 10, 10, 20), None, "object 2: box without area (10 10 10 20 in 40 x 30); left out"),
        ((50, 1, 60, 9), None, "object 2: box outside the image (50 1 60 9 in 40 x 30); left out"),
        ((-9, 1, 0, 9), None, "object 2: box outside the image (-9 1 0 9 in 40 x 30); left out"),
        ((30, -4, 50, 9), (30, 0, 40, 9), "object 2: box partly outside the image (30 -4 50 9 in 40 x 30); clipped"),
        ((9, 8, 3, 2), (3, 2, 9, 8), "object 2: corners in the wrong order (9 8 3 2 in 40 x 30); put in order"),
        (("nan", 1, 2, 3), None, "object 2: coordinates that are no numbers (nan 1 2 3 in 40 x 30); left out"),
        (("x", 1, 2, 3), None, "object 2: malformed box; left out; it needs xmin, ymin, xmax, ymax"),
        ((1, 2, 3), None, "object 2: malformed box; left out; it needs xmin, ymin, xmax, ymax"),
        ((30, 2, 40.9, 9), (30, 2, 40, 9), None),  # rounding
    ],
)
def test_voc_bad_boxes(tmp_path: Path, box: tuple[Any, ...], kept: tuple[int, ...] | None, line: str | None) -> None:
    write_voc(tmp_path, a=[GOOD, voc_object("dog", box)])
    data = read(tmp_path)
    assert boxes(data)["a.jpg"][1:] == ([] if kept is None else [("dog", *kept)])
    assert problems(data, tmp_path) == ([] if line is None else [f"Annotations/a.xml, {line}"])


def test_voc_areas_are_those_of_the_clipped_boxes(tmp_path: Path) -> None:
    write_voc(tmp_path, a=[voc_object("dog", (30, 20, 60, 40))])
    assert read(tmp_path).targets[0].areas.tolist() == [100]


def test_voc_files_that_do_not_match(tmp_path: Path) -> None:
    write_voc(tmp_path, a=[GOOD, voc_object(" ", (1, 1, 2, 2))])
    write_xml(tmp_path / "Annotations/gone.xml", GOOD)
    (tmp_path / "Annotations/torn.xml").write_text("<annotation><object>")
    write_image(tmp_path / "JPEGImages/torn.jpg")
    write_image(tmp_path / "JPEGImages/alone.jpg")
    (tmp_path / "JPEGImages/text.jpg").write_text("no image")
    write_xml(tmp_path / "Annotations/text.xml", GOOD)
    write_image(tmp_path / "JPEGImages/other.jpg", (30, 40))
    write_xml(tmp_path / "Annotations/other.xml", GOOD)
    data = read(tmp_path)
    assert boxes(data) == {"a.jpg": [("dog", 1, 2, 11, 22)], "other.jpg": [("dog", 1, 2, 11, 22)], "alone.jpg": []}
    lines = problems(data, tmp_path)
    assert lines[:3] == [
        "Annotations/a.xml, object 2: object without a name; left out; name it",
        "Annotations/gone.xml: annotation for a missing image (gone.jpg); left out",
        "Annotations/other.xml: annotation of another size than its image (40 x 30, the image 30 x 40); boxes "
        "taken as they are, though the image seems to have been turned (EXIF) since; draw them again",
    ]
    assert lines[3].startswith("JPEGImages/text.jpg: image that cannot be read (cannot identify image file")
    assert lines[4].startswith("Annotations/torn.xml: malformed annotation (no element found")
    assert lines[5:] == ["JPEGImages/alone.jpg: image without an annotation file; taken as one without objects"]


@pytest.mark.parametrize(
    "text",
    [
        '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation><object>&b;</object></annotation>',
        '<!DOCTYPE annotation SYSTEM "http://localhost/x.dtd"><annotation/>',
    ],
)
def test_voc_refuses_entities(tmp_path: Path, text: str) -> None:
    write_voc(tmp_path, a=[GOOD], b=[])
    (tmp_path / "Annotations/b.xml").write_text(text)
    assert problems(read(tmp_path), tmp_path) == [
        "Annotations/b.xml: malformed annotation (declares a DOCTYPE or entities, which is not safe to read); its "
        "image is left out; write the file again"
    ]
    (tmp_path / "Annotations/b.xml").write_bytes(text.encode("utf-16"))
    assert "malformed annotation (not in UTF-8)" in problems(read(tmp_path), tmp_path)[0]


def test_useless_voc(tmp_path: Path) -> None:
    write_voc(tmp_path / "none", a=[], b=[])
    with pytest.raises(ValueError, match=r"none: 2 images, but not one usable box$"):
        detection_splits(tmp_path / "none")
    write_voc(tmp_path / "flat", a=[voc_object("dog", (1, 1, 1, 1))])
    with pytest.raises(ValueError, match=r"1 images, but not one usable box; first trouble: .*a.xml, object 1: box wi"):
        detection_splits(tmp_path / "flat")
    write_xml(tmp_path / "lost/Annotations/a.xml", GOOD)
    with pytest.raises(ValueError, match=r"lost: no image of it can be used .*missing image"):
        detection_splits(tmp_path / "lost")
    write_voc(tmp_path / "list", a=[GOOD])
    (tmp_path / "list/ImageSets/Main").mkdir(parents=True)
    (tmp_path / "list/ImageSets/Main/train.txt").write_text("b\nc")
    with pytest.raises(ValueError, match=r"train.txt: no image of it can be used .*listed image that is missing"):
        detection_splits(tmp_path / "list")
    for year in ("VOC2007", "VOC2012"):
        write_voc(tmp_path / "years" / year, a=[GOOD])
    with pytest.raises(ValueError, match=r"VOC2007, .*VOC2012; give the path of one of them"):
        detection_splits(tmp_path / "years")
    with pytest.raises(ValueError, match="no boxes found; the layouts are Pascal VOC"):
        detection_splits(tmp_path)


def test_voc_names_with_spaces_are_whole_names(tmp_path: Path) -> None:
    write_voc(tmp_path, dog=[GOOD])
    write_xml(tmp_path / "Annotations/dog 1.xml", voc_object("cat", (1, 1, 9, 9)))  # not of dog.jpg
    data = read(tmp_path)
    assert boxes(data) == {"dog.jpg": [("dog", 1, 2, 11, 22)]}
    assert problems(data, tmp_path) == ["Annotations/dog 1.xml: annotation for a missing image (dog 1.jpg); left out"]
