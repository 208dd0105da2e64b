"""`torch.export` files: bfloat16, what they say, and that no file can run code of its own when it is loaded."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import TASKS, make

import mobilevit
from mobilevit.data import shapes as drawn
from mobilevit.exporting.export import export
from mobilevit.exporting.graph import ExportGraph
from mobilevit.exporting.pt2 import in_bfloat16
from mobilevit.imaging.decode import find_images
from mobilevit.runtime import pt2
from mobilevit.runtime.artifact import read_sidecar, write_sidecar


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


@pytest.mark.parametrize("task", TASKS)
def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(task: Any) -> None:
    model = make(task)
    graph = ExportGraph(model, image_size=(64, 128)).eval()
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
    assert len(mobilevit.Predictor(report.path)(images)[0].probabilities) == 4


class _Payload:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def _changed(program: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy whose entries went through `change`, with a sidecar that fits."""
    with zipfile.ZipFile(program) as archive:
        root = archive.namelist()[0].partition("/")[0]
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in entries.items():
            archive.writestr(f"{root}/{name}", content)
    write_sidecar(target, read_sidecar(program))
    return target


def _edit(entries: dict[str, bytes], name: str, change: Callable[[Any], None]) -> None:
    values = json.loads(entries[name])
    change(values)
    entries[name] = json.dumps(values).encode()


GRAPH, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"


def _pickled_weight(entries: dict[str, bytes], trace: Path) -> None:
    entries["data/weights/weight_0"] = pickle.dumps(_Payload(trace))
    _edit(entries, WEIGHTS, lambda values: next(iter(values["config"].values())).update(use_pickle=True))


def _pickled_object(entries: dict[str, bytes], trace: Path) -> None:
    entries["data/constants/opaque_obj_0"] = pickle.dumps(_Payload(trace))
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    _edit(entries, "data/constants/model_constants_config.json", lambda values: values["config"].update(x=entry))


def _evaluated_shape(entries: dict[str, bytes], trace: Path) -> None:
    code = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    entries[GRAPH] = entries[GRAPH].replace(b'"expr_str": "', f'"expr_str": "{code} or '.encode(), 1)


def _code_as_name(entries: dict[str, bytes], trace: Path) -> None:
    name = f"images=__import__('pathlib').Path({str(trace)!r}).touch()"
    entries[GRAPH] = entries[GRAPH].replace(b'"images"', json.dumps(name).encode())


def _other_function(entries: dict[str, bytes], trace: Path) -> None:
    def change(values: Any) -> None:
        values["graph_module"]["graph"]["nodes"][0]["target"] = "torch.hub.load"

    _edit(entries, GRAPH, change)


def _compiled_library(entries: dict[str, bytes], trace: Path) -> None:
    entries["data/aotinductor/model/model.so"] = b"\x7fELF"


@pytest.mark.parametrize(
    "attack",
    [_pickled_weight, _pickled_object, _evaluated_shape, _code_as_name, _other_function, _compiled_library],
    ids=lambda attack: attack.__name__.strip("_"),
)
def test_files_that_could_run_code_are_refused(attack: Any, program: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = _changed(program, tmp_path / "stranger.pt2", lambda entries: attack(entries, trace))
    with pytest.raises(ValueError, match="refused, as loading it could run code"):
        mobilevit.Predictor(path)
    assert not trace.exists()


def test_what_need_not_be_read_is_left_out(program: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    def change(entries: dict[str, bytes]) -> None:
        example = io.BytesIO()
        torch.save(_Payload(trace), example)
        entries["data/sample_inputs/model.pt"] = example.getvalue()
        guard = f"__import__('pathlib').Path({str(trace)!r}).touch()"
        _edit(entries, GRAPH, lambda values: values.update(guards_code=[guard]))

    path = _changed(program, tmp_path / "stranger.pt2", change)
    torch.export.load(pt2.read(path)).module()
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"no archive", b"PK\x05\x06" + bytes(18)])
def test_damaged_files_are_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.pt2"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.pt2: (damaged|refused)"):
        pt2.read(path)
