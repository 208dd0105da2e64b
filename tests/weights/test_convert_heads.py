from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from golden_weights import fill_with_golden_weights, golden_images, golden_manifest, golden_outputs, golden_weights
from mobilevit.models import HEADS, MODELS, Model
from mobilevit.models.deeplabv3 import DeepLabv3, DeepLabv3Config
from mobilevit.weights.convert import convert_state_dict, recognize, unwrap_state_dict

OS8_AUX = DeepLabv3Config(aspp_channels=512, atrous_rates=(12, 24, 36), aux_head=True)
FORMS: dict[str, tuple[str, int, DeepLabv3Config | None]] = {
    "detection.ssdlite": ("detection", 32, None),
    "segmentation.deeplabv3_os16": ("segmentation", 16, None),
    "segmentation.deeplabv3_os8_aux": ("segmentation", 8, OS8_AUX),
}

each_form = pytest.mark.parametrize("form", FORMS)
each_size = pytest.mark.parametrize("size", ["xxs", "xs", "s"])


@cache
def cvnets_weights(form: str, size: str) -> dict[str, Tensor]:
    """A whole state dict of ml-cvnets, counters of batches other than zero."""
    task = FORMS[form][0]
    state = golden_weights(golden_manifest(f"cvnets_{task}_manifest.json")[f"{form}_mobilevit_{size}"])
    counters = (key for key in state if key.endswith("num_batches_tracked"))
    return state | {key: torch.tensor(i) for i, key in enumerate(counters)}


def fresh_model(form: str, size: str) -> Model:
    task, output_stride, head = FORMS[form]
    config = dataclasses.replace(MODELS[f"mobilevit_{size}"], output_stride=output_stride)
    return HEADS[task].build(config, 80 if task == "detection" else 21, head)


def golden_model(form: str, size: str) -> Model:
    model = fresh_model(form, size)
    state = convert_state_dict(cvnets_weights(form, size), to="mobilevit", source_channel_order="rgb")
    model.load_state_dict(state)
    return model.eval()


def assert_identical(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert torch.equal(ours[key], value), key


@each_size
@each_form
def test_there_and_back_is_bit_exact(form: str, size: str) -> None:
    state = cvnets_weights(form, size)
    ours = convert_state_dict(state, to="mobilevit")
    assert recognize(state) == ("cvnets", FORMS[form][0])
    assert recognize(ours) == ("mobilevit", FORMS[form][0])
    assert ours.keys() == fresh_model(form, size).state_dict().keys()
    assert_identical(convert_state_dict(ours, to="cvnets"), state)
    first = "encoder.conv_1.block.conv.weight"
    assert torch.equal(ours["backbone.stem.conv.weight"], state[first].flip(1))
    if form.endswith("os16"):
        assert_identical(convert_state_dict(convert_state_dict(ours, to="transformers"), to="mobilevit"), ours)
        assert_identical(convert_state_dict(convert_state_dict(state, to="transformers"), to="cvnets"), state)


@each_size
def test_golden_detection(size: str) -> None:
    golden, name = golden_outputs("detection"), f"detection.ssdlite_mobilevit_{size}"
    with torch.inference_mode():
        output = golden_model("detection.ssdlite", size)(golden_images(1, 320, 320))
    logits = golden[f"{name}.class_logits.320x320"].float()
    assert output.class_logits.shape == logits.shape
    assert (output.class_logits - logits).abs().max() <= 1e-3 * logits.abs().max()  # kept in half precision
    assert (output.box_regression - golden[f"{name}.box_regression.320x320"]).abs().max() <= 1e-4
    assert (output.anchors_cxcywh - golden[f"{name}.anchors_cxcywh.320x320"]).abs().max() <= 1e-6


@each_size
@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("segmentation")])
def test_golden_segmentation(form: str, size: str) -> None:
    golden, name = golden_outputs("segmentation"), f"{form}_mobilevit_{size}"
    with torch.inference_mode():
        output = golden_model(form, size)(golden_images(1, 256, 256))
    assert output.aux_logits is None
    assert (output.logits[..., ::8, ::8] - golden[f"{name}.logits_every8.256x256"]).abs().max() <= 1e-4
    assert (output.logits.argmax(1) == golden[f"{name}.argmax.256x256"]).float().mean() >= 0.9999


