import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms.autoaugment import _apply_op

from box_files import boxes_of
from mobilevit.class_names import IGNORE
from mobilevit.data.shapes import render_scene
from mobilevit.errors import ImageError
from mobilevit.imaging.decode import open_image
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.tasks.settings import ClassificationSettings, DetectionSettings, SegmentationSettings
from mobilevit.tasks.targets import Boxes, Mask
from mobilevit.tasks.transforms import (
    ClassificationTransform,
    DetectionTransform,
    SegmentationTransform,
    collate_boxes,
    decoded_pixels,
    mix_transform,
    random_crop,
)
from sample_images import encoded, noise_jpeg, smooth

# -- decoding ------------------------------------------------------------------------------------------


def classification_transform(
    *, preprocessing: Preprocessing, flip: bool = True, **settings: object
) -> ClassificationTransform:
    return ClassificationTransform(preprocessing=preprocessing, settings=ClassificationSettings(**settings), flip=flip)


def detection_transform(
    *, preprocessing: Preprocessing, flip: bool = True, photometric_distortion: bool = True, **settings: object
) -> DetectionTransform:
    return DetectionTransform(
        preprocessing=preprocessing,
        settings=DetectionSettings(**settings),
        flip=flip,
        photometric_distortion=photometric_distortion,
    )


def segmentation_transform(
    *,
    preprocessing: Preprocessing,
    crop_size: tuple[int, int],
    flip: bool = True,
    photometric_distortion: bool = True,
    **settings: object,
) -> SegmentationTransform:
    return SegmentationTransform(
        preprocessing=preprocessing,
        settings=SegmentationSettings(**settings),
        crop_size=crop_size,
        flip=flip,
        photometric_distortion=photometric_distortion,
    )


@pytest.mark.parametrize("kind", ["JPEG", "gray JPEG", "CMYK JPEG", "turned JPEG", "4:4:4 JPEG", "PNG"])
def test_pixels_are_those_of_decode(kind: str) -> None:
    image, options = smooth(123, 77), {}
    if kind == "gray JPEG":
        image = image.convert("L")
    elif kind == "CMYK JPEG":
        image = image.convert("CMYK")
    elif kind == "turned JPEG":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    elif kind == "4:4:4 JPEG":
        options["subsampling"] = 0
    data = encoded(image, kind.split()[-1], **options)
    for reduction in (1.0, 2.5):
        pixels = decoded_pixels(open_image(data), reduction)
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(open_image(data).decode(reduction)))
        assert pixels.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("reduction", [1.0, 4.0])
def test_truncated_jpegs_have_no_pixels(reduction: float) -> None:
    data = noise_jpeg()
    for length in (len(data) // 2, len(data) - 40):
        with pytest.raises(ImageError, match=r"^half\.jpg: cannot be read \(image file is truncated"):
            decoded_pixels(open_image(data[:length], "half.jpg"), reduction)


# -- classification ---------------------------------------------------------------------------------------------------


def square(side: int) -> Preprocessing:
    return Preprocessing(size=(side, side), crop_fraction=1.0)


def evaluated(preprocessing: Preprocessing, image: Image.Image) -> Tensor:
    """The input as in evaluation, as a tensor."""
    return torch.from_numpy(preprocessing.resize(image)).permute(2, 0, 1)


def positions(width: int, height: int) -> Image.Image:
    """Red is the place from left to right, green from top to bottom, both in 0..255."""
    y, x = np.mgrid[:height, :width]
    channels = (255 * x / (width - 1), 255 * y / (height - 1), np.zeros((height, width)))
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (32, 64)])
@pytest.mark.parametrize("image", [(100, 80), (20, 90), (1, 1)])
def test_size_type_and_layout(size: tuple[int, int], image: tuple[int, int]) -> None:
    preprocessing = Preprocessing(size=size)
    for randaugment, random_erasing in ((0, 0.0), (9, 1.0)):
        transform = classification_transform(
            preprocessing=preprocessing, min_crop_area=0.2, randaugment=randaugment, random_erasing=random_erasing
        )
        pixels, label = transform(Image.new("RGB", image, "teal"), 3)
        assert label == 3
        assert (pixels.shape, pixels.dtype) == ((3, *size), torch.uint8)
        assert pixels.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_without_any_chance_it_is_the_evaluations_resize(interpolation: str) -> None:
    preprocessing = Preprocessing(size=(40, 40), crop_fraction=1.0, interpolation=interpolation)  # type: ignore[arg-type]
    transform = classification_transform(preprocessing=preprocessing, min_crop_area=1.0, flip=False)
    image = render_scene(3, size=100).image
    for _ in range(5):
        # To one level: PyTorch and Pillow round differently.
        difference = transform(image, 0)[0].int() - evaluated(preprocessing, image).int()
        assert difference.abs().max() <= 1


