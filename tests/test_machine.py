from __future__ import annotations

import os
import subprocess
import sys

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
