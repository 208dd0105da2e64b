import hashlib
import os
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_images import numbers, write_folder, write_image
from PIL import Image

from box_files import boxes_of
from mobilevit.class_names import IGNORE
from mobilevit.data.datasets import find_splits
from mobilevit.data.imageset import ImageSet, split
from mobilevit.imaging.decode import find_images
from mobilevit.tasks.classification import CLASSIFICATION
from mobilevit.tasks.detection import DETECTION
from mobilevit.tasks.segmentation import SEGMENTATION
from mobilevit.tasks.targets import Boxes, Mask


def toy(labels: list[int], classes: tuple[str, ...], prefix: str = "") -> ImageSet[int]:
    names = [f"{prefix}{classes[label]}/{number:03d}" for number, label in enumerate(labels)]
    return ImageSet(
        task=CLASSIFICATION, origin="toy", names=names, targets=labels, classes=classes, open=names.__getitem__
    )


def test_find_images_is_sorted_and_follows_links(tmp_path: Path) -> None:
    write_image(tmp_path / "elsewhere/b.jpg", 0)
    for name in ["in/2.webp", "in/10.bmp", "in/a.gif"]:
        write_image(tmp_path / name, 0)
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    found = [path.relative_to(tmp_path / "in").as_posix() for path in find_images(tmp_path / "in")]
    assert found == ["10.bmp", "2.webp", "a.gif", "link/b.jpg"]


# -- split ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "held_out"),  # of classes of 2, 3, 10 and 101 images
    [(0.2, [1, 1, 2, 20]), (0.5, [1, 2, 5, 50]), (0.01, [1, 1, 1, 1]), (0.99, [1, 2, 9, 100])],
)
def test_split_counts(fraction: float, held_out: list[int]) -> None:
    counts = [2, 3, 10, 101]
    data = toy([label for label, count in enumerate(counts) for _ in range(count)], ("a", "b", "c", "d"))
    train, val = split(data, val_fraction=fraction, seed=0)
    assert Counter(val.targets) == dict(enumerate(held_out))
    assert Counter(train.targets) == {label: counts[label] - out for label, out in enumerate(held_out)}


def test_split_is_the_same_for_the_same_names_and_seed() -> None:
    data = toy([0] * 40 + [1] * 40, ("cat", "dog"))
    order = list(range(0, 80, 3)) + list(range(1, 80, 3)) + list(range(2, 80, 3))
    first, again, shuffled = (split(d, val_fraction=0.25, seed=3)[1] for d in (data, data, data.subset(order)))
    assert first.names == again.names
    assert sorted(shuffled.names) == sorted(first.names)
    others = {tuple(split(data, val_fraction=0.25, seed=seed)[1].names) for seed in range(20)}
    assert len(others) == 20


def test_adding_a_class_leaves_the_other_classes_division() -> None:
    before = toy([0] * 30 + [1] * 30, ("cat", "dog"))
    more = toy([1] * 30 + [2] * 30 + [0] * 9, ("ant", "cat", "dog"))
    val_before = split(before, val_fraction=0.2, seed=1)[1]
    val_more = split(more, val_fraction=0.2, seed=1)[1]
    assert [name for name in val_more.names if not name.startswith("ant")] == val_before.names
    assert sum(name.startswith("ant") for name in val_more.names) == 2


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=6),
    fraction=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**31),
)
def test_split_puts_every_image_into_exactly_one_part(counts: list[int], fraction: float, seed: int) -> None:
    classes = tuple("abcdef"[: len(counts)])
    data = toy([label for label, count in enumerate(counts) for _ in range(count)], classes)
    train, val = split(data, val_fraction=fraction, seed=seed)
    assert sorted([*train.names, *val.names]) == sorted(data.names)
    for part in (train, val):
        assert set(part.targets) == set(data.targets)  # every class in both
        assert part.classes == classes
        assert all(classes[label] == name[0] for name, label in zip(part.names, part.targets, strict=True))
    for label, count in enumerate(counts):
        assert abs(val.targets.count(label) - count * fraction) <= 1


# -- ImageSet ---------------------------------------------------------------------------------------------------------


