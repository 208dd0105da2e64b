"""Which machine this is, so that figures measured on one are not taken for those of another."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mobilevit.runtime.backends import available_cores


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What decides how fast a model runs, apart from the packages."""

    processor: str
    cores: int
    """That this process may use."""
    system: str
    """Such as "Linux x86_64"."""
    gpus: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Machine:
        """The inverse of `to_dict`."""
        return cls(**{**values, "gpus": tuple(values["gpus"])})


def this_machine() -> Machine:
    """The machine this runs on."""
    return Machine(
        processor=_processor(),
        cores=available_cores(),
        system=f"{platform.system()} {platform.machine()}",
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
    )


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def _processor() -> str:
    """Its name as the system tells it."""
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, subprocess.SubprocessError):
        lines = []
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    # ARM kernels tell no name, only numbers of maker and design.
    numbers = [fields[name] for name in ("cpu implementer", "cpu part") if name in fields]
    return fields.get("model name") or " ".join(numbers) or platform.processor() or platform.machine()
