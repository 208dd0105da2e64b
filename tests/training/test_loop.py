from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mobilevit
from mobilevit.card import card_of
from mobilevit.cli import main
from mobilevit.data.loaders import default_num_workers
from mobilevit.training.config import TrainConfig
from mobilevit.training.distributed import World
from mobilevit.training.loop import Run, _random_state, _set_random_state, train
from mobilevit.training.run_folder import RunFolder, TrainingInterrupted
from training_settings import with_settings

MEASURED = ("images_per_second", "peak_memory_mb")
"""What `metrics.jsonl` has of the machine rather than of the model."""


@pytest.fixture(autouse=True)
def _log_reaches_caplog() -> None:
    logging.getLogger("mobilevit").propagate = True


def weights(path: Path) -> dict[str, torch.Tensor]:
    return mobilevit.load(path).state_dict()


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_the_run_folder_is_the_record(tiny: TrainConfig) -> None:
    result = train(tiny)
    files = {path.name for path in tiny.out.iterdir()}
    assert {
        "config.json", "environment.json", "metrics.jsonl", "curves.png", "confusion_matrix.png",
        "confusion_matrix.csv", "samples.png", "evaluation.json", "last.pt", "best.safetensors", "README.md",
    } <= files  # fmt: skip
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not [name for name in files if name.startswith(".")], "no temporary file is left"
    rows = [json.loads(line) for line in (tiny.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert max(row["top1"] for row in rows) == pytest.approx(result.report.top1, abs=1e-6)
    card = card_of(mobilevit.load(result.best))
    assert card.classes == ("circle", "cross", "ring", "square", "star", "triangle")
    assert card.preprocessing.size == (32, 32)
    assert card.metrics["top1"] == pytest.approx(result.report.top1, abs=1e-6)
    assert "| top1 |" in (tiny.out / "README.md").read_text()
    assert TrainConfig.from_json(tiny.out / "config.json") == tiny.resolve("classification")


def test_it_learns(tmp_path: Path) -> None:
    for color in ((200, 30, 30), (30, 30, 200)):
        folder = tmp_path / "data" / f"color{color[0]}"
        folder.mkdir(parents=True)
        for number in range(16):
            noise = np.random.default_rng(number).integers(0, 60, (32, 32, 3))
            Image.fromarray((noise + np.array(color) * 0.7).astype(np.uint8)).save(folder / f"{number}.png")
    config = TrainConfig(
        data=tmp_path / "data", out=tmp_path / "run", image_size=32, epochs=40, batch_size=8, num_workers=0,
        learning_rate=2e-3,
    )  # fmt: skip
    assert train(config).report.top1 == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        {"grad_accum_steps": 4, "clip_grad_norm": 1.0, "class_weights": "balanced"},
        {"mixup": 0.2, "cutmix": 1.0, "randaugment": 9, "random_erasing": 0.5},
        {"ema": False, "label_smoothing": 0.0, "decay_norm_and_bias": False, "head_lr_factor": 10, "layer_decay": 0.8},
        {
            "model": "mobilevitv2_050",
            "optimizer": "sgd",
            "warmup_steps": 3,
            "num_workers": 2,
            "amp": "bf16",
            "flip": False,
        },
    ],
)
def test_options_run_and_resume_exactly(tiny: TrainConfig, settings: dict[str, object]) -> None:
    config = with_settings(tiny, checkpoint_minutes=0, **settings)
    whole = train(config)
    stopped = dataclasses.replace(config, out=tiny.out.with_name("stopped"))
    stop_after_first_checkpoint(stopped.out)
    with pytest.raises(TrainingInterrupted, match="--resume"):
        train(stopped)
    resumed = train(stopped, resume=True)
    assert_same_weights(whole.best, resumed.best)
    first, second = (
        [{k: v for k, v in row.items() if k not in MEASURED} for row in RunFolder(out).rows()]
        for out in (config.out, stopped.out)
    )
    assert first == second


