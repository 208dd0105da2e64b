"""MobileViT's modules under the names of ml-cvnets, timm, transformers and this package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Literal, NamedTuple

from mobilevit.card import TaskName
from mobilevit.models.mobilevit import XXS

Family = Literal["mobilevit", "cvnets", "timm", "transformers"]
"""A code base, by the names it gives to tensors."""


class Row(NamedTuple):
    """One module under its four names. Its tensors (weight, bias, running_mean ...) have the same names everywhere."""

    mobilevit: str
    cvnets: str
    timm: str | None
    """None: timm has no such module; likewise below."""
    transformers: str | None

    def child(self, mobilevit: str, cvnets: str, timm: str, transformers: str) -> Row:
        names = zip(self, (mobilevit, cvnets, timm, transformers), strict=True)
        joined = (None if parent is None else f"{parent}.{name}".strip(".") for parent, name in names)
        return Row(*joined)  # type: ignore[arg-type]  # the first two are never None


def _conv_norm(conv: Row) -> Iterator[Row]:
    yield conv.child("conv", "block.conv", "conv", "convolution")
    yield conv.child("norm", "block.norm", "bn", "normalization")


def _inverted_residual(block: Row) -> Iterator[Row]:
    yield from _conv_norm(block.child("expand", "block.exp_1x1", "conv1_1x1", "expand_1x1"))
    yield from _conv_norm(block.child("depthwise", "block.conv_3x3", "conv2_kxk", "conv_3x3"))
    yield from _conv_norm(block.child("project", "block.red_1x1", "conv3_1x1", "reduce_1x1"))


def _transformer_layer(layer: Row) -> Iterator[Row]:
    yield layer.child("attention_norm", "pre_norm_mha.0", "norm1", "layernorm_before")
    yield layer.child(
        "attention.qkv", "pre_norm_mha.1.qkv_proj", "attn.qkv", "attention.attention.qkv"
    )  # see _fuse_qkv
    yield layer.child("attention.out", "pre_norm_mha.1.out_proj", "attn.proj", "attention.output.dense")
    yield layer.child("ffn_norm", "pre_norm_ffn.0", "norm2", "layernorm_after")
    yield layer.child("ffn_in", "pre_norm_ffn.1", "mlp.fc1", "intermediate.dense")
    yield layer.child("ffn_out", "pre_norm_ffn.4", "mlp.fc2", "output.dense")


def _mobilevit_block(block: Row, depth: int) -> Iterator[Row]:
    yield from _conv_norm(block.child("local_conv", "local_rep.conv_3x3", "conv_kxk", "conv_kxk"))
    yield block.child("project_in.conv", "local_rep.conv_1x1.block.conv", "conv_1x1", "conv_1x1.convolution")
    for i in range(depth):
        layer = (f"transformer.{i}", f"global_rep.{i}", f"transformer.{i}", f"transformer.layer.{i}")
        yield from _transformer_layer(block.child(*layer))
    yield block.child("norm", f"global_rep.{depth}", "norm", "layernorm")
    yield from _conv_norm(block.child("project_out", "conv_proj", "conv_proj", "conv_projection"))
    yield from _conv_norm(block.child("fusion", "fusion", "conv_fusion", "fusion"))


def _backbone(root: Row) -> Iterator[Row]:
    yield from _conv_norm(root.child("stem", "conv_1", "stem", "conv_stem"))
    stages = [root.child(f"layer{i + 1}", f"layer_{i + 1}", f"stages.{i}", f"encoder.layer.{i}") for i in range(5)]
    for stage, num_blocks in zip(stages[:2], (1, 3), strict=True):
        for i in range(num_blocks):
            yield from _inverted_residual(stage.child(f"{i}", f"{i}", f"{i}", f"layer.{i}"))
    for stage, depth in zip(stages[2:], XXS.depths, strict=True):  # XS and S are as deep
        yield from _inverted_residual(stage.child("0", "0", "0", "downsampling_layer"))
        yield from _mobilevit_block(stage.child("1", "1", "1", ""), depth)


def _classifier() -> Iterator[Row]:
    root = Row("", "", "", "mobilevit")
    yield from _backbone(root)
    yield from _conv_norm(root.child("head_conv", "conv_1x1_exp", "final_conv", "conv_1x1_exp"))
    yield Row("classifier", "classifier.fc", "head.fc", "classifier")


def _detector() -> Iterator[Row]:
    """SSDLite, which timm and transformers do not have."""
    yield from _backbone(Row("backbone", "encoder", None, None))
    for i, stride in enumerate((64, 128, 256)):
        level = Row(f"extra.{i}", f"extra_layers.os_{stride}", None, None)
        yield from _conv_norm(level.child("0", "dw_conv", "", ""))
        yield from _conv_norm(level.child("1", "pw_conv", "", ""))
    yield from _conv_norm(Row("pool", "extra_layers.os_-1.1", None, None))
    for i in range(6):
        head = Row(f"heads.{i}", f"ssd_heads.{i}", None, None)
        yield from _conv_norm(head.child("project", "proj_layer", "", ""))
        yield from _conv_norm(head.child("depthwise", "loc_cls_layer.dw_conv", "", ""))
        last = "loc_cls_layer.block.conv" if i == 5 else "loc_cls_layer.pw_conv.block.conv"
        yield head.child("predict", last, "", "")


def _segmenter() -> Iterator[Row]:
    """DeepLabv3, which timm does not have; transformers has no auxiliary head."""
    yield from _backbone(Row("backbone", "encoder", None, "mobilevit"))
    aspp = Row("aspp", "seg_head.aspp.aspp_layer", None, "segmentation_head.aspp")
    yield from _conv_norm(aspp.child("near", "convs.0", "", "convs.0"))
    for i in range(3):
        yield from _conv_norm(aspp.child(f"atrous.{i}", f"convs.{i + 1}", "", f"convs.{i + 1}"))
    yield from _conv_norm(aspp.child("pool", "convs.4.aspp_pool.conv_1x1", "", "convs.4.conv_1x1"))
    yield from _conv_norm(aspp.child("project", "project", "", "project"))
    yield Row("classifier", "seg_head.classifier.block.conv", None, "segmentation_head.classifier.convolution")
    aux_head = Row("aux_head", "seg_head.aux_head", None, None)
    yield from _conv_norm(aux_head.child("0", "0", "", ""))
    yield aux_head.child("2", "2.block.conv", "", "")


KEY_MAP: dict[TaskName, tuple[Row, ...]] = {
    "classification": tuple(_classifier()),
    "detection": tuple(_detector()),
    "segmentation": tuple(_segmenter()),
}
"""All modules of a model for each task, the first convolution first."""

IGNORED = re.compile(r"(encoder\.)?(anchor_box_generator|match_prior|neural_augmentor)\.")
"""Matches tensors of ml-cvnets that every model makes anew, or that only training uses."""


@cache
def rows_by_name(family: Family, task: TaskName) -> dict[str, Row]:
    """Index the modules of a model by their names in a family, among them the names in a backbone on its own."""
    rows = {name: row for row in KEY_MAP[task] if (name := getattr(row, family)) is not None}
    if family == "transformers":
        rows |= {name.removeprefix("mobilevit."): row for name, row in rows.items()}  # MobileViTModel
    if family == "cvnets":
        rows = {f"encoder.{name}": row for name, row in rows.items()} | rows  # cut out of a larger model
        classifier = rows.get("seg_head.classifier.block.conv")
        if classifier is not None:  # version 0.1, with which the paper's weights were published
            rows["seg_head.classifier.classifier.block.conv"] = classifier
    return rows
