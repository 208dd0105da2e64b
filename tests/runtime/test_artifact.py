from __future__ import annotations

import json
from pathlib import Path

import pytest

from mobilevit.card import ModelCard
from mobilevit.errors import MobileViTError
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.runtime.artifact import Artifact, read_sidecar, sidecar_of, write_sidecar
from unprivileged import locked_folder


def an_artifact(suffix_format: str = "onnx") -> Artifact:
    card = ModelCard(
        name="mobilevit_xxs",
        task="detection",
        classes=("cell", "größer 猫"),
        preprocessing=Preprocessing(size=(64, 96), resize_mode="stretch"),
        metrics={"ap": 0.5},
        score_threshold=0.25,
        provenance={"exported_by": "mobilevit 0.1.0"},
    )
    return Artifact(
        format=suffix_format,  # type: ignore[arg-type]
        precision="fp32",
        card=card,
        batch_size=2,
        image_size=(64, 96),
        baked=True,
        outputs=("boxes_xyxy", "scores", "selected"),
        settings={"INFERENCE_PRECISION_HINT": "f32"},
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"a model")
    write_sidecar(path, an_artifact())
    return path


def test_written_and_read(model: Path) -> None:
    assert read_sidecar(model) == an_artifact()
    assert Artifact.from_dict(json.loads(an_artifact().to_json())) == an_artifact()


def test_a_sidecar_of_version_0_1(model: Path) -> None:
    """Version 0.1 wrote "artefact_version"."""
    sidecar = sidecar_of(model)
    values = json.loads(sidecar.read_text(encoding="utf-8"))
    values["artefact_version"] = values.pop("artifact_version")
    del values["sidecar_sha256"]
    from mobilevit.runtime.artifact import _digest_of_values

    sidecar.write_text(json.dumps(values | {"sidecar_sha256": _digest_of_values(values)}))
    assert read_sidecar(model) == an_artifact()


def test_files_that_do_not_fit_are_refused(model: Path, tmp_path: Path) -> None:
    def refusal(path: Path = model) -> str:
        with pytest.raises(MobileViTError) as caught:
            read_sidecar(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refusal(tmp_path / "none.onnx") == f"{tmp_path}/none.onnx: no such file"
    assert refusal(model / "inside.onnx").endswith("inside.onnx: cannot be read (Not a directory)")
    sidecar, written = sidecar_of(model), sidecar_of(model).read_text(encoding="utf-8")
    model.write_bytes(b"another model")
    assert "is not the file its sidecar describes" in refusal()
    model.write_bytes(b"a model")
    for text, message in (
        (written.replace("cell", "call"), "was edited after the export"),
        (written.replace('"artifact_version": 1', '"artifact_version": 2'), "made by mobilevit 0.1.0, which is newer"),
        (written[:100], "damaged, or not a sidecar of this package"),
        ("[]", "damaged, or not a sidecar of this package"),
        ("\udcff", "damaged, or not a sidecar of this package"),
    ):
        sidecar.write_bytes(text.encode("utf-8", "surrogateescape"))
        assert message in refusal()
    sidecar.unlink()
    assert refusal() == f"{model}: its sidecar model.onnx.json is missing; copy it beside the file, or export again"
    sidecar.mkdir()
    assert refusal() == f"{sidecar}: cannot be read (Is a directory)"
    with locked_folder() as folder:
        assert refusal(folder / "m.onnx") == f"{folder}/m.onnx: cannot be read (Permission denied)"


def test_both_files_of_openvino_belong_together(tmp_path: Path) -> None:
    model, weights = tmp_path / "m.xml", tmp_path / "m.bin"
    model.write_bytes(b"graph")
    weights.write_bytes(b"weights")
    write_sidecar(model, an_artifact("openvino"))
    assert read_sidecar(model).format == "openvino"
    weights.write_bytes(b"others")
    with pytest.raises(MobileViTError, match="is not the file its sidecar describes"):
        read_sidecar(model)
    weights.unlink()
    with pytest.raises(MobileViTError, match=r"m\.bin: missing; it belongs to m\.xml"):
        read_sidecar(model)
