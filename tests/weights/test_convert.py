from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from golden_weights import (
    fill_with_golden_weights,
    golden_images,
    golden_manifest,
    golden_name,
    golden_outputs,
    golden_weights,
)
from mobilevit.models import HEADS, MODELS, Model
from mobilevit.models.mobilevit import XXS, MobileViT
from mobilevit.weights.convert import Family, convert_state_dict, recognize, unwrap_state_dict
from transformers_models import as_transformers_sees, dilate, transformers_model

V1 = ["mobilevit_xxs", "mobilevit_xs", "mobilevit_s"]
V2 = [name for name in MODELS if name not in V1]
SIZES = [(256, 256), (192, 320), (250, 230)]
V2_SIZES = [(64, 128), (54, 38)]  # the latter has odd maps at strides 8 and 16; small, as there are seven models
PEERS: list[Family] = ["cvnets", "timm", "transformers"]
TOLERANCE = 1e-4  # for maps, whose values reach 2
LOGIT_TOLERANCE = 1e-5  # pooling over images of noise hides a wrong channel order up to about 1e-4
V2_GOLDEN_TOLERANCE = 5e-5  # norms over whole images add up a million numbers; in float64 the difference is 3e-6

each_model = pytest.mark.parametrize("name", [*V1, "mobilevitv2_050"])
each_generation = pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])
each_peer = pytest.mark.parametrize("peer", PEERS)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # On a busy machine, threads that share such small models spend ten times the work waiting for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def timm_model(name: str) -> Any:
    timm = pytest.importorskip("timm")
    return fill_with_golden_weights(timm.create_model(name))


@cache
def weights_of(peer: Family, name: str) -> dict[str, Tensor]:
    """A whole state dict in a peer's own names, no number of it at its initial value."""
    if peer == "cvnets":
        state = golden_weights(golden_manifest()[f"classification.{golden_name(name)}"]["state"])
    else:
        state = dict((timm_model if peer == "timm" else transformers_model)(name).state_dict())
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.full_like(value, zlib.crc32(key.encode()))
    return state


def fresh_model(name: str, *, output_stride: int = 32, num_classes: int = 1000) -> Model:
    return HEADS["classification"].build(replace(MODELS[name], output_stride=output_stride), num_classes, None)


def our_model(name: str, state_dict: Mapping[str, Tensor], order: Any = None, **options: int) -> Model:
    model = fresh_model(name, **options)
    model.load_state_dict(convert_state_dict(state_dict, to="mobilevit", source_channel_order=order))
    return model.eval()


M = TypeVar("M", nn.Module, Tensor)


