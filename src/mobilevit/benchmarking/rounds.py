"""The method: every contender in a process of its own, timed in turns, so that a slow moment of the machine meets all.

A process is built and warmed up, then waits; one works at a time. When memory gets short, those who wait longest for a
place take theirs after the first have gone, beside the same baseline.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from mobilevit.benchmarking.contenders import Contender
from mobilevit.progress import Progress

log = logging.getLogger("mobilevit")

_TURN_MS = 200.0
"""About how long a contender works in each round."""
_MOST_RUNS = 100
_FIRST_GUESS = 1_000_000_000
"""Bytes a process may take, before any has told."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How fast a contender is, and what it takes."""

    contender: Contender
    median_ms: float
    """Of the medians of its turns, for a whole batch."""
    quartiles_ms: tuple[float, float]
    """Between which half of all runs lie."""
    fastest_ms: float
    slowest_ms: float
    runs: int
    rounds: int
    speedup: float | None
    """Times as fast as the baseline of its case: the median of the rounds' own ratios; None: the baseline failed."""
    start_s: float
    """From loading to the first answer, compilation included."""
    memory: int
    """Most bytes its process held, Python and PyTorch included."""
    gpu_memory: int | None
    """Most bytes of tensors on the GPU."""
    weight_bytes: int
    """Of the exported file, or of the weights in memory."""
    deviation: float | None
    """Largest difference of an answer from float32 PyTorch's on photographs, as a share of the largest answer."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Measured on labeled images, if there were any."""

    @property
    def images_per_second(self) -> float:
        """At this batch size."""
        return self.contender.batch_size / self.median_ms * 1e3

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return {**asdict(self), "images_per_second": round(self.images_per_second, 3)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measurement:
        """The inverse of `to_dict`."""
        known = {key: value for key, value in values.items() if key != "images_per_second"}
        low, high = known["quartiles_ms"]
        return cls(**{**known, "contender": Contender.from_dict(known["contender"]), "quartiles_ms": (low, high)})


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A contender that could not be measured."""

    contender: Contender
    reason: str
    """In one line."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Failure:
        """The inverse of `to_dict`."""
        return cls(contender=Contender.from_dict(values["contender"]), reason=values["reason"])


class WorkerError(RuntimeError):
    """A worker said that it cannot do something, or is no longer there; in one line."""


class Worker:
    """The parent's end of a worker process; use it as a context manager.

    Args:
        threads: that it may compute with.
    """

    def __init__(self, threads: int) -> None:
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mobilevit.benchmarking.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            # A group of its own: with it go the processes that torch.compile starts.
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            WorkerError: the answer is an error, or the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **details}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise WorkerError(self._obituary())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process and all it has started."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            log.debug("worker %d did not end by itself", self.pid)
        finally:
            if hasattr(os, "killpg"):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
            else:
                self._process.kill()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._said.close()

    def _obituary(self) -> str:
        code = self._process.wait()
        how = f"exit status {code}"
        if code < 0:
            how = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            if how == "SIGKILL":
                how += ", perhaps for want of memory"
        self._said.seek(0)
        words = [line.strip() for line in self._said.read().splitlines() if line.strip()]
        return f"its process ended ({how})" + (f": {words[-1][:200]}" if words else "")


@dataclass(kw_only=True)
class _Place:
    """A contender that is being measured."""

    contender: Contender
    worker: Worker
    loaded: dict[str, Any]
    runs: int
    turns: list[list[float]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)


def measure(
    contenders: Sequence[Contender], *, rounds: int, folder: Path, max_workers: int | None = None, label: str = "time"
) -> list[Measurement | Failure]:
    """Time contenders side by side; the first is the baseline of the others.

    Args:
        contenders: those who run exported files know where these lie.
        rounds: turns of each.
        folder: for the answers they give.
        max_workers: processes that may wait at a time, at least 2; None: as memory allows.
        label: for the progress.

    Returns:
        What came of each, in their order.
    """
    results: dict[int, Measurement | Failure] = {}
    waiting = list(enumerate(contenders))
    baseline: _Place | None = None
    with contextlib.ExitStack() as stack, Progress(label, rounds * len(contenders), "turns") as progress:
        while waiting:
            places: dict[int, _Place] = {}
            with contextlib.ExitStack() as group:
                while waiting and _has_room(places, baseline, max_workers):
                    number, contender = waiting.pop(0)
                    # The baseline stays for all groups.
                    keeper = stack if number == 0 else group
                    try:
                        place = _start(contender, keeper, folder / f"answers-{number}.npz")
                    except WorkerError as error:
                        results[number] = Failure(contender=contender, reason=str(error))
                        progress.advance(rounds)
                        continue
                    places[number] = place
                    baseline = place if number == 0 else baseline
                results.update(_go_round(places, baseline, rounds, progress))
                if isinstance(results.get(0), Failure):
                    baseline = None
    return [_with_deviation(results[number], number, contenders, folder) for number in range(len(contenders))]


