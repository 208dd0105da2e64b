"""The image of a benchmark: bars of images a second, and speed against accuracy where that is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilevit.benchmarking.report import BenchmarkReport, case_title
from mobilevit.benchmarking.rounds import Measurement
from mobilevit.files import write_atomically
from mobilevit.imaging.drawing import class_colors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _OTHERS = "#1f5fa8", "#b0b0b0"
_MARKERS = {"fp32": "o", "bf16": "s", "fp16": "D", "int8": "^"}
_BAR_INCHES = 0.3
_SCORES = {"top1": "top-1 accuracy", "ap": "average precision", "miou": "mean IoU"}


def save_plot(report: BenchmarkReport, path: Path) -> None:
    """Write the image: a row a case, the fastest on top; whiskers span half of the runs."""
    from matplotlib.figure import Figure

    cases = [(case, report.of_case(case)) for case in report.cases]
    scores, what = _scores(report)
    heights = [max(1.0 + _BAR_INCHES * len(measurements), 3.2 if scores else 0.0) for _, measurements in cases]
    figure = Figure(figsize=(15 if scores else 9, sum(heights) + 0.6), layout="constrained")
    grid = figure.subplots(len(cases), 2 if scores else 1, squeeze=False, height_ratios=heights)
    for row, (case, measurements) in zip(grid, cases, strict=True):
        baseline = next(
            (m.contender.name for m in report.measurements if m.contender.case == case and m.speedup == 1), ""
        )
        _bars(row[0], measurements, baseline)
        row[0].set_title(case_title(case, report.device), loc="left", fontsize=10)
        if scores:
            _speed_and_score(row[1], measurements, scores, what)
    figure.suptitle(f"{report.model}: {report.machine.processor}, {report.date}", fontsize=11, parse_math=False)
    write_atomically(path, lambda aside: figure.savefig(aside, dpi=120))


def _bars(axes: Axes, measurements: Sequence[Measurement], baseline: str) -> None:
    names = [measurement.contender.name for measurement in measurements]
    speeds = [measurement.images_per_second for measurement in measurements]
    # The slower quartile of the times is the lower one of the speeds.
    quartiles = [[m.contender.batch_size / ms * 1e3 for ms in m.quartiles_ms] for m in measurements]
    errors = [
        [max(speed - slow, 0.0) for speed, (_, slow) in zip(speeds, quartiles, strict=True)],
        [max(fast - speed, 0.0) for speed, (fast, _) in zip(speeds, quartiles, strict=True)],
    ]
    colors = [_OURS if m.contender.network.origin == "mobilevit" else _OTHERS for m in measurements]
    places = range(len(measurements))
    whiskers = {"ecolor": "#404040", "elinewidth": 1, "capsize": 2.5}
    axes.barh(places, speeds, xerr=errors, color=colors, height=0.72, error_kw=whiskers)
    axes.set_yticks(places, names, fontsize=9)
    axes.set_ylim(len(measurements) - 0.4, -0.6)
    reach = max(fast for fast, _ in quartiles)
    for place, measurement, (fast, _) in zip(places, measurements, quartiles, strict=True):
        text = f"{_short(measurement.images_per_second)}/s, {_short(measurement.median_ms)} ms"
        if measurement.speedup is not None:
            text += f", {measurement.speedup:.2f} x"
        end = max(fast, measurement.images_per_second)
        axes.text(end + 0.012 * reach, place, text, va="center", fontsize=8.5)
    axes.set_xlim(0, reach * 1.34)
    axes.set_xlabel("images a second" + (f"   (x: times as fast as {baseline})" if baseline else ""))
    axes.spines[["top", "right"]].set_visible(False)


def _scores(report: BenchmarkReport) -> tuple[dict[int, float], str]:
    """By the place of a measurement in the report: measured accuracy, or else the published, and what to call it."""
    measured = {id(m): next(iter(m.metrics.items())) for m in report.measurements if m.metrics}
    if measured:
        name = next(iter(measured.values()))[0]
        return {key: value for key, (_, value) in measured.items()}, _SCORES.get(name, name)
    published = {
        id(m): m.contender.network.published_top1
        for m in report.measurements
        if m.contender.network.published_top1 is not None
    }
    if len(set(published.values())) < 2:
        return {}, ""
    return {key: value for key, value in published.items() if value is not None}, "published ImageNet top-1"


def _speed_and_score(axes: Axes, measurements: Sequence[Measurement], scores: dict[int, float], what: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    shown = [m for m in measurements if id(m) in scores]
    if not shown:
        axes.set_axis_off()
        return
    engines = list(dict.fromkeys(m.contender.engine for m in shown))
    color = {
        engine: tuple(part / 255 for part in rgb)
        for engine, rgb in zip(engines, class_colors(len(engines)), strict=True)
    }
    precisions = list(dict.fromkeys(m.contender.precision for m in shown))
    points = [(m.median_ms, scores[id(m)]) for m in shown]
    axes.set_xscale("log")
    for m, (x, y) in zip(shown, points, strict=True):
        style: dict[str, Any] = {"color": color[m.contender.engine], "marker": _MARKERS[m.contender.precision]}
        axes.plot([x], [y], markersize=8, markeredgecolor="white", markeredgewidth=0.8, linestyle="", **style)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axes.set_xlim(min(xs) / 1.35, max(xs) * 1.35)
    margin = max(0.18 * (max(ys) - min(ys)), 0.004)
    axes.set_ylim(min(ys) - margin, max(ys) + margin)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("ms a batch")
    axes.set_ylabel(what)
    # Engines and precisions stand in the legend; beside the points only networks, each where it is fastest.
    networks = list(dict.fromkeys(m.contender.network.label for m in shown))
    if len(networks) > 1:
        for network in networks:
            own = sorted(p for m, p in zip(shown, points, strict=True) if m.contender.network.label == network)
            axes.plot([x for x, _ in own], [y for _, y in own], color="#c8c8c8", linewidth=1, zorder=1)
            x, y = own[0]
            axes.annotate(network, (x, y), xytext=(0, 7), textcoords="offset points", ha="left", fontsize=8.5)
    handles = [Line2D([], [], color=color[e], marker="o", linestyle="", label=e) for e in engines]
    if len(precisions) > 1:
        handles += [Line2D([], [], color="#606060", marker=_MARKERS[p], linestyle="", label=p) for p in precisions]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5, frameon=False)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
