"""State dicts of MobileViT as ml-cvnets, timm, transformers and this package name them, and the way between any two.

All four hold the same numbers under other names, with two exceptions: transformers keeps queries, keys and values in
three linear layers where the others have one, and ml-cvnets and transformers expect pictures as BGR, the others as RGB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mobilevit.models.mobilevit import XXS

Family = Literal["mobilevit", "cvnets", "timm", "transformers"]
"""Whose names a state dict uses."""

_FAMILIES: tuple[Family, ...] = get_args(Family)
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
    """Rename the weights of a MobileViT from any of the known families to another; there and back is bit-exact.

    The input is left as it is; most tensors of the result share its memory.

    Args:
        state_dict: weights under the names of any family, or a checkpoint that wraps them (see `unwrap_state_dict`).
        to: family to convert to. "transformers" means the names of `MobileViTForImageClassification`.
        source_channel_order: None flips the input channels of the first convolution where the conventions of the two
            families differ; "rgb" never flips; "bgr" always does.

    Raises:
        ValueError: the weights are of no known family, or some belong to no part of a MobileViT classifier.
    """
    if to not in _FAMILIES:
        raise ValueError(f"cannot convert to {to!r}; choose from {', '.join(_FAMILIES)}")
    if source_channel_order not in (None, "rgb", "bgr"):
        raise ValueError(f"source_channel_order is {source_channel_order!r}; it can be None, 'rgb' or 'bgr'")
    tensors = unwrap_state_dict(state_dict)
    family = detect_family(tensors)
    tensors, rows = _fuse_qkv(tensors), _rows(family)
    if strangers := [key for key in tensors if _module(key) not in rows]:
        raise ValueError(
            f"{len(strangers)} of {len(tensors)} tensors belong to no part of a MobileViT classifier in {family} names "
            f"({_some(strangers)}); remove them to convert the rest"
        )
    converted = {f"{getattr(rows[_module(key)], to)}.{key.rpartition('.')[2]}": value for key, value in tensors.items()}

    flip = source_channel_order == "bgr"
    if source_channel_order is None:
        flip = (family in _BGR_FAMILIES) != (to in _BGR_FAMILIES)
    first = f"{getattr(_TABLE[0], to)}.weight"
    if flip and first in converted:
        converted[first] = converted[first].flip(1)
    return _split_qkv(converted) if to == "transformers" else converted


def detect_family(state_dict: Mapping[str, Any]) -> Family:
    """Whose names the keys of an unwrapped state dict are; parts of a model will do.

    Raises:
        ValueError: most keys are of no known family.
    """
    known = {family: sum(_module(key) in _rows(family) for key in state_dict) for family in _FAMILIES}
    best = max(_FAMILIES, key=known.__getitem__)
    if 2 * known[best] <= len(state_dict):
        raise ValueError(
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
        raise ValueError(f"no weights found: keys are {_some(checkpoint)}; give a state dict or a mapping around one")
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
    timm: str
    transformers: str

    def child(self, mobilevit: str, cvnets: str, timm: str, transformers: str) -> _Row:
        names = zip(self, (mobilevit, cvnets, timm, transformers), strict=True)
        return _Row(*(f"{parent}.{name}" for parent, name in names))


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


def _classifier() -> Iterator[_Row]:
    yield from _conv_norm(_Row("stem", "conv_1", "stem", "mobilevit.conv_stem"))
    stages = [_Row(f"layer{i + 1}", f"layer_{i + 1}", f"stages.{i}", f"mobilevit.encoder.layer.{i}") for i in range(5)]
    for stage, num_blocks in zip(stages[:2], (1, 3), strict=True):
        for i in range(num_blocks):
            yield from _inverted_residual(stage.child(f"{i}", f"{i}", f"{i}", f"layer.{i}"))
    for stage, depth in zip(stages[2:], XXS.depths, strict=True):  # XS and S are as deep
        yield from _inverted_residual(stage.child("0", "0", "0", "downsampling_layer"))
        block = _Row(f"{stage.mobilevit}.1", f"{stage.cvnets}.1", f"{stage.timm}.1", stage.transformers)
        yield from _mobilevit_block(block, depth)
    yield from _conv_norm(_Row("head_conv", "conv_1x1_exp", "final_conv", "mobilevit.conv_1x1_exp"))
    yield _Row("classifier", "classifier.fc", "head.fc", "classifier")


_TABLE = tuple(_classifier())
"""The whole correspondence, the first convolution at its head."""


@cache
def _rows(family: Family) -> dict[str, _Row]:
    """Rows of the table by the module names of a family, also as a backbone alone or inside a larger model has them."""
    rows = {getattr(row, family): row for row in _TABLE}
    if family == "transformers":
        rows |= {name.removeprefix("mobilevit."): row for name, row in rows.items()}  # MobileViTModel
    if family == "cvnets":
        rows |= {f"encoder.{name}": row for name, row in rows.items()}  # detection and segmentation
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
