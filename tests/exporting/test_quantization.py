"""int8 and float16 for ONNX Runtime and OpenVINO: near the model, in the layers it should be; and sensitivity."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import torch
from PIL import Image
from torch import Tensor

import mobilevit
from mobilevit.card import card_of
from mobilevit.data.shapes import render_scene
from mobilevit.devices import normalize
from mobilevit.errors import MobileViTError
from mobilevit.exporting import onnx as onnx_format
from mobilevit.exporting import openvino as openvino_format
from mobilevit.exporting.export import export
from mobilevit.exporting.graph import Plan, export_graph
from mobilevit.exporting.quantization import float_modules, is_below
from mobilevit.exporting.sensitivity import choose_float, measure_sensitivity, save_plot
from mobilevit.runtime.artifact import Artifact, write_sidecar
from mobilevit.runtime.session import ArtifactSession
from shallow_models import shallow

SIZE = (64, 64)
CONVERT = {"onnx": onnx_format.convert, "openvino": openvino_format.convert}
SUFFIX = {"onnx": ".onnx", "openvino": ".xml"}
KEPT = ("model.layer5.1.transformer.0", "model.classifier")


def images(start: int, number: int) -> Tensor:
    """uint8 (number, 3, 64, 64)."""
    scenes = [np.asarray(render_scene(index, size=SIZE[0]).image) for index in range(start, start + number)]
    return torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2)


def make(task: str = "classification", name: str = "mobilevit_xxs") -> Any:
    """Weights that are not those of a fresh model, where biases are zero and attention is even."""
    torch.manual_seed(0)
    model = mobilevit.create_model(name, task=task, classes=[f"kind {n}" for n in range(4)])
    if task != "classification" or name != "mobilevit_xxs":
        shallow(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1 or float(parameter.detach().abs().max()) < 0.1:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def plan_for(model: Any, format_: Any, precision: Any, *, keep_float: tuple[str, ...] = (), **settings: Any) -> Plan:
    open_batch = settings.pop("open_batch", False)
    graph = export_graph(model, image_size=SIZE, **settings)
    card = card_of(model)
    pixels = images(0, 32)
    inputs = pixels.permute(0, 2, 3, 1) if graph.baked else normalize(pixels, card.preprocessing)
    artifact = Artifact(
        format=format_,
        precision=precision,
        card=card,
        batch_size=None if open_batch else 1,
        image_size=SIZE,
        baked=graph.baked,
        outputs=graph.output_names,
    )
    example = graph.example(2 if open_batch else 1, SIZE)
    calibration = [image.contiguous() for image in inputs.split(1)]
    in_float = float_modules(graph, keep_float)
    return Plan(graph=graph, artifact=artifact, example=example, calibration=calibration, in_float=in_float)


def write(plan: Plan, folder: Path) -> Path:
    path = folder / f"model{SUFFIX[plan.artifact.format]}"
    CONVERT[plan.artifact.format](plan, path)
    write_sidecar(path, plan.artifact)
    return path


@torch.inference_mode()
def answers(plan: Plan, path: Path) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Of the graph and of the file, on images that nothing was calibrated on."""
    pixels = images(100, 12)
    inputs = pixels.permute(0, 2, 3, 1) if plan.graph.baked else normalize(pixels, plan.artifact.card.preprocessing)
    return plan.graph(inputs), _outputs(path, pixels)


def _outputs(path: Path, pixels: Tensor) -> tuple[Tensor, ...]:
    outputs = ArtifactSession(path, threads=1).run(pixels.permute(0, 2, 3, 1).numpy())
    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in outputs.values())


def decibels(expected: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (expected - found).square().sum()))


@pytest.fixture(scope="module")
def model() -> Any:
    return make()


