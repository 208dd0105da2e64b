"""The machine a program runs on, so that times measured on one are not taken for those of another."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The hardware and system that decide how fast a model runs."""

    processor: str
    cores: int
    """Cores this process may use."""
    system: str
    """Such as "Linux x86_64"."""
    gpus: tuple[str, ...] = ()


def this_machine(gpus: Iterable[str] = ()) -> Machine:
    """Describe this machine; whoever has PyTorch names its GPUs, see `mobilevit.devices.gpu_names`."""
    return Machine(
        processor=_processor(),
        cores=available_cores(),
        system=f"{platform.system()} {platform.machine()}",
        gpus=tuple(gpus),
    )


def available_cores() -> int:
    """Count the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int | None:
    """Return the most bytes that this process has held; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent held when it started this process
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform.system() == "Darwin" else most * 1024


def free_memory() -> int | None:
    """Return the bytes that can be taken without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    group = Path("/sys/fs/cgroup")
    try:  # a container may have less than the machine
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        taken = int((group / "memory.current").read_text(encoding="ascii"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return free
    left = limit - taken + int(counts.get("inactive_file", 0))  # the kernel gives up cached files
    return left if free is None else min(free, left)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Look up the versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def _processor() -> str:
    """Name the processor as the system does."""
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, subprocess.SubprocessError):
        lines = []
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    # ARM kernels give no name, only the numbers of maker and design.
    numbers = [fields[name] for name in ("cpu implementer", "cpu part") if name in fields]
    return fields.get("model name") or " ".join(numbers) or platform.processor() or platform.machine()
