from __future__ import annotations

import dataclasses
import json

import pytest

from mobilevit.models import MODELS
from mobilevit.models.summary import summarize

PUBLISHED_GMACS = {"mobilevit_xxs": 0.42, "mobilevit_xs": 1.05, "mobilevit_s": 2.03}


@pytest.mark.parametrize(("name", "published"), PUBLISHED_GMACS.items())
def test_multiply_adds_are_the_published_ones(name: str, published: float) -> None:
    summary = summarize(MODELS[name], 1000, (256, 256))
    # The published figures also count normalisation and activation, a few percent.
    assert 0.96 * published <= summary.macs / 1e9 <= published
    assert summary.macs == sum(row.macs for row in summary.layers)
    assert summary.parameters == sum(row.parameters for row in summary.layers)


def test_attention_arithmetic_of_the_paper() -> None:
    block = summarize(MODELS["mobilevit_s"], 1000, (224, 224)).attention[1]
    assert block.map_size == (14, 14)
    assert block.plain_cost_per_channel == 196 * 196 == 38_416
    assert block.cost_per_channel == 4 * 49 * 49 == 9_604
    assert (block.num_sequences, block.num_tokens, block.embed_dim) == (4, 49, 192)


def test_maps_are_counted_as_attention_sees_them() -> None:
    config = dataclasses.replace(MODELS["mobilevit_xxs"], patch_size=(8, 4, 2))
    blocks = summarize(config, 10, (224, 200)).attention
    assert [b.map_size for b in blocks] == [(32, 32), (16, 16), (8, 8)]
    assert [b.num_sequences for b in blocks] == [64, 16, 4]
    assert all(b.num_sequences * b.num_tokens == b.map_size[0] * b.map_size[1] for b in blocks)


def test_summary_is_plain_json() -> None:
    told = json.loads(json.dumps(summarize(MODELS["mobilevit_xxs"], 5, (64, 96)).to_dict()))
    stem = told["layers"][0]
    assert stem == {
        "name": "stem", "kind": "ConvNormAct", "shape": [16, 32, 48], "parameters": 464,
        "macs": 3 * 9 * 16 * 32 * 48, "activations": 16 * 32 * 48,
    }  # fmt: skip
