import contextlib
import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobilevit.errors import MobileViTError
from mobilevit.files import (
    ReadError,
    WriteError,
    cache_folder,
    disk_is_full,
    file_lock,
    reading_from,
    write_atomically,
    write_json,
    write_text,
    writing_to,
)
from unprivileged import locked_folder


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_writes_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deeper" / "a.txt"
    assert write_text(str(path), "größer 猫\n") == path
    assert path.read_bytes() == "größer 猫\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_replaces(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "old and longer")
    write_text(path, "new")
    assert path.read_text() == "new"


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.json", "old")

    def write(aside: Path) -> None:
        assert aside.parent == path.parent  # a rename within one file system
        assert aside.suffix == ".json"
        assert aside.name.startswith(".")  # so that no listing of the data takes it for a file
        aside.write_text("ne")
        assert path.read_text() == "old"
        aside.write_text("new")

    write_atomically(path, write)
    assert path.read_text() == "new"
    assert names_in(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError("no"), OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = write_text(tmp_path / "a.bin", "old")

    def write(aside: Path) -> None:
        aside.write_text("half of the n")
        raise error

    with pytest.raises(type(error)) as caught:
        write_atomically(path, write)
    assert caught.value is error
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.bin"]
    with pytest.raises(type(error)):
        write_atomically(tmp_path / "other.bin", write)
    assert names_in(tmp_path) == ["a.bin"]


@contextlib.contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let files grow further, as it does on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


NOISE = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)

WRITERS: dict[str, Callable[[Path], object]] = {
    "a.txt": lambda path: path.write_text("x" * 100_000),
    "a.png": lambda path: Image.fromarray(NOISE).save(path),
    "a.bin": lambda path: path.write_bytes(bytes(100_000)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk(tmp_path: Path, name: str) -> None:
    path = write_text(tmp_path / name, "old")
    with disk_of(50_000), pytest.raises(WriteError) as caught:
        write_atomically(path, WRITERS[name])
    assert str(caught.value).startswith(f"no room to write {path}; free some space")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == [name]
    write_atomically(path, WRITERS[name])  # there is room again
    assert path.stat().st_size > 50_000


def test_places_that_cannot_be_written_are_mistakes_of_the_user(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, reason in (
        (tmp_path / "file" / "a.txt", f"{tmp_path / 'file'} is not a folder"),
        (tmp_path / "file" / "b" / "a.txt", "Not a directory"),
        (tmp_path / "folder", "Is a directory"),
        (tmp_path / "loop" / "a.txt", f"{tmp_path / 'loop'} is not a folder"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(WriteError) as caught:
            write_text(path, "new")
        assert str(caught.value).startswith(f"{path}: cannot be written ({reason}"), caught.value
        assert isinstance(caught.value, MobileViTError)
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(names_in(tmp_path)) == ["file", "folder", "loop"]
    assert names_in(tmp_path / "folder") == []
    with locked_folder() as folder, pytest.raises(WriteError, match=r"a\.txt: cannot be written \(Permission denied\)"):
        write_text(folder / "a.txt", "new")


def test_names_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    path = write_text(tmp_path / ("x" * 250 + ".txt"), "new")
    assert path.read_text() == "new"
    assert names_in(tmp_path) == [path.name]


def test_files_that_cannot_be_read_are_mistakes_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    write_text(tmp_path / "file", "x")
    for path, reason in (
        (tmp_path / "none", "no such file"),
        (tmp_path, "cannot be read (Is a directory)"),
        (tmp_path / "file" / "a", "cannot be read (Not a directory)"),
        (tmp_path / "loop", "cannot be read (Too many levels of symbolic links)"),
    ):
        with pytest.raises(ReadError) as caught, reading_from(path):
            path.read_bytes()
        assert str(caught.value) == f"{path}: {reason}"
    with locked_folder() as folder:
        path = folder / "inside.txt"
        with pytest.raises(ReadError, match=r"inside\.txt: cannot be read \(Permission denied\)$"), reading_from(path):
            path.read_bytes()


@pytest.mark.parametrize("bug", [ValueError("x"), KeyError("x"), TypeError("x"), AssertionError("x")])
def test_other_errors_pass(bug: Exception) -> None:
    for block in (reading_from, writing_to):
        with pytest.raises(type(bug)) as caught, block("a.txt"):
            raise bug
        assert caught.value is bug


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (OSError(errno.EFBIG, "x"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("something else"), False),
    ],
)
def test_disk_is_full(error: Exception, full: bool) -> None:
    assert disk_is_full(error) is full


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        path = write_text(tmp_path / "a.txt", "x")
        assert os.umask(umask) == umask  # asking for it has not changed it
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_json(tmp_path: Path) -> None:
    value = {"name": "größer 猫", "number": 0.1, "list": [1, None, True]}
    path = write_json(tmp_path / "a.json", value | {"path": Path("a/b")})
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == value | {"path": "a/b"}
    assert "größer 猫" in text
    assert text.endswith("}\n")
    assert '\n  "number": 0.1' in text


def test_json_with_a_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    path = write_json(tmp_path / "a.json", {"unreadable": [name]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"unreadable": [name]}


def test_the_cache_folder_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MOBILEVIT_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "mobilevit"
    monkeypatch.setenv("MOBILEVIT_HOME", "~/elsewhere")
    assert cache_folder() == tmp_path / "elsewhere"


def test_a_lock_keeps_other_processes_out_and_ends_with_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    hold = "with file_lock(sys.argv[1]): print('held', flush=True); input()"
    script = f"import sys; from mobilevit.files import file_lock\n{hold}"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError), file_lock(lock, wait=False):
        pass
    holder.kill()
    holder.communicate()
    with file_lock(lock, wait=False), pytest.raises(BlockingIOError), file_lock(lock, wait=False):
        pass
    with file_lock(lock):
        pass
