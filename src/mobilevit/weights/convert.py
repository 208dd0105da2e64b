"""State dicts of MobileViT as ml-cvnets, timm, transformers and this package name them, and the way between any two.

All four hold the same numbers under other names, with two exceptions: transformers keeps queries, keys and values in
three linear layers where the others have one, and ml-cvnets and transformers expect images as BGR, the others as RGB.
Detection is known to ml-cvnets and this package only, segmentation also to transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mobilevit.card import Task
from mobilevit.errors import MobileViTError
from mobilevit.models.mobilevit import XXS

Family = Literal["mobilevit", "cvnets", "timm", "transformers"]
"""Whose names a state dict uses."""

_FAMILIES: tuple[Family, ...] = get_args(Family)
_DOERS = {"classification": "classifier", "detection": "detector", "segmentation": "segmenter"}
_BGR_FAMILIES = ("cvnets", "transformers")

# Where training code puts the weights inside a checkpoint. Averaged weights come first: they are the ones to evaluate.
_WRAPPERS = (
    "ema_state_dict",
    "state_dict_ema",
    "model_ema",
    "ema",
    "model_state_dict",
    "state_dict",
    "model",
    "module",
)
# What wrappers of a whole model put before its names; taken off only where every name has it, so that none can collide.
_PREFIXES = ("module.", "model.", "backbone.")


def convert_state_dict(
    state_dict: Mapping[str, Any], *, to: Family, source_channel_order: Literal["rgb", "bgr"] | None = None
) -> dict[str, Tensor]:
    """Rename the weights of a model from any of the known families to another; there and back is bit-exact.

    The input is left as it is; most tensors of the result share its memory.

    Args:
        state_dict: weights under the names of any family, or a checkpoint that wraps them (see `unwrap_state_dict`).
        to: family to convert to. "transformers" means the names of `MobileViTForImageClassification`, or those of
            `MobileViTForSemanticSegmentation` for a DeepLabv3.
        source_channel_order: None flips the input channels of the first convolution where the conventions of the two
            families differ; "rgb" never flips; "bgr" always does.

    Raises:
        ValueError: the weights are of no known family, some belong to no part of a model of this package, or the other
            family has no place for them.
    """
    if to not in _FAMILIES:
        raise MobileViTError(f"cannot convert to {to!r}; choose from {', '.join(_FAMILIES)}")
    if source_channel_order not in (None, "rgb", "bgr"):
        raise MobileViTError(f"source_channel_order is {source_channel_order!r}; it can be None, 'rgb' or 'bgr'")
    tensors = unwrap_state_dict(state_dict)
    family, task = _recognize(tensors)
    tensors = _fuse_qkv({key: value for key, value in tensors.items() if not _IGNORED.match(key)})
    rows = _rows(family, task)
    if strangers := [key for key in tensors if _module(key) not in rows]:
        raise MobileViTError(
            f"{len(strangers)} of {len(tensors)} tensors belong to no part of a MobileViT {_DOERS[task]} in {family} "
            f"names ({_some(strangers)}); remove them to convert the rest"
        )
    names = {key: getattr(rows[_module(key)], to) for key in tensors}
    homeless = [key for key, name in names.items() if name is None]
    if len(homeless) == len(tensors):
        raise MobileViTError(f"{to} has no MobileViT {_DOERS[task]}; convert to cvnets, which has")
    if homeless:
        raise MobileViTError(
            f"{to} has no such {task} head: there is no place for {len(homeless)} of {len(tensors)} tensors "
            f"({_some(homeless)}); remove them to convert the rest"
        )
    converted = {f"{names[key]}.{key.rpartition('.')[2]}": value for key, value in tensors.items()}

    flip = source_channel_order == "bgr"
    if source_channel_order is None:
        flip = (family in _BGR_FAMILIES) != (to in _BGR_FAMILIES)
    first = f"{getattr(_TABLES[task][0], to)}.weight"
    if flip and first in converted:
        converted[first] = converted[first].flip(1)
    return _split_qkv(converted) if to == "transformers" else converted


def detect_family(state_dict: Mapping[str, Any]) -> Family:
    """Whose names the keys of an unwrapped state dict are; parts of a model will do.

    Raises:
        ValueError: most keys are of no known family.
    """
    return _recognize(state_dict)[0]


def detect_task(state_dict: Mapping[str, Any]) -> Task:
    """What the model of an unwrapped state dict does, by its keys; a backbone alone counts as a classifier's.

    Raises:
        ValueError: most keys are of no known family.
    """
    return _recognize(state_dict)[1]


def _recognize(state_dict: Mapping[str, Any]) -> tuple[Family, Task]:
    """The table and the column of it that have most of the keys."""
    candidates = [(family, task) for task in _TABLES for family in _FAMILIES]
    known = {candidate: sum(_module(key) in _rows(*candidate) for key in state_dict) for candidate in candidates}
    best = max(candidates, key=known.__getitem__)
    if 2 * known[best] <= len(state_dict):
        raise MobileViTError(
            f"not the weights of a MobileViT: keys are {_some(state_dict)}; accepted are state dicts of mobilevit, "
            "ml-cvnets, timm and transformers"
        )
    return best


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Find the weights inside a training checkpoint, averaged (EMA) ones if it has them, under their plain names.

    Undoes nesting, and the prefixes that DataParallel, `torch.compile`, Lightning and `AveragedModel` leave.

    Raises:
        ValueError: there are no tensors in it.
    """
    tensors = _weights_in(checkpoint)
    if not tensors:
        raise MobileViTError(
            f"no weights found: keys are {_some(checkpoint)}; give a state dict or a mapping around one"
        )
    tensors = {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}  # also compiled parts have it
    while prefix := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _weights_in(content: Mapping[str, Any]) -> dict[str, Tensor]:
    for name in _WRAPPERS:
        if isinstance(content.get(name), Mapping) and (found := _weights_in(content[name])):
            return found
    # AveragedModel counts its updates in a tensor among the weights.
    return {key: value for key, value in content.items() if isinstance(value, Tensor) and key != "n_averaged"}


