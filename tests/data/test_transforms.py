import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from mobilevit.data.shapes import render_scene
from mobilevit.data.transforms import mix_transform, train_transform
from mobilevit.preprocessing import Preprocessing


def square(side: int) -> Preprocessing:
    return Preprocessing(size=(side, side), crop_fraction=1.0)


def positions(width: int, height: int) -> Image.Image:
    """Red is the place from left to right, green from top to bottom, both in 0..255."""
    y, x = np.mgrid[:height, :width]
    channels = (255 * x / (width - 1), 255 * y / (height - 1), np.zeros((height, width)))
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (32, 64)])
@pytest.mark.parametrize("picture", [(100, 80), (20, 90), (1, 1)])
def test_size_type_and_layout(size: tuple[int, int], picture: tuple[int, int]) -> None:
    preprocessing = Preprocessing(size=size)
    for randaugment, random_erasing in ((0, 0.0), (9, 1.0)):
        transform = train_transform(
            preprocessing, min_crop_area=0.2, randaugment=randaugment, random_erasing=random_erasing
        )
        pixels = transform(Image.new("RGB", picture, "teal"))
        assert (pixels.shape, pixels.dtype) == ((3, *size), torch.uint8)
        assert pixels.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_without_any_chance_it_is_the_evaluations_resize(interpolation: str) -> None:
    preprocessing = Preprocessing(size=(40, 40), crop_fraction=1.0, interpolation=interpolation)  # type: ignore[arg-type]
    transform = train_transform(preprocessing, min_crop_area=1.0, flip=False)
    image = render_scene(3, size=100).image
    for _ in range(5):
        assert torch.equal(transform(image), preprocessing.resize(image))


def test_crops_are_as_large_as_they_may_be() -> None:
    transform = train_transform(square(32), min_crop_area=0.35, flip=False)
    areas, ratios = [], []
    for _ in range(300):
        pixels = transform(positions(200, 200)).double()
        spans = [(pixels[c].max() - pixels[c].min()).item() / 255 * 32 / 31 for c in (0, 1)]
        areas.append(spans[0] * spans[1])
        ratios.append(spans[0] / spans[1])
    assert 0.33 < min(areas) < 0.42
    assert 0.95 < max(areas) < 1.07
    assert 0.60 < np.mean(areas) < 0.75  # uniform over 0.35 to 1
    assert 0.70 < min(ratios) < 0.80
    assert 1.25 < max(ratios) < 1.40


def test_half_of_the_pictures_are_mirrored() -> None:
    image = positions(32, 32)
    upright = square(32).resize(image)
    for flip, least, most in ((True, 80, 120), (False, 0, 0)):
        transform = train_transform(square(32), min_crop_area=1.0, flip=flip)
        mirrored = 0
        for _ in range(200):
            pixels = transform(image)
            if not torch.equal(pixels, upright):
                assert torch.equal(pixels, upright.flip(2))  # left and right, never up and down
                mirrored += 1
        assert least <= mirrored <= most


@pytest.mark.parametrize(("probability", "least", "most"), [(0.0, 0, 0), (0.25, 30, 70), (1.0, 200, 200)])
def test_erasing(probability: float, least: int, most: int) -> None:
    transform = train_transform(square(64), min_crop_area=1.0, flip=False, random_erasing=probability)
    erased = 0
    for _ in range(200):
        black = (transform(Image.new("RGB", (64, 64), "white")) == 0).all(dim=0)
        if not black.any():
            continue
        erased += 1
        rows, columns = black.any(dim=1), black.any(dim=0)
        assert torch.equal(black, rows[:, None] & columns[None])  # one rectangle ...
        assert 0.015 < black.double().mean() < 0.35  # ... of 2 to 33 % of the area
    assert least <= erased <= most


def test_randaugment_changes_pictures_in_many_ways() -> None:
    image = render_scene(1, size=48).image
    plain = square(48).resize(image)
    transform = train_transform(square(48), min_crop_area=1.0, flip=False, randaugment=9)
    seen = {bytes(transform(image).numpy()) for _ in range(40)}
    assert len(seen) > 20
    assert len(seen - {bytes(plain.numpy())}) > 20
    weak = train_transform(square(48), min_crop_area=1.0, flip=False, randaugment=1)
    strong = train_transform(square(48), min_crop_area=1.0, flip=False, randaugment=30)
    gaps = [np.mean([(t(image).int() - plain.int()).abs().float().mean() for _ in range(60)]) for t in (weak, strong)]
    assert gaps[1] > 1.5 * gaps[0]


def test_the_same_random_state_gives_the_same_picture() -> None:
    transform = train_transform(square(32), min_crop_area=0.2, randaugment=9, random_erasing=0.5)
    image = render_scene(0, size=64).image
    sent = pickle.loads(pickle.dumps(transform))  # what a reading process gets where there is no fork
    for seed in range(5):
        torch.manual_seed(seed)
        first = transform(image)
        torch.manual_seed(seed)
        assert torch.equal(transform(image), first)
        torch.manual_seed(seed)
        assert torch.equal(sent(image), first)


def constant_pictures() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four pictures, each of one value and a class of its own of six: pictures, labels, value by class."""
    values = torch.tensor([0.0, 0.1, 0.5, 0.0, 0.0, 1.0])
    labels = torch.tensor([1, 5, 0, 2])
    images = values[labels][:, None, None, None].expand(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return images, labels, values


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_labels_are_mixed_as_the_pictures_are(mixup: float, cutmix: float) -> None:
    mix = mix_transform(6, mixup=mixup, cutmix=cutmix)
    assert mix is not None
    images, labels, values = constant_pictures()
    for _ in range(30):
        mixed, shares = mix(images, labels)
        assert (mixed.shape, mixed.dtype, shares.shape) == (images.shape, torch.float32, (4, 6))
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(shares.sum(dim=1), torch.ones(4))
        assert shares.min() >= 0
        assert torch.allclose(mixed.mean(dim=(1, 2, 3)), shares @ values, atol=1e-5)


def test_mixup_blends_and_cutmix_pastes() -> None:
    images, labels, values = constant_pictures()
    pasted = {}
    for name, mixup, cutmix in (("mixup", 1.0, 0.0), ("cutmix", 0.0, 1.0), ("both", 1.0, 1.0)):
        mix = mix_transform(6, mixup=mixup, cutmix=cutmix)
        assert mix is not None
        pasted[name] = sum(bool(torch.isin(mix(images, labels)[0], values).all()) for _ in range(60))
    assert pasted["mixup"] == 0
    assert pasted["cutmix"] == 60
    assert 18 <= pasted["both"] <= 42


def test_no_mixing() -> None:
    assert mix_transform(6, mixup=0.0, cutmix=0.0) is None
