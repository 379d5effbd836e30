"""Algorithm 1's loop: schedule, repeatability, exact resume, shares of a batch, two processes, the real images."""

import csv
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import checkpoints
import data
import evaluate
import losses
import runs
import train
from models import build_model

FLAGS = "--dataset digits --arch resnet20 --method magnma --n 1 --subset 48 --batch-size 20 --lr 0.05 --device cpu"


class Tiny(nn.Module):
    """A network with all that has a state: batch norm, and dropout, which draws from torch's global generator."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.Linear(8 * 49, 10)

    def forward(self, x):
        return self.fc(nn.functional.dropout(torch.relu(self.bn(self.conv(x))).reshape(len(x), -1), 0.3, self.training))


@pytest.fixture(scope="module", autouse=True)
def tiny_network():
    """Stands in for ResNet-20, to be quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_model", lambda *_: Tiny())
        patch.setattr(checkpoints, "build_model", lambda *_: Tiny())
        yield


def run(out, *flags):
    return train.main([*FLAGS.split(), "--out", str(out), *flags])


def weights(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of three epochs that nothing interrupted."""
    folder = tmp_path_factory.mktemp("train") / "undisturbed"
    assert run(folder, "--epochs", "3") == 0
    return folder


# Flags, schedule, folders


def test_learning_rate_is_divided_by_ten_every_50_of_150_epochs():
    rates = [train.learning_rate(0.1, t, 150) for t in range(150)]
    assert rates == pytest.approx([0.1] * 50 + [0.01] * 50 + [0.001] * 50)
    assert train.learning_rate(0.1, 1, 2) == pytest.approx(0.01)


def test_the_defaults_are_the_papers():
    config = vars(train.parse_args([]))
    expected = {"epochs": 150, "batch_size": 128, "lr": 0.1, "weight_decay": 5e-4, "lambda1": 0.2, "lambda2": 0.3}
    expected |= {"sigma_max": 0.2, "beta": 1.0, "n": 5, "rse_sigma": 0.1, "rse_samples": 10, "jsd_lambda": 12.0}
    expected |= {"epsilon": 8 / 255, "pgd_steps": 7, "pgd_step_size": 2.5 * 8 / 255 / 7, "trades_lambda": 6.0}
    assert {key: config[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("flags", "tag"),
    [("", ""), ("--lambda2 0", "noise"), ("--lambda1 0 --lambda2 5", "mix"), ("--n 1", "n_1"),
     ("--lambda1 0.1 --lambda2 0", "l1_0.1-l2_0-s_0.2-b_1"), ("--lambda2 0 --n 3", "noise-n_3"),
     ("--sigma-max 0.25 --beta 0.5", "l1_0.2-l2_0.3-s_0.25-b_0.5"), ("--tag mine", "mine"), ("--method gn", "")],
)  # fmt: skip
def test_tags(flags, tag):
    assert train.parse_args(flags.split()).tag == tag


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--n 0", "--n 0 with a positive"), ("--sigma-max -0.1", "--sigma-max.*out of range"),
     ("--beta 0", "--beta.*above 0"), ("--batch-size 0", "--batch-size.*at least 1"),
     ("--lr nan", "--lr.*out of range"), ("--lr x", "--lr.*not a number"),
     ("--method magma", "--method.*invalid choice"), ("--arch vgg", "--arch.*invalid choice"),
     ("--dataset mnist", "--dataset.*invalid choice"), ("--epochs 0", "--epochs"), ("--seed -1", "--seed"),
     ("--resume --overwrite", "exclude each other"), ("--accumulate 0", "--accumulate")],
)  # fmt: skip
def test_bad_flags_name_the_flag(flags, message):
    with pytest.raises(ValueError, match=message):
        train.parse_args(flags.split())


def test_errors_that_need_the_data(tmp_path):
    with pytest.raises(ValueError, match="--subset 2000: digits has 1437"):
        run(tmp_path / "r", "--subset", "2000")
    with pytest.raises(ValueError, match="--sync-bn needs GPUs"):
        run(tmp_path / "r2", "--sync-bn")
    with pytest.raises(ValueError, match="--amp fp16 needs a GPU"):
        run(tmp_path / "r3", "--amp", "fp16")


# What a run writes


def test_the_files_of_a_run(undisturbed):
    assert (undisturbed / "log.csv").read_text().splitlines()[0] == "epoch,lr,train_loss,train_accuracy,test_accuracy"
    rows = list(csv.DictReader((undisturbed / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert json.loads((undisturbed / "config.json").read_text())["lambda1"] == 0.2
    assert len(list(csv.DictReader((undisturbed / "timing.csv").open()))) == 3
    accuracies = [float(row["test_accuracy"]) for row in rows]
    best = torch.load(undisturbed / "best.pt", weights_only=True)
    assert best["epoch"] == 1 + accuracies.index(max(accuracies))
    assert best["model"].keys() == Tiny().state_dict().keys()  # bare: no _orig_mod., no module.
    assert not list(undisturbed.glob(".*.tmp"))


def test_logged_accuracies_are_those_of_the_saved_network(undisturbed):
    dataset = data.load_dataset("digits", undisturbed)
    config = json.loads((undisturbed / "config.json").read_text())
    for name, row in (("last", 2), ("best", None)):
        model, saved = checkpoints.load_run(undisturbed, name, config, dataset)
        _, prediction = evaluate.predict(model, dataset.test_images)
        rows = list(csv.DictReader((undisturbed / "log.csv").open()))
        logged = rows[row if row is not None else saved["epoch"] - 1]
        accuracy = 100 * (prediction == dataset.test_labels).double().mean()
        assert accuracy == pytest.approx(float(logged["test_accuracy"]))


def test_the_first_loss_is_that_of_the_loss_function_on_its_own(tmp_path):
    dataset = data.load_dataset("digits", tmp_path)
    config = vars(train.parse_args([*FLAGS.split(), "--epochs", "1"]))
    torch.manual_seed(0)
    model = build_model("resnet20", 10, dataset.mean, dataset.std)
    images, y = dataset.train_images[:20], dataset.train_labels[:20]
    draws = torch.Generator().manual_seed(5)
    x = train.preprocess(images, False, draws).float() / 255
    expected, logits = losses.METHODS["magnma"](model.train(), x, y, config, draws)
    loss_sum, correct = train.train_step(model, images, y, config, hflip=False, seed=5)
    assert loss_sum.item() / 20 == pytest.approx(expected.item(), rel=1e-5)
    assert correct.item() == (logits.argmax(1) == y).sum()


# Repeatability and resume


def test_a_seed_repeats_bit_for_bit_and_another_differs(undisturbed, tmp_path):
    run(tmp_path / "again", "--epochs", "3")
    assert same(weights(undisturbed), weights(tmp_path / "again"))
    assert (undisturbed / "log.csv").read_bytes() == (tmp_path / "again" / "log.csv").read_bytes()
    run(tmp_path / "other", "--epochs", "3", "--seed", "1")
    assert not same(weights(undisturbed), weights(tmp_path / "other"))


@pytest.mark.parametrize("stop_after", [1, 3, 5])  # steps; an epoch has three
def test_a_stopped_run_resumes_bit_for_bit(undisturbed, tmp_path, monkeypatch, stop_after):
    steps = []
    original = train.train_step

    def counted(*args, **kwargs):
        steps.append(1)
        if len(steps) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", counted)
    with pytest.raises(runs.Stopped, match=r"SIGTERM.*--resume") as stopped:
        run(tmp_path / "r", "--epochs", "3")
    assert stopped.value.exit_code == 143
    assert len(steps) == stop_after  # within one step
    run(tmp_path / "r", "--epochs", "3", "--resume")
    assert len(steps) == 9  # no step is done twice
    assert same(weights(undisturbed), weights(tmp_path / "r"))
    assert same(weights(undisturbed, "best.pt"), weights(tmp_path / "r", "best.pt"))
    assert (undisturbed / "log.csv").read_bytes() == (tmp_path / "r" / "log.csv").read_bytes()


def test_a_signal_during_the_test_of_an_epoch_is_acted_on_at_once_and_costs_no_step(undisturbed, tmp_path, monkeypatch):
    batches, original = [], Tiny.forward

    def forward(self, x):
        if not self.training:
            batches.append(len(x))
            if len(batches) == 3:  # of 250 and 110 test images an epoch: the first of the second epoch
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, x)

    monkeypatch.setattr(Tiny, "forward", forward)
    with pytest.raises(runs.Stopped, match=r"SIGTERM.*--resume"):
        run(tmp_path / "r", "--epochs", "3")
    assert batches == [250, 110, 250]
    run(tmp_path / "r", "--epochs", "3", "--resume")
    assert same(weights(undisturbed), weights(tmp_path / "r"))
    assert (undisturbed / "log.csv").read_bytes() == (tmp_path / "r" / "log.csv").read_bytes()


def test_what_is_refused_late_deletes_nothing(undisturbed):
    before = sorted(p.name for p in undisturbed.iterdir())
    with pytest.raises(ValueError, match="--sync-bn"):
        run(undisturbed, "--epochs", "3", "--overwrite", "--sync-bn")
    assert sorted(p.name for p in undisturbed.iterdir()) == before


def test_a_pause_does_not_save_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    run(tmp_path / "r", "--epochs", "1")
    before = (tmp_path / "r" / "last.pt").read_bytes()
    nothing = torch.tensor(float("nan"))
    monkeypatch.setattr(train, "train_step", lambda *_, **__: (nothing, nothing))
    with pytest.raises(ValueError, match="is nan"):
        run(tmp_path / "r", "--epochs", "1", "--overwrite", "--max-minutes", "1e-6")
    assert not (tmp_path / "r" / "last.pt").exists() or (tmp_path / "r" / "last.pt").read_bytes() == before


def test_the_time_limit_pauses(tmp_path):
    with pytest.raises(runs.Stopped, match="paused") as stopped:
        run(tmp_path / "r", "--epochs", "3", "--max-minutes", "1e-6")
    assert stopped.value.exit_code == 0


def test_a_run_killed_between_its_files_is_made_whole(undisturbed, tmp_path):
    run(tmp_path / "r", "--epochs", "3")
    for name in ("log.csv", "timing.csv", "best.pt"):
        (tmp_path / "r" / name).unlink()
    run(tmp_path / "r", "--epochs", "3", "--resume")
    assert (undisturbed / "log.csv").read_bytes() == (tmp_path / "r" / "log.csv").read_bytes()
    rows = list(csv.DictReader((undisturbed / "log.csv").open()))
    if max(rows, key=lambda r: float(r["test_accuracy"]))["epoch"] == "3":
        assert same(weights(undisturbed, "best.pt"), weights(tmp_path / "r", "best.pt"))


def test_an_existing_run_is_kept_unless_told_otherwise(undisturbed):
    before = (undisturbed / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=r"holds a run already; --resume"):
        run(undisturbed, "--epochs", "3")
    for flags in (["--lambda1", "0.5"], ["--epochs", "4"], ["--seed", "3"]):
        with pytest.raises(ValueError, match=f"{flags[0]} was"):
            run(undisturbed, "--epochs", "3", "--resume", *flags)
    run(undisturbed, "--epochs", "3", "--resume", "--amp", "off")  # may differ; nothing is left to do
    assert (undisturbed / "last.pt").read_bytes() == before


def test_overwrite_starts_again(tmp_path):
    run(tmp_path / "r", "--epochs", "1")
    (tmp_path / "r" / "results.json").write_text("{}")
    run(tmp_path / "r", "--epochs", "1", "--overwrite", "--seed", "1")
    assert not (tmp_path / "r" / "results.json").exists()
    assert json.loads((tmp_path / "r" / "config.json").read_text())["seed"] == 1


def test_a_damaged_checkpoint_is_not_resumed(tmp_path):
    run(tmp_path / "r", "--epochs", "1")
    whole = (tmp_path / "r" / "last.pt").read_bytes()
    (tmp_path / "r" / "last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"last\.pt is not a whole torch checkpoint"):
        run(tmp_path / "r", "--epochs", "1", "--resume")
    runs.save_checkpoint(tmp_path / "r" / "last.pt", {"model": {}})
    with pytest.raises(ValueError, match=r"last\.pt is no checkpoint of train\.py"):
        run(tmp_path / "r", "--epochs", "1", "--resume")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"training loss of epoch \d is nan.*smaller --lr"):
        run(tmp_path / "r", "--epochs", "2", "--lr", "1e30")


# One batch in shares


class NoBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, stride=4), nn.Linear(4 * 64, 10)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).reshape(len(x), -1))


def no_batch_norm(*_):
    torch.manual_seed(3)
    return NoBatchNorm()


def test_shares_cover_a_batch():
    for total in (1, 7, 20):
        for parts in (1, 2, 3, 8):
            ranges = train.shares(0, total, parts)
            assert [i for start, stop in ranges for i in range(start, stop)] == list(range(total))
            assert max(b - a for a, b in ranges) - min(b - a for a, b in ranges) <= 1


@pytest.mark.parametrize("method", list(losses.METHODS))
def test_micro_batches_give_the_gradient_of_the_whole(method, tmp_path):
    dataset = data.load_dataset("digits", tmp_path)
    gradients = []
    for k in (1, 3, 8):
        config = vars(train.parse_args(["--method", method, "--n", "2", "--accumulate", str(k)]))
        model = no_batch_norm()
        loss_sum, correct = train.train_step(
            model, dataset.train_images[:7], dataset.train_labels[:7], config, hflip=True, seed=1
        )
        gradients.append((loss_sum, correct, *(p.grad for p in model.parameters())))
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            # in PGD the sign of a gradient near 0 can turn
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-3 if method in ("at", "trades") else 1e-5)


TWO_EPOCHS = ("--epochs", "2", "--subset", "47", "--batch-size", "19", "--accumulate", "2")  # unequal shares


def join(rank, world, port):
    """Become one of `world` processes, as torchrun starts them, with a network without batch norm."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    train.build_model = no_batch_norm


def worker(rank, world, folder, port):
    """One of `world` processes of two runs, and of a third whose second process is told to stop in its first step."""
    for k, method in enumerate(("magnma", "trades")):
        join(rank, world, port + k)
        run(folder / f"{method}-{world}", "--method", method, *TWO_EPOCHS)
    join(rank, world, port + 2)
    step = train.train_step

    def told_to_stop(*args, **kwargs):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    train.train_step = told_to_stop
    written = checkpoints.Saver.epoch

    def by_the_first(*args):
        assert rank == 0
        written(*args)

    checkpoints.Saver.epoch = by_the_first
    with pytest.raises(runs.Stopped, match="--resume"):  # both of them
        run(folder / "stopped", *TWO_EPOCHS)
    torch.distributed.destroy_process_group()
    train.train_step = step
    for k, resumed in enumerate(("stopped", "of-one")):  # the latter within an epoch
        join(rank, world, port + 3 + k)
        run(folder / resumed, *TWO_EPOCHS, "--resume")


def test_two_processes_are_the_run_of_one_and_stop_and_resume_together(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build_model", no_batch_norm)
    for method in ("magnma", "trades"):
        run(tmp_path / f"{method}-1", "--method", method, *TWO_EPOCHS)
    with pytest.raises(runs.Stopped, match="paused"):
        run(tmp_path / "of-one", *TWO_EPOCHS, "--max-minutes", "1e-6")
    port = 20000 + os.getpid() % 20000
    torch.multiprocessing.spawn(worker, (2, tmp_path, port), nprocs=2)
    for method in ("magnma", "trades"):
        one, two = (np.genfromtxt(tmp_path / f"{method}-{k}" / "log.csv", delimiter=",", skip_header=1) for k in (1, 2))
        assert np.allclose(one, two, rtol=1e-4)
        a, b = weights(tmp_path / f"{method}-1"), weights(tmp_path / f"{method}-2")
        tolerance = 1e-6 if method == "magnma" else 1e-3  # in PGD the sign of a gradient near 0 can turn
        assert max((a[k] - b[k]).abs().max() for k in a) < tolerance
        assert sorted(a) == ["conv.bias", "conv.weight", "fc.bias", "fc.weight"]
    one, two = (np.genfromtxt(tmp_path / k / "log.csv", delimiter=",", skip_header=1) for k in ("magnma-1", "of-one"))
    assert np.allclose(one, two, rtol=1e-4)
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "magnma-2"))
    assert (tmp_path / "stopped" / "log.csv").read_bytes() == (tmp_path / "magnma-2" / "log.csv").read_bytes()


