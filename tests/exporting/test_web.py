"""The folder of the page; what it does in a browser is in tests/webpage."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import mobilevit
from mobilevit.cli import main
from mobilevit.data.shapes import render_scene
from mobilevit.exporting import onnx
from mobilevit.exporting.export import ExportError
from mobilevit.exporting.graph import Plan
from mobilevit.exporting.options import FORMATS
from mobilevit.exporting.web import _AT_ONCE, _FOR_GPU, RUNTIME_VARIABLE, RUNTIME_VERSION, find_runtime
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.runtime.predictor import Predictor

CLASSES = ("circle", "cross", "ring")


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder named as the runtime's, whose files say only their names: how they are packed needs no more."""
    for name in (*_AT_ONCE, *_FOR_GPU):
        path = tmp_path / "runtime" / "dist" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.setenv(RUNTIME_VARIABLE, str(tmp_path / "runtime"))
    return tmp_path / "runtime"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = mobilevit.create_model("mobilevit_xxs", classes=CLASSES)
    return mobilevit.save(
        model, tmp_path / "shapes.safetensors", classes=CLASSES, preprocessing=Preprocessing(size=(64, 64))
    )


def test_the_folder(runtime: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(checkpoint), "--format", "web", "--out", str(tmp_path / "out")]) == 0
    assert "images with the same class" in capsys.readouterr().out
    folder = tmp_path / "out" / "shapes-web"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shapes-web"]
    described = json.loads((folder / "model.json").read_text())
    assert described["classes"] == list(CLASSES)
    assert described["bytes"] == (folder / "model.onnx").stat().st_size
    told = json.loads((folder / "files.json").read_text())
    for name in told["files"]:
        assert name == "./" or (folder / name).is_file(), name
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    later = {f"runtime/{name}" for name in _FOR_GPU}
    assert there - set(told["files"]) == later | {"files.json", "README.txt"}
    assert RUNTIME_VERSION in (folder / "README.txt").read_text()
    page = (folder / "index.html").read_text()
    assert "wasm-unsafe-eval" in page
    for script in folder.glob("*.js"):
        assert "http://" not in script.read_text()
        assert "https://" not in script.read_text()
    image = render_scene(1, size=100).image
    expected = Predictor(checkpoint)(image)
    pixels = described["preprocessing"]
    resized = Preprocessing.from_dict(pixels).resize(image)[None]
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(resized)})
    shares = torch.from_numpy(logits[0]).softmax(0).numpy()
    np.testing.assert_allclose(shares, expected.probabilities, atol=1e-5)  # type: ignore[union-attr]


def test_again_replaces_all_and_a_new_version_is_told(runtime: Path, checkpoint: Path, tmp_path: Path) -> None:
    versions = []
    for name in ("old", "new"):
        (runtime / "dist" / _AT_ONCE[0]).write_text(name)
        report = mobilevit.export(checkpoint, tmp_path / "out", format="web", verify=False)
        versions.append(json.loads((report.path / "files.json").read_text())["version"])
        assert f'VERSION = "{versions[-1]}"' in (report.path / "service_worker.js").read_text()
        (report.path / "left.txt").write_text("from before")
    assert versions[0] != versions[1]
    mobilevit.export(checkpoint, tmp_path / "out", format="web", verify=False)
    assert not (report.path / "left.txt").exists()
    assert report.num_bytes > (report.path / "model.onnx").stat().st_size


def test_no_page_is_made_of_a_wrong_artifact(
    runtime: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(plan: Plan, path: Path) -> None:
        with torch.no_grad():
            plan.graph.model.classifier.bias[2] += 0.01
            onnx.convert(plan, path)
            plan.graph.model.classifier.bias[2] -= 0.01

    monkeypatch.setitem(FORMATS, "onnx", dataclasses.replace(FORMATS["onnx"], convert=spoil))
    out = tmp_path / "out"
    with pytest.raises(ExportError, match=r"model\.onnx: not written; its answers differ by up to 1\.0e-02"):
        mobilevit.export(checkpoint, out, format="web")
    assert [path.name for path in out.iterdir()] == ["report.json"]
    assert json.loads((out / "report.json").read_text())["model.onnx"]["parity"]["good"] is False


def test_mistakes(
    runtime: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(checkpoint), "--format", "web", "--out", str(tmp_path / "out")]
    assert main([*command, "--dynamic", "batch"]) == 2
    assert "a page takes one image at a time" in capsys.readouterr().err
    (runtime / "dist" / _AT_ONCE[1]).unlink()
    assert main(command) == 2
    assert f"dist/{_AT_ONCE[1]} is missing" in capsys.readouterr().err
    monkeypatch.delenv(RUNTIME_VARIABLE)
    monkeypatch.setenv("MOBILEVIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"takes onnxruntime-web@.* from npm, which is not installed; install Node"):
        find_runtime()
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error network timeout' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(ValueError, match=r"npm could not fetch .*network timeout\); connect to a network, or unpack"):
        find_runtime()
    assert not list((tmp_path / "home").glob("onnx*"))
