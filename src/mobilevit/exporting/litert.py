"""LiteRT (TensorFlow Lite): Android, iOS and small boards, on the processor through XNNPACK.

Letters used in shape comments:

    B  images in a run     P  sequences of a block     N  tokens     D  width of the transformer
    C  channels of a map     h, w  its height and width
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import io
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobilevit.errors import MobileViTError
from mobilevit.models.deeplabv3 import ASPP
from mobilevit.models.mobilevit import MobileViTBackbone

if TYPE_CHECKING:
    from mobilevit.exporting.plan import Plan

Array = NDArray[Any]

MAX_DIFFERENCE = 1e-3
"""Between the float32 file and the graph in PyTorch, as a share of the largest output (or of 1)."""

CUT = 1e-5
"""Share of an activation's values beyond each end of its int8 range. Activations after SiLU reach twenty times their
standard deviation; the rarest of them would take most of the 256 steps."""

_WITH_WEIGHTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
# What may follow a convolution in int8. Softmax and LayerNorm are not among them: they lose too much there, and
# XNNPACK has no int8 kernels for their parts.
_FOLLOWING = ("LOGISTIC", "MUL", "ADD", "CONCATENATION", "PAD")


def convert(plan: Plan, path: Path) -> None:
    """Write `path`; see `convert_graph`."""
    convert_graph(
        plan.graph,
        plan.example,
        path,
        precision=plan.artifact.precision,
        calibration=plan.batches() if plan.artifact.precision == "int8" else None,
        keep_float=plan.keep_float,
    )


def convert_graph(
    graph: nn.Module,
    example: Tensor,
    path: Path,
    *,
    precision: str,
    calibration: Iterable[Tensor] | None,
    keep_float: Sequence[str] = (),
) -> None:
    """Write a graph as a .tflite file, of one input and of outputs in the graph's order.

    In int8, convolutions and what follows them compute with activations of 8 bits, whose ranges are those of the
    calibration; the transformers' linear layers find the range of every run by themselves. What stays in float32 are
    LayerNorm, softmax and the products of attention; and the first layers down to a quarter of the input's size, whose
    rounding costs most accuracy.

    Args:
        graph: from one tensor to a tuple of tensors, in eval mode, on the CPU; it stays as it is.
        example: an input to trace it with.
        path: of the file.
        precision: "fp32"; "fp16", which are weights of half the size, computed with in float32; or "int8".
        calibration: int8: inputs like `example`, made of real images.
        keep_float: int8: names of further modules of the graph to leave in float32, with all below them.

    Raises:
        ValueError: the converter is not installed; it has converted the graph wrongly; int8 without calibration; or
            `keep_float` names what is not there.
    """
    converter, flatbuffers = _import("litert_torch"), _import("ai_edge_litert.tools.flatbuffer_utils")
    if precision not in ("fp32", "fp16", "int8"):
        raise MobileViTError(f"litert has no precision {precision!r}; choose fp32, fp16 or int8")
    modules = dict(graph.named_modules())
    if unknown := [name for name in keep_float if name not in modules]:
        some = next((name for name, module in modules.items() if isinstance(module, nn.Conv2d)), "")
        raise MobileViTError(f"keep_float: no module {unknown[0]!r} in this model; names are such as {some!r}")
    rewritten = _rewrite(graph)
    with _quiet(converter), torch.no_grad():
        content = bytes(converter.convert(rewritten, (example,)).model_content())
    _check(content, graph, example)
    if precision != "fp32":
        flat = flatbuffers.read_model_from_bytearray(bytearray(content))
        operators = _operators(flat, flatbuffers)
        modes = _modes(operators, _owners(rewritten), precision, (*_first(graph), *keep_float))
        _mark(flat, operators, modes)
        content = bytes(flatbuffers.convert_object_to_bytearray(flat))
        content = _quantize(content, operators, modes, calibration)
    path.write_bytes(content)


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MobileViTError(
            f"{module.partition('.')[0]} is not installed; it needs another PyTorch, so run "
            "scripts/litert_environment.sh once, then .venv-litert/bin/mobilevit export CHECKPOINT --format litert"
        ) from None


@contextlib.contextmanager
def _quiet(converter: Any) -> Iterator[None]:
    """Without the converter's own account of its progress, forty lines."""
    before = converter.config.show_progress
    converter.config.show_progress = False
    try:
        yield
    finally:
        converter.config.show_progress = before


