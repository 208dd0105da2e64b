"""Real runs at 64 pixels; what the figures are is not asserted, but that they are there and of the right contenders."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import mobilevit
from mobilevit.benchmarking import benchmark as benchmarks
from mobilevit.benchmarking import contenders, peers, rounds, worker
from mobilevit.benchmarking.benchmark import benchmark
from mobilevit.benchmarking.contenders import Contender, Network
from mobilevit.benchmarking.exports import export_all
from mobilevit.benchmarking.report import BenchmarkReport, read_report
from mobilevit.benchmarking.rounds import Failure, Measurement, Worker, WorkerError, measure
from mobilevit.machine import Machine

NETWORK = Network(label="mobilevit_xxs", origin="mobilevit", architecture="mobilevit_xxs", image_size=(64, 64))
EAGER = Contender(network=NETWORK, engine="eager")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = mobilevit.create_model("mobilevit_xxs", num_classes=5)
    return mobilevit.save(model, tmp_path_factory.mktemp("checkpoint") / "five.safetensors")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def report(checkpoint: Path, kept: Path) -> BenchmarkReport:
    pytest.importorskip("onnxruntime")

    def evaluate(session: Any, card: Any, label: str) -> dict[str, float]:
        assert label.startswith("mobilevit_xxs")
        answers = session(torch.zeros(1, 3, *card.preprocessing.size, dtype=torch.uint8))
        return {"top1": 0.5, "classes": float(answers.shape[1])}

    return benchmark(
        checkpoint,
        image_size=(64, 64),
        engines=("onnx", "eager"),
        precisions=("bf16", "fp32"),
        threads=(1,),
        with_peers=False,
        evaluate=evaluate,
        rounds=2,
        out=kept,
        max_workers=2,  # so that two groups meet the same baseline
    )


def _measurement(engine: str, ms: float, **changes: Any) -> Measurement:
    settings = {key: changes.pop(key) for key in ("network", "precision", "batch_size", "threads") if key in changes}
    values: dict[str, Any] = {
        "contender": dataclasses.replace(EAGER, engine=engine, **settings),
        "median_ms": ms,
        "quartiles_ms": (ms * 0.9, ms * 1.2),
        "fastest_ms": ms * 0.8,
        "slowest_ms": ms * 2,
        "runs": 9,
        "rounds": 3,
        "speedup": 10 / ms,
        "start_s": 1.0,
        "memory": 10**8,
        "gpu_memory": None,
        "weight_bytes": 10**6,
        "deviation": 0.0,
    }
    return Measurement(**{**values, **changes})


def _report(*measurements: Measurement) -> BenchmarkReport:
    return BenchmarkReport(
        model="a $model",
        task="classification",
        device="cpu",
        rounds=3,
        machine=Machine(processor="processor", cores=2, system="Linux x86_64"),
        packages={},
        date="2025-01-31",
        measurements=measurements,
        failures=(Failure(contender=EAGER, reason="why"),),
        left_out=("litert: not installed",),
    )


# -- a whole benchmark ------------------------------------------------------------------------------------------------


def test_everyone_is_measured_beside_plain_pytorch(report: BenchmarkReport) -> None:
    assert not report.failures
    assert [m.contender.name for m in report.measurements] == [
        "mobilevit_xxs eager fp32", "mobilevit_xxs eager bf16", "mobilevit_xxs onnx fp32"
    ]  # fmt: skip
    assert report.left_out == ("onnx has no bf16",)
    plain, half, onnx = report.measurements
    assert plain.speedup == 1.0
    assert plain.deviation == 0.0
    assert half.deviation is not None
    assert onnx.deviation is not None
    assert onnx.deviation < 1e-4 < half.deviation
    for measurement in report.measurements:
        assert measurement.rounds == 2
        assert measurement.speedup is not None
        assert measurement.fastest_ms <= measurement.quartiles_ms[0] <= measurement.quartiles_ms[1]
        assert measurement.quartiles_ms[1] <= measurement.slowest_ms
        assert measurement.memory > measurement.weight_bytes > 10**6
        assert measurement.metrics == {"top1": 0.5, "classes": 5.0}


def test_files_tables_and_json(report: BenchmarkReport, kept: Path) -> None:
    assert read_report(kept / "benchmark.json") == report
    assert (kept / "benchmark.png").stat().st_size > 10_000
    assert (kept / "exported" / "mobilevit_xxs.onnx").is_file()
    heading, rows = report.table(report.cases[0])
    assert all(len(row) == len(heading) for row in rows)
    assert heading[-1] == "top1"
    assert report.notes() == ["left out: onnx has no bf16"]


def test_no_result_file(tmp_path: Path) -> None:
    (tmp_path / "benchmark.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as a result of mobilevit benchmark"):
        read_report(tmp_path / "benchmark.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"engines": ("tensorflow",)}, "unknown engine 'tensorflow'"),
        ({"engines": ()}, "no engine is named"),
        ({"precisions": ("fp8",)}, "unknown precision 'fp8'"),
        ({"precisions": ()}, "no precision is named"),
        ({"precisions": ("int8",)}, "give --calibration"),
        ({"batch_sizes": (0,)}, "batch size is 0"),
        ({"batch_sizes": ()}, "no batch size"),
        ({"threads": (-1,)}, "threads is -1"),
        ({"rounds": 0}, "rounds is 0"),
        ({"max_workers": 1}, "max_workers is 1"),
        ({"device": "mps"}, "--device mps"),
        ({"cvnets": "nowhere"}, "no clone of https://github.com/apple/ml-cvnets"),
        ({"image_size": (8, 8)}, "too small"),
        ({"engines": ("eager",), "precisions": ("fp16",)}, "nothing to measure: eager has no fp16 on the CPU"),
        ({"task": "detection", "compare": True}, "--compare is for classification"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as told:
        benchmark("mobilevit_xxs", **{"engines": ("eager",), **arguments})
    assert "\n" not in str(told.value)


def test_engines_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders._PACKAGES, "litert", ("no_such_package",))
    picked, left_out = contenders.pick_engines(("all",), "cpu")
    assert "eager" in picked
    assert "litert" not in picked
    assert "litert: no_such_package not installed; pip install 'mobilevit[litert]'" in left_out
    with pytest.raises(ValueError, match="pip install"):
        contenders.pick_engines(("litert",), "cpu")
    assert "openvino: is measured on the CPU only; leave --device out" in contenders.pick_engines(("all",), "cuda")[1]


def test_who_takes_part(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    model = mobilevit.create_model("mobilevit_xxs")
    networks, absent = benchmarks._networks(
        model, (256, 256), tmp_path, with_peers=True, cvnets=None, compare=True, patches=True
    )
    assert not absent
    assert [network.label for network in networks] == [
        "mobilevit_xxs", "mobilevit_xxs patches 8, 4, 2", "timm", "timm channels_last", "transformers",
        "MobileNetV2", "DeiT-Ti", "PiT-Ti",
    ]  # fmt: skip
    entered, _ = contenders.enter(
        networks, ["eager", "onnx", "pt2"], ["fp32", "int8"], batch_sizes=(1, 4), threads=(1, 2), device="cpu"
    )
    assert len({(contender.name, contender.case) for contender in entered}) == len(entered)
    assert entered[0].network == networks[0]
    assert not [c for c in entered if c.precision == "int8" and c.network.origin != "mobilevit"]
    assert not [c for c in entered if c.engine == "pt2" and c.network.origin != "mobilevit"]
    other = mobilevit.create_model("mobilevit_xxs", patch_size=(8, 4, 2))
    networks, absent = benchmarks._networks(
        other, (256, 256), tmp_path, with_peers=True, cvnets=None, compare=False, patches=True
    )
    assert len(networks) == 1
    assert len(absent) == 2


# -- workers ----------------------------------------------------------------------------------------------------------


def test_a_worker_answers_and_survives_mistakes(checkpoint: Path, tmp_path: Path) -> None:
    contender = dataclasses.replace(EAGER, network=dataclasses.replace(NETWORK, checkpoint=str(checkpoint)))
    missing = dataclasses.replace(EAGER, network=dataclasses.replace(NETWORK, checkpoint=str(tmp_path / "none.pt")))
    requests = [
        {"do": "load", "contender": missing.to_dict(), "answers": str(tmp_path / "a.npz")},
        {"do": "load", "contender": contender.to_dict(), "answers": str(tmp_path / "a.npz")},
        {"do": "time", "runs": 3},
    ]
    replies = io.StringIO()
    worker.serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), replies)
    failed, loaded, timed = (json.loads(line) for line in replies.getvalue().splitlines())
    assert "none.pt" in failed["error"]
    assert loaded["weight_bytes"] > 10**6
    assert len(timed["milliseconds"]) == 3
    assert timed["gpu_memory"] is None


@pytest.mark.parametrize("origin", ["timm", "transformers"])
def test_peers_compute_the_same(origin: str, checkpoint: Path) -> None:
    pytest.importorskip(origin)
    ours, _ = worker.build(dataclasses.replace(NETWORK, checkpoint=str(checkpoint)))
    peer, preprocessing = worker.build(dataclasses.replace(NETWORK, origin=origin, checkpoint=str(checkpoint)))
    assert preprocessing.size == (64, 64)
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        theirs = peer(images.flip(1) if origin == "transformers" else images)
        torch.testing.assert_close(theirs, ours(images), atol=1e-4, rtol=1e-4)


def test_a_clone_of_cvnets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the functions of Apple's repository that are called."""
    for name, text in {
        "options/opts.py": (
            "from types import SimpleNamespace\n"
            "def get_training_arguments(args):\n"
            "    assert args[0] == '--common.config-file'\n"
            "    return SimpleNamespace()\n"
        ),
        "options/__init__.py": "",
        "cvnets/models/__init__.py": "",
        "cvnets/__init__.py": (
            "import torch\n"
            "def get_model(opts):\n"
            "    assert getattr(opts, 'model.classification.mit.mode') == 'xx_small'\n"
            "    return torch.nn.Linear(1, getattr(opts, 'model.classification.n_classes'))\n"
        ),
        "config/classification/imagenet/mobilevit.yaml": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("options", "options.opts", "cvnets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    model = peers.cvnets_model("mobilevit_xxs", tmp_path, num_classes=7)
    assert next(model.parameters()).shape[0] == 7
    for name in ("options", "options.opts", "cvnets"):
        sys.modules.pop(name, None)
    (tmp_path / "cvnets" / "__init__.py").write_text("import no_such_package\n")
    with pytest.raises(ValueError, match="no_such_package"):
        peers.cvnets_model("mobilevit_xxs", tmp_path)
    for name in ("options", "options.opts", "cvnets"):
        sys.modules.pop(name, None)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_the_death_of_a_worker_is_explained() -> None:
    with Worker(1) as process:
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"its process ended \(SIGKILL, perhaps for want of memory\)"):
            process.ask("time", runs=1)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_worker_does_not_outlive_its_parent() -> None:
    code = "from mobilevit.benchmarking.rounds import Worker; print(Worker(1).pid, flush=True); input()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdin is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    stat = Path("/proc", str(pid), "stat")
    for _ in range(600):
        # In a container nobody may take the dead one's leave.
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("still there after a minute")


def test_who_dies_between_turns_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Scripted:
        """A worker whose third turn is its last if it runs bf16."""

        def __init__(self, _threads: int) -> None:
            self.turns = 0
            self.mortal = False

        def ask(self, do: str, **details: Any) -> dict[str, Any]:
            if do == "load":
                self.mortal = details["contender"]["precision"] == "bf16"
                if details["contender"]["precision"] == "fp16":
                    raise WorkerError("no such thing")
                return {"seconds": 1.0, "milliseconds": 10.0, "weight_bytes": 1, "memory": 1, "gpu_memory": None}
            self.turns += 1
            if self.mortal and self.turns == 3:
                raise WorkerError("its process ended")
            return {"milliseconds": [10.0, 12.0, 11.0], "memory": 2, "gpu_memory": None}

        def close(self) -> None: ...

    monkeypatch.setattr(rounds, "Worker", Scripted)
    entered = [dataclasses.replace(EAGER, precision=precision) for precision in ("fp32", "bf16", "fp16", "int8")]
    results = measure(entered, rounds=4, folder=tmp_path, max_workers=2)
    assert [type(result) for result in results] == [Measurement, Failure, Failure, Measurement]
    assert isinstance(results[3], Measurement)
    assert results[3].speedup == 1.0
    # Without its baseline, a contender has no ratio.
    results = measure([entered[2], entered[0]], rounds=4, folder=tmp_path)
    assert isinstance(results[1], Measurement)
    assert results[1].speedup is None


def test_an_export_that_fails(tmp_path: Path) -> None:
    contender = dataclasses.replace(EAGER, engine="onnx", network=dataclasses.replace(NETWORK, checkpoint="none.pt"))
    (failure,) = export_all([contender], tmp_path)
    assert isinstance(failure, Failure)
    assert failure.reason.startswith("export: ")


# -- the image ------------------------------------------------------------------------------------------------------


def test_images_with_and_without_accuracy(tmp_path: Path) -> None:
    bars = _report(_measurement("eager", 10), _measurement("onnx", 5, speedup=None), _measurement("onnx", 9, threads=2))
    bars.save(tmp_path / "bars")
    other = dataclasses.replace(NETWORK, label="$other", published_top1=0.7)
    both = _report(
        _measurement("eager", 10, network=dataclasses.replace(NETWORK, published_top1=0.69)),
        _measurement("onnx", 5, network=other, precision="int8"),
        _measurement("onnx", 9, threads=2),
    )
    both.save(tmp_path / "both")
    assert read_report(tmp_path / "both" / "benchmark.json") == both
    assert all((tmp_path / name / "benchmark.png").is_file() for name in ("bars", "both"))
