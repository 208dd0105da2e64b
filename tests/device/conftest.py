"""Fixtures of the device floor; nothing here may need PyTorch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def files() -> Path:
    """The folder that `make_files.py` has filled."""
    folder = os.environ.get("MOBILEVIT_DEVICE_FILES")
    if folder is None:
        pytest.skip("MOBILEVIT_DEVICE_FILES is not set: `make test` runs these tests in an environment without PyTorch")
    return Path(folder)
