from __future__ import annotations

import dataclasses
import json

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from mobilevit.models import HEADS, MODELS, Config, Model
from mobilevit.models.deeplabv3 import DeepLabv3Config
from mobilevit.models.summary import Summary, summarize

PUBLISHED_GMACS = {
    "mobilevit_xxs": 0.42, "mobilevit_xs": 1.05, "mobilevit_s": 2.03,
    "mobilevitv2_050": 0.48, "mobilevitv2_075": 1.05, "mobilevitv2_100": 1.84, "mobilevitv2_125": 2.86,
    "mobilevitv2_150": 4.09, "mobilevitv2_175": 5.54, "mobilevitv2_200": 7.22,
}  # fmt: skip


def classifier(config: Config, num_classes: int) -> Model:
    with torch.device("meta"):
        return HEADS["classification"].build(config, num_classes, None)


@pytest.mark.parametrize(("name", "published"), PUBLISHED_GMACS.items())
def test_multiply_adds_are_the_published_ones(name: str, published: float) -> None:
    summary = summarize(classifier(MODELS[name], 1000), (256, 256))
    macs = summary.macs + macs_of_keys(MODELS[name], summary)
    # The published figures also count normalization and activation, a few percent.
    assert 0.96 * published <= macs / 1e9 <= published
    assert_rows_add_up(summary)
    if name in ("mobilevit_xxs", "mobilevitv2_050", "mobilevitv2_200"):
        with torch.device("meta"):
            theirs = timm.create_model(name).eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                theirs(torch.rand(1, 3, 256, 256))
        assert macs == counter.get_total_flops() // 2


def macs_of_keys(config: Config, summary: Summary) -> int:
    """Multiply-adds that MobileViTv2 needs more where keys are computed of all tokens and then summed.

    Here tokens are summed, at one multiply-add for each number in them, and one key is computed of the result. There
    the sum is no multiply-add to a counter, as it multiplies without a matrix.
    """
    return sum(
        depth * (b.num_sequences * (b.num_tokens - 1) * b.embed_dim**2 - b.separable_cost_per_channel * b.embed_dim)
        for depth, b in zip(config.depths, summary.attention, strict=True)
        if b.separable_cost_per_channel is not None
    )


def assert_rows_add_up(summary: Summary) -> None:
    assert summary.macs == sum(row.macs for row in summary.layers)
    assert summary.parameters == sum(row.parameters for row in summary.layers)
    assert summary.activations == sum(row.activations for row in summary.layers)


def test_detector() -> None:
    model = HEADS["detection"].build(MODELS["mobilevit_s"], 80, None).train()
    summary = summarize(model, (320, 320))
    assert model.training
    assert next(model.parameters()).device.type == "cpu", "the model itself is as it was"
    assert summary.parameters == 5_738_826
    assert_rows_add_up(summary)
    rows = {row.name: row for row in summary.layers}
    assert rows["backbone.layer4.1"].shape == (128, 20, 20)
    assert rows["extra.0.1"].shape == (256, 5, 5)
    assert rows["pool"].shape == (64, 1, 1)
    assert rows["heads.0"].shape == (20 * 20 * 6, 85)
    assert rows["heads.5"].macs == 64 * 4 * 85
    assert [block.name for block in summary.attention] == [f"backbone.layer{i}.1" for i in (3, 4, 5)]


def test_segmenter() -> None:
    config = dataclasses.replace(MODELS["mobilevit_xxs"], output_stride=8)
    head = DeepLabv3Config(aspp_channels=512, atrous_rates=(12, 24, 36), aux_head=True)
    with torch.device("meta"):
        model = HEADS["segmentation"].build(config, 21, head)
    summary = summarize(model, (512, 384))
    assert summary.parameters == 3_516_954
    assert_rows_add_up(summary)
    rows = {row.name: row for row in summary.layers}
    assert rows["aspp.atrous.2"].shape == (512, 64, 48)
    assert rows["aspp.atrous.2"].macs == 9 * 80 * 512 * 64 * 48
    assert rows["aspp.pool"].shape == (512, 1, 1)
    assert rows["aspp.project"].parameters == 5 * 512 * 512 + 2 * 512
    assert rows["classifier"].shape == (21, 64, 48)
    aux = rows["aux_head.0"]  # there, but not used
    assert (aux.shape, aux.macs, aux.activations, aux.parameters) == ((), 0, 0, 64 * 128 * 9 + 256)


def test_attention_arithmetic_of_the_paper() -> None:
    block = summarize(classifier(MODELS["mobilevit_s"], 1000), (224, 224)).attention[1]
    assert block.map_size == (14, 14)
    assert block.plain_cost_per_channel == 196 * 196 == 38_416
    assert block.cost_per_channel == 4 * 49 * 49 == 9_604
    assert block.separable_cost_per_channel is None
    assert (block.num_sequences, block.num_tokens, block.embed_dim) == (4, 49, 192)


def test_separable_attention_grows_with_tokens_not_their_square() -> None:
    costs = {}
    for side in (224, 448):
        block = summarize(classifier(MODELS["mobilevitv2_100"], 10), (side, side)).attention[1]
        costs[side] = (block.plain_cost_per_channel, block.cost_per_channel, block.separable_cost_per_channel)
    assert costs[224] == (196 * 196, 4 * 49 * 49, 4 * 49)
    assert costs[448] == (16 * 196 * 196, 16 * 4 * 49 * 49, 4 * 4 * 49)
    assert (block.map_size, block.embed_dim) == ((28, 28), 192)
    odd = summarize(classifier(MODELS["mobilevitv2_100"], 10), (250, 230)).attention
    assert [b.map_size for b in odd] == [(32, 30), (16, 16), (8, 8)]


def test_maps_are_counted_as_attention_sees_them() -> None:
    config = dataclasses.replace(MODELS["mobilevit_xxs"], patch_size=(8, 4, 2))
    blocks = summarize(classifier(config, 10), (224, 200)).attention
    assert [b.map_size for b in blocks] == [(32, 32), (16, 16), (8, 8)]
    assert [b.num_sequences for b in blocks] == [64, 16, 4]
    assert all(b.num_sequences * b.num_tokens == b.map_size[0] * b.map_size[1] for b in blocks)


def test_summary_is_plain_json() -> None:
    told = json.loads(json.dumps(dataclasses.asdict(summarize(classifier(MODELS["mobilevit_xxs"], 5), (64, 96)))))
    stem = told["layers"][0]
    assert stem == {
        "name": "stem", "kind": "ConvNormAct", "shape": [16, 32, 48], "parameters": 464,
        "macs": 3 * 9 * 16 * 32 * 48, "activations": 16 * 32 * 48,
    }  # fmt: skip
