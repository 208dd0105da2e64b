from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

import mobilevit
from mobilevit.cli import main
from mobilevit.data.shapes import render_scene
from mobilevit.exporting.export import export
from mobilevit.runtime import bulk
from mobilevit.runtime.bulk import BulkReport, PredictOptions, predict_in_bulk
from mobilevit.runtime.predictor import Predictor
from mobilevit.runtime.sources import find_sources

CLASSES = ("circle", "cross", "ring")
TASKS = ("classification", "detection", "segmentation")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images in two folders, one of them named in Chinese, and two that cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(40):
        path = folder / ("花" if number % 2 else "a") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        render_scene(number, size=48 + number % 3).image.save(path)
    (folder / "a" / "empty.jpg").write_bytes(b"")
    (folder / "a" / "text.jpg").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    mode = {"classification": "crop", "detection": "stretch", "segmentation": "pad"}
    for task in TASKS:
        model = mobilevit.create_model("mobilevit_xxs", task=task, num_classes=3)
        preprocessing = mobilevit.Preprocessing(size=(64, 64), resize_mode=mode[task])
        mobilevit.save(model, folder / f"{task}.safetensors", classes=CLASSES, preprocessing=preprocessing)
    return folder


def options(**changes: Any) -> PredictOptions:
    return PredictOptions(**{"batch_size": 4, "device": "cpu"} | changes)


def run(models: Path, out: Path, sources: list[str], task: str = "classification", **changes: Any) -> BulkReport:
    return predict_in_bulk(models / f"{task}.safetensors", sources, out, options(**changes))


def rows_in(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]


def test_rows_are_the_predictors_results(
    photos: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "PART_ROWS", 10)
    sources = find_sources([str(photos)])
    report = run(models, tmp_path, sources)
    assert (report.num_written, report.num_before, report.num_errors, report.stopped) == (42, 0, 2, False)
    rows = rows_in(tmp_path)
    assert [row["source"] for row in rows] == sources
    assert len(list(tmp_path.glob("part-*.parquet"))) == 4  # 12, 12, 12 and the rest: whole batches of four
    predictor = Predictor(models / "classification.safetensors", batch_size=4, device="cpu")
    for row, result in zip(rows, predictor.stream(sources), strict=True):
        if isinstance(result, mobilevit.ImageError):
            assert str(result) == f"{row['source']}: {row['error']}"
            assert [row[name] for name in ("label", "probability", "top", "width")] == [None] * 4
        else:
            assert row["error"] is None
            assert (row["label"], row["probability"]) == (result.label, pytest.approx(result.probability, abs=1e-6))
            assert [(e["label"], pytest.approx(e["probability"], abs=1e-6)) for e in row["top"]] == result.top(3)
            assert (row["width"], row["height"]) == result.image.size


def test_objects(photos: Path, models: Path, tmp_path: Path) -> None:
    sources = find_sources([str(photos / "花")])[:6]
    run(models, tmp_path, sources, "detection", min_score=0.0)
    predictor = Predictor(models / "detection.safetensors", batch_size=4, device="cpu")
    for row, result in zip(rows_in(tmp_path), predictor(sources), strict=True):
        assert len(row["detections"]) == len(result) > 0
        edges = [[found[edge] for edge in ("left", "top", "right", "bottom")] for found in row["detections"]]
        assert np.allclose(edges, result.boxes_xyxy, atol=1e-3)
        assert [found["label"] for found in row["detections"]] == result.labels
        assert np.allclose([found["score"] for found in row["detections"]], result.scores, atol=1e-6)


def test_shares_and_masks(photos: Path, models: Path, tmp_path: Path) -> None:
    sources = [*find_sources([str(photos / "花")])[:5], str(photos / "a" / "empty.jpg")]
    run(models, tmp_path / "rows", sources, "segmentation", masks=tmp_path / "masks")
    *rows, bad = rows_in(tmp_path / "rows")
    predictor = Predictor(models / "segmentation.safetensors", batch_size=4, device="cpu")
    for row, result in zip(rows, predictor(sources[:-1]), strict=True):
        assert {entry["label"]: entry["share"] for entry in row["shares"]} == pytest.approx(result.shares)
        assert np.array_equal(np.asarray(Image.open(row["mask"])), result.label_map)
    assert len({row["mask"] for row in rows}) == 5
    assert (bad["mask"], bad["error"]) == (None, "the file is empty")


def test_a_long_name_has_a_mask(photos: Path, models: Path, tmp_path: Path) -> None:
    source = tmp_path / f"{'花' * 80}.png"
    source.write_bytes((photos / "a" / "0.png").read_bytes())
    run(models, tmp_path / "rows", [str(source)], "segmentation", masks=tmp_path / "masks")
    (row,) = rows_in(tmp_path / "rows")
    assert Path(row["mask"]).name.startswith("花" * 50 + "-")
    assert Image.open(row["mask"]).size == (48, 48)


