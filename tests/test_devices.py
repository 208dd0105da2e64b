from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from mobilevit.devices import gpu_memory_errors, gpu_names, pick_device
from mobilevit.errors import MobileViTError


def test_a_gpu_that_is_too_small_is_a_mistake_of_the_user() -> None:
    with (
        pytest.raises(MobileViTError, match="too little memory; lower `batch_size` or `image_size`"),
        gpu_memory_errors(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(RuntimeError, match="shapes"), gpu_memory_errors():
        raise RuntimeError("shapes do not match")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_devices_that_are_not_there() -> None:
    assert gpu_names() == []
    for name, reason in (("cuda", "sees no CUDA GPU"), ("tpu", "unknown"), ("meta", "unknown")):
        with pytest.raises(MobileViTError, match=f"`device` is '{name}'.*{reason}"):
            pick_device(name)
    assert pick_device("cpu") == torch.device("cpu")


_FAULTS = """
import resource, sys
import numpy as np
from mobilevit.devices import keep_freed_memory
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
