"""Core ML packages: what they say and hold. They cannot run here unless this is a Mac."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from test_export import NAMES, SIZE, TASKS, make

from mobilevit.exporting import export as exporting
from mobilevit.exporting.export import export
from mobilevit.exporting.options import FORMATS
from mobilevit.runtime.artifact import read_sidecar

coremltools = pytest.importorskip("coremltools", reason="coremltools is not installed")


def spec_of(path: Path) -> Any:
    logging.disable(logging.WARNING)
    try:
        return coremltools.utils.load_spec(str(path))
    finally:
        logging.disable(logging.NOTSET)


def operations(spec: Any) -> list[Any]:
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    return list(block.operations)


@pytest.mark.parametrize(("task", "name"), [*((task, NAMES[0]) for task in TASKS), ("segmentation", NAMES[1])])
def test_packages_say_what_they_are(task: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(exporting.log, "warning", lambda text, *values: told.append(text % values))
    model, baked = make(task, name), task == "segmentation"
    report = export(model, tmp_path, format="coreml", precision="fp16", bake_preprocessing=baked)
    if not FORMATS["coreml"].runs_here:
        assert report.verified.startswith("coreml does not run on this system")
        assert len(told) == 1
    spec = spec_of(report.path)
    assert read_sidecar(report.path).card.classes == ("kind 0", "kind 1", "kind 2", "kind 3")
    metadata = dict(spec.description.metadata.userDefined)
    assert json.loads(metadata["mobilevit"])["preprocessing"]["mean"] == [0.1, 0.2, 0.3]
    assert json.loads(metadata["classes"]) == ["kind 0", "kind 1", "kind 2", "kind 3"]
    assert task in spec.description.metadata.shortDescription
    (source,) = spec.description.input
    assert source.name == "images"
    if task == "segmentation":
        assert (source.type.imageType.height, source.type.imageType.width) == SIZE
    else:
        assert list(source.type.multiArrayType.shape) == [1, 3, *SIZE]
    assert tuple(output.name for output in spec.description.output) == report.artifact.outputs
    kinds = {operation.type for operation in operations(spec)}
    assert "conv" in kinds
    assert not {kind for kind in kinds if "resize" in kind or "upsample" in kind}
    ranks = [
        len(value.type.tensorType.dimensions)
        for operation in operations(spec)
        for value in operation.outputs
        if operation.type != "const"
    ]
    assert max(ranks) <= 4


def test_smaller_numbers_make_smaller_packages(tmp_path: Path) -> None:
    sizes = {
        precision: export(make("classification"), tmp_path, format="coreml", precision=precision).num_bytes
        for precision in FORMATS["coreml"].precisions
    }
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    assert sizes["palettized"] < 0.6 * sizes["fp16"]
    kinds = [operation.type for operation in operations(spec_of(tmp_path / "mobilevit_xxs-palettized.mlpackage"))]
    assert sum(kind == "constexpr_lut_to_dense" for kind in kinds) > 25


def test_label_maps(tmp_path: Path) -> None:
    report = export(make("segmentation"), tmp_path, format="coreml", label_map=True)
    (output,) = spec_of(report.path).description.output
    assert output.name == "label_map"