def test_subset_and_its_subset(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 4, "dog": 4})
    data = find_splits(tmp_path)["all"]
    part = data.subset([6, 0, 3])
    assert (part.names, part.targets, numbers(part)) == (["dog/2.png", "cat/0.png", "cat/3.png"], [1, 0, 0], [22, 0, 3])
    again = part.subset([2, 0])
    assert (again.names, again.targets, numbers(again)) == (["cat/3.png", "dog/2.png"], [0, 1], [3, 22])
    assert again.classes == ("cat", "dog")
    assert len(data.subset([])) == 0


def test_fingerprint(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", {"cat": 2, "dog": 1})
    shutil.copytree(tmp_path / "a", tmp_path / "somewhere" / "else")
    data = find_splits(tmp_path / "a")["all"]
    told = b"cat\tcat/0.png\ncat\tcat/1.png\ndog\tdog/0.png"  # written down in checkpoints: it must not change
    assert data.fingerprint() == hashlib.sha256(told).hexdigest()[:16]
    assert find_splits(tmp_path / "somewhere" / "else")["all"].fingerprint() == data.fingerprint()
    assert data.subset([2, 0, 1]).fingerprint() == data.fingerprint()
    assert data.relabel(("dog", "bird", "cat")).fingerprint() == data.fingerprint()
    assert data.subset([0, 2]).fingerprint() != data.fingerprint()
    (tmp_path / "a/cat/1.png").rename(tmp_path / "a/dog/1.png")
    assert find_splits(tmp_path / "a")["all"].fingerprint() != data.fingerprint()


@pytest.mark.skipif(os.name == "nt", reason="names there are UTF-16")
def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "cat"
    folder.mkdir()
    try:
        write_image(folder / os.fsdecode(b"caf\xe9.png"), 5)
    except OSError:
        pytest.skip("this file system wants UTF-8")
    data = find_splits(tmp_path)["all"]
    assert numbers(data) == [5]
    assert data.fingerprint() == hashlib.sha256(b"cat\tcat/caf\xe9.png").hexdigest()[:16]


def test_relabel() -> None:
    data = toy([0, 1, 1, 2], ("cat", "dog", "owl"))
    relabeled = data.relabel(("owl", "dog", "bird", "cat"))
    assert (relabeled.targets, relabeled.classes) == ([3, 1, 1, 0], ("owl", "dog", "bird", "cat"))
    assert relabeled.names == data.names
    assert data.relabel(("cat", "dog", "owl")) is data
    classes = tuple("abcdefgh")
    with pytest.raises(ValueError, match=r"toy: .* does not know cat, owl; its classes are dog, a, b, c, d and 4 more"):
        data.relabel(("dog", *classes))
    assert data.subset([1, 2]).relabel(("dog", *classes)).targets == [0, 0]  # only classes with images count


def test_relabel_is_quick_with_many_classes() -> None:
    classes = tuple(f"{number:04d}" for number in range(1000))
    data = toy([number % 1000 for number in range(100_000)], classes)
    started = time.process_time()
    relabeled = data.relabel(classes[::-1])
    assert time.process_time() - started < 1
    assert relabeled.targets[:3] == [999, 998, 997]


def test_check_classes() -> None:
    toy([0, 1], ("a", "b")).check_classes()
    with pytest.raises(ValueError, match="toy: no images of b, d; add some"):
        toy([0, 2], ("a", "b", "c", "d")).check_classes()
    with pytest.raises(ValueError, match=re.escape("toy: only one class (a)")):
        toy([0, 0], ("a",)).check_classes()


# -- boxes and masks --------------------------------------------------------------------------------------------------


def boxed(targets: list[Boxes], classes: tuple[str, ...] = ("cat", "dog")) -> ImageSet[Boxes]:
    names = [f"{number}.png" for number in range(len(targets))]
    return ImageSet(task=DETECTION, origin="toy", names=names, targets=targets, classes=classes, open=names.__getitem__)


def masked(paths: list[Path], class_of: bytes, classes: tuple[str, ...] = ("sky", "road")) -> ImageSet[Mask]:
    names = [path.name for path in paths]
    return ImageSet(
        task=SEGMENTATION,
        origin="toy",
        names=names,
        targets=[Mask(path=path, class_of=class_of) for path in paths],
        classes=classes,
        open=names.__getitem__,
    )


CAT_AND_DOG = boxes_of([[0, 0, 4, 3], [1, 1, 2, 3]], [0, 1])
NO_OBJECT = boxes_of([], [])
SKY_AND_ROAD = bytes([0, 1]) + bytes([IGNORE]) * 254


def test_relabel_boxes() -> None:
    data = boxed([CAT_AND_DOG, NO_OBJECT])
    relabeled = data.relabel(("dog", "owl", "cat"))
    assert [target.labels.tolist() for target in relabeled.targets] == [[2, 0], []]
    assert relabeled.targets[0].labels.dtype == np.int64
    assert relabeled.targets[0].xyxy.tolist() == CAT_AND_DOG.xyxy.tolist()
    assert relabeled.class_counts() == [1, 0, 1]
    assert CAT_AND_DOG.labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="toy: the checkpoint does not know dog; its classes are cat, owl"):
        data.relabel(("cat", "owl"))
    assert boxed([boxes_of([[0, 0, 1, 1]], [0])]).relabel(("owl", "cat")).targets[0].labels.tolist() == [1]


