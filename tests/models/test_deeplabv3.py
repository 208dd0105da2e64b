from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from golden_weights import fill_with_golden_weights
from mobilevit.models import HEADS, MODELS
from mobilevit.models.deeplabv3 import DeepLabv3, DeepLabv3Config

OS8_AUX = DeepLabv3Config(aspp_channels=512, atrous_rates=(12, 24, 36), aux_head=True)
each_generation = pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])
PARAMETERS = {
    ("mobilevit_xxs", 16): 1_854_853,
    ("mobilevit_xs", 16): 2_944_069,
    ("mobilevit_s", 16): 6_357_941,
    ("mobilevit_xxs", 8): 3_516_954,
    ("mobilevit_xs", 8): 4_743_386,
    ("mobilevit_s", 8): 8_687_690,
}


def segmenter(
    name: str = "mobilevit_xxs", *, num_classes: int = 5, output_stride: int = 16, head: DeepLabv3Config | None = None
) -> DeepLabv3:
    config = dataclasses.replace(MODELS[name], output_stride=output_stride)
    model = HEADS["segmentation"].build(config, num_classes, head)
    assert isinstance(model, DeepLabv3)
    return model


@pytest.mark.parametrize(("name", "output_stride", "expected"), [(*key, value) for key, value in PARAMETERS.items()])
def test_parameter_counts_are_the_published_ones(name: str, output_stride: int, expected: int) -> None:
    head = OS8_AUX if output_stride == 8 else None
    model = segmenter(name, num_classes=21, output_stride=output_stride, head=head)
    assert sum(p.numel() for p in model.parameters()) == expected


@each_generation
@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (75, 53), (33, 130)])
def test_any_input_size_and_output_stride(output_stride: int, size: tuple[int, int], name: str) -> None:
    model = segmenter(name, output_stride=output_stride).eval()
    seen: dict[str, tuple[int, ...]] = {}
    model.aspp.register_forward_hook(lambda _module, _in, out: seen.update(aspp=tuple(out.shape)))
    with torch.no_grad():
        output = model(torch.rand(1, 3, *size))
    assert output.logits.shape == (1, 5, *size)
    assert output.logits.isfinite().all()
    width, multiple = (256, 1) if name == "mobilevit_xxs" else (512, 2)  # maps of MobileViTv2 are even
    assert seen["aspp"] == (1, width, *(-(-side // output_stride // multiple) * multiple for side in size))


@pytest.mark.parametrize(("output_stride", "rates"), [(8, (12, 24, 36)), (16, (6, 12, 18)), (32, (3, 6, 9))])
def test_rates_follow_the_output_stride(output_stride: int, rates: tuple[int, ...]) -> None:
    model = segmenter(output_stride=output_stride)
    assert model.head_config.atrous_rates == rates
    assert tuple(branch.conv.dilation[0] for branch in model.aspp.atrous) == rates  # type: ignore[union-attr,index]


def test_auxiliary_logits_only_in_training() -> None:
    x = torch.rand(2, 3, 64, 96)
    with_aux, without = segmenter(head=DeepLabv3Config(aux_head=True)), segmenter()
    assert with_aux.train()(x).aux_logits.shape == (2, 5, 64, 96)
    assert with_aux.eval()(x).aux_logits is None
    assert without.train()(x).aux_logits is None
    both = segmenter(output_stride=8, head=OS8_AUX).train()(x)  # layer4 and layer5 have the same stride
    assert both.logits.shape == both.aux_logits.shape


def test_the_auxiliary_head_changes_nothing_in_eval_mode() -> None:
    with_aux = fill_with_golden_weights(segmenter(head=DeepLabv3Config(aux_head=True)))
    without = segmenter().eval()
    without.load_state_dict({k: v for k, v in with_aux.state_dict().items() if not k.startswith("aux_head.")})
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(with_aux(x).logits, without(x).logits)


@each_generation
def test_gradients_reach_every_parameter(name: str) -> None:
    model = segmenter(name, head=DeepLabv3Config(aux_head=True)).train()
    output = model(torch.rand(2, 3, 64, 64))
    (output.logits.square().sum() + output.aux_logits.square().sum()).backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [key for key in without if not key.endswith(".query.bias")] == []  # see test_mobilevitv2.py


def test_corners_of_the_map_are_corners_of_the_logits() -> None:
    model = fill_with_golden_weights(segmenter())
    maps: list[Tensor] = []
    model.classifier.register_forward_hook(lambda _module, _in, out: maps.append(out))
    with torch.no_grad():
        logits = model(torch.rand(1, 3, 96, 128)).logits
    assert torch.allclose(logits[..., ::95, ::127], maps[0][..., ::5, ::7], atol=1e-6)


def test_impossible_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        DeepLabv3Config(atrous_rates=(0, 1, 2))
    with pytest.raises(ValueError, match="must be 1 or more"):
        DeepLabv3Config(aspp_channels=0)


def test_dropout_is_before_the_classifier() -> None:
    model = segmenter(head=DeepLabv3Config(dropout=0.5))
    assert isinstance(model.dropout, nn.Dropout2d)
    assert model.dropout.p == 0.5
