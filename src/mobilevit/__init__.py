"""MobileViT: small vision models, from a folder of images to the device.

The names below are the public interface. They load on first use, so that `import mobilevit` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mobilevit.errors import MissingPackageError, MobileViTError

if TYPE_CHECKING:
    from mobilevit.benchmarking.benchmark import benchmark as benchmark
    from mobilevit.benchmarking.config import BenchmarkConfig as BenchmarkConfig
    from mobilevit.benchmarking.config import TuneConfig as TuneConfig
    from mobilevit.benchmarking.tune import tune as tune
    from mobilevit.errors import ImageError as ImageError
    from mobilevit.evaluation import evaluate as evaluate
    from mobilevit.explaining.explain import explain as explain
    from mobilevit.exporting.export import ExportReport as ExportReport
    from mobilevit.exporting.export import export as export
    from mobilevit.factory import create_model as create_model
    from mobilevit.factory import load as load
    from mobilevit.imaging.preprocessing import Preprocessing as Preprocessing
    from mobilevit.models import list_models as list_models
    from mobilevit.models.fuse import fuse as fuse
    from mobilevit.runtime.predictor import Predictor as Predictor
    from mobilevit.training.config import TrainConfig as TrainConfig
    from mobilevit.training.loop import train as train
    from mobilevit.weights.checkpoint import save as save
    from mobilevit.weights.convert import convert_state_dict as convert_state_dict
    from mobilevit.weights.pretrained import list_pretrained as list_pretrained

__version__ = "0.1.0"

_HOME_OF = {
    "BenchmarkConfig": "benchmarking.config",
    "ExportReport": "exporting.export",
    "ImageError": "errors",
    "Predictor": "runtime.predictor",
    "Preprocessing": "imaging.preprocessing",
    "TrainConfig": "training.config",
    "TuneConfig": "benchmarking.config",
    "benchmark": "benchmarking.benchmark",
    "convert_state_dict": "weights.convert",
    "create_model": "factory",
    "evaluate": "evaluation",
    "explain": "explaining.explain",
    "export": "exporting.export",
    "fuse": "models.fuse",
    "list_models": "models",
    "list_pretrained": "weights.pretrained",
    "load": "factory",
    "save": "weights.checkpoint",
    "train": "training.loop",
    "tune": "benchmarking.tune",
}

__all__ = ["MobileViTError", *_HOME_OF]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mobilevit' has no attribute {name!r}")
    try:
        value = globals()[name] = getattr(import_module(f"mobilevit.{_HOME_OF[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("mobilevit"):
            raise
        raise MissingPackageError(f"mobilevit.{name} needs {error.name}; pip install 'mobilevit[train]'") from error
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
