from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilevit.data.loaders import (
    SHARDS_AT_ONCE,
    EpochSampler,
    Key,
    Segment,
    SizedBatch,
    level_batches,
    multi_scale_sizes,
    ordered_batches,
)

PAPER = multi_scale_sizes((256, 256))


def read(
    sampler: EpochSampler, epoch: int, segments: Sequence[tuple[int, int]] = (), first: int = 0
) -> list[list[Key]]:
    sampler.start(epoch, segments, first)
    return list(sampler)


def samplers(count: int, world_size: int, batches: Sequence[SizedBatch], **options: object) -> list[EpochSampler]:
    return [
        EpochSampler(count, batches, seed=7, rank=rank, world_size=world_size, **options)  # type: ignore[arg-type]
        for rank in range(world_size)
    ]


def test_sizes_and_batches_of_the_paper() -> None:
    assert PAPER == ((160, 160), (192, 192), (256, 256), (288, 288), (320, 320))
    level = level_batches((256, 256), 128, PAPER)
    assert [batch.batch_size for batch in level] == [327, 227, 128, 101, 81]
    published = level_batches((256, 256), 128, PAPER, never_below=True)
    assert [batch.batch_size for batch in published] == [327, 227, 128, 128, 128]
    capped = level_batches((256, 256), 128, PAPER, most=200)
    assert [batch.batch_size for batch in capped] == [200, 200, 128, 101, 81]
    assert [batch.batch_size for batch in level_batches((256, 256), 2, PAPER)] == [5, 3, 2, 2, 2]


def test_updates_relative_to_one_size() -> None:
    # 1 / mean(256^2 / side^2): 0.739; without smaller batches above the base 0.681. The paper counts 232 / 375 = 0.62.
    for never_below, relative_updates in ((False, 0.741), (True, 0.682)):  # to those of an epoch of 128 images a step
        batches = level_batches((256, 256), 128, PAPER, never_below=never_below)
        assert 128 * len(batches) / sum(b.batch_size for b in batches) == pytest.approx(relative_updates, rel=2e-3)
    (sampler,) = samplers(200_000, 1, level_batches((256, 256), 128, PAPER))
    assert len(sampler.start(0)) / (200_000 / 128) == pytest.approx(0.741, rel=0.03)


def test_other_bases_and_shapes() -> None:
    assert multi_scale_sizes((128, 128)) == ((64, 64), (96, 96), (128, 128), (160, 160))
    assert multi_scale_sizes((64, 128))[0] == (32, 64)
    (batch,) = level_batches((256, 256), 16, [(128, 256)])
    assert batch == SizedBatch(size=(128, 256), batch_size=32)


@settings(deadline=None, max_examples=60)
@given(
    world_size=st.integers(1, 9),
    extra=st.integers(0, 400),
    batch_sizes=st.lists(st.integers(2, 17), min_size=1, max_size=5),
    epoch=st.integers(0, 3),
)
def test_every_image_once_and_equal_sizes(world_size: int, extra: int, batch_sizes: list[int], epoch: int) -> None:
    count = 2 * world_size + extra
    batches = [SizedBatch(size=(32 * (n + 1), 32), batch_size=b) for n, b in enumerate(batch_sizes)]
    read_by = [read(sampler, epoch) for sampler in samplers(count, world_size, batches)]
    numbers = [number for steps in read_by for step in steps for number, _, _ in step]
    assert sorted(numbers) == list(range(count))
    for parts in zip(*read_by, strict=True):  # as many steps for all
        assert len({size for part in parts for _, _, size in part}) == 1
        sizes = [len(part) for part in parts]
        assert min(sizes) >= 2
        assert max(sizes) - min(sizes) <= 1


def test_epochs_and_seeds_differ_and_repeat() -> None:
    (sampler,) = samplers(50, 1, [SizedBatch(size=None, batch_size=8)])
    first = read(sampler, 0)
    assert read(sampler, 1) != first
    assert read(sampler, 0) == first
    other = EpochSampler(50, [SizedBatch(size=None, batch_size=8)], seed=8)
    assert read(other, 0) != first
    seeds = {number: seed for step in first for number, seed, _ in step}
    assert len(set(seeds.values())) == 50
    again = {number: seed for step in read(sampler, 1) for number, seed, _ in step}
    assert all(again[number] != seed for number, seed in seeds.items())


@pytest.mark.parametrize("first", [0, 1, 5, 12])
def test_resuming_in_an_epoch(first: int) -> None:
    for sampler in samplers(157, 2, level_batches((64, 64), 6, multi_scale_sizes((64, 64)))):
        assert read(sampler, 3, (), first) == read(sampler, 3)[first:]


@settings(deadline=None, max_examples=40)
@given(worlds=st.lists(st.integers(1, 5), min_size=2, max_size=4), steps=st.lists(st.integers(0, 3), min_size=4))
def test_another_number_of_processes_goes_on_where_they_stopped(worlds: list[int], steps: list[int]) -> None:
    count, batches = 211, level_batches((64, 64), 4, multi_scale_sizes((64, 64)))
    segments: list[Segment] = []
    seen: list[int] = []
    for turn, world_size in enumerate(worlds):
        last = turn == len(worlds) - 1
        everyone = samplers(count, world_size, batches)
        planned = everyone[0].start(1, segments)
        going = planned if last else planned[: steps[turn]]
        for sampler in everyone:
            seen += [number for step in read(sampler, 1, segments)[: len(going)] for number, _, _ in step]
        if not last and going:
            segments.append((world_size, going[-1].stop))
    assert sorted(seen) == list(range(count))


def test_shards_are_read_a_few_at_a_time() -> None:
    per_shard, num_shards = 10, 4 * SHARDS_AT_ONCE
    shards = [range(n * per_shard, (n + 1) * per_shard) for n in range(num_shards)]
    count = per_shard * num_shards
    for rank, sampler in enumerate(samplers(count, 2, [SizedBatch(size=None, batch_size=16)], shards=shards)):
        numbers = [number for step in read(sampler, rank) for number, _, _ in step]
        assert len({number // per_shard for number in numbers}) == num_shards / 2  # each process has its own
        window = [number // per_shard for number in numbers[: per_shard * SHARDS_AT_ONCE]]
        assert len(set(window)) == SHARDS_AT_ONCE
        assert len(set(window[:per_shard])) > 2  # and they are mixed


def test_too_few_images_for_the_processes() -> None:
    with pytest.raises(ValueError, match=r"7 images are too few for 4 processes.*use fewer"):
        EpochSampler(7, [SizedBatch(size=None, batch_size=4)], seed=0, world_size=4)


def test_in_order() -> None:
    assert [[key[0] for key in step] for step in ordered_batches(7, 2, rank=1, world_size=3)] == [[1, 4]]
    assert ordered_batches(0, 4) == []
    assert torch.tensor([key for step in ordered_batches(5, 2) for key, _, _ in step]).tolist() == [0, 1, 2, 3, 4]
