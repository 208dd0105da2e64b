"""The modules of MobileViT and MobileViTv2 under the names of ml-cvnets, timm, transformers and this package."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Literal, NamedTuple, get_args

from mobilevit.card import TaskName

Generation = Literal["mobilevit", "mobilevitv2"]
"""MobileViT or MobileViTv2; also how transformers begins the names of its tensors."""

Family = Literal["mobilevit", "cvnets", "timm", "transformers"]
"""A code base, by the names it gives to tensors."""


SPLIT_FAMILIES: dict[Generation, tuple[Family, ...]] = {"mobilevit": ("transformers",), "mobilevitv2": ("mobilevit",)}
"""Families that have a layer each for queries, keys and values, where the others, and the rows below, have one, qkv."""
QKV = ("query", "key", "value")


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
    yield layer.child("attention.qkv", "pre_norm_mha.1.qkv_proj", "attn.qkv", "attention.attention.qkv")  # see join_qkv
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


def _separable_layer(layer: Row) -> Iterator[Row]:
    yield layer.child("attention_norm", "pre_norm_attn.0", "norm1", "layernorm_before")
    attention = layer.child("attention", "pre_norm_attn.1", "attn", "attention")
    yield attention.child("qkv", "qkv_proj.block.conv", "qkv_proj", "qkv_proj.convolution")  # see join_qkv
    yield attention.child("out", "out_proj.block.conv", "out_proj", "out_proj.convolution")
    yield layer.child("ffn_norm", "pre_norm_ffn.0", "norm2", "layernorm_after")
    yield layer.child("ffn_in", "pre_norm_ffn.1.block.conv", "mlp.fc1", "ffn.conv1.convolution")
    yield layer.child("ffn_out", "pre_norm_ffn.3.block.conv", "mlp.fc2", "ffn.conv2.convolution")


def _mobilevitv2_block(block: Row, depth: int) -> Iterator[Row]:
    yield from _conv_norm(block.child("local_conv", "local_rep.0", "conv_kxk", "conv_kxk"))
    yield block.child("project_in.conv", "local_rep.1.block.conv", "conv_1x1", "conv_1x1.convolution")
    for i in range(depth):
        layer = (f"transformer.{i}", f"global_rep.{i}", f"transformer.{i}", f"transformer.layer.{i}")
        yield from _separable_layer(block.child(*layer))
    yield block.child("norm", f"global_rep.{depth}", "norm", "layernorm")
    yield from _conv_norm(block.child("project_out", "conv_proj", "conv_proj", "conv_projection"))


def _backbone(root: Row, generation: Generation) -> Iterator[Row]:
    layer2_blocks, transformer_block = (3, _mobilevit_block) if generation == "mobilevit" else (2, _mobilevitv2_block)
    yield from _conv_norm(root.child("stem", "conv_1", "stem", "conv_stem"))
    stages = [root.child(f"layer{i + 1}", f"layer_{i + 1}", f"stages.{i}", f"encoder.layer.{i}") for i in range(5)]
    for stage, num_blocks in zip(stages[:2], (1, layer2_blocks), strict=True):
        for i in range(num_blocks):
            yield from _inverted_residual(stage.child(f"{i}", f"{i}", f"{i}", f"layer.{i}"))
    for stage, depth in zip(stages[2:], (2, 4, 3), strict=True):  # the same in all models
        yield from _inverted_residual(stage.child("0", "0", "0", "downsampling_layer"))
        yield from transformer_block(stage.child("1", "1", "1", ""), depth)


def _classifier(generation: Generation) -> Iterator[Row]:
    root = Row("", "", "", generation)
    yield from _backbone(root, generation)
    if generation == "mobilevit":
        yield from _conv_norm(root.child("head_conv", "conv_1x1_exp", "final_conv", "conv_1x1_exp"))
    yield Row("classifier", "classifier.fc" if generation == "mobilevit" else "classifier.1", "head.fc", "classifier")


def _detector(generation: Generation) -> Iterator[Row]:
    """SSDLite, which timm and transformers do not have."""
    yield from _backbone(Row("backbone", "encoder", None, None), generation)
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


def _segmenter(generation: Generation) -> Iterator[Row]:
    """DeepLabv3 and PSPNet, which timm does not have; transformers has DeepLabv3 without an auxiliary head."""
    yield from _backbone(Row("backbone", "encoder", None, generation), generation)
    aspp = Row("aspp", "seg_head.aspp.aspp_layer", None, "segmentation_head.aspp")
    yield from _conv_norm(aspp.child("near", "convs.0", "", "convs.0"))
    for i in range(3):
        yield from _conv_norm(aspp.child(f"atrous.{i}", f"convs.{i + 1}", "", f"convs.{i + 1}"))
    yield from _conv_norm(aspp.child("pool", "convs.4.aspp_pool.conv_1x1", "", "convs.4.conv_1x1"))
    yield from _conv_norm(aspp.child("project", "project", "", "project"))
    psp = Row("psp", "seg_head.psp_layer", None, None)
    for i in range(4):
        yield from _conv_norm(psp.child(f"pools.{i}", f"psp_branches.{i}.1", "", ""))
    yield from _conv_norm(psp.child("project", "fusion.0", "", ""))
    yield Row("classifier", "seg_head.classifier.block.conv", None, "segmentation_head.classifier.convolution")
    aux_head = Row("aux_head", "seg_head.aux_head", None, None)
    yield from _conv_norm(aux_head.child("0", "0", "", ""))
    yield aux_head.child("2", "2.block.conv", "", "")


_TASKS: dict[TaskName, Callable[[Generation], Iterator[Row]]] = {
    "classification": _classifier,
    "detection": _detector,
    "segmentation": _segmenter,
}
KEY_MAP: dict[tuple[Generation, TaskName], tuple[Row, ...]] = {
    (generation, task): tuple(rows(generation)) for generation in get_args(Generation) for task, rows in _TASKS.items()
}
"""All modules of a model of each generation for each task, the first convolution first."""

IGNORED = re.compile(r"(encoder\.)?(anchor_box_generator|match_prior|neural_augmentor)\.")
"""Matches tensors of ml-cvnets that every model makes anew, or that only training uses."""


@cache
def rows_by_name(generation: Generation, task: TaskName, family: Family) -> dict[str, Row]:
    """Index the modules of a model by their names in a family, among them the names in a backbone on its own."""
    rows = {name: row for row in KEY_MAP[generation, task] if (name := getattr(row, family)) is not None}
    if family in SPLIT_FAMILIES[generation]:
        joined = {name.removesuffix("qkv"): row for name, row in rows.items() if name.endswith(".qkv")}
        rows |= {name + part: row for name, row in joined.items() for part in QKV}
    if family == "transformers":
        rows |= {name.removeprefix(f"{generation}."): row for name, row in rows.items()}  # MobileViTModel
    if family == "cvnets":
        rows = {f"encoder.{name}": row for name, row in rows.items()} | rows  # cut out of a larger model
        classifier = rows.get("seg_head.classifier.block.conv")
        if classifier is not None:  # version 0.1, with which the paper's weights were published
            rows["seg_head.classifier.classifier.block.conv"] = classifier
    return rows