# -- the graph, as the converter needs it -----------------------------------------------------------------------------


class _LayerNorm(nn.Module):
    """Half the operators of the converter's own. Shape: (P * B, N, D) -> (P * B, N, D)."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.eps, self.weight, self.bias = norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps)
        return x if self.weight is None else x * self.weight + self.bias


class _ASPP(nn.Module):
    """ASPP whose pooled branch is projected on its own, and added.

    The converter makes an invalid file of a single pixel that is expanded to a map.

    Shape: (B, C, h, w) -> (B, aspp_channels, h, w).
    """

    def __init__(self, aspp: ASPP) -> None:
        super().__init__()
        self.near, self.atrous, self.pool = aspp.near, aspp.atrous, aspp.pool
        together = aspp.project.conv
        out_channels, in_channels = together.weight.shape[:2]
        whole = aspp.pool.conv.out_channels
        self.project = nn.Conv2d(in_channels - whole, out_channels, 1)
        self.project_whole = nn.Conv2d(whole, out_channels, 1, bias=False)
        self.project.weight = nn.Parameter(together.weight[:, :-whole], requires_grad=False)
        self.project_whole.weight = nn.Parameter(together.weight[:, -whole:], requires_grad=False)
        self.project.bias = together.bias
        self.act = aspp.project.act

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.near(x), *(branch(x) for branch in self.atrous)]
        whole = self.project_whole(self.pool(x.mean((2, 3), keepdim=True)))  # (B, aspp_channels, 1, 1)
        x = self.act(self.project(torch.cat(branches, dim=1)) + whole)
        return x


def _rewrite(graph: nn.Module) -> nn.Module:
    """A copy of the same function that the converter takes well."""
    rewritten = copy.deepcopy(graph).eval()
    for module in list(rewritten.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, _LayerNorm(child))
            elif isinstance(child, ASPP):
                setattr(module, name, _ASPP(child))
    # The converter knows constants by the addresses of contiguous copies, which it frees too early: of two weights
    # of one shape that are not contiguous, one could silently stand for both.
    for tensor in [*rewritten.parameters(), *rewritten.buffers()]:
        tensor.data = tensor.data.contiguous().clone(memory_format=torch.contiguous_format)
    return rewritten


def _check(content: bytes, graph: nn.Module, example: Tensor) -> None:
    """Compare the float32 file with the graph, on noise.

    Raises:
        ValueError: they differ.
    """
    litert = _import("ai_edge_litert.interpreter")
    generator = torch.Generator().manual_seed(0)
    if example.is_floating_point():
        images = torch.rand(example.shape, generator=generator)
    else:
        images = torch.randint(0, 256, example.shape, generator=generator, dtype=example.dtype)
    with torch.no_grad():
        expected = [output.numpy() for output in graph(images)]
    interpreter = litert.Interpreter(model_content=content)
    interpreter.allocate_tensors()
    found = _run(interpreter, images.numpy())
    for ours, theirs in zip(expected, found, strict=True):
        if ours.shape != theirs.shape:
            difference = math.inf
        elif np.issubdtype(ours.dtype, np.floating):
            difference = float(np.abs(ours - theirs).max() / max(1.0, float(np.abs(ours).max())))
        else:  # classes: of noise, a few lie on an edge
            difference = float((ours != theirs).mean()) * 0.1
        if not difference <= MAX_DIFFERENCE:  # not a number is no less
            version = getattr(_import("litert_torch"), "__version__", "")
            raise MobileViTError(
                f"litert_torch {version} has converted this model wrongly (outputs differ by {difference:.1e} of the "
                "largest); install another version of it into .venv-litert"
            )


def _run(interpreter: Any, images: Array) -> list[Array]:
    """The outputs in the graph's order: the converter numbers them."""
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], images)
    interpreter.invoke()
    outputs = interpreter.get_signature_runner().get_output_details()
    names = sorted(outputs, key=lambda name: int(name.rpartition("_")[2]))
    return [interpreter.get_tensor(outputs[name]["index"]) for name in names]


# -- which operator computes how --------------------------------------------------------------------------------------


