"""LiteRT's converter lives in an environment of its own: sh scripts/litert_environment.sh."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mobilevit import create_model
from mobilevit.exporting import litert
from mobilevit.exporting.graph import ExportGraph
from mobilevit.runtime.litert_engine import LitertSession

needs_converter = pytest.mark.skipif(
    importlib.util.find_spec("litert_torch") is None,
    reason="litert_torch is not installed; sh scripts/litert_environment.sh, then .venv-litert/bin/python -m pytest",
)
SIZE = (64, 64)


def _graph(task: str, **settings: Any) -> ExportGraph:
    """A tiny model with weights that are not those of a fresh one, where biases are zero and masks are even."""
    model = create_model("mobilevit_xxs", task=task, num_classes=3)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1 or float(parameter.detach().abs().max()) < 0.1:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return ExportGraph(model.eval(), image_size=SIZE, **settings).eval()


def _images(graph: ExportGraph, number: int) -> list[Tensor]:
    if graph.baked:
        return [torch.randint(0, 256, (1, *SIZE, 3), dtype=torch.uint8) for _ in range(number)]
    return [torch.rand(1, 3, *SIZE) for _ in range(number)]


def _written(graph: ExportGraph, path: Path, precision: str, **settings: Any) -> Path:
    images = _images(graph, 4)
    litert.convert_graph(graph, images[0], path, precision=precision, calibration=images, **settings)
    return path


@needs_converter
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_file_gives_the_graphs_outputs_in_its_order(task: str, precision: str, tmp_path: Path) -> None:
    graph = _graph(task)
    session = LitertSession(_written(graph, tmp_path / "model.tflite", precision), threads=1)
    (images,) = _images(graph, 1)
    found = session.run(images.numpy())
    expected = [output.numpy() for output in graph(images)]
    assert [output.shape for output in found] == [output.shape for output in expected]
    tolerance = {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.15}[precision]
    for ours, theirs in zip(expected, found, strict=True):
        assert np.abs(ours - theirs).max() <= tolerance * max(1, np.abs(ours).max())


@needs_converter
def test_baked_input_and_label_map_keep_their_types(tmp_path: Path) -> None:
    graph = _graph("segmentation", baked=True, label_map=True)
    (images,) = _images(graph, 1)
    (found,) = LitertSession(_written(graph, tmp_path / "model.tflite", "fp32"), threads=2).run(images.numpy())
    assert found.dtype == np.uint8
    assert (found == graph(images)[0].numpy()).mean() > 0.999


@needs_converter
def test_smaller_precisions_are_smaller_files(tmp_path: Path) -> None:
    graph = _graph("classification")
    sizes = [_written(graph, tmp_path / f"{p}.tflite", p).stat().st_size for p in ("fp32", "fp16", "int8")]
    assert sizes[1] < 0.6 * sizes[0]
    assert sizes[2] < 0.4 * sizes[0]


@needs_converter
def test_every_layer_is_found_and_the_first_stay_float(tmp_path: Path) -> None:
    graph = _graph("classification")
    modes = _modes(_written(graph, tmp_path / "model.tflite", "int8"))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in graph.modules())
    linear = sum(isinstance(module, nn.Linear) for module in graph.modules())
    kept = 1 + 3 + 3  # of the stem, and of one block each in layer1 and layer2
    assert (modes["int8"], modes["dynamic"]) == (convolutions - kept, linear)
    kept_too = _modes(_written(graph, tmp_path / "kept.tflite", "int8", keep_float=("model.layer5.1",)))
    inside = list(graph.model.get_submodule("layer5.1").modules())
    assert modes["int8"] - kept_too["int8"] == sum(isinstance(module, nn.Conv2d) for module in inside)
    assert modes["dynamic"] - kept_too["dynamic"] == sum(isinstance(module, nn.Linear) for module in inside)


def _modes(path: Path) -> dict[str, int]:
    """How many operators with weights compute how, by the names of their outputs."""
    from ai_edge_litert.interpreter import Interpreter

    names = {detail["name"] for detail in Interpreter(str(path)).get_tensor_details()}
    kinds = tuple(kind.lower() for kind in litert._WITH_WEIGHTS)
    return {
        mode: len({n.split("/")[1] for n in names if n.startswith(f"{mode}/") and n.split("/")[2].startswith(kinds)})
        for mode in ("int8", "dynamic")
    }


@needs_converter
def test_weights_that_are_not_contiguous_are_not_exchanged(tmp_path: Path) -> None:
    """The converter knows constants by an address that it frees; channels-last weights of one shape collided."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Conv2d(64, 128, 3, padding=1) for _ in range(6))

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (torch.cat([part(x).relu() for part in self.parts], dim=1),)

    graph = Sum().eval().to(memory_format=torch.channels_last)
    images = torch.rand(1, 64, 12, 12)
    litert.convert_graph(graph, images, tmp_path / "sum.tflite", precision="fp32", calibration=None)
    (found,) = LitertSession(tmp_path / "sum.tflite", threads=1).run(images.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(found, graph(images)[0].numpy(), atol=1e-4)


@needs_converter
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arguments: arguments | {"precision": "bf16"}, "choose fp32, fp16 or int8"),
        (lambda arguments: arguments | {"precision": "int8", "calibration": []}, "there are none"),
        (lambda arguments: arguments | {"keep_float": ["layer9"]}, "no module 'layer9'"),
    ],
)
def test_wrong_wishes_are_refused(
    change: Callable[[dict[str, Any]], dict[str, Any]], message: str, tmp_path: Path
) -> None:
    graph = _graph("classification")
    arguments = change({"precision": "fp32", "calibration": None})
    with pytest.raises(ValueError, match=message):
        litert.convert_graph(graph, torch.zeros(1, 3, *SIZE), tmp_path / "model.tflite", **arguments)


@needs_converter
def test_session_refuses_other_shapes_and_files(tmp_path: Path) -> None:
    session = LitertSession(_written(_graph("classification"), tmp_path / "model.tflite", "fp32"), threads=None)
    with pytest.raises(ValueError, match="takes float32"):
        session.run(np.zeros((2, 3, *SIZE), np.float32))
    (tmp_path / "other.tflite").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="cannot load it"):
        LitertSession(tmp_path / "other.tflite", threads=1)


def test_missing_packages_are_named_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("litert_torch", "ai_edge_litert.interpreter", "tflite_runtime.interpreter", "tensorflow.lite"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"run scripts/litert_environment\.sh") as converter:
        litert.convert_graph(nn.Identity(), torch.zeros(1), tmp_path / "m.tflite", precision="fp32", calibration=None)
    with pytest.raises(ValueError, match="pip install ai-edge-litert") as runtime:
        LitertSession(tmp_path / "m.tflite", threads=1)
    assert all("\n" not in str(error.value) for error in (converter, runtime))


def test_histogram_cuts_rare_values_only() -> None:
    histogram = litert._Histogram()
    values = np.linspace(-1, 3, 100_000, dtype=np.float32)
    for part in np.split(values, 10):
        histogram.add(part)
    histogram.add(np.array([500.0], np.float32))
    assert histogram.bounds(0) == (-1.0, 500.0)
    low, high = histogram.bounds(1e-4)
    assert low == pytest.approx(-1, abs=0.25)
    assert high == pytest.approx(3, abs=0.25)
