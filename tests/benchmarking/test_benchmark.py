"""Real runs at 64 pixels; what the figures are is not asserted, but that they are there and of the right contenders."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mobilevit
from mobilevit.benchmarking import benchmark as benchmarks
from mobilevit.benchmarking import contenders, peers, rounds, worker
from mobilevit.benchmarking.benchmark import benchmark
from mobilevit.benchmarking.config import BenchmarkConfig
from mobilevit.benchmarking.contenders import Contender, Network
from mobilevit.benchmarking.measurement import BenchmarkReport, Failure, Measurement, table
from mobilevit.benchmarking.plot import save_plot
from mobilevit.benchmarking.rounds import measure
from mobilevit.benchmarking.worker import Worker, WorkerError
from mobilevit.cli import main
from mobilevit.data.shapes import render_scene
from mobilevit.errors import MobileViTError
from mobilevit.machine import Machine

NETWORK = Network(label="mobilevit_xxs", origin="mobilevit", architecture="mobilevit_xxs", image_size=(64, 64))
EAGER = Contender(network=NETWORK, engine="eager")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = mobilevit.create_model("mobilevit_xxs", classes=("a", "b", "c"))
    return mobilevit.save(model, tmp_path_factory.mktemp("checkpoint") / "three.safetensors")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def report(checkpoint: Path, kept: Path) -> BenchmarkReport:
    pytest.importorskip("onnxruntime")

    data = kept / "data"
    for number, name in enumerate("abc" * 2):
        (data / name).mkdir(parents=True, exist_ok=True)
        render_scene(number, size=96).image.save(data / name / f"{number}.png")
    config = BenchmarkConfig(
        image_size=64,
        engines=("onnx", "eager"),
        precisions=("bf16", "fp32"),
        threads=(1,),
        peers=False,
        data=str(data),
        rounds=2,
        out=kept / "out",
        max_workers=2,  # so that two groups meet the same baseline
    )
    return benchmark(checkpoint, config)


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
        assert measurement.metrics.keys() >= {"top1"}
    assert plain.metrics == onnx.metrics


def test_files_tables_and_json(report: BenchmarkReport, kept: Path) -> None:
    written = json.loads((kept / "out" / "benchmark.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    assert written["measurements"][2]["contender"]["engine"] == "onnx"
    assert written["measurements"][2]["images_per_second"] == round(1e3 / report.measurements[2].median_ms, 3)
    assert (kept / "out" / "benchmark.png").stat().st_size > 10_000
    assert (kept / "out" / "exported" / "mobilevit_xxs.onnx").is_file()
    ((title, measurements),) = report.cases().items()
    assert title == "batch 1, 1 thread, cpu"
    heading, rows = table(measurements)
    assert all(len(row) == len(heading) for row in rows)
    assert heading[-1] == "top1"
    assert "GPU, MB" not in heading
    assert report.notes() == ["left out: onnx has no bf16"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"engines": ("tensorflow",)}, "unknown engine 'tensorflow'"),
        ({"engines": ("opnx",)}, "unknown engine 'opnx'; did you mean onnx"),
        ({"engines": ()}, "`engines` is empty"),
        ({"precisions": ("fp8",)}, "unknown precision 'fp8'"),
        ({"precisions": ()}, "`precisions` is empty"),
        ({"precisions": ("int8",)}, "give `calibration`"),
        ({"batch_sizes": (0,)}, "`batch_sizes` is 0"),
        ({"batch_sizes": ()}, "`batch_sizes` is empty"),
        ({"threads": (-1,)}, "`threads` is -1"),
        ({"rounds": 0}, "`rounds` is 0"),
        ({"max_workers": 1}, "`max_workers` is 1; give 2 or more"),
        ({"device": "mps"}, "mps"),
        ({"calibration": Path("nowhere")}, "`calibration`: nowhere is no folder of images"),
        ({"cvnets": Path("nowhere")}, "no clone of https://github.com/apple/ml-cvnets"),
        ({"image_size": (8, 8)}, "too small"),
        ({"engines": ("eager",), "precisions": ("fp16",)}, "nothing to measure: eager has no fp16 on the CPU"),
        ({"task": "detection", "compare": True}, "`compare` is for classification"),
        ({"task": "detection", "cvnets": Path("nowhere")}, "`cvnets` is for classification"),
        ({"data": "images"}, "`data` needs a checkpoint"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as told:
        benchmark("mobilevit_xxs", BenchmarkConfig(**{"engines": ("eager",), **arguments}))
    assert "\n" not in str(told.value)


def test_data_are_looked_at_before_anything_is_measured(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(MobileViTError, match="nowhere"):
        benchmark(checkpoint, BenchmarkConfig(engines=("eager",), data=str(tmp_path / "nowhere"), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_command_names_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "mobilevit_xxs", "--engines", "eager", "--batch-sizes", "1", "0"]) == 2
    assert capsys.readouterr().err == "error: --batch-sizes is 0; give 1 or more\n"
    assert main(["benchmark", "mobilevit_xxs", "--image-size", "8", "9", "--engines", "eager"]) == 2
    assert "too small" in capsys.readouterr().err
    assert main(["tune", "no.safetensors", "--max-loss", "2"]) == 2
    assert capsys.readouterr().err == "error: --max-loss is 2.0; give a share from 0 to 1, such as 0.01\n"


def test_engines_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders._PACKAGES, "litert", ("no_such_package",))
    picked, left_out = contenders.pick_engines(("all",), "cpu")
    assert "eager" in picked
    assert "litert" not in picked
    assert "litert: no_such_package not installed; pip install 'mobilevit[litert]'" in left_out
    with pytest.raises(ValueError, match="pip install"):
        contenders.pick_engines(("litert",), "cpu")
    assert "openvino: is measured on the CPU only; leave `device` out" in contenders.pick_engines(("all",), "cuda")[1]


def test_who_takes_part(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    model = mobilevit.create_model("mobilevit_xxs")
    networks, absent = benchmarks._networks(model, BenchmarkConfig(compare=True), tmp_path)
    assert not absent
    assert [network.label for network in networks] == [
        "mobilevit_xxs", "timm", "timm channels_last", "transformers", "MobileNetV2", "DeiT-Ti", "PiT-Ti",
    ]  # fmt: skip
    config = BenchmarkConfig(precisions=("fp32", "int8"), batch_sizes=(1, 4), threads=(1, 2))
    entered, _ = contenders.enter(networks, ["eager", "onnx", "pt2"], config, "cpu")
    assert len({(contender.name, contender.case) for contender in entered}) == len(entered)
    assert entered[0].network == networks[0]
    assert not [c for c in entered if c.precision == "int8" and c.network.origin != "mobilevit"]
    assert not [c for c in entered if c.engine == "pt2" and c.network.origin != "mobilevit"]
    other = mobilevit.create_model("mobilevit_xxs", patch_size=(8, 4, 2))
    networks, absent = benchmarks._networks(other, BenchmarkConfig(), tmp_path)
    assert len(networks) == len(absent) == 1


# -- workers ----------------------------------------------------------------------------------------------------------


def test_a_worker_answers_and_survives_mistakes(checkpoint: Path, tmp_path: Path) -> None:
    contender = dataclasses.replace(EAGER, network=dataclasses.replace(NETWORK, checkpoint=str(checkpoint)))
    missing = dataclasses.replace(EAGER, network=dataclasses.replace(NETWORK, checkpoint=str(tmp_path / "none.pt")))
    with closing(Worker(1)) as process:
        with pytest.raises(WorkerError, match=r"none\.pt"):
            process.ask("load", missing)
        loaded = process.ask("load", contender)
        assert loaded.weight_bytes > 10**6
        assert [part.shape for part in loaded.answers] == [(1, 3)]
        turn = process.ask("time", 3)
        assert len(turn.times_ms) == 3
        assert turn.gpu_memory is None


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])
@pytest.mark.parametrize("origin", ["timm", "transformers"])
def test_peers_compute_the_same(origin: str, name: str, tmp_path: Path) -> None:
    """On the same images, with their channels in the order that each expects."""
    pytest.importorskip(origin)
    torch.manual_seed(0)
    path = mobilevit.save(mobilevit.create_model(name, classes=("a", "b", "c")), tmp_path / "three.safetensors")
    ours = dataclasses.replace(NETWORK, architecture=name, checkpoint=str(path))
    answers = []
    for network in (ours, dataclasses.replace(ours, origin=origin)):
        model, preprocessing = peers.build(network)
        assert preprocessing.size == (64, 64)
        with torch.inference_mode():
            answers.append(
                model(worker._images(Contender(network=network, engine="eager", batch_size=2), preprocessing))
            )
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "config", "option", "value"),
    [
        ("mobilevit_xxs", "mobilevit.yaml", "model.classification.mit.mode", "xx_small"),
        ("mobilevitv2_050", "mobilevit_v2.yaml", "model.classification.mitv2.width_multiplier", 0.5),
    ],
)
def test_a_clone_of_cvnets(
    name: str, config: str, option: str, value: str | float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the functions of Apple's repository that are called."""
    for file, text in {
        "options/opts.py": (
            "from types import SimpleNamespace\n"
            "def get_training_arguments(args):\n"
            f"    assert args[0] == '--common.config-file' and args[1].endswith('/{config}')\n"
            "    return SimpleNamespace()\n"
        ),
        "options/__init__.py": "",
        "cvnets/models/__init__.py": "",
        "cvnets/__init__.py": (
            "import torch\n"
            "def get_model(opts):\n"
            f"    assert getattr(opts, {option!r}) == {value!r}\n"
            "    return torch.nn.Linear(1, getattr(opts, 'model.classification.n_classes'))\n"
        ),
        f"config/classification/imagenet/{config}": "",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for module in ("options", "options.opts", "cvnets"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    model = peers.cvnets_model(name, tmp_path, num_classes=7)
    assert next(model.parameters()).shape[0] == 7
    for module in ("options", "options.opts", "cvnets"):
        sys.modules.pop(module, None)
    (tmp_path / "cvnets" / "__init__.py").write_text("import no_such_package\n")
    with pytest.raises(ValueError, match="no_such_package"):
        peers.cvnets_model(name, tmp_path)
    for module in ("options", "options.opts", "cvnets"):
        sys.modules.pop(module, None)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_the_death_of_a_worker_is_explained() -> None:
    with closing(Worker(1)) as process:
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"its process ended \(SIGKILL, perhaps out of memory\)"):
            process.ask("time", 1)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_worker_does_not_outlive_its_parent() -> None:
    code = "from mobilevit.benchmarking.worker import Worker; print(Worker(1).pid, flush=True); input()"
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


def test_who_dies_between_turns_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scripted:
        """A worker whose third turn is its last if it runs bf16."""

        def __init__(self, _threads: int) -> None:
            self.turns = 0
            self.mortal = False

        def ask(self, method: str, argument: Any) -> Any:
            if method == "load":
                self.mortal = argument.precision == "bf16"
                if argument.precision == "fp16":
                    raise WorkerError("no such thing")
                warm_up = worker.Turn(times_ms=[10.0], memory=1, gpu_memory=None)
                answers = [np.array([2.0, -4.0 if argument.precision == "fp32" else -3.0])]
                return worker.Loaded(seconds=1.0, weight_bytes=1, answers=answers, warm_up=warm_up)
            self.turns += 1
            if self.mortal and self.turns == 3:
                raise WorkerError("its process ended")
            return worker.Turn(times_ms=[10.0, 12.0, 11.0], memory=2, gpu_memory=None)

        def close(self) -> None: ...

    monkeypatch.setattr(rounds, "Worker", Scripted)
    entered = [dataclasses.replace(EAGER, precision=precision) for precision in ("fp32", "bf16", "fp16", "int8")]
    (baseline, last), failures = measure(entered, rounds=4, max_workers=2)
    assert [failure.contender for failure in failures] == entered[1:3]
    assert [baseline.contender, last.contender] == [entered[0], entered[3]]
    assert (last.speedup, last.deviation, last.memory, last.runs) == (1.0, 0.25, 2, 12)
    assert baseline.deviation == 0.0
    # Without its baseline, a contender has no ratio.
    (alone,), _ = measure([entered[2], entered[0]], rounds=4)
    assert alone.speedup is None


def test_an_export_that_fails(tmp_path: Path) -> None:
    contender = dataclasses.replace(EAGER, engine="onnx", network=dataclasses.replace(NETWORK, checkpoint="none.pt"))
    ready, (failure,) = benchmarks._export_all([EAGER, contender], tmp_path, None)
    assert ready == [EAGER]
    assert failure.contender == contender
    assert failure.reason.startswith("export: ")


# -- the plot ---------------------------------------------------------------------------------------------------------


def test_plots_with_and_without_accuracy(tmp_path: Path) -> None:
    bars = _report(_measurement("eager", 10), _measurement("onnx", 5, speedup=None), _measurement("onnx", 9, threads=2))
    other = dataclasses.replace(NETWORK, label="$other", published_top1=0.7)
    both = _report(
        _measurement("eager", 10, network=dataclasses.replace(NETWORK, published_top1=0.69)),
        _measurement("onnx", 5, network=other, precision="int8"),
        _measurement("onnx", 9, threads=2),
    )
    sizes = {}
    for name, report in (("bars", bars), ("both", both)):
        save_plot(report, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            sizes[name] = image.size
    assert sizes["both"][0] > 1.5 * sizes["bars"][0]
    heading, rows = table(both.cases()["batch 1, 1 thread, cpu"])
    assert [row[heading.index("engine")] for row in rows] == ["onnx", "eager"]
    assert both.notes() == ["failed: mobilevit_xxs eager fp32: why", "left out: litert: not installed"]
