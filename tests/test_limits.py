"""The edges of what is allowed: numeric flags at the ends of their ranges, sets and predictions of the oddest kind."""

import argparse
import importlib
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import data
import evaluate
import losses
import runs
import train
from models import build_model

# Flags

SCRIPTS = ("train", "evaluate", "make_corrupted", "tables", "benchmark", "contact_sheets", "run_list")


class SeenError(Exception):
    """Carries the parser that a script has built, instead of parsing."""


@pytest.fixture
def parser(request, monkeypatch):
    """The parser of a script."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise SeenError(parser)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Parser, "parse_args", stop)
        module = importlib.import_module(request.param)
        with pytest.raises(SeenError) as seen:
            getattr(module, "parse_args", module.main)([])
    return seen.value.args[0]


@pytest.mark.parametrize("parser", SCRIPTS, indirect=True)
def test_every_numeric_flag_refuses_what_is_out_of_its_range_by_name(parser):
    for action in parser._actions:
        assert action.type not in (int, float), f"{action.option_strings} has no range"
        if action.type is None or isinstance(action.type, type):  # text, a path
            continue
        flag, others = action.option_strings[0], ["1"] * ((action.nargs or 1) - 1)
        for text in ("nan", "inf", "-inf", "1e999", "-1", "-0.5", "9" * 400, "x", "", "1,5", "0x10", "½"):
            with pytest.raises(ValueError, match=f"argument {flag}: ") as refused:
                parser.parse_args([flag, text, *others] if others else [f"{flag}={text}"])
            expected = "expected 3 arguments" if others and text == "-inf" else "is not a|out of range, it must be"
            assert re.search(expected, str(refused.value))
            assert "\n" not in str(refused.value)
        fine = action.default if action.default not in (None, argparse.SUPPRESS) else 1
        given = getattr(parser.parse_args([flag, str(fine), *others]), action.dest)
        assert fine in (given, *(given if others else ()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--lr 0", "--lr: 0 is out of range, it must be above 0;"),
     ("--beta 0", "--beta: 0 is out of range, it must be above 0;"),
     ("--max-minutes 0", "--max-minutes: 0 is out of range, it must be above 0;"),
     ("--epochs 0", "--epochs: 0 is out of range, it must be at least 1;"),
     ("--epochs 2.5", "--epochs: '2.5' is not a whole number;"),
     ("--seed 2147483648", "--seed: 2147483648 is out of range, it must be at least 0 and at most 2147483647;"),
     ("--accumulate 129", "--accumulate 129 is more than the 128 images of --batch-size")],
)  # fmt: skip
def test_the_message_says_which_range(flags, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        train.parse_args(flags.split())


def test_the_largest_seed_works_everywhere():
    largest = train.parse_args(["--seed", str(2**31 - 1)]).seed
    torch.manual_seed(largest)
    np.random.seed(largest)  # noqa: NPY002
    torch.Generator().manual_seed(runs.seed_of(largest, "step", 0, 0))


# Numbers


class Constant(nn.Module):
    """A network that gives every image the same logits."""

    def __init__(self, *logits: float):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(x), -1)


IMAGES = torch.zeros(360, 3, 32, 32, dtype=torch.uint8)


@pytest.mark.parametrize("n", [1, 99, 100, 360])
@pytest.mark.parametrize("logits", [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (200.0, 0.0, 0.0), (math.inf, 0.0, 0.0)])
def test_all_predictions_equal_fill_one_bin_and_the_others_are_empty(n, logits):
    labels = np.arange(n) % 2  # of the three classes one is absent, and is never predicted
    confidence, prediction = evaluate.predict(Constant(*logits), IMAGES[:n])
    if math.isinf(logits[0]):  # inf - inf: no softmax
        assert confidence.isnan().all()
        with pytest.raises(ValueError, match=r"a confidence is not a number in \[0, 1\]"):
            evaluate.scores(confidence.numpy(), prediction.numpy() == labels)
        return
    assert set(prediction.tolist()) == {0}
    certain = math.exp(logits[0]) / (math.exp(logits[0]) + 2)
    scores = evaluate.scores(confidence.numpy(), prediction.numpy() == labels)
    share = np.mean(labels == 0)
    assert scores["accuracy"] == pytest.approx(100 * share)
    assert scores["rms_calibration_error"] == pytest.approx(100 * abs(share - certain), abs=1e-4)
    groups = [labels[100 * k : 100 * (k + 1) if k + 1 < max(1, n // 100) else n] == 0 for k in range(max(1, n // 100))]
    adaptive = math.sqrt(sum(len(g) / n * (g.mean() - certain) ** 2 for g in groups))
    assert scores["rms_calibration_error_adaptive"] == pytest.approx(100 * adaptive, abs=1e-4)
    counts = [row[0] for row in evaluate.reliability(confidence.numpy(), prediction.numpy() == labels)]
    assert sorted(counts) == [0] * 14 + [n]


def test_one_image_is_right_or_wrong():
    for label, accuracy in ((0, 100), (1, 0)):
        confidence, prediction = evaluate.predict(Constant(3.0, 0.0), IMAGES[:1])
        scores = evaluate.scores(confidence.numpy(), prediction.numpy() == [label])
        gap = 100 * abs(accuracy / 100 - 1 / (1 + math.exp(-3)))
        assert scores["accuracy"] == accuracy
        assert scores["rms_calibration_error"] == pytest.approx(gap, abs=1e-4)
        assert scores["rms_calibration_error_adaptive"] == pytest.approx(gap, abs=1e-4)


def test_confidences_of_0_and_1_are_in_the_first_and_last_bin():
    rows = evaluate.reliability(np.array([0.0, 1.0, 1.0]), np.array([False, True, False]))
    assert rows[0] == [1, 0, 0]
    assert rows[-1] == [2, 2, 1]
    assert evaluate.rms_calibration_error([0.0, 1.0], [False, True]) == 0
    assert evaluate.rms_calibration_error([0.0, 1.0], [False, True], adaptive=True) == 0


def test_a_network_of_weights_that_are_not_finite_is_refused_by_name(tmp_path):
    import checkpoints

    dataset = data.load_dataset("digits", tmp_path)
    model = build_model("resnet20", 10, dataset.mean, dataset.std)
    with torch.no_grad():
        model.fc.bias[3] = math.nan
    config = vars(train.parse_args(["--dataset", "digits", "--arch", "resnet20"]))
    runs.save_checkpoint(tmp_path / "last.pt", {"model": model.state_dict(), "epoch": 150, "config": config})
    with pytest.raises(ValueError, match=r"last\.pt is no checkpoint .*\(its weights are not finite\); train again"):
        checkpoints.load_run(tmp_path, "last", config, dataset)
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match=r"theirs\.pt: .*fc\.bias holds values that are not finite"):
        checkpoints.load_foreign(tmp_path / "theirs.pt", "resnet20", dataset, (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", losses.METHODS)
def test_inputs_that_are_not_finite_give_a_loss_that_is_not(method, value):
    """train.py then stops with one line; none of them hangs, or hides it."""
    torch.manual_seed(0)
    x = torch.rand(4, 3, 32, 32)
    x[0, 0, 0, 0] = value
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    hparams = vars(train.parse_args(["--n", "1", "--pgd-steps", "1"]))
    loss, _ = losses.METHODS[method](model, x, torch.arange(4), hparams)
    assert not loss.isfinite() or (method == "at" and value == math.inf)  # its attack is clipped to [0, 1]


def test_a_batch_of_one_image_trains():
    dataset = data.load_dataset("digits", ".")
    model = build_model("resnet20", 10, dataset.mean, dataset.std)
    config = vars(train.parse_args(["--n", "1"]))
    one = dataset.train_images[:1], dataset.train_labels[:1]
    loss_sum, _ = train.train_step(model, *one, config, hflip=False, seed=0)
    assert loss_sum.isfinite()