class _Operator:
    """One step of a file: its kind, its activations by index, a digest of its weights, and its outputs."""

    def __init__(self, flat: Any, operator: Any, kind: str) -> None:
        tensors = flat.subgraphs[0].tensors
        data = {int(i): flat.buffers[tensors[i].buffer].data for i in operator.inputs if i >= 0}
        self.kind = kind
        self.inputs = [index for index, values in data.items() if values is None]
        self.outputs = [int(index) for index in operator.outputs]
        self.digest = ""
        if kind in _WITH_WEIGHTS and (weights := data.get(int(operator.inputs[1]))) is not None:
            self.digest = hashlib.sha256(np.asarray(weights).tobytes()).hexdigest()


def _operators(flat: Any, flatbuffers: Any) -> list[_Operator]:
    return [
        _Operator(flat, operator, flatbuffers.opcode_to_name(flat, operator.opcodeIndex))
        for operator in flat.subgraphs[0].operators
    ]


def _owners(graph: nn.Module) -> dict[str, str]:
    """Names of modules, by a digest of their weights as the file has them."""
    owners = {}
    for name, module in graph.named_modules():
        if isinstance(module, nn.Conv2d):  # (out, in, h, w), or of a convolution of each channel (C, 1, h, w)
            depthwise = module.groups > 1
            weights = module.weight.permute(1, 2, 3, 0) if depthwise else module.weight.permute(0, 2, 3, 1)
        elif isinstance(module, nn.Linear):
            weights = module.weight
        else:
            continue
        owners[hashlib.sha256(weights.detach().contiguous().numpy().tobytes()).hexdigest()] = name
    return owners


def _first(graph: nn.Module) -> list[str]:
    """Modules that int8 leaves in float32 in every model; their rounding alone costs as much as all the others'."""
    names = []
    for name, module in graph.named_modules():
        if isinstance(module, MobileViTBackbone):
            prefix = f"{name}." if name else ""
            names += [f"{prefix}stem", f"{prefix}layer1", f"{prefix}layer2.0"]
    return names


def _modes(
    operators: Sequence[_Operator], owners: dict[str, str], precision: str, keep_float: Sequence[str]
) -> list[str]:
    """How each operator computes: "float", "fp16" (weights only), "int8", or "dynamic" (int8, ranges of the run).

    Raises:
        ValueError: not one operator has the weights of a module.
    """
    modes: list[str] = []
    in_int8: set[int] = set()  # activations
    if not any(operator.digest in owners for operator in operators):
        raise MobileViTError(
            "this version of litert_torch changes weights, so layers cannot be told apart; export fp32"
        )
    for operator in operators:
        mode = "float"
        if operator.kind in _WITH_WEIGHTS and operator.digest in owners:
            if precision == "fp16":
                mode = "fp16"
            elif not any(f"{owners[operator.digest]}.".startswith(f"{name}.") for name in keep_float):
                mode = "dynamic" if operator.kind == "FULLY_CONNECTED" else "int8"
        elif operator.kind in _FOLLOWING and operator.inputs and in_int8.issuperset(operator.inputs):
            mode = "int8"
        if mode == "int8":
            in_int8.update(operator.outputs)
        modes.append(mode)
    return modes


def _mark(flat: Any, operators: Sequence[_Operator], modes: Sequence[str]) -> None:
    """Name what operators put out so that the quantizer, which goes by names, finds how each is to compute.

    The converter's names are a tenth of a small file; only those of the graph's outputs are of use to anybody.
    """
    tensors, outputs = flat.subgraphs[0].tensors, {int(index) for index in flat.subgraphs[0].outputs}
    for number, (operator, mode) in enumerate(zip(operators, modes, strict=True)):
        for index in operator.outputs:
            if mode != "float" or index not in outputs:
                tensors[index].name = f"{mode}/{number}/{operator.kind.lower()}/{index}".encode()