def as_precise(name: str, model_or_images: M) -> M:
    """MobileViTv2 in float64: its rounding in float32 is as large as the tolerance."""
    return model_or_images if name in V1 else model_or_images.double()


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def assert_identical(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert torch.equal(ours[key], value), key


@each_model
@each_peer
def test_there_and_back_is_bit_exact(peer: Family, name: str) -> None:
    state = weights_of(peer, name)
    before = {key: value.clone() for key, value in state.items()}
    ours = convert_state_dict(state, to="mobilevit")
    generation = name.split("_")[0]
    assert recognize(state) == (peer, "classification", generation)
    assert recognize(ours) == ("mobilevit", "classification", generation)
    assert ours.keys() == fresh_model(name).state_dict().keys()
    assert_identical(convert_state_dict(ours, to=peer), before)
    for other in PEERS:
        assert_identical(convert_state_dict(convert_state_dict(state, to=other), to=peer), before)
    assert_identical(state, before)  # the input is as it was


@pytest.mark.parametrize("name", [*V1, *V2])
def test_timm_computes_the_same(name: str) -> None:
    theirs = as_precise(name, timm_model(name))
    ours = as_precise(name, our_model(name, theirs.state_dict()))
    for height, width in SIZES if name in V1 else V2_SIZES:
        x = as_precise(name, golden_images(1, height, width))
        with torch.inference_mode():
            maps = theirs.forward_intermediates(x, intermediates_only=True, exclude_final_conv=True)
            features = ours.forward_features(x)
            assert difference(ours(x), theirs(x)) <= LOGIT_TOLERANCE
        assert list(features) == [2, 4, 8, 16, 32]
        for stride, theirs_map in zip(features, maps, strict=True):
            assert difference(features[stride], theirs_map) <= TOLERANCE, stride


@each_model
def test_transformers_computes_the_same(name: str) -> None:
    theirs = as_precise(name, transformers_model(name))
    ours = as_precise(name, our_model(name, theirs.state_dict()))
    for height, width in SIZES if name in V1 else [(256, 256), (192, 320)]:
        x = as_precise(name, golden_images(1, height, width))
        with torch.inference_mode():
            output = theirs(as_transformers_sees(name, x), output_hidden_states=True)
            features = ours.forward_features(x)
            assert difference(ours(x), output.logits) <= LOGIT_TOLERANCE
        for stride, theirs_map in zip(features, output.hidden_states, strict=True):
            assert difference(features[stride], theirs_map) <= TOLERANCE, stride


@pytest.mark.parametrize("size", [(250, 230), (122, 102)])
def test_transformers_differs_where_maps_are_odd(size: tuple[int, int]) -> None:
    """Its MobileViTv2 drops the last row or column, where the official code resizes; resized as there, it is equal."""
    theirs = transformers_model("mobilevitv2_050").double()
    ours = our_model("mobilevitv2_050", theirs.state_dict()).double()
    x = golden_images(1, *size).double()
    with torch.inference_mode():
        assert difference(ours(x), theirs(x).logits) > 0.1
        for stage in theirs.mobilevitv2.encoder.layer[2:]:
            stage.conv_kxk.register_forward_pre_hook(_resize_to_even)
        assert difference(ours(x), theirs(x).logits) <= LOGIT_TOLERANCE


def _resize_to_even(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    even = [side + side % 2 for side in inputs[0].shape[2:]]
    return nn.functional.interpolate(inputs[0], size=even, mode="bilinear", align_corners=True)


@pytest.mark.parametrize("name", [*V1, "mobilevitv2_050", "mobilevitv2_100", "mobilevitv2_200"])
def test_golden_outputs_of_cvnets(name: str) -> None:
    golden, key = golden_outputs("classification"), f"classification.{golden_name(name)}"
    known = golden_manifest()[key]
    model = our_model(name, golden_weights(known["state"]), "rgb" if name in V1 else None)
    tolerance = LOGIT_TOLERANCE if name in V1 else V2_GOLDEN_TOLERANCE
    with torch.inference_mode():
        for height, width in SIZES:
            logits = golden[f"{key}.logits.{height}x{width}"]
            assert difference(model(golden_images(2, height, width)), logits) <= tolerance
        for size in ("256x256",) if name in V1 else ("256x256", "250x230"):
            features = model.forward_features(golden_images(1, *map(int, size.split("x"))))
            for level, feature in enumerate(features.values(), start=1):
                mean = golden[f"{key}.feature_mean_c.out_l{level}.{size}"]
                assert difference(feature.mean((2, 3)), mean) <= tolerance, level
                if name in V2:
                    assert list(feature.shape[1:]) == known["feature_shapes"][f"out_l{level}.{size}"]


@pytest.mark.parametrize(("output_stride", "strides"), [(32, [2, 4, 8, 16, 32]), (16, [2, 4, 8, 16]), (8, [2, 4, 8])])
@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevit_s", "mobilevitv2_050"])
def test_output_stride_agrees_with_transformers(name: str, output_stride: int, strides: list[int]) -> None:
    theirs = transformers_model(name, "Model", output_stride=output_stride)
    if name in V2:
        dilate(theirs.encoder, output_stride)
    # A backbone alone: its names have no prefix, and there is no classifier.
    assert recognize(theirs.state_dict()).family == "transformers"
    ours = our_model(name, theirs.state_dict(), output_stride=output_stride, num_classes=0)
    assert list(ours.feature_channels) == strides
    assert ours.feature_channels[output_stride] == MODELS[name].channels[-1]

    x = golden_images(1, 128, 192)
    with torch.inference_mode():
        output = theirs(as_transformers_sees(name, x), output_hidden_states=True)
        features = ours.forward_features(x)
        last = ours.head_conv(features[output_stride]) if name in V1 else features[output_stride]
        assert difference(last, output.last_hidden_state) <= TOLERANCE
    deepest = {x.shape[-1] // theirs_map.shape[-1]: theirs_map for theirs_map in output.hidden_states}
    assert list(features) == list(deepest) == strides
    for stride in strides:
        assert features[stride].shape[1:] == (ours.feature_channels[stride], 128 // stride, 192 // stride)
        assert difference(features[stride], deepest[stride]) <= TOLERANCE, stride


@each_generation
@each_peer
def test_parts_of_a_model_convert(peer: Family, name: str) -> None:
    whole = weights_of(peer, name)
    without_classifier = {
        key: value for key, value in whole.items() if "classifier" not in key and "head.fc" not in key
    }
    assert len(without_classifier) == len(whole) - 2
    ours = convert_state_dict(without_classifier, to="mobilevit")
    assert ours.keys() == fresh_model(name, num_classes=0).state_dict().keys()
    assert_identical(convert_state_dict(ours, to=peer), without_classifier)


FIRST = {
    "mobilevit": "stem.conv.weight",
    "cvnets": "conv_1.block.conv.weight",
    "timm": "stem.conv.weight",
    "transformers": "{generation}.conv_stem.convolution.weight",
}


@pytest.mark.parametrize(
    ("source", "to", "order", "flipped"),
    [
        ("cvnets", "mobilevit", None, True),
        ("transformers", "mobilevit", None, True),
        ("timm", "mobilevit", None, False),
        ("cvnets", "transformers", None, False),
        ("cvnets", "timm", None, True),
        ("timm", "transformers", None, True),
        ("cvnets", "cvnets", None, False),
        ("cvnets", "mobilevit", "rgb", False),
        ("cvnets", "mobilevit", "bgr", True),
        ("timm", "mobilevit", "rgb", False),
        ("timm", "mobilevit", "bgr", True),
    ],
)
@each_generation
def test_channel_order(name: str, source: Family, to: Family, order: Any, flipped: bool) -> None:
    state = weights_of(source, name)
    converted = convert_state_dict(state, to=to, source_channel_order=order)
    generation = name.split("_")[0]
    before, after = (FIRST[family].format(generation=generation) for family in (source, to))
    if generation == "mobilevitv2":  # all families have it in RGB
        flipped = order == "bgr"
    expected = state[before].flip(1) if flipped else state[before]
    assert torch.equal(converted[after], expected)
    assert not torch.equal(expected, expected.flip(1))


def test_fused_projection_becomes_query_key_value_in_this_order() -> None:
    state = weights_of("cvnets", "mobilevit_xxs")
    fused = state["layer_3.1.global_rep.1.pre_norm_mha.1.qkv_proj.weight"]
    converted = convert_state_dict(state, to="transformers")
    prefix = "mobilevit.encoder.layer.2.transformer.layer.1.attention.attention"
    for i, name in enumerate(("query", "key", "value")):
        assert torch.equal(converted[f"{prefix}.{name}.weight"], fused[64 * i : 64 * (i + 1)])

    state = weights_of("cvnets", "mobilevitv2_050")  # a score, then keys and values; 1x1 convolutions
    fused = state["layer_3.1.global_rep.1.pre_norm_attn.1.qkv_proj.block.conv.weight"]
    assert fused.shape == (1 + 2 * 64, 64, 1, 1)
    converted = convert_state_dict(state, to="mobilevit")
    for name, rows in (("query", slice(0, 1)), ("key", slice(1, 65)), ("value", slice(65, None))):
        assert torch.equal(converted[f"layer3.1.transformer.1.attention.{name}.weight"], fused[rows, :, 0, 0])


@each_generation
@each_peer
def test_every_result_can_be_written_to_safetensors(peer: Family, name: str, tmp_path: Any) -> None:
    state = convert_state_dict(convert_state_dict(weights_of("cvnets", name), to="mobilevit"), to=peer)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    assert_identical(load_file(tmp_path / "model.safetensors"), state)


@each_generation
def test_other_models_take_the_result(name: str) -> None:
    """Ours to theirs, where the other tests go from theirs to ours."""
    ours = fill_with_golden_weights(fresh_model(name))
    x = golden_images(1, 64, 128)
    timm, transformers = timm_model(name), transformers_model(name)
    timm.load_state_dict(convert_state_dict(ours.state_dict(), to="timm"))
    transformers.load_state_dict(convert_state_dict(ours.state_dict(), to="transformers"))
    with torch.inference_mode():
        assert difference(ours(x), timm(x)) <= LOGIT_TOLERANCE
        assert difference(ours(x), transformers(as_transformers_sees(name, x)).logits) <= LOGIT_TOLERANCE


def _prefixed(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    return lambda state: {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"state_dict": state}, "args": None},
        lambda state: {"model_state_dict": _zeros(state), "ema_state_dict": state, "optim_state_dict": {"state": {}}},
        lambda state: {"state_dict": _zeros(state), "state_dict_ema": state},
        lambda state: {"model": _zeros(state), "model_ema": state},
        lambda state: {"model": _zeros(state), "ema": {"module": state, "updates": 7}},
        lambda state: {"model": state, "ema": None},
        lambda state: {"model": state, "ema_state_dict": {}},
        _prefixed("module."),
        _prefixed("_orig_mod."),
        _prefixed("module._orig_mod."),
        _prefixed("_orig_mod.module."),
        _prefixed("backbone."),
        lambda state: {"state_dict": _prefixed("model.")(state), "pytorch-lightning_version": "2.5"},
        lambda state: {**_prefixed("module.")(state), "n_averaged": torch.tensor(5)},
        lambda state: {key.replace("layer3.", "layer3._orig_mod."): value for key, value in state.items()},
    ],
)
def test_unwrap(wrap: Callable[[dict[str, Tensor]], dict[str, Any]]) -> None:
    state = {"stem.conv.weight": torch.ones(16, 3, 3, 3), "layer3.1.norm.bias": torch.arange(4.0)}
    assert_identical(unwrap_state_dict(wrap(state)), state)
    assert_identical(convert_state_dict(wrap(state), to="mobilevit"), state)


def _zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in state.items()}


def test_a_prefix_that_only_some_names_have_stays() -> None:
    state = {"backbone.stem.conv.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert_identical(unwrap_state_dict(state), state)


def test_backbone_of_a_larger_cvnets_model_converts_and_its_head_is_named() -> None:
    state = weights_of("cvnets", "mobilevit_xxs")
    backbone = {f"encoder.{key}": value for key, value in state.items() if not key.startswith("classifier")}
    assert convert_state_dict(backbone, to="mobilevit").keys() == MobileViT(XXS, 0).state_dict().keys()
    heads = {f"seg_head.{i}.weight": torch.ones(1) for i in range(5)}
    with pytest.raises(
        ValueError, match=r"^5 of 314 tensors .* cvnets names \(seg_head.0.weight, seg_head.1.weight, "
    ) as e:
        convert_state_dict({**backbone, **heads}, to="mobilevit")
    assert "seg_head.3" not in str(e.value)


def test_half_an_attention_is_named() -> None:
    state = dict(weights_of("transformers", "mobilevit_xxs"))
    missing = "mobilevit.encoder.layer.2.transformer.layer.0.attention.attention.key.bias"
    del state[missing]
    with pytest.raises(ValueError, match=r"^2 of .*attention\.query\.bias, .*attention\.value\.bias"):
        convert_state_dict(state, to="mobilevit")


def test_errors_are_one_line_that_says_what_to_do() -> None:
    resnet = {f"layer1.{i}.conv1.weight": torch.ones(1) for i in range(5)} | {"classifier.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"^not the weights of a MobileViT: keys are layer1.0.conv1.weight, .*timm"):
        convert_state_dict(resnet, to="mobilevit")
    with pytest.raises(ValueError, match=r"^no weights found: keys are epoch, model; give a state dict"):
        unwrap_state_dict({"epoch": 3, "model": {"config": "xxs"}})
    with pytest.raises(ValueError, match=r"^cannot convert to 'keras'; choose from mobilevit, cvnets, timm"):
        convert_state_dict(resnet, to="keras")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^`source_channel_order` is 'BGR'; it can be None, 'rgb' or 'bgr'"):
        convert_state_dict(resnet, to="timm", source_channel_order="BGR")  # type: ignore[arg-type]
