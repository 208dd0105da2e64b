"""The client of benchmarks/serving.py: connections that ask for predictions, in a process without PyTorch.

    python benchmarks/serving_client.py '{"address": "http://127.0.0.1:8000", "images": "FOLDER", "connections": 32,
        "seconds": 10}'

prints statuses, latencies and its own processor time as JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


async def load(job: dict[str, Any]) -> dict[str, Any]:
    """Ask for `seconds` over some connections: each as fast as it is answered, or all together at `rate` a second."""
    target = urlsplit(job["address"])
    bodies = itertools.cycle([path.read_bytes() for path in sorted(Path(job["images"]).iterdir())])
    start = time.perf_counter()
    end, rate = start + job["seconds"], job.get("rate")
    numbers = itertools.count()
    statuses: Counter[str] = Counter()
    latencies: list[float] = []
    lost: list[str] = []
    cpu = time.process_time()

    async def connection() -> None:
        while time.perf_counter() < end:
            try:
                reader, writer = await asyncio.open_connection(target.hostname, target.port)
            except OSError:
                statuses["not accepted"] += 1
                if job.get("until_refused"):
                    return
                await asyncio.sleep(0.05)
                continue
            try:
                while time.perf_counter() < end:
                    number = next(numbers)
                    if rate is not None and (early := start + number / rate - time.perf_counter()) > 0:
                        await asyncio.sleep(early)
                    begin = time.perf_counter()
                    try:
                        status, closing = await ask(reader, writer, next(bodies), f"load-{number}")
                    except (OSError, EOFError, ValueError):
                        lost.append(f"load-{number}")
                        break
                    statuses[str(status)] += 1
                    if status == 200:
                        latencies.append(time.perf_counter() - begin)
                    if closing:
                        break
            finally:
                writer.close()

    await asyncio.gather(*(connection() for _ in range(job["connections"])))
    took = time.perf_counter() - start
    latencies.sort()
    return {
        "seconds": took,
        "statuses": dict(statuses),
        "lost": lost,
        "images_per_second": statuses["200"] / took,
        "cpu_seconds": time.process_time() - cpu,
        "latencies_ms": [round(latency * 1e3, 2) for latency in latencies],
    }


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes, request_id: str
) -> tuple[int, bool]:
    """Send one image. Returns the status and whether the connection ends."""
    head = f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nX-Request-ID: {request_id}\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    told = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(told.partition(b"content-length:")[2].partition(b"\r\n")[0])
    answer = await reader.readexactly(length)
    status = int(told.split(None, 2)[1])
    if status == 200 and not answer.startswith(b'{"model"'):
        raise ValueError("not an answer")
    return status, b"connection: close" in told


if __name__ == "__main__":
    # A connection is an open file.
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
    print(json.dumps(asyncio.run(load(json.loads(sys.argv[1])))))
