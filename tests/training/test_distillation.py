from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import mobilevit
from mobilevit.devices import normalize
from mobilevit.imaging.preprocessing import Preprocessing
from mobilevit.training.config import DistillationSettings, TrainConfig
from mobilevit.training.distillation import Teacher, distillation_loss, open_teacher
from mobilevit.training.loop import train
from training_settings import with_settings

SIX = ("circle", "cross", "ring", "square", "star", "triangle")
PLAIN = Preprocessing(size=(32, 32))


def opened(name: str, given: Preprocessing, weights: Path | None = None) -> Teacher:
    return open_teacher(DistillationSettings(teacher=name, teacher_weights=weights), SIX, given)


def test_the_loss_is_the_softened_divergence() -> None:
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    assert distillation_loss(student, teacher, temperature=3.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert distillation_loss(teacher, teacher, temperature=3.0).item() == pytest.approx(0, abs=1e-6)


def test_gradients_do_not_shrink_with_the_temperature() -> None:
    """Of small logits, T^2 times the divergence has the same gradient at every T (arXiv:1503.02531, section 2.1)."""
    teacher = 0.01 * torch.randn(4, 6)
    norms = []
    for temperature in (1.0, 8.0):
        student = torch.zeros(4, 6, requires_grad=True)
        distillation_loss(student, teacher, temperature=temperature).backward()
        assert student.grad is not None
        norms.append(student.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_a_teacher_sees_images_as_its_own_training_did(tmp_path: Path) -> None:
    network = timm.create_model("resnet18", num_classes=6).eval()
    save_file(network.state_dict(), tmp_path / "resnet.safetensors")
    ours = Preprocessing(size=(64, 64), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    teacher = opened("timm/resnet18", ours, tmp_path / "resnet.safetensors")
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = network((pixels / 255 - mean) / std)
        torch.testing.assert_close(teacher(normalize(pixels, ours)), expected, rtol=1e-3, atol=1e-4)


def test_a_teacher_of_one_size_gets_it(tmp_path: Path) -> None:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=6).eval()
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    teacher = opened("timm/vit_tiny_patch16_224", PLAIN, tmp_path / "vit.safetensors")
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = network((F.interpolate(pixels, (224, 224), mode="bilinear", antialias=True) - 0.5) / 0.5)
        torch.testing.assert_close(teacher(pixels), expected, rtol=1e-3, atol=1e-4)


def test_a_teacher_of_other_classes(tmp_path: Path) -> None:
    save_file(timm.create_model("resnet18", num_classes=9).state_dict(), tmp_path / "nine.safetensors")
    with pytest.raises(ValueError, match=r"nine.safetensors: not of this network \(.*fc"):
        opened("timm/resnet18", PLAIN, tmp_path / "nine.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/no_such_model", "timm has no such classifier"),
        ("torchvision/no_such_model", "no such classifier"),
        ("missing.safetensors", "missing.safetensors"),
    ],
)
def test_unknown_teachers(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(name, PLAIN)


def test_weights_of_another_network(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: not of this network"):
        opened("timm/resnet18", PLAIN, tmp_path / "other.safetensors")
    (tmp_path / "bad.pth").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"bad.pth: this pickle may run code"):
        opened("torchvision/resnet18", PLAIN, tmp_path / "bad.pth")


def test_a_student_learns_from_a_teacher_alone(tiny: TrainConfig, tmp_path: Path) -> None:
    """With no share left for the labels, the loss is the divergence, and falls."""
    torch.manual_seed(1)
    model = mobilevit.create_model("mobilevit_xxs", classes=SIX)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    mobilevit.save(model, tmp_path / "teacher.safetensors")
    config = with_settings(
        tiny, teacher=str(tmp_path / "teacher.safetensors"), distillation_share=1.0, epochs=1, out=tmp_path / "taught"
    )
    result = train(config)
    assert result.epochs == 1
    row = (config.out / "metrics.jsonl").read_text()
    alone = dataclasses.replace(tiny, epochs=1, out=tmp_path / "alone")
    train(alone)
    assert row != (alone.out / "metrics.jsonl").read_text()
    taught, untaught = (mobilevit.load(out / "best.safetensors").state_dict() for out in (config.out, alone.out))
    assert any(not torch.equal(taught[key], untaught[key]) for key in taught)


def test_classes_must_agree(tiny: TrainConfig, tmp_path: Path) -> None:
    mobilevit.save(mobilevit.create_model("mobilevit_xxs", classes=SIX[::-1]), tmp_path / "teacher.safetensors")
    config = with_settings(tiny, teacher=str(tmp_path / "teacher.safetensors"))
    with pytest.raises(ValueError, match="same classes in the same order"):
        train(config)


def test_settings_without_a_teacher() -> None:
    with pytest.raises(ValueError, match=r"`distillation_share` is 0.9; it must be left out without `teacher`"):
        TrainConfig(data=Path("d"), distillation=DistillationSettings(distillation_share=0.9)).validate()


def test_the_teachers_answer_counts_by_its_share(tiny: TrainConfig, tmp_path: Path) -> None:
    from mobilevit.data.datasets import load_train_val
    from mobilevit.data.loaders import Batch
    from mobilevit.tasks.classification import classification_loss
    from mobilevit.training.distributed import World
    from mobilevit.training.learner import Learner

    mobilevit.save(mobilevit.create_model("mobilevit_xxs", classes=SIX), tmp_path / "teacher.safetensors")
    config = with_settings(
        tiny, teacher=str(tmp_path / "teacher.safetensors"), distillation_share=0.3, distillation_temperature=4.0
    ).resolve("classification")
    data, _ = load_train_val(config.data, task=None, val_path=None, val_fraction=0.2, seed=0)
    learner = Learner(config, data, world=World(), device=torch.device("cpu"))
    learner.model.eval()  # no dropout, so that the loss can be computed again
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(images=pixels, targets=torch.arange(4), indices=[0, 1, 2, 3], errors=[])
    with torch.no_grad():
        said, told = learner.model(pixels / 255), mobilevit.load(tmp_path / "teacher.safetensors")(pixels / 255)
    expected = 0.7 * classification_loss(said, torch.arange(4), label_smoothing=0.1)
    expected += 0.3 * 16 * F.kl_div((said / 4).log_softmax(1), (told / 4).softmax(1), reduction="batchmean")
    loss = learner.step(batch, share=1.0, learning_rate=1e-3)
    assert loss is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