def test_threads_bound_what_works_at_once(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def note(*_: object, workers: int, **__: object) -> Any:
        seen.append((workers, torch.get_num_threads()))
        return iter(())

    monkeypatch.setattr(bulk, "predict_rows", note)
    for changes in ({"threads": 1}, {"threads": 3}, {"threads": 3, "workers": 2}):
        list(bulk._local_rows(models / "classification.safetensors", ["x"], options(**changes), lambda: False))
    assert seen == [(1, 1), (3, 1), (2, 1)]


def test_exported_files_answer_alike(photos: Path, models: Path, tmp_path: Path) -> None:
    sources = find_sources([str(photos / "花")])
    model = mobilevit.load(models / "classification.safetensors")
    report = export(model, tmp_path / "onnx", format="onnx", name="m")
    run(models, tmp_path / "torch", sources)
    predict_in_bulk(report.path, sources, tmp_path / "rows", PredictOptions(batch_size=4))
    for one, other in zip(rows_in(tmp_path / "torch"), rows_in(tmp_path / "rows"), strict=True):
        assert one["label"] == other["label"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)


def test_a_second_run_adds_only_what_is_new(photos: Path, models: Path, tmp_path: Path) -> None:
    sources = find_sources([str(photos)])
    run(models, tmp_path, sources[:20])
    before = {path: path.read_bytes() for path in tmp_path.glob("part-*")}
    assert run(models, tmp_path, sources[:20]).num_written == 0
    assert {path: path.read_bytes() for path in tmp_path.glob("part-*")} == before
    report = run(models, tmp_path, sources)
    assert (report.num_before, report.num_written) == (20, 22)
    assert [row["source"] for row in rows_in(tmp_path)] == sources


# Slow, so that there is time to kill it.
SCRIPT = """
import sys, time
from pathlib import Path
from mobilevit.runtime import bulk
from mobilevit.runtime.sources import find_sources
prepare = bulk.Predictor.prepare
bulk.Predictor.prepare = lambda *a, **k: (time.sleep(0.05), prepare(*a, **k))[1]
model, photos, out = map(Path, sys.argv[1:])
bulk.PART_ROWS = 4
options = bulk.PredictOptions(batch_size=2, workers=1, threads=1)
sys.exit(bulk.predict_in_bulk(model, find_sources([str(photos)]), out, options).stopped)
"""


def start(models: Path, photos: Path, out: Path, parts: int) -> subprocess.Popen[bytes]:
    """A process that has written so many parts, and is at work."""
    command = [sys.executable, "-c", SCRIPT, str(models / "classification.safetensors"), str(photos), str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("part-*.parquet"))) < parts and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    return process


