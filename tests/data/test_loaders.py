import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from box_files import boxes_of
from mobilevit.data.imageset import ImageSet
from mobilevit.data.loaders import Batch, BatchLoader, _arrived, level_batches
from mobilevit.imaging.decode import EncodedImage, open_image
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.tasks.classification import CLASSIFICATION
from mobilevit.tasks.detection import DETECTION
from mobilevit.tasks.segmentation import SEGMENTATION
from mobilevit.tasks.settings import ClassificationSettings, DetectionSettings, SegmentationSettings
from mobilevit.tasks.targets import Boxes, Mask
from mobilevit.tasks.transforms import (
    BoxTargets,
    ClassificationTransform,
    DetectionTransform,
    SegmentationTransform,
    collate_boxes,
)

SMALL = Preprocessing(size=(32, 32), crop_fraction=1.0)


def noise(count: int, *, bad: tuple[int, ...] = ()) -> ImageSet[int]:
    """`count` images of noise, the `bad` ones broken; an image's label is its number."""
    random = np.random.default_rng(0)
    images: list[Any] = list(random.integers(0, 256, (count, 40, 36, 3), np.uint8))
    for number in bad:
        images[number] = b"not an image"
    names = [f"{number}.png" for number in range(count)]
    return ImageSet(
        task=CLASSIFICATION,
        origin="noise",
        names=names,
        targets=list(range(count)),
        classes=tuple(names),
        open=images.__getitem__,
    )


def resized(image: EncodedImage, label: int) -> tuple[torch.Tensor, int]:
    return torch.from_numpy(SMALL.resize(image.decode())).permute(2, 0, 1), label


def augmented(data: ImageSet[int], *, batch_size: int = 4, num_workers: int = 0, seed: int = 5) -> BatchLoader:
    transform = ClassificationTransform(
        preprocessing=SMALL,
        settings=ClassificationSettings(min_crop_area=0.3, randaugment=9, random_erasing=0.5),
        flip=True,
    )
    return BatchLoader(data, transform, batch_size=batch_size, num_workers=num_workers, shuffle_seed=seed)


def in_order(data: ImageSet[int], *, batch_size: int = 4, num_workers: int = 0) -> BatchLoader:
    return BatchLoader(data, resized, batch_size=batch_size, num_workers=num_workers)


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert [batch.indices for batch in first] == [batch.indices for batch in second]
    assert [batch.errors for batch in first] == [batch.errors for batch in second]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert len(a) == len(b) == len(a.indices)
        if len(a):
            assert torch.equal(a.targets, b.targets)


def epoch_of(loader: BatchLoader, epoch: int, first_step: int = 0) -> Iterator[Batch]:
    loader.start(epoch, (), first_step)
    return loader.epoch()


