"""`mobilevit serve` under load, overload, nonsense, signals and kills.

    python benchmarks/serving.py all --data IMAGES

or one of the parts: throughput, overload, fuzz, schemathesis (pip install schemathesis), sigterm, kill. Each part
writes its own place in results/serving.json. IMAGES is a folder of JPEGs; drawings stand in for it. The model
is an XXS at 256 x 256 with fresh weights: how long it takes does not depend on them.

Throughput is measured in turns, a few seconds each, several rounds: the server under load, the engine alone (batches
that lie in memory ready made), and `Predictor.stream` (the same JPEGs, read and resized). Server, engine and stream are
each as many processes as there are cores, with one thread each, so that all have the same computation; the client is
one more process on the same cores. 85 % of the engine's throughput is the aim.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch

import mobilevit
import record
from mobilevit.data.shapes import render_scene
from mobilevit.files import write_json
from mobilevit.imaging.decode import find_images
from mobilevit.machine import available_cores

PARTS = ("throughput", "overload", "fuzz", "schemathesis", "sigterm", "kill")
CORES = available_cores()
CONNECTIONS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*PARTS, "all", "side"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--engines", nargs="+", default=["torch", "tuned"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=10.0, help="of load in a round of throughput")
    parser.add_argument("--minutes", type=float, default=10.0, help="of overload")
    parser.add_argument("--uploads", type=int, default=10_000, help="of the fuzz")
    parser.add_argument("--job", help="for side, which runs in processes of its own")
    arguments = parser.parse_args()
    if arguments.part == "side":
        side(json.loads(arguments.job))
        return
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(Path(folder), arguments.data)
        for part in PARTS if arguments.part == "all" else (arguments.part,):
            figures = {
                "throughput": lambda: throughput(setup, arguments.engines, arguments.rounds, arguments.seconds),
                "overload": lambda: overload(setup, arguments.minutes),
                "fuzz": lambda: fuzz(setup, arguments.uploads),
                "schemathesis": lambda: schemathesis(setup),
                "sigterm": lambda: sigterm(setup),
                "kill": lambda: kill(setup),
            }[part]()
            print(part, json.dumps(figures, indent=1), flush=True)
            keep(part, figures)


def keep(part: str, figures: dict[str, Any]) -> None:
    """Write one part of the result file, with its own date and command."""
    path = record.RESULTS / "serving.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    record.write("serving", {})
    now = json.loads(path.read_text())
    names = ("fastapi", "uvicorn", "starlette", "httptools", "uvloop", "prometheus-client", "schemathesis")
    now["packages"] |= {name: version for name in names if (version := record.version_of(name))}
    now.pop("command")
    told = {"command": record.command(), "date": now["date"], **figures}
    write_json(path, {**now, "parts": {**before.get("parts", {}), part: told}})


class Setup:
    """A checkpoint and images to send."""

    def __init__(self, folder: Path, data: Path | None) -> None:
        self.folder, self.images = folder, folder / "images"
        self.images.mkdir()
        torch.manual_seed(0)
        self.checkpoint = mobilevit.save(mobilevit.create_model("mobilevit_xxs"), folder / "xxs.safetensors")
        if data is None:
            for number in range(64):
                render_scene(number, size=256).image.save(self.images / f"{number}.jpg", quality=90)
        else:
            jpegs = [path for path in find_images(data) if path.suffix.lower() in (".jpg", ".jpeg")]
            for number, path in enumerate(jpegs[:: max(1, len(jpegs) // 256)][:256]):
                shutil.copy(path, self.images / f"{number}.jpg")
        self.files = find_images(self.images)

    def describe(self) -> dict[str, Any]:
        from PIL import Image

        sizes = [Image.open(path).size for path in self.files]
        return {
            "images": len(self.files),
            "median_size": [statistics.median(side) for side in zip(*sizes, strict=True)],
            "median_kilobytes": round(statistics.median(path.stat().st_size for path in self.files) / 1e3, 2),
        }


class Server:
    """`mobilevit serve` in processes of its own."""

    def __init__(self, checkpoint: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "mobilevit", "serve", str(checkpoint), "--port", "0", *arguments]
        self.start = time.perf_counter()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115, lives as long as the process
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        if not said.startswith("serving at"):
            raise RuntimeError(f"the server did not start: {self.lines()}")
        self.seconds_to_start = time.perf_counter() - self.start
        self.address = said.split()[-1]
        self.parent = psutil.Process(self.process.pid)

    def lines(self) -> list[str]:
        self.log.seek(0)
        return self.log.read().splitlines()

    def processes(self) -> list[psutil.Process]:
        return [self.parent, *self.parent.children(recursive=True)]

    def cpu_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.processes())

    def megabytes(self) -> float:
        return sum(process.memory_info().rss for process in self.processes()) / 1e6

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()


# -- the client -------------------------------------------------------------------------------------------------------


def start_load(server: Server, setup: Setup, **job: Any) -> subprocess.Popen[str]:
    told = {"address": server.address, "images": str(setup.images), "connections": CONNECTIONS, **job}
    command = [sys.executable, str(Path(__file__).with_name("serving_client.py")), json.dumps(told)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish_load(process: subprocess.Popen[str]) -> dict[str, Any]:
    told, _ = process.communicate()
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    return found


def percentiles(latencies_ms: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(latencies_ms, n=100, method="inclusive")
    return {"p50_ms": cuts[49], "p95_ms": cuts[94], "p99_ms": cuts[98]}


# -- throughput -------------------------------------------------------------------------------------------------------


def side(job: dict[str, Any]) -> None:
    """One process of the engine alone or of the stream: waits for a line with seconds, answers with images/s."""
    predictor = mobilevit.Predictor(job["checkpoint"], threads=1, engine=job["engine"], batch_size=16)
    encoded = [path.read_bytes() for path in find_images(Path(job["images"]))]
    ready = [predictor.prepare(data, "image") for data in encoded[:16]]
    ready = (ready * 16)[:16]
    predictor.compute(ready)
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, count, start = float(line), 0, time.perf_counter()
        if job["what"] == "engine":
            while time.perf_counter() - start < seconds:
                count += len(predictor.compute(ready))
        else:
            for _ in predictor.stream(itertools.cycle(encoded)):
                count += 1
                if count % 16 == 0 and time.perf_counter() - start >= seconds:
                    break
        print(count / (time.perf_counter() - start), flush=True)


class Side:
    """As many processes as there are cores."""

    def __init__(self, what: str, checkpoint: Path, engine: str, setup: Setup) -> None:
        told = {"what": what, "checkpoint": str(checkpoint), "engine": engine, "images": str(setup.images)}
        command = [sys.executable, __file__, "side", "--job", json.dumps(told)]
        pipe, env = subprocess.PIPE, {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        self.processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env) for _ in range(CORES)]
        for process in self.processes:
            self.read(process)

    def read(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline()

    def run(self, seconds: float) -> float:
        """Images a second of all together."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
        return sum(float(self.read(process)) for process in self.processes)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def throughput(setup: Setup, engines: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {"data": setup.describe(), "connections": CONNECTIONS, "cores": CORES}
    for name in engines:
        engine, checkpoint = "torch", setup.checkpoint
        if name == "tuned":
            engine, checkpoint = "auto", setup.folder / "tuned.safetensors"
            shutil.copy(setup.checkpoint, checkpoint)
            command = [sys.executable, "-m", "mobilevit", "tune", str(checkpoint), "--precisions", "fp32"]
            subprocess.run([*command, "--engines", "onnx", "--rounds", "5"], check=True, capture_output=True)
            found["tuned_engine"] = json.loads(checkpoint.with_name("tuned.tuned.json").read_text())["engine"]
        found[name] = compare(setup, checkpoint, engine, rounds, seconds)
        print(name, json.dumps(found[name]), flush=True)
    return found


def compare(setup: Setup, checkpoint: Path, engine: str, rounds: int, seconds: float) -> dict[str, Any]:
    sides = {what: Side(what, checkpoint, engine, setup) for what in ("engine", "stream")}
    speeds: dict[str, list[float]] = {"server": [], "engine": [], "stream": []}
    latencies: list[float] = []
    client_cpu = server_cpu = served = duration = 0.0
    statuses: Counter[str] = Counter()
    threads = ("--threads", "1", "--workers", str(CORES))
    try:
        with Server(checkpoint, "--engine", engine, *threads) as server:
            finish_load(start_load(server, setup, seconds=3))
            for _ in range(rounds):
                before = server.cpu_seconds()
                told = finish_load(start_load(server, setup, seconds=seconds))
                server_cpu += server.cpu_seconds() - before
                client_cpu += told["cpu_seconds"]
                duration += told["seconds"]
                served += told["statuses"].get("200", 0)
                statuses.update(told["statuses"])
                latencies += told["latencies_ms"]
                speeds["server"].append(told["images_per_second"])
                for what, processes in sides.items():
                    speeds[what].append(processes.run(seconds / 2))
            startup, memory = server.seconds_to_start, server.megabytes()
    finally:
        for processes in sides.values():
            processes.stop()
    medians = {what: statistics.median(values) for what, values in speeds.items()}
    shares = [s / e for s, e in zip(speeds["server"], speeds["engine"], strict=True)]
    return {
        "images_per_second": {what: round(value, 1) for what, value in medians.items()},
        "all_rounds": {what: [round(value, 1) for value in values] for what, values in speeds.items()},
        "share_of_engine": round(statistics.median(shares), 3),
        "share_of_stream": round(medians["server"] / medians["stream"], 3),
        **percentiles(latencies),
        "statuses": dict(statuses),
        "cpu_ms_per_image": {
            "server": round(server_cpu / served * 1e3, 2),
            "client": round(client_cpu / served * 1e3, 2),
            "engine": round(CORES / medians["engine"] * 1e3, 2),
            "stream": round(CORES / medians["stream"] * 1e3, 2),
        },
        "client_share_of_cpu": round(client_cpu / (duration * CORES), 3),
        "seconds_to_start": round(startup, 1),
        "megabytes_of_all_processes": round(memory),
    }


# -- overload ---------------------------------------------------------------------------------------------------------


def overload(setup: Setup, minutes: float) -> dict[str, Any]:
    """Four times the requests it can answer, and its memory meanwhile."""
    with Server(setup.checkpoint, "--workers", str(CORES), "--threads", "1") as server:
        finish_load(start_load(server, setup, seconds=3))
        capacity = finish_load(start_load(server, setup, seconds=15))["images_per_second"]
        rate = 4 * capacity
        client = start_load(server, setup, seconds=minutes * 60, rate=rate, connections=16 * CONNECTIONS)
        samples, start = [], time.perf_counter()
        while client.poll() is None and time.perf_counter() - start < minutes * 60:
            samples.append((time.perf_counter() - start, server.megabytes()))
            time.sleep(2)
        told = finish_load(client)
        status = server.stop()
        logged = sum('"path": "/v1/predict"' in line for line in server.lines())
    early = [size for at, size in samples if 60 <= at < 120] or [samples[len(samples) // 5][1]]
    late = [size for at, size in samples if at >= samples[-1][0] - 60]
    answered = sum(count for kind, count in told["statuses"].items() if kind.isdecimal())
    return {
        "minutes": minutes,
        "capacity_images_per_second": round(capacity, 1),
        "offered_per_second": round(rate, 1),
        "sent_per_second": round(answered / told["seconds"], 1),
        "answered_images_per_second": round(told["images_per_second"], 1),
        "statuses": told["statuses"],
        "lost": len(told["lost"]),
        "requests_in_the_log": logged,
        **percentiles(told["latencies_ms"]),
        "megabytes": {
            "second_minute": round(statistics.mean(early), 1),
            "last_minute": round(statistics.mean(late), 1),
            "growth": round(statistics.mean(late) / statistics.mean(early) - 1, 4),
        },
        "exit_status": status,
    }


# -- fuzz -------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def claimed_png(width: int, height: int, rows: int) -> bytes:
    """A PNG that says it is large and holds `rows` rows."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes((1 + 3 * width) * rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def mutations(setup: Setup, count: int) -> Iterator[tuple[str, bytes, bytes]]:
    """What was done, headers, body; hangs up early if the headers announce more than the body."""
    rng = random.Random(0)
    good = [path.read_bytes() for path in setup.files]
    bombs = [claimed_png(*size) for size in ((60_000, 60_000, 1), (20_000, 8_000, 1), (6_900, 7_000, 7_000))]
    for number in range(count):
        kind = rng.choice(("flipped", "truncated", "wrong type", "form", "broken form", "garbage", "length", "header"))
        if number % 250 == 0:
            kind = "bomb"
        elif number % 500 == 1:
            kind = "oversized"
        data, content_type, query = bytearray(rng.choice(good)), rng.choice(("image/jpeg", "image/png")), ""
        if kind == "flipped":
            for _ in range(rng.randint(1, 20)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == "truncated":
            del data[rng.randrange(len(data)) :]
        elif kind == "wrong type":
            content_type = rng.choice(("text/html", "application/json", "", "image/", "x" * 5000, "multipart/x"))
        elif kind == "garbage":
            data = bytearray(rng.randbytes(rng.randrange(4000)))
            query = rng.choice(("", "?top=-1", "?top=1e9", "?model=%00", "?min_score=inf", "?x=" + "y" * 2000))
        elif kind == "bomb":
            data = bytearray(bombs[number // 250 % 3])
        elif kind == "oversized":
            data = bytearray(21_000_000)
        elif kind in ("form", "broken form"):
            name = rng.choice(('"a.jpg"', '""', '"' + "n" * 3000 + '"', '"../../etc"', '"\xff"'))
            part = f'--b\r\nContent-Disposition: form-data; name="files"; filename={name}\r\n\r\n'.encode("latin-1")
            data = bytearray(part + data + b"\r\n" + part + rng.choice(good) + b"\r\n--b--\r\n")
            content_type = "multipart/form-data; boundary=b"
            if kind == "broken form":
                for _ in range(rng.randint(1, 10)):
                    data[rng.randrange(min(len(data), 120))] = rng.randrange(256)
                del data[rng.randrange(len(data)) :]
                content_type = rng.choice((content_type, "multipart/form-data", "multipart/form-data; boundary="))
        length = len(data) + (rng.choice((1, 100_000)) if kind == "length" else 0)
        head = f"POST /v1/predict{query} HTTP/1.1\r\nHost: a\r\nContent-Type: {content_type}\r\n"
        if kind == "header":
            head += rng.choice(
                ("X-Request-ID: \x01\x02\r\n", "Authorization: Basic x\r\n", "X-A: " + "b" * 9000 + "\r\n")
            )
        yield kind, f"{head}Content-Length: {length}\r\nConnection: close\r\n\r\n".encode("latin-1"), bytes(data)


def fuzz(setup: Setup, count: int) -> dict[str, Any]:
    """Mutated uploads; none may be answered by 5xx but a deliberate 503."""
    outcomes: dict[str, Counter[str]] = {}
    failures: list[str] = []

    async def run(address: str) -> None:
        target, todo = urlsplit(address), mutations(setup, count)

        async def client() -> None:
            for kind, head, body in todo:
                reader, writer = await asyncio.open_connection(target.hostname, target.port)
                try:
                    writer.write(head + body)
                    if kind == "length":
                        writer.write_eof()
                    answer = await asyncio.wait_for(reader.read(), 60)
                except OSError:
                    answer = b""
                finally:
                    writer.close()
                status = answer.split(None, 2)[1].decode() if answer else "connection closed"
                if status.startswith("5") and not (status == "503" and b"retry-after" in answer.lower()):
                    failures.append(f"{kind}: {answer[-200:]!r}")
                outcomes.setdefault(kind, Counter())[status] += 1

        await asyncio.gather(*(client() for _ in range(8)))

    with Server(setup.checkpoint, "--workers", str(CORES), "--threads", "1") as server:
        before = {process.pid for process in server.processes()}
        asyncio.run(run(server.address))
        survived = before == {process.pid for process in server.processes()}
        after = finish_load(start_load(server, setup, seconds=2))["statuses"]
        tracebacks = sum("traceback" in line for line in server.lines())
    return {
        "uploads": count,
        "outcomes": {kind: dict(sorted(counts.items())) for kind, counts in sorted(outcomes.items())},
        "server_errors": failures,
        "tracebacks_in_the_log": tracebacks,
        "same_processes_afterwards": survived,
        "good_images_afterwards": after,
    }


def schemathesis(setup: Setup) -> dict[str, Any]:
    """Requests made from the service's own OpenAPI document, answers checked against it."""
    with Server(setup.checkpoint, "--threads", str(CORES)) as server:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.address}/openapi.json"]
        command += ["--max-examples", "100", "--seed", "1"]
        # OpenAPI cannot say that x and y come together, nor that bytes must be an image.
        command += ["--exclude-checks", "positive_data_acceptance"]
        told = subprocess.run(command, capture_output=True, text=True, cwd=setup.folder)
        tracebacks = sum("traceback" in line for line in server.lines())
    lines = [line.strip() for line in told.stdout.splitlines()]
    summary = [line for line in lines[-40:] if any(word in line for word in ("cases", "tested", "failure", "issues"))]
    if told.returncode:
        print(told.stdout, told.stderr)
    return {"exit_status": told.returncode, "summary": summary, "tracebacks_in_the_log": tracebacks}


# -- signals ----------------------------------------------------------------------------------------------------------


def sigterm(setup: Setup, times: int = 5) -> dict[str, Any]:
    """SIGTERM under load, some times: what was accepted is answered."""
    runs = []
    for _ in range(times):
        with Server(setup.checkpoint, "--workers", str(CORES), "--threads", "1") as server:
            client = start_load(server, setup, seconds=60, until_refused=True)
            while sum("load-" in line for line in server.lines()) < 200:
                time.sleep(0.1)
            time.sleep(random.random())
            start = time.perf_counter()
            status = server.stop()
            took = time.perf_counter() - start
            told = finish_load(client)
            ids = {json.loads(line).get("request_id") for line in server.lines()}
        answered = sum(count for kind, count in told["statuses"].items() if kind.isdecimal())
        accepted = [request for request in told["lost"] if request in ids]
        runs.append(
            {
                "statuses": told["statuses"],
                "connections_reset_before_acceptance": len(told["lost"]) - len(accepted),
                "accepted_and_lost": len(accepted),
                "answered": answered,
                "seconds_to_stop": round(took, 2),
                "exit_status": status,
            }
        )
    return {"connections": CONNECTIONS, "workers": CORES, "runs": runs}


def kill(setup: Setup, times: int = 3) -> dict[str, Any]:
    """SIGKILL of a worker under load: how long until there are as many again, and what the clients saw."""
    runs = []
    for _ in range(times):
        with Server(setup.checkpoint, "--workers", str(CORES), "--threads", "1") as server:
            client = start_load(server, setup, seconds=20)
            time.sleep(5)
            workers = sorted(server.parent.children(), key=lambda process: process.memory_info().rss)
            os.kill(workers[-1].pid, signal.SIGKILL)
            start = time.perf_counter()
            back: list[float] = []

            def watch(server: Server = server, start: float = start, back: list[float] = back) -> None:
                while time.perf_counter() - start < 30:
                    if sum("ready in" in line for line in server.lines()) > CORES:
                        back.append(time.perf_counter() - start)
                        return
                    time.sleep(0.05)

            thread = threading.Thread(target=watch)
            thread.start()
            told = finish_load(client)
            thread.join()
        runs.append(
            {
                "seconds_until_replaced": round(back[0], 2) if back else None,
                "statuses": told["statuses"],
                "connections_that_died_with_it": len(told["lost"]),
            }
        )
    return {"workers": CORES, "runs": runs}


if __name__ == "__main__":
    main()
