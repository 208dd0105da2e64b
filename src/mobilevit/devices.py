"""Devices: picking one, their names and memory, and pixels on them."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mobilevit.errors import MobileViTError
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.machine import peak_memory


def pick_device(name: str) -> torch.device:
    """The device for a name: "auto" (the best there is), "cpu", "cuda", "cuda:1" or "mps".

    Raises:
        MobileViTError: it is not on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise MobileViTError(f"`device` is {name!r}: unknown; it can be auto, cpu, cuda, cuda:1 or mps")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"there are {torch.cuda.device_count()}" if torch.cuda.is_available() else "PyTorch sees no CUDA GPU"
        raise MobileViTError(f"`device` is {name!r}: {found}; use 'cpu', or check the driver with nvidia-smi")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise MobileViTError(f"`device` is {name!r}: this machine has no Apple GPU; use 'cpu'")
    return device


def normalize(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Scale to 0..1, subtract mean, divide by std: `Preprocessing.normalize` for tensors; the memory layout stays.

    Shape: uint8 (B, 3, H, W) -> float32 (B, 3, H, W), on the same device.
    """
    x = pixels.float() / 255
    if any(preprocessing.mean) or any(s != 1 for s in preprocessing.std):
        on_gpu = x.device.type == "cuda"  # where the host would otherwise wait for all that was started before
        mean, std = (
            torch.tensor(values).to(x.device, non_blocking=on_gpu)[:, None, None]
            for values in (preprocessing.mean, preprocessing.std)
        )
        x = (x - mean) / std
    return x


def gpu_names() -> list[str]:
    """Name the CUDA GPUs of this machine."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def peak_memory_mb(device: torch.device) -> float | None:
    """The most MB this process has taken so far of a GPU's memory, or, on a CPU, of the machine's; None: unknown."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_reserved(device) / 1e6, 1)
    peak = peak_memory()
    return None if peak is None else round(peak / 1e6, 1)


def keep_freed_memory() -> None:
    """Let the C library keep memory that is freed, as the next step of a training run asks for as much again.

    Otherwise glibc returns large blocks to the kernel, which clears each page anew. Peak memory stays the same with one
    image size and grows with many. Other C libraries, and settings of the user's own, are left as they are.
    """
    own = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in own):
        return
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    mallopt(m_mmap_threshold, 2**30)
    mallopt(m_trim_threshold, 2**31 - 1)


@contextmanager
def gpu_memory_errors() -> Iterator[None]:
    """Tell a GPU that is too small for the batch as what it is: a mistake of the user.

    Raises:
        MobileViTError: the GPU has too little memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MobileViTError("the GPU has too little memory; lower `batch_size` or `image_size`") from error
