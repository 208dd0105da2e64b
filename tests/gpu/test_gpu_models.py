"""The models on a GPU: the CPU's answers at every precision, channels-last throughout, attention in one kernel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import mobilevit
from mobilevit.models.mobilevitv2 import GlobalNorm

pytestmark = pytest.mark.gpu

TASKS = ("classification", "detection", "segmentation")
each_generation = pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])
# Largest distance from the CPU's float32, relative to the length of the answer.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def tensors_of(output: Any) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else [part for part in output if part is not None]


def distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours.cpu().double() - reference.double()).norm() / reference.double().norm())


def lively_model(name: str, task: str) -> nn.Module:
    """Evaluation mode, with statistics and gains that are not those of a fresh model."""
    model = mobilevit.create_model(name, task=task, num_classes=5)
    model.train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.rand(4, 3, 128, 128))
    return model.eval()


def layouts(model: nn.Module, images: torch.Tensor) -> dict[str, bool]:
    """Whether the map that each module returned lies channels-last; tokens of a transformer are no maps."""
    found: dict[str, bool] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            # A map of one pixel or one channel lies every way at once.
            tokens = "transformer" in name or isinstance(module, GlobalNorm)
            is_map = isinstance(output, torch.Tensor) and output.ndim == 4 and not tokens
            if is_map and min(output.shape[1:]) > 1:
                found[name] = output.is_contiguous(memory_format=torch.channels_last)

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    model(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("precision", list(TOLERANCE), ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("task", TASKS)
@each_generation
def test_answers_are_those_of_float32_on_the_cpu(
    name: str, task: str, precision: torch.dtype, fused: bool, device: torch.device
) -> None:
    model = lively_model(name, task)
    images = torch.rand(4, 3, 128, 128)
    with torch.inference_mode():
        wanted = tensors_of(model(images))
        there = (mobilevit.fuse(model) if fused else copy.deepcopy(model)).to(device, precision)
        answers = tensors_of(there(images.to(device, precision)))
        casting = copy.deepcopy(model).to(device)
        with torch.autocast(device.type, dtype=precision, enabled=precision is not torch.float32):
            by_autocast = tensors_of(casting(images.to(device)))
    assert [answer.dtype for answer in answers[:2]] == [precision] * len(answers[:2])
    for given in (answers, by_autocast):
        assert [answer.device.type for answer in given] == [device.type] * len(wanted)
        assert [distance(ours, reference) for ours, reference in zip(given, wanted, strict=True)] == pytest.approx(
            [0.0] * len(wanted), abs=TOLERANCE[precision]
        )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("task", TASKS)
@each_generation
def test_every_map_lies_channels_last(name: str, task: str, training: bool, device: torch.device) -> None:
    model = mobilevit.create_model(name, task=task, num_classes=5).to(device).train(training)
    images = torch.rand(2, 3, 128, 128, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = layouts(model, images)
    assert [module for module, kept in found.items() if not kept] == []
    assert len(found) > 60


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@each_generation
def test_no_kernel_changes_the_layout(name: str, training: bool, cuda: torch.device) -> None:
    model = mobilevit.create_model(name, num_classes=5).to(cuda).train(training)
    images = torch.rand(8, 3, 128, 128, device=cuda).to(memory_format=torch.channels_last)

    def run() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16), torch.set_grad_enabled(training):
            answers = model(images)
        if training:
            answers.float().sum().backward()

    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    kernels = {event.name for event in profile.events()}
    assert len(kernels) > 10
    assert [kernel for kernel in kernels if "nchwtonhwc" in kernel.lower() or "nhwctonchw" in kernel.lower()] == []


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevit_xs", "mobilevit_s"])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_attention_is_one_kernel(name: str, precision: torch.dtype, cuda: torch.device) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = mobilevit.fuse(mobilevit.create_model(name)).to(cuda, precision)
    one_kernel = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with torch.inference_mode(), sdpa_kernel(one_kernel):  # raises where none of these can do it
        assert torch.isfinite(model(torch.rand(2, 3, 256, 256, device=cuda, dtype=precision))).all()
