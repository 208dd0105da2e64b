"""What holds for every task, in one place: each test here runs for classification, detection and segmentation.

`ModelContract` runs for both generations; `TaskContract`, whose tests do not depend on the model, for the first alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed, multiprocessing, nn

import mobilevit
from mobilevit.card import ModelCard, TaskName, card_of
from mobilevit.cli import main
from mobilevit.data import shapes
from mobilevit.data.datasets import find_splits
from mobilevit.data.loaders import BatchLoader
from mobilevit.devices import normalize
from mobilevit.evaluation import evaluation_loader, measure
from mobilevit.runtime.predictor import Predictor, Result
from mobilevit.torch_session import TorchSession
from mobilevit.training.config import TrainConfig
from mobilevit.training.loop import train
from mobilevit.training.run_folder import RunFolder, TrainingInterrupted
from training_settings import with_settings

SIZE = 64


class ModelContract:
    """What both generations do for every task; subclasses name a task, how its data are written, figures and plots."""

    model_name = "mobilevit_xxs"
    task: TaskName
    write: Callable[..., None]
    score: str
    plots: tuple[str, ...]
    num_classes: int

    @pytest.fixture(scope="class")
    @classmethod
    def data(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("data") / cls.task
        cls.write(folder, num_images=24, size=SIZE)
        return folder

    @pytest.fixture
    def config(self, data: Path, tmp_path: Path) -> TrainConfig:
        return TrainConfig(
            data=data,
            model=self.model_name,
            out=tmp_path / "run",
            image_size=SIZE,
            epochs=2,
            batch_size=4,
            num_workers=0,
            learning_rate=1e-3,
        )

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("runs") / cls.task
        settings = {"image_size": SIZE, "epochs": 1, "batch_size": 4, "num_workers": 0}
        train(TrainConfig(data=data, model=cls.model_name, out=out, **settings))
        return out

    def model(self, **settings: Any) -> nn.Module:
        return mobilevit.create_model(self.model_name, task=self.task, **settings)

    def test_the_run_folder_is_the_record(self, run: Path, data: Path) -> None:
        files = {path.name for path in run.iterdir()}
        assert {
            "config.json", "environment.json", "metrics.jsonl", "curves.png", "samples.png", "evaluation.json",
            "last.pt", "best.safetensors", "README.md", *self.plots,
        } <= files  # fmt: skip
        (row,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
        card = card_of(mobilevit.load(run / "best.safetensors"))
        assert (card.name, card.task) == (self.model_name, self.task)
        assert card.classes == next(iter(find_splits(data).values())).classes
        assert card.preprocessing.size == (SIZE, SIZE)
        assert card.metrics[self.score] == row[self.score]
        assert f"{card.name}, {self.task}" in (run / "README.md").read_text()

    def test_loss_falls_and_reaches_every_parameter(self, config: TrainConfig) -> None:
        (data,) = find_splits(config.data).values()
        model = self.model(classes=data.classes).train()
        preprocessing = dataclasses.replace(card_of(model).preprocessing, size=(SIZE, SIZE))
        objective = data.task.objective(
            config.resolve(self.task),
            preprocessing,
            num_classes=len(data.classes),
            targets=data.targets,
            device=torch.device("cpu"),
        )
        loader = BatchLoader(
            data, objective.transform, collate=objective.collate, batch_size=12, num_workers=0, shuffle_seed=0
        )
        batch = next(loader.epoch())
        images = normalize(batch.images, preprocessing)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        losses = []
        for _ in range(12):
            loss = objective.loss(model(images), batch.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        assert [name for name, p in model.named_parameters() if p.grad is None] == []

    def test_starts_from_a_classifier(self, tmp_path: Path) -> None:
        classifier = mobilevit.create_model(self.model_name, num_classes=7)
        mobilevit.save(classifier, tmp_path / "classifier.safetensors")
        model = self.model(num_classes=5, weights=tmp_path / "classifier.safetensors")
        backbone = {key: value for key, value in classifier.state_dict().items() if key.startswith(("stem", "layer"))}
        ours = {key.removeprefix("backbone."): value for key, value in model.state_dict().items()}
        assert all(torch.equal(ours[key], value) for key, value in backbone.items())

    def test_saved_and_loaded_is_the_same(self, tmp_path: Path) -> None:
        model = self.model(num_classes=3)
        path = mobilevit.save(model, tmp_path / "m.safetensors", classes=["a", "b", "c"])
        loaded = mobilevit.load(path)
        assert card_of(loaded).classes == ("a", "b", "c")
        assert type(loaded) is type(model)
        x = torch.rand(1, 3, 96, 64)
        with torch.inference_mode():
            for ours, theirs in zip(_tensors(model(x)), _tensors(loaded(x)), strict=True):
                assert torch.equal(ours, theirs)

    def test_fused_is_the_same(self) -> None:
        model = self.model(num_classes=3)
        for module in model.modules():  # statistics that are not the identity
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.8, 1.2)
        x = torch.rand(2, 3, 64, 96)
        with torch.inference_mode():
            for ours, theirs in zip(_tensors(mobilevit.fuse(model)(x)), _tensors(model(x)), strict=True):
                assert torch.allclose(ours, theirs, atol=1e-4)

    def test_predict_command(self, run: Path, tmp_path: Path, capsys: Any) -> None:
        for number in range(3):
            shapes.render_scene(number, size=80).image.save(tmp_path / f"{number}.png")
        (tmp_path / "broken.png").write_bytes(b"no image")
        best = str(run / "best.safetensors")
        assert main(["predict", best, str(tmp_path), "--json", "--save", str(tmp_path / "out")]) == 2
        said = capsys.readouterr()
        rows = [json.loads(line) for line in said.out.splitlines()]
        assert [Path(row["source"]).name for row in rows] == ["0.png", "1.png", "2.png", "broken.png"]
        assert "error" in rows[3]
        assert "broken.png" in said.err
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.jpg", "1.jpg", "2.jpg"]
        assert main(["predict", best, str(tmp_path / "0.png")]) == 0
        assert str(tmp_path / "0.png") in capsys.readouterr().out

    def test_info_command(self, run: Path, capsys: Any) -> None:
        assert main(["info", str(run / "best.safetensors"), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        model = mobilevit.load(run / "best.safetensors")
        assert told["task"] == self.task
        assert told["parameters"] == sum(p.numel() for p in model.parameters())
        assert main(["info", self.model_name, "--task", self.task]) == 0
        assert self.task in capsys.readouterr().out


class TaskContract(ModelContract):
    """What runs for the first generation alone, as it does not depend on the model."""

    def test_the_task_is_recognized_by_the_data(self, data: Path) -> None:
        (found,) = find_splits(data).values()
        assert (found.task.name, len(found), len(found.classes)) == (self.task, 24, self.num_classes)

    def test_resumed_is_uninterrupted(self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = train(config)
        config = dataclasses.replace(config, out=config.out.parent / "other", checkpoint_minutes=0)
        saves = 0
        save = RunFolder.save_last

        def save_and_stop(run: RunFolder, state: dict[str, Any]) -> None:
            nonlocal saves
            save(run, state)
            saves += 1
            if saves == 7:  # in the second epoch
                raise TrainingInterrupted(run.config)

        monkeypatch.setattr(RunFolder, "save_last", save_and_stop)
        with pytest.raises(TrainingInterrupted):
            train(config)
        monkeypatch.undo()
        resumed = train(config, resume=True)
        ours, theirs = (mobilevit.load(result.best).state_dict() for result in (whole, resumed))
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
        assert whole.report.to_dict() == resumed.report.to_dict()

    def test_a_frozen_backbone_stays(self, config: TrainConfig, tmp_path: Path) -> None:
        start = self.model(num_classes=self.num_classes)
        mobilevit.save(start, tmp_path / "start.safetensors")
        config = with_settings(
            config, weights=str(tmp_path / "start.safetensors"), freeze_backbone=True, ema=False, epochs=1
        )
        before, after = start.state_dict(), mobilevit.load(train(config).best).state_dict()
        changed = {key for key in after if key in before and before[key].shape == after[key].shape}
        changed = {key for key in changed if not torch.equal(before[key], after[key])}
        stages = ("stem.", "layer1.", "layer2.", "layer3.", "layer4.", "layer5.")
        assert not [key for key in changed if key.removeprefix("backbone.").startswith(stages)]
        assert changed

    def test_eval_command(self, run: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
        best = str(run / "best.safetensors")
        assert main(["eval", best, "--data", str(data), "--out", str(tmp_path / "e"), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        written = json.loads((run / "evaluation.json").read_text())
        assert told[self.score] == pytest.approx(written[self.score], abs=1e-6)  # the part that was held out
        assert {"evaluation.json", "samples.png", *self.plots} <= {path.name for path in (tmp_path / "e").iterdir()}
        report = mobilevit.evaluate(best, str(data), device="cpu")
        assert (report.num_images, report.score) == (told["num_images"], pytest.approx(told[self.score], abs=1e-6))
        assert main(["eval", best, "--data", str(data), "--out", str(tmp_path / "e"), "--split", "all"]) == 0
        assert "24 images" in capsys.readouterr().out

    def test_two_processes_report_what_one_does(self, run: Path, data: Path, tmp_path: Path) -> None:
        model = mobilevit.load(run / "best.safetensors")
        report = _report(model, data)
        # Forked, as reading processes are: importing PyTorch anew takes longer than all the rest.
        multiprocessing.start_processes(_evaluate_in_process, (run, data, tmp_path), nprocs=2, start_method="fork")
        for rank in range(2):
            assert json.loads((tmp_path / f"{rank}.json").read_text()) == json.loads(json.dumps(report))

    def test_every_kind_of_source_gives_the_same_result(self, run: Path, tmp_path: Path) -> None:
        scene = shapes.render_scene(5, size=100, num_objects=2)
        path = tmp_path / "scene.png"
        scene.image.save(path)
        predictor = Predictor(run / "best.safetensors")
        results = predictor([str(path), path, path.read_bytes(), scene.image, np.asarray(scene.image)])
        told = [{k: v for k, v in result.to_dict().items() if k != "source"} for result in results]
        assert all(one == told[0] for one in told)
        assert all(type(result) is type(results[0]) for result in results)
        assert predictor(path).to_dict() == predictor([path])[0].to_dict()

    def test_a_result_keeps_the_images_size(self, run: Path) -> None:
        result: Result = Predictor(run / "best.safetensors")(Image.new("RGB", (150, 70), "gray"))
        assert result.image.size == (150, 70)
        drawn = result.draw()
        assert drawn.width >= 150
        assert drawn.height >= 70

    def test_data_check_command(self, data: Path, tmp_path: Path, capsys: Any) -> None:
        assert main(["data", "check", str(data), "--out", str(tmp_path / "sheet.png"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["task"] == self.task
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.width > 300

    def test_mistakes_get_one_line(self, run: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
        best = str(run / "best.safetensors")
        for arguments in (
            ["eval", best, "--data", str(tmp_path / "nowhere")],
            ["eval", best, "--data", str(data), "--split", "test"],
            ["train", "--data", str(tmp_path / "nowhere")],
            ["predict", best],
            ["predict", str(tmp_path / "nowhere.safetensors"), "x.jpg"],
            ["data", "check", str(tmp_path / "nowhere")],
        ):
            assert main(arguments) == 2, arguments
            said = capsys.readouterr().err.strip()
            assert said.startswith("error: "), arguments
            assert len(said.splitlines()) == 1, said


def _tensors(output: Any) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else [part for part in output if part is not None]


def _report(model: nn.Module, data: Path) -> dict[str, Any]:
    card: ModelCard = card_of(model)
    (images,) = find_splits(data, card.task).values()
    device = torch.device("cpu")
    loader = evaluation_loader(images, card, batch_size=1, num_workers=0, device=device)
    session = TorchSession(model, card, device=device)
    return measure(session, loader).report.to_dict()


def _evaluate_in_process(rank: int, run: Path, data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{out / 'meet'}", rank=rank, world_size=2)
    report = _report(mobilevit.load(run / "best.safetensors"), data)
    (out / f"{rank}.json").write_text(json.dumps(report))
    distributed.destroy_process_group()


class Classification:
    task = "classification"
    write = shapes.write_folder
    score = "top1"
    plots = ("confusion_matrix.png", "confusion_matrix.csv")
    num_classes = 6


class TestClassificationV2(Classification, ModelContract):
    model_name = "mobilevitv2_050"


class TestClassification(Classification, TaskContract):
    pass


class Detection:
    task = "detection"
    write = shapes.write_boxes
    score = "ap"
    plots = ("pr_curves.png", "per_class.png")
    num_classes = 6


class TestDetectionV2(Detection, ModelContract):
    model_name = "mobilevitv2_050"


class TestDetection(Detection, TaskContract):
    def test_coco_results(self, run: Path, tmp_path: Path) -> None:
        shapes.render_scene(0, size=80).image.save(tmp_path / "0.png")
        found = tmp_path / "found.json"
        best = str(run / "best.safetensors")
        assert main(["predict", best, str(tmp_path / "0.png"), "--coco", str(found), "--min-score", "0.99"]) == 0
        rows = json.loads(found.read_text())
        assert rows, "a results file has all objects, however improbable"
        assert set(rows[0]) == {"image_id", "category_id", "bbox", "score", "file_name"}

    def test_flags_of_another_task(self, run: Path, tmp_path: Path, capsys: Any) -> None:
        assert main(["predict", str(run / "best.safetensors"), "x.png", "--masks", str(tmp_path)]) == 2
        assert "--masks is for segmentation" in capsys.readouterr().err


class Segmentation:
    task = "segmentation"
    write = shapes.write_masks
    score = "miou"
    plots = ("per_class_iou.png", "confusion_matrix.csv")
    num_classes = 7


class TestSegmentationV2(Segmentation, ModelContract):
    model_name = "mobilevitv2_050"


class TestSegmentation(Segmentation, TaskContract):
    def test_masks(self, run: Path, tmp_path: Path) -> None:
        shapes.render_scene(0, size=80).image.save(tmp_path / "0.png")
        out = tmp_path / "masks"
        assert main(["predict", str(run / "best.safetensors"), str(tmp_path / "0.png"), "--masks", str(out)]) == 0
        with Image.open(out / "0.png") as mask:
            assert (mask.mode, mask.size) == ("P", (80, 80))
            assert np.asarray(mask).max() < 7

    def test_a_cropped_input_is_refused(self, run: Path, data: Path) -> None:
        model = mobilevit.load(run / "best.safetensors")
        card = card_of(model)
        model.card = dataclasses.replace(
            card, preprocessing=dataclasses.replace(card.preprocessing, resize_mode="crop")
        )
        with pytest.raises(ValueError, match="`resize_mode` 'pad' or 'stretch'"):
            Predictor(model)
        with pytest.raises(ValueError, match="`resize_mode` is crop; it must be stretch or pad"):
            train(TrainConfig(data=data, resize_mode="crop"))