def _start(contender: Contender, keeper: contextlib.ExitStack, answers: Path) -> _Place:
    worker = Worker(contender.threads)
    try:
        loaded = worker.ask("load", contender=contender.to_dict(), answers=str(answers))
    except BaseException:
        worker.close()
        raise
    keeper.callback(worker.close)
    runs = max(1, min(_MOST_RUNS, round(_TURN_MS / max(loaded["milliseconds"], 1e-3))))
    return _Place(contender=contender, worker=worker, loaded=loaded, runs=runs)


def _has_room(places: dict[int, _Place], baseline: _Place | None, max_workers: int | None) -> bool:
    present = [*places.values()]
    if baseline is not None and 0 not in places:
        present.append(baseline)
    if len(places) == 0 or len(present) < 2:
        return True  # somebody must be measured, and beside the baseline
    if max_workers is not None:
        return len(present) < max_workers
    free = free_memory()
    largest = max([_FIRST_GUESS, *(place.loaded["memory"] for place in present)])
    return free is None or free > 1.5 * largest


def _go_round(
    places: dict[int, _Place], baseline: _Place | None, rounds: int, progress: Progress
) -> Iterator[tuple[int, Measurement | Failure]]:
    """Turn by turn; then what came of each."""
    visiting = baseline if baseline is not None and 0 not in places else None
    beside: list[float] = []  # the baseline's time in each round
    alive = dict(places)
    for _ in range(rounds):
        reference = None
        if visiting is not None:
            try:
                reference = _turn(visiting)
            except WorkerError as error:
                log.warning("%s, the baseline: %s; later ones have no ratio", visiting.contender.name, error)
                visiting = None
        for number, place in list(alive.items()):
            try:
                median = _turn(place)
            except WorkerError as error:
                del alive[number]
                yield number, Failure(contender=place.contender, reason=str(error))
                continue
            if number == 0:
                reference = median
            progress.advance(1, place.contender.name)
        beside.append(float("nan") if reference is None else reference)
    for number, place in alive.items():
        yield number, _measurement(place, beside)


def _turn(place: _Place) -> float:
    place.last = place.worker.ask("time", runs=place.runs)
    place.turns.append(place.last["milliseconds"])
    return statistics.median(place.turns[-1])


def _measurement(place: _Place, beside: Sequence[float]) -> Measurement:
    turns = place.turns[-len(beside) :]
    medians = [statistics.median(turn) for turn in turns]
    ratios = [reference / own for reference, own in zip(beside, medians, strict=True)]
    times = sorted(time for turn in turns for time in turn)
    low, high = np.quantile(times, [0.25, 0.75]).tolist()
    speedup = statistics.median(ratios)
    return Measurement(
        contender=place.contender,
        median_ms=round(statistics.median(medians), 4),
        quartiles_ms=(round(low, 4), round(high, 4)),
        fastest_ms=round(times[0], 4),
        slowest_ms=round(times[-1], 4),
        runs=len(times),
        rounds=len(turns),
        speedup=None if np.isnan(ratios).any() else round(speedup, 4),
        start_s=place.loaded["seconds"],
        memory=place.last["memory"],
        gpu_memory=place.last["gpu_memory"],
        weight_bytes=place.loaded["weight_bytes"],
        deviation=None,
    )


def _with_deviation(
    result: Measurement | Failure, number: int, contenders: Sequence[Contender], folder: Path
) -> Measurement | Failure:
    """Beside plain PyTorch in float32 of the same weights, if that takes part."""
    if isinstance(result, Failure):
        return result
    same = result.contender.network.weights
    for other, contender in enumerate(contenders):
        if (contender.engine, contender.precision, contender.network.weights) == ("eager", "fp32", same):
            deviation = _deviation(folder / f"answers-{number}.npz", folder / f"answers-{other}.npz")
            return Measurement(**{**vars(result), "deviation": deviation})
    return result


def _deviation(answers: Path, reference: Path) -> float | None:
    if not reference.is_file():
        return None
    with np.load(answers) as ours, np.load(reference) as theirs:
        parts = [(ours[name].astype(np.float64), theirs[name].astype(np.float64)) for name in theirs.files]
    largest = [float(abs(a - b).max() / max(abs(b).max(), 1e-12)) for a, b in parts if a.shape == b.shape]
    return float(f"{max(largest):.3g}") if len(largest) == len(parts) else None


def free_memory() -> int | None:
    """Bytes that can still be taken without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    group = Path("/sys/fs/cgroup")
    try:  # a container may have less than the machine
        most = int((group / "memory.max").read_text(encoding="ascii"))
        taken = int((group / "memory.current").read_text(encoding="ascii"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return free
    left = most - taken + int(counts.get("inactive_file", 0))  # the kernel gives cached files up
    return left if free is None else min(free, left)
