from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import mobilevit
from mobilevit.errors import MobileViTError
from mobilevit.training.config import OptimizerSettings, TrainConfig
from mobilevit.training.learner import WeightAverage, learning_rate, make_optimizer, warmup_share
from training_settings import with_settings


def config(**settings: object) -> TrainConfig:
    return with_settings(TrainConfig(data=Path("a")), **settings)


def rates_of(told: TrainConfig, num_updates: int = 1000) -> list[float]:
    warmup = warmup_share(told, num_updates)
    return [learning_rate(update / num_updates, told, warmup) for update in range(num_updates)]


def test_schedule() -> None:
    rates = rates_of(config(learning_rate=1.0, warmup_fraction=0.1, final_lr_fraction=0.1))
    assert rates[0] == pytest.approx(0.1)
    assert rates[50] == pytest.approx(0.55)
    assert rates[100] == max(rates) == 1.0
    assert rates[550] == pytest.approx((1 + 0.1) / 2)
    assert rates[-1] == pytest.approx(0.1, abs=1e-5)
    middle = 0.1 + 0.9 * (1 + math.cos(math.pi * 0.25)) / 2
    assert rates[325] == pytest.approx(middle)


def test_schedule_of_mobilevitv2() -> None:
    told = config(learning_rate=9e-3, warmup_steps=200, initial_lr_fraction=1e-6 / 9e-3, final_lr_fraction=0.1)
    rates = rates_of(told)
    assert rates[0] == pytest.approx(1e-6)
    assert rates[100] == pytest.approx((1e-6 + 9e-3) / 2)
    assert rates[200] == max(rates) == 9e-3
    assert rates[-1] == pytest.approx(9e-4, rel=1e-4)
    assert rates_of(told, 4000)[200] == max(rates_of(told, 4000)), "steps are steps, however long the run"


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    assert rates_of(config(learning_rate=2.0, warmup_fraction=0.0))[0] == 2.0
    assert rates_of(config(learning_rate=2.0, warmup_steps=0))[0] == 2.0


def test_a_fixed_learning_rate() -> None:
    assert set(rates_of(config(learning_rate=1e-3, warmup_fraction=0.0, final_lr_fraction=1.0))) == {1e-3}


def test_a_warm_up_longer_than_the_run() -> None:
    with pytest.raises(MobileViTError, match=r"^`warmup_steps` is 500, but the run has 12 updates; lower it"):
        warmup_share(config(warmup_steps=500), 12)


def test_sgd_moves_by_the_formula() -> None:
    """Velocity 0.9 v + g + decay * w, from which the learning rate takes its part."""
    model = nn.Linear(3, 2)
    settings = OptimizerSettings(optimizer="sgd", weight_decay=0.1, decay_norm_and_bias=False)
    optimizer = make_optimizer(model, settings, torch.device("cpu"))
    weight, velocity = model.weight.detach().clone(), torch.zeros(2, 3)
    bias, bias_velocity = model.bias.detach().clone(), torch.zeros(2)
    for _ in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        model.weight.grad, model.bias.grad = torch.randn(2, 3), torch.randn(2)
        velocity = 0.9 * velocity + model.weight.grad + 0.1 * weight
        bias_velocity = 0.9 * bias_velocity + model.bias.grad
        weight, bias = weight - 0.5 * velocity, bias - 0.5 * bias_velocity
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight)
    torch.testing.assert_close(model.bias.detach(), bias)


def test_groups_cover_every_trainable_parameter_once() -> None:
    model = mobilevit.create_model("mobilevit_xxs", num_classes=2)
    settings = OptimizerSettings(layer_decay=0.5, head_lr_factor=10, decay_norm_and_bias=False)
    groups = make_optimizer(model, settings, torch.device("cpu")).param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    of = {id(p): group for group in groups for p in group["params"]}
    assert of[id(model.classifier.weight)]["lr_factor"] == 10
    assert of[id(model.head_conv.conv.weight)]["lr_factor"] == 0.5
    assert of[id(model.stem.conv.weight)]["lr_factor"] == 0.5**7
    assert of[id(model.stem.conv.weight)]["weight_decay"] == 0.01
    assert of[id(model.stem.norm.weight)]["weight_decay"] == 0.0
    assert of[id(model.classifier.bias)]["weight_decay"] == 0.0


def test_learning_rate_falls_by_the_stages_that_a_model_has() -> None:
    model = mobilevit.create_model("mobilevitv2_050", num_classes=2)
    groups = make_optimizer(model, OptimizerSettings(layer_decay=0.5), torch.device("cpu")).param_groups
    factor_of = {id(p): group["lr_factor"] for group in groups for p in group["params"]}
    factors = [
        {factor_of[id(p)] for p in getattr(model, stage).parameters()}
        for stage in ("stem", "layer1", "layer2", "layer3", "layer4", "layer5", "classifier")
    ]
    assert factors == [{0.5**stages} for stages in range(6, -1, -1)]


def test_published_recipe_is_one_group() -> None:
    model = mobilevit.create_model("mobilevit_xxs", num_classes=2)
    optimizer = make_optimizer(model, OptimizerSettings(), torch.device("cpu"))
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_average_follows_the_formula() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, momentum=0.3)
    expected = model[0].weight.detach().clone()
    for update in range(40):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 2))
            model[1].num_batches_tracked.add_(1)
        average.update()
        momentum = max(0.3, 9 / (10 + update))
        expected = expected + momentum * (model[0].weight.detach() - expected)
    assert torch.allclose(average.model[0].weight, expected, atol=1e-6)
    assert average.model[1].num_batches_tracked == 40
    other = WeightAverage(model, momentum=0.3)
    other.load_state_dict(average.state_dict())
    assert other.updates == 40
    assert torch.equal(other.model[0].weight, average.model[0].weight)
