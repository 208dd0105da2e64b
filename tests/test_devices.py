from __future__ import annotations

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
