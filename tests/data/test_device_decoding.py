from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode

from mobilevit.data import device_decoding
from mobilevit.data.device_decoding import (
    MOST_AT_ONCE,
    EncodedCrop,
    EncodedCropTransform,
    decode_crops,
    require_decoder,
)
from mobilevit.data.imageset import ImageSet
from mobilevit.data.loaders import Batch, BatchLoader, ahead_on
from mobilevit.data.samplers import SizedBatch
from mobilevit.data.shapes import render_scene
from mobilevit.data.transforms import ClassificationTransform
from mobilevit.imaging.preprocessing import Preprocessing

CPU = torch.device("cpu")
SMALL = Preprocessing(size=(48, 64))


def encoded(kind: str, number: int) -> bytes:
    image, data = render_scene(number, size=90).image, io.BytesIO()
    image.convert("L" if kind == "gray" else "RGB").save(data, "PNG" if kind == "PNG" else "JPEG", quality=95)
    return data.getvalue()


def images(*files: bytes) -> ImageSet[int]:
    return ImageSet(
        task="classification",
        origin="",
        names=[f"{n}.jpg" for n in range(len(files))],
        targets=list(range(len(files))),
        classes=tuple(map(str, range(len(files)))),
        open=files.__getitem__,
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_device_shows_what_the_cpu_would(num_workers: int) -> None:
    data = images(*(encoded(kind, n) for n, kind in enumerate(["JPEG", "JPEG", "PNG", "gray", "JPEG", "JPEG"])))
    batches: list[list[Batch]] = []
    for transform in (
        EncodedCropTransform(preprocessing=SMALL, min_crop_area=0.3),
        ClassificationTransform(preprocessing=SMALL, min_crop_area=0.3),
    ):
        sizes = [SizedBatch(size=(32, 48), batch_size=3), SizedBatch(size=(64, 64), batch_size=2)]
        loader = BatchLoader(data, transform, batch_size=3, num_workers=num_workers, shuffle_seed=4, sizes=sizes)
        loader.start(1)
        batches.append(list(ahead_on(CPU, loader.epoch())))
    assert len(batches[0]) == len(batches[1]) > 1
    for ours, theirs in zip(*batches, strict=True):
        assert ours.indices == theirs.indices
        assert torch.equal(ours.targets, theirs.targets)
        difference = (ours.images.int() - theirs.images.int()).abs()  # bytes are rounded once more on the CPU
        assert difference.max() <= 4
        assert difference.float().mean() < 0.5
        assert ours.images.is_contiguous(memory_format=torch.channels_last)


def test_damaged_images_are_named_and_left_out() -> None:
    whole = encoded("JPEG", 1)
    data = images(whole, whole[: len(whole) // 2], b"no image", whole)
    loader = BatchLoader(
        data, EncodedCropTransform(preprocessing=SMALL, min_crop_area=1.0), batch_size=4, num_workers=0, shuffle_seed=0
    )
    loader.start(0)
    (batch,) = ahead_on(CPU, loader.epoch())
    assert sorted(batch.indices) == [0, 3]
    assert batch.targets.tolist() == batch.indices
    assert batch.images.shape == (2, 3, 48, 64)
    assert sorted(error.split(":")[0] for error in batch.errors) == ["1.jpg", "2.jpg"]


def test_a_batch_without_a_readable_image() -> None:
    half = encoded("JPEG", 1)[:600]
    loader = BatchLoader(
        images(half, half), EncodedCropTransform(preprocessing=SMALL, min_crop_area=1.0), batch_size=2,
        num_workers=0, shuffle_seed=0,
    )  # fmt: skip
    loader.start(0)
    (batch,) = ahead_on(CPU, loader.epoch())
    assert (len(batch), len(batch.errors), batch.images.shape[0]) == (0, 2, 0)


def test_many_times_smaller_takes_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = np.mgrid[:3200, :3001]
    pixels = np.stack([columns * 255 // 3000, rows * 255 // 3199, np.full_like(rows, 60)], axis=-1)
    image, data = Image.fromarray(pixels.astype(np.uint8)), io.BytesIO()
    image.save(data, "JPEG", quality=95)
    most = 0.0
    plain = torch.nn.functional.interpolate

    def watched(part: torch.Tensor, size: tuple[int, int], *, mode: str, antialias: bool) -> torch.Tensor:
        nonlocal most
        most = max(most, part.shape[2] / size[0], part.shape[3] / size[1])
        return plain(part, size, mode=mode, antialias=antialias)

    monkeypatch.setattr(torch.nn.functional, "interpolate", watched)
    crop = EncodedCrop("a.jpg", data.getvalue(), (0, 0, 3001, 3200), (40, 32), False)
    (found,), _, _ = decode_crops([crop], CPU)
    assert most <= MOST_AT_ONCE
    wanted = torch.from_numpy(np.array(image.resize((32, 40), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert (found.int() - wanted.int()).abs().max() <= 3


def test_a_gpu_decodes_to_rgb_once_its_stream_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    class Stream:
        def synchronize(self) -> None:
            done.append("synchronize")

    def decode(files: list[torch.Tensor], mode: ImageReadMode, device: torch.device) -> list[torch.Tensor]:
        done.append(mode.name)
        return [torch.zeros(3, 8, 8, dtype=torch.uint8) for _ in files]

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    monkeypatch.setattr(device_decoding, "decode_jpeg", decode)
    require_decoder(torch.device("cuda"))
    assert done == ["synchronize", "RGB"]

    def without(*_: object, **__: object) -> None:
        raise RuntimeError("not compiled with nvJPEG support\nand more")

    monkeypatch.setattr(device_decoding, "decode_jpeg", without)
    require_decoder(CPU)
    with pytest.raises(ValueError, match=r"cannot decode JPEGs \(not compiled with nvJPEG support\); use --decode cpu"):
        require_decoder(torch.device("cuda"))


def test_training_reads_that_way(shapes: object, tmp_path: object) -> None:
    from pathlib import Path

    from mobilevit.training.config import TrainConfig
    from mobilevit.training.loop import train

    folder = Path(str(tmp_path)) / "jpegs"
    for path in Path(str(shapes)).rglob("*.png"):
        target = folder / path.parent.name / f"{path.stem}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(path).convert("RGB"))).save(target, quality=95)
    losses = []
    for decode in ("cpu", "device"):
        config = TrainConfig(
            data=folder, out=Path(str(tmp_path)) / decode, image_size=32, epochs=1, batch_size=8, num_workers=0,
            learning_rate=1e-3, decode=decode,
        )  # fmt: skip
        losses.append(train(config).report.summary["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=0.01)
    with pytest.raises(ValueError, match="--randaugment is 9; it must be 0 with --decode device"):
        TrainConfig(data=folder, decode="device", randaugment=9).validate()
