"""Make batches of an `ImageSet`, in an order that depends on nothing but seed, epoch and position."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mobilevit.data.imageset import ImageSet
from mobilevit.data.samplers import EpochSampler, Key, OrderedSampler, Segment, SizedBatch, Step
from mobilevit.errors import ImageError
from mobilevit.imaging.decode import open_image
from mobilevit.machine import available_cores
from mobilevit.tasks.task import Transform


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images that could be read, and a line for each that could not."""

    images: Tensor
    """uint8 (B, 3, H, W), channels-last in memory."""
    targets: Any
    """The targets as the loader's `collate` returns them: a tensor, a named tuple of tensors, or a list."""
    indices: list[int]
    """Number of each image in its `ImageSet`."""
    errors: list[str]
    """One line for each image left out."""

    def __len__(self) -> int:
        return len(self.indices)

    def pin_memory(self) -> Batch:
        """Pin the memory for copies to a GPU that do not wait; called by PyTorch's loader."""
        return self.map(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """Copy to a device; the copy from pinned memory is not waited for."""
        # Elsewhere than on CUDA, the memory copied from may be gone before it is read.
        return self.map(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with every tensor changed."""
        targets = self.targets
        if isinstance(targets, Tensor):
            targets = change(targets)
        elif isinstance(targets, tuple):  # a named one
            targets = type(targets)(*map(change, targets))
        return dataclasses.replace(self, images=change(self.images), targets=targets)


def default_num_workers(device: torch.device, *, sharing: int = 1) -> int:
    """Choose how many processes read: one for every two cores where the CPU also computes, else up to eight.

    Args:
        device: computes meanwhile.
        sharing: processes that share the cores; each has that many readers.
    """
    cores = available_cores() // sharing
    return min(8, cores // 2 if device.type == "cpu" else cores)


def ahead_on(device: torch.device, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches on a device; a GPU is given each while it computes the one before."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = (batch.to(device), stream.record_event())
        if ahead is not None:
            yield _arrived(*ahead, device)
        ahead = copied
    if ahead is not None:
        yield _arrived(*ahead, device)


def _arrived(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)

    def keep(tensor: Tensor) -> Tensor:
        tensor.record_stream(stream)  # its memory, until this stream has used it
        return tensor

    return batch.map(keep)


_Item = tuple[int, Tensor | str, Any]
"""Number of an image; its pixels, or why there are none; target."""


class _Images(Dataset[_Item]):
    """Images with their targets; each is asked for with its seed, so that worker processes have no random state."""

    def __init__(self, data: ImageSet[Any], transform: Transform) -> None:
        self.data, self.transform = data, transform

    def __getitem__(self, key: Key) -> _Item:
        index, seed, size = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which also sets those of GPUs
            try:
                image = open_image(self.data.open(index), self.data.names[index])
                sized = () if size is None else (size,)
                return index, *self.transform(image, self.data.targets[index], *sized)
            except ImageError as error:
                return index, str(error), None


class BatchLoader:
    """The batches of an `ImageSet`, epoch by epoch.

    Args:
        data: the images.
        transform: of each image and its target.
        collate: of the targets of a batch.
        batch_size: images in a batch.
        num_workers: processes that read and transform; 0 does it in this one.
        shuffle_seed: None keeps the order; a number shuffles, differently each epoch.
        sizes: if steps differ in image size, these with their batches instead of `batch_size`; the transform then
            takes the size as a third argument. For a shuffled order.
        pin_memory: for a GPU.
        shard: (i, n): the share of the ith of n processes.
    """

    def __init__(
        self,
        data: ImageSet[Any],
        transform: Transform,
        *,
        collate: Callable[[Sequence[Any]], Any] = torch.tensor,
        batch_size: int,
        num_workers: int,
        shuffle_seed: int | None = None,
        sizes: Sequence[SizedBatch] = (),
        pin_memory: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.data = data
        rank, world_size = shard
        self._sampler: EpochSampler | OrderedSampler
        if shuffle_seed is None:
            self._sampler = OrderedSampler(len(data), batch_size, rank=rank, world_size=world_size)
        else:
            self._sampler = EpochSampler(
                len(data),
                sizes or (SizedBatch(size=None, batch_size=batch_size),),
                seed=shuffle_seed,
                shards=data.shards,
                rank=rank,
                world_size=world_size,
            )
        num_workers = min(num_workers, len(self._sampler))  # 0 also for a share without images
        self._loader = DataLoader(
            _Images(data, transform),
            batch_sampler=self._sampler,
            collate_fn=partial(_collate, collate),
            num_workers=num_workers,
            pin_memory=pin_memory,
            # The order travels with each epoch's iterator, so workers may live on.
            persistent_workers=num_workers > 0,
            worker_init_fn=_start_worker,
        )

    def __len__(self) -> int:
        """Return the number of batches that `epoch` yields."""
        return len(self._sampler)

    @property
    def num_images(self) -> int:
        """Number of images in an epoch: of all processes if the order is shuffled, else of this one."""
        return len(self._sampler.numbers) if isinstance(self._sampler, OrderedSampler) else self._sampler.count

    def epoch(self) -> Iterator[Batch]:
        """Yield all images in their order, or, shuffled, those of the epoch that was started last."""
        # PyTorch's loader draws a base seed for its workers from the global generator; ours do not use it, and the
        # caller's random numbers must not depend on how often loaders were started.
        with torch.random.fork_rng(devices=[]):
            iterator = iter(self._loader)
        yield from iterator

    def start(self, epoch: int, segments: Sequence[Segment] = (), first_step: int = 0) -> list[Step]:
        """Choose what `epoch` yields, always the same for the same numbers; see `EpochSampler.start`."""
        assert isinstance(self._sampler, EpochSampler), "an order that is kept has no epochs"
        return self._sampler.start(epoch, segments, first_step)


def _collate(collate: Callable[[Sequence[Any]], Any], items: Sequence[_Item]) -> Batch:
    good = [(index, image, target) for index, image, target in items if not isinstance(image, str)]
    images = _stacked([image for _, image, _ in good]) if good else torch.empty(0, 1, 1, 3, dtype=torch.uint8)
    return Batch(
        images=images.permute(0, 3, 1, 2),
        targets=collate([target for _, _, target in good]) if good else None,
        indices=[index for index, _, _ in good],
        errors=[image for _, image, _ in items if isinstance(image, str)],
    )


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack images, uint8 (3, H, W) -> (B, H, W, 3): pixels are copied once, in the order they lie.

    A worker process copies them into the memory that it shares with the training process.
    """
    _, height, width = tensors[0].shape
    shape = (len(tensors), height, width, 3)
    if get_worker_info() is None:
        images = torch.empty(shape, dtype=torch.uint8)
    else:
        storage = torch.UntypedStorage._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]
        images = torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
    return torch.stack([pixels.permute(1, 2, 0) for pixels in tensors], out=images)


def _start_worker(_: int) -> None:
    # Ctrl-C, and SIGTERM from a time limit, go to the whole process group; in one of their own, workers live on until
    # the parent has saved what it wants to save and ends them.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    torch.set_num_threads(1)
