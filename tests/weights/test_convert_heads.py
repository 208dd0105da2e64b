from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from golden_weights import (
    fill_with_golden_weights,
    golden_images,
    golden_manifest,
    golden_name,
    golden_outputs,
    golden_weights,
)
from mobilevit.card import TaskName
from mobilevit.models import HEADS, MODELS, Model
from mobilevit.models.deeplabv3 import DeepLabv3, DeepLabv3Config
from mobilevit.weights.convert import convert_state_dict, recognize, unwrap_state_dict
from transformers_models import as_transformers_sees, dilate, transformers_model

OS8_AUX = DeepLabv3Config(aspp_channels=512, atrous_rates=(12, 24, 36), aux_head=True)
WITH_AUX = DeepLabv3Config(aux_head=True)


class Form(NamedTuple):
    """How the model behind a reference output is built."""

    name: str
    task: TaskName
    output_stride: int
    num_classes: int
    head: DeepLabv3Config | None

    @property
    def generation(self) -> str:
        return self.name.split("_")[0]


FORMS = {
    f"{kind}_{golden_name(name)}": Form(name, kind.split(".")[0], *rest)  # type: ignore[arg-type]
    for kind, names, *rest in (
        ("detection.ssdlite", ["mobilevit_xxs", "mobilevit_xs", "mobilevit_s"], 32, 80, None),
        ("segmentation.deeplabv3_os16", ["mobilevit_xxs", "mobilevit_xs", "mobilevit_s"], 16, 21, None),
        ("segmentation.deeplabv3_os8_aux", ["mobilevit_xxs", "mobilevit_xs", "mobilevit_s"], 8, 21, OS8_AUX),
        ("detection.ssdlite", ["mobilevitv2_050", "mobilevitv2_100"], 32, 80, None),
        ("segmentation.deeplabv3_voc", ["mobilevitv2_050", "mobilevitv2_100"], 16, 21, WITH_AUX),
        ("segmentation.deeplabv3_ade20k", ["mobilevitv2_050"], 8, 150, WITH_AUX),
    )
    for name in names
}
each_form = pytest.mark.parametrize("form", FORMS)


@cache
def cvnets_weights(form: str) -> dict[str, Tensor]:
    """A whole state dict of ml-cvnets, counters of batches other than zero."""
    state = golden_weights(golden_manifest(FORMS[form].task)[form]["state"])
    counters = (key for key in state if key.endswith("num_batches_tracked"))
    return state | {key: torch.tensor(i) for i, key in enumerate(counters)}


def fresh_model(form: str) -> Model:
    name, task, output_stride, num_classes, head = FORMS[form]
    config = dataclasses.replace(MODELS[name], output_stride=output_stride)
    return HEADS[task].build(config, num_classes, head)


def golden_model(form: str) -> Model:
    model = fresh_model(form)
    state = convert_state_dict(cvnets_weights(form), to="mobilevit", source_channel_order="rgb")
    model.load_state_dict(state)
    return model.eval()


