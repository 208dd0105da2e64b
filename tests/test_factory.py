from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mobilevit
from golden_weights import fill_with_golden_weights
from mobilevit.models.card import card_of


def saved(tmp_path: Path, *, name: str = "mobilevit_xxs", num_classes: int = 6) -> Path:
    model = fill_with_golden_weights(mobilevit.create_model(name, num_classes=num_classes))
    return mobilevit.save(model, tmp_path / f"{name}-{num_classes}.safetensors", metrics={"top1": 0.9})


def test_defaults() -> None:
    model = mobilevit.create_model("mobilevit_xxs")
    assert model.num_classes == 1000
    assert not model.training
    card = card_of(model)
    assert (card.name, card.task, len(card.classes)) == ("mobilevit_xxs", "classification", 1000)


def test_own_weights_bring_their_classes_and_shape(tmp_path: Path) -> None:
    model = mobilevit.create_model("mobilevit_xxs", weights=saved(tmp_path))
    assert model.num_classes == 6
    assert card_of(model).classes[5] == "class_5"


def test_head_is_swapped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path)
    with caplog.at_level(logging.WARNING, logger="mobilevit"):
        logging.getLogger("mobilevit").propagate = True
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
    logging.getLogger("mobilevit").propagate = True
    model = mobilevit.create_model("mobilevit_xxs", num_classes=4, weights=tmp_path / "backbone.safetensors")
    assert "have no classifier" in caplog.text
    assert torch.equal(model.stem.conv.weight, state["stem.conv.weight"])


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_a_foreign_file_is_recognised(tmp_path: Path, wrapper: str | None, suffix: str) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("mobilevit_xs", num_classes=1000).eval()
    state = theirs.state_dict()
    torch.save({wrapper: state} if wrapper else state, tmp_path / f"w{suffix}")
    model = mobilevit.load(tmp_path / f"w{suffix}")
    card = card_of(model)
    assert card.name == "mobilevit_xs"
    assert card.classes[0] == "tench"
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert (model(x) - theirs(x)).abs().max() <= 1e-4


def test_mistakes_have_remedies(tmp_path: Path) -> None:
    for call, message in [
        (lambda: mobilevit.create_model("mobilevit_xxxs"), "did you mean mobilevit_xxs"),
        (lambda: mobilevit.create_model("mobilevit_s", task="pose"), "unknown task 'pose'"),
        (lambda: mobilevit.create_model("mobilevit_s", num_classes=0), "num_classes is 0"),
        (lambda: mobilevit.create_model("mobilevit_s", weights="mobilevit_s.cvnets_in2k"), r"mobilevit_s\.cvnets_in1k"),
        (lambda: mobilevit.create_model("mobilevit_s", weights="mobilevit_xs.cvnets_in1k"), "belong to mobilevit_xs"),
        (lambda: mobilevit.create_model("mobilevit_s", weights=saved(tmp_path)), "weights of mobilevit_xxs"),
        (lambda: mobilevit.create_model("mobilevit_s", weights="nowhere/m.safetensors"), "no such checkpoint"),
    ]:
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("mobilevit_xs").state_dict(), tmp_path / "xs.pt")
    with pytest.raises(ValueError, match="not weights of this architecture"):
        mobilevit.create_model("mobilevit_s", weights=tmp_path / "xs.pt")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"fc\.weight"):
        mobilevit.load(tmp_path / "other.pt")
