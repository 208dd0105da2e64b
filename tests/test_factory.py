from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import mobilevit
from golden_weights import fill_with_golden_weights
from mobilevit.card import card_of
from mobilevit.class_names import ADE20K_CLASSES, COCO_CLASSES, VOC_CLASSES
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models import HEADS
from mobilevit.models.deeplabv3 import DeepLabv3Config
from mobilevit.models.mobilevit import MobileViT
from mobilevit.models.mobilevitv2 import MobileViTv2
from mobilevit.models.ssdlite import SSDLiteConfig
from mobilevit.weights.convert import Family, convert_state_dict

each_generation = pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("mobilevit"), "propagate", True)
    caplog.set_level(logging.INFO, logger="mobilevit")


def saved(tmp_path: Path, *, name: str = "mobilevit_xxs", num_classes: int = 6) -> Path:
    model = fill_with_golden_weights(mobilevit.create_model(name, num_classes=num_classes))
    return mobilevit.save(model, tmp_path / f"{name}-{num_classes}.safetensors", metrics={"top1": 0.9})


def saved_for(
    task: str, tmp_path: Path, classes: Sequence[str] | None = None, *, name: str = "mobilevit_xxs", **options: Any
) -> Path:
    model = fill_with_golden_weights(
        mobilevit.create_model(name, task=task, classes=classes, num_classes=None if classes else 3, **options)
    )
    return mobilevit.save(model, tmp_path / f"{task}.safetensors", metrics={"score": 0.9}, score_threshold=0.4)


def backbone_of(model: nn.Module) -> dict[str, Tensor]:
    state, heads = model.state_dict(), ("head_conv.", "classifier.")
    if isinstance(model, MobileViT | MobileViTv2):
        return {key: value for key, value in state.items() if not key.startswith(heads)}
    return {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@each_generation
def test_defaults(name: str) -> None:
    model = mobilevit.create_model(name)
    assert model.num_classes == 1000
    assert not model.training
    card = card_of(model)
    assert (card.name, card.task, len(card.classes)) == (name, "classification", 1000)


@pytest.mark.parametrize(
    ("task", "outputs", "output_stride", "size", "resize_mode"),
    [("detection", 80, 32, (320, 320), "stretch"), ("segmentation", 21, 16, (512, 512), "stretch")],
)
def test_defaults_of_other_tasks(
    task: str, outputs: int, output_stride: int, size: tuple[int, int], resize_mode: str
) -> None:
    model = mobilevit.create_model("mobilevit_xxs", task=task)
    card = card_of(model)
    assert (card.task, len(card.classes), model.num_classes) == (task, outputs, outputs)
    assert model.config.output_stride == output_stride
    assert (card.preprocessing.size, card.preprocessing.resize_mode) == (size, resize_mode)
    assert card.preprocessing.interpolation == "bilinear"
    assert not model.training


def test_classes_are_named_at_once() -> None:
    for task in ("classification", "detection", "segmentation"):
        model = mobilevit.create_model("mobilevit_xxs", task=task, classes=["cat", "dog"])
        assert card_of(model).classes == ("cat", "dog")
        assert model.num_classes == 2


def test_segmentation_at_other_strides() -> None:
    for output_stride, rates in ((8, (12, 24, 36)), (16, (6, 12, 18)), (32, (3, 6, 9))):
        for name, width in (("mobilevit_xxs", 256), ("mobilevitv2_050", 512)):
            model = mobilevit.create_model(name, task="segmentation", output_stride=output_stride)
            assert model.config.output_stride == output_stride
            assert model.head_config == DeepLabv3Config(aspp_channels=width, atrous_rates=rates, aux_channels=128)
    head = DeepLabv3Config(aspp_channels=64, atrous_rates=(2, 4, 6), aux_head=True, aux_channels=32)
    assert mobilevit.create_model("mobilevit_xxs", task="segmentation", head=head).head_config == head


def test_own_weights_bring_their_classes_and_shape(tmp_path: Path) -> None:
    model = mobilevit.create_model("mobilevit_xxs", weights=saved(tmp_path))
    assert model.num_classes == 6
    assert card_of(model).classes[5] == "class_5"


def test_head_is_swapped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path)
    model = mobilevit.create_model("mobilevit_xxs", num_classes=2, weights=path)
    assert "classify 6 classes, not 2; the classifier starts afresh, the rest is kept" in caplog.text
    before = mobilevit.load(path).state_dict()
    for key, value in model.state_dict().items():
        if key.startswith("classifier."):
            assert value.shape[0] == 2
        else:
            assert torch.equal(value, before[key])
    assert card_of(model).metrics == {}


