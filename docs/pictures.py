"""Makes the pictures of a run that README and tutorial show, into docs/images/.

    python docs/pictures.py                # runs `mobilevit demo` first: some minutes
    python docs/pictures.py --from demo    # takes them from the folder of a demo that has been run

The drawings of how the model works are made by docs/figures.py.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).parent / "images"
PICTURES = {
    "demo.png": "unseen.png",
    "curves.png": "run/curves.png",
    "confusion_matrix.png": "run/confusion_matrix.png",
}
PLOTS = ("curves.png", "confusion_matrix.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="demo", type=Path, metavar="FOLDER", help="a folder that `mobilevit demo` wrote")
    arguments = parser.parse_args()
    if arguments.demo is not None:
        take(arguments.demo)
        return
    from mobilevit.cli import Demo
    from mobilevit.demo import run_demo

    settings = Demo()
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder) / "demo"
        run_demo(demo, epochs=settings.epochs, num_images=settings.num_images, seed=settings.seed)
        take(demo)


def take(demo: Path) -> None:
    """Copy a demo's pictures; plots get a palette of 256 colours, which keeps them small."""
    IMAGES.mkdir(exist_ok=True)
    for name, source in PICTURES.items():
        picture = Image.open(demo / source).convert("RGB")
        path = IMAGES / name
        if name in PLOTS:
            picture = picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        picture.save(path, optimize=True)
        print(f"docs/images/{name}: {picture.width} x {picture.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
