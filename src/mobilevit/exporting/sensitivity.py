"""What quantizing each layer alone costs: in PyTorch, by rounding in floating point, whatever the engine.

Weights are rounded to int8 per channel, symmetrically, activations to 256 steps between the smallest and the largest
value they have on the same images. Of an attention it is its two products: queries, keys, values and probabilities.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from mobilevit.errors import MobileViTError
from mobilevit.exporting.graph import ExportGraph
from mobilevit.exporting.quantization import is_below
from mobilevit.models.deeplabv3 import DeepLabv3
from mobilevit.models.mobilevit import Attention, MobileViTBackbone
from mobilevit.plotting import new_figure, save_figure
from mobilevit.progress import Progress

MOST_PIXELS = 32 * 256 * 256
"""Of all images that are looked at: more change the order of layers little and take time."""
SURE = 0.3
"""Score from which an anchor counts as an object."""
_AT_ONCE = 4  # images, whose maps then stay in the cache

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """One layer, quantized while all others compute in float32."""

    name: str
    """Of its module in the graph, as `keep_float` takes it."""
    kind: str
    """"convolution", "pointwise" (1x1), "depthwise", "linear" or "attention"."""
    parameters: int
    sqnr_db: float
    """Signal of the graph's output over the noise that this layer brings to it, in decibels; of the worst output."""
    agreement: float
    """Share of images (segmentation: cells of the coarse map; detection: anchors with an object) with the same class
    as before."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def sensitivity(graph: ExportGraph, inputs: Sequence[Tensor]) -> list[LayerSensitivity]:
    """Quantize layer after layer, each alone, and see what becomes of the output.

    Args:
        graph: of any task; it stays as it is.
        inputs: of one image each, as the graph takes them; evenly drawn from, `MOST_PIXELS` at most.

    Returns:
        All convolutions, linear layers and attentions, the most sensitive first.

    Raises:
        ValueError: no inputs.
    """
    if not inputs:
        raise MobileViTError("sensitivity is measured on images; give some")
    graph = copy.deepcopy(graph).eval()
    graph.label_map = False  # classes have no signal to speak of
    if isinstance(graph.model, DeepLabv3):  # not enlarging its logits takes a fifth of the time, and loses nothing
        size = inputs[0].shape[1:3] if graph.baked else inputs[0].shape[2:4]
        graph.rows, graph.columns = (torch.eye(-(-side // graph.model.output_stride)) for side in size)
    most = max(_AT_ONCE, min(len(inputs), MOST_PIXELS * 3 // inputs[0].numel()))
    step = max(1.0, len(inputs) / most)
    drawn = [inputs[int(place * step)] for place in range(min(most, len(inputs)))]
    batches = [torch.cat(drawn[start : start + _AT_ONCE]) for start in range(0, len(drawn), _AT_ONCE)]
    ranges = _ranges(graph, batches)
    layers = {name: graph.get_submodule(name) for name in ranges}
    damages = {name: _Damage(len(graph.output_names)) for name in layers}
    stages = _stages(graph)
    with Progress("sensitivity", len(layers) * len(batches)) as progress:
        for batch in batches:
            kept: dict[str, Any] = {}
            with _kept(stages, kept):
                before = graph(batch)
            for name, module in layers.items():
                with _skipped(stages, kept, name), _quantized(module, ranges[name]):
                    damages[name].add(graph.task, before, graph(batch))
                progress.advance(1)
    rows = [
        LayerSensitivity(
            name=name,
            kind=_kind(layers[name]),
            parameters=sum(p.numel() for p in layers[name].parameters(recurse=False)),
            sqnr_db=damage.decibels(),
            agreement=damage.agreement(),
        )
        for name, damage in damages.items()
    ]
    return sorted(rows, key=lambda row: row.sqnr_db)


def choose_float(rows: Sequence[LayerSensitivity], least_db: float = 30.0) -> tuple[str, ...]:
    """The fewest layers to leave in floating point for the others' noise together to stay low; for `keep_float`.

    Noise of different layers hardly correlates, so it adds up: of the flowers model in PyTorch, all layers together
    have 30.5 dB, and their sum is 31.2.

    Args:
        rows: as `sensitivity` gives them.
        least_db: signal over noise to reach. At 30 dB, 98 % of flowers and more keep their class.
    """
    noise = sum(10 ** (-row.sqnr_db / 10) for row in rows)
    chosen = []
    for row in sorted(rows, key=lambda row: row.sqnr_db):
        if noise <= 10 ** (-least_db / 10):
            break
        chosen.append(row.name)
        noise -= 10 ** (-row.sqnr_db / 10)
    return tuple(chosen)


def save_plot(rows: Sequence[LayerSensitivity], path: Path, most: int = 40) -> None:
    """Draw the most sensitive layers as bars; needs matplotlib, of the `train` extra."""
    from matplotlib.patches import Patch

    shown = sorted(rows, key=lambda row: row.sqnr_db)[:most]
    kinds = sorted({row.kind for row in rows})
    colors = {kind: f"C{number}" for number, kind in enumerate(kinds)}
    figure = new_figure(8, 1.4 + 0.2 * max(len(shown), 2))
    axes = figure.add_subplot()
    axes.barh(range(len(shown)), [row.sqnr_db for row in shown], color=[colors[row.kind] for row in shown])
    axes.set_yticks(range(len(shown)), [row.name for row in shown], fontsize=7)
    title = "Signal over noise with one layer in int8, the most sensitive first"
    axes.set(ylim=(max(len(shown), 1) - 0.4, -0.6), xlabel="dB; 6 more are half the noise", title=title)
    axes.legend(handles=[Patch(color=colors[kind], label=kind) for kind in kinds], loc="upper right", fontsize=8)
    save_figure(figure, path)


def _kind(module: nn.Module) -> str:
    """What is quantized of a module; "" for nothing."""
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            return "depthwise"
        return "pointwise" if module.kernel_size == (1, 1) else "convolution"
    if isinstance(module, nn.Linear):
        return "linear"
    return "attention" if isinstance(module, Attention) else ""


def _ranges(graph: ExportGraph, batches: Sequence[Tensor]) -> dict[str, list[Range]]:
    """(smallest, largest) of the input of every layer that takes part, or of queries, keys and values."""
    ranges: dict[str, list[Range]] = {}

    def widen(name: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        found = [(float(tensor.min()), float(tensor.max())) for tensor in tensors]
        known = ranges.get(name, found)
        ranges[name] = [(min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(known, found, strict=True)]
        return tensors

    with ExitStack() as watches:
        for name, module in graph.named_modules():
            if isinstance(module, Attention):
                watches.enter_context(_Attending(module, partial(widen, name)))
            elif _kind(module):
                watches.enter_context(_hooked(module.register_forward_pre_hook(partial(_see, widen, name))))
        for batch in batches:
            graph(batch)
    return ranges


def _see(widen: Callable[[str, Sequence[Tensor]], object], name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    widen(name, inputs)


@contextmanager
def _hooked(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _stages(graph: ExportGraph) -> dict[str, nn.Module]:
    """Parts of the backbone that are computed one after the other, in that order."""
    backbone = next(name for name, module in graph.named_modules() if isinstance(module, MobileViTBackbone))
    names = [f"{backbone}.{part}" for part in ("stem", "layer1", "layer2", "layer3", "layer4", "layer5")]
    return {name: graph.get_submodule(name) for name in names}


@contextmanager
def _kept(stages: dict[str, nn.Module], kept: dict[str, Any]) -> Iterator[None]:
    """Keep what each stage gives."""
    with ExitStack() as watches:
        for name, stage in stages.items():
            watches.enter_context(_hooked(stage.register_forward_hook(partial(_keep, kept, name))))
        yield


def _keep(kept: dict[str, Any], name: str, _: nn.Module, _inputs: Any, output: Any) -> None:
    kept[name] = output


@contextmanager
def _skipped(stages: dict[str, nn.Module], kept: dict[str, Any], name: str) -> Iterator[None]:
    """Do not compute again what comes before a layer; as most layers come late, this takes two thirds of the time."""
    before = []
    for stage in stages:
        if is_below(name, [stage]):
            break
        before.append(stage)
    try:
        for stage in before:
            stages[stage].forward = partial(_give, kept[stage])
        yield
    finally:
        for stage in before:
            del stages[stage].forward  # the class's own shows again


def _give(output: Any, _: Tensor) -> Any:
    return output


class _Damage:
    """What the quantizing of a layer has done so far, over batches."""

    def __init__(self, num_outputs: int) -> None:
        self._signal, self._noise = [0.0] * num_outputs, [0.0] * num_outputs
        self._same = self._counted = 0

    def add(self, task: str, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        for number, (wanted, found) in enumerate(zip(before, after, strict=True)):
            self._signal[number] += float(wanted.double().square().sum())
            self._noise[number] += float((wanted.double() - found.double()).square().sum())
        same = _same_class(task, before[-1], after[-1])
        self._same, self._counted = self._same + int(same.sum()), self._counted + same.numel()

    def decibels(self) -> float:
        """Of the worst output; 200 without any noise."""
        return min(_decibels(signal, noise) for signal, noise in zip(self._signal, self._noise, strict=True))

    def agreement(self) -> float:
        return self._same / self._counted if self._counted else 1.0


def _decibels(signal: float, noise: float) -> float:
    if not math.isfinite(noise):
        return -math.inf
    return min(200.0, 10 * math.log10(max(signal, 1e-30) / noise)) if noise else 200.0


def _same_class(task: str, before: Tensor, after: Tensor) -> Tensor:
    """Bool, of each image (B, K), pixel (B, K, H, W), or anchor that has an object (B, A, K)."""
    if task != "detection":
        return before.argmax(1) == after.argmax(1)
    (best, labels), (other_best, other_labels) = before.max(dim=2), after.max(dim=2)
    here, there = best >= SURE, other_best >= SURE
    return (here & there & (labels == other_labels))[here | there]


@contextmanager
def _quantized(module: nn.Module, ranges: Sequence[Range]) -> Iterator[None]:
    """While this lasts, one layer computes with rounded numbers."""
    if isinstance(module, Attention):
        with _Attending(module, partial(_round_each, ranges), probabilities=True):
            yield
        return
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    kept = weight.data
    weight.data = _round_weight(kept)
    try:
        with _hooked(module.register_forward_pre_hook(lambda _, inputs: tuple(_round_each(ranges, inputs)))):
            yield
    finally:
        weight.data = kept


def _round_each(ranges: Sequence[Range], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [_round(tensor, *bounds) for tensor, bounds in zip(tensors, ranges, strict=True)]


class _Attending(TorchFunctionMode):
    """Lets `change` see and replace queries, keys and values of one module, perhaps rounding probabilities, too."""

    def __init__(
        self, module: Attention, change: Callable[[Sequence[Tensor]], Sequence[Tensor]], *, probabilities: bool = False
    ) -> None:
        super().__init__()
        self._module, self._change, self._probabilities, self._inside = module, change, probabilities, False

    def __enter__(self) -> Any:
        self._handles = [
            self._module.register_forward_pre_hook(lambda *_: self._turn(True)),
            self._module.register_forward_hook(lambda *_: self._turn(False)),
        ]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _turn(self, inside: bool) -> None:
        self._inside = inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not self._inside:
            return func(*args, **kwargs)
        queries, keys, values = self._change(args)
        if not self._probabilities:
            return func(queries, keys, values, **kwargs)
        scores = queries @ keys.transpose(-2, -1) * kwargs["scale"]  # (batch, h, N, N)
        return _round(scores.softmax(dim=-1), 0.0, 1.0) @ values


def _round_weight(weight: Tensor) -> Tensor:
    """To -127..127 steps of each output channel."""
    step = weight.flatten(1).abs().amax(dim=1).clamp(min=1e-12) / 127
    step = step.view(-1, *(1,) * (weight.ndim - 1))
    return (weight / step).round() * step


def _round(x: Tensor, low: float, high: float) -> Tensor:
    """To 256 steps from `low` to `high`, one of which is zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = max(high - low, 1e-12) / 255
    zero = round(-low / step)
    return ((x / step).round() + zero).clamp(0, 255).sub(zero) * step