def test_weights_without_a_classifier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = fill_with_golden_weights(mobilevit.create_model("mobilevit_xxs")).state_dict()
    backbone = {k: v.contiguous() for k, v in state.items() if not k.startswith("classifier.")}
    save_file(backbone, tmp_path / "backbone.safetensors")
    model = mobilevit.create_model("mobilevit_xxs", num_classes=4, weights=tmp_path / "backbone.safetensors")
    assert "have no classifier" in caplog.text
    assert torch.equal(model.stem.conv.weight, state["stem.conv.weight"])


@pytest.mark.parametrize(("wrapper", "suffix"), [("state_dict", ".pt"), ("model", ".pth"), (None, ".bin")])
@pytest.mark.parametrize("name", ["mobilevit_xs", "mobilevitv2_075"])
def test_a_foreign_file_is_recognized(tmp_path: Path, name: str, wrapper: str | None, suffix: str) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name, num_classes=1000).eval()
    state = theirs.state_dict()
    torch.save({wrapper: state} if wrapper else state, tmp_path / f"w{suffix}")
    model = mobilevit.load(tmp_path / f"w{suffix}")
    card = card_of(model)
    assert card.name == name
    assert card.classes[0] == "tench"
    assert card.preprocessing.crop_fraction == (0.9 if name == "mobilevit_xs" else Preprocessing().crop_fraction)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert (model(x) - theirs(x)).abs().max() <= 1e-4


def test_mistakes_have_remedies(tmp_path: Path) -> None:
    for call, message in [
        (lambda: mobilevit.create_model("mobilevit_xxxs"), "did you mean mobilevit_xxs"),
        (lambda: mobilevit.create_model("mobilevitv2_060"), r"did you mean mobilevitv2_050\? There are mobilevit_s, "),
        (lambda: mobilevit.create_model("mobilevitv2_0.5"), r"did you mean mobilevitv2_050\? "),
        (lambda: mobilevit.create_model("mobilevitv2-1.0"), r"did you mean mobilevitv2_100\? "),
        (lambda: mobilevit.create_model("mobilevitv2_3"), r"did you mean mobilevitv2_200\? "),
        (lambda: mobilevit.create_model("mobilevitv2_l"), r"did you mean mobilevitv2_\d+\? "),
        (
            lambda: mobilevit.create_model("mobilevitv2_050", patch_size=(8, 4, 2)),
            r"`patch_size` is \(8, 4, 2\); MobileViTv2 has only 2, 2, 2, so leave it out",
        ),
        (
            lambda: mobilevit.create_model("mobilevitv2_050", weights="mobilevitv2_100.cvnets_in1k"),
            "belong to mobilevitv2_100, not mobilevitv2_050; change one of them",
        ),
        (lambda: mobilevit.create_model("mobilevit_s", task="pose"), "unknown task 'pose'; choose from classification"),
        (
            lambda: mobilevit.create_model("mobilevit_s", num_classes=3, classes=["a"]),
            "`num_classes` is 3, but `classes` has 1 names",
        ),
        (lambda: mobilevit.create_model("mobilevit_s", classes=[]), "`num_classes` is 0"),
        (
            lambda: mobilevit.create_model("mobilevit_s", task="detection", output_stride=16),
            "`output_stride` is 16; detection needs .* leave it out",
        ),
        (lambda: mobilevit.create_model("mobilevit_s", output_stride=5), "it can be 32, 16 or 8"),
        (
            lambda: mobilevit.create_model("mobilevit_s", task="detection", head=DeepLabv3Config()),
            "`head` is a DeepLabv3Config, which does not suit detection; give a SSDLiteConfig",
        ),
        (lambda: mobilevit.create_model("mobilevit_s", num_classes=0), "`num_classes` is 0"),
        (lambda: mobilevit.create_model("mobilevit_s", weights="mobilevit_s.cvnets_in2k"), r"mobilevit_s\.cvnets_in1k"),
        (lambda: mobilevit.create_model("mobilevit_s", weights="mobilevit_xs.cvnets_in1k"), "belong to mobilevit_xs"),
        (lambda: mobilevit.create_model("mobilevit_s", weights=saved(tmp_path)), "weights of mobilevit_xxs"),
        (lambda: mobilevit.create_model("mobilevit_s", weights="nowhere/m.safetensors"), "no such checkpoint"),
    ]:
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


