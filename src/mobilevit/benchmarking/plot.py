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
_SCORES = {"top1": "top-1 accuracy", "ap": "average precision", "miou": "mean IoU"}


def save_plot(report: BenchmarkReport, path: Path) -> None:
    """Write the plot: a row for each case, the fastest on top; whiskers span half of the runs."""
    cases = [report.of_case(case) for case in report.cases]
    name = next((name for m in report.measurements for name in m.metrics), "")
    known = {_score(m, name) for m in report.measurements} - {None}
    # A single published figure compares nothing.
    scored = bool(name) or len(known) > 1
    heights = [max(1.0 + 0.3 * len(measurements), 3.2 if scored else 0.0) for measurements in cases]
    figure = new_figure(15 if scored else 9, sum(heights) + 0.6)
    grid = figure.subplots(len(cases), 1 + scored, squeeze=False, height_ratios=heights)
    for row, case, measurements in zip(grid, report.cases, cases, strict=True):
        _bars(row[0], measurements)
        row[0].set_title(report.title(case), loc="left", fontsize=10)
        if scored:
            row[1].set_ylabel(_SCORES.get(name, name) if name else "published ImageNet top-1")
            _speed_and_score(row[1], measurements, name)
    figure.suptitle(f"{report.model}: {report.machine.processor}, {report.date}", fontsize=11, parse_math=False)
    save_figure(figure, path)


def _score(measurement: Measurement, name: str) -> float | None:
    """Look up the measured accuracy, or else the published."""
    return measurement.metrics.get(name) if name else measurement.contender.network.published_top1


def _bars(axes: Axes, measurements: Sequence[Measurement]) -> None:
    batch_size = measurements[0].contender.batch_size
    speeds = [m.images_per_second for m in measurements]
    # The slower quartile of the times is the lower one of the speeds.
    slow, fast = ([batch_size / m.quartiles_ms[end] * 1e3 for m in measurements] for end in (1, 0))
    errors = [
        [max(speed - end, 0.0) for speed, end in zip(speeds, slow, strict=True)],
        [max(end - speed, 0.0) for speed, end in zip(speeds, fast, strict=True)],
    ]
    bars = axes.barh(
        range(len(measurements)),
        speeds,
        xerr=errors,
        color=[_OURS if m.contender.network.origin == "mobilevit" else _OTHERS for m in measurements],
        error_kw={"ecolor": "#404040", "elinewidth": 1, "capsize": 2.5},
    )
    labels = [
        f"{digits(m.images_per_second)}/s, {digits(m.median_ms)} ms"
        + ("" if m.speedup is None else f", {m.speedup:.2f} x")
        for m in measurements
    ]
    axes.bar_label(bars, labels, padding=5, fontsize=8.5)
    axes.set_yticks(range(len(measurements)), [m.contender.name for m in measurements], fontsize=9, parse_math=False)
    axes.set_ylim(len(measurements) - 0.4, -0.6)
    axes.margins(x=0.35)
    baseline = next((m.contender.name for m in measurements if m.speedup == 1), "")
    axes.set_xlabel("images/s" + (f"   (x: times as fast as {baseline})" if baseline else ""), parse_math=False)


def _speed_and_score(axes: Axes, measurements: Sequence[Measurement], name: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter, StrMethodFormatter

    shown = [(m, score) for m in measurements if (score := _score(m, name)) is not None]
    if not shown:
        axes.set_axis_off()
        return
    engines = list(dict.fromkeys(m.contender.engine for m, _ in shown))
    colors = {e: [part / 255 for part in rgb] for e, rgb in zip(engines, class_colors(len(engines)), strict=True)}
    labeled: set[str] = set()
    for m, score in shown:
        contender = m.contender
        axes.plot(m.median_ms, score, _MARKERS[contender.precision], color=colors[contender.engine], markersize=8)
        if contender.network.label not in labeled:  # where it is fastest, as these are sorted
            labeled.add(contender.network.label)
            axes.annotate(
                contender.network.label,
                (m.median_ms, score),
                xytext=(0, 7),
                textcoords="offset points",
                fontsize=8.5,
                parse_math=False,
            )
    axes.set_xscale("log")
    axes.margins(0.2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.25)
    axes.set_xlabel("ms per batch")
    precisions = dict.fromkeys(m.contender.precision for m, _ in shown)
    handles = [Line2D([], [], color=colors[e], marker="o", linestyle="", label=e) for e in engines]
    handles += [Line2D([], [], color="#606060", marker=_MARKERS[p], linestyle="", label=p) for p in precisions]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5, frameon=False)
