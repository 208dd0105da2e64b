"""The cost of int8 for each layer alone: measured in PyTorch, by rounding in floating point, whatever the engine.

Weights are rounded to int8 per channel, symmetrically; inputs to 256 steps between the smallest and the largest value
they take on the same images. In an attention, its two products are rounded: queries, keys, values and probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mobilevit.exporting.graph import ExportGraph, SegmentationGraph
from mobilevit.exporting.rewrites import AttentionInSteps, in_steps
from mobilevit.plotting import new_figure, save_figure
from mobilevit.progress import Progress

_MAX_PIXELS = 16 * 256 * 256
"""In all images together: more take time and hardly change the order of the layers."""
_BATCH_SIZE = 4

_Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """One layer, quantized while all others compute in float32."""

    name: str
    """Its name in the graph, as `keep_float` takes it."""
    kind: str
    """"convolution", "pointwise" (1x1), "depthwise", "linear" or "attention"."""
    parameters: int
    sqnr_db: float
    """Signal of the graph's output over the noise that this layer adds, in decibels; of the worst output."""


@torch.no_grad()
def measure_sensitivity(graph: ExportGraph, inputs: Sequence[Tensor]) -> list[LayerSensitivity]:
    """Quantize each layer alone and measure the noise at the output; the most sensitive layers come first.

    Inputs are of one image each, as the graph takes them; some are drawn evenly if there are many.
    """
    graph = in_steps(graph).eval()
    if isinstance(graph, SegmentationGraph):
        graph.label_map = False  # noise is measured in logits
    count = min(len(inputs), max(_BATCH_SIZE, _MAX_PIXELS * 3 // inputs[0].numel()))
    drawn = [inputs[number * len(inputs) // count] for number in range(count)]
    batches = [torch.cat(drawn[start : start + _BATCH_SIZE]) for start in range(0, count, _BATCH_SIZE)]
    layers = {name: module for name, module in graph.named_modules() if _kind(module)}
    ranges = _input_ranges(graph, [part for layer in layers.values() for part in _rounded_parts(layer)], batches)
    signal = torch.zeros(len(graph.output_names), dtype=torch.float64)
    noise = {name: torch.zeros_like(signal) for name in layers}
    with Progress("sensitivity", len(layers) * len(batches)) as progress:
        for batch in batches:
            expected = graph(batch)
            signal += _energies(expected)
            for name, layer in layers.items():
                found = _run_rounded(graph, batch, name, layer, ranges)
                noise[name] += _energies([a.double() - b for a, b in zip(expected, found, strict=True)])
                progress.advance(1)
    rows = [
        LayerSensitivity(
            name=name,
            kind=_kind(layer),
            parameters=sum(p.numel() for p in layer.parameters(recurse=False)),
            sqnr_db=_decibels(signal, noise[name]),
        )
        for name, layer in layers.items()
    ]
    return sorted(rows, key=lambda row: row.sqnr_db)


def choose_float(rows: Sequence[LayerSensitivity], least_db: float = 30.0) -> tuple[str, ...]:
    """Choose the fewest layers to keep in float, so that signal over noise of all others together reaches `least_db`.

    The noise of different layers hardly correlates, so it adds up: in the flowers model in PyTorch, all layers together
    have 30.5 dB, and their sum predicts 31.2. At 30 dB, at least 98 % of flowers keep their class.
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
    """Draw the most sensitive layers as bars."""
    shown = rows[:most]
    figure = new_figure(8, 1.8 + 0.2 * len(shown))
    axes = figure.add_subplot()
    for kind in sorted({row.kind for row in shown}):
        places = [place for place, row in enumerate(shown) if row.kind == kind]
        axes.barh(places, [shown[place].sqnr_db for place in places], label=kind)
    axes.set_yticks(range(len(shown)), [row.name for row in shown], fontsize=7)
    title = "Signal over noise with one layer in int8, the most sensitive first"
    axes.set(ylim=(len(shown) - 0.4, -0.6), xlabel="dB; 6 more are half the noise", title=title)
    axes.legend(loc="upper right", fontsize=8)
    save_figure(figure, path)


def _kind(module: nn.Module) -> str:
    """Name the kind of a layer; "" for modules that int8 does not touch."""
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            return "depthwise"
        return "pointwise" if module.kernel_size == (1, 1) else "convolution"
    if isinstance(module, nn.Linear):
        return "linear"
    return "attention" if isinstance(module, AttentionInSteps) else ""


def _rounded_parts(layer: nn.Module) -> Sequence[nn.Module]:
    """List the modules whose inputs are rounded where a layer computes in int8."""
    return list(layer.factors) if isinstance(layer, AttentionInSteps) else [layer]


def _input_ranges(graph: ExportGraph, parts: Sequence[nn.Module], batches: Sequence[Tensor]) -> dict[nn.Module, _Range]:
    """Find the smallest and the largest input of each module; zero is always between them."""
    ranges = dict.fromkeys(parts, (0.0, 0.0))

    def widen(part: nn.Module, inputs: tuple[Tensor]) -> None:
        low, high = inputs[0].aminmax()
        ranges[part] = (min(ranges[part][0], float(low)), max(ranges[part][1], float(high)))

    with ExitStack() as hooks:
        for part in parts:
            hooks.enter_context(part.register_forward_pre_hook(widen))
        for batch in batches:
            graph(batch)
    return ranges


def _run_rounded(
    graph: ExportGraph, batch: Tensor, name: str, layer: nn.Module, ranges: dict[nn.Module, _Range]
) -> tuple[Tensor, ...]:
    """Run the graph with the weights and the inputs of one layer rounded."""
    weights = {f"{name}.weight": _round_weight(layer.weight)} if isinstance(layer, nn.Conv2d | nn.Linear) else {}
    with ExitStack() as hooks:
        for part in _rounded_parts(layer):
            hooks.enter_context(part.register_forward_pre_hook(partial(_round_input, ranges[part])))
        found: tuple[Tensor, ...] = functional_call(graph, weights, (batch,))
    return found


def _round_weight(weight: Tensor) -> Tensor:
    """Round to -127..127 steps of each output channel."""
    step = weight.flatten(1).abs().amax(dim=1).clamp(min=1e-12) / 127
    return torch.fake_quantize_per_channel_affine(weight, step, torch.zeros_like(step, dtype=torch.int32), 0, -127, 127)


def _round_input(limits: _Range, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Round to 256 steps between the limits, one of which is zero."""
    low, high = limits
    step = max(high - low, 1e-12) / 255
    return (torch.fake_quantize_per_tensor_affine(inputs[0], step, round(-low / step), 0, 255),)


def _energies(outputs: Sequence[Tensor]) -> Tensor:
    return torch.stack([output.double().square().sum() for output in outputs])


def _decibels(signal: Tensor, noise: Tensor) -> float:
    """Return the ratio of the worst output in decibels; 200 where there is no noise."""
    ratio = torch.where(noise == 0, torch.inf, signal / noise)
    return float((10 * ratio.log10()).clamp(max=200).min())
