from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from golden_weights import fill_with_golden_weights
from mobilevit.models import HEADS, MODELS, build_backbone
from mobilevit.models.ssdlite import SSDLite, SSDLiteConfig, decode_boxes, encode_boxes, make_anchors

each_generation = pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])
PARAMETERS = {"mobilevit_xxs": 1_755_050, "mobilevit_xs": 2_742_042, "mobilevit_s": 5_738_826}


def detector(name: str = "mobilevit_xxs", num_classes: int = 3, config: SSDLiteConfig | None = None) -> SSDLite:
    model = HEADS["detection"].build(MODELS[name], num_classes, config)
    assert isinstance(model, SSDLite)
    return model


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_parameter_counts_are_the_published_ones(name: str, expected: int) -> None:
    assert sum(p.numel() for p in detector(name, 80).parameters()) == expected


def anchors_by_hand(map_sizes: list[tuple[int, int]], config: SSDLiteConfig) -> Tensor:
    """One anchor at a time, as the papers and the official code describe them."""
    levels = len(map_sizes)
    scales = [config.min_scale + (config.max_scale - config.min_scale) * i / levels for i in range(levels + 1)]
    anchors = []
    for level, (height, width) in enumerate(map_sizes):
        small, large = scales[level], math.sqrt(scales[level] * scales[level + 1])
        for y in range(height):
            for x in range(width):
                center = ((x + 0.5) / width, (y + 0.5) / height)
                anchors += [(*center, small, small), (*center, large, large)]
                for ratio in config.aspect_ratios[level]:
                    root = math.sqrt(ratio)
                    anchors += [(*center, small * root, small / root), (*center, small / root, small * root)]
    return torch.tensor(anchors).clamp(0, 1)


@pytest.mark.parametrize(
    "map_sizes",
    [
        [(20, 20), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1)],
        [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2), (1, 1)],
        [(15, 9), (8, 5), (4, 3), (2, 2), (1, 1), (1, 1)],
    ],
)
def test_anchors(map_sizes: list[tuple[int, int]]) -> None:
    anchors = make_anchors(map_sizes, SSDLiteConfig())
    expected = anchors_by_hand(map_sizes, SSDLiteConfig())
    assert anchors.shape == (sum(h * w * n for (h, w), n in zip(map_sizes, (6, 6, 6, 6, 6, 4), strict=True)), 4)
    assert (anchors - expected).abs().max() <= 1e-6
    anchors.zero_()  # a caller's copy
    assert (make_anchors(map_sizes, SSDLiteConfig()) - expected).abs().max() <= 1e-6


@each_generation
@pytest.mark.parametrize("size", [(320, 320), (192, 320), (235, 131), (33, 64)])
def test_any_input_size(size: tuple[int, int], name: str) -> None:
    model = detector(name).eval()
    with torch.no_grad():
        output = model(torch.rand(2, 3, *size))
        single = model(torch.rand(1, 3, *size))
    maps = [tuple(-(-side // stride) for side in size) for stride in (16, 32, 64, 128, 256)] + [(1, 1)]
    if name == "mobilevitv2_050":  # maps of its backbone are even, and all that follow are made from these
        maps = [tuple(side + side % 2 for side in map_size) for map_size in maps[:2]]
        maps += [tuple(-(-side // stride) for side in maps[1]) for stride in (2, 4, 8)] + [(1, 1)]
    expected = anchors_by_hand(maps, SSDLiteConfig())
    assert output.anchors_cxcywh.shape == expected.shape
    assert (output.anchors_cxcywh - expected).abs().max() <= 1e-6
    assert output.class_logits.shape == (2, len(expected), 4)
    assert output.box_regression.shape == (2, len(expected), 4)
    assert torch.equal(single.anchors_cxcywh, output.anchors_cxcywh)
    assert output.class_logits.isfinite().all()


def test_an_anchor_answers_for_its_own_place() -> None:
    """A change of one corner of the image changes the answers of that corner most."""
    model = fill_with_golden_weights(detector())
    images = torch.zeros(2, 3, 256, 512)
    images[1, :, :32, -32:] = 1
    with torch.no_grad():
        output = model(images)
    change = (output.class_logits[1] - output.class_logits[0]).abs().sum(1)[: 16 * 32 * 6]
    x, y = output.anchors_cxcywh[int(change.argmax()), :2].tolist()
    assert x > 0.85
    assert y < 0.25


boxes = st.lists(st.tuples(*[st.floats(0.01, 1)] * 4), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(boxes=boxes, anchors=boxes)
def test_decoding_is_the_inverse_of_encoding(boxes: list[tuple[float, ...]], anchors: list[tuple[float, ...]]) -> None:
    count = min(len(boxes), len(anchors))
    box, anchor = torch.tensor(boxes[:count]).double(), torch.tensor(anchors[:count]).double()
    corners = torch.cat([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], dim=1)
    assert (decode_boxes(encode_boxes(box, anchor), anchor) - corners).abs().max() <= 1e-9
    batch = encode_boxes(box.expand(3, -1, -1), anchor)
    assert (decode_boxes(batch, anchor)[2] - corners).abs().max() <= 1e-9


def test_an_unmoved_anchor_is_itself() -> None:
    anchors = torch.tensor([[0.5, 0.25, 0.5, 0.25]])
    assert torch.equal(decode_boxes(torch.zeros(1, 4), anchors), torch.tensor([[0.25, 0.125, 0.75, 0.375]]))
    moved = decode_boxes(torch.tensor([[1.0, 0, 0, 0]]), anchors)  # a tenth of the width to the right
    assert (moved - torch.tensor([[0.3, 0.125, 0.8, 0.375]])).abs().max() <= 1e-6


@each_generation
def test_gradients_reach_every_parameter(name: str) -> None:
    # In training mode, a shift that goes straight into another BatchNorm does nothing.
    model = fill_with_golden_weights(detector(name))
    output = model(torch.rand(2, 3, 96, 96))
    (output.class_logits.square().sum() + output.box_regression.square().sum()).backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [key for key in without if not key.endswith(".query.bias")] == []  # see test_mobilevitv2.py


@each_generation
def test_a_backbone_without_the_maps_is_refused(name: str) -> None:
    for output_stride in (8, 16):
        backbone = build_backbone(dataclasses.replace(MODELS[name], output_stride=output_stride))
        with pytest.raises(ValueError, match=f"`output_stride` is {output_stride}; detection needs .* so leave it out"):
            SSDLite(backbone, 3)


def test_other_levels_and_anchors() -> None:
    config = SSDLiteConfig(
        extra_channels=(64,), head_channels=(None, 96, None, None), aspect_ratios=((2,), (2, 3), (), (2,))
    )
    model = detector(config=config).eval()
    assert config.anchors_per_cell == (4, 6, 2, 4)
    with torch.no_grad():
        output = model(torch.rand(1, 3, 128, 128))
    assert output.class_logits.shape == (1, 64 * 4 + 16 * 6 + 4 * 2 + 4, 4)
    assert output.anchors_cxcywh.shape == (output.class_logits.shape[1], 4)
    with pytest.raises(ValueError, match="4 levels need as many"):
        SSDLiteConfig(extra_channels=(64,))
