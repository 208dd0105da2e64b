"""Reading `torch.export` files of strangers.

`torch.export.load` is not safe: it unpickles weights, constants and example inputs that say they are pickles, evaluates
the expressions of dynamic shapes and the guards as Python, writes names into Python code that it runs, calls any
function below `torch` that a node names, and loads compiled libraries. So nothing of a file is passed on that is not
known to be harmless: tensors as plain bytes, and a graph of the operators that this package's models are made of.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

from mobilevit.errors import MobileViTError

_GRAPH = "models/model.json"
_EXAMPLE = "data/sample_inputs/model.pt"
_TENSORS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_PLAIN = re.compile(
    r"\.data/(serialization_id|version)|archive_format|archive_version|byteorder|extra/[\w.]+"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+"
)
_TENSOR_NAME = re.compile(r"(weight|tensor)_\d+")
_WORD = re.compile(r"[\w.]*", re.ASCII)
"""What names may look like: nothing that is code once it stands among code."""
_RANGE = re.compile(r"[\w*+ -]*", re.ASCII)
_SHAPE = re.compile(
    r"(?:'[a-z]\d+'|\d|[-+*/(),= ]|\b(?:Symbol|Integer|Add|Mul|Pow|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|Max|Min"
    r"|[su]\d+|integer|positive|nonnegative|True|False)\b)*",
    re.ASCII,
)
"""Expressions of dynamic sizes, which sympy evaluates as Python."""
_SPEC_WORDS = {"builtins.tuple", "builtins.list", "builtins.dict", "null", "[]", "type", "context", "children_spec"}
_NO_ARGUMENTS = {"as_graph", "as_custom_obj", "as_operator", "as_opaque"}
_ATEN = """
_assert_scalar.default _assert_tensor_metadata.default _to_copy.default add.Tensor alias.default argmax.default
cat.default chunk.default clone.default contiguous.default conv2d.default detach.default detach_.default div.Tensor
dropout.default exp.default expand.default expand_as.default feature_dropout.default flatten.using_ints
layer_norm.default lift_fresh_copy.default linear.default matmul.default mean.dim mul.Tensor permute.default
relu.default relu_.default reshape.default scaled_dot_product_attention.default select.int silu.default
silu_.default slice.Tensor softmax.int split.Tensor squeeze.dim sub.Tensor sym_constrain_range_for_size.default
sym_numel.default sym_size.int to.device to.dtype to.dtype_layout transpose.int unsqueeze.default
upsample_bilinear2d.vec view.default
"""
_ARITHMETIC = "add sub mul neg floordiv mod eq ne lt le gt ge"
_TARGETS = {f"torch.ops.aten.{name}" for name in _ATEN.split()} | {f"_operator.{name}" for name in _ARITHMETIC.split()}
"""What nodes may compute: what a model of this package is made of, and with what its sizes are computed."""
_DAMAGE = (
    zipfile.BadZipFile, KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError,
)  # fmt: skip


def read(path: Path) -> io.BytesIO:
    """A copy of the file for `torch.export.load`, of what has been looked through.

    Raises:
        ValueError: the file holds what could run code, or is none of this package's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
            roots = {name.partition("/")[0] for name in archive.namelist()}
            if len(entries) != len(archive.namelist()) or len(roots) != 1:
                raise _refusal(path, "entries of the same name")
        graph = json.loads(entries.pop(_GRAPH))
        entries.pop(_EXAMPLE, None)
        for name in _TENSORS:
            _check_tensors(path, json.loads(entries[name]))
        for name in entries:
            if name not in _TENSORS and not _PLAIN.fullmatch(name):
                raise _refusal(path, name)
        entries[_GRAPH] = json.dumps(_checked(path, graph)).encode()
    except _DAMAGE as error:
        raise MobileViTError(f"{path}: damaged, or no torch.export file of this package; export it again") from error
    entries[_EXAMPLE] = b""
    copied = io.BytesIO()
    with zipfile.ZipFile(copied, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(f"model/{name}", content)
    copied.seek(0)
    return copied


def _refusal(path: Path, what: str) -> MobileViTError:
    return MobileViTError(
        f"{path}: refused, as loading it could run code that came with it ({what[:80]!r}); export it again"
    )


def _check_tensors(path: Path, values: dict[str, Any]) -> None:
    """Tensors must be bytes of a known type and shape, not pickles."""
    for name, entry in values["config"].items():
        if entry["use_pickle"] is not False or not _TENSOR_NAME.fullmatch(entry["path_name"]):
            raise _refusal(path, f"{name} is a pickle")
    _check_words(path, values)


def _checked(path: Path, program: dict[str, Any]) -> dict[str, Any]:
    """The graph without guards (`ArtifactSession` checks inputs) and without where its nodes came from."""
    program["guards_code"] = []
    if not all(_RANGE.fullmatch(name) for name in program["range_constraints"]):
        raise _refusal(path, "range_constraints")
    module = program["graph_module"]
    module["metadata"] = {}
    for node in module["graph"]["nodes"]:
        node["metadata"] = {}
        if node["target"] not in _TARGETS:
            raise _refusal(path, node["target"])
    _check_words(path, {key: value for key, value in program.items() if key != "range_constraints"})
    return program


def _check_words(path: Path, value: Any, key: str = "") -> None:
    """All text below a value, by the key it stands at."""
    if isinstance(value, dict):
        for name, part in value.items():
            if name in _NO_ARGUMENTS or not _WORD.fullmatch(name):
                raise _refusal(path, name)
            _check_words(path, part, name)
    elif isinstance(value, list):
        for part in value:
            _check_words(path, part, key)
    elif isinstance(value, str):
        if key in ("in_spec", "out_spec"):
            _check_spec(path, json.loads(value))
        elif key == "expr_str":
            if not _SHAPE.fullmatch(value):
                raise _refusal(path, value)
        elif key == "torch_version":
            return  # never read
        elif not _WORD.fullmatch(value):
            raise _refusal(path, value)


def _check_spec(path: Path, value: Any) -> None:
    """How inputs and outputs nest: tuples of tensors."""
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    for part in parts:
        _check_spec(path, part)
    if isinstance(value, str) and value not in _SPEC_WORDS:
        raise _refusal(path, value)