def test_crops_are_as_large_as_they_may_be() -> None:
    transform = classification_transform(preprocessing=square(32), min_crop_area=0.35, flip=False)
    areas, ratios = [], []
    for _ in range(300):
        pixels = transform(positions(200, 200), 0)[0].double()
        spans = [(pixels[c].max() - pixels[c].min()).item() / 255 * 32 / 31 for c in (0, 1)]
        areas.append(spans[0] * spans[1])
        ratios.append(spans[0] / spans[1])
    assert 0.33 < min(areas) < 0.42
    assert 0.95 < max(areas) < 1.07
    assert 0.60 < np.mean(areas) < 0.75  # uniform over 0.35 to 1
    assert 0.70 < min(ratios) < 0.80
    assert 1.25 < max(ratios) < 1.40


def test_a_jpeg_decoded_smaller_gives_the_same_crop() -> None:
    """To a mean of two levels: the reduced image has been averaged over 2 x 2 pixels before the crop is resized."""
    image = Image.fromarray(
        np.asarray(positions(512, 384)) // 2 + np.asarray(render_scene(3, size=512).image)[:384] // 2
    )
    data = io.BytesIO()
    image.save(data, "JPEG", quality=95)
    transform = classification_transform(preprocessing=square(96), min_crop_area=0.35)
    for seed in range(10):
        torch.manual_seed(seed)
        reduced = transform(data.getvalue(), 0)[0]
        torch.manual_seed(seed)
        whole = transform(Image.open(data).convert("RGB"), 0)[0]
        assert (reduced.float() - whole.float()).abs().mean() < 2


def test_thin_images_are_cropped_in_the_middle() -> None:
    assert random_crop((1000, 10), 0.9) == (493, 0, 506, 10)
    assert random_crop((10, 1000), 0.9) == (0, 493, 10, 506)
    assert random_crop((1, 1), 0.35) == (0, 0, 1, 1)


def test_half_of_the_images_are_mirrored() -> None:
    image = positions(32, 32)
    upright = evaluated(square(32), image)
    for flip, least, most in ((True, 80, 120), (False, 0, 0)):
        transform = classification_transform(preprocessing=square(32), min_crop_area=1.0, flip=flip)
        mirrored = 0
        for _ in range(200):
            pixels, _ = transform(image, 0)
            if not torch.equal(pixels, upright):
                assert torch.equal(pixels, upright.flip(2))  # left and right, never up and down
                mirrored += 1
        assert least <= mirrored <= most


@pytest.mark.parametrize(("probability", "least", "most"), [(0.0, 0, 0), (0.25, 30, 70), (1.0, 200, 200)])
def test_erasing(probability: float, least: int, most: int) -> None:
    transform = classification_transform(
        preprocessing=square(64), min_crop_area=1.0, flip=False, random_erasing=probability
    )
    erased = 0
    for _ in range(200):
        black = (transform(Image.new("RGB", (64, 64), "white"), 0)[0] == 0).all(dim=0)
        if not black.any():
            continue
        erased += 1
        rows, columns = black.any(dim=1), black.any(dim=0)
        assert torch.equal(black, rows[:, None] & columns[None])  # one rectangle ...
        assert 0.015 < black.double().mean() < 0.35  # ... of 2 to 33 % of the area
    assert least <= erased <= most


