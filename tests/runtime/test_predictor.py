from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mobilevit
from golden_weights import fill_with_golden_weights
from mobilevit.imaging.decode import find_images, read_image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = fill_with_golden_weights(mobilevit.create_model("mobilevit_xxs", num_classes=6))
    return mobilevit.save(
        model,
        tmp_path_factory.mktemp("model") / "m.safetensors",
        classes=["a", "b", "c", "d", "e", "f"],
        preprocessing=mobilevit.Preprocessing(size=(48, 64)),
    )


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> mobilevit.Predictor:
    return mobilevit.Predictor(checkpoint, device="cpu", batch_size=4)


def test_every_kind_of_source_gives_the_same_result(predictor: mobilevit.Predictor, shapes: Path) -> None:
    path = find_images(shapes)[0]
    image = Image.open(path).convert("RGB")
    results = [predictor(s) for s in (str(path), path, path.read_bytes(), image, np.asarray(image))]
    for result in results:
        assert np.array_equal(result.probabilities, results[0].probabilities)
        assert result.probabilities.sum() == pytest.approx(1, abs=1e-5)
        assert len(result.top(3)) == 3
    assert results[0].source == str(path)


def test_it_computes_what_the_model_computes(predictor: mobilevit.Predictor, checkpoint: Path, shapes: Path) -> None:
    model, path = mobilevit.load(checkpoint), find_images(shapes)[7]
    preprocessing = mobilevit.Preprocessing(size=(48, 64))
    with torch.no_grad():
        expected = (
            model(torch.from_numpy(preprocessing.normalize(preprocessing.resize(read_image(path))[None])))
            .softmax(1)[0]
            .numpy()
        )
    assert np.abs(predictor(path).probabilities - expected).max() < 1e-5


def test_lists_keep_their_order_and_batches_do_not_matter(checkpoint: Path, shapes: Path) -> None:
    paths = [str(p) for p in find_images(shapes)[:11]]
    together = mobilevit.Predictor(checkpoint, device="cpu", batch_size=4)(paths)
    alone = [mobilevit.Predictor(checkpoint, device="cpu", batch_size=1)(p) for p in paths]
    assert [r.source for r in together] == paths
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one.probabilities - other.probabilities).max() < 1e-5


def test_bad_images_stop_a_call_but_not_a_stream(predictor: mobilevit.Predictor, shapes: Path, tmp_path: Path) -> None:
    good = find_images(shapes)[:5]
    (tmp_path / "empty.jpg").write_bytes(b"")
    sources = [*good[:3], tmp_path / "empty.jpg", *good[3:], tmp_path / "none.png"]
    with pytest.raises(mobilevit.ImageError, match=r"empty\.jpg: the file is empty"):
        predictor(list(sources))
    results = list(predictor.stream(sources))
    assert [isinstance(r, mobilevit.ImageError) for r in results] == [False] * 3 + [True] + [False] * 2 + [True]
    assert "none.png: no such file" in str(results[-1])
    assert predictor([]) == []


def test_a_stream_is_lazy(predictor: mobilevit.Predictor, shapes: Path) -> None:
    path = find_images(shapes)[0]
    asked = 0

    def endless():  # type: ignore[no-untyped-def]
        nonlocal asked
        while True:
            asked += 1
            yield path

    stream = predictor.stream(endless())
    next(stream)
    assert asked <= 4


def test_a_model_in_memory(shapes: Path) -> None:
    model = mobilevit.create_model("mobilevit_xxs", num_classes=2)
    result = mobilevit.Predictor(model, device="cpu")(find_images(shapes)[0])
    assert result.label in ("class_0", "class_1")


def test_after_warming_up_nothing_is_left_to_import() -> None:
    """A second of it, for the first image with boxes in it."""
    script = """
import sys
from mobilevit import Predictor, create_model
from PIL import Image

predictor = Predictor(create_model("mobilevit_xxs", task="detection", num_classes=3), threads=1, batch_size=2)
predictor.warm_up()
before = set(sys.modules)
predictor(Image.linear_gradient("L").convert("RGB"))
print(sorted(set(sys.modules) - before))
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert told.stdout == "[]\n"


def test_mistakes(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        mobilevit.Predictor(checkpoint, batch_size=0)
    with pytest.raises(ValueError, match="`device` is 'tpu': unknown"):
        mobilevit.Predictor(checkpoint, device="tpu")
    with pytest.raises(ValueError, match="no such checkpoint"):
        mobilevit.Predictor("nowhere.safetensors")
