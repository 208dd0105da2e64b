"""Convert state dicts of MobileViT between the names of ml-cvnets, timm, transformers and this package.

All four hold the same numbers under other names, with two exceptions: transformers keeps queries, keys and values in
three linear layers where the others have one, and ml-cvnets and transformers expect images as BGR, the others as RGB.
Only ml-cvnets and this package have detection; these and transformers have segmentation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Literal, get_args

import torch
from torch import Tensor

from mobilevit.card import TaskName
from mobilevit.errors import MobileViTError
from mobilevit.weights.mobilevit_keys import IGNORED, KEY_MAP, Family, rows_by_name

_FAMILIES: tuple[Family, ...] = get_args(Family)
_DOERS = {"classification": "classifier", "detection": "detector", "segmentation": "segmenter"}
_BGR_FAMILIES = ("cvnets", "transformers")

# Keys under which training code nests the weights. Averaged weights come first: they are the ones to evaluate.
_WRAPPERS = (
    "ema_state_dict", "state_dict_ema", "model_ema", "ema", "model_state_dict", "state_dict", "model", "module",
)  # fmt: skip
# Prefixes that wrappers of a whole model add; removed only if every name has one, so that no two names can collide.
_PREFIXES = ("module.", "model.", "backbone.")
_QKV = ("query", "key", "value")


def convert_state_dict(
    state_dict: Mapping[str, object], *, to: Family, source_channel_order: Literal["rgb", "bgr"] | None = None
) -> dict[str, Tensor]:
    """Rename weights from any known family to another; there and back is bit-exact.

    The input is left as it is; most tensors of the result share its memory.

    Args:
        state_dict: weights under the names of any family, or a checkpoint that wraps them (see `unwrap_state_dict`).
        to: family to convert to. "transformers" means the names of `MobileViTForImageClassification`, or those of
            `MobileViTForSemanticSegmentation` for a DeepLabv3.
        source_channel_order: None flips the input channels of the first convolution where the conventions of the two
            families differ; "rgb" never flips; "bgr" always does.

    Raises:
        MobileViTError: the weights are of no known family, some belong to no part of a model of this package, or the
            other family has no place for them.
    """
    if to not in _FAMILIES:
        raise MobileViTError(f"cannot convert to {to!r}; choose from {', '.join(_FAMILIES)}")
    if source_channel_order not in (None, "rgb", "bgr"):
        raise MobileViTError(f"`source_channel_order` is {source_channel_order!r}; it can be None, 'rgb' or 'bgr'")
    tensors = unwrap_state_dict(state_dict)
    family, task = recognize(tensors)
    tensors = _fuse_qkv({key: value for key, value in tensors.items() if not IGNORED.match(key)})
    rows = rows_by_name(family, task)
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
    first = f"{getattr(KEY_MAP[task][0], to)}.weight"
    if flip and first in converted:
        converted[first] = converted[first].flip(1)
    return _split_qkv(converted) if to == "transformers" else converted


def recognize(state_dict: Mapping[str, object]) -> tuple[Family, TaskName]:
    """Tell whose names an unwrapped state dict uses, and its task; a backbone alone counts as a classifier's.

    Raises:
        MobileViTError: most keys are of no known family.
    """
    candidates = [(family, task) for task in KEY_MAP for family in _FAMILIES]
    known = {candidate: sum(_module(key) in rows_by_name(*candidate) for key in state_dict) for candidate in candidates}
    best = max(candidates, key=known.__getitem__)
    if 2 * known[best] <= len(state_dict):
        raise MobileViTError(
            f"not the weights of a MobileViT: keys are {_some(state_dict)}; accepted are state dicts of mobilevit, "
            "ml-cvnets, timm and transformers"
        )
    return best


def unwrap_state_dict(checkpoint: Mapping[str, object]) -> dict[str, Tensor]:
    """Find the weights inside a training checkpoint, averaged (EMA) ones if it has them, under their plain names.

    Undoes nesting, and the prefixes that DataParallel, `torch.compile`, Lightning and `AveragedModel` leave.

    Raises:
        MobileViTError: there are no tensors in it.
    """
    tensors = _weights_in(checkpoint)
    if not tensors:
        raise MobileViTError(
            f"no weights found: keys are {_some(checkpoint)}; give a state dict or a mapping around one"
        )
    tensors = {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}  # also in compiled parts
    while prefix := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _weights_in(content: Mapping[str, object]) -> dict[str, Tensor]:
    for name in _WRAPPERS:
        inner = content.get(name)
        if isinstance(inner, Mapping) and (found := _weights_in(inner)):
            return found
    # AveragedModel counts its updates in a tensor among the weights.
    return {key: value for key, value in content.items() if isinstance(value, Tensor) and key != "n_averaged"}


def _fuse_qkv(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the tensors of `query`, `key` and `value`, as transformers names them, to one of a module `qkv`."""
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