def test_killed_and_started_again(photos: Path, models: Path, tmp_path: Path) -> None:
    for parts in (2, 5):
        process = start(models, photos, tmp_path, parts)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = len(rows_in(tmp_path))
    assert 20 <= before < 42
    (tmp_path / ".part-000099.parquet.abc.parquet").write_bytes(b"half")  # as a kill in writing leaves it
    sources = find_sources([str(photos)])
    report = run(models, tmp_path, sources)
    assert report.num_before == before
    assert Counter(row["source"] for row in rows_in(tmp_path)) == Counter(sources)
    assert not list(tmp_path.glob(".part*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_what_is_done(number: signal.Signals, photos: Path, models: Path, tmp_path: Path) -> None:
    process = start(models, photos, tmp_path, 2)
    with pytest.raises(ValueError, match=r"another process is writing into it"):
        run(models, tmp_path, find_sources([str(photos)]))
    process.send_signal(number)
    assert process.wait(timeout=60) == 1
    rows = [row["source"] for row in rows_in(tmp_path)]
    sources = find_sources([str(photos)])
    assert 8 <= len(rows) < 42
    assert rows == sources[: len(rows)]  # nothing that was read is lost


def test_images_of_a_store(photos: Path, models: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for path in sorted(photos.rglob("*.png"))[:5]:
        store.pipe(f"/bucket/{path.parent.name}/{path.name}", path.read_bytes())
    store.pipe("/bucket/notes.txt", b"no image by its name")
    store.pipe("/bucket/.thumbs/0.png", b"hidden")
    sources = find_sources(["memory://bucket"])
    assert len(sources) == 5
    run(models, tmp_path / "remote", [*sources, "memory://bucket/gone.png"])
    *rows, gone = rows_in(tmp_path / "remote")
    assert gone["error"] == "no such file"
    run(models, tmp_path / "local", [str(path) for path in sorted(photos.rglob("*.png"))[:5]])
    assert [row["top"] for row in rows] == [row["top"] for row in rows_in(tmp_path / "local")]
    assert Predictor(models / "classification.safetensors", device="cpu")(sources[0]).label == rows[0]["label"]
    with pytest.raises(ValueError, match=r"memory://bucket/\*\.webp: matches no file"):
        find_sources(["memory://bucket/*.webp"])
    (url,) = find_sources([f"{(photos / 'a').as_uri()}/0.p*"])
    assert url.endswith("/a/0.png")
    assert find_sources([photos.as_uri()]) == find_sources([photos.as_uri()] * 2)
    with pytest.raises(ValueError, match="nothing://there: cannot be read from"):
        find_sources(["nothing://there"])


def test_names_that_are_not_utf8(photos: Path, models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    image = (photos / "a" / "0.png").read_bytes()
    try:
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(image)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    sources = find_sources([str(folder)])
    run(models, tmp_path / "rows", sources)
    assert run(models, tmp_path / "rows", sources).num_before == 1
    (row,) = rows_in(tmp_path / "rows")
    assert (row["source"], row["error"]) == (f"{folder}/caf\\udce9.png", None)


def test_other_rows_are_not_mixed_in(photos: Path, models: Path, tmp_path: Path) -> None:
    sources, out = [str(photos / "a" / "0.png")], tmp_path / "rows"
    run(models, out, sources)
    with pytest.raises(ValueError, match=r"with other settings \(top is now 1, was 3\); `overwrite` replaces them"):
        run(models, out, sources, top=1)
    with pytest.raises(ValueError, match=r"\(task is now segmentation, was classification\)"):
        run(models, out, sources, "segmentation")
    other = mobilevit.load(models / "classification.safetensors")
    other.classifier.bias.data += 1
    mobilevit.save(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"\(it is another model\)"):
        predict_in_bulk(tmp_path / "other.safetensors", sources, out, PredictOptions())
    run(models, out, sources, "segmentation", overwrite=True)
    assert "shares" in rows_in(out)[0]
    with pytest.raises(ValueError, match=r"contains other files; choose a new folder"):
        run(models, photos, sources)
    with pytest.raises(ValueError, match=r"is a file; `out` is a folder"):
        run(models, photos / "a" / "0.png", sources)
    assert (photos / "a" / "0.png").exists()


def test_few_images_wait_in_memory(photos: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, no more are read ahead than some batches, and none keeps its full size."""
    taken = 0

    def endless() -> Any:
        nonlocal taken
        for name in itertools.cycle(find_sources([str(photos / "花")])):
            taken += 1
            yield name

    predictor = Predictor(models / "classification.safetensors", batch_size=4, device="cpu")
    prepared = predictor.prepare(str(photos / "a" / "0.png"), "a", keep_image=False)
    assert (prepared.info.image, prepared.info.size) == (None, (48, 48))
    batches = bulk.predict_rows(predictor, endless(), options(), workers=2, side_by_side=True)
    for number in range(1, 6):
        assert len(next(batches)) == 4
        assert taken <= 4 * (number + 4)
    batches.close()


def test_missing_packages(photos: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"ray is not installed; pip install 'mobilevit\[ray\]'"):
        run(models, tmp_path, [str(photos / "a" / "0.png")], engine="ray")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pyarrow is not installed; pip install 'mobilevit\[bulk\]'"):
        run(models, tmp_path, [str(photos / "a" / "0.png")])
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ValueError, match=r"needs fsspec; pip install 'mobilevit\[bulk\]'"):
        find_sources(["s3://bucket/photos"])


def test_command(photos: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["predict", str(models / "classification.safetensors"), str(photos), "--out", str(tmp_path / "rows")]
    assert main([*told, "--json"]) == 2  # two cannot be read; the others are done
    assert json.loads(capsys.readouterr().out)["num_errors"] == 2
    assert main(told) == 0
    assert "0 images" in capsys.readouterr().out
    (tmp_path / "nothing").mkdir()
    for arguments, message in (
        ([*told, "--save", "x"], "--save and --out do not go together"),
        ([*told[:3], "--engine", "ray"], "--engine ray is for parquet files; name a folder for them with --out"),
        ([*told, "--masks", "x"], "--masks is for segmentation; this model does classification"),
        ([*told, "--ray-address", "auto"], "--ray-address is for --engine ray"),
        ([*told, "--workers", "0"], "--workers is 0; give 1 or more"),
        (["predict", "gone.safetensors", *told[2:]], "gone.safetensors"),
        ([*told[:2], str(tmp_path / "nothing"), *told[3:]], "nothing: no images in this folder"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_ray_gives_the_same_rows(photos: Path, models: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    run(models, tmp_path / "here", find_sources([str(photos)]))
    command = [
        sys.executable, "-m", "mobilevit", "predict", str(models / "classification.safetensors"), photos.name,
        "--out", str(tmp_path / "ray"), "--engine", "ray", "--workers", "1", "--batch-size", "4", "--json",
    ]  # fmt: skip
    for wanted in ((0, 42, 2), (42, 0, 0)):
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, cwd=photos.parent)
        assert done.returncode == (2 if wanted[2] else 0), done.stderr
        report = json.loads(done.stdout)
        assert (report["num_before"], report["num_written"], report["num_errors"]) == wanted
    there = {row["source"]: row for row in rows_in(tmp_path / "ray")}
    assert len(there) == len(rows_in(tmp_path / "ray")) == 42
    for row in rows_in(tmp_path / "here"):
        other = there[str(Path(row["source"]).relative_to(photos.parent))]
        assert (other["label"], other["error"]) == (row["label"], row["error"])
        assert other["probability"] == pytest.approx(row["probability"], abs=2e-5)
