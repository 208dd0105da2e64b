"""Killed at any moment and resumed, a run ends with the weights of one that was never killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SETTINGS = (
    "--image-size", "32", "--epochs", "3", "--batch-size", "8", "--num-workers", "1", "--checkpoint-minutes", "0",
    "--learning-rate", "1e-3", "--randaugment", "5", "--device", "cpu",
)  # fmt: skip


def command(data: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "mobilevit", "train", "--data", str(data), "--out", str(out), *SETTINGS, *more]


def run_and_kill(data: Path, out: Path, *more: str, checkpoints: int) -> bool:
    """Start training, SIGKILL it shortly after some checkpoints; False if it ended before."""
    last = out / "last.pt"
    process = subprocess.Popen(command(data, out, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen, stamp = 0, last.stat().st_mtime_ns if last.exists() else 0
    while process.poll() is None:
        now = last.stat().st_mtime_ns if last.exists() else 0
        if now != stamp:
            seen, stamp = seen + 1, now
        if seen >= checkpoints:
            time.sleep(random.random() * 0.05)
            process.kill()
            process.wait()
            return True
        time.sleep(0.002)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_to_the_group_save_and_exit(shapes: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    line = [*command(shapes, out, "--checkpoint-minutes", "60", "--epochs", "500")]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (out / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"stopped and saved; go on with: mobilevit train --config {out / 'config.json'} --resume" in told
    assert "Traceback" not in told
    position = torch.load(out / "last.pt", weights_only=True)["position"]
    assert (position["epoch"], position["step"]) > (0, 0)


def test_sigkill_and_resume_end_with_identical_weights(shapes: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(shapes, whole), check=True, capture_output=True)
    assert run_and_kill(shapes, killed, checkpoints=4)
    assert run_and_kill(shapes, killed, "--resume", checkpoints=6)
    torch.load(killed / "last.pt", weights_only=True)
    finished = subprocess.run(command(shapes, killed, "--resume"), capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    ours, theirs = load_file(killed / "best.safetensors"), load_file(whole / "best.safetensors")
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert len((killed / "metrics.jsonl").read_text().splitlines()) == 3