def assert_identical(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert torch.equal(ours[key], value), key


@each_form
def test_there_and_back_is_bit_exact(form: str) -> None:
    state, generation = cvnets_weights(form), FORMS[form].generation
    ours = convert_state_dict(state, to="mobilevit")
    assert recognize(state) == ("cvnets", FORMS[form].task, generation)
    assert recognize(ours) == ("mobilevit", FORMS[form].task, generation)
    assert ours.keys() == fresh_model(form).state_dict().keys()
    assert_identical(convert_state_dict(ours, to="cvnets"), state)
    first = state["encoder.conv_1.block.conv.weight"]
    assert torch.equal(ours["backbone.stem.conv.weight"], first.flip(1) if generation == "mobilevit" else first)
    if FORMS[form].task == "segmentation":  # transformers has no auxiliary head
        ours, state = ({k: v for k, v in one.items() if "aux_head." not in k} for one in (ours, state))
        assert_identical(convert_state_dict(convert_state_dict(ours, to="transformers"), to="mobilevit"), ours)
        assert_identical(convert_state_dict(convert_state_dict(state, to="transformers"), to="cvnets"), state)


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("detection")])
def test_golden_detection(form: str) -> None:
    golden = {key.removeprefix(f"{form}."): value for key, value in golden_outputs("detection").items()}
    with torch.inference_mode():
        output = golden_model(form)(golden_images(1, 320, 320))
    assert (output.box_regression - golden["box_regression.320x320"]).abs().max() <= 1e-4
    assert output.class_logits.shape == (1, 3232, 81)
    if FORMS[form].generation == "mobilevit":
        logits, ours = golden["class_logits.320x320"], output.class_logits
        tolerance = 1e-3 * logits.abs().max()  # kept in half precision, likewise below
        assert (output.anchors_cxcywh - golden["anchors_cxcywh.320x320"]).abs().max() <= 1e-6
    else:
        logits, ours, tolerance = golden["class_logits_every3.320x320"], output.class_logits[:, ::3], 2e-3
        assert (output.class_logits.logsumexp(2) - golden["class_logsumexp.320x320"]).abs().max() <= 1e-4
        assert (output.class_logits.argmax(2) == golden["class_argmax.320x320"]).float().mean() >= 0.9999
        assert (
            zlib.crc32(output.anchors_cxcywh.numpy().tobytes()) == golden_manifest("detection")[form]["anchors_crc32"]
        )
    assert ours.shape == logits.shape
    assert (ours - logits.float()).abs().max() <= tolerance


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("segmentation")])
def test_golden_segmentation(form: str) -> None:
    golden = {key.removeprefix(f"{form}."): value for key, value in golden_outputs("segmentation").items()}
    with torch.inference_mode():
        output = golden_model(form)(golden_images(1, 256, 256))
    assert output.aux_logits is None
    step = 16 if "ade20k" in form else 8
    logits = golden[f"logits_every{step}.256x256"]
    tolerance = 2e-3 if logits.dtype == torch.float16 else 1e-4
    assert (output.logits[..., ::step, ::step] - logits).abs().max() <= tolerance
    if FORMS[form].generation == "mobilevit":
        assert (output.logits.argmax(1) == golden["argmax.256x256"]).float().mean() >= 0.9999