class _Row(NamedTuple):
    """One module under its four names. Its tensors (weight, bias, running_mean ...) are called alike everywhere."""

    mobilevit: str
    cvnets: str
    timm: str | None
    """None: there is no such module; likewise below."""
    transformers: str | None

    def child(self, mobilevit: str, cvnets: str, timm: str, transformers: str) -> _Row:
        names = zip(self, (mobilevit, cvnets, timm, transformers), strict=True)
        joined = (None if parent is None else f"{parent}.{name}".strip(".") for parent, name in names)
        return _Row(*joined)  # type: ignore[arg-type]  # the first two are never None


def _conv_norm(conv: _Row) -> Iterator[_Row]:
    yield conv.child("conv", "block.conv", "conv", "convolution")
    yield conv.child("norm", "block.norm", "bn", "normalization")


def _inverted_residual(block: _Row) -> Iterator[_Row]:
    yield from _conv_norm(block.child("expand", "block.exp_1x1", "conv1_1x1", "expand_1x1"))
    yield from _conv_norm(block.child("depthwise", "block.conv_3x3", "conv2_kxk", "conv_3x3"))
    yield from _conv_norm(block.child("project", "block.red_1x1", "conv3_1x1", "reduce_1x1"))


def _transformer_layer(layer: _Row) -> Iterator[_Row]:
    yield layer.child("attention_norm", "pre_norm_mha.0", "norm1", "layernorm_before")
    yield layer.child(
        "attention.qkv", "pre_norm_mha.1.qkv_proj", "attn.qkv", "attention.attention.qkv"
    )  # see _fuse_qkv
    yield layer.child("attention.out", "pre_norm_mha.1.out_proj", "attn.proj", "attention.output.dense")
    yield layer.child("ffn_norm", "pre_norm_ffn.0", "norm2", "layernorm_after")
    yield layer.child("ffn_in", "pre_norm_ffn.1", "mlp.fc1", "intermediate.dense")
    yield layer.child("ffn_out", "pre_norm_ffn.4", "mlp.fc2", "output.dense")


def _mobilevit_block(block: _Row, depth: int) -> Iterator[_Row]:
    yield from _conv_norm(block.child("local_conv", "local_rep.conv_3x3", "conv_kxk", "conv_kxk"))
    yield block.child("project_in.conv", "local_rep.conv_1x1.block.conv", "conv_1x1", "conv_1x1.convolution")
    for i in range(depth):
        layer = (f"transformer.{i}", f"global_rep.{i}", f"transformer.{i}", f"transformer.layer.{i}")
        yield from _transformer_layer(block.child(*layer))
    yield block.child("norm", f"global_rep.{depth}", "norm", "layernorm")
    yield from _conv_norm(block.child("project_out", "conv_proj", "conv_proj", "conv_projection"))
    yield from _conv_norm(block.child("fusion", "fusion", "conv_fusion", "fusion"))


def _backbone(root: _Row) -> Iterator[_Row]:
    yield from _conv_norm(root.child("stem", "conv_1", "stem", "conv_stem"))
    stages = [root.child(f"layer{i + 1}", f"layer_{i + 1}", f"stages.{i}", f"encoder.layer.{i}") for i in range(5)]
    for stage, num_blocks in zip(stages[:2], (1, 3), strict=True):
        for i in range(num_blocks):
            yield from _inverted_residual(stage.child(f"{i}", f"{i}", f"{i}", f"layer.{i}"))
    for stage, depth in zip(stages[2:], XXS.depths, strict=True):  # XS and S are as deep
        yield from _inverted_residual(stage.child("0", "0", "0", "downsampling_layer"))
        yield from _mobilevit_block(stage.child("1", "1", "1", ""), depth)


