"""`torch.export` files: bfloat16, what they say, and that none is loaded without being trusted."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import NAMES, TASKS, make

import mobilevit
from mobilevit.data import shapes as drawn
from mobilevit.errors import MobileViTError
from mobilevit.exporting.export import export
from mobilevit.exporting.graph import export_graph
from mobilevit.exporting.pt2 import in_bfloat16
from mobilevit.imaging.decode import find_images
from mobilevit.runtime.artifact import read_sidecar, write_sidecar
from test_cli import refused


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier whose batch size is open."""
    report = export(make("classification"), tmp_path_factory.mktemp("pt2"), format="pt2", dynamic=["batch"])
    assert report.verified == "yes"
    return report.path


def test_a_file_says_what_it_is_and_nothing_of_this_machine(program: Path) -> None:
    with zipfile.ZipFile(program) as archive:
        (told,) = (archive.read(name) for name in archive.namelist() if name.endswith("extra/mobilevit.json"))
        everything = b"".join(archive.read(name) for name in archive.namelist())
    assert json.loads(told) == json.loads(read_sidecar(program).to_json())
    assert str(Path(mobilevit.__file__).parent).encode() not in everything


def test_any_pytorch_program_can_load_it(program: Path) -> None:
    module = torch.export.load(program).module()
    size = read_sidecar(program).image_size
    assert size is not None
    (logits,) = module(torch.zeros(3, 3, *size))
    assert logits.shape == (3, 4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", TASKS)
def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(task: Any, name: str) -> None:
    model = make(task, name)
    graph = export_graph(model, image_size=(64, 128))
    halved = in_bfloat16(graph)
    assert next(graph.parameters()).dtype == torch.float32  # the original stays as it is
    kinds = [parameter.dtype for parameter in halved.parameters()]
    assert kinds.count(torch.bfloat16) > 0.9 * len(kinds)
    images = torch.rand(1, 3, 64, 128)
    with torch.no_grad():
        for wanted, found in zip(graph(images), halved(images), strict=True):
            assert found.dtype == torch.float32
            assert float((wanted - found).abs().max()) < 0.05 * float(wanted.abs().max())


def test_bfloat16_files_are_smaller_and_run(program: Path, tmp_path: Path) -> None:
    drawn.write_folder(tmp_path / "shapes", num_images=2, size=96)
    images = find_images(tmp_path / "shapes")
    report = export(make("classification"), tmp_path, format="pt2", precision="bf16", images=images)
    assert report.num_bytes < 0.7 * program.stat().st_size
    assert len(mobilevit.Predictor(report.path, trust_pt2=True)(images)[0].probabilities) == 4


class _Payload:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.fixture
def stranger(program: Path, tmp_path: Path) -> Path:
    """A file with a pickled object among its constants, which `torch.export.load` would unpickle."""
    path = tmp_path / "stranger.pt2"
    config = "data/constants/model_constants_config.json"
    with zipfile.ZipFile(program) as source, zipfile.ZipFile(path, "w") as target:
        root = source.namelist()[0].partition("/")[0]
        for name in source.namelist():
            content = source.read(name)
            if name == f"{root}/{config}":
                values = json.loads(content)
                entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
                values["config"]["x"] = entry
                content = json.dumps(values).encode()
            target.writestr(name, content)
        target.writestr(f"{root}/data/constants/opaque_obj_0", pickle.dumps(_Payload(tmp_path / "trace")))
    write_sidecar(path, read_sidecar(program))
    return path


def test_files_are_refused_unless_trusted(program: Path, stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = stranger.parent / "trace"
    with pytest.raises(MobileViTError, match=r"stranger\.pt2: refused, as loading a \.pt2 file can run code"):
        mobilevit.Predictor(stranger)
    told = refused(["predict", str(stranger), "image.jpg"], capsys)
    assert "if you made it yourself or trust who did, set --trust-pt2" in told
    assert not trace.exists()
    torch.export.load(stranger)
    assert trace.exists()  # that is why
    with pytest.raises(MobileViTError, match="refused"):
        mobilevit.Predictor(program)
    assert mobilevit.Predictor(program, trust_pt2=True).engine == "pt2 fp32"


def test_the_sidecar_decides_what_a_file_is(program: Path, tmp_path: Path) -> None:
    """Another suffix is no way around."""
    path = tmp_path / "model.onnx"
    shutil.copy(program, path)
    write_sidecar(path, read_sidecar(program))
    with pytest.raises(MobileViTError, match="refused"):
        mobilevit.Predictor(path)


def test_damaged_files_are_named(tmp_path: Path, program: Path) -> None:
    path = tmp_path / "broken.pt2"
    path.write_bytes(b"no archive")
    write_sidecar(path, read_sidecar(program))
    with pytest.raises(MobileViTError, match=r"broken\.pt2: pt2 cannot load it"):
        mobilevit.Predictor(path, trust_pt2=True)
