"""The programs in `examples/` run where nothing but a runtime, numpy and Pillow is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import mobilevit
from golden_weights import fill_with_golden_weights
from mobilevit.data.shapes import render_scene
from mobilevit.exporting.export import export

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNTIMES = {"onnx_runtime": ("onnx", "onnxruntime"), "openvino_runtime": ("openvino", "openvino")}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "scene.png"
    render_scene(5, size=160, num_objects=3).image.crop((0, 0, 160, 100)).save(path)
    return path


@pytest.fixture(scope="module", params=RUNTIMES)
def consumer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Format, program, and the Python of an environment that holds its runtime alone."""
    format_, package = RUNTIMES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", package, "numpy", "pillow"]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"{package} cannot be installed here: {installed.stderr.strip().splitlines()[-1]}")
    return format_, EXAMPLES / f"{request.param}.py", python


def answer(consumer: tuple[str, Path, Path], artifact: Path, image: Path) -> object:
    _, program, python = consumer
    told = subprocess.run([python, "-I", program, artifact, image], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout)


@pytest.mark.parametrize("baked", [False, True])
def test_a_program_without_pytorch_answers_as_the_predictor(
    consumer: tuple[str, Path, Path], image: Path, tmp_path: Path, baked: bool
) -> None:
    model = fill_with_golden_weights(mobilevit.create_model("mobilevit_xxs", classes=["a", "b", "c", "d"]))
    checkpoint = mobilevit.save(
        model, tmp_path / "m.safetensors", preprocessing=mobilevit.Preprocessing(size=(64, 128), mean=(0.2, 0.3, 0.4))
    )
    artifact = export(checkpoint, tmp_path, format=consumer[0], bake_preprocessing=baked).path
    expected = dict(mobilevit.Predictor(checkpoint, device="cpu")(image).top(3))
    told = answer(consumer, artifact, image)
    assert isinstance(told, dict)
    assert list(told) == list(expected)
    assert told == pytest.approx(expected, abs=2e-4)


def test_it_reads_detectors_and_segmenters(consumer: tuple[str, Path, Path], image: Path, tmp_path: Path) -> None:
    for task, mode in (("segmentation", "pad"), ("detection", "stretch")):
        model = mobilevit.create_model("mobilevit_xxs", task=task, classes=["a", "b", "c"])
        checkpoint = mobilevit.save(
            model,
            tmp_path / f"{task}.safetensors",
            preprocessing=mobilevit.Preprocessing(size=(64, 64), resize_mode=mode),
            score_threshold=0.2 if task == "detection" else None,
        )
        told = answer(consumer, export(checkpoint, tmp_path, format=consumer[0]).path, image)
        if isinstance(told, dict):
            assert sum(told.values()) == pytest.approx(1, abs=1e-4)
        else:
            assert isinstance(told, list)
            assert all(label in ("a", "b", "c") and score > 0.2 and len(box) == 4 for label, score, box in told)


def test_the_programs_are_short() -> None:
    """A reader takes them in at a glance."""
    for program in EXAMPLES.glob("*.py"):
        assert len(program.read_text().splitlines()) <= 50
        assert "mobilevit" not in [line.split()[1] for line in program.read_text().splitlines() if "import " in line]
    assert sys.version_info >= (3, 11)
