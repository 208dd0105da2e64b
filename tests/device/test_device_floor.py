"""The device floor in an environment that has no PyTorch; `make test` sets that up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

import mobilevit

TASKS = ("classification", "detection", "segmentation")
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "litert": ".tflite"}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mobilevit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def refused(*arguments: object) -> str:
    """The one line of a command that must be refused."""
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_there_is_no_torch_here(files: Path) -> None:
    assert files.is_dir()
    for name in ("torch", "torchvision", "safetensors", "matplotlib", "torchmetrics"):
        assert find_spec(name) is None, f"{name} is installed, so these tests would show nothing"


@pytest.mark.parametrize("engine", SUFFIXES)
@pytest.mark.parametrize("task", TASKS)
def test_predictions_are_those_of_pytorch(files: Path, task: str, engine: str) -> None:
    expected = json.loads((files / (f"{task}-litert.json" if engine == "litert" else f"{task}.json")).read_text())
    predictor = mobilevit.Predictor(files / f"{task}{SUFFIXES[engine]}")
    assert predictor.engine == f"{engine} fp32"
    for want, result in zip(expected, predictor([files / want["source"] for want in expected]), strict=True):
        found = result.to_dict(min_score=0.0)
        if task == "classification":
            assert [top["label"] for top in found["top"]] == [top["label"] for top in want["top"]]
            for one, other in zip(found["top"], want["top"], strict=True):
                assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)
        elif task == "segmentation":
            assert (found["width"], found["height"]) == (want["width"], want["height"])
            assert found["shares"] == pytest.approx(want["shares"], abs=2e-3)
        else:
            assert len(found["detections"]) == len(want["detections"]) > 0
            scores = [[one["score"] for one in each["detections"]] for each in (found, want)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-4)
            # Equal scores may come in another order.
            boxes = [
                sorted((one["label"], *map(round, one["box_xyxy"])) for one in e["detections"]) for e in (found, want)
            ]
            same = sum(one in boxes[1] for one in boxes[0])
            assert same >= 0.97 * len(boxes[0])


def test_predict_prints_draws_and_writes_tables(files: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    model = files / "detection.onnx"
    done = run("predict", model, files / "0.png", "--json", "--save", tmp_path / "drawn")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"] == str(files / "0.png")
    assert (tmp_path / "drawn" / "0.jpg").stat().st_size > 1000
    done = run("predict", files / "segmentation.xml", files / "0.png", "--masks", tmp_path / "masks")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "masks" / "0.png").exists()
    done = run("predict", files / "classification.onnx", files, "--out", tmp_path / "rows")
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(tmp_path / "rows").to_pylist()
    assert sorted(Path(row["source"]).name for row in rows) == ["0.png", "1.png", "2.png", "3.png"]
    assert all(row["label"] in ("ant", "bee", "cat", "dog", "eel") for row in rows)


@contextmanager
def serving(model: Path) -> Iterator[tuple[str, int]]:
    """The address of a service and the id of its process."""
    command = [sys.executable, "-m", "mobilevit", "serve", str(model), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().split()[-1], server.pid
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0


@pytest.mark.parametrize("task", TASKS)
def test_serve(files: Path, task: str) -> None:
    with serving(files / f"{task}.onnx") as (address, _):
        request = urllib.request.Request(
            f"{address}/v1/predict", (files / "0.png").read_bytes(), {"Content-Type": "image/png"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            (found,) = json.load(answer)["results"]
        (expected, *_) = json.loads((files / f"{task}.json").read_text())
        if task == "classification":
            assert found["label"] == expected["label"]
        elif task == "segmentation":
            assert found["shares"] == pytest.approx(expected["shares"], abs=2e-3)
        else:
            assert (found["width"], found["height"]) == (expected["width"], expected["height"])
        with urllib.request.urlopen(address, timeout=30) as page:
            assert b"<html" in page.read()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/v1/explain", (files / "0.png").read_bytes(), timeout=30)


def test_a_worker_stays_small(files: Path) -> None:
    with serving(files / "classification.onnx") as (address, process):
        data = (files / "0.png").read_bytes()
        for _ in range(100):
            request = urllib.request.Request(f"{address}/v1/predict", data, {"Content-Type": "image/png"})
            urllib.request.urlopen(request, timeout=30).close()
        assert psutil.Process(process).memory_info().rss < 220e6


def test_info_reads_the_sidecar(files: Path) -> None:
    done = run("info", files / "classification.onnx", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["format"], told["precision"], told["task"]) == ("onnx", "fp32", "classification")
    assert told["classes"] == ["ant", "bee", "cat", "dog", "eel"]
    assert "classification" in run("info", files / "classification.onnx").stdout


def test_what_needs_pytorch_says_how_to_get_it(files: Path) -> None:
    for arguments in (
        ("predict", files / "classification.safetensors", files / "0.png"),
        ("serve", files / "classification.safetensors"),
        ("info", files / "classification.safetensors"),
        ("info", "mobilevit_s"),
        ("eval", files / "classification.onnx", "--data", files),
        ("train", "--data", files),
        ("export", files / "classification.safetensors"),
    ):
        assert "pip install 'mobilevit[train]'" in refused(*arguments), arguments


def test_an_engine_that_is_not_installed(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pte"
    path.write_bytes(b"program")
    sidecar = json.loads((files / "classification.onnx.json").read_text())
    from mobilevit.runtime.artifact import Artifact, write_sidecar

    write_sidecar(path, Artifact.from_dict(sidecar | {"format": "executorch"}))
    assert "pip install 'mobilevit[executorch]'" in refused("predict", path, files / "0.png")


def test_an_artifact_without_its_sidecar(files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "classification.onnx", tmp_path)
    told = refused("predict", tmp_path / "classification.onnx", files / "0.png")
    assert "sidecar classification.onnx.json is missing; copy it beside the file" in told


def test_overview_help_and_version() -> None:
    assert "  predict  " in run("--help").stdout
    assert run("--version").stdout == f"mobilevit {mobilevit.__version__}\n"
    assert "usage: mobilevit predict" in run("predict", "--help").stdout
    assert "usage: mobilevit serve" in run("serve", "--help").stdout


def test_importing_the_package_imports_neither_engine_nor_numpy() -> None:
    script = "import sys, mobilevit; print(sorted({'numpy', 'PIL', 'onnxruntime', 'openvino'} & set(sys.modules)))"
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    assert subprocess.check_output([sys.executable, "-c", script], text=True, env=env) == "[]\n"
