from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mobilevit.models import HEADS, MODELS, Config, Model, list_models
from mobilevit.models.mobilevit import Dropout, MobileViT, MobileViTBlock, fold, unfold
from shallow_models import shallow

PARAMETERS = {"mobilevit_xxs": 1_272_024, "mobilevit_xs": 2_317_848, "mobilevit_s": 5_578_632}
each_generation = pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])


def classifier(config: Config, num_classes: int = 4) -> Model:
    return HEADS["classification"].build(config, num_classes, None)


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_parameter_counts_are_the_published_ones(name: str, expected: int) -> None:
    assert sum(p.numel() for p in MobileViT(MODELS[name]).parameters()) == expected


def test_names() -> None:
    widths = ["050", "075", "100", "125", "150", "175", "200"]
    assert list_models() == ["mobilevit_s", "mobilevit_xs", "mobilevit_xxs", *(f"mobilevitv2_{w}" for w in widths)]


def reference_unfold(x: Tensor, ph: int, pw: int) -> Tensor:
    """The textbook form, through six dimensions, in this package's order of sequences."""
    batch, dim, height, width = x.shape
    x = x.reshape(batch, dim, height // ph, ph, width // pw, pw)
    return x.permute(0, 3, 5, 2, 4, 1).reshape(batch * ph * pw, -1, dim)


@pytest.mark.parametrize("patch", [(1, 1), (2, 2), (4, 2), (8, 4), (2, 3)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_unfold_gathers_pixels_of_one_offset(patch: tuple[int, int], channels_last: bool) -> None:
    ph, pw = patch
    x = torch.randn(2, 5, 3 * ph, 4 * pw)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    tokens = unfold(x, patch)
    assert torch.equal(tokens, reference_unfold(x, ph, pw))
    back = fold(tokens, (3 * ph, 4 * pw), patch)
    assert torch.equal(back, x)
    assert back.is_contiguous(memory_format=torch.channels_last)


class CountCopies(TorchDispatchMode):
    """Counts operations that move a whole tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.copies += func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy)
        return func(*args, **(kwargs or {}))


def test_fold_and_unfold_cost_at_most_two_copies_each() -> None:
    x = torch.randn(2, 8, 16, 16).contiguous(memory_format=torch.channels_last)
    with CountCopies() as unfolding:
        tokens = unfold(x, (2, 2))
    with CountCopies() as folding:
        fold(tokens, (16, 16), (2, 2))
    assert 1 <= unfolding.copies <= 2
    assert 1 <= folding.copies <= 2


def test_a_pixel_attends_to_its_own_offset_only() -> None:
    block = MobileViTBlock(8, embed_dim=8, depth=1, num_heads=2, patch_size=2, dropout=0.0).eval()
    x = torch.randn(1, 8, 8, 8).requires_grad_()
    tokens = block.norm(block.transformer(unfold(x, (2, 2))))
    y = fold(tokens, (8, 8), (2, 2))
    (y[0, :, 2, 3] * torch.randn(8)).sum().backward()  # a plain sum of normalized values is constant
    assert x.grad is not None
    reached = x.grad[0].abs().sum(0) > 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[0::2, 1::2] = True
    assert torch.equal(reached, expected)


@pytest.mark.parametrize("patch_size", [(2, 2, 2), (8, 4, 2), (3, 3, 3), ((2, 4), (4, 2), (1, 2))])
def test_any_patch_size_and_any_input_size(patch_size: tuple[object, ...]) -> None:
    config = dataclasses.replace(MODELS["mobilevit_xxs"], patch_size=patch_size)
    model = MobileViT(config, 7).eval()
    for size in ((64, 64), (32, 96), (75, 53)):
        with torch.no_grad():
            logits = model(torch.rand(1, 3, *size))
        assert logits.shape == (1, 7)
        assert logits.isfinite().all()
    assert sum(p.numel() for p in MobileViT(config).parameters()) == PARAMETERS["mobilevit_xxs"]


@each_generation
@pytest.mark.parametrize(("stride", "expected"), [(32, {8: 8, 16: 4, 32: 2}), (16, {8: 8, 16: 4}), (8, {8: 8})])
def test_output_stride(stride: int, expected: dict[int, int], name: str) -> None:
    model = classifier(dataclasses.replace(MODELS[name], output_stride=stride)).eval()
    features = model.forward_features(torch.rand(1, 3, 64, 64))
    assert {s: f.shape[-1] for s, f in features.items()} == {2: 32, 4: 16, **expected}
    assert {s: f.shape[1] for s, f in features.items()} == model.feature_channels
    assert model.feature_channels[max(expected)] == MODELS[name].channels[-1]
    if name == "mobilevit_xxs":  # MobileViTv2 dilates more
        dilations = {c.dilation for c in model.layer5.modules() if isinstance(c, nn.Conv2d)}
        assert dilations == ({(1, 1), (2, 2)} if stride == 8 else {(1, 1)})


def test_impossible_configurations_are_refused() -> None:
    xxs = MODELS["mobilevit_xxs"]
    with pytest.raises(ValueError, match="`output_stride` is 4"):
        dataclasses.replace(xxs, output_stride=4)
    with pytest.raises(ValueError, match="patch_size"):
        dataclasses.replace(xxs, patch_size=(2, 2))
    with pytest.raises(ValueError, match="patch_size"):
        dataclasses.replace(xxs, patch_size=(2, 0, 2))
    with pytest.raises(ValueError, match="not divisible"):
        MobileViTBlock(8, embed_dim=10, depth=1, num_heads=4, patch_size=2, dropout=0.0)


def test_gradients_reach_every_parameter() -> None:
    model = MobileViT(MODELS["mobilevit_xxs"], 4).train()
    model(torch.rand(2, 3, 64, 64)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@each_generation
def test_the_layout_is_channels_last_throughout(name: str) -> None:
    model = classifier(MODELS[name]).eval()
    for features in model.forward_features(torch.rand(2, 3, 64, 64)).values():
        assert features.is_contiguous(memory_format=torch.channels_last)


def test_initial_weights_are_the_published_ones() -> None:
    model = MobileViT(MODELS["mobilevit_s"])
    conv = model.layer5[1].fusion.conv
    assert conv.weight.std().item() == pytest.approx((2 / (conv.out_channels * 9)) ** 0.5, rel=0.02)
    linear = model.layer5[1].transformer[0].ffn_in
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not linear.bias.any()
    assert not model.classifier.bias.any()
    assert model.classifier.weight.abs().max() < 0.2


@pytest.mark.parametrize(("name", "dropout"), [("mobilevit_xxs", 0.05), ("mobilevit_xs", 0.1), ("mobilevit_s", 0.1)])
def test_dropout_is_the_published_one(name: str, dropout: float) -> None:
    model = MobileViT(MODELS[name])
    assert {m.p for m in model.modules() if isinstance(m, Dropout)} == {dropout}
    assert model.classifier_dropout.p == 0.1


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("count", [1 << 18, 1001])
def test_fast_dropout_is_dropout(p: float, count: int) -> None:
    dropout = Dropout(p).train()
    x = torch.ones(count)
    y = dropout(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    tolerance = 5 * (p * (1 - p) / count) ** 0.5
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=tolerance)
    assert torch.equal(dropout.eval()(x), x)
    dropped = (dropout.train()(x.requires_grad_()) == 0).float()
    assert dropped.sum() > 0
    neighbors = torch.corrcoef(torch.stack([dropped[:-1], dropped[1:]]))[0, 1]
    assert abs(neighbors) < 5 / count**0.5


def exported_operations(name: str, size: tuple[int, int]) -> tuple[set[str], int]:
    """Names of the operations of an exported graph, and the highest rank of a tensor in it."""
    model = shallow(classifier(MODELS[name])).eval()
    program = torch.export.export(model, (torch.rand(1, 3, *size),)).run_decompositions()
    values = (node.meta.get("val") for node in program.graph.nodes)
    ranks = [t.ndim for v in values for t in (v if isinstance(v, tuple | list) else [v]) if isinstance(t, Tensor)]
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}, max(ranks)


@each_generation
def test_exported_graph_has_no_tensor_above_rank_four_and_no_resize(name: str) -> None:
    operations, rank = exported_operations(name, (64, 64))
    assert rank == 4
    assert not any("upsample" in op or "interpolate" in op or "index" in op for op in operations)
    with_resize, rank = exported_operations(name, (72, 72))
    assert rank == 4
    assert with_resize - operations, "a map that patches do not divide is resized"


@each_generation
def test_heights_and_widths_are_not_exchanged(name: str) -> None:
    model = classifier(MODELS[name]).eval()
    for (h, w), stride in itertools.product([(64, 128)], [2, 8, 32]):
        assert model.forward_features(torch.rand(1, 3, h, w))[stride].shape[-2:] == (h // stride, w // stride)
