"""Timing in turns: every contender has its own process, and a slow moment of the machine meets all of them.

A process loads its contender, warms it up, and waits; only one works at a time. When memory is short, the remaining
contenders follow in further groups, each beside the same baseline.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mobilevit.benchmarking.contenders import Contender
from mobilevit.benchmarking.measurement import Failure, Measurement
from mobilevit.benchmarking.worker import Array, Loaded, Turn
from mobilevit.machine import free_memory
from mobilevit.progress import Progress

log = logging.getLogger("mobilevit")

_TURN_MS = 200.0
"""About how long a contender works in each round."""
_MOST_RUNS = 100


class WorkerError(RuntimeError):
    """A worker could not do what it was asked, or has ended; in one line."""


class Worker:
    """A worker process, seen from its parent.

    Args:
        threads: it may compute with.
    """

    def __init__(self, threads: int) -> None:
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, see close()
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from mobilevit.benchmarking.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            # A group of its own, so that the processes of torch.compile end with it.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self.pid = self._process.pid

    def ask(self, method: str, *arguments: object) -> Any:
        """Call a method of `mobilevit.benchmarking.worker.Runner` there, and return its result.

        Raises:
            WorkerError: the method has failed, or the process has ended.
        """
        try:
            pickle.dump((method, arguments), self._requests)
            self._requests.flush()
            succeeded, result = pickle.load(self._replies)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            raise WorkerError(self._how_it_ended()) from None
        if not succeeded:
            raise WorkerError(result)
        return result

    def close(self) -> None:
        """End the process and all that it has started."""
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        for stream in (self._requests, self._replies, self._said):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        how = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
        how += ", perhaps out of memory" if how == "SIGKILL" else ""
        self._said.seek(0)
        words = [line.strip() for line in self._said if line.strip()]
        return f"its process ended ({how})" + (f": {words[-1][:200]}" if words else "")


@dataclass(kw_only=True)
class _Entry:
    """A contender whose process is there."""

    contender: Contender
    worker: Worker
    loaded: Loaded
    deviation: float | None
    turns: list[Turn] = field(default_factory=list)
    failure: str = ""

    @property
    def medians(self) -> list[float]:
        return [statistics.median(turn.times_ms) for turn in self.turns]


def measure(
    contenders: Sequence[Contender], *, rounds: int, max_workers: int | None = None, label: str = "time"
) -> list[Measurement | Failure]:
    """Time contenders side by side; the first is the baseline of the others.

    Args:
        contenders: those that run exported files know them.
        rounds: turns of each.
        max_workers: processes that may wait at a time, at least 2; None: as memory allows.
        label: of the progress bar.

    Returns:
        The result of each, in their order.
    """
    results: dict[Contender, Measurement | Failure] = {}
    waiting, references = deque(contenders), dict[str, list[Array]]()
    baseline: _Entry | None = None
    with contextlib.ExitStack() as stack, Progress(label, rounds * len(contenders), "turns") as progress:
        while waiting:
            entries = [] if baseline is None else [baseline]
            with contextlib.ExitStack() as group:
                while waiting and _has_room(entries, max_workers):
                    contender = waiting.popleft()
                    # The baseline stays for all groups.
                    keeper = stack if contender is contenders[0] else group
                    try:
                        entries.append(_start(contender, references, keeper))
                    except WorkerError as error:
                        results[contender] = Failure(contender=contender, reason=str(error))
                        progress.advance(rounds)
                _take_turns(entries, rounds, progress, counted=entries if baseline is None else entries[1:])
                if baseline is None and entries and entries[0].contender is contenders[0]:
                    baseline = entries[0]
                for entry in entries:
                    results.setdefault(entry.contender, _result(entry, baseline, rounds))
                if baseline is not None and baseline.failure:
                    log.warning("%s, the baseline: %s; no more ratios", baseline.contender.name, baseline.failure)
                    baseline = None
    return [results[contender] for contender in contenders]


def _start(contender: Contender, references: dict[str, list[Array]], keeper: contextlib.ExitStack) -> _Entry:
    """Start a process, and compare the answers with those of plain PyTorch in float32, which starts first."""
    worker = Worker(contender.threads)
    try:
        loaded: Loaded = worker.ask("load", contender)
    except BaseException:
        worker.close()
        raise
    keeper.callback(worker.close)
    if (contender.engine, contender.precision) == ("eager", "fp32"):
        references.setdefault(contender.network.weights, [*loaded.answers])
    deviation = _deviation(loaded.answers, references.get(contender.network.weights))
    loaded.answers.clear()
    return _Entry(contender=contender, worker=worker, loaded=loaded, deviation=deviation)


def _has_room(entries: Sequence[_Entry], max_workers: int | None) -> bool:
    if len(entries) < 2:
        return True  # somebody must be measured, and beside the baseline
    if max_workers is not None:
        return len(entries) < max_workers
    free = free_memory()
    return free is None or free > 1.5 * max(10**9, *(entry.loaded.warm_up.memory for entry in entries))


def _take_turns(entries: Sequence[_Entry], rounds: int, progress: Progress, counted: Sequence[_Entry]) -> None:
    for entry in entries:
        entry.turns = []
    for _ in range(rounds):
        for entry in entries:
            if entry.failure:
                continue
            runs = max(1, min(_MOST_RUNS, round(_TURN_MS / max(min(entry.loaded.warm_up.times_ms), 1e-3))))
            try:
                entry.turns.append(entry.worker.ask("time", runs))
            except WorkerError as error:
                entry.failure = str(error)
            progress.advance(int(entry in counted), entry.contender.name)


def _result(entry: _Entry, baseline: _Entry | None, rounds: int) -> Measurement | Failure:
    if entry.failure:
        return Failure(contender=entry.contender, reason=entry.failure)
    medians = entry.medians
    times = sorted(time for turn in entry.turns for time in turn.times_ms)
    low, high = np.quantile(times, [0.25, 0.75]).tolist()
    speedup = None
    if baseline is not None and len(baseline.turns) == rounds:
        ratios = [reference / own for reference, own in zip(baseline.medians, medians, strict=True)]
        speedup = round(statistics.median(ratios), 4)
    return Measurement(
        contender=entry.contender,
        median_ms=round(statistics.median(medians), 4),
        quartiles_ms=(round(low, 4), round(high, 4)),
        fastest_ms=round(times[0], 4),
        slowest_ms=round(times[-1], 4),
        runs=len(times),
        rounds=rounds,
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
