"""Exports of every task: the same answers, files that describe themselves, nothing left behind when refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

import mobilevit
from golden_weights import fill_with_golden_weights
from mobilevit.card import TaskName
from mobilevit.cli import main
from mobilevit.data import shapes as drawn
from mobilevit.devices import normalize
from mobilevit.errors import ImageError
from mobilevit.exporting import export as exporting
from mobilevit.exporting import pt2
from mobilevit.exporting.export import ExportError, export
from mobilevit.exporting.options import FORMATS
from mobilevit.imaging.decode import find_images
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.machine import available_cores
from mobilevit.models import Model
from mobilevit.runtime.artifact import SUFFIXES, is_artifact, read_sidecar, sidecar_of
from mobilevit.runtime.session import ArtifactSession
from shallow_models import shallow
from test_cli import refused

TASKS: tuple[TaskName, ...] = ("classification", "detection", "segmentation")
NAMES = ("mobilevit_xxs", "mobilevitv2_050")
SIZE = (64, 128)


def make(task: TaskName, name: str = "mobilevit_xxs") -> Model:
    """A shallow model of a small input, with scaling that is not the default."""
    classes = [f"kind {number}" for number in range(4)]
    model = shallow(mobilevit.create_model(name, task=task, classes=classes))
    if task == "classification":
        fill_with_golden_weights(model)
    preprocessing = Preprocessing(
        size=SIZE, resize_mode="stretch", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), interpolation="bilinear"
    )
    assert model.card is not None
    model.card = dataclasses.replace(model.card, preprocessing=preprocessing)
    return model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    drawn.write_folder(folder / "shapes", num_images=6, size=96)
    return folder


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest) -> TaskName:
    wanted: TaskName = request.param
    return wanted


@pytest.fixture(scope="module", params=NAMES)
def model(task: TaskName, request: pytest.FixtureRequest) -> Model:
    return make(task, request.param)


@pytest.mark.parametrize(("format_", "baked"), [("onnx", True), ("openvino", True), ("pt2", False)])
def test_predictors_of_artifacts_answer_as_that_of_the_model(
    task: TaskName, model: Model, format_: str, baked: bool, images: Path, tmp_path: Path
) -> None:
    report = export(model, tmp_path, format=format_, bake_preprocessing=baked, images=images)
    assert report.verified == "yes"
    assert report.parity is not None
    assert report.parity.max_difference is not None
    assert report.parity.max_difference < 1e-4
    assert report.parity.agreement >= (0.999 if task == "segmentation" else 1)  # some pixels are near ties
    assert is_artifact(report.path)
    before, after = (
        mobilevit.Predictor(model),
        mobilevit.Predictor(report.path, threads=1, batch_size=3, trust_pt2=True),
    )
    after.warm_up()
    assert after.card.classes == before.card.classes
    assert after.card.preprocessing == before.card.preprocessing
    paths = list(find_images(images))
    for one, other in zip(before(paths), after(paths), strict=True):
        assert type(one) is type(other)
        if task == "classification":
            assert np.abs(one.probabilities - other.probabilities).max() < 1e-4
        elif task == "detection":
            assert len(one) == len(other)
            assert np.abs(one.scores - other.scores).max() < 1e-4
        else:
            assert (one.label_map == other.label_map).mean() > 0.999


def test_an_onnx_file_says_everything_and_holds_nothing_odd(model: Model, tmp_path: Path) -> None:
    report = export(model, tmp_path, format="onnx")
    assert report.verified == "yes"
    path = report.path
    model = onnx.load(path)
    told = {entry.key: entry.value for entry in model.metadata_props}
    embedded = json.loads(told["mobilevit"])
    sidecar = json.loads(sidecar_of(path).read_text())
    assert embedded == {key: value for key, value in sidecar.items() if key not in ("file", "sha256", "sidecar_sha256")}
    assert embedded["classes"] == [f"kind {number}" for number in range(4)]
    assert embedded["preprocessing"]["mean"] == [0.1, 0.2, 0.3]
    assert "exported_by" in embedded["provenance"]
    assert not {node.op_type for node in model.graph.node} & {"Resize", "Upsample", "GridSample", "If", "Loop"}
    inferred = onnx.shape_inference.infer_shapes(model)
    ranks = [len(value.type.tensor_type.shape.dim) for value in inferred.graph.value_info]
    assert len(ranks) > 60
    assert max(ranks) <= 4
    assert model.opset_import[0].version == 18
    assert [o.name for o in model.graph.output] == list(read_sidecar(path).outputs)


@pytest.mark.parametrize("format_", ["onnx", "openvino", "pt2"])
def test_any_number_of_images_at_once(format_: str, images: Path, tmp_path: Path) -> None:
    report = export(make("classification"), tmp_path, format=format_, dynamic=["batch"], images=images)
    assert report.path.name.startswith("mobilevit_xxs")
    session = ArtifactSession(report.path, threads=available_cores(), trust_pt2=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, *SIZE, 3), dtype=np.uint8)
    alone = np.concatenate([session.run(image[None])["logits"] for image in pixels])
    assert np.allclose(session.run(pixels)["logits"], alone, atol=1e-5)
    with pytest.raises(ValueError, match="images of 64 x 64 for a model exported at 64 x 128 only"):
        session.run(pixels[:, :, :64])


def test_a_fixed_batch_takes_any_number_of_images(images: Path, tmp_path: Path) -> None:
    model = make("segmentation")
    whole = ArtifactSession(export(model, tmp_path, batch_size=2, images=images).path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, *SIZE, 3), dtype=np.uint8)
    assert whole.run(pixels)["logits"].shape == (3, 4, *SIZE)
    labels = ArtifactSession(export(model, tmp_path, label_map=True, images=images, name="labels").path)
    expected = whole.run(pixels)["logits"].argmax(1)
    assert (labels.run(pixels)["label_map"] == expected).mean() > 0.999
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    assert mobilevit.Predictor(tmp_path / "labels.onnx")(image).label_map.shape == (50, 70)


def test_any_size_where_it_may_change(images: Path, tmp_path: Path) -> None:
    model = make("classification")
    for stage in ("layer4", "layer5"):  # PyTorch simplifies sizes of three strides in seconds, of five in a minute
        model.get_submodule(stage)[1] = nn.Identity()  # type: ignore[index]
    report = export(model, tmp_path, dynamic=["size"], format="pt2", images=images)
    pixels = torch.randint(0, 256, (1, 3, 128, 192), dtype=torch.uint8)
    assert model.card is not None
    with torch.no_grad():
        expected = model(normalize(pixels, model.card.preprocessing))
    found = ArtifactSession(report.path, trust_pt2=True).run(pixels.permute(0, 2, 3, 1).numpy())["logits"]
    assert np.allclose(found, expected.numpy(), atol=1e-4)


def test_suppression_inside_the_graph(images: Path, tmp_path: Path) -> None:
    model = make("detection")
    nn.init.normal_(model.get_submodule("heads.1.predict").weight, std=0.2)  # something to find
    plain = export(model, tmp_path, images=images, name="plain").path
    inside = export(model, tmp_path, images=images, name="inside", nms=True).path
    paths = find_images(images)
    found = 0
    for one, other in zip(mobilevit.Predictor(plain)(paths), mobilevit.Predictor(inside)(paths), strict=True):
        surest = one.scores > 0.1
        assert np.allclose(one.boxes_xyxy[surest], other.boxes_xyxy[: surest.sum()], atol=0.05)
        assert np.array_equal(one.class_ids[surest], other.class_ids[: surest.sum()])
        found += int(surest.sum())
    assert found > 10


def test_a_wrong_artifact_is_not_called_good(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that spoils one weight is noticed, and nothing but the report is left."""
    model = make("classification")

    def spoil(plan: exporting.Plan, path: Path) -> None:
        with torch.no_grad():
            plan.graph.model.classifier.bias[2] += 0.01
            pt2.convert(plan, path)
            plan.graph.model.classifier.bias[2] -= 0.01

    monkeypatch.setitem(FORMATS, "pt2", dataclasses.replace(FORMATS["pt2"], convert=spoil))
    with pytest.raises(ExportError, match=r"not written; its answers differ by up to 1\.0e-02"):
        export(model, tmp_path, format="pt2", images=images)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    entry = json.loads((tmp_path / "report.json").read_text())["mobilevit_xxs.pt2"]
    assert entry["parity"]["good"] is False
    told: list[str] = []
    monkeypatch.setattr(exporting.log, "warning", lambda text, *values: told.append(text % values))
    report = export(model, tmp_path, format="pt2", images=images, verify=False)
    assert report.path.exists()
    assert len(told) == 1
    assert told[0].startswith("NOT VERIFIED")


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: exporting.Plan, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setitem(FORMATS, "pt2", dataclasses.replace(FORMATS["pt2"], convert=fail))
    with pytest.raises(KeyboardInterrupt):
        export(make("classification"), tmp_path, format="pt2")
    assert list(tmp_path.iterdir()) == []


