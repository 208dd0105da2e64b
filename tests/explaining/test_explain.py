from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mobilevit
from mobilevit.card import ModelCard, card_of
from mobilevit.cli import main
from mobilevit.data.shapes import render_scene
from mobilevit.explaining.attention import attention_weights
from mobilevit.explaining.explain import Explanation, _strongest_place, explain, subject_of
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.models.mobilevit import Attention, unfold
from mobilevit.models.mobilevitv2 import SeparableAttention
from mobilevit.models.segmenter import SegmentationOutput
from mobilevit.models.ssdlite import DetectionOutput

CLASSES = ("circle", "cross", "ring")
IMAGE = render_scene(3, size=160).image.resize((200, 160))
each_generation = pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])


def prepared(model: nn.Module) -> torch.Tensor:
    preprocessing = card_of(model).preprocessing
    return torch.from_numpy(preprocessing.normalize(preprocessing.resize(IMAGE)[None]))


def model_of(
    task: str = "classification", side: int | tuple[int, int] = 128, name: str = "mobilevit_xxs", **options: Any
) -> nn.Module:
    torch.manual_seed(0)
    mode = "pad" if task == "segmentation" else "stretch"
    size = (side, side) if isinstance(side, int) else side
    model = mobilevit.create_model(name, task=task, classes=CLASSES, **options)
    model.card = replace(model.card, preprocessing=Preprocessing(size=size, resize_mode=mode))  # type: ignore
    return model.eval()


def test_the_weights_are_those_the_model_uses() -> None:
    attention = Attention(48, 4)
    x = torch.randn(3, 10, 48)
    weights = attention_weights(attention, x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 10))
    values = attention.qkv(x)[..., 96:].view(3, 10, 4, 12).transpose(1, 2)
    told = attention.out((weights @ values).transpose(1, 2).reshape(3, 10, 48))
    torch.testing.assert_close(told, attention(x), rtol=1e-5, atol=1e-6)


def test_context_scores_are_weights_of_the_keys() -> None:
    attention = SeparableAttention(48)
    x = torch.randn(3, 10, 48)
    weights = attention_weights(attention, x)[:, 0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 10))
    assert torch.equal(weights, weights[:, :1].expand(3, 10, 10)), "the same for every token"
    told = attention.out(attention.value(x).relu() * (weights @ attention.key(x)))
    torch.testing.assert_close(told, attention(x[None])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "patch_size"),
    [*(("mobilevit_xxs", sides) for sides in ((2, 2, 2), (8, 4, 2), (3, 3, 3))), ("mobilevitv2_050", (2, 2, 2))],
)
def test_the_chosen_pixel_is_found_among_the_sequences(name: str, patch_size: tuple[int, int, int]) -> None:
    """Paint one pixel of a block's map, and see which of the unfolded tokens is painted."""
    model = model_of(name=name, patch_size=patch_size)
    explanation = explain(model, IMAGE, pixel=(130, 47))
    for block in explanation.blocks:
        (height, width), (ph, pw), (row, column) = block.map_size, block.patch_size, block.pixel
        assert (row, column) == (int(47.5 / 160 * height), int(130.5 / 200 * width))
        painted = torch.zeros(1, 1, height, width)
        painted[0, 0, row, column] = 1
        tokens = unfold(painted, (ph, pw))
        sequence, token, _ = torch.nonzero(tokens)[0].tolist()
        rows, columns = height // ph, width // pw
        assert block.rollout.shape == (rows, columns)
        layers = [layer.attention for layer in getattr(model, block.name)[1].transformer]
        heads = 1 if block.separable else 4
        assert block.weights.shape == (len(layers), heads, rows, columns)
        seen: list[torch.Tensor] = []
        handle = layers[0].register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            pixels = prepared(model)
            model(pixels)
            x = seen[0].reshape(ph * pw, rows * columns, -1)
            expected = attention_weights(layers[0], x)[sequence, :, token].reshape(heads, rows, columns)
        handle.remove()
        np.testing.assert_allclose(block.weights[0], expected.numpy(), atol=1e-6)


@each_generation
def test_weights_and_rollout_are_shares(name: str) -> None:
    for block in explain(model_of(name=name), IMAGE).blocks:
        np.testing.assert_allclose(block.weights.sum(axis=(2, 3)), 1, atol=1e-5)
        assert block.rollout.sum() == pytest.approx(1, abs=1e-5)
        assert ((block.attended() >= 0.999) & (block.attended() <= block.num_tokens + 1e-3)).all()
        assert block.num_tokens == block.map_size[0] * block.map_size[1] // 4


