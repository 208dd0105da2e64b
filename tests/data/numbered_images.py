"""To write images whose color is a number, and to read the numbers back."""

from pathlib import Path

from PIL import Image

from mobilevit.data.imageset import ImageSet
from mobilevit.imaging.decode import read_image


def color(number: int) -> tuple[int, int, int]:
    return number % 256, number // 256, 7


def write_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), color(number)).save(path)


def write_folder(folder: Path, counts: dict[str, int]) -> Path:
    """`counts` images a class, called 0.png, 1.png and so on; image i of class c has color 20 * c + i."""
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            write_image(folder / name / f"{number}.png", 20 * label + number)
    return folder


def numbers(data: ImageSet[int]) -> list[int]:
    """The color numbers of all images, opened."""
    opened = [read_image(data.open(i)).getpixel((0, 0)) for i in range(len(data))]
    return [red + 256 * green for red, green, _ in opened]
