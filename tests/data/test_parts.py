"""The contract of parts: train, val and test mean the same in every format of data.

Each image has a color of its own, so that the tests see exactly which image lands where.
"""

import csv
import functools
import http.server
import io
import json
import logging
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numbered_images import numbers, write_image
from PIL import Image

from mobilevit.data.datasets import find_splits, load_train_val, part_to_evaluate
from mobilevit.data.shard_writing import write_shards
from mobilevit.errors import MobileViTError

Spelled = dict[str, list[int]]
"""What the parts are called, and the numbers of their images."""

NUMBERS = {"train": [*range(8)], "val": [20, 21, 22, 23], "test": [40, 41, 42, 43, 44, 45]}
SPELLINGS = {
    "train": ("train", "training", "Train"),
    "val": ("val", "valid", "validation", "dev", "Validation"),
    "test": ("test", "testing", "TEST"),
}


def label_of(number: int) -> str:
    return ("cat", "dog")[number % 2]


def encoded(number: int) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (4, 3), (number, 0, 7)).save(written, "PNG")
    return written.getvalue()


# -- classes ----------------------------------------------------------------------------------------------------------


def class_folders(folder: Path, parts: Spelled) -> Path:
    for part, found in parts.items():
        for number in found:
            write_image(folder / part / label_of(number) / f"{number}.png", number)
    return folder


def write_csv(file: Path, rows: list[dict[str, str]]) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return file


def csv_column(folder: Path, parts: Spelled) -> Path:
    rows = [(part, number) for part, found in parts.items() for number in found]
    for _, number in rows:
        write_image(folder / f"{number}.png", number)
    return write_csv(
        folder / "data.csv",
        [{"path": f"{number}.png", "label": label_of(number), "split": part} for part, number in rows],
    )


def csv_files(folder: Path, parts: Spelled) -> Path:
    for part, found in parts.items():
        for number in found:
            write_image(folder / f"images/{number}.png", number)
        write_csv(folder / f"{part}.csv", [{"path": f"images/{n}.png", "label": label_of(n)} for n in found])
    return folder


def write_parquet(file: Path, found: list[int], words: list[str] | None = None) -> Path:
    columns = {"image": [encoded(n) for n in found], "label": [label_of(n) for n in found]}
    pq.write_table(pa.table(columns if words is None else columns | {"split": words}), file)
    return file


def parquet_column(folder: Path, parts: Spelled) -> Path:
    rows = [(part, number) for part, found in parts.items() for number in found]
    return write_parquet(folder / "data.parquet", [number for _, number in rows], [part for part, _ in rows])


def parquet_files(folder: Path, parts: Spelled) -> Path:
    for part, found in parts.items():
        write_parquet(folder / f"{part}.parquet", found)
    return folder


def numbered_parquet_files(folder: Path, parts: Spelled) -> Path:
    for part, found in parts.items():
        write_parquet(folder / f"{part}-00000-of-00002.parquet", found[:2])
        write_parquet(folder / f"{part}-00001-of-00002.parquet", found[2:])
    return folder


def write_tar(file: Path, found: list[int]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for number in found:
            for suffix, data in (("png", encoded(number)), ("cls", str(number % 2).encode())):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def tar_names(folder: Path, parts: Spelled) -> Path:
    for part, found in parts.items():
        write_tar(folder / f"pets-{part}-000.tar", found[:2])
        write_tar(folder / f"pets-{part}-001.tar", found[2:])
    return folder


def tar_pattern(folder: Path, parts: Spelled) -> Path:
    return tar_names(folder, parts) / "*.tar"


def tar_folders(folder: Path, parts: Spelled) -> Path:
    for part, found in parts.items():
        write_tar(folder / part / "000.tar", found)
    return folder


def packed_shards(folder: Path, parts: Spelled) -> Path:
    write_shards(class_folders(folder / "in", parts), folder / "out")
    return folder / "out"


# -- boxes ------------------------------------------------------------------------------------------------------------


def write_xml(file: Path, number: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    box = "<bndbox><xmin>0</xmin><ymin>0</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>"
    file.write_text(f"<annotation><object><name>{label_of(number)}</name>{box}</object></annotation>")


def voc_lists(folder: Path, parts: Spelled) -> Path:
    (folder / "ImageSets/Main").mkdir(parents=True)
    for part, found in parts.items():
        for number in found:
            write_image(folder / f"JPEGImages/{number}.png", number)
            write_xml(folder / f"Annotations/{number}.xml", number)
        (folder / f"ImageSets/Main/{part}.txt").write_text("".join(f"{number}\n" for number in found))
    return folder


def voc_folders(folder: Path, parts: Spelled) -> Path:
    for part, found in parts.items():
        for number in found:
            write_image(folder / part / f"{number}.png", number)
            write_xml(folder / part / f"{number}.xml", number)
    return folder


def write_coco(file: Path, found: list[int]) -> None:
    images = [{"id": n, "file_name": f"{n}.png", "width": 4, "height": 3} for n in found]
    boxes = [{"id": n, "image_id": n, "category_id": n % 2, "bbox": [0, 0, 2, 2]} for n in found]
    categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))


