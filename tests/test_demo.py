from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from mobilevit.cli import main


@pytest.mark.parametrize(("task", "model"), [("detection", "mobilevitv2_050"), ("segmentation", "mobilevit_xxs")])
def test_demo_of_the_other_tasks(task: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    settings = ["--task", task, "--model", model, "--out", str(out), "--epochs", "1", "--num-images", "40"]
    assert main(["demo", *settings]) == 0
    page = (out / "report.html").read_text()
    assert f"{model}, {task}, " in page
    score = {"detection": "validation AP50", "segmentation": "validation mean IoU"}[task]
    assert score in page
    assert page.count("data:image/png;base64,") >= 4
    with Image.open(out / "unseen.png") as sheet:
        assert sheet.width > 1000
    # The command that the page shows is understood as it stands, and gives the same result.
    command = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("$ mobilevit train "))
    again = [*shlex.split(command)[2:], "--epochs", "1", "--out", str(tmp_path / "again"), "--json"]
    assert main(again) == 0
    assert json.loads(capsys.readouterr().out) | {"best": ""} == json.loads(
        (out / "run" / "evaluation.json").read_text()
    ) | {"best": "", "epochs": 1}


def test_demo_leaves_data_run_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--epochs", "1", "--num-images", "60"]) == 0
    told = capsys.readouterr()
    assert f"open {out / 'report.html'}" in told.out
    assert f"$ mobilevit train --data {out / 'data'} --out {out / 'run'}" in told.err
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "952,950 parameters, 6 shapes" in page
    top1 = json.loads((out / "run" / "evaluation.json").read_text())["top1"]
    assert f"{top1:.2%}" in page
    assert "12 images held out" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page), "the page needs nothing beside it"
    assert main(["demo", "--out", str(out), "--epochs", "1", "--num-images", "60", "--seed", "1"]) == 0


def test_demo_leaves_other_folders_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("all of it")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "data" / "thesis.txt").read_text() == "all of it"
    assert main(["demo", "--out", str(tmp_path / "new"), "--model", "mobilevit_xxl"]) == 2
    assert "unknown model 'mobilevit_xxl'; did you mean mobilevit_xxs?" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
