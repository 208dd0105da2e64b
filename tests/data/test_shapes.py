from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobilevit.data.datasets import find_splits
from mobilevit.data.shapes import CLASSES, Scene, render_scene, write_boxes, write_folder, write_masks
from mobilevit.imaging.decode import read_image


def extent(inside: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(inside)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def same(a: Scene, b: Scene) -> bool:
    return a.image.tobytes() == b.image.tobytes()


def test_same_arguments_same_scene() -> None:
    for num_objects in (1, 4):
        first, second = (render_scene(7, seed=3, num_objects=num_objects) for _ in range(2))
        assert same(first, second)
        assert first.labels == second.labels
        assert first.boxes_xyxy == second.boxes_xyxy
        assert np.array_equal(first.mask, second.mask)


def test_different_index_or_seed_different_scene() -> None:
    images = {render_scene(index, seed=seed).image.tobytes() for index in range(30) for seed in range(2)}
    assert len(images) == 60


def test_classes_are_balanced() -> None:
    labels = [render_scene(index, size=32).labels for index in range(60)]
    assert CLASSES == ("circle", "cross", "ring", "square", "star", "triangle")
    assert Counter(labels) == {(label,): 10 for label in range(6)}
    assert [render_scene(index, num_objects=3).labels[0] for index in range(6)] == list(range(6))


def test_image_and_mask_are_what_they_say() -> None:
    scene = render_scene(0, size=48)
    assert scene.image.mode == "RGB"
    assert scene.image.size == (48, 48)
    assert scene.mask.shape == (48, 48)
    assert scene.mask.dtype == np.uint8


@pytest.mark.parametrize("size", [32, 64, 160])
def test_single_object_lies_inside_and_its_box_is_tight(size: int) -> None:
    for index in range(60):
        scene = render_scene(index, seed=1, size=size)
        (box,) = scene.boxes_xyxy
        assert np.unique(scene.mask).tolist() == [0, scene.labels[0] + 1]
        assert np.abs(np.subtract(box, extent(scene.mask > 0))).max() <= 1.5
        assert 0.2 * size <= max(box[2] - box[0], box[3] - box[1]) <= 0.8 * size + 1


@pytest.mark.parametrize("num_objects", [2, 4, 8])
def test_several_objects_all_show(num_objects: int) -> None:
    for index in range(40):
        scene = render_scene(index, seed=2, size=96, num_objects=num_objects)
        assert len(scene.labels) == len(scene.boxes_xyxy) == num_objects
        assert set(np.unique(scene.mask)) == {0, *(label + 1 for label in scene.labels)}
        for label, (x0, y0, x1, y1) in zip(scene.labels, scene.boxes_xyxy, strict=True):
            assert 0 <= x0 < x1 <= 96
            assert 0 <= y0 < y1 <= 96
            # A star or a cross turned by 45 degrees fills a third of its box, a ring less where it is covered.
            assert (scene.mask[int(y0) : int(y1), int(x0) : int(x1)] == label + 1).mean() > 0.2


def test_boxes_cover_the_mask_and_nothing_else() -> None:
    for index in range(20):
        scene = render_scene(index, size=128, num_objects=5)
        for label in set(scene.labels):
            boxes = [box for other, box in zip(scene.labels, scene.boxes_xyxy, strict=True) if other == label]
            x0, y0, x1, y1 = np.array(boxes).T
            assert extent(scene.mask == label + 1) == (x0.min(), y0.min(), x1.max(), y1.max())


def test_size_only_enlarges() -> None:
    for index in range(12):
        small = render_scene(index, size=64, num_objects=1 + index % 3)
        large = render_scene(index, size=256, num_objects=1 + index % 3)
        assert large.labels == small.labels
        assert np.abs(np.divide(large.boxes_xyxy, 4) - small.boxes_xyxy).max() < 2.5  # a sharp tip loses a pixel or two
        assert (large.mask[2::4, 2::4] == small.mask).mean() > 0.99
        shrunk = np.asarray(large.image.resize((64, 64), Image.Resampling.BOX), float)
        assert np.abs(shrunk - np.asarray(small.image, float)).mean() < 3  # of 255: grain and edges


def test_objects_stand_out_from_the_background() -> None:
    for index in range(60):
        scene = render_scene(index)
        luma = np.asarray(scene.image.convert("L"), float)
        assert np.median(luma[scene.mask > 0]) - np.median(luma[scene.mask == 0]) > 60


def test_write_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "shapes", num_images=14, seed=5, size=32)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert names == sorted(f"shapes/{CLASSES[index % 6]}/{index:05d}.png" for index in range(14))
    with Image.open(tmp_path / "shapes/ring/00008.png") as image:
        assert image.tobytes() == render_scene(8, seed=5, size=32).image.tobytes()


def drawn(index: int) -> Scene:
    return render_scene(index, seed=5, size=64, num_objects=1 + index // 6 % 3)


def test_written_boxes_read_back(tmp_path: Path) -> None:
    write_boxes(tmp_path / "shapes", num_images=20, seed=5, size=64)
    (data,) = find_splits(tmp_path / "shapes").values()
    assert (data.task.name, data.classes, data.problems) == ("detection", CLASSES, ())
    assert data.names == [f"images/{index:05d}.png" for index in range(20)]
    assert data.sizes == [(64, 64)] * 20
    for index, target in enumerate(data.targets):
        scene = drawn(index)
        assert target.labels.tolist() == list(scene.labels)
        assert target.xyxy.tolist() == [list(box) for box in scene.boxes_xyxy]
        assert target.areas.tolist() == [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in scene.boxes_xyxy]
        assert not target.crowd.any()
        assert read_image(data.open(index)).tobytes() == scene.image.tobytes()
    assert Counter(len(target.labels) for target in data.targets) == {1: 8, 2: 6, 3: 6}


def test_written_masks_read_back(tmp_path: Path) -> None:
    write_masks(tmp_path / "shapes", num_images=20, seed=5, size=64)
    (data,) = find_splits(tmp_path / "shapes").values()
    assert (data.task.name, data.classes, data.problems) == ("segmentation", ("background", *CLASSES), ())
    assert data.names == [f"images/{index:05d}.png" for index in range(20)]
    for index, target in enumerate(data.targets):
        scene = drawn(index)
        assert np.array_equal(target.read(), scene.mask)
        assert read_image(data.open(index)).tobytes() == scene.image.tobytes()


def test_each_class_comes_first_in_scenes_of_every_number_of_objects(tmp_path: Path) -> None:
    write_boxes(tmp_path / "shapes", num_images=18, size=32)
    (data,) = find_splits(tmp_path / "shapes").values()
    firsts = {(len(target.labels), int(target.labels[0])) for target in data.targets}
    assert firsts == {(count, label) for count in (1, 2, 3) for label in range(6)}
