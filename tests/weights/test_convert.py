from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from golden_weights import GOLDEN, fill_with_golden_weights, golden_images, golden_manifest, golden_weights
from mobilevit.models.mobilevit import XS, XXS, MobileViT, MobileViTConfig, S
from mobilevit.weights.convert import Family, convert_state_dict, recognize, unwrap_state_dict

CONFIGS: dict[str, MobileViTConfig] = {"xxs": XXS, "xs": XS, "s": S}
SIZES = [(256, 256), (192, 320), (250, 230)]
PEERS: list[Family] = ["cvnets", "timm", "transformers"]
TOLERANCE = 1e-4  # for maps, whose values reach 2
LOGIT_TOLERANCE = 1e-5  # pooling over images of noise hides a wrong channel order up to about 1e-4

each_size = pytest.mark.parametrize("size", CONFIGS)
each_peer = pytest.mark.parametrize("peer", PEERS)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # On a busy machine, threads that share such small models spend ten times the work waiting for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def timm_model(size: str) -> Any:
    timm = pytest.importorskip("timm")
    return fill_with_golden_weights(timm.create_model(f"mobilevit_{size}"))


def transformers_config(size: str, output_stride: int = 32) -> Any:
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[size]
    return transformers.MobileViTConfig(
        hidden_sizes=list(config.embed_dims),
        neck_hidden_sizes=[config.stem_channels, *config.channels, config.head_channels],
        expand_ratio=float(config.expand_ratio),
        output_stride=output_stride,
        num_labels=1000,
    )


def transformers_model(size: str) -> Any:
    transformers = pytest.importorskip("transformers")
    return fill_with_golden_weights(transformers.MobileViTForImageClassification(transformers_config(size)))


@cache
def weights_of(peer: Family, size: str) -> dict[str, Tensor]:
    """A whole state dict in a peer's own names, no number of it at its initial value."""
    if peer == "cvnets":
        state = golden_weights(golden_manifest()[f"classification.mobilevit_{size}"])
    else:
        state = dict((timm_model if peer == "timm" else transformers_model)(size).state_dict())
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.full_like(value, zlib.crc32(key.encode()))
    return state