@pytest.mark.parametrize(
    ("form", "images"),
    [
        ("segmentation.deeplabv3_os16_mobilevit_xxs", [(128, 128), (160, 96)]),
        ("segmentation.deeplabv3_os16_mobilevit_s", [(128, 128), (160, 96)]),
        ("segmentation.deeplabv3_voc_mobilevitv2_0.5", [(128, 128), (160, 96)]),
        ("segmentation.deeplabv3_ade20k_mobilevitv2_0.5", [(64, 96)]),
    ],
)
def test_transformers_computes_the_same(form: str, images: list[tuple[int, int]]) -> None:
    name, task, output_stride, num_classes, _ = FORMS[form]
    theirs = transformers_model(
        name,
        "ForSemanticSegmentation",
        output_stride=output_stride,
        num_labels=num_classes,
        atrous_rates=[rate * 16 // output_stride for rate in (6, 12, 18)],
    )
    config = dataclasses.replace(MODELS[name], output_stride=output_stride)
    ours = HEADS[task].build(config, num_classes, None).eval()
    assert isinstance(ours, DeepLabv3)
    state = theirs.state_dict()
    assert recognize(state) == ("transformers", "segmentation", FORMS[form].generation)
    ours.load_state_dict(convert_state_dict(state, to="mobilevit"))
    if FORMS[form].generation == "mobilevitv2":
        x = golden_images(1, *images[0])
        with torch.inference_mode():
            assert (ours.coarse_logits(x) - theirs(x).logits).abs().max() > 0.1, "it forgets to dilate its blocks"
        dilate(theirs.mobilevitv2.encoder, output_stride)
    for image in images:
        x = golden_images(1, *image)
        with torch.inference_mode():
            assert (ours.coarse_logits(x) - theirs(as_transformers_sees(name, x)).logits).abs().max() <= 1e-4
    fill_with_golden_weights(ours)  # and from ours to theirs
    theirs.load_state_dict(convert_state_dict(ours.state_dict(), to="transformers"))
    with torch.inference_mode():
        assert (ours.coarse_logits(x) - theirs(as_transformers_sees(name, x)).logits).abs().max() <= 1e-4


def test_a_family_without_such_a_head_is_named() -> None:
    detector = convert_state_dict(cvnets_weights("detection.ssdlite_mobilevit_xxs"), to="mobilevit")
    for to in ("timm", "transformers"):
        with pytest.raises(ValueError, match=rf"^{to} has no MobileViT detector; convert to cvnets"):
            convert_state_dict(detector, to=to)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^timm has no MobileViT segmenter"):
        convert_state_dict(cvnets_weights("segmentation.deeplabv3_os16_mobilevit_xxs"), to="timm")
    with_aux = convert_state_dict(cvnets_weights("segmentation.deeplabv3_os8_aux_mobilevit_xxs"), to="mobilevit")
    with pytest.raises(ValueError, match=r"no place for 8 of .* tensors \(aux_head\.0"):
        convert_state_dict(with_aux, to="transformers")
    second = convert_state_dict(cvnets_weights("detection.ssdlite_mobilevitv2_0.5"), to="mobilevit")
    with pytest.raises(ValueError, match=r"^timm has no MobileViTv2 detector; convert to cvnets"):
        convert_state_dict(second, to="timm")
    # The advice helps:
    backbone = {key: value for key, value in detector.items() if key.startswith("backbone.")}
    assert "stages.4.1.norm.weight" in convert_state_dict(backbone, to="timm")
    without = {key: value for key, value in with_aux.items() if not key.startswith("aux_head")}
    assert "segmentation_head.aspp.convs.4.conv_1x1.convolution.weight" in convert_state_dict(
        without, to="transformers"
    )


@pytest.mark.parametrize("form", [form for form in FORMS if form.endswith(("_xxs", "_0.5"))])
def test_wrapped_models_keep_their_backbone_apart(form: str) -> None:
    ours = convert_state_dict(cvnets_weights(form), to="mobilevit")
    for prefix in ("module.", "model.", "_orig_mod.", "model.backbone.", "backbone."):
        wrapped = {"state_dict": {prefix + key: value for key, value in ours.items()}}
        assert_identical(unwrap_state_dict(wrapped), ours)
        assert_identical(convert_state_dict(wrapped, to="mobilevit"), ours)


def test_what_models_make_anew_is_left_out() -> None:
    state = cvnets_weights("detection.ssdlite_mobilevit_xxs")
    extra = {
        "anchor_box_generator.anchors": torch.zeros(3),
        "match_prior.iou": torch.zeros(1),
        "encoder.neural_augmentor.noise._low": torch.zeros(1),
    }
    assert_identical(convert_state_dict(state | extra, to="cvnets"), state)


def test_names_of_the_first_version_of_cvnets() -> None:
    state = cvnets_weights("segmentation.deeplabv3_os16_mobilevit_xxs")
    first = {key.replace("seg_head.classifier.", "seg_head.classifier.classifier."): v for key, v in state.items()}
    assert first.keys() != state.keys()
    assert_identical(convert_state_dict(first, to="cvnets"), state)


def test_a_stranger_in_a_detector_is_named() -> None:
    state = cvnets_weights("detection.ssdlite_mobilevit_xxs") | {"mask_head.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"belong to no part of a MobileViT detector in cvnets names \(mask_head"):
        convert_state_dict(state, to="mobilevit")