def stop_after_first_checkpoint(out: Path) -> None:
    """Send this process SIGTERM once a checkpoint lies in the run folder."""

    def watch() -> None:
        for _ in range(2000):
            if (out / "last.pt").exists():
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()


def test_a_finished_run_resumed_is_finished(tiny: TrainConfig) -> None:
    result = train(tiny)
    again = train(tiny, resume=True)
    assert again.epochs == 2
    assert again.report.top1 == result.report.top1
    assert len(RunFolder(tiny.out).rows()) == 2


def test_a_run_folder_of_version_0_1_goes_on(tiny: TrainConfig) -> None:
    """Its settings lay side by side, with one more among them, and one entry of its state had another name."""
    whole = train(tiny)
    stopped = dataclasses.replace(tiny, out=tiny.out.with_name("stopped"), checkpoint_minutes=0)
    stop_after_first_checkpoint(stopped.out)
    with pytest.raises(TrainingInterrupted):
        train(stopped)
    config, last = stopped.out / "config.json", stopped.out / "last.pt"
    known = json.loads((Path(__file__).parent / "v01_classification.json").read_text())
    values = {name: value for name, value in TrainConfig.from_json(config).flat().items() if name in known}
    config.write_text(json.dumps(values | {"decode": "cpu"}, default=str))
    state = torch.load(last, weights_only=True)
    state["position"]["pictures"] = state["position"].pop("images")
    torch.save(state, last)
    assert main(["train", "--config", str(config), "--resume", "--no-ema"]) == 2
    assert main(["train", "--config", str(config), "--resume"]) == 0
    assert_same_weights(whole.best, stopped.out / "best.safetensors")


