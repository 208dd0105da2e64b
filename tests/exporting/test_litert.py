"""LiteRT's converter lives in an environment of its own: sh scripts/litert_environment.sh."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mobilevit import create_model
from mobilevit.card import ModelCard
from mobilevit.errors import MissingPackageError
from mobilevit.exporting import litert
from mobilevit.exporting.export import export
from mobilevit.exporting.graph import ExportGraph, Plan, export_graph
from mobilevit.exporting.quantization import float_modules, is_below
from mobilevit.runtime.artifact import Artifact, Precision
from mobilevit.runtime.engine import Engine, open_engine

needs_converter = pytest.mark.skipif(
    importlib.util.find_spec("litert_torch") is None,
    reason="litert_torch is not installed; sh scripts/litert_environment.sh, then .venv-litert/bin/python -m pytest",
)
SIZE = (64, 64)


def _graph(task: str, **settings: bool) -> ExportGraph:
    """A tiny model with weights that are not those of a fresh one, where biases are zero and masks are even."""
    model = create_model("mobilevit_xxs", task=task, num_classes=3)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1 or float(parameter.detach().abs().max()) < 0.1:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return export_graph(model.eval(), image_size=SIZE, **settings)


def _engine(path: Path, threads: int = 1) -> Engine:
    return open_engine(path, _plan(_graph("classification"), "fp32").artifact, threads=threads, device="cpu")


def _images(graph: ExportGraph, number: int) -> list[Tensor]:
    if graph.baked:
        return [torch.randint(0, 256, (1, *SIZE, 3), dtype=torch.uint8) for _ in range(number)]
    return [torch.rand(1, 3, *SIZE) for _ in range(number)]


def _plan(graph: ExportGraph, precision: Precision, keep_float: tuple[str, ...] = ()) -> Plan:
    artifact = Artifact(
        format="litert",
        precision=precision,
        card=ModelCard(name="mobilevit_xxs", task="classification", classes=("a", "b", "c")),
        batch_size=1,
        image_size=SIZE,
        baked=graph.baked,
        outputs=graph.output_names,
    )
    images = _images(graph, 4)
    in_float = float_modules(graph, keep_float)
    return Plan(graph=graph, artifact=artifact, example=images[0], calibration=images, in_float=in_float)


def _written(graph: ExportGraph, path: Path, precision: Precision, keep_float: tuple[str, ...] = ()) -> Path:
    litert.convert(_plan(graph, precision, keep_float), path)
    return path


@needs_converter
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_file_gives_the_graphs_outputs_in_its_order(task: str, precision: Precision, tmp_path: Path) -> None:
    graph = _graph(task)
    (images,) = _images(graph, 1)
    found = _engine(_written(graph, tmp_path / "model.tflite", precision)).run(images.numpy())
    expected = [output.numpy() for output in graph(images)]
    assert [output.shape for output in found] == [output.shape for output in expected]
    tolerance = {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.15}[precision]
    for ours, theirs in zip(expected, found, strict=True):
        assert np.abs(ours - theirs).max() <= tolerance * max(1, np.abs(ours).max())


@needs_converter
def test_baked_input_and_label_map_keep_their_types(tmp_path: Path) -> None:
    graph = _graph("segmentation", baked=True, label_map=True)
    (images,) = _images(graph, 1)
    (found,) = _engine(_written(graph, tmp_path / "model.tflite", "fp32"), threads=2).run(images.numpy())
    assert found.dtype == np.uint8
    assert (found == graph(images)[0].numpy()).mean() > 0.999


@needs_converter
def test_smaller_precisions_are_smaller_files(tmp_path: Path) -> None:
    graph = _graph("classification")
    sizes = [_written(graph, tmp_path / f"{p}.tflite", p).stat().st_size for p in ("fp32", "fp16", "int8")]
    assert sizes[1] < 0.6 * sizes[0]
    assert sizes[2] < 0.4 * sizes[0]


@needs_converter
def test_int8_is_where_it_should_be_and_only_there(tmp_path: Path) -> None:
    graph = _graph("classification")
    modes = _modes(_written(graph, tmp_path / "model.tflite", "int8"))
    in_float = float_modules(graph)
    layers = {name: type(m) for name, m in graph.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    in_int8 = [kind for name, kind in layers.items() if not is_below(name, in_float)]
    assert modes == {"int8": in_int8.count(nn.Conv2d), "dynamic": in_int8.count(nn.Linear)}
    assert 0 < modes["int8"] < sum(kind is nn.Conv2d for kind in layers.values())
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
    plan = dataclasses.replace(_plan(_graph("classification"), "fp32"), graph=graph, example=images)
    litert.convert(plan, tmp_path / "sum.tflite")
    (found,) = _engine(tmp_path / "sum.tflite").run(images.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(found, graph(images)[0].numpy(), atol=1e-4)


@needs_converter
def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.tflite").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="cannot load it"):
        _engine(tmp_path / "other.tflite")


@needs_converter
def test_exports_are_compared_with_the_model(tmp_path: Path) -> None:
    model = create_model("mobilevit_xxs", num_classes=3)
    report = export(model, tmp_path, format="litert", image_size=SIZE)
    assert report.verified == "yes"
    assert report.path.name == "mobilevit_xxs.tflite"


def test_missing_packages_are_named_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("litert_torch", "ai_edge_litert.interpreter"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=r"litert_torch is .*run scripts/litert_environment\.sh") as error:
        export(create_model("mobilevit_xxs", num_classes=3), tmp_path, format="litert", image_size=SIZE)
    with pytest.raises(MissingPackageError, match=r"pip install 'mobilevit\[litert\]'") as runtime:
        _engine(tmp_path / "m.tflite")
    assert all("\n" not in str(error.value) for error in (error, runtime))