@pytest.fixture(scope="module", params=list(CONVERT))
def made(request: pytest.FixtureRequest, model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """In int8, with two modules left out."""
    plan = plan_for(model, request.param, "int8", keep_float=KEPT)
    return plan, write(plan, tmp_path_factory.mktemp(request.param))


def layers_of(path: Path) -> dict[str, bool]:
    """Each convolution and linear layer of a file by its module: whether its weights are int8."""
    if path.suffix == ".onnx":
        graph = onnx.load(path).graph
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        unpacked = {n.output[0]: types.get(n.input[0]) for n in graph.node if n.op_type == "DequantizeLinear"}
        return {
            node.name.partition("/")[0]: unpacked.get(node.input[1]) == onnx.TensorProto.INT8
            for node in graph.node
            if node.op_type in ("Conv", "Gemm", "MatMul") and (node.input[1] in types or node.input[1] in unpacked)
        }
    found = {}
    for operator in openvino.Core().read_model(path).get_ops():
        name = operator.get_friendly_name()
        if operator.get_type_name() in ("Convolution", "GroupConvolution", "MatMul") and not name.startswith("/"):
            weights = operator.input_value(1).get_node()
            while weights.get_type_name() in ("Multiply", "Subtract", "Convert", "Reshape", "Transpose"):
                weights = weights.input_value(0).get_node()
            if weights.get_type_name() == "Constant":
                found[name.partition("/")[0]] = weights.get_element_type() == openvino.Type.i8
    return found


def test_int8_is_near_the_model(made: tuple[Plan, Path]) -> None:
    plan, path = made
    (expected,), (found,) = answers(plan, path)
    assert decibels(expected, found) > 25
    assert (expected.argmax(1) == found.argmax(1)).float().mean() >= 0.9


def test_int8_is_where_it_should_be_and_only_there(made: tuple[Plan, Path]) -> None:
    plan, path = made
    layers = layers_of(path)
    wanted = {name for name, module in plan.graph.named_modules() if hasattr(module, "weight") and _has_product(module)}
    assert set(layers) == wanted
    assert set(KEPT) < set(plan.in_float)
    assert {name for name, in_int8 in layers.items() if not in_int8} == {
        name for name in wanted if is_below(name, plan.in_float)
    }


def test_int8_of_mobilevitv2(tmp_path: Path) -> None:
    plan = plan_for(make(name="mobilevitv2_050"), "onnx", "int8", keep_float=KEPT)
    made = plan, write(plan, tmp_path)
    test_int8_is_near_the_model(made)
    test_int8_is_where_it_should_be_and_only_there(made)


def _has_product(module: Any) -> bool:
    return isinstance(module, torch.nn.Conv2d | torch.nn.Linear)


def test_int8_file_is_small_whole_and_tells_nothing_of_this_machine(made: tuple[Plan, Path]) -> None:
    plan, path = made
    files = {file.name for file in path.parent.iterdir()}
    assert files == {"model.onnx", "model.onnx.json"} or files == {"model.xml", "model.bin", "model.xml.json"}
    weights = path if path.suffix == ".onnx" else path.with_suffix(".bin")
    assert weights.stat().st_size < 2 * sum(p.numel() for p in plan.graph.model.parameters())
    for file in path.parent.iterdir():
        assert str(Path(mobilevit.__file__).parent).encode() not in file.read_bytes()


def test_onnx_file_says_what_it_is_and_speaks_float32(made: tuple[Plan, Path]) -> None:
    plan, path = made
    if path.suffix != ".onnx":
        pytest.skip("of the other format")
    loaded = onnx.load(path)
    assert {entry.key: entry.value for entry in loaded.metadata_props} == {"mobilevit": plan.artifact.to_json()}
    ports = (*loaded.graph.input, *loaded.graph.output)
    assert [port.type.tensor_type.elem_type for port in ports] == [onnx.TensorProto.FLOAT] * 2
    assert [port.name for port in ports] == ["images", "logits"]


def test_modules_that_stay_in_float() -> None:
    graph = export_graph(make("segmentation"), image_size=SIZE)
    names = float_modules(graph, ("model.classifier",))
    backbone = "model.backbone"
    blocks = [f"{backbone}.layer2.{number}" for number in range(3)]
    others = [f"{backbone}.layer{number}.0" for number in (3, 4, 5)]
    assert names == (f"{backbone}.stem", f"{backbone}.layer1.0", *blocks, *others, "model.classifier")
    assert is_below(f"{backbone}.layer1.0.expand.conv", names)
    assert not is_below(f"{backbone}.layer1", names)
    second = float_modules(export_graph(make(name="mobilevitv2_050"), image_size=SIZE))
    assert [name for name in second if name.endswith("project_out")] == [
        f"model.layer{number}.1.project_out" for number in (3, 4, 5)
    ]


def test_unknown_layer_to_keep_is_refused(model: Any, tmp_path: Path) -> None:
    scenes = [render_scene(index, size=64).image for index in range(32)]
    with pytest.raises(MobileViTError, match=r"no module 'model.layer5.1.transformr' in this model; such as .*former"):
        export(model, tmp_path, precision="int8", calibration=scenes, keep_float=["model.layer5.1.transformr"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format_", list(CONVERT))
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_int8_of_other_tasks_with_all_that_can_be_inside(task: str, format_: str, tmp_path: Path) -> None:
    plan = plan_for(make(task), format_, "int8", baked=True, label_map=task == "segmentation")
    expected, found = answers(plan, write(plan, tmp_path))
    if task == "segmentation":
        assert found[0].dtype == torch.uint8
        # Classes of random weights are near ties in every pixel, and which one wins depends on the processor, as int8
        # is summed in another way there. So another winner must be nearly as probable, by the 0.05 that exports allow.
        assert (expected[0] == found[0]).float().mean() > 0.9
        plan.graph.label_map = False
        probabilities = plan.graph(images(100, 12).permute(0, 2, 3, 1))[0].detach().softmax(1)
        chosen = probabilities.gather(1, found[0].long()[:, None])[:, 0]
        assert (probabilities.amax(1) - chosen).max() < 0.05
    else:
        assert min(decibels(a, b) for a, b in zip(expected, found, strict=True)) > 25


@pytest.mark.parametrize("format_", list(CONVERT))
def test_int8_with_any_batch(format_: str, tmp_path: Path) -> None:
    plan = plan_for(shallow(make()), format_, "int8", open_batch=True)
    path = write(plan, tmp_path)
    pixels = images(100, 5)
    (found,) = _outputs(path, pixels)
    assert decibels(plan.graph(normalize(pixels, plan.artifact.card.preprocessing))[0].detach(), found) > 20


@pytest.mark.parametrize(
    ("task", "name"),
    [
        *((task, "mobilevit_xxs") for task in ("classification", "detection", "segmentation")),
        ("detection", "mobilevitv2_050"),
    ],
)
def test_float16_onnx_takes_and_gives_float32(task: str, name: str, tmp_path: Path) -> None:
    plan = plan_for(make(task, name), "onnx", "fp16")
    path = write(plan, tmp_path)
    loaded = onnx.load(path)
    ports = (*loaded.graph.input, *loaded.graph.output)
    assert {port.type.tensor_type.elem_type for port in ports} == {onnx.TensorProto.FLOAT}
    big = [tensor for tensor in loaded.graph.initializer if tensor.name.startswith("model.") and len(tensor.dims) == 4]
    assert big
    assert {tensor.data_type for tensor in big} == {onnx.TensorProto.FLOAT16}
    expected, found = answers(plan, path)
    assert min(decibels(a, b) for a, b in zip(expected, found, strict=True)) > 45


def test_layer_spoilt_for_int8_is_the_most_sensitive(model: Any, tmp_path: Path) -> None:
    plan = plan_for(model, "onnx", "int8")
    before = plan.graph(plan.calibration[0])[0].detach()
    block = plan.graph.model.layer4[1]
    with torch.no_grad():  # a channel that is huge, and that nobody looks at: nothing changes but a range
        block.local_conv.conv.bias[0] = 1e4
        block.local_conv.conv.weight[0] = 0
        block.project_in.conv.weight[:, 0] = 0
    state = copy.deepcopy(plan.graph.state_dict())
    rows = measure_sensitivity(plan.graph, plan.calibration[:8])
    assert rows[0].name == "model.layer4.1.project_in.conv"
    assert rows[0].kind == "pointwise"
    assert rows[0].sqnr_db + 10 < rows[1].sqnr_db
    assert [row.sqnr_db for row in rows] == sorted(row.sqnr_db for row in rows)
    assert {row.kind for row in rows} == {"convolution", "pointwise", "depthwise", "linear", "attention"}
    assert choose_float(rows, rows[0].sqnr_db + 3) == (rows[0].name,)
    assert choose_float(rows, 0) == ()
    # The graph is as it was.
    assert all(torch.equal(value, state[name]) for name, value in plan.graph.state_dict().items())
    assert before.shape == plan.graph(plan.calibration[0])[0].shape
    json.dumps([dataclasses.asdict(row) for row in rows])
    save_plot(rows, tmp_path / "sensitivity.png")
    with Image.open(tmp_path / "sensitivity.png") as drawn:
        assert drawn.width > 300


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_sensitivity_of_other_tasks_and_inputs(task: str) -> None:
    plan = plan_for(make(task), "onnx", "int8", baked=True, label_map=task == "segmentation")
    rows = measure_sensitivity(plan.graph, plan.calibration[:4])
    assert len({row.name for row in rows}) == len(rows) > 50
    assert all(5 < row.sqnr_db <= 200 for row in rows)
    assert getattr(plan.graph, "label_map", False) == (task == "segmentation")  # the graph stays as it is


@pytest.mark.parametrize("precision", ["int8"])
def test_too_few_images_or_noise_are_refused(precision: str, model: Any, tmp_path: Path) -> None:
    few = [render_scene(index, size=64).image for index in range(31)]
    noise = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (256, 256, 3), np.uint8)) for n in range(32)]
    for images_, words in ((few, "31 readable images; int8 needs 32"), (noise, "are noise")):
        with pytest.raises(ValueError, match=words):
            export(model, tmp_path / "out", precision=precision, calibration=images_)
    with pytest.raises(ValueError, match="calibrat"):
        export(model, tmp_path / "out", precision=precision)
    assert not list(tmp_path.rglob("*.onnx"))
