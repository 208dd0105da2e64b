from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
import torch
from numbered_images import numbers, write_folder
from PIL import Image

from mobilevit import remote
from mobilevit.cli import main
from mobilevit.data import shard_files, shard_writing, shards, tar_scan
from mobilevit.data.datasets import find_splits, load_train_val
from mobilevit.data.imageset import ImageSet
from mobilevit.data.loaders import BatchLoader
from mobilevit.data.shard_files import ShardImages, expand
from mobilevit.data.shard_writing import write_shards
from mobilevit.errors import ImageError, MissingPackageError, MobileViTError
from mobilevit.imaging.decode import EncodedImage
from mobilevit.training.config import TrainConfig
from mobilevit.training.loop import train

COUNTS = {"cat": 9, "dog": 5, "owl": 4}


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBILEVIT_SHARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MOBILEVIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "_WAITS_S", [0.01] * 5)
    shard_files.opened.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pets", COUNTS)


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    """18 images in shards of 4."""
    out = tmp_path / "packed"
    write_shards(folder, out, max_bytes=12_000)
    return out


def contents(data: ImageSet[int]) -> set[tuple[bytes, str]]:
    """(bytes, class) of each image."""
    found = []
    for number in range(len(data)):
        source = data.open(number)
        pixels = source if isinstance(source, bytes) else Path(str(source)).read_bytes()
        found.append((pixels, data.classes[data.targets[number]]))
    assert len(set(found)) == len(found)
    return set(found)


def png(number: int) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (4, 3), (number, 0, 7)).save(written, "PNG")
    return written.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def records(*labels: int, first: int = 0) -> dict[str, bytes]:
    """Images first, first + 1, ... with these labels."""
    files = {}
    for number, label in enumerate(labels, first):
        files |= {f"{number:04d}.png": png(number), f"{number:04d}.cls": str(label).encode()}
    return files


# -- written by us ----------------------------------------------------------------------------------------------------


def test_shards_hold_what_the_folder_holds(folder: Path, packed: Path) -> None:
    before, after = find_splits(folder)["all"], find_splits(packed)["all"]
    assert after.classes == before.classes
    assert contents(after) == contents(before)
    assert after.class_counts() == [9, 5, 4]
    index = json.loads((packed / "index.json").read_text())
    assert [shard["images"] for shard in index["shards"]] == [len(part) for part in after.shards or ()]
    assert len(index["shards"]) == 5
    assert [n for part in after.shards or () for n in part] == list(range(18))
    for shard in index["shards"]:
        data = (packed / shard["name"]).read_bytes()
        assert len(data) == shard["bytes"] <= 12_000
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
    table = pq.read_table(packed / "index.parquet")
    assert set(table.column_names) == {"shard", "key", "label", "offset", "size", "extension"}


def test_any_tar_reader_finds_the_same(packed: Path) -> None:
    data = find_splits(packed)["all"]
    found = set()
    for path in sorted(packed.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar}
        found |= {(files[n], data.classes[int(files[n[:-4] + ".cls"])]) for n in files if n.endswith(".png")}
    assert found == contents(data)


def test_each_shard_is_a_mix_by_the_seed(folder: Path, packed: Path, tmp_path: Path) -> None:
    data = find_splits(packed)["all"]
    assert sorted(data.targets) != list(data.targets)
    write_shards(folder, tmp_path / "again", max_bytes=12_000)
    write_shards(folder, tmp_path / "other", max_bytes=12_000, seed=1)
    name = "train-000000.tar"
    assert (tmp_path / "again" / name).read_bytes() == (packed / name).read_bytes()
    assert (tmp_path / "other" / name).read_bytes() != (packed / name).read_bytes()


def test_classes_called_by_numbers(tmp_path: Path) -> None:
    before = write_folder(tmp_path / "in", {"1": 3, "2": 2, "x": 2})
    write_shards(before, tmp_path / "out")
    assert contents(find_splits(tmp_path / "out")["all"]) == contents(find_splits(before)["all"])


