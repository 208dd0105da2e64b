"""Make batches of an `ImageSet`, in an order that depends on nothing but seed, epoch and position.

So all processes agree without messages, and a resumed run reads what an uninterrupted one would have read. An epoch is
one shuffled sequence of all images, cut into as many equal parts as there are processes; step by step, each reads its
own part from front to back. Steps may differ in image size and so in how many images they take.
"""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from mobilevit.data.imageset import AnyImages
from mobilevit.errors import ImageError, MobileViTError
from mobilevit.imaging.decode import open_image
from mobilevit.machine import available_cores
from mobilevit.tasks.task import Transform

Size = tuple[int, int]
"""(height, width)"""
Key = tuple[int, int, Size | None]
"""Number of an image, the seed of its augmentation, and its size; None for the transform's own size."""
Segment = tuple[int, int]
"""A part of an epoch that ended because the number of processes changed: their number, and images done."""

MULTI_SCALE_SIDES = (160, 192, 256, 288, 320)
"""Sides of square images for a base of 256 (arXiv:2110.02178, section 3.2)."""

SHARDS_AT_ONCE = 16
"""Files whose images are mixed: few enough to keep open, and enough to separate the images of one file."""


# -- the order --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SizedBatch:
    """A size that steps may have, and the images of that size that one process takes."""

    size: Size | None
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of all processes: where in the epoch's sequence, or in its rest, it starts and stops."""

    size: Size | None
    start: int
    stop: int


def multi_scale_sizes(base: Size) -> tuple[Size, ...]:
    """Scale the paper's five sizes from its base, 256, to another: multiples of 32, each once."""
    sizes = [tuple(max(32, round(side * other / 256 / 32) * 32) for side in base) for other in MULTI_SCALE_SIDES]
    return tuple(dict.fromkeys((height, width) for height, width in sizes))


def level_batches(
    base: Size, batch_size: int, sizes: Sequence[Size], *, never_below: bool = False, most: int | None = None
) -> tuple[SizedBatch, ...]:
    """Choose batches of about equal cost: height x width x images is that of the base (arXiv:2110.02178, equation 3).

    Args:
        base: (height, width) at which `batch_size` images are a batch.
        batch_size: images of one process.
        sizes: to be drawn from, each as often as the others.
        never_below: take as many images above the base as at it, which the paper does not, but the code published
            with it (v0.1); costs memory.
        most: images in a batch, whatever their size.
    """
    least = max(2, batch_size) if never_below else 2  # 2, for the statistics of BatchNorm
    counts = [max(least, int(batch_size * base[0] * base[1] / (height * width))) for height, width in sizes]
    return tuple(SizedBatch(size=size, batch_size=min(n, most or n)) for size, n in zip(sizes, counts, strict=True))


def _plan_steps(count: int, batches: Sequence[SizedBatch], world_size: int, generator: torch.Generator) -> list[Step]:
    """Plan the steps through `count` images, each once, with sizes drawn; a rest of < 2 a process joins the last."""
    steps = []
    start = 0
    while start < count:
        drawn = int(torch.randint(len(batches), (), generator=generator)) if len(batches) > 1 else 0
        stop = start + batches[drawn].batch_size * world_size
        if count - stop < 2 * world_size:
            stop = count
        steps.append(Step(size=batches[drawn].size, start=start, stop=stop))
        start = stop
    return steps


def _shuffled(count: int, shards: Sequence[range] | None, generator: torch.Generator) -> Tensor:
    """Shuffle the numbers below `count`; with `shards`, a few of them at a time. Shape: (count,)."""
    if shards is None:
        return torch.randperm(count, generator=generator)
    order = torch.randperm(len(shards), generator=generator).tolist()
    parts = []
    for first in range(0, len(order), SHARDS_AT_ONCE):
        at_once = [shards[n] for n in order[first : first + SHARDS_AT_ONCE]]
        group = torch.cat([torch.arange(shard.start, shard.stop) for shard in at_once])
        parts.append(group[torch.randperm(len(group), generator=generator)])
    return torch.cat(parts)


