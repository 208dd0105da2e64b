import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from numbered_images import numbers, write_folder, write_image

from mobilevit.data.datasets import find_splits, load_train_val

# -- folders ----------------------------------------------------------------------------------------------------------


def test_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets", {"dog": 2, "cat": 3})
    (data,) = find_splits(tmp_path / "pets").values()
    assert data.classes == ("cat", "dog")
    assert data.names == ["cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png"]
    assert data.targets == [0, 0, 0, 1, 1]
    assert numbers(data) == [20, 21, 22, 0, 1]
    assert len(data) == 5
    assert data.origin == str(tmp_path / "pets")


def test_nested_folders_and_what_is_passed_over(tmp_path: Path) -> None:
    for number, name in enumerate(["cat/b/x.PNG", "cat/a/deep/y.png", "cat/z.png", "dog/1.png"]):
        write_image(tmp_path / name, number)
    for name in ["cat/.hidden.png", "cat/._z.png", "cat/.git/a.png", ".trash/a.png"]:
        write_image(tmp_path / name, 99)
    for name in ["cat/notes.txt", "cat/Thumbs.db", "readme.md"]:
        (tmp_path / name).write_text("no image")
    data = find_splits(tmp_path)["all"]
    assert data.names == ["cat/z.png", "cat/a/deep/y.png", "cat/b/x.PNG", "dog/1.png"]
    assert data.classes == ("cat", "dog")
    assert numbers(data) == [2, 1, 0, 3]


@pytest.mark.parametrize("train", ["train", "training", "Train"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "dev", "Valid"])
def test_train_and_val_folders(tmp_path: Path, train: str, val: str) -> None:
    write_folder(tmp_path / train, {"cat": 2, "dog": 2, "owl": 1})
    write_folder(tmp_path / val, {"cat": 1, "owl": 2})  # a class may be missing; numbers are those of train
    sets = find_splits(tmp_path)
    assert list(sets) == ["train", "val"]
    assert sets["train"].classes == sets["val"].classes == ("cat", "dog", "owl")
    assert sets["train"].targets == [0, 0, 1, 1, 2]
    assert sets["val"].targets == [0, 2, 2]
    assert numbers(sets["val"]) == [0, 20, 21]
    loaded = load_train_val(tmp_path, val_path=None, val_fraction=0.5, seed=0)
    assert [part.names for part in loaded] == [sets["train"].names, sets["val"].names]


def test_train_val_and_test_folders(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("test", 2), ("val", 1)):
        write_folder(tmp_path / part, {"cat": count, "dog": count})
    assert {kind: len(data) for kind, data in find_splits(tmp_path).items()} == {"train": 6, "val": 2, "test": 4}


def test_train_alone_is_not_divided(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 4, "dog": 4})
    ((kind, data),) = find_splits(tmp_path).items()
    assert (kind, len(data), data.classes) == ("all", 8, ("cat", "dog"))


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_folder(tmp_path, {"bus": 2, "car": 3, "train": 4})
    ((kind, data),) = find_splits(tmp_path).items()
    assert (kind, data.classes, data.targets) == ("all", ("bus", "car", "train"), [0] * 2 + [1] * 3 + [2] * 4)


def test_val_with_an_unknown_class(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 2, "dog": 2})
    write_folder(tmp_path / "val", {"cat": 1, "owl": 1, "yak": 1})
    with pytest.raises(ValueError, match=r"val: .* does not know owl, yak; its classes are cat, dog\."):
        find_splits(tmp_path)