@pytest.mark.parametrize("magnitude", [9, 30])
def test_randaugment_is_two_of_the_published_operations(magnitude: int) -> None:
    """Those of torchvision's first version, which ml-cvnets trains with, of 31 magnitudes, bilinear, filled black."""
    space = RandAugment()._augmentation_space(31, (32, 32))

    def changed(image: Image.Image) -> list[Image.Image]:
        return [
            _apply_op(image, name, sign * strength, interpolation=InterpolationMode.BILINEAR, fill=None)
            for name, (strengths, is_signed) in space.items()
            for strength in [float(strengths[magnitude]) if strengths.ndim else 0.0]
            for sign in ((1, -1) if is_signed else (1,))
        ]

    image = render_scene(1, size=32).image
    possible = {two.tobytes() for one in changed(image) for two in changed(one)}
    transform = classification_transform(preprocessing=square(32), min_crop_area=1.0, flip=False, randaugment=magnitude)
    seen = {transform(image, 0)[0].permute(1, 2, 0).numpy().tobytes() for _ in range(60)}
    assert seen <= possible
    assert len(seen - {one.tobytes() for one in changed(image)}) > 20


def test_the_same_random_state_gives_the_same_image() -> None:
    transform = classification_transform(preprocessing=square(32), min_crop_area=0.2, randaugment=9, random_erasing=0.5)
    image = render_scene(0, size=64).image
    sent = pickle.loads(pickle.dumps(transform))  # what a reading process gets where there is no fork
    for seed in range(5):
        torch.manual_seed(seed)
        first, _ = transform(image, 0)
        torch.manual_seed(seed)
        assert torch.equal(transform(image, 0)[0], first)
        torch.manual_seed(seed)
        assert torch.equal(sent(image, 0)[0], first)


# -- mixing of images -----------------------------------------------------------------------------------------------


