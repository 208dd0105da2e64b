"""What only MobileViTv2 has; what both generations have is tested for both in the files beside this one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mobilevit
from golden_weights import fill_with_golden_weights, golden_parameter_counts
from mobilevit.card import TaskName
from mobilevit.models import HEADS, MODELS
from mobilevit.models.deeplabv3 import DeepLabv3, DeepLabv3Config
from mobilevit.models.mobilevit import ConvNormAct
from mobilevit.models.mobilevitv2 import (
    GlobalNorm,
    MobileViTv2,
    MobileViTv2Block,
    MobileViTv2Config,
    SeparableAttention,
)
from mobilevit.models.ssdlite import SSDLite

COUNTS = golden_parameter_counts()
SMALLEST = MobileViTv2Config(width=0.5)
FORMS: dict[str, tuple[TaskName, int, int, Any]] = {
    "classification": ("classification", 1000, 32, None),
    "ssdlite_coco81": ("detection", 80, 32, None),
    "deeplabv3_voc": ("segmentation", 21, 16, None),
    "deeplabv3_voc_with_aux": ("segmentation", 21, 16, DeepLabv3Config(aux_head=True)),
    "deeplabv3_ade20k": ("segmentation", 150, 8, None),
    "deeplabv3_ade20k_with_aux": ("segmentation", 150, 8, DeepLabv3Config(aux_head=True)),
}


@pytest.mark.parametrize("form", FORMS)
def test_parameter_counts_of_all_widths(form: str) -> None:
    task, num_classes, output_stride, head = FORMS[form]
    counts = {}
    for name in COUNTS:
        config = dataclasses.replace(MODELS[name], output_stride=output_stride)
        with torch.device("meta"):
            model = HEADS[task].build(config, num_classes, head)
        counts[name] = sum(p.numel() for p in model.parameters())
    assert counts == {name: forms[form] for name, forms in COUNTS.items()}
    assert len(counts) == 7


def attention(embed_dim: int = 16) -> SeparableAttention:
    return fill_with_golden_weights(SeparableAttention(embed_dim))  # type: ignore[return-value]


def official_attention(ours: SeparableAttention, x: Tensor) -> Tensor:
    """The formula as published: keys of all tokens, weighed by the scores, then summed (arXiv:2206.02680, eq. 2)."""
    x = x.permute(0, 3, 1, 2)  # (B, D, P, N)
    weight = torch.cat([ours.query.weight, ours.key.weight, ours.value.weight])[:, :, None, None]
    bias = torch.cat([ours.query.bias, ours.key.bias, ours.value.bias])
    embed_dim = x.shape[1]
    query, key, value = F.conv2d(x, weight, bias).split([1, embed_dim, embed_dim], dim=1)
    context = (key * query.softmax(dim=-1)).sum(dim=-1, keepdim=True)  # (B, D, P, 1)
    return F.conv2d(F.relu(value) * context, ours.out.weight[:, :, None, None], ours.out.bias).permute(0, 2, 3, 1)


def test_attention_is_the_published_formula() -> None:
    ours, x = attention().double(), torch.randn(2, 4, 6, 16, dtype=torch.float64)
    assert (ours(x) - official_attention(ours, x)).abs().max() <= 1e-12


def test_scores_of_each_offset_sum_to_one() -> None:
    scores = attention().scores(torch.randn(2, 4, 6, 16))
    assert scores.shape == (2, 4, 6, 1)
    assert torch.allclose(scores.sum(dim=2), torch.ones(2, 4, 1))
    assert scores.min() > 0


def test_attention_keeps_offsets_apart() -> None:
    """Only the norm, which goes over all of an image, makes a pixel see those at other offsets."""
    x = torch.randn(1, 4, 6, 16, requires_grad=True)
    attention()(x)[0, 2, 3].square().sum().backward()
    assert x.grad is not None
    reached = x.grad[0].abs().sum(-1) > 0
    assert reached.all(dim=1).tolist() == [False, False, True, False]
    assert reached.any(dim=1).tolist() == [False, False, True, False]


def test_the_norm_is_over_the_whole_image() -> None:
    norm, x = fill_with_golden_weights(GlobalNorm(16)), 3 * torch.randn(2, 4, 6, 16) + 1
    normal = (x - x.mean((1, 2, 3), keepdim=True)) / (x.var((1, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(norm(x), normal * norm.weight + norm.bias, atol=1e-5)


def test_every_output_of_a_block_depends_on_every_pixel() -> None:
    block = fill_with_golden_weights(MobileViTv2Block(16, embed_dim=8, depth=1, dilation=1)).double()
    x = torch.randn(1, 16, 8, 6, dtype=torch.float64, requires_grad=True)
    for row, column in ((0, 0), (3, 4), (7, 5)):
        (gradient,) = torch.autograd.grad(block(x)[0, 0, row, column], x)
        assert (gradient.abs().sum(1) > 0).all()


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model = fill_with_golden_weights(MobileViTv2(SMALLEST, 4))
    x = torch.rand(3, 3, 64, 96) * torch.tensor([1.0, 0.1, 3.0])[:, None, None, None]
    with torch.inference_mode():
        for one in (model, mobilevit.fuse(model)):
            assert torch.allclose(one(x), torch.cat([one(image[None]) for image in x]), atol=1e-5)


@pytest.mark.parametrize("size", [(7, 5), (8, 5), (7, 6)])
def test_odd_maps_become_even_and_stay_so(size: tuple[int, int]) -> None:
    block = fill_with_golden_weights(MobileViTv2Block(16, embed_dim=8, depth=1, dilation=1))
    x = torch.randn(2, 16, *size)
    even = [side + side % 2 for side in size]
    resized = F.interpolate(x, size=even, mode="bilinear", align_corners=True)
    assert list(block(x).shape) == [2, 16, *even]
    assert torch.equal(block(x), block(resized))


@pytest.mark.parametrize(
    ("output_stride", "layer4", "layer5"),
    [(32, (2, 1, 1), (2, 1, 1)), (16, (2, 1, 1), (1, 1, 2)), (8, (1, 1, 2), (1, 2, 4))],
)
def test_strides_and_dilations(output_stride: int, layer4: tuple[int, ...], layer5: tuple[int, ...]) -> None:
    """Stride and dilation of the inverted residual, then dilation of the block's convolution; as the official code."""
    with torch.device("meta"):
        model = MobileViTv2(dataclasses.replace(SMALLEST, output_stride=output_stride))
    for layer, expected in ((model.layer3, (2, 1, 1)), (model.layer4, layer4), (model.layer5, layer5)):
        residual, local = layer[0].depthwise.conv, layer[1].local_conv.conv
        assert (residual.stride[0], residual.dilation[0], local.dilation[0]) == expected
        assert residual.padding == residual.dilation
        assert local.padding == local.dilation


