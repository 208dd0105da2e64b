from __future__ import annotations

import json
import time

import pytest
import torch

from mobilevit.cli import main
from mobilevit.models.mobilevit import MobileViT
from mobilevit.training.config import TrainConfig
from mobilevit.training.dry_run import dry_run
from mobilevit.training.learner import CompiledForSizes
from mobilevit.training.loop import train
from training_settings import with_settings


def test_what_it_says_is_what_the_run_does(tiny: TrainConfig) -> None:
    plan = dry_run(tiny)
    assert not tiny.out.exists()
    assert (plan.num_train, plan.num_val, plan.num_classes) == (48, 12, 6)
    assert [(size.size, size.batch_size, size.steps_per_epoch) for size in plan.sizes] == [((32, 32), 8, 6)]
    assert plan.updates == 12
    assert plan.sizes[0].measured
    result = train(tiny)
    state = torch.load(tiny.out / "last.pt", weights_only=True)
    assert state["average"]["updates"] == plan.updates
    assert result.epochs == plan.config.epochs
    weights = 4 * plan.parameters / 1e6
    assert 4.9 * weights < plan.weights_mb < 5.2 * weights  # weights, gradients, two moments, average; statistics
    assert plan.activations_mb > 1
    assert plan.seconds_per_epoch > 6 * plan.sizes[0].seconds_per_step


def test_steps_of_several_sizes(tiny: TrainConfig) -> None:
    config = with_settings(tiny, multi_scale="paper", train_sizes=((32, 32), (64, 64)), batch_size=16)
    plan = dry_run(config)
    assert {size.size: size.batch_size for size in plan.sizes} == {(32, 32): 16, (64, 64): 4}
    assert sum(size.steps_per_epoch for size in plan.sizes) * config.epochs == plan.updates
    assert plan.updates / config.epochs > 3 * 0.9 * 16 / (16 + 4)


@pytest.mark.parametrize("compiled", [False, True])
def test_steps_too_slow_to_be_measured_twice(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    monkeypatch.setattr("mobilevit.training.dry_run.SECONDS_TO_MEASURE", 0.0)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    (size,) = dry_run(with_settings(tiny, compile=compiled)).sizes
    assert size.measured
    assert size.seconds_per_step > 0


def test_the_time_to_compile_is_not_measured(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def slowly(model: torch.nn.Module, *, dynamic: bool) -> object:
        def forward(x: torch.Tensor) -> object:
            if x.shape not in compiled:
                compiled.append(x.shape)
                time.sleep(2)
            return model(x)

        return forward

    monkeypatch.setattr(torch, "compile", slowly)
    config = with_settings(tiny, multi_scale="paper", train_sizes=((32, 32), (64, 64)), compile=True)
    monkeypatch.setattr("mobilevit.training.dry_run.SECONDS_TO_MEASURE", 1.5)
    plan = dry_run(config)
    assert len(compiled) == 2
    assert all(size.measured and size.seconds_per_step < 1 for size in plan.sizes)


def test_command(tiny: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["train", "--data", str(tiny.data), "--image-size", "32", "--out", str(tiny.out), "--dry-run"]
    assert main(told) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "* image_size               (32, 32)" in lines
    assert lines[-1].startswith("time: ")
    assert main([*told, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["config"]["image_size"] == [32, 32]
    assert plan["hours"] > 0
    assert not tiny.out.exists()
    assert main(["train", "--data", "missing", "--dry-run"]) == 2


def test_one_graph_with_dropout_in_it() -> None:
    from mobilevit.models.mobilevit import XXS

    torch._dynamo.reset()
    told = torch._dynamo.explain(MobileViT(XXS, 6).train())(torch.rand(2, 3, 32, 32))
    assert (told.graph_count, told.graph_break_count) == (1, 0)


def test_one_graph_for_each_size_and_none_for_others(tiny: TrainConfig) -> None:
    from mobilevit.models.mobilevit import XXS

    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model = MobileViT(XXS, 6).eval()
    forward = CompiledForSizes(model, [(2, 32, 32), (1, 64, 64)])
    forward._compiled = torch.compile(model, dynamic=False, backend=backend)
    for shape in ((2, 32, 32), (1, 64, 64), (3, 32, 32), (2, 32, 32), (5, 64, 64)):
        x = torch.rand(shape[0], 3, *shape[1:])
        with torch.no_grad():
            torch.testing.assert_close(forward(x), model(x))
    assert len(graphs) == 2