def coco_files(folder: Path, parts: Spelled) -> Path:
    for part, found in parts.items():
        for number in found:
            write_image(folder / f"images/{number}.png", number)
        write_coco(folder / f"annotations/instances_{part}2017.json", found)
    return folder


def coco_folders(folder: Path, parts: Spelled) -> Path:
    for part, found in parts.items():
        for number in found:
            write_image(folder / part / f"{number}.png", number)
        write_coco(folder / part / "_annotations.coco.json", found)
    return folder


def yolo_images_part(folder: Path, parts: Spelled) -> Path:
    for part, found in parts.items():
        (folder / "labels" / part).mkdir(parents=True)
        for number in found:
            write_image(folder / f"images/{part}/{number}.png", number)
            (folder / f"labels/{part}/{number}.txt").write_text(f"{number % 2} 0.5 0.5 0.5 0.5\n")
    (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


def yolo_part_images(folder: Path, parts: Spelled) -> Path:
    for part, found in parts.items():
        (folder / part / "labels").mkdir(parents=True)
        for number in found:
            write_image(folder / f"{part}/images/{number}.png", number)
            (folder / f"{part}/labels/{number}.txt").write_text(f"{number % 2} 0.5 0.5 0.5 0.5\n")
    (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


def yolo_yaml(folder: Path, parts: Spelled) -> Path:
    yolo_images_part(folder, parts)
    lines = [f"{part.lower()}: images/{part}" for part in parts]
    (folder / "data.yaml").write_text("\n".join(["names: [cat, dog]", *lines]))
    return folder


# -- masks ------------------------------------------------------------------------------------------------------------


def write_pair(image: Path, mask: Path, number: int) -> None:
    write_image(image, number)
    mask.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.tile(np.array([0, 0, 1, 1], np.uint8), (3, 1))).save(mask)


def masks_images_part(folder: Path, parts: Spelled) -> Path:
    for part, found in parts.items():
        for number in found:
            write_pair(folder / f"images/{part}/{number}.png", folder / f"masks/{part}/{number}.png", number)
    return folder


def masks_part_images(folder: Path, parts: Spelled) -> Path:
    for part, found in parts.items():
        for number in found:
            write_pair(folder / f"{part}/images/{number}.png", folder / f"{part}/masks/{number}.png", number)
    return folder


def masks_in_one_folder(folder: Path, parts: Spelled) -> Path:
    for part, found in parts.items():
        for number in found:
            write_pair(folder / f"images/{part}/{number}.png", folder / f"masks/{number}.png", number)
    return folder


def masks_voc_lists(folder: Path, parts: Spelled) -> Path:
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    for part, found in parts.items():
        for number in found:
            write_pair(folder / f"JPEGImages/{number}.png", folder / f"SegmentationClass/{number}.png", number)
        (folder / f"ImageSets/Segmentation/{part}.txt").write_text("".join(f"{number}\n" for number in found))
    return folder


Layout = Callable[[Path, Spelled], Path]

LAYOUTS: list[Layout] = [
    class_folders,
    csv_column,
    csv_files,
    parquet_column,
    parquet_files,
    numbered_parquet_files,
    tar_names,
    tar_pattern,
    tar_folders,
    packed_shards,
    voc_lists,
    voc_folders,
    coco_files,
    coco_folders,
    yolo_images_part,
    yolo_part_images,
    yolo_yaml,
    masks_images_part,
    masks_part_images,
    masks_in_one_folder,
    masks_voc_lists,
]

LISTS = (voc_lists, masks_voc_lists)  # whose files are named in small letters


def written(layout: Layout, folder: Path, parts: Spelled) -> Path:
    folder.mkdir(parents=True)
    return layout(folder, parts)


def found_in(path: Path | str) -> dict[str, list[int]]:
    return {part: sorted(numbers(data)) for part, data in find_splits(path).items()}


def loaded(path: Path | str, seed: int = 0) -> tuple[list[int], list[int]]:
    train, val = load_train_val(path, val_path=None, val_fraction=0.25, seed=seed)
    return sorted(numbers(train)), sorted(numbers(val))


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBILEVIT_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_parts(tmp_path: Path, layout: Layout) -> None:
    path = written(layout, tmp_path / "data", NUMBERS)
    assert list(found_in(path).items()) == list(NUMBERS.items())
    assert loaded(path) == (NUMBERS["train"], NUMBERS["val"])
    assert len({data.classes for data in find_splits(path).values()}) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_test_part_alone_beside_train_is_no_val_part(
    tmp_path: Path, layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    parts = {part: NUMBERS[part] for part in ("train", "test")}
    path = written(layout, tmp_path / "data", parts)
    assert found_in(path) == parts
    for seed in range(3):
        with caplog.at_level(logging.INFO, "mobilevit"):
            train, val = loaded(path, seed)
        assert sorted(train + val) == NUMBERS["train"]
        assert len(val) == 2
    assert f"{path}: no val part: 2 of the 8 train images are held out for validation; the test part is not" in (
        caplog.text
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_train_and_val(tmp_path: Path, layout: Layout) -> None:
    parts = {part: NUMBERS[part] for part in ("train", "val")}
    path = written(layout, tmp_path / "data", parts)
    assert found_in(path) == parts
    assert loaded(path) == (NUMBERS["train"], NUMBERS["val"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_train_alone_is_not_divided(tmp_path: Path, layout: Layout) -> None:
    path = written(layout, tmp_path / "data", {"train": NUMBERS["train"]})
    assert found_in(path) == {"all": NUMBERS["train"]}
    train, val = loaded(path)
    assert sorted(train + val) == NUMBERS["train"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("held_out", [("val", "test"), ("val",), ("test",)])
def test_held_out_parts_alone_are_not_trained_on(tmp_path: Path, layout: Layout, held_out: tuple[str, ...]) -> None:
    parts = {part: NUMBERS[part] for part in held_out}
    path = written(layout, tmp_path / "data", parts)
    assert found_in(path) == parts
    with pytest.raises(MobileViTError, match=f"holds {' and '.join(held_out)}, but nothing to train on; add a train"):
        load_train_val(path, val_path=None, val_fraction=0.25, seed=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("turn", range(5))
def test_other_spellings(tmp_path: Path, layout: Layout, turn: int) -> None:
    names = {part: spellings[turn % len(spellings)] for part, spellings in SPELLINGS.items()}
    if layout in LISTS:
        names = {part: name.lower() for part, name in names.items()}
    assert (
        found_in(written(layout, tmp_path / "data", {names[part]: found for part, found in NUMBERS.items()})) == NUMBERS
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_test_part_does_not_validate_other_data(tmp_path: Path, layout: Layout) -> None:
    path = written(layout, tmp_path / "a", {"train": NUMBERS["train"]})
    only_test = written(layout, tmp_path / "b", {"test": NUMBERS["test"]})
    with pytest.raises(MobileViTError, match="holds only a test part, which must not choose the best epoch"):
        load_train_val(path, val_path=only_test, val_fraction=0.25, seed=0)
    three = written(layout, tmp_path / "c", NUMBERS)
    train, val = load_train_val(path, val_path=three, val_fraction=0.25, seed=0)
    assert (sorted(numbers(train)), sorted(numbers(val))) == (NUMBERS["train"], NUMBERS["val"])


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """Shards of three parts on a web server, which lists no folders."""
    write_shards(class_folders(tmp_path / "in", NUMBERS), tmp_path / "out")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "out"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_shards_elsewhere(served: str) -> None:
    assert found_in(served) == NUMBERS
    assert loaded(served) == (NUMBERS["train"], NUMBERS["val"])


# -- what is measured -------------------------------------------------------------------------------------------------


def measured(path: Path, part: str, provenance: dict[str, str] | None = None) -> tuple[list[int], str]:
    task = next(iter(find_splits(path).values())).task.name
    data, which = part_to_evaluate(path, part, task=task, provenance=provenance or {})
    return sorted(numbers(data)), which


def trained_on(path: Path) -> tuple[dict[str, str], list[int], list[int]]:
    """What a checkpoint says of its data, and the images it was trained on and validated by."""
    train, val = load_train_val(path, val_path=None, val_fraction=0.25, seed=3)
    told = {"data_fingerprint": train.fingerprint(), "val_fraction": "0.25", "seed": "3"}
    return told, sorted(numbers(train)), sorted(numbers(val))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_part_is_measured_by_its_name(tmp_path: Path, layout: Layout) -> None:
    path = written(layout, tmp_path / "data", NUMBERS)
    for part, expected in NUMBERS.items():
        assert measured(path, part) == (expected, f"the {part} part")
    assert measured(path, "auto") == (NUMBERS["val"], "the val part")
    with pytest.raises(MobileViTError, match="is divided into train and val and test; choose `split` train or val or"):
        measured(path, "all")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_split_off_train_is_measured(tmp_path: Path, layout: Layout) -> None:
    path = written(layout, tmp_path / "data", {part: NUMBERS[part] for part in ("train", "test")})
    told, train, val = trained_on(path)
    assert measured(path, "auto", told) == (val, "what was held out when it was trained on these")
    assert measured(path, "val", told)[0] == val
    assert measured(path, "train", told) == (train, "what it was trained on")
    assert measured(path, "test", told) == (NUMBERS["test"], "the test part")
    # Another model knows nothing of that division.
    assert measured(path, "auto") == (NUMBERS["test"], "the test part")
    assert measured(path, "train") == (NUMBERS["train"], "the train part")
    with pytest.raises(MobileViTError, match="is divided into train and test; choose `split` train or test"):
        measured(path, "val")


def test_undivided_data_are_measured(tmp_path: Path) -> None:
    path = class_folders(tmp_path, {"": NUMBERS["train"]})
    told, train, val = trained_on(path)
    assert measured(path, "auto", told)[0] == measured(path, "val", told)[0] == val
    assert measured(path, "train", told)[0] == train
    assert measured(path, "all", told) == measured(path, "auto") == (NUMBERS["train"], "all of it")
    with pytest.raises(MobileViTError, match="has no test part; leave `split` out, or choose `split` all"):
        measured(path, "test", told)
    with pytest.raises(MobileViTError, match="not divided, and not what this checkpoint was trained on; choose `spli"):
        measured(path, "val")


# -- parts that contradict themselves ---------------------------------------------------------------------------------


def test_what_a_held_out_list_also_names_is_not_trained_on(tmp_path: Path) -> None:
    for write in (voc_lists, masks_voc_lists):
        path = write(tmp_path / write.__name__, {**NUMBERS, "train": [*range(8), 20, 40]})
        assert found_in(path) == NUMBERS


def test_a_file_of_a_part_with_rows_of_another(tmp_path: Path) -> None:
    rows = [{"path": f"{n}.png", "label": label_of(n), "split": "train" if n < 6 else "test"} for n in range(8)]
    write_csv(tmp_path / "train.csv", rows)
    write_csv(tmp_path / "test.csv", rows[6:])
    with pytest.raises(MobileViTError, match=r"train.csv: holds the train part, but has rows with split test; remove"):
        find_splits(tmp_path)
    write_csv(tmp_path / "train.csv", rows[:6])
    assert {part: len(data) for part, data in find_splits(tmp_path).items()} == {"train": 6, "test": 2}


def test_shards_of_which_only_some_say_their_part(tmp_path: Path) -> None:
    tar_names(tmp_path, {"train": NUMBERS["train"], "test": NUMBERS["test"]})
    write_tar(tmp_path / "more-000.tar", [60, 61])
    with pytest.raises(MobileViTError, match=r"more-000.tar: its name says no part, but that of pets-.*name all or"):
        find_splits(tmp_path)


def test_a_test_part_without_labels_is_left_out_and_named(tmp_path: Path) -> None:
    """Images to test on are often handed out without labels."""
    class_folders(tmp_path / "classes", {part: NUMBERS[part] for part in ("train", "val")})
    write_image(tmp_path / "classes/test/0.png", 40)
    voc_lists(tmp_path / "voc", NUMBERS)
    yolo_images_part(tmp_path / "yolo", NUMBERS)
    masks_part_images(tmp_path / "masks", NUMBERS)
    masks_voc_lists(tmp_path / "voc_masks", NUMBERS)
    coco_files(tmp_path / "coco", NUMBERS)
    file = tmp_path / "coco/annotations/instances_test2017.json"
    content = json.loads(file.read_text())
    del content["annotations"]
    file.write_text(json.dumps(content))
    for number in NUMBERS["test"]:
        (tmp_path / f"voc/Annotations/{number}.xml").unlink()
        (tmp_path / f"yolo/labels/test/{number}.txt").unlink()
        (tmp_path / f"masks/test/masks/{number}.png").unlink()
        (tmp_path / f"voc_masks/SegmentationClass/{number}.png").unlink()
    for folder in ("classes", "voc", "yolo", "coco", "masks", "voc_masks"):
        splits = find_splits(tmp_path / folder)
        assert {part: sorted(numbers(data)) for part, data in splits.items()} == {
            part: NUMBERS[part] for part in ("train", "val")
        }
        (problem,) = (p for p in splits["train"].problems if p.kind.startswith("test part without"))
        assert "test" in problem.file
        assert problem.remedy.startswith("left out")


def test_cocos_test_dev_is_a_test_part(tmp_path: Path) -> None:
    path = coco_files(tmp_path, {"train": NUMBERS["train"], "test-dev": NUMBERS["test"]})
    assert list(found_in(path)) == ["train", "test"]