def test_gradients_reach_every_parameter() -> None:
    # In training mode, a shift that goes straight into another BatchNorm does nothing.
    model = fill_with_golden_weights(MobileViTv2(SMALLEST, 4)).double()
    model(torch.rand(2, 3, 128, 64, dtype=torch.float64)).square().sum().backward()  # 64 x 64 ends in a single token
    gradients = {name: p.grad.abs().max().item() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    # Softmax over the tokens ignores what is added to all scores alike, so the bias of the query has no effect; what
    # is left is rounding.
    no_effect = {name for name in gradients if name.endswith(".query.bias")}
    assert len(no_effect) == 2 + 4 + 3
    assert max(gradients[name] for name in no_effect) < 1e-12
    assert min(value for name, value in gradients.items() if name not in no_effect) > 1e-9


def test_the_bias_of_the_query_has_no_effect() -> None:
    ours, x = attention().double(), torch.randn(2, 4, 6, 16, dtype=torch.float64)
    before = ours(x)
    nn.init.constant_(ours.query.bias, 7.0)
    assert (ours(x) - before).abs().max() <= 1e-12


def test_initial_weights_are_the_published_ones() -> None:
    """PyTorch's own, uniform within 1 / sqrt(fan_in), in the backbone; Xavier's in the classifier."""
    model = MobileViTv2(MobileViTv2Config(width=1.0))
    convs = [m.conv for m in model.modules() if isinstance(m, ConvNormAct)]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.classifier]
    for layer in (*convs, *linears):
        bound = layer.weight[0].numel() ** -0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    assert all(0 < layer.bias.abs().max() <= layer.in_features**-0.5 for layer in linears)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d | GlobalNorm)):
        assert (norm.weight == 1).all()
        assert not norm.bias.any()
    bound = (6 / (512 + 1000)) ** 0.5
    assert 0.99 * bound < model.classifier.weight.abs().max() <= bound
    assert not model.classifier.bias.any()


def test_initial_weights_of_heads_are_the_published_ones() -> None:
    """Xavier's in SSDLite, PyTorch's own in segmentation."""
    detector = mobilevit.create_model("mobilevitv2_050", task="detection", num_classes=80)
    assert isinstance(detector, SSDLite)
    for part in (detector.extra, detector.pool, detector.heads):
        for conv in (m for m in part.modules() if isinstance(m, nn.Conv2d)):
            bound = (6 / (conv.weight[0].numel() + conv.weight[:, 0].numel())) ** 0.5
            assert 0.9 * bound < conv.weight.abs().max() <= bound
            assert conv.bias is None or not conv.bias.any()
    segmenter = mobilevit.create_model("mobilevitv2_050", task="segmentation", num_classes=21)
    assert isinstance(segmenter, DeepLabv3)
    classifier = segmenter.classifier
    assert 0.9 * 512**-0.5 < classifier.weight.abs().max() <= 512**-0.5
    assert classifier.bias is not None
    assert classifier.bias.any()


def test_impossible_configurations_are_refused() -> None:
    for options, message in (
        ({"patch_size": (8, 4, 2)}, r"`patch_size` is \(8, 4, 2\); MobileViTv2 has only 2, 2, 2, so leave it out"),
        ({"output_stride": 4}, "`output_stride` is 4; it can be 32, 16 or 8"),
        ({"width": 0.0}, r"`width` is 0\.0; it must be above 0"),
    ):
        with pytest.raises(mobilevit.MobileViTError, match=message):
            dataclasses.replace(SMALLEST, **options)


@pytest.mark.parametrize(
    ("width", "stem", "channels", "embed_dims"),
    [(0.25, 16, (16, 32, 64, 96, 128), (32, 48, 64)), (0.6, 24, (48, 80, 152, 232, 304), (80, 112, 152))],
)
def test_channels_of_other_widths_are_rounded_as_in_the_official_code(
    width: float, stem: int, channels: tuple[int, ...], embed_dims: tuple[int, ...]
) -> None:
    config = MobileViTv2Config(width=width)
    assert (config.stem_channels, config.channels, config.embed_dims) == (stem, channels, embed_dims)