def test_class_activation_points_at_what_decides() -> None:
    """The same by the equation: channels weighed by the mean of their gradients."""
    model = model_of()
    with torch.inference_mode():  # which the caller may be in
        explanation = explain(model, IMAGE)
    stage: list[torch.Tensor] = []
    model.layer5.register_forward_hook(lambda _, __, output: stage.append(output))  # type: ignore[union-attr]
    pixels = prepared(model)
    logits = model(pixels)[0]
    number = int(logits.argmax())
    assert explanation.label == CLASSES[number]
    assert explanation.score == pytest.approx(float(logits.softmax(0)[number].detach()), abs=1e-6)
    (gradient,) = torch.autograd.grad(logits[number], stage[0])
    expected = (gradient.mean(dim=(2, 3), keepdim=True) * stage[0]).sum(1)[0].clamp(min=0)
    np.testing.assert_allclose(explanation.class_activation, (expected / expected.max()).detach().numpy(), atol=1e-5)
    row, column = np.unravel_index(explanation.class_activation.argmax(), (4, 4))
    assert (explanation.pixel[0] * 4 // 200, explanation.pixel[1] * 4 // 160) == (column, row)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("mobilevit_xxs", "classification"),
        ("mobilevit_xxs", "detection"),
        ("mobilevit_xxs", "segmentation"),
        ("mobilevitv2_050", "segmentation"),
    ],
)
def test_all_tasks_are_drawn(name: str, task: str, tmp_path: Path) -> None:
    model = model_of(task, name=name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    explanation = explain(model, IMAGE, pixel=(30, 40))
    assert isinstance(explanation, Explanation)
    assert explanation.label in CLASSES
    assert 0 < explanation.score <= 1
    assert explanation.class_activation.max() in (0, 1)
    for draw in (explanation.draw, explanation.draw_patches):
        drawn = draw(tmp_path / "drawn.png")
        with Image.open(tmp_path / "drawn.png") as saved:
            assert saved.size == drawn.size
        assert len(drawn.getcolors(1 << 24)) > 100
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not [hook for module in model.modules() for hook in module._forward_hooks.values()]


@each_generation
def test_the_most_attended_are_pixels_at_the_same_offset(name: str) -> None:
    explanation = explain(model_of(name=name), IMAGE, pixel=(130, 47))
    for block, told in zip(explanation.blocks, explanation.to_dict()["blocks"], strict=True):
        (height, width), (ph, pw), (row, column) = block.map_size, block.patch_size, block.pixel
        own = (row // ph, column // pw)
        found = {}
        for entry in told["most_attended"]:
            y, x = entry["y"] * height / 160 - 0.5, entry["x"] * width / 200 - 0.5
            assert (y, x) == (pytest.approx(round(y), abs=0.05), pytest.approx(round(x), abs=0.05))
            assert (round(y) % ph, round(x) % pw) == (row % ph, column % pw)
            patch = (round(y) // ph, round(x) // pw)
            assert entry["weight"] == pytest.approx(float(block.rollout[patch]), abs=1e-4)
            found[patch] = entry["weight"]
        assert own not in found
        others = sorted((float(w) for p, w in np.ndenumerate(block.rollout) if p != own), reverse=True)
        assert list(found.values()) == pytest.approx(others[:5], abs=1e-4)


def test_maps_that_patches_do_not_divide() -> None:
    blocks = explain(model_of(side=96, patch_size=(5, 4, 2)), IMAGE, pixel=(199, 159)).blocks
    assert [(b.map_size_before, b.map_size, b.pixel) for b in blocks] == [
        ((12, 12), (15, 15), (14, 14)), ((6, 6), (8, 8), (7, 7)), ((3, 3), (4, 4), (3, 3)),
    ]  # fmt: skip
    assert [b.rollout.shape for b in blocks] == [(3, 3), (2, 2), (2, 2)]


@each_generation
def test_maps_of_odd_size(name: str) -> None:
    """MobileViTv2 keeps the larger map; the next one is as large either way."""
    blocks = explain(model_of(side=(250, 230), name=name), IMAGE, pixel=(199, 159)).blocks
    assert [(b.stride, b.map_size_before, b.map_size, b.pixel) for b in blocks] == [
        (8, (32, 29), (32, 30), (31, 29)), (16, (16, 15), (16, 16), (15, 15)), (32, (8, 8), (8, 8), (7, 7)),
    ]  # fmt: skip


def test_without_a_pixel_the_margin_has_no_say() -> None:
    placement = Preprocessing(size=(64, 64), resize_mode="pad").placement((100, 50))
    activation = np.zeros((4, 4), np.float32)
    activation[1, 3], activation[2, 1] = 1, 0.5  # the right half is margin
    assert _strongest_place(activation, placement) == (0.375, 0.625)
    assert _strongest_place(np.zeros((4, 4), np.float32), placement) == (0.25, 0.5)


def test_the_object_at_the_pixel_is_explained() -> None:
    """Two objects; the weaker one is explained where it is, the stronger one elsewhere."""
    anchors = torch.tensor([[0.25, 0.25, 0.2, 0.2], [0.75, 0.75, 0.2, 0.2]])
    logits = torch.tensor([[[0.0, 6.0, 0.0], [0.0, 0.0, 4.0]]], requires_grad=True)
    output = DetectionOutput(class_logits=logits, box_regression=torch.zeros(1, 2, 4), anchors_cxcywh=anchors)
    card = ModelCard(name="x", task="detection", classes=("a", "b"), preprocessing=Preprocessing(size=(64, 64)))
    for place, label, middle in ((None, "a", 0.25), ((0.7, 0.8), "b", 0.75), ((0.5, 0.5), "a", 0.25)):
        subject = subject_of(output, card, place)
        assert subject.label == label
        assert subject.box_xyxy is not None
        assert subject.box_xyxy.tolist() == pytest.approx([middle - 0.1] * 2 + [middle + 0.1] * 2)
        odds = math.exp(float(subject.target.detach()))
        assert subject.score == pytest.approx(odds / (odds + 2), abs=1e-6)


def test_the_class_of_a_pixel_or_the_largest_class_is_explained() -> None:
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, 0, 0], logits[0, 0, 0, 1], logits[0, 0, 1] = 3.0, 1.0, 2.0
    card = ModelCard(name="x", task="segmentation", classes=("a", "b"), preprocessing=Preprocessing(size=(32, 32)))
    for place, label, target in ((None, "a", 5 / 3), ((0.2, 0.2), "b", 3.0), ((0.9, 0.1), "a", 1.0)):
        subject = subject_of(SegmentationOutput(logits, None), card, place)
        assert subject.label == label
        assert float(subject.target) == pytest.approx(target)
        assert subject.box_xyxy is None
    assert subject.score == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-6)


def test_names_in_other_scripts_are_drawn(recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture) -> None:
    """With letters where this machine has a font for them; and $ is a dollar."""
    model = model_of()
    model.card = replace(model.card, classes=("кот $x", "пёс $x", "птица $x"))  # type: ignore[arg-type,union-attr]
    drawn = explain(model, IMAGE).draw()
    assert np.asarray(drawn)[:20].min() < 128
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    assert "findfont" not in caplog.text


def test_the_view_shows_what_the_model_sees() -> None:
    """Undistorted: of a stretched image the whole, of a padded one with its margin."""
    assert explain(model_of(), IMAGE).view.size == (512, 410)
    explanation = explain(model_of("segmentation"), IMAGE, pixel=(100, 159))
    assert explanation.view.size == (510, 512)  # 128 x 102.4 pixels are filled, in whole ones
    assert np.asarray(explanation.view)[411:].max() == 0
    assert np.asarray(explanation.view)[:409].max() > 0
    assert explanation.to_view(100, 160) == pytest.approx((256, 409.6), abs=2.1)


def test_a_pixel_outside() -> None:
    with pytest.raises(ValueError, match=r"pixel 200 10 is not in the image of 200 x 160"):
        explain(model_of(), IMAGE, pixel=(200, 10))
    model = mobilevit.create_model("mobilevit_xxs", classes=CLASSES)
    with pytest.raises(ValueError, match=r"pixel 0 0 lies outside of what the model sees; choose x from 29 to 170"):
        explain(model, IMAGE, pixel=(0, 0))


@pytest.mark.parametrize(
    ("name", "told", "verb"),
    [
        ("mobilevit_xxs", "attention of pixel", "attends to"),
        ("mobilevitv2_050", "context scores at the offset of pixel", "scores spread over"),
    ],
)
def test_command(name: str, told: str, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mobilevit.save(model_of(name=name), tmp_path / "model.safetensors")
    IMAGE.save(tmp_path / "scene.png")
    explained = ["explain", str(tmp_path / "model.safetensors"), str(tmp_path / "scene.png"), "--pixel", "20", "30"]
    assert main([*explained, "--out", str(tmp_path / "why.png"), "--figure", "both"]) == 0
    assert (tmp_path / "why.png").exists()
    assert (tmp_path / "why-patches.png").exists()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith(f", {told} 20 30")
    assert printed[1].startswith(f"  layer3, patches of 2 x 2: {verb} ")
    assert main([*explained, "--out", str(tmp_path / "why.png"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pixel"] == [20, 30]
    assert [block["stride"] for block in found["blocks"]] == [8, 16, 32]
    first = found["blocks"][0]["most_attended"][0]
    assert 0 <= first["x"] <= 200
    assert 0 < first["weight"] <= 1


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mobilevit.save(model_of(), tmp_path / "model.safetensors")
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert main(["explain", str(tmp_path / "model.safetensors"), str(tmp_path / "bad.png")]) == 2
    assert "bad.png: not an image" in capsys.readouterr().err
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    assert main(["explain", str(tmp_path / "model.onnx"), str(tmp_path / "bad.png")]) == 2
    assert "an exported file cannot be explained; give the checkpoint" in capsys.readouterr().err
