from __future__ import annotations

from typing import Any

import pytest

from mobilevit.card import default_classes
from mobilevit.class_names import ADE20K_CLASSES, COCO_CLASSES, VOC_CLASSES
from mobilevit.factory import create_model
from mobilevit.models import HEADS, MODELS, imagenet_classes
from mobilevit.models.deeplabv3 import DeepLabv3, DeepLabv3Config
from mobilevit.models.mobilevit import MobileViT
from mobilevit.models.mobilevitv2 import MobileViTv2
from mobilevit.models.ssdlite import SSDLite, SSDLiteConfig


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])
@pytest.mark.parametrize(
    ("task", "kinds"), list(zip(HEADS, ((MobileViT, MobileViTv2), SSDLite, DeepLabv3), strict=True))
)
def test_the_rows_of_the_classes(task: str, kinds: Any, name: str) -> None:
    head = DeepLabv3Config(aux_head=True) if task == "segmentation" else None
    states = {}
    for count in (2, 7):
        model = HEADS[task].build(MODELS[name], count, head)
        assert isinstance(model, kinds)
        states[count] = model.state_dict()
        assert HEADS[task].guess_classes(states[count]) == default_classes(count)
    differ = {key for key, value in states[2].items() if value.shape != states[7][key].shape}
    assert differ == {key for key in states[2] if key.rpartition(".")[0] in HEADS[task].class_layers}
    assert HEADS[task].guess_classes({}) == ()


def test_a_head_of_another_task_is_refused() -> None:
    for task, head, remedy in (
        ("detection", DeepLabv3Config(), "give a SSDLiteConfig"),
        ("segmentation", SSDLiteConfig(), "give a DeepLabv3Config"),
        ("classification", SSDLiteConfig(), "leave it out"),
    ):
        message = f"{type(head).__name__}, which does not suit {task}; {remedy}"
        with pytest.raises(ValueError, match=message):
            create_model("mobilevit_xxs", task=task, num_classes=3, head=head)


def test_names_of_public_classes() -> None:
    torchvision = pytest.importorskip("torchvision")
    detection = torchvision.models.detection.SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.meta["categories"]
    assert tuple(name for name in detection if name not in ("__background__", "N/A")) == COCO_CLASSES
    segmentation = torchvision.models.segmentation.DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]
    assert tuple(segmentation[1:]) == VOC_CLASSES[1:]
    assert VOC_CLASSES[0] == "background"
    assert (len(set(ADE20K_CLASSES)), ADE20K_CLASSES[12], ADE20K_CLASSES[149]) == (150, "person", "flag")
    for task, classes in (
        ("detection", COCO_CLASSES),
        ("segmentation", VOC_CLASSES),
        ("segmentation", ADE20K_CLASSES),
        ("classification", imagenet_classes()),
    ):
        model = HEADS[task].build(MODELS["mobilevit_xxs"], len(classes), None)
        assert HEADS[task].guess_classes(model.state_dict()) == classes


def test_imagenet_classes() -> None:
    classes = imagenet_classes()
    assert len(classes) == 1000
    assert (classes[0], classes[207], classes[281], classes[999]) == (
        "tench",
        "golden retriever",
        "tabby",
        "toilet tissue",
    )
