"""All that a GPU must prove and show, in order of worth: one command for a machine that is there for some minutes.

    python benchmarks/gpu_session.py --rehearse        # on the CPU, tiny, on drawn images: two minutes
    python benchmarks/gpu_session.py --budget 480      # on the GPU: tests, inference, training
    python benchmarks/gpu_session.py --budget 270 --imagenette FOLDER --stages imagenette
    python benchmarks/gpu_session.py --budget 600 --cifar10 FOLDER --stages cifar10

Each stage runs in processes of its own and within a time of its own, prints its tables and writes its result file as
soon as it has figures, so that a cut-off loses little; one that fails stops no other. While the tests run, which are
not timed, what later stages compile is compiled beside them, into the compiler's cache. gpu_session.json says how each
stage went; the exit status is 0 if all passed. Without --stages, all run that have their data.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import record

ROOT = Path(__file__).resolve().parent.parent
WARMER_SECONDS = 25.0
"""How long the first timed stage waits for what is still being compiled."""

LEAST_SECONDS = 20.0
"""A stage with less is not begun."""

Command = list[str]
Processes = list[subprocess.Popen[bytes]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the stages are told."""

    out: Path
    """Folder of the result files."""
    folder: Path
    """For what nobody keeps."""
    data: dict[str, list[Path]]
    """Folders with images, by stage."""
    rehearse: bool


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the session."""

    seconds: float
    """After which it is ended."""
    commands: Callable[[Job, float], list[Command]]
    """From the seconds it has: what is run, side by side."""
    to_compile: Callable[[Job], list[Command]] = lambda _: []
    """What fills the compiler's cache for it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES))
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for all")
    for name in NEED_DATA:
        parser.add_argument(f"--{name}", type=Path, nargs="+", metavar="FOLDER", help="see classification.py --data")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the result files")
    parser.add_argument("--no-warm-up", action="store_true", help="compile nothing beside the tests")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes, on drawn images")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.budget
    data = {name: [path.resolve() for path in getattr(arguments, name) or ()] for name in NEED_DATA}
    data = {name: paths for name, paths in data.items() if paths}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.rehearse:
            drawn = write_drawn(folder / "drawn")
            data = {stage: data.get(stage, [drawn]) for stage in NEED_DATA}
        names = arguments.stages or [stage for stage in STAGES if stage in data or stage not in NEED_DATA]
        if lacking := [f"--{stage}" for stage in names if stage in NEED_DATA and stage not in data]:
            parser.error(f"give {' and '.join(lacking)}")
        job = Job(out=arguments.out.resolve(), folder=folder, data=data, rehearse=arguments.rehearse)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what was started, as an exception does
        sys.exit(run(names, job, end, warm_up=not arguments.no_warm_up))


def run(names: Sequence[str], job: Job, end: float, *, warm_up: bool) -> int:
    """Run stages one after the other; returns the exit status."""
    found: dict[str, Any] = {}

    def run_one(name: str) -> None:
        found[name] = run_stage(name, job, end)
        if name == "tests":
            found[name] |= tests_of(job)
        record.write("gpu_session", {"stages": found}, job.out)

    waiting = list(names)
    if waiting[0] == "tests":
        with warmers(waiting, job, end) if warm_up else nullcontext():
            run_one(waiting.pop(0))
    for name in waiting:
        run_one(name)
    print()
    for name, told in found.items():
        print(f"{name:12s} {told['status']:10s} {told['seconds']:7.1f} s", flush=True)
    return int(any(told["status"] != "passed" for told in found.values()))


def run_stage(name: str, job: Job, end: float) -> dict[str, Any]:
    """Run one stage in the time that is left for it."""
    start = time.monotonic()
    seconds = min(STAGES[name].seconds, end - start)
    if seconds < LEAST_SECONDS:
        return {"status": "no time", "seconds": 0.0}
    print(f"\n=== {name}, at most {seconds:.0f} s ===", flush=True)
    with running(STAGES[name].commands(job, seconds)) as processes:
        ended = wait_for(processes, start + seconds)
    statuses = [process.returncode for process in processes]
    status = "timed out" if not ended else "failed" if any(statuses) else "passed"
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "exit_statuses": statuses}


# -- processes --------------------------------------------------------------------------------------------------------


