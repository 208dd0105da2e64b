"""Convert state dicts of MobileViT and MobileViTv2 between the names of ml-cvnets, timm, transformers and this package.

All four hold the same numbers under other names, with these exceptions:

    queries, keys, values   one layer in most; three in transformers' MobileViT, and in this package's MobileViTv2
    1x1 in a transformer    MobileViTv2: a linear layer here, a convolution elsewhere; the same numbers in another shape
    order of channels       MobileViT: ml-cvnets and transformers expect BGR, the others RGB; MobileViTv2: all RGB

Only ml-cvnets and this package have detection; these and transformers have segmentation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mobilevit.card import TaskName
from mobilevit.errors import MobileViTError
from mobilevit.weights.key_map import IGNORED, KEY_MAP, QKV, SPLIT_FAMILIES, Family, Generation, rows_by_name

_FAMILIES: tuple[Family, ...] = get_args(Family)
_DOERS = {"classification": "classifier", "detection": "detector", "segmentation": "segmenter"}
_BGR_FAMILIES: dict[Generation, tuple[Family, ...]] = {"mobilevit": ("cvnets", "transformers"), "mobilevitv2": ()}
TITLES: dict[Generation, str] = {"mobilevit": "MobileViT", "mobilevitv2": "MobileViTv2"}
"""Names of the generations for people."""

# Keys under which training code nests the weights. Averaged weights come first: they are the ones to evaluate.
_WRAPPERS = (
    "ema_state_dict", "state_dict_ema", "model_ema", "ema", "model_state_dict", "state_dict", "model", "module",
)  # fmt: skip
# Prefixes that wrappers of a whole model add; removed only if every name has one, so that no two names can collide.
_PREFIXES = ("module.", "model.", "backbone.")


def convert_state_dict(
    state_dict: Mapping[str, object], *, to: Family, source_channel_order: Literal["rgb", "bgr"] | None = None
) -> dict[str, Tensor]:
    """Rename weights from any known family to another; there and back is bit-exact.

    The input is left as it is; most tensors of the result share its memory.

    Args:
        state_dict: weights under the names of any family, or a checkpoint that wraps them (see `unwrap_state_dict`).
        to: family to convert to. "transformers" means the names of `MobileViTForImageClassification`, or those of
            `MobileViTForSemanticSegmentation` for a DeepLabv3; `MobileViTV2For...` for MobileViTv2.
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
    family, task, generation = recognize(tensors)
    tensors = _join_qkv({key: value for key, value in tensors.items() if not IGNORED.match(key)})
    rows, title = rows_by_name(generation, task, family), TITLES[generation]
    # A query, key or value that is still there lacks one of the other two.
    if strangers := [key for key in tensors if _module(key) not in rows or _module(key).endswith(QKV)]:
        raise MobileViTError(
            f"{len(strangers)} of {len(tensors)} tensors belong to no part of a {title} {_DOERS[task]} in {family} "
            f"names ({_some(strangers)}); remove them to convert the rest"
        )
    names = {key: getattr(rows[_module(key)], to) for key in tensors}
    homeless = [key for key, name in names.items() if name is None]
    if len(homeless) == len(tensors):
        raise MobileViTError(f"{to} has no {title} {_DOERS[task]}; convert to cvnets, which has")
    if homeless:
        raise MobileViTError(
            f"{to} has no such {task} head: there is no place for {len(homeless)} of {len(tensors)} tensors "
            f"({_some(homeless)}); remove them to convert the rest"
        )
    converted = {
        f"{names[key]}.{leaf}": _shaped(value, rows[module].mobilevit, generation, to)
        for key, value in tensors.items()
        for module, _, leaf in (key.rpartition("."),)
    }
    flip = source_channel_order == "bgr"
    if source_channel_order is None:
        flip = (family in _BGR_FAMILIES[generation]) != (to in _BGR_FAMILIES[generation])
    first = f"{getattr(KEY_MAP[generation, task][0], to)}.weight"
    if flip and first in converted:
        converted[first] = converted[first].flip(1)
    return _split_qkv(converted, generation) if to in SPLIT_FAMILIES[generation] else converted


class Recognized(NamedTuple):
    """What a state dict was found to be."""

    family: Family
    task: TaskName
    generation: Generation


def recognize(state_dict: Mapping[str, object]) -> Recognized:
    """Tell whose names an unwrapped state dict uses, its task, and of which MobileViT it is.

    A backbone alone counts as a classifier's.

    Raises:
        MobileViTError: most keys are of no known family.
    """
    candidates = [Recognized(family, task, generation) for generation, task in KEY_MAP for family in _FAMILIES]
    modules = [_module(key) for key in state_dict]
    known = {
        one: sum(map(rows_by_name(one.generation, one.task, one.family).__contains__, modules)) for one in candidates
    }
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


def _join_qkv(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the tensors of `query`, `key` and `value` to one of a module `qkv`."""
    joined = dict(state_dict)
    for key in state_dict:
        module, _, leaf = key.rpartition(".query.")
        parts = [f"{module}.{name}.{leaf}" for name in QKV]
        if module and all(part in joined for part in parts):
            joined[f"{module}.qkv.{leaf}"] = torch.cat([joined.pop(part) for part in parts])
    return joined


def _split_qkv(state_dict: Mapping[str, Tensor], generation: Generation) -> dict[str, Tensor]:
    """The inverse of `_join_qkv`; in MobileViTv2 the query has one row."""
    split: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        module, _, leaf = key.rpartition(".qkv.")
        if module:
            queries = len(value) // 3 if generation == "mobilevit" else 1
            parts = torch.split(value, [queries, *[(len(value) - queries) // 2] * 2])
            # Copies: safetensors refuses to write tensors that share memory.
            split |= {f"{module}.{name}.{leaf}": part.clone() for name, part in zip(QKV, parts, strict=True)}
        else:
            split[key] = value
    return split


def _shaped(value: Tensor, module: str, generation: Generation, family: Family) -> Tensor:
    """Give the weights of a 1x1 in MobileViTv2's transformer the shape of a linear layer or of a convolution."""
    if generation == "mobilevit" or ".transformer." not in module or value.ndim == 1:
        return value
    return value.flatten(1) if family == "mobilevit" else value.flatten(1)[:, :, None, None]


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _some(keys: Iterable[object]) -> str:
    first = [str(key) for key in islice(keys, 4)]
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "") or "none"