def _classifier() -> Iterator[_Row]:
    root = _Row("", "", "", "mobilevit")
    yield from _backbone(root)
    yield from _conv_norm(root.child("head_conv", "conv_1x1_exp", "final_conv", "conv_1x1_exp"))
    yield _Row("classifier", "classifier.fc", "head.fc", "classifier")


def _detector() -> Iterator[_Row]:
    """SSDLite, which timm and transformers do not have."""
    yield from _backbone(_Row("backbone", "encoder", None, None))
    for i, stride in enumerate((64, 128, 256)):
        level = _Row(f"extra.{i}", f"extra_layers.os_{stride}", None, None)
        yield from _conv_norm(level.child("0", "dw_conv", "", ""))
        yield from _conv_norm(level.child("1", "pw_conv", "", ""))
    yield from _conv_norm(_Row("pool", "extra_layers.os_-1.1", None, None))
    for i in range(6):
        head = _Row(f"heads.{i}", f"ssd_heads.{i}", None, None)
        yield from _conv_norm(head.child("project", "proj_layer", "", ""))
        yield from _conv_norm(head.child("depthwise", "loc_cls_layer.dw_conv", "", ""))
        last = "loc_cls_layer.block.conv" if i == 5 else "loc_cls_layer.pw_conv.block.conv"
        yield head.child("predict", last, "", "")


def _segmenter() -> Iterator[_Row]:
    """DeepLabv3, which timm does not have; transformers has no auxiliary head."""
    yield from _backbone(_Row("backbone", "encoder", None, "mobilevit"))
    aspp = _Row("aspp", "seg_head.aspp.aspp_layer", None, "segmentation_head.aspp")
    yield from _conv_norm(aspp.child("near", "convs.0", "", "convs.0"))
    for i in range(3):
        yield from _conv_norm(aspp.child(f"atrous.{i}", f"convs.{i + 1}", "", f"convs.{i + 1}"))
    yield from _conv_norm(aspp.child("pool", "convs.4.aspp_pool.conv_1x1", "", "convs.4.conv_1x1"))
    yield from _conv_norm(aspp.child("project", "project", "", "project"))
    yield _Row("classifier", "seg_head.classifier.block.conv", None, "segmentation_head.classifier.convolution")
    aux_head = _Row("aux_head", "seg_head.aux_head", None, None)
    yield from _conv_norm(aux_head.child("0", "0", "", ""))
    yield aux_head.child("2", "2.block.conv", "", "")


_TABLES: dict[Task, tuple[_Row, ...]] = {
    "classification": tuple(_classifier()),
    "detection": tuple(_detector()),
    "segmentation": tuple(_segmenter()),
}
"""The whole correspondence, the first convolution at the head of each table."""

# ml-cvnets: made anew by every model, or of use to training only.
_IGNORED = re.compile(r"(encoder\.)?(anchor_box_generator|match_prior|neural_augmentor)\.")


@cache
def _rows(family: Family, task: Task) -> dict[str, _Row]:
    """Rows of a table by the module names of a family, also as a backbone alone has them."""
    rows = {name: row for row in _TABLES[task] if (name := getattr(row, family)) is not None}
    if family == "transformers":
        rows |= {name.removeprefix("mobilevit."): row for name, row in rows.items()}  # MobileViTModel
    if family == "cvnets" and task == "classification":
        rows |= {f"encoder.{name}": row for name, row in rows.items()}  # cut out of a larger model
    if family == "cvnets" and task == "segmentation":  # version 0.1, with which the paper's weights were published
        rows["seg_head.classifier.classifier.block.conv"] = rows["seg_head.classifier.block.conv"]
    return rows


_QKV = ("query", "key", "value")


def _fuse_qkv(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put one tensor of a module `qkv` in place of those of `query`, `key` and `value`, as transformers names them."""
    fused = dict(state_dict)
    for key in state_dict:
        module, _, leaf = key.rpartition(".query.")
        parts = [f"{module}.{name}.{leaf}" for name in _QKV]
        if module and all(part in fused for part in parts):
            fused[f"{module}.qkv.{leaf}"] = torch.cat([fused.pop(part) for part in parts])
    return fused


def _split_qkv(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_fuse_qkv`."""
    split: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        module, _, leaf = key.rpartition(".qkv.")
        if module:
            # Copies: safetensors refuses to write tensors that share memory.
            split |= {f"{module}.{name}.{leaf}": part.clone() for name, part in zip(_QKV, value.chunk(3), strict=True)}
        else:
            split[key] = value
    return split


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _some(keys: Iterable[object]) -> str:
    first = [str(key) for key in islice(keys, 4)]
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "") or "none"