@contextmanager
def running(commands: Sequence[Command], output: int | None = None) -> Iterator[Processes]:
    """Start commands side by side, and end in the end what is left of them."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    processes = [
        subprocess.Popen(line, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True)
        for line in commands
    ]
    try:
        yield processes
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, number)  # with what it has started
            wait_for(processes, time.monotonic() + 5)


def wait_for(processes: Processes, until: float) -> bool:
    """Wait until all have ended, or some moment; returns whether they have."""
    while any(process.poll() is None for process in processes):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


@contextmanager
def warmers(names: Sequence[str], job: Job, end: float) -> Iterator[None]:
    """Compile beside the body what stages will need; none of it goes on afterwards, when times are taken."""
    few_threads = ["env", "TORCHINDUCTOR_COMPILE_THREADS=4"]
    commands = [[*few_threads, *line] for name in names for line in STAGES[name].to_compile(job)]
    with running(commands, subprocess.DEVNULL) as processes:
        yield
        start = time.monotonic()
        done = wait_for(processes, min(start + WARMER_SECONDS, end - 120))
        statuses = [process.returncode for process in processes]  # None: still at it
        print(f"waited {time.monotonic() - start:.0f} s for the compiler: {statuses}", flush=True)
        if job.rehearse and (not done or any(statuses)):
            raise SystemExit("what compiles beside the tests failed")


# -- stages -----------------------------------------------------------------------------------------------------------


def script(name: str, *arguments: object) -> Command:
    return [sys.executable, f"benchmarks/{name}.py", *map(str, arguments)]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tests(job: Job, _: float) -> list[Command]:
    line = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "tests/gpu", "--junitxml", str(job.folder / "tests.xml")]
    if job.rehearse:  # the other tasks take the same ways
        only = "classification and not resumed and not says and not falls"
        return [["env", "MOBILEVIT_GPU_TESTS_DEVICE=cpu", *line, "-k", only]]
    at_once = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    return [["env", "OMP_NUM_THREADS=4", *line, *at_once]]


def tests_of(job: Job) -> dict[str, Any]:
    """Write the result file of the tests; returns how many passed, failed and were skipped."""
    path = job.folder / "tests.xml"
    if not path.exists():
        return {}
    outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    seconds: dict[str, float] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name, told = str(case.get("name")), {child.tag: child.get("message") or "" for child in case}
        kind = "failed" if {"failure", "error"} & told.keys() else "skipped" if "skipped" in told else "passed"
        message = "; ".join(" ".join(message.split())[:300] for message in told.values())
        outcomes[kind].append(name if kind == "passed" else f"{name}: {message}")
        seconds[name] = float(case.get("time") or 0)
    slowest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:10]
    record.write("gpu_tests", {**outcomes, "slowest": {name: seconds[name] for name in slowest}}, job.out)
    return {kind: len(names) for kind, names in outcomes.items()}


TINY = ("--device", "cpu", "--models", "mobilevit_xxs", "--size", 64)
TINY_INFERENCE = (*TINY, "--batch", 1, "--precisions", "fp32", "--rounds", 2, "--backend", "aot_eager")
TINY_TRAINING = (*TINY, "--batch", 4, "--images", 16, "--rounds", 1, "--steps", 1, "--no-compile")


def inference(job: Job, seconds: float) -> list[Command]:
    quick = TINY_INFERENCE if job.rehearse else ()
    return [script("gpu_inference", "--out", job.out, "--seconds", round(seconds - 15), *quick)]


def compile_inference(job: Job) -> list[Command]:
    models = ("mobilevit_s", "mobilevit_xxs", "mobilevitv2_100")
    told = [TINY_INFERENCE] if job.rehearse else [("--models", model) for model in models]
    return [script("gpu_inference", "--compile-only", *which) for which in told]


def training(job: Job, seconds: float) -> list[Command]:
    quick = TINY_TRAINING if job.rehearse else ()
    return [script("gpu_training", "--out", job.out, "--seconds", round(seconds - 20), *quick)]


def compile_training(job: Job) -> list[Command]:
    sides = ("mobilevit, compiled", "timm channels_last, compiled")
    models = ("mobilevit_s", "mobilevit_xxs")
    told = [TINY_TRAINING] if job.rehearse else [("--models", model) for model in models]
    return [script("gpu_training", "--compile-only", *which, "--sides", side) for which in told for side in sides]


def imagenette(job: Job, seconds: float) -> list[Command]:
    """Both models side by side: the smaller one leaves most of the GPU idle."""
    models = ("mobilevit_xxs",) if job.rehearse else ("mobilevit_xxs", "mobilevit_s")
    shared = (*classified(job, "imagenette"), "--fit", round(seconds - 20))
    workers = max(1, (cores() - 2) // 2)
    return [script("classification", *shared, "--model", model, "--num-workers", workers) for model in models]


def cifar10(job: Job, seconds: float) -> list[Command]:
    fit = ("--epochs", 1) if job.rehearse else ("--fit", round(seconds - 20))
    return [script("classification", *classified(job, "cifar10"), *fit)]


def classified(job: Job, name: str) -> tuple[object, ...]:
    tiny = ("--device", "cpu", "--image-size", 32, "--batch-size", 6, "--epochs", 1, "--no-compile")
    return (name, "--data", *job.data[name], "--out", job.out, *(tiny if job.rehearse else ()))


STAGES: dict[str, Stage] = {
    "tests": Stage(seconds=110, commands=tests),
    "inference": Stage(seconds=185, commands=inference, to_compile=compile_inference),
    "training": Stage(seconds=150, commands=training, to_compile=compile_training),
    "imagenette": Stage(seconds=560, commands=imagenette),
    "cifar10": Stage(seconds=600, commands=cifar10),
}
"""In order of worth."""

NEED_DATA = ("imagenette", "cifar10")


def write_drawn(folder: Path) -> Path:
    """Write train.parquet and val.parquet of drawn shapes."""
    import io

    import pyarrow
    from pyarrow import parquet

    from mobilevit.data.shapes import render_scene

    folder.mkdir()
    for part, seed in (("train", 0), ("val", 1)):
        columns: dict[str, list[Any]] = {"image": [], "label": []}
        for number in range(18):
            encoded = io.BytesIO()
            scene = render_scene(number, seed=seed, size=32)
            scene.image.save(encoded, "JPEG")
            columns["image"].append(encoded.getvalue())
            columns["label"].append(f"class {number % 6}")
        parquet.write_table(pyarrow.table(columns), folder / f"{part}.parquet")
    return folder


if __name__ == "__main__":
    main()