def test_freezing_the_backbone_trains_the_classifier_alone(tiny: TrainConfig, tmp_path: Path) -> None:
    start = mobilevit.create_model("mobilevit_xxs", num_classes=6)
    path = mobilevit.save(start, tmp_path / "start.safetensors")
    best = train(with_settings(tiny, weights=str(path), freeze_backbone=True, ema=False)).best
    trained, before = weights(best), start.state_dict()
    changed = {key for key in before if not torch.equal(trained[key], before[key])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_early_stopping(tiny: TrainConfig) -> None:
    config = dataclasses.replace(tiny, epochs=30, early_stopping=2, learning_rate=1e-9)
    result = train(config)
    rows = RunFolder(tiny.out).rows()
    best = max(range(len(rows)), key=lambda i: rows[i]["top1"])
    assert result.epochs == len(rows) == best + 3 < 30


def test_bad_images_are_counted_and_skipped(
    tiny: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny.data, data)
    (data / "circle" / "zero.jpg").write_bytes(b"")
    (data / "ring" / "foreign.png").write_text("no image")
    whole = next((data / "star").glob("*.png"))
    whole.write_bytes(whole.read_bytes()[:200])
    with caplog.at_level(logging.WARNING):
        train(dataclasses.replace(tiny, data=data, epochs=3))  # an epoch leaves some images out
    for name in ("circle/zero.jpg", "ring/foreign.png", whole.relative_to(data).as_posix()):
        assert name in caplog.text
    assert caplog.text.count("foreign.png") == 1, "each is named once"


def test_only_bad_images_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "data" / name / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image to train on can be read; [ab]/\d.jpg: the file is empty"):
        train(TrainConfig(data=tmp_path / "data", out=tmp_path / "run", image_size=32, num_workers=0))


class Explodes(nn.Module):
    """Gives logits that are not numbers from the third batch on."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, num_classes)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return self.linear(x.mean((2, 3))) * (float("nan") if self.calls > 2 else 1.0)


def test_a_loss_that_is_not_finite_stops_with_the_images(tiny: TrainConfig) -> None:
    with pytest.raises(ValueError, match=r"the loss became nan in epoch 1; lower `learning_rate`.*\d\.png, "):
        train(tiny, network=Explodes)
    assert not (tiny.out / "last.pt").exists(), "nothing of it is saved"


def test_another_network_in_the_same_loop(tiny: TrainConfig) -> None:
    timm = pytest.importorskip("timm")
    result = train(
        dataclasses.replace(tiny, epochs=1), network=lambda k: timm.create_model("mobilevit_xxs", num_classes=k)
    )
    assert result.report.num_images == 12


def test_folders_of_other_runs_are_safe(tiny: TrainConfig, tmp_path: Path) -> None:
    train(dataclasses.replace(tiny, epochs=1))
    before = (tiny.out / "best.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds another run"):
        train(tiny)
    with pytest.raises(ValueError, match=r"`resume`: epochs was 1, is 2"):
        train(tiny, resume=True)
    with pytest.raises(ValueError, match="no run to resume"):
        train(dataclasses.replace(tiny, out=tmp_path / "none"), resume=True)
    assert (tiny.out / "best.safetensors").read_bytes() == before
    shutil.copytree(tiny.data, tmp_path / "data")
    next((tmp_path / "data" / "star").iterdir()).unlink()
    moved = dataclasses.replace(tiny, epochs=1, data=tmp_path / "data")
    with pytest.raises(ValueError, match="not the images this run began with"):
        train(moved, resume=True)
    (tiny.out / "last.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"last\.pt: damaged"):
        train(dataclasses.replace(tiny, epochs=1), resume=True)
    assert train(dataclasses.replace(tiny, epochs=1), overwrite=True).epochs == 1


def test_the_same_seed_gives_the_same_weights(tiny: TrainConfig) -> None:
    one = train(dataclasses.replace(tiny, epochs=1))
    torch.rand(7)
    other = train(dataclasses.replace(tiny, epochs=1, out=tiny.out.with_name("other"), num_workers=1))
    assert_same_weights(one.best, other.best)
    third = train(dataclasses.replace(tiny, epochs=1, out=tiny.out.with_name("third"), seed=1))
    assert not torch.equal(weights(third.best)["stem.conv.weight"], weights(one.best)["stem.conv.weight"])


def test_cuda_asked_for_and_absent(tiny: TrainConfig) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    with pytest.raises(ValueError, match="`device` is 'cuda': PyTorch sees no CUDA GPU; use 'cpu'"):
        train(dataclasses.replace(tiny, device="cuda"))
    with pytest.raises(ValueError, match="`amp` fp16 needs a GPU"):
        train(with_settings(tiny, amp="fp16", device="cpu"))
    assert not tiny.out.exists()


def test_random_numbers_of_its_own_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming with fewer GPUs, or another one, must not ask for those that are gone."""
    kept = torch.arange(16, dtype=torch.uint8)
    filled: list[tuple[torch.Tensor, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: kept)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: filled.append((state, device)))
    state = _random_state(torch.device("cuda:5"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    _set_random_state(state, torch.device("cuda"))
    assert filled == [(kept, torch.device("cuda"))]
    _set_random_state(state, torch.device("cpu"))
    _set_random_state(_random_state(torch.device("cpu")), torch.device("cuda"))
    assert len(filled) == 1


def test_readers_share_the_cores_not_the_most_of_one_process(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)), raising=False)
    assert [default_num_workers(cuda, sharing=processes) for processes in (1, 8, 32)] == [8, 8, 3]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert Run(dataclasses.replace(tiny, num_workers=None), World(), cpu).num_workers == 1
    assert Run(dataclasses.replace(tiny, num_workers=2), World(), cpu).num_workers == 2


def test_a_system_that_does_not_tell_its_memory(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilevit.training.loop.peak_memory_mb", lambda _: None)
    train(dataclasses.replace(tiny, epochs=1))
    (row,) = (json.loads(line) for line in (tiny.out / "metrics.jsonl").read_text().splitlines())
    assert row["peak_memory_mb"] is None