ONE, TWO = "mobilevit_xxs", "mobilevitv2_050"


@pytest.mark.parametrize("family", ["mobilevit", "cvnets", "timm", "transformers"])
@pytest.mark.parametrize(
    ("source", "wanted", "message"),
    [
        (ONE, "mobilevit_s", f"weights of {ONE}, not mobilevit_s; change the model or the weights"),
        (TWO, "mobilevitv2_200", f"weights of {TWO}, not mobilevitv2_200; change the model or the weights"),
        (ONE, TWO, f"weights of a MobileViT, not of {TWO}; use one of mobilevit_s, mobilevit_xs, mobilevit_xxs"),
        (TWO, ONE, f"weights of a MobileViTv2, not of {ONE}; use one of mobilevitv2_050, mobilevitv2_075, "),
    ],
)
def test_weights_of_another_architecture(
    family: Family, source: str, wanted: str, message: str, tmp_path: Path
) -> None:
    path, model = tmp_path / "w.pt", mobilevit.create_model(source, num_classes=5)
    torch.save(convert_state_dict(model.state_dict(), to=family), path)
    with pytest.raises(mobilevit.MobileViTError, match=rf"w\.pt: {message}") as raised:
        mobilevit.create_model(wanted, weights=path)
    assert "\n" not in str(raised.value)
    own = mobilevit.save(model, tmp_path / "own.safetensors")
    with pytest.raises(mobilevit.MobileViTError, match=rf"own\.safetensors: weights of {source}, not {wanted}; change"):
        mobilevit.create_model(wanted, weights=own)


def test_other_weights(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"fc\.weight"):
        mobilevit.load(tmp_path / "other.pt")


TASKS = ["classification", "detection", "segmentation"]


