from __future__ import annotations

from pathlib import Path

import pytest

from mobilevit.errors import MobileViTError
from mobilevit.runtime.sources import find_sources
from unprivileged import locked_folder


def test_folders_globs_and_files_each_once(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/b/2.PNG", "a/.hidden.jpg", "a/notes.txt", "c/3.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    one, two, three = (str(tmp_path / name) for name in ("a/1.jpg", "a/b/2.PNG", "c/3.jpg"))
    assert find_sources([str(tmp_path / "a")]) == [one, two]
    assert find_sources([three, str(tmp_path / "*" / "*.jpg"), str(tmp_path / "a")]) == [three, one, two]
    assert find_sources([str(tmp_path / "none.jpg")]) == [str(tmp_path / "none.jpg")]  # told when it is read


def test_places_that_cannot_be_listed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place, message in (
        (str(tmp_path / "empty"), f"{tmp_path}/empty: no images in this folder"),
        (str(tmp_path / "*.jpg"), f"{tmp_path}/*.jpg: matches no file"),
        ("x" * 5000, f"{'x' * 5000}: cannot be read (File name too long)"),
    ):
        with pytest.raises(MobileViTError) as caught:
            find_sources([place])
        assert str(caught.value) == message
    with locked_folder() as folder:
        for place in (folder, folder / "inside"):
            with pytest.raises(MobileViTError, match=r"cannot be read \(Permission denied\)$"):
                find_sources([str(place)])