def test_accuracy_before_and_after(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = mobilevit.create_model("mobilevit_xxs", classes=sorted(p.name for p in (images / "shapes").iterdir()))
    assert model.card is not None
    checkpoint = mobilevit.save(model, tmp_path / "m.safetensors", preprocessing=Preprocessing(size=(64, 64)))
    data = str(images / "shapes")
    arguments = ["--format", "onnx", "pt2", "--out", str(tmp_path / "out"), "--data", data]
    assert main(["export", str(checkpoint), *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"m.onnx", "m.pt2"}
    for entry in told.values():
        assert entry["metrics"]["top1"] == entry["torch_metrics"]["top1"]
        assert entry["bytes"] > 1e6
        assert entry["latency_ms"] > 0
    assert set(json.loads((tmp_path / "out" / "report.json").read_text())) == {"m.onnx", "m.pt2"}
    capsys.readouterr()
    assert main(["eval", told["m.onnx"]["path"], "--data", data, "--json", "--num-workers", "0"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["top1"] == pytest.approx(told["m.onnx"]["metrics"]["top1"], abs=1e-6)
    assert main(["predict", told["m.pt2"]["path"], data, "--json", "--threads", "1", "--trust-pt2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


BAD = {
    "unknown format": ({"format": "tensorrt"}, r"`format` is 'tensorrt'; it can be onnx"),
    "precision": ({"precision": "bf16"}, "onnx has no precision 'bf16': choose fp32.*exists for openvino"),
    "int8 on nothing": ({"precision": "int8"}, "int8 must be calibrated.*`calibration`"),
    "int8 on no folder": ({"precision": "int8", "calibration": "nowhere"}, "nowhere: no such folder"),
    "size": ({"image_size": (100, 128)}, "patches do not divide.*nearest are `image_size` 128 128"),
    "dynamic": ({"format": "executorch", "dynamic": ["batch"]}, "executorch files have one batch and one size"),
    "dynamic what": ({"dynamic": ["width"]}, "`dynamic` is 'width'"),
    "label map": ({"label_map": True}, "`label_map` is for segmentation; this checkpoint does classification"),
    "nms": ({"nms": True}, "`nms` is for detection in onnx"),
    "no data": ({"data": "nowhere"}, "nowhere"),
    "no images": ({"images": "nowhere"}, "nowhere: no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD)
def test_mistakes_get_one_line_and_leave_nothing(mistake: str, tmp_path: Path) -> None:
    options, message = BAD[mistake]
    with pytest.raises(ValueError, match=message) as caught:
        export(make("classification"), tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_detectors_have_one_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="anchors belong to one input size"):
        export(make("detection"), tmp_path, dynamic=["size"])


def test_images_for_int8_must_be_many_and_real(images: Path, tmp_path: Path) -> None:
    model = make("classification")
    with pytest.raises(ValueError, match="6 readable images; int8 needs 32 or more"):
        export(model, tmp_path, precision="int8", calibration=images)
    noise = np.random.default_rng(0)
    noisy = [noise.integers(0, 256, (*SIZE, 3), dtype=np.uint8) for _ in range(40)]
    with pytest.raises(ValueError, match="40 images: most of these images are noise"):
        export(model, tmp_path, precision="int8", calibration=noisy)
    broken = tmp_path / "broken"
    broken.mkdir()
    for number in range(40):
        (broken / f"{number}.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0 readable images \(40 cannot be read, such as .*0.jpg"):
        export(model, tmp_path, precision="int8", calibration=broken)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(make("classification"), tmp_path_factory.mktemp("artifact"), format="openvino").path


def copied(artifact: Path, folder: Path) -> Path:
    for part in artifact.parent.iterdir():
        shutil.copy(part, folder)
    return folder / artifact.name


def test_artifacts_that_are_not_as_they_were_written(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(artifact, tmp_path)
    sidecar = sidecar_of(path)
    good = sidecar.read_text()
    predict = ["predict", str(path), "image.jpg"]
    sidecar.unlink()
    assert "its sidecar mobilevit_xxs.xml.json is missing" in refused(predict, capsys)
    sidecar.write_text("{")
    assert "damaged, or not a sidecar of this package" in refused(predict, capsys)
    sidecar.write_text(good.replace("kind 1", "kind 9"))
    assert "was edited after the export" in refused(predict, capsys)
    sidecar.write_text(good.replace('"artifact_version": 1', '"artifact_version": 7'))
    assert "which is newer than this version; upgrade mobilevit" in refused(predict, capsys)
    sidecar.write_text(good)
    weights = path.with_suffix(".bin")
    kept = weights.read_bytes()
    weights.unlink()
    assert "mobilevit_xxs.bin: missing; it belongs to mobilevit_xxs.xml" in refused(predict, capsys)
    weights.write_bytes(kept[:-1])
    assert "is not the file its sidecar describes" in refused(predict, capsys)
    assert f"{tmp_path}/no.onnx: no such file" in refused(["predict", f"{tmp_path}/no.onnx", "p.jpg"], capsys)


def test_a_core_ml_package_runs_on_a_mac(tmp_path: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if FORMATS["coreml"].runs_here:
        pytest.skip("this is a Mac")
    from mobilevit.runtime.artifact import write_sidecar

    package = tmp_path / "m.mlpackage"
    package.mkdir()
    (package / "model").write_bytes(b"weights")
    write_sidecar(package, dataclasses.replace(read_sidecar(artifact), format="coreml"))
    assert "copy the package to a Mac" in refused(["predict", str(package), "image.jpg"], capsys)


def test_exported_files_have_no_engine(artifact: Path) -> None:
    with pytest.raises(ValueError, match="runs in its own engine"):
        mobilevit.Predictor(artifact, engine="auto")
    with pytest.raises(ValueError, match="`threads` is 0"):
        mobilevit.Predictor(artifact, threads=0)
    with pytest.raises(ImageError):
        mobilevit.Predictor(artifact)(b"no image")


def test_built_in_photographs_are_used_without_any(artifact: Path) -> None:
    report = json.loads((artifact.parent / "report.json").read_text())[artifact.name]
    assert report["parity"]["source"] == "built-in photographs"
    assert report["parity"]["images"] == 30


def test_an_unknown_runtime_is_named(monkeypatch: pytest.MonkeyPatch, artifact: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ValueError, match=r"openvino is not installed; pip install 'mobilevit\[openvino\]'"):
        ArtifactSession(artifact)


def test_the_report_goes_on(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged report.json does not stop an export."""
    (tmp_path / "report.json").write_text("{")
    with caplog.at_level(logging.WARNING, "mobilevit"):
        export(make("classification"), tmp_path, format="pt2", images=[Image.new("RGB", (64, 64), "red")])
    assert set(json.loads((tmp_path / "report.json").read_text())) == {"mobilevit_xxs.pt2"}


def test_every_format_has_a_suffix() -> None:
    assert set(SUFFIXES.values()) == set(FORMATS)
