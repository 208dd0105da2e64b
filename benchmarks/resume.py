"""Train, kill with SIGKILL at random moments, resume, and compare with a run that was never killed.

python benchmarks/resume.py --kills 10
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import record
from mobilevit.data.shapes import write_folder

SETTINGS = (
    "--image-size", "32", "--epochs", "6", "--batch-size", "8", "--num-workers", "1", "--checkpoint-minutes", "0",
    "--learning-rate", "1e-3", "--mixup", "0.2", "--device", "cpu",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        data, whole, killed = (Path(folder) / name for name in ("data", "whole", "killed"))
        write_folder(data, num_images=150, size=32)
        subprocess.run(command(data, whole), check=True)
        kills = corrupt = 0
        while kills < arguments.kills:
            resume = ("--resume",) if (killed / "config.json").exists() else ()
            if not start_and_kill(command(data, killed, *resume), killed / "last.pt"):
                break  # it ended before
            kills += 1
            corrupt += count_corrupt(killed)
        subprocess.run(command(data, killed, "--resume"), check=True)
        ours, theirs = load_file(killed / "best.safetensors"), load_file(whole / "best.safetensors")
        last = [torch.load(out / "last.pt", weights_only=True)["model"] for out in (killed, whole)]
        identical = all(torch.equal(ours[key], theirs[key]) for key in theirs)
        identical &= all(torch.equal(last[0][key], last[1][key]) for key in last[1])
    print(f"{kills} kills, {corrupt} corrupt files, weights identical: {identical}")
    record.write("resume", {"kills": kills, "identical": identical, "corrupt_files": corrupt})
    sys.exit(0 if identical and not corrupt else 1)


def command(data: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "mobilevit", "train", "--data", str(data), "--out", str(out), *SETTINGS, *more]


def start_and_kill(line: list[str], last: Path) -> bool:
    """Run until a random number of checkpoints were written, wait a random moment, kill; False if it ended before."""
    process = subprocess.Popen(line)
    wanted, seen = random.randint(1, 12), 0
    stamp = last.stat().st_mtime_ns if last.exists() else 0
    while process.poll() is None:
        now = last.stat().st_mtime_ns if last.exists() else 0
        seen, stamp = seen + (now != stamp), now
        if seen >= wanted:
            time.sleep(random.random() * 0.3)
            process.kill()
            process.wait()
            return True
        time.sleep(0.001)
    return False


def count_corrupt(out: Path) -> int:
    """Files of a killed run that cannot be read back."""
    corrupt = 0
    for path, read in ((out / "last.pt", torch.load), (out / "best.safetensors", load_file)):
        try:
            if path.exists():
                read(path)
        except (OSError, RuntimeError, SafetensorError):
            corrupt += 1
    return corrupt


if __name__ == "__main__":
    main()