def _quantize(
    content: bytes, operators: Sequence[_Operator], modes: Sequence[str], calibration: Iterable[Tensor] | None
) -> bytes:
    """The file with its operators computing as their names say.

    Raises:
        ValueError: operators need calibration, and there is none.
    """
    package = _import("ai_edge_quantizer.quantizer")
    kinds = {kind: package.qtyping.TFLOperationName(kind) for kind in (*_WITH_WEIGHTS, *_FOLLOWING)}
    quantizer = package.Quantizer(content)
    casting = package.AlgorithmName.FLOAT_CASTING
    for mode, kind in sorted({(mode, operator.kind) for mode, operator in zip(modes, operators, strict=True)}):
        if mode == "fp16":
            quantizer.add_weight_only_config("^fp16/", kinds[kind], num_bits=16, algorithm_key=casting)
        elif mode == "dynamic":
            quantizer.add_dynamic_config("^dynamic/", kinds[kind], num_bits=8)
        elif mode == "int8":
            quantizer.add_static_config("^int8/", kinds[kind], activation_num_bits=8, weight_num_bits=8)
    ranges = None
    if quantizer.need_calibration:
        ranges = _ranges(content, operators, modes, calibration or ())
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that knows no switch
        result = quantizer.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    return bytes(result.quantized_model)


# -- calibration ------------------------------------------------------------------------------------------------------


class _Histogram:
    """How often values occur, over a range around zero that doubles when one lies beyond it."""

    BINS = 8192

    def __init__(self) -> None:
        self._reach = 2.0**-10
        self._counts = np.zeros(self.BINS, np.int64)
        self._least, self._most = math.inf, -math.inf

    def add(self, values: NDArray[np.float32]) -> None:
        self._least, self._most = min(self._least, float(values.min())), max(self._most, float(values.max()))
        while max(-self._least, self._most) > self._reach:
            inner = np.zeros_like(self._counts)
            inner[self.BINS // 4 : -self.BINS // 4] = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts, self._reach = inner, self._reach * 2
        places = ((values.ravel() + self._reach) * (self.BINS / 2 / self._reach)).astype(np.int32)
        self._counts += np.bincount(np.minimum(places, self.BINS - 1), minlength=self.BINS)

    def bounds(self, cut: float) -> tuple[float, float]:
        """Between which all values lie but a share of `cut` at each end."""
        up_to = np.cumsum(self._counts)
        total = int(up_to[-1])
        first = int(np.searchsorted(up_to, cut * total, side="right"))
        last = int(np.searchsorted(up_to, total - cut * total, side="left"))
        step = 2 * self._reach / self.BINS
        return max(first * step - self._reach, self._least), min((last + 1) * step - self._reach, self._most)


def _ranges(
    content: bytes, operators: Sequence[_Operator], modes: Sequence[str], calibration: Iterable[Tensor]
) -> dict[str, dict[str, Array]]:
    """Least and largest value of every activation that int8 operators read or write, by name.

    Raises:
        ValueError: there are no images.
    """
    litert = _import("ai_edge_litert.interpreter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the memory that this takes
        interpreter = litert.Interpreter(model_content=content, experimental_preserve_all_tensors=True)
    interpreter.allocate_tensors()
    in_int8 = [operator for operator, mode in zip(operators, modes, strict=True) if mode == "int8"]
    histograms = {index: _Histogram() for operator in in_int8 for index in (*operator.inputs, *operator.outputs)}
    before_silu = {index for operator in in_int8 if operator.kind == "LOGISTIC" for index in operator.inputs}
    number = 0
    for number, images in enumerate(calibration, start=1):  # noqa: B007
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], images.numpy())
        interpreter.invoke()
        for index, histogram in histograms.items():
            histogram.add(interpreter.get_tensor(index))
    if not number:
        raise MobileViTError("int8 must be calibrated on images of what the model will see; there are none")
    details = {detail["index"]: detail for detail in interpreter.get_tensor_details()}
    ranges = {}
    for index, histogram in histograms.items():
        low, high = histogram.bounds(CUT)
        if index in before_silu:
            low = max(low, _least_that_matters(high))
        shape = (1,) * len(details[index]["shape"])
        ranges[details[index]["name"]] = {
            "min": np.full(shape, min(low, 0.0), np.float32),
            "max": np.full(shape, max(high, 0.0), np.float32),
        }
    return ranges


def _least_that_matters(high: float) -> float:
    """Where a range up to `high` can begin before SiLU: what lies below comes out as zero, to half a step of 255."""
    low = -2.0
    while low > -20 and abs(low / (1 + math.exp(-low))) > 0.5 * (high - low) / 255:
        low -= 0.05
    return low
