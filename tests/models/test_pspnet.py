from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

import mobilevit
from golden_weights import (
    fill_with_golden_weights,
    golden_images,
    golden_manifest,
    golden_outputs,
    golden_parameter_counts,
    golden_weights,
)
from mobilevit.models import HEADS, MODELS
from mobilevit.models.pspnet import PSPNet, PSPNetConfig, _grid
from mobilevit.weights.convert import convert_state_dict, recognize

GOLDEN = "segmentation.pspnet_voc_mobilevitv2_0.5"
COUNTS = [
    (name, kind, num_classes, aux_head)
    for name in golden_parameter_counts()
    for kind, num_classes in (("pspnet_voc", 21), ("pspnet_ade20k", 150))
    for aux_head in (False, True)
]


def pspnet(name: str = "mobilevitv2_050", num_classes: int = 5, head: PSPNetConfig | None = None) -> PSPNet:
    config = dataclasses.replace(MODELS[name], output_stride=16)
    model = HEADS["segmentation"].build(config, num_classes, head or PSPNetConfig())
    assert isinstance(model, PSPNet)
    return model


@pytest.mark.parametrize(("name", "kind", "num_classes", "aux_head"), COUNTS)
def test_parameter_counts_are_the_published_ones(name: str, kind: str, num_classes: int, aux_head: bool) -> None:
    with torch.device("meta"):
        model = pspnet(name, num_classes, PSPNetConfig(aux_head=aux_head))
    expected = golden_parameter_counts()[name][kind + ("_with_aux" if aux_head else "")]
    assert sum(p.numel() for p in model.parameters()) == expected


def test_golden_logits_and_bit_exact_conversion() -> None:
    state = golden_weights(golden_manifest("segmentation")[GOLDEN]["state"])
    assert recognize(state) == ("cvnets", "segmentation", "mobilevitv2")
    ours = convert_state_dict(state, to="mobilevit")
    model = pspnet(num_classes=21, head=PSPNetConfig(aux_head=True)).eval()
    model.load_state_dict(ours)
    back = convert_state_dict(ours, to="cvnets")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    with torch.inference_mode():
        logits = model(golden_images(1, 256, 256)).logits[..., ::16, ::16]
    golden = golden_outputs("segmentation")[f"{GOLDEN}.logits_every16.256x256"]
    assert (logits[0] - golden.float().view_as(logits[0])).abs().max() <= (
        1e-4 if golden.dtype == torch.float32 else 2e-3
    )
    with pytest.raises(ValueError, match="transformers has no"):
        convert_state_dict(ours, to="transformers")


@pytest.mark.parametrize("side", [4, 7, 16, 33])
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_matrices_pool_and_enlarge_as_pytorch_does(side: int, bins: int) -> None:
    shrink, enlarge = (torch.from_numpy(matrix) for matrix in _grid(side, bins))
    fine, coarse = torch.randn(side), torch.randn(bins)
    torch.testing.assert_close(shrink @ fine, F.adaptive_avg_pool1d(fine[None], bins)[0])
    resized = F.interpolate(coarse[None, None], side, mode="linear", align_corners=True)[0, 0]
    torch.testing.assert_close(enlarge @ coarse, resized)


def test_saved_loaded_fused_at_any_size(tmp_path) -> None:
    model = mobilevit.create_model("mobilevitv2_050", task="segmentation", num_classes=5, head="pspnet")
    fill_with_golden_weights(model)
    loaded = mobilevit.load(mobilevit.save(model, tmp_path / "psp.safetensors"))
    assert isinstance(loaded, PSPNet)
    assert loaded.head_config == model.head_config
    x = torch.rand(1, 3, 75, 130)
    with torch.inference_mode():
        logits = model(x).logits
        assert logits.shape == (1, 5, 75, 130)
        assert torch.equal(loaded(x).logits, logits)
        assert (mobilevit.fuse(model)(x).logits - logits).abs().max() <= 1e-4


def test_weights_of_the_published_form_are_recognized(tmp_path) -> None:
    torch.save(golden_weights(golden_manifest("segmentation")[GOLDEN]["state"]), tmp_path / "pspnet.pt")
    model = mobilevit.load(tmp_path / "pspnet.pt")
    assert isinstance(model, PSPNet)
    assert (model.card.name, model.output_stride, model.num_classes) == ("mobilevitv2_050", 16, 21)
    assert model.head_config == PSPNetConfig(aux_head=True, aux_channels=128)


def test_gradients_reach_every_parameter() -> None:
    model = pspnet("mobilevit_xxs", head=PSPNetConfig(aux_head=True)).train()
    output = model(torch.rand(2, 3, 64, 64))
    assert output.aux_logits is not None
    (output.logits.square().sum() + output.aux_logits.square().sum()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_impossible_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        PSPNetConfig(bins=(0, 2))
    with pytest.raises(ValueError, match="did you mean pspnet"):
        mobilevit.create_model("mobilevitv2_050", task="segmentation", head="pspnets")
    with pytest.raises(ValueError, match="does not suit detection"):
        mobilevit.create_model("mobilevitv2_050", task="detection", head="pspnet")