def test_a_crowd_of_a_class_that_the_model_does_not_know() -> None:
    data = boxed([boxes_of([[0, 0, 4, 3], [1, 1, 2, 3]], [0, 1], [False, True])])
    (target,) = data.relabel(("owl", "cat")).targets  # crowds are not counted, so dogs are not used
    assert (target.labels.tolist(), target.xyxy.tolist(), target.areas.tolist()) == ([1], [[0, 0, 4, 3]], [12])


def test_relabel_masks(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1, 2, 255]], np.uint8)).save(tmp_path / "a.png")
    data = masked([tmp_path / "a.png"], SKY_AND_ROAD)
    assert data.targets[0].read().tolist() == [[0, 1, IGNORE, IGNORE]]
    assert data.relabel(("road", "car", "sky")).targets[0].read().tolist() == [[2, 0, IGNORE, IGNORE]]
    with pytest.raises(ValueError, match="toy: the checkpoint does not know sky; its classes are road, car"):
        data.relabel(("road", "car"))  # which values are in use is not known without opening all of them


def test_fingerprint_of_boxes() -> None:
    data = boxed([CAT_AND_DOG, NO_OBJECT])
    told = b"[('cat', [0.0, 0.0, 4.0, 3.0], False), ('dog', [1.0, 1.0, 2.0, 3.0], False)]\t0.png\n[]\t1.png"
    assert data.fingerprint() == hashlib.sha256(told).hexdigest()[:16]
    assert data.subset([1, 0]).fingerprint() == data.fingerprint()
    assert data.relabel(("dog", "owl", "cat")).fingerprint() == data.fingerprint()
    others = [
        boxed([CAT_AND_DOG]),
        boxed([boxes_of([[0, 0, 4, 3], [1, 1, 2, 2]], [0, 1]), NO_OBJECT]),
        boxed([boxes_of([[0, 0, 4, 3], [1, 1, 2, 3]], [1, 1]), NO_OBJECT]),
        boxed([boxes_of([[0, 0, 4, 3], [1, 1, 2, 3]], [0, 1], [False, True]), NO_OBJECT]),
        boxed([CAT_AND_DOG, NO_OBJECT], ("cat", "cow")),
    ]
    assert len({data.fingerprint(), *(other.fingerprint() for other in others)}) == 6


def test_fingerprint_of_masks() -> None:
    data = masked([Path("x/a.png"), Path("x/b.png")], SKY_AND_ROAD)
    elsewhere = masked([Path("y/a.png"), Path("y/b.png")], SKY_AND_ROAD)
    assert data.fingerprint() == elsewhere.fingerprint() == data.subset([1, 0]).fingerprint()
    others = [
        data.subset([0]),
        masked([Path("x/a.png"), Path("x/b.png")], SKY_AND_ROAD, ("sky", "car")),
        masked([Path("x/a.png"), Path("x/b.png")], bytes([1, 0]) + SKY_AND_ROAD[2:]),
    ]
    assert len({data.fingerprint(), *(other.fingerprint() for other in others)}) == 4


def test_check_classes_of_boxes_and_masks() -> None:
    boxed([boxes_of([[0, 0, 1, 1]], [0])]).check_classes()  # one class is enough, and one may be without objects
    with pytest.raises(ValueError, match="toy: no objects of cat, dog; add some or remove the class"):
        boxed([NO_OBJECT]).check_classes()
    masked([Path("a.png")], SKY_AND_ROAD).check_classes()
    with pytest.raises(ValueError, match=r"toy: only one class \(sky\); segmentation needs two or more"):
        masked([Path("a.png")], SKY_AND_ROAD, ("sky",)).check_classes()