def test_parts(folder: Path, tmp_path: Path) -> None:
    write_shards(folder, tmp_path / "divided", val_fraction=0.3, seed=4)
    assert (tmp_path / "divided/val/val-000000.tar").is_file()
    got = find_splits(tmp_path / "divided")
    train_set, val_set = load_train_val(folder, val_path=None, val_fraction=0.3, seed=4)
    assert set(got) == {"train", "val"}
    assert contents(got["train"]) == contents(train_set)
    assert contents(got["val"]) == contents(val_set)
    write_shards(tmp_path / "divided", tmp_path / "again")  # shards can be packed anew, and keep their parts
    assert contents(find_splits(tmp_path / "again")["val"]) == contents(val_set)


def test_parts_by_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "s/birds-train-000.tar", records(0, 1, 0, 1))
    write_tar(tmp_path / "s/birds-validation-000.tar", records(1, 0, first=10))
    got = find_splits(tmp_path / "s")
    assert {part: len(data) for part, data in got.items()} == {"train": 4, "val": 2}


def test_smaller_images(tmp_path: Path) -> None:
    for number, size in enumerate([(200, 100), (90, 40), (64, 64)]):
        (tmp_path / "in/a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number, 2, 3)).save(tmp_path / f"in/a/{number}.png")
    write_shards(tmp_path / "in", tmp_path / "out", shorter_side=50)
    data = find_splits(tmp_path / "out")["all"]
    opened = {name.rpartition("/")[2]: Image.open(io.BytesIO(data.open(i))) for i, name in enumerate(data.names)}
    assert {name: image.size for name, image in opened.items()} == {
        "0.jpg": (100, 50),
        "1.png": (90, 40),
        "2.jpg": (50, 50),
    }
    assert contents(data) >= {((tmp_path / "in/a/1.png").read_bytes(), "a")}


def test_unreadable_images_are_left_out_and_named(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "cat/0.png").read_bytes()
    (folder / "cat/0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "dog/1.png").write_bytes(b"")
    report = write_shards(folder, tmp_path / "out")
    assert report.images == 16
    assert sorted(line.partition(":")[0] for line in report.left_out) == ["cat/0.png", "dog/1.png"]
    assert find_splits(tmp_path / "out")["all"].class_counts() == [8, 4, 4]


def test_keys_are_unique_and_without_dots(tmp_path: Path) -> None:
    (tmp_path / "in/a.b").mkdir(parents=True)
    for number, name in enumerate(("x.1.png", "x_1.png", "y.png")):
        (tmp_path / "in/a.b" / name).write_bytes(png(number))
    write_shards(tmp_path / "in", tmp_path / "out")
    assert sorted(pq.read_table(tmp_path / "out/index.parquet")["key"].to_pylist()) == ["a_b/x_1", "a_b/x_1-2", "a_b/y"]


def test_an_error_leaves_nothing_and_keeps_what_was_there(
    folder: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in packed.iterdir()}
    real, calls = shard_writing._Writer._finish, []

    def finish(writer: Any) -> None:
        calls.append(1)
        real(writer)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(shard_writing._Writer, "_finish", finish)
    with pytest.raises(KeyboardInterrupt):
        write_shards(folder, packed, max_bytes=12_000, seed=1, overwrite=True)
    assert {p.name: p.read_bytes() for p in packed.iterdir()} == before


def test_overwrite(folder: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"already holds shards; .* `overwrite`"):
        write_shards(folder, packed)
    write_shards(folder, packed, overwrite=True)
    assert sorted(p.name for p in packed.iterdir()) == ["index.json", "index.parquet", "train-000000.tar"]
    write_shards(folder, packed, overwrite=True, val_fraction=0.2)
    assert sorted(p.name for p in packed.iterdir()) == ["train", "val"]
    with pytest.raises(ValueError, match="holds cat, which is no shard of ours"):
        write_shards(packed, folder, overwrite=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_bytes": 0}, "`max_mb` is 0; it must be above 0"),
        ({"shorter_side": 5}, "`shorter_side` is 5"),
        ({"val_fraction": 1.0}, "`val_fraction` is 1.0"),
    ],
)
def test_settings_out_of_range(folder: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards(folder, tmp_path / "out", **settings)


# -- written by others ------------------------------------------------------------------------------------------------


def test_foreign_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "s/a-0.tar", {"d/x.y.png": b"passed over", **records(2, 0)})
    files = {
        "7.jpg": png(7),
        "7.json": b'{"label": 0, "caption": "?"}',
        "7.txt": b"?",
        "8.cls": b" 2\n",
        "8.PNG": png(8),
    }
    write_tar(tmp_path / "s/a-1.tar", files)
    (tmp_path / "s/classes.txt").write_text("ant\nbee\ncow\n")
    data = find_splits(tmp_path / "s")["all"]
    assert data.classes == ("ant", "bee", "cow")
    assert [(data.open(i), data.targets[i]) for i in range(len(data))] == [
        (png(0), 2),
        (png(1), 0),
        (png(7), 0),
        (png(8), 2),
    ]
    assert list(data.names) == ["a-0.tar/0000.png", "a-0.tar/0001.png", "a-1.tar/7.jpg", "a-1.tar/8.png"]
    assert data.shards == [range(0, 2), range(2, 4)]
    assert data.problems == ()


def test_without_names_classes_are_the_numbers(tmp_path: Path) -> None:
    data = find_splits(write_tar(tmp_path / "a.tar", records(10, 2, 2)))["all"]
    assert (data.classes, data.targets) == (("2", "10"), [1, 0, 0])


def test_names_as_labels(tmp_path: Path) -> None:
    files = {"0.png": png(0), "0.json": b'{"label": "owl"}', "1.png": png(1), "1.json": b'{"cls": "ant"}'}
    data = find_splits(write_tar(tmp_path / "a.tar", files))["all"]
    assert (data.classes, data.targets) == (("ant", "owl"), [1, 0])


def test_the_index_of_foreign_shards_is_kept_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned = []
    real = tar_scan._scan
    monkeypatch.setattr(
        tar_scan, "_scan", lambda file, shard: scanned.append(shard_files.name_of(shard.place)) or real(file, shard)
    )
    write_tar(tmp_path / "s/0.tar", {**records(0, 1), "no.png": b""})
    write_tar(tmp_path / "s/1.tar", records(1, 0, first=5))
    first = find_splits(tmp_path / "s")["all"]
    assert scanned == ["0.tar", "1.tar"]
    again = find_splits(tmp_path / "s")["all"]
    assert scanned == ["0.tar", "1.tar"]
    assert again.problems == first.problems != ()
    assert contents(again) == contents(first)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["0.tar", "1.tar"]  # left as it was
    write_tar(tmp_path / "s/1.tar", records(1, 0, 1, first=5))
    assert len(find_splits(tmp_path / "s")["all"]) == 5
    assert scanned == ["0.tar", "1.tar", "1.tar"]
    for kept in (tmp_path / "home/shard-indexes").iterdir():
        kept.write_bytes(b"damaged")
    assert len(find_splits(tmp_path / "s")["all"]) == 5
    assert len(scanned) == 5


def test_an_index_that_cannot_be_kept_is_made_each_time(tmp_path: Path) -> None:
    write_tar(tmp_path / "s/0.tar", records(0, 1))
    (tmp_path / "home").write_text("no folder")
    for _ in range(2):
        assert len(find_splits(tmp_path / "s")["all"]) == 2


def test_the_index_that_0_1_kept_beside_the_shards_is_passed_over(tmp_path: Path) -> None:
    write_tar(tmp_path / "s/0.tar", records(0, 1))
    (tmp_path / "s/.mobilevit-index.parquet").write_bytes(b"of an older version")
    assert len(find_splits(tmp_path / "s")["all"]) == 2


def test_corrupt_records_are_counted_and_named(tmp_path: Path) -> None:
    files = {
        **records(0, 1, 0, 1),
        "a.png": png(4),  # no label
        "b.cls": b"1",  # no image
        "c.png": png(5), "c.cls": b"many",
        "d.png": png(6), "d.cls": b"9",
        "e.png": png(7), "e.json": b"{",
        "f.png": png(8), "f.cls": b"-1",
    }  # fmt: skip
    write_tar(tmp_path / "s/0.tar", {**files, "g.png": b"no image", "g.cls": b"0"})
    (tmp_path / "s/classes.txt").write_text("ant\nbee\n")
    data = find_splits(tmp_path / "s")["all"]
    assert len(data) == 5
    told = {p.file.rpartition(" ")[2]: p.kind for p in data.problems}
    assert told == {
        "a": "record without a label",
        "b": "record without an image",
        "c": "label in .cls that cannot be read",
        "d": "label outside the classes",
        "e": "label in .json that cannot be read",
        "f": "label outside the classes",
    }
    assert all(str(tmp_path / "s/0.tar") in p.file and "left out" in p.remedy for p in data.problems)
    # The loader names the image that cannot be read, and gives the others.
    loader = BatchLoader(
        data, lambda _, label: (torch.zeros(3, 1, 1, dtype=torch.uint8), label), batch_size=9, num_workers=0
    )
    (batch,) = loader.epoch()
    assert len(batch) == 4
    assert [error.partition(":")[0] for error in batch.errors] == ["0.tar/g.png"]


@pytest.mark.parametrize("cut", ["in an image", "in a header", "between records"])
def test_truncated_foreign_shard(tmp_path: Path, cut: str) -> None:
    path = write_tar(tmp_path / "0.tar", records(0, 1, 0, 1))
    with tarfile.open(path) as tar:
        third = tar.getmembers()[4]
    at = {"in an image": third.offset_data + 9, "in a header": third.offset + 99, "between records": third.offset}[cut]
    os.truncate(path, at)
    data = find_splits(path)["all"]
    assert contents(data) == {(png(0), "0"), (png(1), "1")}
    (problem,) = data.problems
    assert (problem.file, problem.kind) == (str(path), "shard cut short")
    assert "bytes are missing" in problem.detail


def test_truncated_image_behind_its_label(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", {"0.cls": b"1", "0.png": png(0), "1.cls": b"2", "1.png": png(1)})
    with tarfile.open(path) as tar:
        os.truncate(path, tar.getmembers()[3].offset_data + 9)
    data = find_splits(path)["all"]
    assert contents(data) == {(png(0), "1")}
    assert [problem.kind for problem in data.problems] == ["shard cut short"]


def test_truncated_shard_with_index(packed: Path) -> None:
    whole = find_splits(packed)["all"]
    second, everything = packed / "train-000001.tar", contents(whole)
    before = second.stat().st_size
    third = whole.open.offsets[whole.shards[1][2]]
    os.truncate(second, int(third) + 10)
    data = find_splits(packed)["all"]
    lost = len(whole.shards[1]) - 2
    assert len(data) == 18 - lost
    assert contents(data) < everything
    (problem,) = data.problems
    assert problem.file == str(second)
    assert problem.detail == f"{before - int(third) - 10:,} bytes are missing"
    assert f"last {lost} images" in problem.remedy
    # One that is cut while it is in use: the images are named, nothing ends.
    with pytest.raises(ImageError, match=r"train-000001.tar: ends before"):
        whole.open(whole.shards[1][-1])


# -- patterns and mistakes --------------------------------------------------------------------------------------------


def test_braces() -> None:
    assert expand("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand("{x,y}/{1..2}.tar") == ["x/1.tar", "x/2.tar", "y/1.tar", "y/2.tar"]
    assert expand("http://h/{0..1}.tar?key=1") == ["http://h/0.tar?key=1", "http://h/1.tar?key=1"]


def test_patterns(packed: Path, tmp_path: Path) -> None:
    whole = find_splits(packed)["all"]
    some = find_splits(f"{packed}/train-{{000001..000002}}.tar")["all"]
    assert contents(some) == set(contents(whole.subset([n for part in whole.shards[1:3] for n in part])))
    assert some.classes == whole.classes
    assert contents(find_splits(f"{packed}/*.tar")["all"]) == contents(whole)
    assert len(find_splits(packed / "train-000004.tar")["all"]) == len(whole.shards[4])
    assert not (tmp_path / "home").exists()  # its own index said all


def test_a_tar_file_beside_folders_of_images_is_no_shard(folder: Path) -> None:
    write_tar(folder / "pets.tar", {"x": b""})
    assert len(find_splits(folder)["all"]) == 18


def test_wids_index_is_not_ours(tmp_path: Path) -> None:
    write_tar(tmp_path / "s/0.tar", records(0, 1))
    (tmp_path / "s/index.json").write_text('{"wids_version": 1, "shardlist": []}')
    assert len(find_splits(tmp_path / "s")["all"]) == 2


def gzipped(folder: Path) -> str:
    with tarfile.open(folder / "0.tar", "w:gz") as tar:
        tar.add(__file__, "a.png")
    return str(folder / "0.tar")


def not_tar(folder: Path) -> str:
    (folder / "0.tar").write_bytes(b"<html>" * 500)
    return str(folder / "0.tar")


def newer(folder: Path) -> str:
    (folder / "index.json").write_text(json.dumps({"format": shards.FORMAT, "version": 2, "shards": []}))
    return str(folder)


def without_table(folder: Path) -> str:
    value = {
        "format": shards.FORMAT,
        "version": 1,
        "classes": ["a"],
        "shards": [{"name": "0.tar", "bytes": 1, "sha256": ""}],
    }
    (folder / "index.json").write_text(json.dumps(value))
    return str(folder)


def damaged(folder: Path) -> str:
    (folder / "index.json").write_text(f'{{"format": "{shards.FORMAT}", "version"')
    return str(folder)


def out_of_range(folder: Path) -> str:
    (folder / "classes.txt").write_text("only\n")
    return str(write_tar(folder / "0.tar", records(1, 2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f"{f}/none-{{0..3}}.tar", "none-0.tar: no such shard; look at"),
        (lambda f: f"{f}/none-*.tar", "matches no file; look at"),
        (lambda f: f"{f}/x-{{3..1}}.tar", "counts down"),
        (gzipped, "no tar file .*unpack it with gunzip"),
        (not_tar, "no tar file"),
        (lambda f: str(write_tar(f / "0.tar", {"a.png": png(0)})), "no record with .*a: record without a label"),
        (out_of_range, "1; there are 1 classes\\); left out; add its name to classes.txt"),
        (newer, "version 2 is of a newer mobilevit, this one reads 1; update it"),
        (without_table, "index.parquet: missing, though index.json is there"),
        (damaged, "index.json: damaged"),
        (lambda _: "nothing://x/{0..1}.tar", "cannot be read from .*nothing"),
    ],
)  # fmt: skip
def test_mistakes(
    tmp_path: Path, make: Callable[[Path], str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path)
    with pytest.raises(MobileViTError, match=message):
        find_splits(path)
    assert main(["train", "--data", path, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("package", "place", "remedy"),
    [
        ("pyarrow", "{}", r"pyarrow is not installed; pip install 'mobilevit\[train\]'"),
        ("fsspec", "memory://{}/0.tar", r"fsspec; pip install 'mobilevit\[bulk\]'"),
        ("aiohttp", "http://{}/0.tar", r"needs another package; pip install aiohttp"),
        ("s3fs", "s3://b/0.tar", r"pip install s3fs"),
    ],
)
def test_missing_packages(packed: Path, monkeypatch: pytest.MonkeyPatch, package: str, place: str, remedy: str) -> None:
    for name in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=remedy):
        find_splits(place.format(packed))


def test_shards_are_for_classification(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shards are for classification"):
        find_splits("memory://x/{0..1}.tar", "detection")


# -- elsewhere --------------------------------------------------------------------------------------------------------


class Site:
    """A server of a folder, which can fail."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.failures = 0
        site = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments, directory=str(folder))

            def do_GET(self) -> None:
                site.asked.append(self.path)
                if site.failures and self.path.endswith(".tar"):
                    site.failures -= 1
                    self.send_error(503)
                    return
                super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def fetched(self) -> list[str]:
        return sorted(path for path in self.asked if path.endswith(".tar"))


@pytest.fixture
def site(packed: Path) -> Iterator[Site]:
    site = Site(packed)
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.mark.parametrize("what", ["", "/", "/train-{000000..000004}.tar", "/*.tar"])
def test_http(site: Site, packed: Path, what: str) -> None:
    here, there = find_splits(packed)["all"], find_splits(site.url + what)["all"]
    assert site.fetched() == []  # the index says all
    assert contents(there) == contents(here)
    assert there.fingerprint() == here.fingerprint()
    assert contents(find_splits(site.url + what)["all"]) == contents(here)
    assert site.fetched() == [f"/train-00000{n}.tar" for n in range(5)]  # once each


def test_http_parts(folder: Path, tmp_path: Path) -> None:
    write_shards(folder, tmp_path / "divided", val_fraction=0.3)
    site = Site(tmp_path / "divided")
    here, there = find_splits(tmp_path / "divided"), find_splits(site.url)
    assert {part: contents(data) for part, data in there.items()} == {
        part: contents(data) for part, data in here.items()
    }
    site.server.shutdown()
    site.server.server_close()


def test_http_without_index(site: Site, packed: Path) -> None:
    here = find_splits(packed)["all"]
    (packed / "index.json").unlink()
    (packed / "classes.txt").write_text("\n".join(here.classes))
    there = find_splits(site.url + "/train-{000000..000004}.tar")["all"]
    assert contents(there) == contents(here)
    assert len(site.fetched()) == 5  # one pass for headers and images alike
    find_splits(site.url + "/train-{000000..000004}.tar")
    assert len(site.fetched()) == 5


def test_a_server_that_fails_twice(site: Site, packed: Path) -> None:
    data = find_splits(site.url)["all"]
    site.failures = 2
    assert data.open(0) == find_splits(packed)["all"].open(0)
    assert site.fetched() == ["/train-000000.tar"] * 3


def test_a_dead_server(site: Site, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = find_splits(site.url)["all"]
    site.failures = 99
    with pytest.raises(
        MobileViTError, match=rf"{site.url}/train-000000.tar: cannot be fetched after 6 tries \(503.*is the server up"
    ):
        data.open(0)
    assert len(site.fetched()) == 6
    assert [p for p in (tmp_path / "cache").iterdir() if p.suffix == ".tar"] == []
    # From a reading process, too, it is one line.
    told = ["train", "--data", site.url, "--val-data", str(packed), "--num-workers", "1", "--image-size", "32"]
    assert main([*told, "--epochs", "1", "--out", str(tmp_path / "run"), "--device", "cpu"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert said[0].startswith(f"error: {site.url}/train-")


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(MobileViTError, match=rf"http://127.0.0.1:{port}/index.json: cannot be fetched after 6 tries"):
        find_splits(f"http://127.0.0.1:{port}")


def test_missing_elsewhere(site: Site) -> None:
    with pytest.raises(MobileViTError, match=r"none-0.tar: no such shard"):
        find_splits(site.url + "/none-{0..1}.tar")
    with pytest.raises(MobileViTError, match="no shards there"):
        find_splits(site.url + "/nowhere")


def test_memory(packed: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in packed.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    assert contents(find_splits("memory://bucket")["all"]) == contents(find_splits(packed)["all"])
    # A shard that is shorter than its index says is fetched twice, then its whole records are used.
    whole = memory.cat("/bucket/train-000001.tar")
    memory.pipe("/bucket/train-000001.tar", whole[: len(whole) // 2])
    data = find_splits("memory://bucket")["all"]
    shard_files.opened.cache_clear()  # as in another process, which has nothing open
    fetched, real = [], type(memory).get_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOBILEVIT_SHARD_CACHE", str(packed / "fresh"))
        patch.setattr(type(memory), "get_file", lambda *a, **k: fetched.append(a[1]) or real(*a, **k))
        good = 0
        for number in data.shards[1]:
            with contextlib.suppress(ImageError):
                good += bool(data.open(number))
        assert 0 < good < len(data.shards[1])
        assert len(fetched) == 2


def test_the_cache_is_bounded_and_readers_are_not_disturbed(
    site: Site, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = find_splits(packed)["all"], find_splits(site.url)["all"]
    sizes = [path.stat().st_size for path in sorted(packed.glob("*.tar"))]
    bound = sizes[0] + sizes[1] + 100
    monkeypatch.setenv("MOBILEVIT_SHARD_CACHE_GB", str(bound / 1e9))
    for shard in (0, 1, 0):
        there.open(there.shards[shard][0])
    time.sleep(0.02)
    shard_files.open_shard(there.open.shards[0]).close()  # as another process does, which has nothing open
    time.sleep(0.02)
    there.open(there.shards[2][0])
    kept = sorted(p.name[-10:] for p in (tmp_path / "cache").glob("*.tar"))
    assert kept == ["000000.tar", "000002.tar"]  # the second had not been used for longest
    asked = len(site.fetched())
    first = there.shards[1][0]
    assert there.open(first) == here.open(first)  # removed, and still open
    assert len(site.fetched()) == asked
    monkeypatch.setenv("MOBILEVIT_SHARD_CACHE_GB", "little")
    with pytest.raises(MobileViTError, match="MOBILEVIT_SHARD_CACHE_GB is 'little'"):
        there.open(there.shards[3][0])


def _read_all(data: Any, results: Any) -> None:
    results.put(hashlib.sha256(b"".join(sorted(pixels for pixels, _ in contents(data)))).hexdigest())


def test_processes_fetch_each_shard_once(site: Site, packed: Path) -> None:
    data = find_splits(site.url)["all"]
    data.open(0)  # what a parent has open is not its children's to move about in
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_read_all, args=(data, results)) for _ in range(2)]
    for process in processes:
        process.start()
    digests = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    expected = hashlib.sha256(
        b"".join(sorted(pixels for pixels, _ in contents(find_splits(packed)["all"])))
    ).hexdigest()
    assert digests == {expected}
    assert site.fetched() == [f"/train-00000{n}.tar" for n in range(5)]


# -- in use -----------------------------------------------------------------------------------------------------------


def test_subset_and_relabel(packed: Path) -> None:
    data = find_splits(packed)["all"]
    assert data.subset([3, 1]).shards is None
    assert data.subset([3, 1]).open(1) == data.open(1)
    assert data.relabel(data.classes[::-1]).shards == data.shards


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_has_every_image_once(packed: Path, folder: Path, num_workers: int) -> None:
    data = find_splits(packed)["all"]

    def transform(image: EncodedImage, label: int) -> tuple[torch.Tensor, int]:
        red, green, _ = image.decode().getpixel((0, 0))
        return torch.tensor([red, green, 0], dtype=torch.uint8)[:, None, None], label

    loader = BatchLoader(data, transform, batch_size=4, num_workers=num_workers, shuffle_seed=3)
    loader.start(1)
    seen = sorted(n for batch in loader.epoch() for n in batch.images[:, 0, 0, 0].tolist())
    assert seen == sorted(numbers(find_splits(folder)["all"]))


def test_command_then_training(
    shapes: Path, tmp_path: Path, tiny: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "packed"
    assert (
        main(["data", "shard", str(shapes), "--out", str(out), "--max-mb", "0.03", "--val-fraction", "0.2", "--json"])
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert (told["images"], told["left_out"]) == (60, [])
    assert told["shards"] > 2
    of_folder, _ = load_train_val(shapes, val_path=None, val_fraction=0.2, seed=0)
    of_shards, _ = load_train_val(out, val_path=None, val_fraction=0.2, seed=0)
    assert contents(of_shards) == contents(of_folder)
    read, real = [], ShardImages.__call__

    def record(self: ShardImages, number: int) -> bytes:
        read.append(real(self, number))
        return read[-1]

    monkeypatch.setattr(ShardImages, "__call__", record)
    result = train(dataclasses.replace(tiny, data=out, epochs=1))
    # The epoch comes first, then the images held out.
    assert set(read[: len(of_folder)]) == {pixels for pixels, _ in contents(of_folder)}
    assert result.report.num_images == 60 - len(of_folder)
    config = TrainConfig.from_json(tmp_path / "run/config.json")
    assert config.data == out
    assert main(["data", "check", str(out), "--out", str(tmp_path / "sheet.png")]) == 0


def test_ctrl_c_on_the_command_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in/a").mkdir(parents=True)
    Image.effect_noise((1500, 1500), 50).save(tmp_path / "in/a/0.png")
    for number in range(1, 150):
        os.link(tmp_path / "in/a/0.png", tmp_path / f"in/a/{number}.png")
    command = [
        sys.executable,
        "-m",
        "mobilevit",
        "data",
        "shard",
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
        "--max-mb",
        "5",
        "--shorter-side",  # takes seconds rather than moments
        "1400",
    ]
    # Ctrl-C reaches it also where the tests themselves run in the background.
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    deadline = time.monotonic() + 120  # a busy machine starts it slowly
    while not list((tmp_path / "out").glob(".writing-*/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said.decode().strip()) == (1, "interrupted")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_url_survives_settings(tmp_path: Path) -> None:
    url = "https://example.org/s/train-{000000..000009}.tar"
    config = TrainConfig(data=url, val_data="local/val")
    assert (config.data, config.val_data) == (url, Path("local/val"))
    (tmp_path / "config.json").write_text(config.to_json())
    assert TrainConfig.from_json(tmp_path / "config.json") == config
