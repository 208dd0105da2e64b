"""The command line as its users meet it: what it prints, what it writes, how it refuses."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mobilevit
from golden_weights import fill_with_golden_weights
from mobilevit.card import card_of
from mobilevit.cli import main
from mobilevit.data.shapes import CLASSES
from mobilevit.imaging.decode import find_images
from mobilevit.runtime.artifact import Artifact, write_sidecar

TINY = ["--image-size", "32", "--epochs", "1", "--batch-size", "8", "--num-workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that the command made."""
    out = tmp_path_factory.mktemp("runs") / "first"
    assert main(["train", "--data", str(shapes), "--out", str(out), *TINY]) == 0
    return out


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must be refused: status 2, nothing on stdout, one line on stderr, which is returned."""
    capsys.readouterr()
    status = main(arguments)
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert status == 2, told.err
    assert len(lines) == 1, told.err
    assert "Traceback" not in told.err
    return lines[0]


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n  {name}" in told for name in ("train", "eval", "predict", "info", "convert", "demo"))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mobilevit {mobilevit.__version__}\n"


@pytest.mark.parametrize("command", ["train", "eval", "predict", "info", "convert", "demo"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: mobilevit {command}" in capsys.readouterr().out


def test_train_prints_json(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", str(shapes), "--out", str(tmp_path / "run"), *TINY, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_images"] == 12
    assert Path(told["best"]).exists()
    assert [c["name"] for c in told["per_class"]] == list(CLASSES)


def test_resume_from_the_config_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    config = json.loads((out / "config.json").read_text()) | {"out": str(out)}
    (out / "config.json").write_text(json.dumps(config))
    assert main(["train", "--config", str(out / "config.json"), "--resume"]) == 0
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert "best.safetensors" in capsys.readouterr().out


def test_eval_finds_what_was_held_out(
    run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = str(run / "best.safetensors")
    assert main(["eval", best, "--data", str(shapes), "--out", str(tmp_path), "--json", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_images"] == 12
    assert told["split"] == "what was held out when it was trained on these"
    assert told["top1"] == json.loads((run / "evaluation.json").read_text())["top1"]
    assert (tmp_path / "confusion_matrix.png").stat().st_size > 1000
    capsys.readouterr()
    assert main(["eval", best, "--data", str(shapes), "--split", "all", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "60 images" in printed
    assert all(name in printed for name in CLASSES)


def test_eval_on_data_of_some_of_the_classes(run: Path, shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes / "ring", tmp_path / "data" / "ring")
    shutil.copytree(shapes / "star", tmp_path / "data" / "star")
    best = str(run / "best.safetensors")
    assert main(["eval", best, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "e")]) == 0
    told = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert told["num_images"] == 20
    assert {c["name"]: c["support"] for c in told["per_class"]}["ring"] == 10


def test_predict(run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = str(run / "best.safetensors")
    folder, pattern = shapes / "ring", str(shapes / "star" / "*.png")
    one = str(find_images(shapes)[0])
    assert main(["predict", best, one, str(folder), pattern, "--json", "--save", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 21
    assert lines[0]["source"] == one
    assert set(lines[0]) == {"source", "label", "probability", "top"}
    saved = sorted((tmp_path / "out").iterdir())
    assert len(saved) == 21
    with Image.open(saved[0]) as image:
        assert image.width == 32
        assert image.height > 32
    assert main(["predict", best, one, "--top", "2"]) == 0
    assert capsys.readouterr().out.count("%") == 2


def test_predict_goes_on_past_bad_images(
    run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    good = str(find_images(shapes)[0])
    status = main(["predict", str(run / "best.safetensors"), str(tmp_path / "bad.jpg"), "none.png", good, "--json"])
    told = capsys.readouterr()
    lines = [json.loads(line) for line in told.out.splitlines()]
    assert status == 2
    assert [sorted(line)[0] for line in lines] == ["error", "error", "label"]
    assert "bad.jpg" in told.err
    assert "none.png: no such file" in told.err


@pytest.mark.parametrize("what", ["image", "paths"])
def test_predict_standard_input(run: Path, shapes: Path, what: str, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    paths = find_images(shapes)[:2]
    data = paths[0].read_bytes() if what == "image" else "\n".join(map(str, paths)).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))
    assert main(["predict", str(run / "best.safetensors"), "-", "--json"]) == 0
    names = [json.loads(line)["source"] for line in capsys.readouterr().out.splitlines()]
    assert names == (["image 1"] if what == "image" else [str(p) for p in paths])


def test_info(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "mobilevit_s", "--image-size", "224"]) == 0
    told = capsys.readouterr().out
    assert "5,578,632" in told
    assert "196 * 196 * C = 38,416 C" in told
    assert "4 * 49 * 49 * C = 9,604 C" in told
    assert "separable" not in told
    assert main(["info", "mobilevitv2_050", "--image-size", "224"]) == 0
    told = capsys.readouterr().out
    assert "4 * 49 * 49 * C = 9,604 C" in told
    assert "4 * 49 * C = 196 C" in told
    assert "1,370,593" in told
    assert main(["info", "mobilevit_xxs", "--image-size", "192", "320", "--patch-size", "8", "4", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["input_size"] == [192, 320]
    assert main(["info", str(run / "best.safetensors")]) == 0
    assert "6 classes: circle, cross" in capsys.readouterr().out
    assert "none.safetensors: no such checkpoint file" in refused(["info", "none.safetensors"], capsys)
    assert "did you mean mobilevit_s?" in refused(["info", "mobilevit-s"], capsys)


def test_info_of_an_exported_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = card_of(mobilevit.load(run / "best.safetensors"))
    path = tmp_path / "m.onnx"
    path.write_bytes(bytes(2_500_000))
    artifact = Artifact(
        format="onnx",
        precision="fp32",
        card=card,
        batch_size=None,
        image_size=(32, 32),
        baked=True,
        outputs=("logits",),
    )
    write_sidecar(path, artifact)
    assert main(["info", str(path)]) == 0
    first, classes, _, provenance, *rest = capsys.readouterr().out.splitlines()
    assert first == f"{path}, classification, onnx fp32, 2.5 MB"
    assert classes == "6 classes: circle, cross, ring, square, star, triangle"
    assert f"mobilevit {mobilevit.__version__}" in provenance
    assert rest == ["input: uint8 (B, 32, 32, 3)", "outputs: logits"]
    assert main(["info", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["format"], told["classes"][0]) == (str(path), "onnx", "circle")
    path.with_name("m.onnx.json").unlink()
    assert "its sidecar m.onnx.json is missing" in refused(["info", str(path)], capsys)


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])
def test_convert_there_and_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = fill_with_golden_weights(mobilevit.create_model(name, num_classes=6))
    ours = mobilevit.save(model, tmp_path / "ours.safetensors")
    theirs, back = tmp_path / "timm.safetensors", tmp_path / "back.safetensors"
    assert main(["convert", str(ours), str(theirs), "--to", "timm"]) == 0
    assert "(mobilevit) -> " in capsys.readouterr().out
    assert "stages.0.0.conv1_1x1.conv.weight" in load_file(theirs)
    assert main(["convert", str(theirs), str(back)]) == 0
    before, after = load_file(ours), load_file(back)
    assert all(torch.equal(before[key], after[key]) for key in before)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_wrong_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean train? Commands are" in refused(["trian"], capsys)
    assert "--data" in refused(["train"], capsys)
    assert "--learning-rate" in refused(["train", "--data", "x", "--leerning-rate", "1"], capsys)
    assert "--epochs" in refused(["train", "--data", "x", "--epochs", "many"], capsys)
    assert "no images; name files" in refused(["predict", "m.safetensors"], capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning-rate", "-0.1"], "--learning-rate is -0.1; it must be above 0"),
        (["--image-size", "31"], "--image-size is 31; it must be 32 or more"),
        (["--batch-size", "1"], "--batch-size is 1; it must be 2 or more"),
        (["--model", "mobilevit_xxl"], "unknown model 'mobilevit_xxl'; did you mean mobilevit_xxs?"),
        (["--weights", "mobilevit_xxs.cvnets_1k"], "mobilevit_xxs.cvnets_in1k"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors: no such checkpoint file"),
        (["--device", "cuda:99"], "--device is 'cuda:99'"),
        (["--config", "none.json"], "none.json: no such configuration"),
    ],
)
def test_bad_settings(
    shapes: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert message in refused(["train", "--data", str(shapes), "--out", str(out), *flags], capsys)
    assert not out.exists()


def data_folder(tmp_path: Path, **counts: int) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in counts.items():
        (folder / name).mkdir()
        for number in range(count):
            Image.new("RGB", (32, 32), (number, 100, 0)).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "nothing in it; put the images into one sub-folder per class"),
        ({"cat": 4}, "only one class (cat)"),
        ({"cat": 4, "dog": 1}, "class dog has only one image"),
        ({"cat": 4, "dog": 0}, "no images of dog"),
        ({"cat": 0, "dog": 0}, "no images in its sub-folders"),
    ],
)
def test_bad_folders(tmp_path: Path, counts: dict[str, int], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_folder(tmp_path, **counts)
    told = refused(["train", "--data", str(data), "--out", str(tmp_path / "run"), *TINY], capsys)
    assert message in told
    assert str(data) in told
    assert not (tmp_path / "run").exists()


def test_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none: no such file or folder" in refused(["train", "--data", str(tmp_path / "none")], capsys)


def test_an_output_folder_that_holds_another_run(run: Path, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    told = refused(["train", "--data", str(shapes), "--out", str(run), *TINY], capsys)
    assert "holds another run; continue it with --resume, replace it with --overwrite" in told
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_labels_that_do_not_fit_the_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_folder(tmp_path, cat=2, dog=2)
    told = refused(["eval", str(run / "best.safetensors"), "--data", str(data)], capsys)
    assert "the checkpoint does not know cat, dog; its classes are circle, cross" in told


def test_bad_checkpoints(run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (run / "best.safetensors").read_bytes()
    cut, code = tmp_path / "cut.safetensors", tmp_path / "code.pt"
    cut.write_bytes(whole[:100_000])
    torch.save({"model": print}, code)
    other = tmp_path / "other.safetensors"
    other.write_bytes(whole.replace(b'\\"task\\": \\"classification\\"', b'\\"task\\": \\"segmentation!!\\"'))
    image = str(find_images(shapes)[0])
    assert "cut.safetensors: damaged" in refused(["predict", str(cut), image], capsys)
    assert "code.pt: this pickle may run code" in refused(["predict", str(code), image], capsys)
    assert "a checkpoint of mobilevit_xxs for segmentation!!" in refused(["predict", str(other), image], capsys)
    assert "none.safetensors: no such" in refused(["predict", "none.safetensors", image], capsys)
    assert "damaged" in refused(
        ["train", "--data", str(shapes), "--out", str(tmp_path / "r"), "--weights", str(cut)], capsys
    )


def test_a_full_disk(shapes: Path, tmp_path: Path) -> None:
    """No file may grow beyond 1 MB, as on a disk that is nearly full: checkpoints do not fit."""
    out = tmp_path / "run"
    finished = subprocess.run(
        [sys.executable, "-m", "mobilevit", "train", "--data", str(shapes), "--out", str(out), *TINY],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
    )
    assert finished.returncode == 2, finished.stderr
    assert "error: no room to write" in finished.stderr
    assert "free some space" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(".")) == [], "no half-written file is left"
    assert json.loads((out / "config.json").read_text())["epochs"] == 1


def test_an_unwritable_folder(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    told = refused(["train", "--data", str(shapes), "--out", str(tmp_path / "file" / "run"), *TINY], capsys)
    assert "file" in told
    assert "a file of that name is in the way" in refused(
        ["train", "--data", str(shapes), "--out", str(tmp_path / "file"), *TINY], capsys
    )


@pytest.mark.parametrize(
    "bug",
    [
        ValueError("invalid literal for int()"), KeyError("key"), IndexError("list index out of range"),
        TypeError("unexpected keyword"), AttributeError("no attribute"), AssertionError(),
        RuntimeError("shape mismatch"),
        ZeroDivisionError("division by zero"), FileNotFoundError(2, "No such file", "inside.json"),
        PermissionError(13, "Permission denied", "inside.json"), UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
        MemoryError(), StopIteration(), NotImplementedError(),
    ],
    ids=lambda bug: type(bug).__name__,
)  # fmt: skip
def test_a_bug_is_not_taken_for_a_mistake(
    bug: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise bug

    monkeypatch.setattr("mobilevit.models.summary.FlopCounterMode", broken)
    assert main(["info", "mobilevit_xxs"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback")
    assert type(bug).__name__ in told.splitlines()[-1]


def test_a_zip_of_different_lengths_is_a_bug(
    run: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mobilevit.results.classification.ClassificationResult.split", classmethod(lambda *_: []))
    assert main(["eval", str(run / "best.safetensors"), "--data", str(shapes)]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough(run: Path, shapes: Path) -> None:
    images = " ".join(str(p) for p in find_images(shapes))
    line = f"{sys.executable} -m mobilevit predict {run / 'best.safetensors'} {images} --batch-size 2 | head -1"
    told = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, env={**os.environ})
    assert told.stdout.count("\n") == 1
    assert "Traceback" not in told.stderr
