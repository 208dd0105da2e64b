from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mobilevit.cli import main


def test_demo_leaves_data_run_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--epochs", "1", "--num-images", "60"]) == 0
    told = capsys.readouterr()
    assert f"open {out / 'report.html'}" in told.out
    assert f"$ mobilevit train --data {out / 'data'} --out {out / 'run'}" in told.err
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "952,950 parameters, 6 classes" in page
    top1 = json.loads((out / "run" / "evaluation.json").read_text())["top1"]
    assert f"{top1:.2%} of 12 pictures held out" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page), "the page needs nothing beside it"
    assert main(["demo", "--out", str(out), "--epochs", "1", "--num-images", "60", "--seed", "1"]) == 0


def test_demo_leaves_other_folders_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("all of it")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "data" / "thesis.txt").read_text() == "all of it"
