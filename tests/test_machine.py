from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from mobilevit.devices import gpu_names
from mobilevit.machine import available_cores, this_machine, versions


def test_this_machine_is_described_without_torch() -> None:
    code = (
        "import sys; from mobilevit.machine import this_machine; m = this_machine()\n"
        "print(m.processor, m.cores, m.gpus)\nassert not {'torch', 'numpy'} & set(sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    machine = this_machine()
    assert told == f"{machine.processor} {machine.cores} ()"
    assert machine.processor
    assert machine.cores == available_cores() <= (os.cpu_count() or 1)
    assert this_machine(["a", "b"]).gpus == ("a", "b")
    assert this_machine(gpu_names()).gpus == tuple(gpu_names())


def test_versions_are_those_of_installed_packages() -> None:
    import numpy

    assert versions(["numpy", "no-such-package"]) == {"numpy": numpy.__version__}


_FAULTS = """
import resource, sys
import numpy as np
from mobilevit.machine import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for number in range(20):
    np.ones(2**23)  # 64 MB, which glibc gives back as soon as it is freed
    if number == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_freed_memory_is_kept_unless_the_user_says_otherwise() -> None:
    def faults(which: str, **variables: str) -> int:
        command = [sys.executable, "-c", _FAULTS, which]
        return int(subprocess.check_output(command, text=True, env={**os.environ, **variables}))

    given_back = faults("given back")
    assert faults("kept") < given_back / 10
    assert faults("kept", MALLOC_MMAP_THRESHOLD_="131072") > given_back / 2
