"""From an `ImageSet` to batches, in an order that depends on nothing but seed, epoch and position."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mobilevit.data.imageset import ImageSet
from mobilevit.preprocessing import ImageError, read_image

Transform = Callable[[Image.Image, Any], tuple[Tensor, Any]]
"""RGB picture and its target -> uint8 (3, H, W) and what the batch is to hold of the target."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pictures that could be read, and word of those that could not."""

    images: Tensor
    """uint8 (B, 3, H, W), channels-last in memory."""
    targets: Any
    """Of each picture: what the loader's `collate` makes of them; a tensor, a named tuple of tensors, or a list."""
    indices: list[int]
    """Position of each picture in its `ImageSet`."""
    errors: list[str]
    """One line for each picture left out."""

    def __len__(self) -> int:
        return len(self.indices)

    def pin_memory(self) -> Batch:
        """Called by the data loader, for copies to a GPU that do not wait."""
        targets = map_tensors(self.targets, Tensor.pin_memory)
        return Batch(images=self.images.pin_memory(), targets=targets, indices=self.indices, errors=self.errors)


def map_tensors(targets: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Targets with every tensor changed: moved to a device, for one."""
    if isinstance(targets, Tensor):
        return change(targets)
    if isinstance(targets, tuple):  # a named one
        return type(targets)(*map(change, targets))
    return targets


class _Pictures(Dataset[tuple[int, Tensor | str, Any]]):
    """Items are asked for by (index, seed), so that a worker process has no random state worth keeping."""

    def __init__(self, data: ImageSet[Any], transform: Transform) -> None:
        self.data, self.transform = data, transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor | str, Any]:
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which also sets those of GPUs
            try:
                image = read_image(self.data.open(index), self.data.names[index])
                return index, *self.transform(image, self.data.targets[index])
            except ImageError as error:
                return index, str(error), None


class _Order(Sampler[list[tuple[int, int]]]):
    """Batches of (index, seed) for one epoch."""

    def __init__(self, numbers: Sequence[int], batch_size: int, *, shuffle_seed: int | None, drop_last: bool) -> None:
        self.numbers, self.batch_size, self.shuffle_seed, self.drop_last = numbers, batch_size, shuffle_seed, drop_last
        self.epoch = self.first_batch = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        count = len(self.numbers)
        order, seeds = list(self.numbers), [0] * count
        if self.shuffle_seed is not None:
            generator = torch.Generator().manual_seed((self.shuffle_seed << 20) + self.epoch)
            order = [order[place] for place in torch.randperm(count, generator=generator).tolist()]
            seeds = torch.randint(2**62, (count,), generator=generator).tolist()
        keys = list(zip(order, seeds, strict=True))
        for batch in range(self.first_batch, len(self)):
            yield keys[batch * self.batch_size : (batch + 1) * self.batch_size]

    def __len__(self) -> int:
        count = len(self.numbers)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)


class BatchLoader:
    """Batches of one `ImageSet`, epoch by epoch.

    Args:
        data: the pictures.
        transform: of every picture and its target.
        collate: makes one thing of the targets of a batch.
        batch_size: pictures in a batch.
        num_workers: processes that read and transform; 0 does it in this one.
        shuffle_seed: None keeps the order; a number shuffles, differently each epoch, and leaves out the last pictures
            if they do not fill a batch.
        pin_memory: for a GPU.
        shard: (i, n) takes every nth picture from the ith on.
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
        pin_memory: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.data = data
        shuffled = shuffle_seed is not None
        numbers = range(shard[0], len(data), shard[1])
        batch_size = max(1, min(batch_size, len(numbers)))
        self._order = _Order(numbers, batch_size, shuffle_seed=shuffle_seed, drop_last=shuffled)
        num_workers = min(num_workers, len(self._order))  # 0 also for a shard without pictures
        self._loader = DataLoader(
            _Pictures(data, transform),
            batch_sampler=self._order,
            collate_fn=partial(_collate, collate),
            num_workers=num_workers,
            pin_memory=pin_memory,
            # The order travels with each epoch's iterator, so workers may live on.
            persistent_workers=num_workers > 0,
            worker_init_fn=_start_worker,
        )

    def __len__(self) -> int:
        return len(self._order)

    @property
    def num_images(self) -> int:
        """Pictures in one epoch."""
        return min(len(self._order) * self._order.batch_size, len(self._order.numbers))

    def epoch(self, epoch: int = 0, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from `first_batch` on: always the same for the same numbers."""
        self._order.epoch, self._order.first_batch = epoch, first_batch
        # A loader draws a base seed for its workers from the global generator; ours have no use for it, and the
        # caller's random numbers must not depend on how often loaders were started.
        with torch.random.fork_rng(devices=[]):
            iterator = iter(self._loader)
        yield from iterator


def _collate(collate: Callable[[Sequence[Any]], Any], items: Sequence[tuple[int, Tensor | str, Any]]) -> Batch:
    good = [(index, pixels, target) for index, pixels, target in items if isinstance(pixels, Tensor)]
    # Stacked as (B, H, W, 3) and seen as (B, 3, H, W): the pixels are copied once, in the order they lie.
    nothing = torch.empty(0, 1, 1, 3, dtype=torch.uint8)
    images = torch.stack([pixels.permute(1, 2, 0) for _, pixels, _ in good]) if good else nothing
    return Batch(
        images=images.permute(0, 3, 1, 2),
        targets=collate([target for _, _, target in good]) if good else None,
        indices=[index for index, _, _ in good],
        errors=[pixels for _, pixels, _ in items if isinstance(pixels, str)],
    )


def _start_worker(_: int) -> None:
    # Ctrl-C, and SIGTERM from a time limit, go to the whole process group; in one of their own, workers live on until
    # the parent has saved what it wants to save and ends them.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    torch.set_num_threads(1)