def order(batches: Iterable[Batch]) -> list[int]:
    return [index for batch in batches for index in batch.indices]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_covers_everything_in_order(num_workers: int) -> None:
    data = noise(11)
    loader = in_order(data, num_workers=num_workers)
    batches = list(loader.epoch())
    assert [batch.indices for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [batch.targets.tolist() for batch in batches] == [batch.indices for batch in batches]
    assert (len(loader), loader.num_images) == (3, 11)
    images = torch.cat([batch.images for batch in batches])
    expected = [resized(open_image(data.open(index)), 0)[0] for index in range(11)]
    assert torch.equal(images, torch.stack(expected))
    assert_same(list(loader.epoch()), batches)  # a second time, by the same workers


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_uint8_and_channels_last(num_workers: int) -> None:
    for loader in (augmented(noise(8), num_workers=num_workers), in_order(noise(8), num_workers=num_workers)):
        for batch in loader.epoch():
            assert (batch.images.shape, batch.images.dtype) == ((4, 3, 32, 32), torch.uint8)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.targets.dtype == torch.int64


def test_order_depends_on_seed_and_epoch_alone() -> None:
    data = noise(40)
    loader = augmented(data)
    first = list(epoch_of(loader, 3))
    list(epoch_of(loader, 0))
    torch.manual_seed(99)
    assert_same(list(epoch_of(loader, 3)), first)
    assert_same(list(epoch_of(augmented(data), 3)), first)
    orders = {tuple(order(epoch_of(augmented(data, seed=seed), epoch))) for seed in range(3) for epoch in range(4)}
    assert len(orders) == 12


def test_a_image_changes_from_epoch_to_epoch() -> None:
    loader = augmented(noise(4))
    epochs = [next(epoch_of(loader, epoch)) for epoch in range(5)]
    seen = {bytes(batch.images[batch.indices.index(2)].numpy()) for batch in epochs}
    assert len(seen) == 5


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("first_batch", [1, 3, 4, 5])
def test_resuming_gives_exactly_the_remaining_batches(num_workers: int, first_batch: int) -> None:
    data = noise(21)
    whole = list(epoch_of(augmented(data), 2))
    assert [len(batch) for batch in whole] == [4, 4, 4, 4, 5]  # one image alone would have no statistics
    assert_same(list(epoch_of(augmented(data, num_workers=num_workers), 2, first_batch)), whole[first_batch:])


def test_workers_change_nothing() -> None:
    data = noise(18, bad=(3, 11))
    assert_same(list(epoch_of(augmented(data, num_workers=2), 1)), list(epoch_of(augmented(data), 1)))
    assert_same(list(in_order(data, num_workers=2).epoch()), list(in_order(data).epoch()))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_callers_random_numbers_are_left_alone(num_workers: int) -> None:
    loader = augmented(noise(12), num_workers=num_workers)
    before = torch.get_rng_state()
    for epoch in range(2):
        for _ in epoch_of(loader, epoch):
            assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_left_early_does_not_leak_into_the_next(num_workers: int) -> None:
    data = noise(32)
    loader = augmented(data, num_workers=num_workers)
    begun = epoch_of(loader, 0)
    next(begun)
    next(begun)
    assert_same(list(epoch_of(loader, 1)), list(epoch_of(augmented(data), 1)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_named_and_left_out(num_workers: int) -> None:
    batches = list(in_order(noise(10, bad=(1, 2, 9)), num_workers=num_workers).epoch())
    assert [batch.indices for batch in batches] == [[0, 3], [4, 5, 6, 7], [8]]
    assert [batch.targets.tolist() for batch in batches] == [[0, 3], [4, 5, 6, 7], [8]]
    assert [len(batch.images) for batch in batches] == [2, 4, 1]
    errors = [error for batch in batches for error in batch.errors]
    assert [error.split(": not an image")[0] for error in errors] == ["1.png", "2.png", "9.png"]


def test_a_batch_without_a_readable_image() -> None:
    (batch,) = in_order(noise(3, bad=(0, 1, 2))).epoch()
    assert (len(batch.images), batch.images.shape[1], batch.images.dtype) == (0, 3, torch.uint8)
    assert (len(batch), batch.targets, batch.indices) == (0, None, [])
    assert len(batch.errors) == 3


@pytest.mark.parametrize(
    ("count", "sizes"), [(8, [4, 4]), (9, [4, 5]), (11, [4, 4, 3]), (4, [4]), (3, [3]), (1, [1])], ids=str
)
def test_shuffled_epochs_show_every_image_once(count: int, sizes: list[int]) -> None:
    loader = augmented(noise(count))
    for epoch in range(3):
        assert [len(batch.indices) for batch in epoch_of(loader, epoch)] == sizes
        assert sorted(order(epoch_of(loader, epoch))) == list(range(count))
    loader.start(0)
    assert (len(loader), loader.num_images) == (len(sizes), count)


def test_sizes_change_from_step_to_step() -> None:
    sizes = level_batches((64, 64), 4, [(32, 32), (64, 32), (64, 64)])
    transform = ClassificationTransform(
        preprocessing=SMALL, settings=ClassificationSettings(min_crop_area=0.3), flip=True
    )
    loader = BatchLoader(noise(120), transform, batch_size=4, num_workers=0, shuffle_seed=1, sizes=sizes)
    steps = loader.start(0)
    batches = list(loader.epoch())
    assert [tuple(batch.images.shape[2:]) for batch in batches] == [step.size for step in steps]
    assert {step.size for step in steps} == {(32, 32), (64, 32), (64, 64)}
    batch_size = {size.size: size.batch_size for size in sizes}
    assert [len(batch) for batch in batches[:-1]] == [batch_size[step.size] for step in steps[:-1]]
    assert sorted(order(batches)) == list(range(120))


SCRIPT = """
import os, signal
import numpy as np
import torch
from mobilevit.data.imageset import ImageSet
from mobilevit.tasks.targets import Boxes, Mask
from mobilevit.data.loaders import BatchLoader
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.tasks.classification import CLASSIFICATION

images = [np.zeros((32, 32, 3), np.uint8)] * 40
resize = Preprocessing(size=(32, 32)).resize
def transform(image, label):
    return torch.from_numpy(resize(image.decode())).permute(2, 0, 1), label
data = ImageSet(
    task=CLASSIFICATION, origin="", names=["x"] * 40, targets=[0] * 40, classes=("a",), open=images.__getitem__
)
loader = BatchLoader(data, transform, batch_size=2, num_workers=2)
epoch = loader.epoch()
done = [*next(epoch).indices, *next(epoch).indices]  # one from each worker: both are up
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
    os.killpg(0, number)
done += [index for _ in range(15) for index in next(epoch).indices]
print(done == list(range(34)), flush=True)
raise RuntimeError("in the middle of an epoch")
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_workers_live_on_when_their_group_is_told_to_end_and_end_with_the_parent() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False, start_new_session=True
    )
    assert ended.stdout == "True\n"
    assert ended.stderr.rstrip().endswith("RuntimeError: in the middle of an epoch")
    assert ended.returncode == 1


def test_pinned_batches_keep_everything() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    data = noise(6, bad=(1,))
    loader = BatchLoader(data, resized, batch_size=4, num_workers=0, pin_memory=True)
    batches = list(loader.epoch())
    assert all(batch.images.is_pinned() and batch.targets.is_pinned() for batch in batches)
    assert_same(batches, list(in_order(data).epoch()))


# -- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("count", "shards"), [(11, 1), (11, 2), (12, 3), (11, 4), (2, 3)])
def test_shards_cover_every_image_once(count: int, shards: int, num_workers: int) -> None:
    seen = []
    for shard in range(shards):
        loader = BatchLoader(noise(count), resized, batch_size=4, num_workers=num_workers, shard=(shard, shards))
        batches = list(loader.epoch())
        assert order(batches) == list(range(shard, count, shards))
        assert [batch.targets.tolist() for batch in batches] == [batch.indices for batch in batches]
        assert (len(loader), loader.num_images) == (len(batches), len(order(batches)))
        seen += order(batches)
    assert sorted(seen) == list(range(count))


def test_shuffled_shards_have_nothing_in_common() -> None:
    loaders = [
        BatchLoader(noise(16), resized, batch_size=4, num_workers=0, shuffle_seed=3, shard=(shard, 2))
        for shard in range(2)
    ]
    first, second = (order(epoch_of(loader, 1)) for loader in loaders)
    assert sorted(first + second) == list(range(16))
    assert (len(first), first != sorted(first)) == (8, True)


# -- boxes and masks --------------------------------------------------------------------------------------------------


def boxed(count: int) -> ImageSet[Boxes]:
    """Image n, of 36 x 40 pixels, has n boxes of classes 0, 1 and so on."""
    plain = noise(count)
    targets = [boxes_of([[4, 4, 20 + i, 30] for i in range(n)], list(range(n))) for n in range(count)]
    return ImageSet(
        task=DETECTION, origin="boxed", names=plain.names, targets=targets, classes=plain.classes, open=plain.open
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_boxes(num_workers: int) -> None:
    loader = BatchLoader(
        boxed(6),
        DetectionTransform(preprocessing=SMALL, settings=DetectionSettings(), flip=True, photometric_distortion=True),
        collate=collate_boxes,
        batch_size=3,
        num_workers=num_workers,
        shuffle_seed=1,
    )
    batches = list(epoch_of(loader, 0))
    for batch in batches:
        assert isinstance(batch.targets, BoxTargets)
        assert batch.targets.boxes_cxcywh.shape == (*batch.targets.labels.shape, 4)
        assert len(batch.images) == len(batch.targets.labels) == len(batch) == 3
        for index, labels in zip(batch.indices, batch.targets.labels.tolist(), strict=True):
            assert set(labels) <= {-1, *range(index)}
    again = list(epoch_of(loader, 0))
    assert all(torch.equal(a.targets.boxes_cxcywh, b.targets.boxes_cxcywh) for a, b in zip(batches, again, strict=True))


def test_batches_of_masks_and_a_mask_that_does_not_fit(tmp_path: Path) -> None:
    plain = noise(3)
    for number, size in enumerate([(36, 40), (40, 36), (36, 40)]):
        Image.new("L", size, number).save(tmp_path / f"{number}.png")
    data = ImageSet(
        task=SEGMENTATION,
        origin="masked",
        names=plain.names,
        targets=[Mask(path=tmp_path / name, class_of=bytes(range(256))) for name in plain.names],
        classes=plain.classes,
        open=plain.open,
    )
    transform = SegmentationTransform(
        preprocessing=SMALL,
        settings=SegmentationSettings(rotation=0, scale_range=(1, 1)),
        crop_size=(32, 48),
        flip=True,
        photometric_distortion=True,
    )
    (batch,) = BatchLoader(data, transform, collate=torch.stack, batch_size=4, num_workers=0).epoch()
    assert batch.indices == [0, 2]
    assert (batch.targets.shape, batch.targets.dtype) == ((2, 32, 48), torch.uint8)
    assert [set(mask.unique().tolist()) for mask in batch.targets] == [{0, 255}, {2, 255}]
    assert batch.errors == [f"{tmp_path / '1.png'}: 40 x 36 pixels, its image has 36 x 40; they must agree"]


def test_every_tensor_of_a_batch_is_mapped() -> None:
    one, two = torch.ones(2), torch.zeros(1)

    def mapped(targets: object) -> Batch:
        return Batch(images=two, targets=targets, indices=[0], errors=[]).map(torch.neg)

    assert torch.equal(mapped(one).images, -two)
    assert torch.equal(mapped(one).targets, -one)
    boxes = mapped(BoxTargets(one, two)).targets
    assert isinstance(boxes, BoxTargets)
    assert torch.equal(boxes.boxes_cxcywh, -one)
    assert mapped([one]).targets[0] is one
    assert mapped(None).targets is None


def test_what_was_copied_ahead_is_waited_for_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, waited, recorded = [], [], []

    class Stream:
        def wait_event(self, event: object) -> None:
            waited.append(event)

    def current_stream(device: torch.device | None = None) -> Stream:
        asked.append(device)
        return Stream()

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, _: recorded.append(tensor.shape))
    (batch,) = in_order(noise(3), batch_size=3).epoch()
    copied: Any = object()
    assert len(_arrived(batch, copied, torch.device("cuda:1"))) == 3
    assert (asked, waited) == ([torch.device("cuda:1")], [copied])
    assert sorted(recorded) == sorted([batch.images.shape, batch.targets.shape])
