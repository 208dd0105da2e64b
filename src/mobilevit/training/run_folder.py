"""The run folder: the whole record of a training run, and what it takes to resume it."""

from __future__ import annotations

import io
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from mobilevit import __version__
from mobilevit.devices import gpu_names
from mobilevit.errors import Interrupted, MissingPackageError, MobileViTError
from mobilevit.factory import load
from mobilevit.files import Json, write_bytes, write_json, write_text
from mobilevit.models import Model
from mobilevit.plotting import new_figure, save_figure
from mobilevit.tasks.report import Report
from mobilevit.tasks.task import AnyTask
from mobilevit.training.config import TrainConfig
from mobilevit.weights import checkpoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.utils.tensorboard import SummaryWriter

State = dict[str, Any]
"""The state that resuming needs, in tensors and plain values; see `last.pt`."""

# Settings that may differ when a run goes on, because the weights do not depend on them.
_FREE_ON_RESUME = {"out", "data", "val_data", "device", "num_workers", "checkpoint_minutes", "early_stopping"}


class TrainingInterrupted(Interrupted):
    """The run was stopped by Ctrl-C or SIGTERM, after its state was saved."""

    def __init__(self, config: Path) -> None:
        super().__init__(f"stopped and saved; go on with: mobilevit train --config {config} --resume")