def our_model(
    size: str, state_dict: Mapping[str, Tensor], order: Any = None, *, output_stride: int = 32, num_classes: int = 1000
) -> MobileViT:
    model = MobileViT(replace(CONFIGS[size], output_stride=output_stride), num_classes)
    model.load_state_dict(convert_state_dict(state_dict, to="mobilevit", source_channel_order=order))
    return model.eval()


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def assert_identical(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert torch.equal(ours[key], value), key


@each_size
@each_peer
def test_there_and_back_is_bit_exact(peer: Family, size: str) -> None:
    state = weights_of(peer, size)
    before = {key: value.clone() for key, value in state.items()}
    ours = convert_state_dict(state, to="mobilevit")
    assert recognize(state)[0] == peer
    assert recognize(ours)[0] == "mobilevit"
    assert ours.keys() == MobileViT(CONFIGS[size]).state_dict().keys()
    assert_identical(convert_state_dict(ours, to=peer), before)
    for other in PEERS:
        assert_identical(convert_state_dict(convert_state_dict(state, to=other), to=peer), before)
    assert_identical(state, before)  # the input is as it was


@each_size
def test_timm_computes_the_same(size: str) -> None:
    theirs = timm_model(size)
    ours = our_model(size, theirs.state_dict())
    for height, width in SIZES:
        x = golden_images(1, height, width)
        with torch.inference_mode():
            maps = theirs.forward_intermediates(x, intermediates_only=True, exclude_final_conv=True)
            features = ours.forward_features(x)
            assert difference(ours(x), theirs(x)) <= LOGIT_TOLERANCE
        assert list(features) == [2, 4, 8, 16, 32]
        for stride, theirs_map in zip(features, maps, strict=True):
            assert difference(features[stride], theirs_map) <= TOLERANCE, stride


@each_size
def test_transformers_computes_the_same_on_bgr(size: str) -> None:
    theirs = transformers_model(size)
    ours = our_model(size, theirs.state_dict())
    for height, width in SIZES:
        x = golden_images(1, height, width)
        with torch.inference_mode():
            output = theirs(x.flip(1), output_hidden_states=True)
            features = ours.forward_features(x)
            assert difference(ours(x), output.logits) <= LOGIT_TOLERANCE
        for stride, theirs_map in zip(features, output.hidden_states, strict=True):
            assert difference(features[stride], theirs_map) <= TOLERANCE, stride


@each_size
def test_golden_outputs_of_cvnets(size: str) -> None:
    name = f"classification.mobilevit_{size}"
    golden = load_file(GOLDEN / "cvnets_classification.safetensors")
    model = our_model(size, golden_weights(golden_manifest()[name]), "rgb")
    with torch.inference_mode():
        for height, width in SIZES:
            logits = golden[f"{name}.logits.{height}x{width}"]
            assert difference(model(golden_images(2, height, width)), logits) <= LOGIT_TOLERANCE
        features = model.forward_features(golden_images(1, 256, 256))
        for level, feature in enumerate(features.values(), start=1):
            mean = golden[f"{name}.feature_mean_c.out_l{level}.256x256"]
            assert difference(feature.mean((2, 3)), mean) <= LOGIT_TOLERANCE, level


@pytest.mark.parametrize(("output_stride", "strides"), [(32, [2, 4, 8, 16, 32]), (16, [2, 4, 8, 16]), (8, [2, 4, 8])])
@pytest.mark.parametrize("size", ["xxs", "s"])
def test_output_stride_agrees_with_transformers(size: str, output_stride: int, strides: list[int]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = fill_with_golden_weights(transformers.MobileViTModel(transformers_config(size, output_stride)))
    # A backbone alone: its names have no prefix, and there is no classifier.
    assert recognize(theirs.state_dict())[0] == "transformers"
    ours = our_model(size, theirs.state_dict(), output_stride=output_stride, num_classes=0)
    assert list(ours.feature_channels) == strides
    assert ours.feature_channels[output_stride] == CONFIGS[size].channels[-1]

    x = golden_images(1, 128, 160)
    with torch.inference_mode():
        output = theirs(x.flip(1), output_hidden_states=True)
        features = ours.forward_features(x)
        assert difference(ours.head_conv(features[output_stride]), output.last_hidden_state) <= TOLERANCE
    deepest = {x.shape[-1] // theirs_map.shape[-1]: theirs_map for theirs_map in output.hidden_states}
    assert list(features) == list(deepest) == strides
    for stride in strides:
        assert features[stride].shape[1:] == (ours.feature_channels[stride], 128 // stride, 160 // stride)
        assert difference(features[stride], deepest[stride]) <= TOLERANCE, stride


@each_peer
def test_parts_of_a_model_convert(peer: Family) -> None:
    whole = weights_of(peer, "xxs")
    without_classifier = {
        key: value for key, value in whole.items() if "classifier" not in key and "head.fc" not in key
    }
    assert len(without_classifier) == len(whole) - 2
    ours = convert_state_dict(without_classifier, to="mobilevit")
    assert ours.keys() == MobileViT(XXS, 0).state_dict().keys()
    assert_identical(convert_state_dict(ours, to=peer), without_classifier)


FIRST = {
    "mobilevit": "stem.conv.weight",
    "cvnets": "conv_1.block.conv.weight",
    "timm": "stem.conv.weight",
    "transformers": "mobilevit.conv_stem.convolution.weight",
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
def test_channel_order(source: Family, to: Family, order: Any, flipped: bool) -> None:
    state = weights_of(source, "xxs")
    converted = convert_state_dict(state, to=to, source_channel_order=order)
    expected = state[FIRST[source]].flip(1) if flipped else state[FIRST[source]]
    assert torch.equal(converted[FIRST[to]], expected)
    assert not torch.equal(expected, expected.flip(1))


def test_fused_projection_becomes_query_key_value_in_this_order() -> None:
    state = weights_of("cvnets", "xxs")
    fused = state["layer_3.1.global_rep.1.pre_norm_mha.1.qkv_proj.weight"]
    converted = convert_state_dict(state, to="transformers")
    prefix = "mobilevit.encoder.layer.2.transformer.layer.1.attention.attention"
    for i, name in enumerate(("query", "key", "value")):
        assert torch.equal(converted[f"{prefix}.{name}.weight"], fused[64 * i : 64 * (i + 1)])


@each_peer
def test_every_result_can_be_written_to_safetensors(peer: Family, tmp_path: Any) -> None:
    state = convert_state_dict(convert_state_dict(weights_of("cvnets", "xxs"), to="mobilevit"), to=peer)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    assert_identical(load_file(tmp_path / "model.safetensors"), state)


def test_other_models_take_the_result() -> None:
    """Ours to theirs, where the other tests go from theirs to ours."""
    ours = fill_with_golden_weights(MobileViT(XXS))
    x = golden_images(1, 64, 96)
    timm, transformers = timm_model("xxs"), transformers_model("xxs")
    timm.load_state_dict(convert_state_dict(ours.state_dict(), to="timm"))
    transformers.load_state_dict(convert_state_dict(ours.state_dict(), to="transformers"))
    with torch.inference_mode():
        assert difference(ours(x), timm(x)) <= LOGIT_TOLERANCE
        assert difference(ours(x), transformers(x.flip(1)).logits) <= LOGIT_TOLERANCE


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
    state = weights_of("cvnets", "xxs")
    backbone = {f"encoder.{key}": value for key, value in state.items() if not key.startswith("classifier")}
    assert convert_state_dict(backbone, to="mobilevit").keys() == MobileViT(XXS, 0).state_dict().keys()
    heads = {f"seg_head.{i}.weight": torch.ones(1) for i in range(5)}
    with pytest.raises(
        ValueError, match=r"^5 of 314 tensors .* cvnets names \(seg_head.0.weight, seg_head.1.weight, "
    ) as e:
        convert_state_dict({**backbone, **heads}, to="mobilevit")
    assert "seg_head.3" not in str(e.value)


def test_half_an_attention_is_named() -> None:
    state = dict(weights_of("transformers", "xxs"))
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
