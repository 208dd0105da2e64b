"""A real tuning at 64 pixels: what wins is the machine's affair; that it is found again, and only here, is asserted."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mobilevit
from mobilevit.benchmarking import tune as tuning
from mobilevit.benchmarking.config import TuneConfig
from mobilevit.benchmarking.tune import Tuned, tune
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.runtime.tuned import find_tuned, tuned_file

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = mobilevit.create_model("mobilevit_xxs", num_classes=5)
    path = tmp_path_factory.mktemp("tuned") / "five.safetensors"
    return mobilevit.save(model, path, preprocessing=Preprocessing(size=(64, 64)))


@pytest.fixture(scope="module")
def tuned(checkpoint: Path) -> Tuned:
    """With ONNX as the winner, whatever the machine says."""
    with pytest.MonkeyPatch.context() as patch:
        measure = tuning.measure

        def onnx_wins(*arguments: Any, **settings: Any) -> Any:
            measured, failures = measure(*arguments, **settings)
            for number, found in enumerate(measured):
                if found.contender.engine == "onnx":
                    measured[number] = dataclasses.replace(found, median_ms=1e-3)
            return measured, failures

        patch.setattr(tuning, "measure", onnx_wins)
        config = TuneConfig(engines=("onnx",), precisions=("fp32", "bf16", "int8"), threads=1, rounds=2)
        return tune(checkpoint, config)


@pytest.fixture
def result(tuned: Tuned, checkpoint: Path) -> Any:
    """The values of the file, which a test may change."""
    before = tuned.path.read_text()
    yield json.loads(before)
    tuned.path.write_text(before)


def test_the_winner_is_kept_and_found(tuned: Tuned, checkpoint: Path) -> None:
    assert tuned.path == tuned_file(checkpoint) == checkpoint.with_name("five.tuned.json")
    assert tuned.artifact == checkpoint.parent / "five.tuned" / "five.onnx"
    assert find_tuned(checkpoint) == (tuned.artifact, 1)
    assert [(m.contender.engine, m.contender.threads) for m in tuned.measurements] == [("onnx", 1), ("eager", 1)]
    assert dict(tuned.dropped) == {"int8": "not tried, as no calibration images were given"}
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == ["five.safetensors", "five.tuned", "five.tuned.json"]
    heading, rows = tuned.table()
    assert all(len(row) == len(heading) for row in rows)
    json.dumps(tuned.to_dict())
    assert str(checkpoint.parent) not in tuned.path.read_text()


def test_the_predictor_uses_it(tuned: Tuned, checkpoint: Path) -> None:
    image = torch.arange(64 * 64 * 3, dtype=torch.uint8).reshape(64, 64, 3).numpy()
    plain = mobilevit.Predictor(checkpoint)(image)
    fast = mobilevit.Predictor(checkpoint, engine="auto")(image)
    assert plain.top(5)[0][1] == pytest.approx(fast.top(5)[0][1], abs=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"machine": {"processor": "another", "cores": 1, "system": "Linux"}}, "another machine (processor: another"),
        ({"packages": {"onnxruntime": "0.1"}}, "other versions (onnxruntime 0.1, here "),
        ({"checkpoint_sha256": "0"}, "five.safetensors has changed since"),
        ({"tuned_version": 99}, "another version of this package"),
        ({"artifact": "five.tuned/none.onnx"}, "damaged"),
        ({"engine": None}, "damaged"),
    ],
)
def test_stale_results_are_ignored(
    change: Mapping[str, Any],
    words: str,
    result: dict[str, Any],
    tuned: Tuned,
    checkpoint: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tuned.path.write_text(json.dumps({**result, **change}))
    with caplog.at_level(logging.INFO, logger="mobilevit"):
        assert find_tuned(checkpoint) is None
    (line,) = caplog.messages
    assert words in line
    assert f"run mobilevit tune {checkpoint} again" in line


def test_no_result_or_pytorch_the_fastest(
    result: dict[str, Any], tuned: Tuned, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_tuned(tmp_path / "none.safetensors") is None
    versions = {"torch": torch.__version__.partition("+")[0]}
    tuned.path.write_text(json.dumps({**result, "engine": "eager", "artifact": None, "packages": versions}))
    assert find_tuned(checkpoint) is None
    tuned.path.write_text("not JSON")
    assert find_tuned(checkpoint) is None


def test_what_loses_too_much_is_dropped(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_loss", lambda _: 0.1)
    config = TuneConfig(out=tmp_path / "out", engines=("onnx",), precisions=("fp32",), threads=1, rounds=1)
    found = tune(checkpoint, config)
    assert found.fastest.contender.engine == "eager"
    assert found.artifact is None
    assert found.dropped == (("onnx fp32", "loses 10.00%, where 1.00% is allowed"),)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["five.tuned.json"]
    values = json.loads(found.path.read_text())
    assert (values["engine"], values["precision"], values["threads"]) == ("eager", "fp32", 1)
    assert (values["artifact"], values["losses"], values["speedup"]) == (None, {"onnx fp32": 0.1}, 1.0)


def test_loss_is_of_accuracy_if_that_was_measured() -> None:
    parity = SimpleNamespace(agreement=0.98)
    artifact = SimpleNamespace(card=SimpleNamespace(task="detection"))
    report = SimpleNamespace(artifact=artifact, parity=parity, metrics={}, torch_metrics={})
    assert tuning._loss(report) == pytest.approx(0.02)  # type: ignore[arg-type]
    report.metrics, report.torch_metrics = {"ap": 0.55}, {"ap": 0.6}
    assert tuning._loss(report) == pytest.approx(0.05)  # type: ignore[arg-type]
    report.metrics = {"ap": 0.65}
    assert tuning._loss(report) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_loss": 2}, "`max_loss` is 2"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"threads": 0}, "`threads` is 0"),
        ({"rounds": 0}, "`rounds` is 0"),
        ({"precisions": ("fp8",)}, "unknown precision 'fp8'"),
        ({"engines": ("compile",)}, "compiles in every process"),
        ({"engines": ("tvm",)}, "unknown engine 'tvm'"),
        ({"images": Path("nowhere")}, "`images`: nowhere is no folder of images"),
        ({"calibration": Path("nowhere")}, "`calibration`: nowhere is no folder of images"),
        ({"data": "nowhere"}, "nowhere"),
        ({"engines": ("opnvino",)}, "did you mean openvino?"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: dict[str, Any], words: str, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=words) as told:
        tune(checkpoint, TuneConfig(**arguments))
    assert "\n" not in str(told.value)
