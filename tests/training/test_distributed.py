"""Several processes, as torchrun starts them, on the CPU through gloo."""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

import mobilevit
from mobilevit.card import card_of
from mobilevit.data.datasets import load_train_val
from mobilevit.data.loaders import BatchLoader
from mobilevit.devices import normalize
from mobilevit.training import distributed
from mobilevit.training.config import TrainConfig
from mobilevit.training.learner import _build_model, learning_rate, make_optimizer
from mobilevit.training.loop import train

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def settings(shapes: Path, tmp_path: Path) -> TrainConfig:
    """Three steps an epoch of two processes."""
    return TrainConfig(
        data=shapes, out=tmp_path / "run", image_size=32, epochs=2, batch_size=8, num_workers=0, learning_rate=1e-3
    )


def flags(config: TrainConfig, out: Path, **changes: object) -> list[str]:
    told = {
        "data": config.data, "out": out, "image_size": 32, "epochs": config.epochs, "batch_size": config.batch_size,
        "num_workers": 0, "learning_rate": config.learning_rate, "device": "cpu", **changes,
    }  # fmt: skip
    return [part for name, value in told.items() for part in (f"--{name.replace('_', '-')}", *str(value).split())]


def run(arguments: list[str], *, launcher: list[str] = TORCHRUN) -> subprocess.CompletedProcess[str]:
    command = [*launcher, "-m", "mobilevit", "train", *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


def start(command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    environment = {**ENVIRONMENT, **(environment or {})}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def wait_for_an_epoch(launcher: subprocess.Popen[str], run: Path) -> None:
    end = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended after the test, whatever happens."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def last(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "last.pt", weights_only=True)["model"]
    return state


def by_hand(config: TrainConfig) -> dict[str, torch.Tensor]:
    """What two processes compute, in one: the mean of the gradients of both halves of every step."""
    config = config.resolve("classification", 2)
    train_set, _ = load_train_val(config.data, val_path=None, val_fraction=config.val_fraction, seed=config.seed)
    torch.manual_seed(config.seed)
    model, card = _build_model(config, train_set, None)
    model.train()
    preprocessing = card.preprocessing
    optimizer = make_optimizer(model, config.optimizer, torch.device("cpu"))
    objective = train_set.task.objective(
        config, preprocessing, num_classes=6, targets=train_set.targets, device=torch.device("cpu")
    )
    random = [torch.get_rng_state()]
    torch.manual_seed(distributed.seed_of(distributed.World(rank=1, size=2), config.seed))
    random.append(torch.get_rng_state())
    loaders = [
        BatchLoader(
            train_set, objective.transform, batch_size=config.batch_size, num_workers=0, shuffle_seed=config.seed,
            sizes=config.step_sizes(), shard=(rank, 2),
        )
        for rank in range(2)
    ]  # fmt: skip
    for epoch in range(config.epochs):
        steps, _ = (loader.start(epoch) for loader in loaders)
        for step, *batches in zip(steps, *(loader.epoch() for loader in loaders), strict=True):
            count = step.stop - step.start
            buffers = copy.deepcopy(dict(model.named_buffers()))
            for rank, batch in enumerate(batches):
                torch.set_rng_state(random[rank])
                for name, buffer in model.named_buffers():  # each process has its own, and begins with the first's
                    buffer.copy_(buffers[name])
                loss = objective.loss(model(normalize(batch.images, preprocessing)), batch.targets)
                (loss * len(batch) / count).backward()
                random[rank] = torch.get_rng_state()
                if rank == 0:
                    kept = copy.deepcopy(dict(model.named_buffers()))
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])
            rate = learning_rate(
                (epoch + step.start / len(train_set)) / config.epochs, config, config.optimizer.warmup_fraction
            )
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_factor"]
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("changes", [{}, {"multi_scale": "paper", "train_sizes": "32 32 32 64 64 64"}], ids=str)
def test_two_processes_are_one(settings: TrainConfig, tmp_path: Path, changes: dict[str, str]) -> None:
    done = run([*flags(settings, tmp_path / "two", **changes), "--json"])
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # of one process
    rows = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert told["num_images"] == 12
    config = TrainConfig.from_json(tmp_path / "two" / "config.json")
    expected = by_hand(config)
    found = last(tmp_path / "two")
    torch.manual_seed(config.seed)
    begun = mobilevit.create_model("mobilevit_xxs", num_classes=6).state_dict()
    for name, wanted in expected.items():
        if wanted.ndim > 1:  # gradients of some biases are nothing but rounding, of which Adam makes whole steps
            moved = (wanted - begun[name]).norm()
            assert moved > 0
            assert (found[name] - wanted).norm() < 0.05 * moved, name
    for name in ("stem.norm.running_mean", "stem.norm.running_var"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
    model = mobilevit.load(tmp_path / "two" / "best.safetensors")
    assert card_of(model).metrics["top1"] == pytest.approx(max(row["top1"] for row in rows), abs=1e-6)


def test_accumulated_gradients_and_another_number_of_processes(settings: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = {"grad_accum_steps": 2, "checkpoint_minutes": 0, "batch_size": 4}
    done = run(flags(settings, out, **changes))
    assert done.returncode == 0, done.stderr
    state = torch.load(out / "last.pt", weights_only=True)
    assert len(state["ranks"]) == 2
    # As if it had been stopped after the second step of the second epoch.
    state["position"] |= {"epoch": 1, "step": 2, "images": 16}
    torch.save(state, out / "last.pt")
    result = train(TrainConfig.from_json(out / "config.json"), resume=True)
    assert result.epochs == 2
    ended = torch.load(out / "last.pt", weights_only=True)
    assert (ended["position"]["epoch"], len(ended["ranks"])) == (2, 1)


def test_a_killed_process_ends_the_run(
    settings: TrainConfig, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    process = start([*TORCHRUN, "-m", "mobilevit", "train", *flags(settings, tmp_path / "run", epochs=200)])
    started.append(process)
    wait_for_an_epoch(process, tmp_path / "run")
    begun = time.monotonic()
    max(psutil.Process(process.pid).children(), key=lambda child: child.environ()["RANK"]).kill()
    _, told = process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - begun < 30
    assert "another process has ended" in told or "SIGKILL" in told
    assert 'Traceback (most recent call last):\n  File "' + str(Path(mobilevit.__file__).parent) not in told


def test_two_machines_go_on_exactly_when_a_process_of_one_dies(
    settings: TrainConfig, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {"epochs": 6, "checkpoint_minutes": 0}
    assert run(flags(settings, whole, **changes)).returncode == 0
    machine = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--local-addr", "localhost",
    ]  # fmt: skip
    started += [start([*machine, "-m", "mobilevit", "train", *flags(settings, broken, **changes)]) for _ in range(2)]
    wait_for_an_epoch(started[0], broken)
    (victim,) = psutil.Process(started[1].pid).children()
    victim.kill()
    for process in started:
        _, told = process.communicate(timeout=240)
        assert process.returncode == 0, told
    ours, theirs = last(broken), last(whole)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_sigterm_stops_all_and_saves(
    settings: TrainConfig, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    process = start([*TORCHRUN, "-m", "mobilevit", "train", *flags(settings, tmp_path / "run", epochs=200)])
    started.append(process)
    wait_for_an_epoch(process, tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode != 0
    assert told.count("stopped and saved; go on with") == 1, told
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert 0 < state["position"]["epoch"] < 200


def test_processes_draw_different_numbers() -> None:
    drawn = set()
    for rank in range(1, 5):
        torch.manual_seed(distributed.seed_of(distributed.World(rank=rank, size=5), 0))
        drawn.add(float(torch.rand(())))
    assert len(drawn) == 4


def test_one_process_makes_its_gpu_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(distributed, "pick_device", torch.device)
    with distributed.joined("cuda:1") as (world, device):
        assert (world.size, device, entered) == (1, torch.device("cuda:1"), [torch.device("cuda:1")])
    assert entered[1:] == [None]
    with distributed.joined("cpu"):
        assert len(entered) == 2


def _two_by_hand(first: list[str], second: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """Two processes that know of each other, with a command line each."""
    port = free_port()
    processes = []
    for rank, arguments in enumerate((first, second)):
        place = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        command = [sys.executable, "-m", "mobilevit", "train", *arguments]
        processes.append(start(command, place))
    ended = []
    for process in processes:
        out, told = process.communicate(timeout=120)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, told))
    return ended


def test_mistakes_are_told_once(settings: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first, second = _two_by_hand(flags(settings, out), flags(settings, out, batch_size=4))
    assert (first.returncode, second.returncode) == (2, 2)
    assert "process 1 has a setting --batch-size = 4, process 0 has 8" in first.stderr
    assert second.stderr.strip() == ""
    assert not (out / "config.json").exists()

    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    first, second = _two_by_hand(flags(settings, out), flags(settings, out))
    assert (first.returncode, second.returncode) == (2, 2)
    assert "holds another run" in first.stderr
    assert second.stderr.strip() == ""


def test_a_mistake_of_one_process_ends_the_others(settings: TrainConfig, tmp_path: Path) -> None:
    first, second = _two_by_hand(
        flags(settings, tmp_path / "run"), flags(settings, tmp_path / "run", data=tmp_path / "nothing")
    )
    assert second.returncode == 2
    assert "nothing: no such file or folder" in second.stderr
    assert first.returncode == 1
    assert first.stderr.strip().splitlines()[-1] == "process 0: stopped, as another process has ended"
