from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import mobilevit
from golden_weights import fill_with_golden_weights
from mobilevit.models import HEADS, MODELS, Model
from mobilevit.models.deeplabv3 import DeepLabv3Config
from mobilevit.models.mobilevit import Attention
from shallow_models import shallow

each_generation = pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])


def classifier(name: str, num_classes: int = 1000) -> Model:
    return HEADS["classification"].build(MODELS[name], num_classes, None)


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevit_xs", "mobilevit_s", "mobilevitv2_050", "mobilevitv2_100"])
@pytest.mark.parametrize("size", [(256, 256), (250, 230)])
def test_fused_model_gives_the_same_logits_and_features(name: str, size: tuple[int, int]) -> None:
    model = fill_with_golden_weights(classifier(name))
    state = copy.deepcopy(model.state_dict())
    fused = mobilevit.fuse(model)
    x = torch.rand(1, 3, *size)
    with torch.no_grad():
        assert (fused(x) - model(x)).abs().max() <= 1e-4
        for ours, theirs in zip(fused.forward_features(x).values(), model.forward_features(x).values(), strict=True):
            assert (ours - theirs).abs().max() <= 1e-4 * max(1, theirs.abs().max())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), "the original is untouched"


def heads_of_every_kind(name: str) -> list[Model]:
    config = MODELS[name]
    with_aux = DeepLabv3Config(aux_head=True)
    return [
        HEADS["detection"].build(config, 3, None),
        HEADS["segmentation"].build(dataclasses.replace(config, output_stride=16), 5, with_aux),
        HEADS["segmentation"].build(dataclasses.replace(config, output_stride=8), 5, None),
    ]


@each_generation
@pytest.mark.parametrize("size", [(128, 160), (75, 130)])
def test_fused_detectors_and_segmenters_give_the_same(size: tuple[int, int], name: str) -> None:
    for model in heads_of_every_kind(name):
        fill_with_golden_weights(model)
        fused = mobilevit.fuse(model)
        assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
        x = torch.rand(1, 3, *size)
        with torch.no_grad():
            for ours, theirs in zip(fused(x), model(x), strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    assert (ours - theirs).abs().max() <= 1e-4 * max(1, theirs.abs().max())


@each_generation
def test_nothing_is_left_to_fuse(name: str) -> None:
    fused = mobilevit.fuse(classifier(name).train())
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    norms = [m for m in fused.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)]
    assert len(norms) == 3 + 2 * (2 + 4 + 3)
    assert all(norm.weight is None and norm.bias is None for norm in norms)
    assert {m.scale for m in fused.modules() if isinstance(m, Attention)} <= {1.0}
    assert not fused.training
    assert not any(p.requires_grad for p in fused.parameters())


@each_generation
def test_fusing_twice_is_fusing_once(name: str) -> None:
    once = mobilevit.fuse(fill_with_golden_weights(classifier(name, 5)))
    twice = mobilevit.fuse(once)
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(once(x), twice(x))


def test_fused_model_keeps_the_card_but_cannot_be_saved(tmp_path) -> None:
    fused = mobilevit.fuse(mobilevit.create_model("mobilevit_xxs", num_classes=3))
    assert fused.card.classes == ("class_0", "class_1", "class_2")
    with pytest.raises(ValueError, match="fused model cannot be saved"):
        mobilevit.save(fused, tmp_path / "m.safetensors")


@each_generation
def test_fused_graph_has_fewer_operations(name: str) -> None:
    model = shallow(classifier(name, 5)).eval()
    counts = [
        len(torch.export.export(m, (torch.rand(1, 3, 64, 64),)).graph.nodes) for m in (model, mobilevit.fuse(model))
    ]
    assert counts[1] < 0.8 * counts[0]
