"""What runs on a GPU for a few minutes has been run from end to end before, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_session.py"


def session(*arguments: str | Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--rehearse", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
    )


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Result files by name, and what was printed."""
    out = tmp_path_factory.mktemp("results")
    process = session("--out", out)
    told, _ = process.communicate(timeout=900)
    assert process.returncode == 0, told[-4000:]
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}, told


def test_every_stage_passes_and_leaves_its_file(rehearsal: tuple[dict[str, Any], str]) -> None:
    results, told = rehearsal
    assert set(results) == {
        "gpu_session", "gpu_tests", "gpu_inference", "gpu_training", "imagenette-mobilevit_xxs",
        "cifar10-mobilevit_xxs",
    }  # fmt: skip
    stages = results["gpu_session"]["stages"]
    assert list(stages) == ["tests", "inference", "training", "imagenette", "cifar10"]
    assert [stage["status"] for stage in stages.values()] == ["passed"] * 5
    assert all(result["packages"]["torch"] for result in results.values())
    assert all(name in told for name in stages)


def test_the_tests_of_the_gpu_ran(rehearsal: tuple[dict[str, Any], str]) -> None:
    found = rehearsal[0]["gpu_tests"]
    assert found["failed"] == []
    assert any("gradients_are_the_cpus" in name for name in found["passed"])
    assert len(found["passed"]) > 10
    assert all("GPU" in name for name in found["skipped"])  # with the reason


def test_inference_compares_every_side_and_says_where_time_goes(rehearsal: tuple[dict[str, Any], str]) -> None:
    found = rehearsal[0]["gpu_inference"]
    assert set(found["limits"]) == {"gemm_fp32_tflops", "copy_gb_per_second"}
    (case,) = found["cases"].values()
    speed = case["images_per_second"]
    assert case["failed"] == {}
    assert {f"timm {layout}, {how}" for layout in ("contiguous", "channels_last") for how in ("eager", "compiled")} | {
        "mobilevit, eager", "mobilevit fused, eager", "mobilevit fused, compiled", "mobilevit padded, compiled",
    } == set(speed)  # fmt: skip
    assert max(case["error"].values()) < 1e-4
    best = [max(speed[side] for side in speed if side.startswith(origin)) for origin in ("mobilevit", "timm")]
    assert case["ratio"] == pytest.approx(best[0] / best[1], rel=0.02)
    image = case["an_image"]
    assert image["gflops"] == pytest.approx(0.042, rel=0.05)  # two for each multiply-add
    assert 0 < image["megabytes_moved"]["least"] < image["megabytes_moved"]["eager"]
    kinds = case["profile"]["ms_by_kind"]
    assert {"convolution", "matrix product", "attention", "pointwise"} <= set(kinds)
    assert all(value >= 0 for value in kinds.values())


def test_training_compares_the_same_loop_and_reads_images(rehearsal: tuple[dict[str, Any], str]) -> None:
    found = rehearsal[0]["gpu_training"]
    steps = found["steps"]["mobilevit_xxs"]
    assert set(steps["images_per_second"]) == {
        "mobilevit, compiled", "timm channels_last, compiled", "mobilevit, eager", "timm channels_last, eager",
        "timm contiguous, eager",
    }  # fmt: skip
    assert steps["failed"] == {}
    speed = steps["images_per_second"]
    ratio = speed["mobilevit, eager"] / speed["timm channels_last, eager"]
    assert steps["ratio"]["timm channels_last, eager"] == pytest.approx(ratio, rel=0.02)
    reading = found["reading"]["mobilevit_xxs"]
    fed = [told for name, told in reading.items() if name.endswith("processes")]
    assert fed
    for told in fed:
        assert told["of_synthetic"] == pytest.approx(told["training"] / reading["synthetic"], abs=0.02)


def test_runs_from_scratch_tell_figure_and_time(rehearsal: tuple[dict[str, Any], str]) -> None:
    for name in ("imagenette", "cifar10"):
        found = rehearsal[0][f"{name}-mobilevit_xxs"]
        assert (found["data_set"], found["validation_images"], found["epochs"]) == (name, 18, 1)
        assert found["top1"] == pytest.approx(found["top1_by_epoch"][-1], abs=1e-6)
        assert 900_000 < found["parameters"] < 1_000_000
        assert found["minutes"] > 0
        assert str(ROOT) not in json.dumps(found)
    assert rehearsal[0]["imagenette-mobilevit_xxs"]["leaderboard_top1"]["epochs 80"] == 0.9355


def test_the_page_has_a_table_for_every_stage(
    rehearsal: tuple[dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    results = {name: result for name, result in rehearsal[0].items() if name in tables.MEASUREMENTS}
    text = tables.sections_of(results, tables.AT_SCALE)
    assert text.count("## Measured: on a GPU") == 4
    assert f"{len(results['gpu_tests']['passed'])} passed, 0 failed" in text
    for row in ("| mobilevit fused, compiled | ", "| matrix product | ", "| XXS, 4 images | timm contiguous, eager | "):
        assert row in text
    assert "| imagenette | XXS, 1.0 M parameters | 1 | " in text


def test_a_stage_without_time_is_not_begun(tmp_path: Path) -> None:
    process = session("--stages", "training", "--out", tmp_path, "--budget", "5")
    process.communicate(timeout=60)
    assert process.returncode == 1
    found = json.loads((tmp_path / "gpu_session.json").read_text())["stages"]
    assert found == {"training": {"status": "no time", "seconds": 0.0}}


@pytest.fixture
def stages_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs Python programs as stages, each for four seconds at most; returns exit status and result file."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_session

    monkeypatch.setattr(gpu_session, "LEAST_SECONDS", 1.0)

    def run(**programs: str) -> tuple[int, dict[str, Any]]:
        for name, program in programs.items():
            command = [sys.executable, "-c", program]
            stage = gpu_session.Stage(seconds=4, commands=lambda _job, _seconds, command=command: [command])
            monkeypatch.setitem(gpu_session.STAGES, name, stage)
        job = gpu_session.Job(out=tmp_path, folder=tmp_path, data={}, rehearse=True)
        status = gpu_session.run(list(programs), job, time.monotonic() + 60, warm_up=False)
        return status, json.loads((tmp_path / "gpu_session.json").read_text())["stages"]

    return run


def test_a_stage_that_fails_stops_no_other(stages_of: Any) -> None:
    status, found = stages_of(inference="raise SystemExit(3)", training="pass")
    assert status == 1
    assert {name: (stage["status"], stage["exit_statuses"]) for name, stage in found.items()} == {
        "inference": ("failed", [3]),
        "training": ("passed", [0]),
    }
    assert stages_of(training="pass")[0] == 0


def test_a_stage_is_ended_in_time_with_what_it_started(stages_of: Any, tmp_path: Path) -> None:
    noted = tmp_path / "child"
    endless = "import pathlib, subprocess; p = subprocess.Popen(['sleep', '600']); "
    endless += f"pathlib.Path({str(noted)!r}).write_text(str(p.pid)); p.wait()"
    status, found = stages_of(training=endless)
    assert (status, found["training"]["status"]) == (1, "timed out")
    assert 4 <= found["training"]["seconds"] < 20
    state = Path("/proc", noted.read_text(), "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
