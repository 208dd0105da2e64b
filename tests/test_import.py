"""What importing costs and what it pulls in, each in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def loaded_after(code: str) -> set[str]:
    told = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in json.loads(told.stdout.splitlines()[-1])}


def test_importing_the_package_imports_nothing_optional() -> None:
    assert not loaded_after("import mobilevit") & {"torch", "torchvision", "tyro", "rich", "matplotlib", "torchmetrics"}


def test_models_need_torch_alone() -> None:
    modules = loaded_after(
        "import sys; sys.modules['torchvision'] = None\n"  # as if it were not installed
        "from mobilevit.models.mobilevit import MobileViT, XXS; MobileViT(XXS)\n"
        "import mobilevit; mobilevit.fuse; del sys.modules['torchvision']"
    )
    assert "torch" in modules
    assert not modules & {"torchvision", "huggingface_hub", "matplotlib", "torchmetrics", "timm", "transformers"}


def test_prediction_needs_no_training_package() -> None:
    modules = loaded_after(
        "import mobilevit; mobilevit.Predictor(mobilevit.create_model('mobilevit_xxs', num_classes=2))"
    )
    assert not modules & {"torchvision", "matplotlib", "torchmetrics", "tensorboard", "pyarrow", "timm", "transformers"}


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    modules = loaded_after(f"from mobilevit.cli import main; main({arguments!r})")
    assert not modules & {"torch", "torchvision", "numpy", "PIL"}


def test_every_public_name_is_there() -> None:
    import mobilevit

    assert set(mobilevit.__all__) <= set(dir(mobilevit))
    for name in mobilevit.__all__:
        assert getattr(mobilevit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mobilevit.nothing  # noqa: B018
