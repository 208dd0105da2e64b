"""A folder that this process may not enter, also where the tests run as root."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NOBODY = 65534


@contextmanager
def locked_folder(*beside: str | Path) -> Iterator[Path]:
    """A folder with a file `inside.txt`, which the block can neither list, read nor write.

    Copies of the files `beside` lie beside it, where they can be read.
    """
    # Not in pytest's own folder, which nobody but its owner may enter.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "locked"
        folder.mkdir()
        (folder / "inside.txt").write_text("secret")
        for file in beside:
            shutil.copy(file, name)
            Path(name, Path(file).name).chmod(0o644)
        Path(name).chmod(0o755)
        folder.chmod(0)
        is_root = os.geteuid() == 0
        try:
            if is_root:  # no permission stops root
                os.seteuid(_NOBODY)
            yield folder
        finally:
            if is_root:
                os.seteuid(0)
            folder.chmod(0o755)