class RunFolder:
    """Names and writes the files of one run; each appears whole or not at all."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.last = self.path / "last.pt"
        self.best = self.path / "best.safetensors"
        self._tensorboard: SummaryWriter

    def create(self, config: TrainConfig, *, overwrite: bool) -> None:
        """Start a new record; refuse a folder that holds another run, unless told to overwrite it."""
        if self.path.exists() and not self.path.is_dir():
            raise MobileViTError(f"`out` {self.path}: a file of that name is in the way; choose another folder")
        if self.config.exists() or self.last.exists() or self.best.exists():
            if not overwrite:
                raise MobileViTError(
                    f"`out` {self.path}: holds another run; continue it with `resume`, replace it with `overwrite`, "
                    "or choose another folder"
                )
            for file in (self.last, self.best, self.metrics, *self.path.glob("events.out.tfevents.*")):
                file.unlink(missing_ok=True)
        write_text(self.config, config.to_json())
        write_json(self.path / "environment.json", environment())
        write_text(self.metrics, "")

    def reopen(self, config: TrainConfig, fingerprint: str) -> State | None:
        """Return the state to continue from; None if the run never came to a checkpoint.

        Raises:
            MobileViTError: no run here, or `config` or `fingerprint` of the images would lead to other weights.
        """
        if not self.config.exists():
            raise MobileViTError(f"`out` {self.path}: no run to resume; leave `resume` out to start one")
        old, new = (c.flat() for c in (TrainConfig.from_json(self.config), config))
        changed = [name for name in old if old[name] != new[name] and name not in _FREE_ON_RESUME]
        if changed:
            told = ", ".join(f"{name} was {old[name]}, is {new[name]}" for name in changed)
            raise MobileViTError(f"`resume`: {told}; resume with the run's own settings (`config` {self.config})")
        if not self.last.exists():
            return None
        try:
            state: State = torch.load(self.last, map_location="cpu", weights_only=True)
        except Exception as error:
            raise MobileViTError(
                f"{self.last}: damaged ({type(error).__name__}); start again with `overwrite`"
            ) from None
        if "pictures" in state["position"]:  # the name in version 0.1
            state["position"]["images"] = state["position"].pop("pictures")
        if state["data"] != fingerprint:
            raise MobileViTError(f"{config.data}: not the images this run began with; resume with the same data")
        return state

    def open_tensorboard(self, first_epoch: int) -> None:
        """Begin TensorBoard's events anew, without those of epochs from `first_epoch` on."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingPackageError("training needs more packages; pip install 'mobilevit[train]'") from None
        self._tensorboard = SummaryWriter(str(self.path), purge_step=first_epoch or None)

    def append(self, row: dict[str, float | None]) -> None:
        """Add an epoch to `metrics.jsonl` and TensorBoard's events; `open_tensorboard` comes first."""
        write_text(self.metrics, "".join(json.dumps(r) + "\n" for r in [*self.rows(), row]))
        for name, value in row.items():
            if value is not None:  # as memory is where the system does not tell
                self._tensorboard.add_scalar(name, value, row["epoch"])
        self._tensorboard.flush()

    def close(self) -> None:
        """Close TensorBoard's events."""
        self._tensorboard.close()

    def rows(self) -> list[Json]:
        """The lines of `metrics.jsonl`: one an epoch."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    def forget_from(self, epoch: int) -> None:
        """Drop the lines of epochs that are about to be run again."""
        write_text(self.metrics, "".join(json.dumps(r) + "\n" for r in self.rows() if r["epoch"] < epoch))

    def save_last(self, state: State) -> None:
        """Write what `--resume` needs."""
        data = io.BytesIO()
        torch.save(state, data)
        write_bytes(self.last, data.getbuffer())

    def save_best(self, model: nn.Module, report: Report, provenance: dict[str, str]) -> None:
        """Write the best weights so far: self-describing for this package's models, plain for a stranger's."""
        if isinstance(model, Model):
            metrics, min_score = report.summary, report.min_score
            checkpoint.save(model, self.best, metrics=metrics, provenance=provenance, score_threshold=min_score)
        else:
            checkpoint.save_tensors(model.state_dict(), self.best)

    def load_best(self, model: nn.Module) -> nn.Module:
        """Read the best weights, for evaluation: into `model`, unless the file says which model they are of."""
        if isinstance(model, Model):
            return load(self.best)
        model.load_state_dict(load_file(self.best))
        return model.eval()

    def draw_curves(self, task: AnyTask) -> None:
        """Write `curves.png`: loss, score and learning rate by epoch."""
        rows = self.rows()
        if not rows:
            return
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        def line(axes: Axes, key: str, color: str, label: str = "") -> None:
            values = [row[key] for row in rows]
            axes.plot(epochs, values, marker="o" if len(rows) < 30 else "", color=color, label=label)

        epochs = [row["epoch"] + 1 for row in rows]
        best = max(rows, key=lambda row: row[task.score_name])
        figure = new_figure(11, 3.4)
        loss, score, rate = figure.subplots(1, 3)
        line(loss, "train_loss", "#0072b2", "training")
        if "loss" in rows[0]:
            line(loss, "loss", "#d55e00", "validation")
        loss.legend()
        line(score, task.score_name, "#d55e00")
        score.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        line(rate, "learning_rate", "#009e73")
        best_score = f"best {best[task.score_name]:.1%} in epoch {best['epoch'] + 1}"
        titles = ("loss", f"validation {task.score_title}: {best_score}", "learning rate at the epoch's end")
        for axes, title in zip((loss, score, rate), titles, strict=True):
            axes.set(title=title, xlabel="epoch")
            axes.grid(alpha=0.3)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        save_figure(figure, self.path / "curves.png")

    def write_model_card(self, model: nn.Module, config: TrainConfig, task: AnyTask, sizes: dict[str, int]) -> None:
        """Write `README.md`: what the model is, what it was trained on, how good it is, how to use it."""
        if not isinstance(model, Model):
            return
        card = model.card
        figures = "\n".join(f"| {name} | {value:.4f} |" for name, value in card.metrics.items())
        origin = "\n".join(f"- {name}: {value}" for name, value in card.provenance.items())
        best = self.best.name
        write_text(
            self.path / "README.md",
            f"""# {card.name}, {card.task}: {len(card.classes)} classes

Trained by mobilevit {__version__} on {sizes["train"]:,} images, validated on {sizes["val"]:,} others.

| measured on the validation images | |
|---|---|
{figures}

![curves](curves.png)

![predictions on validation images](samples.png)

Classes: {", ".join(card.classes)}

## Use

```
mobilevit predict {best} image.jpg
```

```python
import mobilevit

result = mobilevit.Predictor("{best}")("image.jpg")
print({task.usage})
result.draw("out.jpg")
```

Input: {card.preprocessing.size[0]} x {card.preprocessing.size[1]} pixels; the file contains the preprocessing.

## Limits

The figures hold for images like the ones it was trained on. {task.limits}

## Origin

{origin}
- data: {Path(config.data).name}
- settings: [config.json](config.json), versions: [environment.json](environment.json)
""",
        )


def environment() -> Json:
    """Versions and hardware, for the record."""
    names = ("torch", "torchvision", "numpy", "pillow", "safetensors")
    return {
        "mobilevit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "processor": platform.machine(),
        "packages": {name: metadata.version(name) for name in names},
        "threads": torch.get_num_threads(),
        "gpus": gpu_names(),
    }
