"""Training on the CPU: one process with all threads against torchrun with one process a core, in turns, medians.

python benchmarks/processes.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import record
from mobilevit.data.shapes import write_folder

MODULE = ["-m", "mobilevit", "train"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--images", type=int, default=640)
    arguments = parser.parse_args()
    count = arguments.processes
    sides = {
        f"1 process, {count} threads": ([sys.executable], arguments.batch_size, count),
        f"{count} processes, 1 thread each": (
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)],
            arguments.batch_size // count,
            1,
        ),
    }
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        write_folder(data, num_images=arguments.images, size=arguments.image_size)
        for number in range(arguments.rounds):
            for side, (launcher, batch_size, threads) in sides.items():
                out = Path(folder, f"{number} {batch_size}")
                command = [
                    *launcher, *MODULE, "--data", str(data), "--out", str(out), "--batch-size", str(batch_size),
                    "--image-size", str(arguments.image_size), "--epochs", "2", "--num-workers", "0",
                    "--device", "cpu", "--learning-rate", "1e-3",
                ]  # fmt: skip
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                subprocess.run(command, check=True, capture_output=True, env=environment)
                row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
                speeds[side].append(row["images_per_second"])
                print(side, row["images_per_second"], flush=True)
    ratios = [two / one for one, two in zip(*speeds.values(), strict=True)]
    record.write(
        "processes",
        {
            "images_per_second": {side: round(statistics.median(found), 1) for side, found in speeds.items()},
            "rounds": speeds,
            "several over one": round(statistics.median(ratios), 3),
        },
    )


if __name__ == "__main__":
    main()
