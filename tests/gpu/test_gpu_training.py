"""A training step on a GPU: the CPU's gradients, every precision, compiled, without waiting, over NCCL."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

import mobilevit
from mobilevit.data.loaders import Batch, BatchLoader, ahead_on
from mobilevit.training.distributed import World, any_of, on_first, spread
from mobilevit.training.learner import Learner
from mobilevit.training.loop import Run
from training_settings import with_settings

pytestmark = pytest.mark.gpu

TASKS = ("classification", "detection", "segmentation")
DataOf = Callable[[str], Path]


def learner_of(
    data: Path, device: torch.device, *, world: World | None = None, **settings: Any
) -> tuple[Learner, BatchLoader]:
    """A learner with the same weights on every device, and the batches that it learns from."""
    plain = mobilevit.TrainConfig(data=data, image_size=64, batch_size=8, num_workers=0, device=str(device))
    run = Run(with_settings(plain, **{"amp": "off", **settings}), World(), device)
    learner = run.learner
    if world is not None:
        torch.manual_seed(run.config.seed)
        learner = Learner(run.config, run.train_set, world=world, device=device)
    learner.train_mode()
    run.loader.start(0)
    return learner, run.loader


def first_batch(loader: BatchLoader, device: torch.device) -> Batch:
    return next(iter(loader.epoch())).to(device)


def without_dropout(learner: Learner) -> Learner:
    """Its random numbers are others on each device."""
    for module in learner.model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    return learner


def gradients(learner: Learner, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    loss = learner.step(batch, share=1.0, learning_rate=None)
    assert loss is not None
    named = learner.model.named_parameters()
    return float(loss), {name: p.grad.cpu().double() for name, p in named if p.grad is not None}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any wait of the host for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_gradients_are_the_cpus(task: str, data_of: DataOf, device: torch.device) -> None:
    found = {}
    for place in (torch.device("cpu"), device):
        learner, loader = learner_of(data_of(task), place)
        found[place] = gradients(without_dropout(learner), first_batch(loader, place))
    (wanted_loss, wanted), (loss, ours) = found[torch.device("cpu")], found[device]
    assert loss == pytest.approx(wanted_loss, rel=1e-4)
    assert list(ours) == list(wanted)
    total = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    wrong = torch.stack([(ours[name] - wanted[name]).norm() for name in wanted]).norm()
    assert total > 0
    assert float(wrong / total) < 2e-3


@pytest.mark.parametrize("task", TASKS)
def test_a_step_is_the_cpus(task: str, data_of: DataOf, device: torch.device) -> None:
    found = {}
    for place in (torch.device("cpu"), device):
        learner, loader = learner_of(data_of(task), place)
        before = weights_of(learner.model)
        without_dropout(learner).step(first_batch(loader, place), share=1.0, learning_rate=1e-3)
        after = weights_of(learner.model)
        changes = {name: after[name].double() - before[name].double() for name in after}
        assert learner.average is not None
        found[place] = (changes, {k: v.cpu().double() for k, v in learner.average.model.state_dict().items()})
    (wanted, wanted_average), (ours, average) = found[torch.device("cpu")], found[device]
    # Adam's first step is the learning rate times the gradient's sign, which is anyone's where the gradient is nothing.
    same = torch.cat([((ours[name] - wanted[name]).abs() <= 1e-4).flatten() for name in wanted])
    assert float(same.double().mean()) > 0.99
    near = torch.cat([((average[name] - wanted_average[name]).abs() <= 1e-4).flatten() for name in average])
    assert float(near.double().mean()) > 0.99


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("task", TASKS)
def test_the_loss_falls_at_every_precision(task: str, amp: str, data_of: DataOf, device: torch.device) -> None:
    if amp == "fp16" and device.type == "cpu":
        pytest.skip("only a GPU trains in fp16")
    learner, loader = learner_of(data_of(task), device, amp=amp)
    assert learner.scaler.is_enabled() == (amp == "fp16")
    # The usual 65,536 overflows at first, which leaves steps out.
    learner.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=amp == "fp16")
    batch = first_batch(loader, device)
    losses = [float(learner.step(batch, share=1.0, learning_rate=2e-3)) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in learner.model.parameters())


def test_a_step_whose_gradients_overflow_is_left_out(data_of: DataOf, cuda: torch.device) -> None:
    learner, loader = learner_of(data_of("classification"), cuda, amp="fp16")
    learner.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    batch = first_batch(loader, cuda)
    before = {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}
    learner.step(batch, share=1.0, learning_rate=1e-3)
    assert learner.scaler.get_scale() == 2.0**39
    assert [name for name, p in learner.model.named_parameters() if not torch.equal(p, before[name])] == []


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("classification", {"amp": "bf16"}),
        ("classification", {"amp": "fp16", "clip_grad_norm": 1.0}),
        ("classification", {"amp": "off", "mixup": 0.2, "cutmix": 1.0, "class_weights": "balanced"}),
        ("classification", {"amp": "bf16", "teacher": "itself"}),
        ("classification", {"amp": "bf16", "mean": (0.5, 0.4, 0.3)}),
        ("detection", {"amp": "bf16", "clip_grad_norm": 1.0}),
        ("segmentation", {"amp": "bf16", "aux_head": True}),
    ],
    ids=["bf16", "fp16 clipped", "mixed", "taught", "normalized", "detection", "segmentation"],
)
def test_a_step_does_not_wait_for_the_gpu(
    task: str, settings: dict[str, Any], data_of: DataOf, trained: Callable[[str], Path], cuda: torch.device
) -> None:
    settings = dict(settings)
    if "teacher" in settings:
        settings["teacher"] = str(trained(task))
    mean = settings.pop("mean", None)
    learner, loader = learner_of(data_of(task), cuda, grad_accum_steps=2, **settings)
    if mean is not None:
        preprocessing = dataclasses.replace(learner.preprocessing, mean=mean)
        learner.card = dataclasses.replace(learner.card, preprocessing=preprocessing)
    batch = first_batch(loader, cuda)
    for number in range(6):
        warmed_up = number >= 4  # by then, libraries are loaded and the optimizer has its state
        with no_waiting() if warmed_up else torch.cuda.device(cuda):
            learner.step(batch, share=0.5, learning_rate=1e-3 if number % 2 else None)


def test_compiled_steps_of_several_sizes_are_the_plain_ones(data_of: DataOf, device: torch.device) -> None:
    settings = {"multi_scale": "paper", "train_sizes": ((64, 64), (96, 64)), "batch_size": 4}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses: dict[bool, list[float]] = {}
    for compiled in (False, True):
        learner, loader = learner_of(data_of("classification"), device, compile=compiled, **settings)
        without_dropout(learner)
        sizes, found = set(), []
        for epoch in range(2):
            loader.start(epoch)
            for batch in ahead_on(device, loader.epoch()):
                sizes.add(tuple(batch.images.shape[-2:]))
                loss = learner.step(batch, share=1.0, learning_rate=1e-4)
                found += [] if loss is None else [float(loss)]
        assert sizes == {(64, 64), (96, 64)}
        losses[compiled] = found
    assert losses[True] == pytest.approx(losses[False], rel=2e-3)
    if device.type == "cuda":
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_batches_copied_ahead_are_the_loaders(task: str, data_of: DataOf, device: torch.device) -> None:
    _, loader = learner_of(data_of(task), device, num_workers=2, batch_size=2)
    plain = list(loader.epoch())
    if device.type == "cuda":
        assert all(batch.images.is_pinned() for batch in plain)
    busy = torch.rand(2048, 2048, device=device) if device.type == "cuda" else torch.rand(64, 64)
    copies = []
    for batch in ahead_on(device, loader.epoch()):
        assert batch.images.device.type == device.type
        for _ in range(4):  # the next batch arrives while the device still works on this one
            busy = busy @ busy / busy.norm()
        copies.append(batch.map(torch.clone))
        del batch  # its memory may be used again before the device has come to the copy
    assert len(copies) == len(plain) > 4
    for ours, theirs in zip(copies, plain, strict=True):
        assert ours.indices == theirs.indices
        assert torch.equal(ours.images.cpu(), theirs.images)
        assert ours.images.is_contiguous(memory_format=torch.channels_last)
        pairs = [(ours.targets, theirs.targets)] if isinstance(ours.targets, torch.Tensor) else zip(
            ours.targets, theirs.targets, strict=True
        )  # fmt: skip
        assert all(torch.equal(target.cpu(), wanted) for target, wanted in pairs)


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def group(device: torch.device, tmp_path: Path) -> Iterator[None]:
    """A process group of one, with the backends that several would have."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("sync_batch_norm", [False, True])
