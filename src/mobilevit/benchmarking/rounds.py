"""Timing in turns: every contender has its own process, and a slow moment of the machine meets all of them.

A process loads its contender, warms it up, and waits; only one works at a time. When memory is short, contenders run in
groups, each with the same baseline.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from mobilevit.benchmarking.contenders import Contender
from mobilevit.benchmarking.measurement import Failure, Measurement
from mobilevit.benchmarking.worker import Loaded, Turn, Worker, WorkerError
from mobilevit.machine import free_memory
from mobilevit.progress import Progress
from mobilevit.results.base import Array

_TURN_MS = 200.0
"""About how long a contender works in each round."""
_MOST_RUNS = 100


@dataclass(kw_only=True, eq=False)
class _Entry:
    """A contender whose process is there."""

    contender: Contender
    worker: Worker
    loaded: Loaded
    deviation: float | None
    turns: list[Turn] = field(default_factory=list)

    @property
    def medians(self) -> list[float]:
        return [statistics.median(turn.times_ms) for turn in self.turns]


def measure(
    contenders: Sequence[Contender], *, rounds: int, max_workers: int | None = None, label: str = "time"
) -> tuple[list[Measurement], list[Failure]]:
    """Time contenders side by side, each in `rounds` turns; the first is the baseline of the others.

    At most `max_workers` processes wait at a time, or as many as memory allows. Results are in the contenders' order.
    """
    results: dict[Contender, Measurement | Failure] = {}
    references: dict[str, list[Array]] = {}
    with Progress(label, rounds * len(contenders), "turns") as progress:
        while waiting := [contender for contender in contenders if contender not in results]:
            with ExitStack() as group:
                entries: list[_Entry] = []
                for contender in dict.fromkeys([contenders[0], *waiting]):
                    if not _has_room(entries, max_workers):
                        break
                    try:
                        entries.append(_start(contender, references, group))
                    except WorkerError as error:
                        results.setdefault(contender, Failure(contender=contender, reason=str(error)))
                        progress.advance(rounds)
                for number in range(rounds):
                    for entry in list(entries):
                        contender, run_ms = entry.contender, max(min(entry.loaded.warm_up.times_ms), 1e-3)
                        runs = max(1, min(_MOST_RUNS, round(_TURN_MS / run_ms)))
                        try:
                            entry.turns.append(entry.worker.ask("time", runs))
                            progress.advance(int(contender not in results), contender.name)
                        except WorkerError as error:
                            results.setdefault(contender, Failure(contender=contender, reason=str(error)))
                            entries.remove(entry)
                            progress.advance(rounds - number)
                baseline = next((entry for entry in entries if entry.contender == contenders[0]), None)
                for entry in entries:
                    results.setdefault(entry.contender, _result(entry, baseline))
    ordered = [results[contender] for contender in contenders]
    return [r for r in ordered if isinstance(r, Measurement)], [r for r in ordered if isinstance(r, Failure)]


def _has_room(entries: Sequence[_Entry], max_workers: int | None) -> bool:
    if len(entries) < 2:
        return True  # somebody must be measured, and beside the baseline
    if max_workers is not None:
        return len(entries) < max_workers
    free = free_memory()
    return free is None or free > 1.5 * max(10**9, *(entry.loaded.warm_up.memory for entry in entries))


def _start(contender: Contender, references: dict[str, list[Array]], group: ExitStack) -> _Entry:
    """Start a process, and compare the answers with those of plain PyTorch in float32, which starts first."""
    worker = Worker(contender.threads)
    group.callback(worker.close)
    loaded: Loaded = worker.ask("load", contender)
    weights = contender.network.weights
    if (contender.engine, contender.precision) == ("eager", "fp32"):
        references.setdefault(weights, [*loaded.answers])
    deviation = _deviation(loaded.answers, references.get(weights))
    loaded.answers.clear()
    return _Entry(contender=contender, worker=worker, loaded=loaded, deviation=deviation)


def _result(entry: _Entry, baseline: _Entry | None) -> Measurement:
    times = [time for turn in entry.turns for time in turn.times_ms]
    fastest, low, high, slowest = np.quantile(times, [0, 0.25, 0.75, 1]).round(4).tolist()
    speedup = None
    if baseline is not None:
        ratios = [reference / own for reference, own in zip(baseline.medians, entry.medians, strict=True)]
        speedup = round(statistics.median(ratios), 4)
    return Measurement(
        contender=entry.contender,
        median_ms=round(statistics.median(entry.medians), 4),
        quartiles_ms=(low, high),
        fastest_ms=fastest,
        slowest_ms=slowest,
        runs=len(times),
        rounds=len(entry.turns),
        speedup=speedup,
        start_s=entry.loaded.seconds,
        memory=entry.turns[-1].memory,
        gpu_memory=entry.turns[-1].gpu_memory,
        weight_bytes=entry.loaded.weight_bytes,
        deviation=entry.deviation,
    )


def _deviation(answers: Sequence[Array], reference: Sequence[Array] | None) -> float | None:
    if reference is None or [a.shape for a in answers] != [b.shape for b in reference]:
        return None
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(answers, reference, strict=True)]
    return float(f"{max(float(abs(a - b).max() / max(abs(b).max(), 1e-12)) for a, b in pairs):.3g}")