def test_an_empty_folder_of_an_unknown_class_does_no_harm(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 2, "dog": 2})
    write_folder(tmp_path / "val", {"cat": 1, "owl": 0})
    assert find_splits(tmp_path)["val"].targets == [0]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], r"data: nothing in it; put the images into one sub-folder per class"),
        (["a.png", "b.png"], r"data: only loose files in it; put the images into one sub-folder"),
        (["cat/readme.txt", "dog/x.tmp"], r"data: no images in its sub-folders; known kinds are \.avif, \.bmp"),
        (["cat/1.png", "cat/2.png"], r"data: only one class \(cat\); a classifier needs two or more"),
        (["cat/1.png", "cat/2.png", "dog/no.txt"], r"data: no images of dog; add some or remove the class"),
        (["cat/1.png", "cat/2.png", "dog/1.png"], r"data: class dog has only one image; two are needed.*`val_data`"),
        (["train/1.png", "val/1.png"], r"train: only loose files in it"),
        (["train/cat/1.png", "train/dog/1.png", "val/1.png"], r"val: only loose files in it"),
        (["train/cat/1.png", "train/dog/1.txt", "val/cat/1.png"], r"train: no images of dog"),
    ],
)
def test_useless_folders(tmp_path: Path, files: list[str], reason: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    with pytest.raises(ValueError, match=reason):
        load_train_val(folder, val_path=None, val_fraction=0.2, seed=0)


# -- CSV --------------------------------------------------------------------------------------------------------------


def write_csv(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, newline: str) -> None:
    names = ["p/0.png", "p/1, one.png", "2.png", str(tmp_path / "far" / "3.png")]
    for number, name in enumerate(names):
        write_image(tmp_path / "lists" / name, number)
    lines = ["label,path,note", "dog,p/0.png,x", 'cat,"p/1, one.png",', "größer,2.png,y", f"dog,{names[3]},"]
    path = write_csv(tmp_path / "lists" / "data.csv", newline.join(lines), encoding)
    monkeypatch.chdir(tmp_path)  # paths are relative to the file, not to where we are
    for given_path in (path, Path("lists/data.csv")):
        ((kind, data),) = find_splits(given_path).items()
        assert kind == "all"
        assert data.names == names
        assert data.classes == ("cat", "dog", "größer")
        assert data.targets == [1, 0, 2, 1]
        assert numbers(data) == [0, 1, 2, 3]


def test_csv_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows = "".join(f"{label}.png,{label}\n" for label in (10, 9, 2, 100, 0))
    data = find_splits(write_csv(tmp_path / "a.csv", "path,label\n" + rows))["all"]
    assert data.classes == ("0", "2", "9", "10", "100")
    assert data.targets == [3, 2, 1, 4, 0]
    mixed = find_splits(write_csv(tmp_path / "b.csv", "path,label\n" + rows + "x.png,x\n"))["all"]
    assert mixed.classes == ("0", "10", "100", "2", "9", "x")


def test_csv_with_a_split_column(tmp_path: Path) -> None:
    rows = [
        ("a", "cat", "train"),
        ("b", "dog", "Val"),
        ("c", "dog", "training"),
        ("d", "cat", "TEST"),
        ("e", "cat", "train"),
    ]
    text = "path,label,split\n" + "".join(f"{p}.png,{label},{part}\n" for p, label, part in rows)
    path = write_csv(tmp_path / "a.csv", text)
    for number in range(5):
        write_image(tmp_path / f"{'abcde'[number]}.png", number)
    sets = find_splits(path)
    assert {kind: (data.names, data.targets) for kind, data in sets.items()} == {
        "train": (["a.png", "c.png", "e.png"], [0, 1, 0]),
        "val": (["b.png"], [1]),
        "test": (["d.png"], [0]),
    }
    assert numbers(sets["train"]) == [0, 2, 4]
    assert numbers(sets["val"]) == [1]
    assert numbers(sets["test"]) == [3]


def test_csv_whose_rows_are_all_of_the_train_part_is_not_divided(tmp_path: Path) -> None:
    text = "path,label,split\n" + "".join(f"{i}.png,{'ab'[i % 2]},train\n" for i in range(8))
    path = write_csv(tmp_path / "a.csv", text)
    assert list(find_splits(path)) == ["all"]
    train, val = load_train_val(path, val_path=None, val_fraction=0.25, seed=0)
    assert Counter(train.targets) == {0: 3, 1: 3}
    assert Counter(val.targets) == {0: 1, 1: 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", r"a\.csv: no rows"),
        ("path,label\n", r"a\.csv: no rows; a line an image is needed, under the heading path,label"),
        ("file,label\na.png,x\n", r"a\.csv: no column path; the heading must name path and label"),
        ("file;class\na.png;x\n", r"a\.csv: no column label and path"),
        ("path,label\na.png,x\nb.png,\n", r"a\.csv, line 3: path or label is empty; fill it in"),
        ("path,label\na.png,x\n\n\n,y\n", r"a\.csv, line 5: path or label is empty"),
        ("path,label\na.png,x\nb.png\n", r"a\.csv, line 3: path or label is empty"),
        (
            "path,label,split\na.png,x,train\nb.png,y,later\nc.png,y,\n",
            r"a\.csv: split , later is neither train nor val",
        ),
    ],
)
def test_useless_csv(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        find_splits(write_csv(tmp_path / "a.csv", text))


def test_csv_in_another_encoding(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", "path,label\na.png,größer\n", "latin-1")
    with pytest.raises(ValueError, match=r"a\.csv: not a CSV file in UTF-8 \(.*0xf6"):
        find_splits(path)


def test_folder_of_csv_files(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", "path,label\na.png,cat\nb.png,dog\n")
    write_csv(tmp_path / "test.csv", "path,label\nc.png,dog\n")
    sets = find_splits(tmp_path)
    assert sets["train"].targets == [0, 1]
    assert list(sets) == ["train", "test"]
    assert (sets["test"].targets, sets["test"].classes) == ([1], ("cat", "dog"))


# -- parquet ----------------------------------------------------------------------------------------------------------


def image_bytes(count: int, folder: Path) -> list[bytes]:
    for number in range(count):
        write_image(folder / f"{number}.png", number)
    return [(folder / f"{number}.png").read_bytes() for number in range(count)]


def write_parquet(path: Path, columns: dict[str, Any], metadata: dict[str, str] | None = None, rows: int = 3) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=rows)
    return path


HF_FEATURES = {"info": {"features": {"label": {"names": ["owl", "cat", "dog"], "_type": "ClassLabel"}}}}


@pytest.mark.parametrize("layout", ["bytes", "struct"])
@pytest.mark.parametrize(
    ("metadata", "labels", "classes", "expected"),
    [
        (None, ["dog", "cat", "dog", "owl"], ("cat", "dog", "owl"), [1, 0, 1, 2]),
        (None, [10, 9, 10, 2], ("2", "9", "10"), [2, 1, 2, 0]),
        ({"huggingface": json.dumps(HF_FEATURES)}, [2, 1, 2, 0], ("owl", "cat", "dog"), [2, 1, 2, 0]),
        ({"huggingface": '{"info": {"features": {}}}'}, [2, 1, 2, 0], ("0", "1", "2"), [2, 1, 2, 0]),
    ],
)
def test_parquet(
    tmp_path: Path,
    layout: str,
    metadata: dict[str, str] | None,
    labels: list[Any],
    classes: tuple[str, ...],
    expected: list[int],
) -> None:
    encoded = image_bytes(4, tmp_path / "p")
    images = encoded if layout == "bytes" else [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(encoded)]
    path = write_parquet(tmp_path / "a.parquet", {"image": images, "label": labels, "more": [1.5] * 4}, metadata)
    ((kind, data),) = find_splits(path).items()
    assert (kind, data.classes, data.targets) == ("all", classes, expected)
    assert data.names == ["row 0", "row 1", "row 2", "row 3"]
    assert numbers(data) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("columns", "metadata", "reason"),
    [
        ({"label": [1]}, None, r"a\.parquet: no column image; it needs image \(encoded bytes\) and label"),
        ({"img": [b""], "class": [1]}, None, r"no column image and label"),
        ({"image": [], "label": []}, None, r"a\.parquet: no rows"),
        ({"image": ["a.png"], "label": [1]}, None, r"column image holds string; it needs encoded images"),
        ({"image": [{"path": "a.png"}], "label": [1]}, None, r"column image holds struct.*; it needs encoded images"),
        ({"image": [b"", b""], "label": ["cat", None]}, None, r"a\.parquet: row 1 has no label"),
        ({"image": [b""], "label": [3]}, {"huggingface": json.dumps(HF_FEATURES)}, r"labels outside 0\.\.2"),
        ({"image": [b""], "label": [-1]}, {"huggingface": json.dumps(HF_FEATURES)}, r"labels outside 0\.\.2"),
        ({"image": [b""], "label": ["a"]}, {"huggingface": json.dumps(HF_FEATURES)}, r"labels outside 0\.\.2"),
    ],
)
def test_useless_parquet(tmp_path: Path, columns: dict[str, Any], metadata: dict[str, str] | None, reason: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", columns, metadata)
    with pytest.raises(ValueError, match=reason):
        find_splits(path)


@pytest.mark.parametrize("kept", [[], [(0, -100)], [(0, 4), (200, None)], [(50, 300)]])
def test_damaged_parquet(tmp_path: Path, kept: list[tuple[int, int | None]]) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"image": [bytes(100)] * 9, "label": [1, 2, 3] * 3})
    data = path.read_bytes()
    path.write_bytes(b"".join(data[start:end] for start, end in kept))
    with pytest.raises(ValueError, match=r"a\.parquet: damaged or not a parquet file \("):
        find_splits(path)


def test_folder_of_parquet_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", {"image": [b""] * 3, "label": ["cat", "dog", "owl"]})
    write_parquet(tmp_path / "validation.parquet", {"image": [b""], "label": ["owl"]})
    sets = find_splits(tmp_path)
    assert (sets["train"].targets, sets["val"].targets) == ([0, 1, 2], [2])


@pytest.mark.parametrize("kind", ["folder", "csv", "parquet"])
def test_data_can_be_sent_to_a_process_that_is_not_forked(tmp_path: Path, kind: str) -> None:
    images = image_bytes(6, tmp_path / "p")
    if kind == "folder":
        path = write_folder(tmp_path / "data", {"a": 3, "b": 3})
    elif kind == "csv":
        path = write_csv(tmp_path / "a.csv", "path,label\n" + "".join(f"p/{i}.png,{'ab'[i % 2]}\n" for i in range(6)))
    else:
        path = write_parquet(tmp_path / "a.parquet", {"image": images, "label": [0, 1] * 3})
    data = find_splits(path)["all"].subset([4, 1, 0])
    sent = pickle.loads(pickle.dumps(data))
    assert numbers(sent) == numbers(data)
    assert (sent.names, sent.targets, sent.classes) == (data.names, data.targets, data.classes)