def transformers_model(size: str) -> Any:
    transformers = pytest.importorskip("transformers")
    config = MODELS[f"mobilevit_{size}"]
    theirs = transformers.MobileViTConfig(
        hidden_sizes=list(config.embed_dims),
        neck_hidden_sizes=[config.stem_channels, *config.channels, config.head_channels],
        expand_ratio=float(config.expand_ratio),
        output_stride=16,
        num_labels=21,
    )
    return fill_with_golden_weights(transformers.MobileViTForSemanticSegmentation(theirs))


def low_resolution_logits(model: DeepLabv3, x: Tensor) -> Tensor:
    """transformers does not enlarge its logits."""
    return model.classifier(model.aspp(model.backbone.forward_features(x)[16]))


@pytest.mark.parametrize("size", ["xxs", "s"])
@pytest.mark.parametrize("image", [(128, 128), (160, 96)])
def test_transformers_computes_the_same_on_bgr(size: str, image: tuple[int, int]) -> None:
    theirs, ours = transformers_model(size), fresh_model("segmentation.deeplabv3_os16", size).eval()
    assert isinstance(ours, DeepLabv3)
    state = theirs.state_dict()
    assert recognize(state) == ("transformers", "segmentation")
    ours.load_state_dict(convert_state_dict(state, to="mobilevit"))
    x = golden_images(1, *image)
    with torch.inference_mode():
        assert (low_resolution_logits(ours, x) - theirs(x.flip(1)).logits).abs().max() <= 1e-4

        fill_with_golden_weights(ours)  # and from ours to theirs
        theirs.load_state_dict(convert_state_dict(ours.state_dict(), to="transformers"))
        assert (low_resolution_logits(ours, x) - theirs(x.flip(1)).logits).abs().max() <= 1e-4


def test_a_family_without_such_a_head_is_named() -> None:
    detector = convert_state_dict(cvnets_weights("detection.ssdlite", "xxs"), to="mobilevit")
    for to in ("timm", "transformers"):
        with pytest.raises(ValueError, match=rf"^{to} has no MobileViT detector; convert to cvnets"):
            convert_state_dict(detector, to=to)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^timm has no MobileViT segmenter"):
        convert_state_dict(cvnets_weights("segmentation.deeplabv3_os16", "xxs"), to="timm")
    with_aux = convert_state_dict(cvnets_weights("segmentation.deeplabv3_os8_aux", "xxs"), to="mobilevit")
    with pytest.raises(ValueError, match=r"no place for 8 of .* tensors \(aux_head\.0"):
        convert_state_dict(with_aux, to="transformers")
    # The advice helps:
    backbone = {key: value for key, value in detector.items() if key.startswith("backbone.")}
    assert "stages.4.1.norm.weight" in convert_state_dict(backbone, to="timm")
    without = {key: value for key, value in with_aux.items() if not key.startswith("aux_head")}
    assert "segmentation_head.aspp.convs.4.conv_1x1.convolution.weight" in convert_state_dict(
        without, to="transformers"
    )


@each_form
def test_wrapped_models_keep_their_backbone_apart(form: str) -> None:
    ours = convert_state_dict(cvnets_weights(form, "xxs"), to="mobilevit")
    for prefix in ("module.", "model.", "_orig_mod.", "model.backbone.", "backbone."):
        wrapped = {"state_dict": {prefix + key: value for key, value in ours.items()}}
        assert_identical(unwrap_state_dict(wrapped), ours)
        assert_identical(convert_state_dict(wrapped, to="mobilevit"), ours)


def test_what_models_make_anew_is_left_out() -> None:
    state = cvnets_weights("detection.ssdlite", "xxs")
    extra = {
        "anchor_box_generator.anchors": torch.zeros(3),
        "match_prior.iou": torch.zeros(1),
        "encoder.neural_augmentor.noise._low": torch.zeros(1),
    }
    assert_identical(convert_state_dict(state | extra, to="cvnets"), state)


def test_names_of_the_first_version_of_cvnets() -> None:
    state = cvnets_weights("segmentation.deeplabv3_os16", "xxs")
    first = {key.replace("seg_head.classifier.", "seg_head.classifier.classifier."): v for key, v in state.items()}
    assert first.keys() != state.keys()
    assert_identical(convert_state_dict(first, to="cvnets"), state)


def test_a_stranger_in_a_detector_is_named() -> None:
    state = cvnets_weights("detection.ssdlite", "xxs") | {"mask_head.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"belong to no part of a MobileViT detector in cvnets names \(mask_head"):
        convert_state_dict(state, to="mobilevit")
