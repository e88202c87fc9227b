"""book_utils.fit 的承诺：超出范围的参数、换了设置的续训、不是有限的损失，都用一句中文说清楚。"""

import math

import pytest
import torch
from torch import nn

from book_utils import fit
from book_utils.training import load_state

X = torch.linspace(-1, 1, 40).view(-1, 1)
BASE = {"n_epochs": 4, "batch_size": 8, "lr": 0.05, "seed": 3}


def noisy_loss(model, x, generator):
    return (model(x) - 3 * x + 0.1 * torch.randn(x.shape, generator=generator)).square().mean()


def train(tensors=(X,), loss=noisy_loss, **options):
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    return model, fit(model, tensors, loss, **BASE | options)


@pytest.mark.parametrize(("bad", "message"), [
    ({"n_epochs": 0}, "n_epochs 应是正整数，收到的是 0"),
    ({"n_epochs": 1.5}, "n_epochs 应是正整数，收到的是 1.5"),
    ({"batch_size": 0}, "batch_size 应是正整数，收到的是 0"),
    ({"batch_size": -4}, "batch_size 应是正整数，收到的是 -4"),
    ({"micro_batch": 0}, "micro_batch 应是正整数，收到的是 0"),
    ({"checkpoint_every": 0}, "checkpoint_every 应是正整数，收到的是 0"),
    ({"max_steps": 0}, "max_steps 应是正整数，收到的是 0"),
    ({"lr": 0.0}, "lr 应是大于 0 的数，收到的是 0.0"),
    ({"lr": math.nan}, "lr 应是大于 0 的数，收到的是 nan"),
    ({"lr": math.inf}, "lr 应是大于 0 的数，收到的是 inf"),
    ({"ema_decay": 1.0}, "ema_decay 应在 0 与 1 之间，收到的是 1.0"),
    ({"seed": -1}, "seed 应是非负整数，收到的是 -1"),
    ({"tensors": (X[:0],)}, r"样本数应相同，并且不是 0，收到的是 \[0\]"),
    ({"tensors": ()}, r"收到的是 \[\]"),
    ({"tensors": (X, X[:5])}, r"收到的是 \[40, 5\]"),
])
def test_bad_options(bad, message):
    with pytest.raises(ValueError, match=message):
        train(**bad)


@pytest.mark.parametrize(("first", "then", "message"), [
    ({}, {"lr": 0.01}, "lr 是 0.05，这次是 0.01"),
    ({}, {"seed": 4}, "seed 是 3，这次是 4"),
    ({}, {"batch_size": 4}, "batch_size 是 8，这次是 4"),
    ({}, {"micro_batch": 2}, "micro_batch 是 None，这次是 2"),
    ({}, {"ema_decay": 0.9}, "ema_decay 是 None，这次是 0.9"),
    ({"ema_decay": 0.9}, {}, "ema_decay 是 0.9，这次是 None"),
    ({}, {"lr_decay": True}, "lr_decay 是 False，这次是 True"),
    ({"lr_decay": True}, {"lr_decay": True, "n_epochs": 8}, "n_epochs 是 4，这次是 8"),
    ({}, {"tensors": (X[:32],)}, r"tensors 是 \(40, 1\)（校验值 \w{8}），这次是 \(32, 1\)"),
    ({}, {"tensors": (X + 1e-4,)}, r"tensors 是 \(40, 1\)（校验值 \w{8}），这次是 \(40, 1\)（校验值"),
])
def test_other_settings_are_named_and_refused(tmp_path, first, then, message):
    checkpoint = tmp_path / "checkpoint.safetensors"
    train(checkpoint=checkpoint, checkpoint_every=2, max_steps=6, **first)
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match=f"属于另一次训练：它的 .*{message}"):
        train(checkpoint=checkpoint, **then)
    assert checkpoint.read_bytes() == before


def test_more_epochs_may_follow(tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    train(checkpoint=checkpoint, checkpoint_every=1)
    model, history = train(checkpoint=checkpoint, checkpoint_every=1, n_epochs=6)
    whole_model, whole = train(n_epochs=6)
    assert history.losses == whole.losses and torch.equal(model.weight, whole_model.weight)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    from book_utils.training import save_state

    save_state(tmp_path / "x.safetensors", {"losses": torch.zeros(1)}, {"step": 1})
    with pytest.raises(ValueError, match="lr 是 （没有记录），这次是 0.05"):
        train(checkpoint=tmp_path / "x.safetensors")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_training_stops_at_the_first_loss_that_is_not_finite(tmp_path, value):
    calls = []

    def breaks_down(model, x, generator):
        calls.append(1)
        return noisy_loss(model, x, generator) * (value if len(calls) == 7 else 1)

    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(ValueError, match=f"第 7 步的损失是 {value}.*请调小 lr"):
        train(loss=breaks_down, checkpoint=checkpoint, checkpoint_every=2)
    assert len(calls) == 7 and len(load_state(checkpoint)[0]["losses"]) == 6
    _, resumed = train(checkpoint=checkpoint, checkpoint_every=2)
    _, whole = train()
    assert resumed.losses == whole.losses and all(map(math.isfinite, resumed.losses))
