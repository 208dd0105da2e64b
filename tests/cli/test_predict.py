"""`mobilevit predict`: what it reads, what it writes, and how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mobilevit
from golden_weights import fill_with_golden_weights
from mobilevit.card import TaskName
from mobilevit.cli import main
from mobilevit.cli.predict import _is_image
from mobilevit.data.shapes import render_scene
from unprivileged import locked_folder

TASKS: tuple[TaskName, ...] = ("classification", "detection", "segmentation")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small checkpoint of each task."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for task in TASKS:
        model = fill_with_golden_weights(mobilevit.create_model("mobilevit_xxs", task=task, num_classes=3))
        preprocessing = mobilevit.Preprocessing(size=(64, 64), resize_mode="stretch")
        path = mobilevit.save(
            model, folder / f"{task}.safetensors", classes=["a", "b", "c"], preprocessing=preprocessing
        )
        found[task] = str(path)
    return found


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photos") / "one.png"
    render_scene(0, size=80).image.save(path)
    return str(path)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that is refused with status 2."""
    capsys.readouterr()
    assert main(["predict", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    return told.removeprefix("error: ").strip()


def test_files_of_detection_and_segmentation(
    models: dict[str, str], photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = str(tmp_path / "objects.json")
    detect = ["predict", models["detection"], photo, photo, "--coco", coco, "--min-score", "0"]
    assert main([*detect, "--save", str(tmp_path / "drawn")]) == 0
    capsys.readouterr()
    assert main([*detect, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[0])["detections"]
    objects = json.loads(Path(coco).read_text())
    assert {row["image_id"] for row in objects} == {1, 2}
    first = [row for row in objects if row["image_id"] == 1]
    assert [row["score"] for row in first] == [row["score"] for row in shown]
    assert {row["file_name"] for row in objects} == {photo}
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["one-2.jpg", "one.jpg"]
    assert main(["predict", models["segmentation"], photo, "--masks", str(tmp_path / "masks")]) == 0
    mask = np.asarray(Image.open(tmp_path / "masks" / "one.png"))
    expected = mobilevit.Predictor(models["segmentation"], device="cpu")(photo)
    assert np.array_equal(mask, expected.label_map)


def test_options_that_do_not_fit(models: dict[str, str], photo: str, capsys: pytest.CaptureFixture[str]) -> None:
    classifier, segmenter = models["classification"], models["segmentation"]
    for arguments, message in (
        ([classifier], "no images; name files, folders, globs, or - for standard input"),
        ([classifier, photo, "--min-score", "0.5"], "--min-score is for detection; this model does classification"),
        ([segmenter, photo, "--coco", "x.json"], "--coco is for detection; this model does segmentation"),
        ([classifier, photo, "--masks", "x"], "--masks is for segmentation; this model does classification"),
        ([classifier, photo, "--top", "0"], "--top is 0; give 1 or more"),
        ([classifier, photo, "--threads", "0"], "--threads is 0; give 1 or more"),
        ([classifier, photo, "--batch-size", "0"], "--batch-size is 0; give 1 or more"),
        ([classifier, photo, "--overwrite"], "--overwrite is for parquet files; name a folder for them with --out"),
    ):
        assert refusal(arguments, capsys) == message


def test_places_that_cannot_be_read_or_written(
    models: dict[str, str], photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    there = str(tmp_path / "file" / "out")
    for arguments in (
        [models["classification"], photo, "--save", there],
        [models["segmentation"], photo, "--masks", there],
        [models["detection"], photo, "--coco", there],
        [models["classification"], photo, "--out", there],
    ):
        told = refusal(arguments, capsys)
        assert told.startswith(there)
        assert "cannot be written" in told
    assert refusal([models["classification"], photo, "--out", str(tmp_path / "file")], capsys).endswith(
        "is a file; --out is a folder for parquet files"
    )
    assert refusal([models["detection"], photo, "--coco", str(tmp_path)], capsys).startswith(f"{tmp_path}: cannot be")
    with locked_folder(models["classification"], photo) as folder:
        model, image = str(folder.parent / "classification.safetensors"), str(folder.parent / "one.png")
        told = refusal([model, image, "--save", str(folder)], capsys)
        assert told == f"{folder}/one.jpg: cannot be written (Permission denied); choose another place"
        told = refusal([model, image, "--out", str(folder / "rows")], capsys)
        assert told == f"{folder}/rows: cannot be written (Permission denied); choose another place"
        assert refusal([model, str(folder)], capsys) == f"{folder}: cannot be read (Permission denied)"


def piped(arguments: list[str], stdin: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "mobilevit", "predict", *arguments, "--device", "cpu"]
    return subprocess.run(command, stdin=stdin, capture_output=True, timeout=120, check=False)  # type: ignore[call-overload]


def test_standard_input_that_cannot_be_read(models: dict[str, str], tmp_path: Path) -> None:
    with (tmp_path / "written").open("wb") as write_only:
        for more in ([], ["--out", str(tmp_path / "rows")]):
            done = piped([models["classification"], "-", *more], write_only)
            told = done.stderr.decode()
            assert (done.returncode, told) == (2, "error: standard input: cannot be read (Bad file descriptor)\n")
    script = f"{sys.executable} -m mobilevit predict {models['classification']} - <&-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard input is closed")


def test_a_name_that_is_not_utf8(
    models: dict[str, str], photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        Path(os.fsdecode(odd)).write_bytes(Path(photo).read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    assert main(["predict", models["classification"], str(tmp_path)]) == 0
    assert "caf\\udce9.png" in capsys.readouterr().out
    (tmp_path / "list.txt").write_bytes(odd + b"\n")
    with (tmp_path / "list.txt").open("rb") as names:
        done = piped([models["classification"], "-", "--json"], names)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"] == os.fsdecode(odd)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_images_are_told_from_lists_of_paths(kind: str, tmp_path: Path) -> None:
    Image.new("RGB", (9, 7)).save(tmp_path / "image", kind)
    assert _is_image((tmp_path / "image").read_bytes()[:64])


@pytest.mark.parametrize("line", [b"BMW/front.jpg\n", b"RIFFRAFF/a.jpg\n", b"a.jpg\n", b"", b"/data/\xe9.png"])
def test_lists_of_paths_are_told_from_images(line: bytes) -> None:
    assert not _is_image(line[:64])
