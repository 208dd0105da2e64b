"""The plot of a benchmark: bars of images per second, and speed against accuracy if that is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mobilevit.benchmarking.measurement import BenchmarkReport, Measurement, digits
from mobilevit.imaging.drawing import class_colors
from mobilevit.plotting import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _OTHERS = "#1f5fa8", "#b0b0b0"
_MARKERS = {"fp32": "o", "bf16": "s", "fp16": "D", "int8": "^"}


def save_plot(report: BenchmarkReport, path: Path) -> None:
    """Write the plot: a row for each case, the fastest on top; whiskers span half of the runs."""
    cases = report.cases()
    metric = next((name for m in report.measurements for name in m.metrics), "")
    scores = {
        m.contender: m.metrics.get(metric) if metric else m.contender.network.published_top1
        for m in report.measurements
    }
    # A single published figure compares nothing.
    scored = bool(metric) or len({*scores.values()} - {None}) > 1
    heights = [max(1.0 + 0.3 * len(measurements), 3.2 if scored else 0.0) for measurements in cases.values()]
    figure = new_figure(15 if scored else 9, sum(heights) + 0.6)
    grid = figure.subplots(len(cases), 1 + scored, squeeze=False, height_ratios=heights)
    for row, (title, measurements) in zip(grid, cases.items(), strict=True):
        row[0].set_title(title, loc="left", fontsize=10)
        _draw_bars(row[0], measurements)
        if scored:
            row[1].set_ylabel(metric or "published ImageNet top-1")
            _draw_scores(row[1], [(m, score) for m in measurements if (score := scores[m.contender]) is not None])
    figure.suptitle(f"{report.model}: {report.machine.processor}, {report.date}", fontsize=11, parse_math=False)
    save_figure(figure, path)


def _draw_bars(axes: Axes, measurements: Sequence[Measurement]) -> None:
    places = range(len(measurements))
    bars = axes.barh(
        places,
        [m.images_per_second for m in measurements],
        color=[_OURS if m.contender.network.origin == "mobilevit" else _OTHERS for m in measurements],
    )
    for place, m in zip(places, measurements, strict=True):
        axes.plot([m.contender.batch_size / ms * 1e3 for ms in m.quartiles_ms], [place] * 2, "|-", color="#404040")
    labels = [
        f"{digits(m.images_per_second)}/s, {digits(m.median_ms)} ms"
        + ("" if m.speedup is None else f", {m.speedup:.2f} x")
        for m in measurements
    ]
    axes.bar_label(bars, labels, padding=12, fontsize=8.5)
    axes.set_yticks(places, [m.contender.name for m in measurements], fontsize=9, parse_math=False)
    axes.set_ylim(len(measurements) - 0.4, -0.6)
    axes.margins(x=0.35)
    baseline = next((m.contender.name for m in measurements if m.speedup == 1), "")
    axes.set_xlabel("images/s" + (f"   (x: times as fast as {baseline})" if baseline else ""), parse_math=False)


def _draw_scores(axes: Axes, scored: Sequence[tuple[Measurement, float]]) -> None:
    """Draw a point for each contender: color for the engine, shape for the precision, a label for the network."""
    engines = list(dict.fromkeys(m.contender.engine for m, _ in scored))
    colors = {e: [part / 255 for part in rgb] for e, rgb in zip(engines, class_colors(len(engines)), strict=True)}
    labeled: set[str] = set()
    for m, score in scored:
        network, engine, precision = m.contender.network.label, m.contender.engine, m.contender.precision
        axes.plot(m.median_ms, score, _MARKERS[precision], color=colors[engine], label=f"{engine} {precision}")
        if network not in labeled:  # where it is fastest, as these are sorted
            labeled.add(network)
            axes.text(m.median_ms, score, f" {network}", fontsize=8.5, va="bottom", parse_math=False)
    axes.set(xscale="log", xlabel="ms per batch")
    axes.margins(0.2)
    axes.grid(which="both", alpha=0.25)
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    axes.legend(once.values(), once, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5, frameon=False)