# As a command


def test_the_command_ends_errors_in_one_line(root, tmp_path):
    def command(*flags):
        done = subprocess.run([sys.executable, root / "train.py", *flags], capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stderr

    code, message = command("--data", str(tmp_path), "--method", "gn")
    assert code == 2
    assert message.count("\n") == 1
    assert message.startswith("train.py: ")
    assert "cifar" in message.lower()
    assert not (tmp_path / "runs").exists()


# Real images


@pytest.mark.cifar
def test_every_method_on_real_cifar(real_cifar, tmp_path):
    import corruptions

    dataset = data.load_dataset("cifar10", real_cifar)
    images = dataset.test_images[:16]
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    labels = dataset.test_labels.numpy()
    blank = np.zeros((5, len(labels), 32, 32, 3), np.uint8)
    for name in data.CORRUPTIONS:
        for severity in range(1, 6):
            pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
            blank[severity - 1, :16] = corruptions.corrupt(pixels, name, severity, seed=0)
        np.save(folder / f"{name}.npy", blank.reshape(-1, 32, 32, 3))
    np.save(folder / "labels.npy", np.tile(labels, 5))
    (tmp_path / "cifar-10-batches-py").symlink_to((real_cifar / "cifar-10-batches-py").resolve())
    for method in losses.METHODS:
        flags = f"--method {method} --arch resnet20 --n 1 --pgd-steps 2 --rse-samples 2"
        config = vars(train.parse_args(flags.split()))
        torch.manual_seed(0)
        model = build_model("resnet20", 10, dataset.mean, dataset.std)
        theta = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
        for step in range(4):
            x, y = (t[128 * step : 128 * (step + 1)] for t in (dataset.train_images, dataset.train_labels))
            loss, _ = train.train_step(model, x, y, config, hflip=True, seed=step)
            train.update(theta, None)
            assert torch.isfinite(loss)
        stop = runs.StopRequest()
        e = evaluate.evaluate(model, dataset, str(tmp_path), config, tmp_path / method, str, stop, limit=16)
        assert 0 <= e["mca"] <= 100
        assert len(e["corruptions"]) == 18