def test_gradients_through_nccl_are_those_without(
    sync_batch_norm: bool, data_of: DataOf, device: torch.device, group: None
) -> None:
    if sync_batch_norm and device.type == "cpu":
        pytest.skip("common statistics need a GPU")
    alone, loader = learner_of(data_of("classification"), device)
    batch = first_batch(loader, device)
    wanted_loss, wanted = gradients(without_dropout(alone), batch)
    # Told that there are two, it exchanges as if there were.
    together, _ = learner_of(
        data_of("classification"), device, world=World(size=2), sync_batch_norm=sync_batch_norm, grad_accum_steps=2
    )
    assert isinstance(together.forward, nn.parallel.DistributedDataParallel)
    kinds = {type(module) for module in together.model.modules()}
    assert (nn.SyncBatchNorm in kinds, nn.BatchNorm2d in kinds) == (sync_batch_norm, not sync_batch_norm)
    loss, ours = gradients(without_dropout(together), batch)  # under no_sync
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert max(float((ours[name] - wanted[name]).norm()) for name in wanted) < 1e-3
    together.optimizer.zero_grad(set_to_none=True)
    before = copy.deepcopy(together.model.state_dict())
    together.step(batch, share=1.0, learning_rate=1e-3)  # exchanges, and updates
    after = together.model.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])


def test_agreements_and_weights_travel(device: torch.device, group: None) -> None:
    told_two = World(size=2)
    assert any_of(told_two, True, False) == [True, False]
    assert on_first(told_two, lambda: {"resume": True}) == {"resume": True}
    model = mobilevit.create_model("mobilevit_xxs", num_classes=3).to(device)
    before = weights_of(model)
    spread(told_two, model)
    after = weights_of(model)
    assert [name for name in after if not torch.equal(after[name], before[name])] == []