def _part_of(sequence: Tensor, rank: int, world_size: int, start: int, stop: int) -> Tensor:
    """Return what one process reads of a sequence while all go from `start` to `stop`; the first may have one more."""
    count = len(sequence)
    first = rank * (count // world_size) + min(rank, count % world_size)

    begin, end = (first + (done + world_size - 1 - rank) // world_size for done in (start, stop))
    return sequence[begin:end]


class EpochSampler(Sampler[list[Key]]):
    """The batches of one process, epoch by epoch: every image once, whatever the number of processes.

    `seed` decides order, sizes and the seeds of augmentation; see `ImageSet.shards` for `shards`.
    """

    def __init__(
        self,
        count: int,
        batches: Sequence[SizedBatch],
        *,
        seed: int,
        shards: Sequence[range] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if world_size > 1 and count < 2 * world_size:
            raise MobileViTError(
                f"{count} images are too few for {world_size} processes, each of which needs 2 or more; use fewer"
            )
        self.count, self.batches, self.seed, self.shards = count, batches, seed, shards
        self.rank, self.world_size = rank, world_size
        self.start(0)

    def start(self, epoch: int, segments: Sequence[Segment] = (), first_step: int = 0) -> list[Step]:
        """Make iteration begin there; returns the steps of the epoch, or of its rest after `segments`."""
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        sequence = _shuffled(self.count, self.shards, generator)
        self._seeds = torch.randint(2**62, (self.count,), generator=generator)  # by image
        for world_size, done in segments:
            sequence = torch.cat([_part_of(sequence, i, world_size, done, len(sequence)) for i in range(world_size)])
        self._sequence, self._first_step = sequence, first_step
        self._steps = _plan_steps(len(sequence), self.batches, self.world_size, generator)
        return self._steps

    def __iter__(self) -> Iterator[list[Key]]:
        sequence, seeds = self._sequence, self._seeds
        for step in self._steps[self._first_step :]:
            numbers = _part_of(sequence, self.rank, self.world_size, step.start, step.stop)
            yield [(n, s, step.size) for n, s in zip(numbers.tolist(), seeds[numbers].tolist(), strict=True)]

    def __len__(self) -> int:
        return max(0, len(self._steps) - self._first_step)


def ordered_batches(count: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> list[list[Key]]:
    """List the batches of every `world_size`th image, beginning with the `rank`th, in their order."""
    keys: list[Key] = [(number, 0, None) for number in range(rank, count, world_size)]
    return [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]


# -- batches ----------------------------------------------------------------------------------------------------------


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
        """Pin the memory, for copies to a GPU that do not wait; called by PyTorch's loader."""
        return self.map(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """Copy to a device; the copy from pinned memory is not waited for."""
        is_cuda = device.type == "cuda"  # elsewhere, the memory copied from may be gone before it is read
        return self.map(lambda tensor: tensor.to(device, non_blocking=is_cuda))

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with every tensor changed."""
        targets = self.targets
        if isinstance(targets, Tensor):
            targets = change(targets)
        elif isinstance(targets, tuple):  # a named one
            targets = type(targets)(*map(change, targets))
        return dataclasses.replace(self, images=change(self.images), targets=targets)


def ahead_on(device: torch.device, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches on a device; a GPU is given each while it computes the one before."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    copied: deque[tuple[Batch, torch.cuda.Event]] = deque()
    for batch in batches:
        with torch.cuda.stream(stream):
            copied.append((batch.to(device), stream.record_event()))
        if len(copied) > 1:
            yield _arrived(*copied.popleft(), device)
    for last in copied:
        yield _arrived(*last, device)


def _arrived(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)

    def keep(tensor: Tensor) -> Tensor:
        tensor.record_stream(stream)  # its memory, until this stream has used it
        return tensor

    return batch.map(keep)


# -- the loader -------------------------------------------------------------------------------------------------------

_Item = tuple[int, Tensor | str, object]
"""Number of an image; its pixels, or why there are none; target."""
_Collate = Callable[[list[Any]], object]


class _Images(Dataset[_Item]):
    """Images with their targets; each is asked for with its seed, so that worker processes have no random state."""

    def __init__(self, data: AnyImages, transform: Transform) -> None:
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
        transform: of each image and its target.
        collate: of the targets of a batch.
        num_workers: processes that read and transform; 0 does it in this one.
        shuffle_seed: None keeps the order; a number shuffles, differently each epoch.
        sizes: for a shuffled order whose steps differ in image size, instead of `batch_size`; `transform` then takes
            the size as a third argument.
        shard: (i, n): the share of the ith of n processes.
    """

    def __init__(
        self,
        data: AnyImages,
        transform: Transform,
        *,
        collate: _Collate = torch.tensor,
        batch_size: int,
        num_workers: int,
        shuffle_seed: int | None = None,
        sizes: Sequence[SizedBatch] = (),
        pin_memory: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.data = data
        rank, world_size = shard
        self._sampler: EpochSampler | list[list[Key]]
        if shuffle_seed is None:
            self._sampler = ordered_batches(len(data), batch_size, rank=rank, world_size=world_size)
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
        return self._sampler.count if isinstance(self._sampler, EpochSampler) else sum(map(len, self._sampler))

    def epoch(self) -> Iterator[Batch]:
        """Yield all images in their order, or, shuffled, those of the epoch that was started last."""
        with torch.random.fork_rng(devices=[]):  # PyTorch's loader draws a seed, which ours do not use
            iterator = iter(self._loader)
        yield from iterator

    def start(self, epoch: int, segments: Sequence[Segment] = (), first_step: int = 0) -> list[Step]:
        """Choose what `epoch` yields, always the same for the same numbers; see `EpochSampler.start`."""
        assert isinstance(self._sampler, EpochSampler), "an order that is kept has no epochs"
        return self._sampler.start(epoch, segments, first_step)


def default_num_workers(device: torch.device, *, sharing: int = 1) -> int:
    """Choose how many processes read: one for every two cores where the CPU also computes, else up to eight.

    `sharing` is the number of processes that share the cores; each has that many readers.
    """
    cores = available_cores() // sharing
    return min(8, cores // 2 if device.type == "cpu" else cores)


def _collate(collate: _Collate, items: Sequence[_Item]) -> Batch:
    good = [(index, image, target) for index, image, target in items if not isinstance(image, str)]
    images = torch.empty(0, 1, 1, 3, dtype=torch.uint8)
    if good:  # as rows of pixels, so that a worker copies them once, into memory that is shared
        images = default_collate([image.permute(1, 2, 0) for _, image, _ in good])
    return Batch(
        images=images.permute(0, 3, 1, 2),
        targets=collate([target for _, _, target in good]) if good else None,
        indices=[index for index, _, _ in good],
        errors=[image for _, image, _ in items if isinstance(image, str)],
    )


def _start_worker(_: int) -> None:
    # Ctrl-C, and SIGTERM from a time limit, go to the whole process group; in one of their own, workers live on until
    # the parent has saved what it wants to save and ends them.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    torch.set_num_threads(1)