@each_generation
@pytest.mark.parametrize("source", TASKS)
@pytest.mark.parametrize("target", TASKS)
def test_weights_for_another_task_give_their_backbone(
    source: str, target: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved_for(source, tmp_path, ["a", "b", "c"], name=name)
    model = mobilevit.create_model(name, task=target, classes=["a", "b"], weights=path)
    assert same(backbone_of(model), backbone_of(mobilevit.load(path)))
    card = card_of(model)
    assert (card.task, card.classes, card.metrics, card.score_threshold) == (target, ("a", "b"), {}, None)
    assert card.provenance["weights"] == path.name
    message = f"weights for {source}; the backbone is kept, the rest of the model for {target} starts afresh"
    assert (message in caplog.text) == (source != target)
    if source != target:
        assert card.preprocessing == HEADS[target].preprocessing
        assert model.config.output_stride == (16 if target == "segmentation" else 32)


@each_generation
@pytest.mark.parametrize("family", ["cvnets", "timm", "transformers"])
def test_any_classifier_starts_a_detector(family: Family, name: str, tmp_path: Path) -> None:
    ours = fill_with_golden_weights(mobilevit.create_model(name))
    torch.save(convert_state_dict(ours.state_dict(), to=family), tmp_path / "w.pt")
    for task in ("detection", "segmentation"):
        model = mobilevit.create_model(name, task=task, num_classes=2, weights=tmp_path / "w.pt")
        assert same(backbone_of(model), backbone_of(ours))


def test_public_weights_start_a_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = fill_with_golden_weights(mobilevit.create_model("mobilevit_xxs"))
    theirs = convert_state_dict(ours.state_dict(), to="timm")
    save_file(
        {key: value.contiguous() for key, value in theirs.items()}, tmp_path / "mobilevit_xxs.cvnets_in1k.safetensors"
    )
    monkeypatch.setenv("MOBILEVIT_HOME", str(tmp_path))
    model = mobilevit.create_model("mobilevit_xxs", task="detection", weights="mobilevit_xxs.cvnets_in1k")
    assert same(backbone_of(model), backbone_of(ours))
    card = card_of(model)
    assert card.provenance["weights"] == "mobilevit_xxs.cvnets_in1k"
    assert card.preprocessing.size == (320, 320)


@each_generation
def test_a_backbone_alone_starts_any_model(name: str, tmp_path: Path) -> None:
    backbone = backbone_of(fill_with_golden_weights(mobilevit.create_model(name)))
    torch.save(backbone, tmp_path / "backbone.pt")
    for task in TASKS:
        model = mobilevit.create_model(name, task=task, num_classes=2, weights=tmp_path / "backbone.pt")
        assert same(backbone_of(model), backbone)


ANCHORS = (6, 6, 6, 6, 6, 4)


def answers(model: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Tensors whose rows answer for classes, and how many rows of an anchor stand before those."""
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if parts[0] == "heads" and parts[2] == "predict":
            yield value.unflatten(0, (ANCHORS[int(parts[1])], -1)), 5
        elif parts[0] == "classifier" or key.startswith("aux_head.2."):
            yield value[None], 0


def assert_rows(model: nn.Module, weights: nn.Module, kept: Mapping[int, int]) -> None:
    """Rows of the kept classes (here -> there) are the weights', also boxes and background; the others are not."""
    pairs = list(zip(answers(model), answers(weights), strict=True))
    assert len(pairs) in (2, 4, 12)
    for (ours, fixed), (theirs, _) in pairs:
        assert torch.equal(ours[:, :fixed], theirs[:, :fixed])
        for index in range(model.num_classes):  # type: ignore[arg-type]
            row = ours[:, fixed + index]
            equal = [torch.equal(row, theirs[:, fixed + i]) for i in range(theirs.shape[1] - fixed)]
            assert [i for i, yes in enumerate(equal) if yes] == ([kept[index]] if index in kept else [])
    before, after = weights.state_dict(), model.state_dict()
    rest = [key for key in after if not any(part in key for part in (".predict.", "classifier.", "head.2."))]
    assert all(torch.equal(after[key], before[key]) for key in rest)


OURS = ["person", "car", "boat"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("classes", "kept", "told"),
    [
        (
            ["car", "zebra", "person", "yak", "emu"],
            {0: 1, 2: 0},
            "kept the answers for car, person; 3 classes start afresh",
        ),
        (["boat", "yak"], {0: 2}, "kept the answers for boat; 1 class starts afresh"),
        (["boat", "car"], {0: 2, 1: 1}, "kept the answers for boat, car"),
        (["boat", "person", "car"], {0: 2, 1: 0, 2: 1}, "the same 3 classes in another order; their answers are reord"),
        (OURS, {0: 0, 1: 1, 2: 2}, None),
        (["yak", "emu"], {}, "classify 3 classes, not 2; the classifier starts afresh, the rest is kept"),
        (["yak", "emu", "fox"], {}, "classify other classes; the classifier starts afresh, the rest is kept"),
    ],
)
def test_answers_follow_the_names_of_classes(
    task: str,
    classes: list[str],
    kept: dict[int, int],
    told: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"head": DeepLabv3Config(aux_head=True)} if task == "segmentation" else {}
    path = saved_for(task, tmp_path, OURS, **options)
    model = mobilevit.create_model("mobilevit_xxs", task=task, classes=classes, weights=path)
    assert_rows(model, mobilevit.load(path), kept)
    assert [record.message for record in caplog.records] == ([] if told is None else [caplog.records[0].message])
    assert told is None or told in caplog.text
    card = card_of(model)
    assert card.classes == tuple(classes)
    whole = len(kept) == 3
    assert (card.metrics, card.score_threshold) == (({"score": 0.9}, 0.4) if whole else ({}, None))


@pytest.mark.parametrize("task", TASKS)
def test_without_names_answers_go_by_position_or_start_afresh(task: str, tmp_path: Path) -> None:
    unnamed, named = saved_for(task, tmp_path), tmp_path / "named.safetensors"
    weights = mobilevit.load(unnamed)
    mobilevit.save(weights, named, classes=OURS)
    by_position = {0: 0, 1: 1, 2: 2}
    for path, options, kept in [
        (unnamed, {"classes": ["a", "b", "c"]}, by_position),
        (unnamed, {"num_classes": 3}, by_position),
        (named, {"num_classes": 3}, by_position),
        (named, {}, by_position),
        (unnamed, {"classes": ["class_0", "class_1"]}, {}),
        (named, {"num_classes": 5}, {}),
    ]:
        assert_rows(mobilevit.create_model("mobilevit_xxs", task=task, weights=path, **options), weights, kept)


def test_a_name_that_comes_twice_is_not_matched(tmp_path: Path) -> None:
    path = saved_for("classification", tmp_path, ["crane", "crane", "ship"])
    model = mobilevit.create_model("mobilevit_xxs", classes=["ship", "crane"], weights=path)
    assert_rows(model, mobilevit.load(path), {0: 2})


def test_long_lists_of_kept_classes_are_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved_for("detection", tmp_path, COCO_CLASSES)
    mobilevit.create_model("mobilevit_xxs", task="detection", classes=[*COCO_CLASSES, "yak"], weights=path)
    assert (
        "for person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light and 70 more; 1 cl"
        in caplog.text
    )


def foreign_file(
    task: str, num_classes: int, path: Path, family: Family = "cvnets", *, name: str = "mobilevit_xs", **options: Any
) -> nn.Module:
    ours = fill_with_golden_weights(mobilevit.create_model(name, task=task, num_classes=num_classes, **options))
    torch.save({"state_dict": convert_state_dict(ours.state_dict(), to=family)}, path)
    return ours


@pytest.mark.parametrize("name", ["mobilevit_xs", "mobilevitv2_050"])
def test_a_foreign_detector_is_recognized(name: str, tmp_path: Path) -> None:
    ours = foreign_file("detection", 80, tmp_path / "w.pt", name=name)
    model = mobilevit.load(tmp_path / "w.pt")
    assert same(model.state_dict(), ours.state_dict())
    card = card_of(model)
    assert (card.name, card.task, card.classes) == (name, "detection", COCO_CLASSES)
    assert card.preprocessing.size == (320, 320)
    assert card.provenance["family"] == "cvnets"
    model = mobilevit.create_model(name, task="detection", classes=["car", "yak"], weights=tmp_path / "w.pt")
    assert_rows(model, ours, {0: 2})


@pytest.mark.parametrize(
    ("name", "family", "num_classes", "width", "aux_head", "output_stride", "rates"),
    [
        ("mobilevit_xs", "cvnets", 21, 256, False, 16, (6, 12, 18)),
        ("mobilevit_xs", "cvnets", 21, 512, True, 8, (12, 24, 36)),
        ("mobilevit_xs", "transformers", 21, 256, False, 16, (6, 12, 18)),
        ("mobilevitv2_050", "cvnets", 21, 512, True, 16, (6, 12, 18)),
        ("mobilevitv2_050", "cvnets", 150, 512, True, 8, (12, 24, 36)),
        ("mobilevitv2_050", "transformers", 21, 512, False, 16, (6, 12, 18)),
    ],
)
def test_a_foreign_segmenter_is_recognized(
    name: str,
    family: Family,
    num_classes: int,
    width: int,
    aux_head: bool,
    output_stride: int,
    rates: tuple[int, ...],
    tmp_path: Path,
) -> None:
    head = DeepLabv3Config(aspp_channels=width, atrous_rates=rates, aux_head=aux_head, aux_channels=128)
    options = {"name": name, "head": head, "output_stride": output_stride}
    ours = foreign_file("segmentation", num_classes, tmp_path / "w.pt", family, **options)
    model = mobilevit.load(tmp_path / "w.pt")
    assert same(model.state_dict(), ours.state_dict())
    assert model.head_config == head
    assert model.config == ours.config
    classes = VOC_CLASSES if num_classes == 21 else ADE20K_CLASSES
    assert (card_of(model).name, card_of(model).classes) == (name, classes)
    assert card_of(model).preprocessing.size == (512, 512)

    other = mobilevit.create_model(
        name, task="segmentation", weights=tmp_path / "w.pt", output_stride=output_stride * 2
    )
    assert other.head_config.atrous_rates == tuple(rate // 2 for rate in rates)
    own = DeepLabv3Config(aspp_channels=width, atrous_rates=(2, 3, 4), aux_head=not aux_head, aux_channels=128)
    other = mobilevit.create_model(name, task="segmentation", weights=tmp_path / "w.pt", head=own)
    assert other.head_config == own
    assert torch.equal(other.aspp.project.conv.weight, ours.aspp.project.conv.weight)


def test_an_auxiliary_head_comes_with_other_classes(tmp_path: Path) -> None:
    path = saved_for("segmentation", tmp_path, OURS)
    head = DeepLabv3Config(aux_head=True)
    model = mobilevit.create_model("mobilevit_xxs", task="segmentation", classes=["boat"], head=head, weights=path)
    weights = mobilevit.load(path)
    assert torch.equal(model.classifier.weight, weights.classifier.weight[2:])
    assert torch.equal(model.aspp.project.conv.weight, weights.aspp.project.conv.weight)
    assert model.aux_head is not None
    assert model.aux_head[2].weight.shape == (1, 128, 1, 1)


def test_a_head_that_does_not_fit_the_weights_is_named(tmp_path: Path) -> None:
    path = saved_for("segmentation", tmp_path)
    with pytest.raises(ValueError, match=r"not weights of this architecture \(aspp\.near\.conv\.weight is \(256, "):
        mobilevit.create_model(
            "mobilevit_xxs", task="segmentation", weights=path, head=DeepLabv3Config(aspp_channels=128)
        )
    path = saved_for("detection", tmp_path)
    fewer = SSDLiteConfig(aspect_ratios=((2,),) * 6)
    for options in ({}, {"num_classes": 5}):
        with pytest.raises(ValueError, match="not weights of this architecture") as raised:
            mobilevit.create_model("mobilevit_xxs", task="detection", weights=path, head=fewer, **options)
        assert "\n" not in str(raised.value)


def test_a_detector_without_background_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    ours = foreign_file("detection", 79, path)
    message = "80 outputs for an anchor, where 81 = 80 classes and the background are needed; .*`num_classes`=79"
    for options in ({}, {"num_classes": 80}, {"classes": ["a", "b"]}):
        with pytest.raises(ValueError, match=message):
            mobilevit.create_model("mobilevit_xs", task="detection", weights=path, **options)
    with pytest.raises(ValueError, match=message):
        mobilevit.load(path)
    model = mobilevit.create_model("mobilevit_xs", task="detection", weights=path, num_classes=79)
    assert same(model.state_dict(), ours.state_dict())
    classifier = mobilevit.create_model("mobilevit_xs", num_classes=2, weights=path)  # its backbone is as good as any
    assert same(backbone_of(classifier), backbone_of(ours))


def test_public_detectors_and_segmenters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBILEVIT_HOME", str(tmp_path))
    for task, name, suffix, family, classes in [
        ("detection", "mobilevit_xs.cvnets_coco", ".pt", "cvnets", COCO_CLASSES),
        ("segmentation", "mobilevit_xs.cvnets_voc", ".bin", "transformers", VOC_CLASSES),
    ]:
        ours = foreign_file(task, len(classes), tmp_path / f"{name}{suffix}", family)  # type: ignore[arg-type]
        model = mobilevit.create_model("mobilevit_xs", task=task, weights=name)
        assert same(model.state_dict(), ours.state_dict())
        card = card_of(model)
        assert (card.classes, card.provenance["weights"]) == (classes, name)
        assert "Apple sample code license" in card.provenance["license"]
        kept = mobilevit.create_model("mobilevit_xs", task=task, weights=name, classes=["yak", "boat", "background"])
        assert_rows(kept, ours, {1: 8} if task == "detection" else {1: 4, 2: 0})
