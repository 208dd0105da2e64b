"""Choose the images that a process reads in each step of an epoch, and their size.

Everything follows from a seed, the epoch and the position in it, so that all processes agree without messages, and a
run that is resumed reads what an uninterrupted one would have read.

An epoch is one shuffled sequence of all images. It is cut into as many equal parts as there are processes; step by
step, each reads its own part from front to back. Steps differ in image size and so in how many images they take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from mobilevit.errors import MobileViTError

Size = tuple[int, int]
"""(height, width)"""
Key = tuple[int, int, Size | None]
"""Number of an image, the seed of its augmentation, and its size; None for the transform's own size."""

MULTI_SCALE_SIDES = (160, 192, 256, 288, 320)
"""Sides of square images for a base of 256 (arXiv:2110.02178, section 3.2)."""

SHARDS_AT_ONCE = 16
"""Files whose images are mixed: few enough to keep open, and enough to separate the images of one file."""


@dataclass(frozen=True, kw_only=True)
class SizedBatch:
    """A size that steps may have, and the images of that size that one process takes."""

    size: Size | None
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of all processes."""

    size: Size | None
    start: int
    """Images of the epoch's sequence (or of its rest) that are done before this step, over all processes."""
    stop: int
    """And after it."""


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


def plan_steps(count: int, batches: Sequence[SizedBatch], world_size: int, generator: torch.Generator) -> list[Step]:
    """Plan the steps through `count` images, each once; a size is drawn for each step, the same for all processes.

    A rest of fewer than two images for every process joins the step before.
    """
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


def shuffled(count: int, shards: Sequence[range] | None, generator: torch.Generator) -> Tensor:
    """Shuffle the numbers below `count`; with `shards`, a few of them at a time. Shape: (count,)."""
    if shards is None:
        return torch.randperm(count, generator=generator)
    order = torch.randperm(len(shards), generator=generator).tolist()
    parts = []
    for first in range(0, len(order), SHARDS_AT_ONCE):
        group = torch.cat(
            [torch.arange(shards[n].start, shards[n].stop) for n in order[first : first + SHARDS_AT_ONCE]]
        )
        parts.append(group[torch.randperm(len(group), generator=generator)])
    return torch.cat(parts)


def part_of(sequence: Tensor, rank: int, world_size: int, start: int, stop: int) -> Tensor:
    """Return what one process reads of a sequence while all together go from `start` to `stop`: equal shares.

    If images do not divide evenly, the first processes have one more.
    """
    count = len(sequence)
    first = rank * (count // world_size) + min(rank, count % world_size)

    def place(done: int) -> int:
        return first + (done + world_size - 1 - rank) // world_size

    return sequence[place(start) : place(stop)]


def rest_of(sequence: Tensor, world_size: int, done: int) -> Tensor:
    """Return what is left after that many processes have read `done` images in all."""
    return torch.cat([part_of(sequence, rank, world_size, done, len(sequence)) for rank in range(world_size)])


Segment = tuple[int, int]
"""A part of an epoch that ended because the number of processes changed: their number, and images done."""


class EpochSampler(Sampler[list[Key]]):
    """The batches of one process, epoch by epoch: every image once, whatever the number of processes.

    Args:
        count: images in the data.
        batches: the sizes there are.
        seed: decides order, sizes and the seeds of augmentation.
        shards: see `ImageSet.shards`.
        rank: this process.
        world_size: processes in all.

    Raises:
        MobileViTError: too few images for so many processes.
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
        sequence = shuffled(self.count, self.shards, generator)
        self._seeds = torch.randint(2**62, (self.count,), generator=generator)  # by image
        for world_size, done in segments:
            sequence = rest_of(sequence, world_size, done)
        self._sequence, self._first_step = sequence, first_step
        self._steps = plan_steps(len(sequence), self.batches, self.world_size, generator)
        return self._steps

    def __iter__(self) -> Iterator[list[Key]]:
        sequence, seeds = self._sequence, self._seeds
        for step in self._steps[self._first_step :]:
            numbers = part_of(sequence, self.rank, self.world_size, step.start, step.stop)
            yield [(n, s, step.size) for n, s in zip(numbers.tolist(), seeds[numbers].tolist(), strict=True)]

    def __len__(self) -> int:
        return max(0, len(self._steps) - self._first_step)


class OrderedSampler(Sampler[list[Key]]):
    """Every `world_size`th image, beginning with the `rank`th, in their order."""

    def __init__(self, count: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.numbers = range(rank, count, world_size)
        self.batch_size = max(1, min(batch_size, len(self.numbers)))

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.numbers), self.batch_size):
            yield [(number, 0, None) for number in self.numbers[start : start + self.batch_size]]

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.batch_size)