def constant_images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four images, each of one value and a class of its own of six: images, labels, value by class."""
    values = torch.tensor([0.0, 0.1, 0.5, 0.0, 0.0, 1.0])
    labels = torch.tensor([1, 5, 0, 2])
    images = values[labels][:, None, None, None].expand(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return images, labels, values


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_labels_are_mixed_as_the_images_are(mixup: float, cutmix: float) -> None:
    mix = mix_transform(6, mixup=mixup, cutmix=cutmix)
    assert mix is not None
    images, labels, values = constant_images()
    for _ in range(30):
        mixed, shares = mix(images, labels)
        assert (mixed.shape, mixed.dtype, shares.shape) == (images.shape, torch.float32, (4, 6))
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(shares.sum(dim=1), torch.ones(4))
        assert shares.min() >= 0
        assert torch.allclose(mixed.mean(dim=(1, 2, 3)), shares @ values, atol=1e-5)


def test_mixup_blends_and_cutmix_pastes() -> None:
    images, labels, values = constant_images()
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


# -- boxes ------------------------------------------------------------------------------------------------------------


PLAIN = {"zoom_out": 0.0, "iou_crop": False, "flip": False, "photometric_distortion": False}
OPTIONS = {
    "nothing": {},
    "zoom_out": {"zoom_out": 1.0},
    "iou_crop": {"iou_crop": True},
    "flip": {"flip": True},
    "photometric_distortion": {"photometric_distortion": True},
    "everything": {"zoom_out": 0.5, "iou_crop": True, "flip": True, "photometric_distortion": True},
}


def sized(mode: str = "stretch", size: tuple[int, int] = (64, 96)) -> Preprocessing:
    return Preprocessing(size=size, resize_mode=mode, crop_fraction=1.0, interpolation="bilinear")  # type: ignore[arg-type]


def rectangle(box: tuple[int, int, int, int], size: tuple[int, int] = (120, 90)) -> Image.Image:
    """White on black."""
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), box)
    return image


def bright_part(pixels: Tensor) -> list[float]:
    """The box around it in pixels: edges lie where the brightness is between that of the rectangle and the gray."""
    values = pixels.float().mean(dim=0)
    bright = values >= 0.3 * values.min() + 0.7 * values.max()
    columns, rows = bright.any(dim=0).nonzero().flatten(), bright.any(dim=1).nonzero().flatten()
    return [columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1]


@pytest.mark.parametrize("mode", ["stretch", "pad", "crop"])
@pytest.mark.parametrize("option", OPTIONS)
def test_boxes_follow_the_image(option: str, mode: str) -> None:
    preprocessing = sized(mode)
    transform = detection_transform(preprocessing=preprocessing, **(PLAIN | OPTIONS[option]))
    (height, width), seen = preprocessing.size, set()
    for seed in range(60):
        torch.manual_seed(seed)
        box = (20 + seed % 7, 25, 75, 60 + seed % 5)
        pixels, (corners, labels) = transform(rectangle(box), boxes_of([box], [2]))
        assert (pixels.shape, pixels.dtype) == ((3, height, width), torch.uint8)
        assert pixels.permute(1, 2, 0).is_contiguous()
        assert (corners.shape, corners.dtype, labels.tolist()) == ((1, 4), torch.float32, [2])
        found = (corners[0] * torch.tensor([width, height, width, height])).tolist()
        assert np.abs(np.subtract(found, bright_part(pixels))).max() <= 2, (seed, found, bright_part(pixels))
        seen.add(tuple(np.round(found)))
    assert len(seen) > 20 or option in ("nothing", "flip", "photometric_distortion")


def test_without_any_chance_boxes_are_placed_as_in_evaluation() -> None:
    image, target = rectangle((30, 20, 90, 70)), boxes_of([[30, 20, 90, 70], [0, 0, 120, 90]], [1, 0])
    for mode in ("stretch", "pad", "crop"):
        preprocessing = sized(mode)
        pixels, (corners, labels) = detection_transform(preprocessing=preprocessing, **PLAIN)(image, target)
        assert torch.equal(pixels, evaluated(preprocessing, image))
        expected = preprocessing.placement((90, 120)).to_input(target.xyxy.astype(np.float64))
        np.testing.assert_allclose(corners.numpy(), expected, rtol=1e-6)
        assert labels.tolist() == [1, 0]


def test_crops_keep_each_box_with_its_label() -> None:
    """Three rectangles in red, green and blue, which are classes 0, 1 and 2."""
    image = Image.new("RGB", (150, 100))
    boxes = [(10, 10, 50, 90), (60, 20, 90, 60), (100, 40, 140, 95)]
    for channel, box in enumerate(boxes):
        image.paste(tuple(255 * (channel == i) for i in range(3)), box)
    transform = detection_transform(
        preprocessing=sized(), **(PLAIN | {"iou_crop": True, "flip": True, "zoom_out": 0.3})
    )
    counts = []
    for seed in range(60):
        torch.manual_seed(seed)
        pixels, (corners, labels) = transform(image, boxes_of(boxes, [0, 1, 2]))
        for box, label in zip(corners.tolist(), labels.tolist(), strict=True):
            x, y = int((box[0] + box[2]) / 2 * 96), int((box[1] + box[3]) / 2 * 64)
            assert pixels[:, y, x].argmax() == label
        counts.append(len(labels))
    assert set(counts) == {1, 2, 3}


def test_crowds_are_left_out() -> None:
    target = boxes_of([[0, 0, 60, 60], [20, 20, 70, 70]], [3, 1], [True, False])
    transform = detection_transform(preprocessing=sized())
    for seed in range(10):
        torch.manual_seed(seed)
        _, (corners, labels) = transform(rectangle((20, 20, 70, 70)), target)
        assert (corners.shape, labels.tolist()) == ((1, 4), [1])


@pytest.mark.parametrize("target", [boxes_of([], []), boxes_of([[0, 0, 60, 60]], [0], [True])])
def test_images_without_boxes(target: Boxes) -> None:
    transform = detection_transform(preprocessing=sized())
    for seed in range(10):
        torch.manual_seed(seed)
        pixels, (corners, labels) = transform(rectangle((20, 20, 70, 70)), target)
        assert pixels.shape == (3, 64, 96)
        assert (corners.shape, corners.dtype) == ((0, 4), torch.float32)
        assert (labels.shape, labels.dtype) == ((0,), torch.int64)


def test_boxes_that_the_input_does_not_show_are_left_out() -> None:
    preprocessing = sized("crop", (64, 64))  # the middle 90 of 180 columns
    target = boxes_of([[0, 10, 40, 60], [60, 10, 100, 60], [150, 10, 180, 60], [0, 0, 46, 90]], [0, 1, 2, 3])
    _, (corners, labels) = detection_transform(preprocessing=preprocessing, **PLAIN)(
        Image.new("RGB", (180, 90)), target
    )
    assert labels.tolist() == [1, 3]
    assert (corners[:, 2:] > corners[:, :2]).all()  # the loss takes the logarithm of the sides


def test_boxes_padded_to_the_fullest_image() -> None:
    first = torch.tensor([[0.0, 0.2, 0.5, 0.4], [0.5, 0.5, 1.0, 1.0]]), torch.tensor([4, 0])
    batch = collate_boxes([first, (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)), (first[0][:1], first[1][:1])])
    assert batch.labels.tolist() == [[4, 0], [-1, -1], [4, -1]]
    assert batch.labels.dtype == torch.int64
    filling = [0.5, 0.5, 1.0, 1.0]
    expected = [[[0.25, 0.3, 0.5, 0.2], [0.75, 0.75, 0.5, 0.5]], [filling] * 2, [[0.25, 0.3, 0.5, 0.2], filling]]
    torch.testing.assert_close(batch.boxes_cxcywh, torch.tensor(expected))


def test_a_batch_without_any_box_still_has_a_row() -> None:
    batch = collate_boxes([(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))] * 3)
    assert (batch.boxes_cxcywh.shape, batch.labels.tolist()) == ((3, 1, 4), [[-1]] * 3)


# -- masks ------------------------------------------------------------------------------------------------------------


STILL = {"flip": False, "rotation": 0.0, "photometric_distortion": False, "scale_range": (1.0, 1.0)}


def save_mask(path: Path, values: np.ndarray, classes: int = 7) -> Mask:
    Image.fromarray(values.astype(np.uint8)).save(path)
    return Mask(path=path, class_of=bytes(range(classes)) + bytes([IGNORE]) * (256 - classes))


def painted(values: np.ndarray) -> Image.Image:
    """Gray by class: 40, 70, 100 ... so that black is outside of every image."""
    return Image.fromarray((40 + 30 * values).astype(np.uint8)).convert("RGB")


def away_from_edges(mask: Tensor, reach: int = 3) -> Tensor:
    """Where every pixel within reach has the same value."""
    values = mask[None, None].float()
    low, high = (
        torch.nn.functional.max_pool2d(sign * values, 2 * reach + 1, stride=1, padding=reach) for sign in (-1, 1)
    )
    same = (-low == high)[0, 0]
    inside = torch.zeros_like(same)
    inside[reach:-reach, reach:-reach] = True
    return same & inside


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"flip": True},
        {"rotation": 30.0},
        {"scale_range": (0.5, 2.0)},
        {"scale_range": (0.3, 0.6)},
        {"flip": True, "rotation": 10.0, "short_side_range": (64, 128), "max_long_side": 160},
    ],
)
@pytest.mark.parametrize("mode", ["stretch", "pad"])
def test_masks_follow_the_image(tmp_path: Path, changes: dict[str, object], mode: str) -> None:
    transform = segmentation_transform(
        preprocessing=sized(mode, (96, 128)),
        crop_size=(64, 80),
        **(STILL | changes),  # type: ignore[arg-type]
    )
    compared, seen = [], set()
    for seed in range(30):
        torch.manual_seed(seed)
        values = render_scene(seed, size=128, num_objects=3).mask[: 90 + seed]
        pixels, mask = transform(painted(values), save_mask(tmp_path / "a.png", values))
        assert (pixels.shape, pixels.dtype) == ((3, 64, 80), torch.uint8)
        assert (mask.shape, mask.dtype) == ((64, 80), torch.uint8)
        assert pixels.permute(1, 2, 0).is_contiguous()
        inner = away_from_edges(mask)
        expected = torch.where(mask == IGNORE, 0, 40 + 30 * mask.int())
        assert (pixels[0].int() - expected)[inner].abs().max() <= 2, seed
        compared.append(inner.float().mean().item())
        seen |= set(mask[inner].tolist())
    assert np.mean(compared) > 0.5
    assert len(seen - {IGNORE}) >= 5


def test_masks_are_not_shifted_against_the_image(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:256, :256]
    disc = (np.hypot(rows - 120.5, columns - 131.5) < 80).astype(np.uint8)
    target = save_mask(tmp_path / "a.png", disc)
    image = Image.fromarray(255 * disc).convert("RGB")
    for scale in (0.5, 1.0, 4.0):
        side = round(64 * scale)
        transform = segmentation_transform(
            preprocessing=sized(size=(64, 64)), crop_size=(side, side), **(STILL | {"scale_range": (scale, scale)})
        )
        pixels, mask = transform(image, target)
        y, x = (torch.arange(side) for _ in range(2))
        for weights in (pixels[0].float() / 255, mask.float()):
            center = [(weights.sum(dim=1 - d) * axis).sum() / weights.sum() for d, axis in ((0, y), (1, x))]
            expected = [(121 * side / 256) - 0.5, (132 * side / 256) - 0.5]
            np.testing.assert_allclose(center, expected, atol=0.15)


@pytest.mark.parametrize("original", [(128, 96), (30, 200), (1, 1)])
@pytest.mark.parametrize("crop_size", [(32, 32), (64, 160), (300, 40)])
def test_crops_have_their_size_and_void_is_where_no_image_is(
    tmp_path: Path, original: tuple[int, int], crop_size: tuple[int, int]
) -> None:
    image = Image.new("RGB", original, "white")
    target = save_mask(tmp_path / "a.png", np.ones(original[::-1]))
    plain = segmentation_transform(
        preprocessing=sized("pad", (96, 128)), crop_size=crop_size, **(STILL | {"scale_range": (0.5, 1.5)})
    )
    for _ in range(10):
        pixels, mask = plain(image, target)
        assert pixels.shape[1:] == mask.shape == crop_size
        assert torch.equal(mask == IGNORE, pixels[0] == 0)
        assert (mask == 1).any()
    everything = segmentation_transform(preprocessing=sized("pad", (96, 128)), crop_size=crop_size)
    for _ in range(10):
        pixels, mask = everything(image, target)
        assert pixels.shape[1:] == mask.shape == crop_size
        assert set(mask.unique().tolist()) <= {1, IGNORE}


def test_the_shorter_side_is_drawn_and_the_longer_limited(tmp_path: Path) -> None:
    image, target = Image.new("RGB", (150, 100), "white"), save_mask(tmp_path / "a.png", np.ones((100, 150)))
    transform = segmentation_transform(
        preprocessing=sized(), crop_size=(200, 200), **(STILL | {"short_side_range": (40, 120), "max_long_side": 150})
    )
    sizes = set()
    for _ in range(60):
        rows, columns = (transform(image, target)[1] == 1).nonzero().max(dim=0).values.add(1).tolist()
        assert columns == pytest.approx(1.5 * rows, abs=1)
        sizes.add((rows, columns))
    assert min(rows for rows, _ in sizes) < 45
    assert max(sizes) == (100, 150), "120 rows would be 180 columns"
    assert len(sizes) > 20


def test_blur_evens_out_pixels_and_leaves_masks(tmp_path: Path) -> None:
    values = np.indices((64, 64)).sum(axis=0) % 2
    image, target = (
        Image.fromarray((255 * values).astype(np.uint8)).convert("RGB"),
        save_mask(tmp_path / "a.png", values),
    )
    share = {}
    for blur in (0.0, 0.5, 1.0):
        transform = segmentation_transform(
            preprocessing=sized(size=(64, 64)), crop_size=(64, 64), **(STILL | {"blur": blur})
        )
        drawn = [transform(image, target) for _ in range(60)]
        assert all(torch.equal(mask, torch.from_numpy(values).byte()) for _, mask in drawn)
        share[blur] = sum(pixels.float().std() < 125 for pixels, _ in drawn) / 60
    assert share[0.0] == 0
    assert 0.2 < share[0.5] < 0.5
    assert share[1.0] > 0.5, "a sigma below 0.3 changes nothing that a byte can show"


def test_void_of_the_file_stays_void(tmp_path: Path) -> None:
    target = save_mask(tmp_path / "a.png", np.full((96, 128), 200))
    _, mask = segmentation_transform(preprocessing=sized(size=(96, 128)), crop_size=(64, 64))(
        Image.new("RGB", (128, 96)), target
    )
    assert (mask == IGNORE).all()


def test_crops_show_more_than_one_thing_where_they_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((64, 100))
    values[:, 50:] = 1
    target, image = save_mask(tmp_path / "a.png", values), painted(values)
    most = {}
    for limit in (0.75, 1.0):
        monkeypatch.setattr("mobilevit.tasks.transforms.MOST_OF_ONE_CLASS", limit)
        transform = segmentation_transform(preprocessing=sized(size=(64, 100)), crop_size=(64, 60), **STILL)
        masks = [transform(image, target)[1] for _ in range(100)]
        most[limit] = max(max((mask == 0).float().mean().item(), (mask == 1).float().mean().item()) for mask in masks)
        assert len({mask.sum().item() for mask in masks}) > 15  # of 31 and 41 places
    assert most[0.75] <= 0.75
    assert most[1.0] > 0.8


def test_a_image_of_one_class_is_cropped_all_the_same(tmp_path: Path) -> None:
    target = save_mask(tmp_path / "a.png", np.ones((64, 100)))
    transform = segmentation_transform(preprocessing=sized(size=(64, 100)), crop_size=(64, 60), **STILL)
    assert (transform(Image.new("RGB", (100, 64)), target)[1] == 1).all()


def test_a_mask_of_another_size_than_its_image(tmp_path: Path) -> None:
    target = save_mask(tmp_path / "a.png", np.ones((30, 40)))
    image = Image.new("RGB", (30, 40))
    reason = r"a.png: 40 x 30 pixels, its image has 30 x 40; they must agree"
    with pytest.raises(ImageError, match=reason):
        target.read((image.height, image.width))
    with pytest.raises(ImageError, match=reason):
        segmentation_transform(preprocessing=sized(), crop_size=(32, 32))(image, target)
    with pytest.raises(ImageError, match=r"b.png: no such mask"):
        Mask(path=tmp_path / "b.png", class_of=target.class_of).read((image.height, image.width))
    assert target.read((30, 40)).tolist() == [[1] * 40] * 30


# -- all of them ------------------------------------------------------------------------------------------------------


def test_the_same_random_state_gives_the_same_boxes_and_masks(tmp_path: Path) -> None:
    scene = render_scene(0, size=96, num_objects=3)
    boxes, mask = boxes_of(scene.boxes_xyxy, scene.labels), save_mask(tmp_path / "a.png", scene.mask)
    detection = detection_transform(preprocessing=sized())
    segmentation = segmentation_transform(preprocessing=sized(), crop_size=(48, 48))
    images = set()
    for seed in range(8):
        results = []
        for first, second in ((detection, segmentation), pickle.loads(pickle.dumps((detection, segmentation)))):
            torch.manual_seed(seed)
            pixels, (corners, labels) = first(scene.image, boxes)
            results.append([pixels, corners, labels, *second(scene.image, mask)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        images.add(bytes(results[0][0].numpy()))
    assert len(images) == 8
