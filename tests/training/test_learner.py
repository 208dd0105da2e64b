"""One training step, and what a learner is made of."""

from __future__ import annotations

import pytest
import torch

from mobilevit.data.datasets import load_train_val
from mobilevit.data.loaders import Batch
from mobilevit.training.config import TrainConfig
from mobilevit.training.distributed import World
from mobilevit.training.learner import Learner, _amp_dtype
from training_settings import with_settings

CPU = torch.device("cpu")


def learner_of(config: TrainConfig, *, world: World | None = None) -> Learner:
    config = config.resolve("classification")
    train_set, _ = load_train_val(config.data, val_path=None, val_fraction=config.val_fraction, seed=config.seed)
    return Learner(config, train_set, world=world or World(), device=CPU)


def batch_of(count: int) -> Batch:
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    return Batch(images=images, targets=torch.arange(count) % 6, indices=list(range(count)), errors=[])


def test_bf16_by_itself_only_where_it_is_no_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_an_older_gpu(including_emulation: bool = True) -> bool:
        return including_emulation

    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", on_an_older_gpu)
    assert _amp_dtype("auto", cuda) is None
    assert _amp_dtype("bf16", cuda) is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert _amp_dtype("auto", cuda) is torch.bfloat16


@pytest.mark.parametrize("clip_grad_norm", [None, 1.0])
def test_a_scaler_outlives_a_batch_that_nothing_can_be_learned_from(
    tiny: TrainConfig, clip_grad_norm: float | None
) -> None:
    learner = learner_of(with_settings(tiny, clip_grad_norm=clip_grad_norm))
    learner.scaler = torch.amp.GradScaler("cpu", enabled=True)
    learner.train_mode()
    before = learner.model.state_dict()["stem.conv.weight"].clone()
    assert learner.step(batch_of(1), share=1.0, learning_rate=1e-3) is None
    assert torch.equal(learner.model.state_dict()["stem.conv.weight"], before)
    assert learner.step(batch_of(4), share=1.0, learning_rate=1e-3) is not None
    assert not torch.equal(learner.model.state_dict()["stem.conv.weight"], before)


@pytest.mark.parametrize("seen", [False, True])
def test_one_of_several_without_images_gives_the_others_gradients_of_zero(tiny: TrainConfig, seen: bool) -> None:
    learner = learner_of(tiny)
    learner.train_mode()
    if seen:
        learner.step(batch_of(4), share=1.0, learning_rate=1e-3)
    learner.world = World(rank=1, size=2)
    learner.forward.no_sync = torch.no_grad  # would take gradients away, if it were asked
    given: list[float] = []

    def note(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        given.append(float(parameter.grad.abs().max()))

    for parameter in learner.model.parameters():
        parameter.register_post_accumulate_grad_hook(note)
    assert learner.step(batch_of(0), share=1.0, learning_rate=1e-3) is None
    assert given == [0.0] * len(list(learner.model.parameters()))


def test_common_statistics_need_gpus(tiny: TrainConfig) -> None:
    config = with_settings(tiny, sync_batch_norm=True)
    learner_of(config)
    with pytest.raises(ValueError, match="`sync_batch_norm` needs GPUs"):
        learner_of(config, world=World(size=2))
