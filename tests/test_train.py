"""Algorithm 1's loop against a plain one, what a run writes, exact resume after kills, two processes."""

import argparse
import copy
import csv
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import augment
import losses
import train
import utils
from data import load_dataset
from evaluate import predict

FLAGS = "--arch resnet20 --method gn --batch-size 16 --lr 0.05 --weight-decay 0.05 --device cpu"
FILES = {"best.pt", "config.json", "last.pt", "log.csv"}


class Tiny(nn.Module):
    """Stands in for ResNet-20, to be quick, with all that has a state: batch norm, and dropout, which draws."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.Linear(8 * 49, 10)

    def forward(self, x):
        return self.fc(nn.functional.dropout(torch.relu(self.bn(self.conv(x))).flatten(1), 0.3, self.training))


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    monkeypatch.setattr(train, "build_model", lambda *_: Tiny())


@pytest.fixture(scope="session")
def npz(tmp_path_factory):
    """The path of a data set of 70 training and 16 test images, ten classes of a colour each."""
    path, rng = tmp_path_factory.mktemp("npz") / "mine.npz", np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 70), ("test", 16)):
        labels = np.arange(count) % 10
        noise = rng.integers(0, 80, (count, 32, 32, 3))
        arrays[f"{part}_images"] = (noise + 17 * labels[:, None, None, None]).astype(np.uint8)
        arrays[f"{part}_labels"] = labels
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture
def run(npz, tmp_path):
    """Train in this process; returns the run's folder."""

    def run(*flags, out="run"):
        train.main([*FLAGS.split(), "--dataset", npz, "--out", str(tmp_path / out), *map(str, flags)])
        return tmp_path / out

    return run


def rows(folder):
    path = folder / "log.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def assert_same_run(a, b):
    """Weights, optimiser, scaler and log bit for bit, but for times and memory; and the same files."""
    for name in ("last.pt", "best.pt"):
        ours, theirs = (utils.load_checkpoint(folder / name) for folder in (a, b))
        for key in {"epoch", "model", "optimizer", "scaler"} & ours.keys():
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    logs = [[[row[key] for key in train.LOG[:5]] for row in rows(folder)] for folder in (a, b)]
    assert logs[0] == logs[1]
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()} == FILES


# Flags


def test_the_defaults_are_the_papers():
    expected = {"dataset": "cifar10", "data": "data", "method": "magnma", "arch": "resnet18", "seed": 0, "epochs": 150,
                "batch_size": 512, "lr": 0.1, "weight_decay": 5e-4, "lambda1": 0.2, "lambda2": 0.3, "sigma_max": 0.2,
                "beta": 1.0, "n": 5, "epsilon": 8 / 255, "pgd_steps": 7, "pgd_step_size": 2.5 * 8 / 255 / 7,
                "trades_lambda": 3.0, "rse_sigma": 0.1, "rse_samples": 10, "jsd_lambda": 12.0, "joint": False,
                "subset": None, "eval_every": 5, "device": "auto", "amp": "auto", "compile": False, "recompute": False,
                "tag": "", "out": "runs/cifar10/resnet18/magnma/seed0", "resume": False}  # fmt: skip
    args = vars(train.parse_args([]))
    assert {key: args[key] for key in expected} == pytest.approx(expected)
    args = train.parse_args(["--epsilon", "0.1", "--pgd-steps", "5", "--dataset", "x/mine.npz", "--method", "at"])
    assert (args.pgd_step_size, args.out) == (0.05, "runs/mine/resnet18/at/seed0")


@pytest.mark.parametrize(
    ("flags", "tag"),
    [("", ""), ("--lambda2 0", "noise"), ("--lambda1 0 --lambda2 5", "mix"), ("--n 1", "n_1"), ("--joint", "joint"),
     ("--lambda1 0.1 --lambda2 0", "l1_0.1-l2_0-s_0.2-b_1"), ("--lambda2 0 --n 3 --joint", "noise-n_3-joint"),
     ("--sigma-max 0.25 --beta 0.5", "l1_0.2-l2_0.3-s_0.25-b_0.5"), ("--tag mine", "mine"), ("--method gn", "")],
)  # fmt: skip
def test_tags(flags, tag):
    args = train.parse_args(flags.split())
    assert args.tag == tag
    assert args.out == f"runs/cifar10/resnet18/{args.method}{'-' * bool(tag)}{tag}/seed0"


def test_the_learning_rate_falls_every_third_of_the_epochs():
    rates = [train.learning_rate(0.1, t, 150) for t in range(150)]
    assert rates == pytest.approx([0.1] * 50 + [0.01] * 50 + [0.001] * 50)
    assert [train.learning_rate(1, t, 20) for t in range(20)] == pytest.approx([1] * 7 + [0.1] * 7 + [0.01] * 6)


# Algorithm 1


def plain_algorithm_1(npz, epochs, world=1, batch=16, lr=0.05, wd=0.05):
    """The run of FLAGS, method gn, by `world` processes, in one: SGD by its formula. Returns weights and log rows."""
    dataset, log = load_dataset(npz, ""), []
    utils.seed(0)
    f = Tiny()
    momentum = {name: torch.zeros_like(p) for name, p in f.named_parameters()}
    for t in range(epochs):
        eta = lr / 10 ** (t // -(-epochs // 3))
        utils.seed(0, t)
        images = augment.preprocess(dataset.train_images, True)
        order, total, hits, draws = torch.randperm(70), 0.0, 0, []
        for rank in range(world):
            utils.seed(0, t, rank)
            draws.append(torch.get_rng_state())
        for start in range(0, 64, batch):  # 70 images: the last six are dropped
            mean = {name: torch.zeros_like(p) for name, p in f.named_parameters()}
            for rank in range(world):
                torch.set_rng_state(draws[rank])
                share = order[start : start + batch][rank::world]
                g = (f if rank == 0 else copy.deepcopy(f)).train()  # the others' batch norm is not saved
                logits = g(augment.gaussian_noise(images[share] / 255, 0.2))
                loss = -logits.log_softmax(1)[range(len(share)), dataset.train_labels[share]].mean()
                for name, gradient in zip(mean, torch.autograd.grad(loss, list(g.parameters())), strict=True):
                    mean[name] += gradient / world
                draws[rank] = torch.get_rng_state()
                total += loss.item() * len(share)
                hits += (logits.argmax(1) == dataset.train_labels[share]).sum().item()
            with torch.no_grad():
                for name, p in f.named_parameters():
                    step = mean[name] + wd * p
                    momentum[name] = 0.9 * momentum[name] + step
                    p -= eta * (step + 0.9 * momentum[name])
        _, prediction = predict(f, dataset.test_images)
        accuracy = (prediction == dataset.test_labels).float().mean().item()
        log.append((t + 1, eta, total / 64, 100 * hits / 64, 100 * accuracy))
    return f.state_dict(), log


def assert_close_to_plain(folder, plain):
    weights, log = plain
    ours = torch.load(folder / "last.pt", weights_only=True)["model"]
    assert ours.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-5), name
    numbers = np.array([[float(row[key]) for key in train.LOG[:5]] for row in rows(folder)])
    assert numbers == pytest.approx(np.array(log), rel=1e-5)


def test_the_loop_is_a_plain_one(run, npz):
    folder = run("--epochs", 4, "--eval-every", 1)  # the rate falls after two epochs
    assert_close_to_plain(folder, plain_algorithm_1(npz, 4))


def test_hflip_subset_and_recompute_reach_the_loop(run, npz, monkeypatch):
    seen, preprocess, recompute = [], train.preprocess, train.recompute
    monkeypatch.setattr(train, "preprocess", lambda X, hflip: seen.append((len(X), hflip)) or preprocess(X, hflip))
    monkeypatch.setattr(train, "recompute", lambda f: seen.append("recompute") or recompute(f))
    dataset = dataclasses.replace(load_dataset(npz, ""), hflip=False)
    monkeypatch.setattr(train, "load_dataset", lambda *_: dataset)
    run("--epochs", 1, "--subset", 32, "--recompute")
    assert seen == ["recompute", (32, False)]


def test_what_a_run_writes(run, monkeypatch):
    accuracies = iter((0.3, 0.5, 0.5, 0.4))
    monkeypatch.setattr(train, "accuracy", lambda *_: next(accuracies))
    folder = run("--epochs", 12)
    assert {p.name for p in folder.iterdir()} == FILES
    assert (folder / "log.csv").read_text().splitlines()[0] == (
        "epoch,lr,train_loss,train_accuracy,test_accuracy,seconds,images_per_second,peak_memory_mib"
    )
    tested = {row["epoch"]: row["test_accuracy"] for row in rows(folder) if row["test_accuracy"]}
    assert (len(rows(folder)), tested) == (12, {"1": "30", "5": "50", "10": "50", "12": "40"})
    assert all(float(row["images_per_second"]) > 0 and float(row["peak_memory_mib"]) > 0 for row in rows(folder))
    best, last = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("best", "last"))
    assert (best["epoch"], last["epoch"]) == (5, 12)  # the first of the best
    assert best["model"].keys() == last["model"].keys() == Tiny().state_dict().keys()  # a bare state dict
    assert best["config"] == last["config"] == json.loads((folder / "config.json").read_text())
    flags = [*FLAGS.split(), "--epochs", "12", "--dataset", last["config"]["dataset"], "--out", str(folder)]
    further = {"amp": "off", "processes": 1, "data_source": "mine.npz", "train_images": 70}
    assert last["config"] == vars(train.parse_args(flags)) | further
    assert {"device", "versions", "commit"} < best.keys()


def test_best_is_selected_without_rses_ensemble(run, npz):
    folder = run("--method", "rse", "--rse-sigma", 5, "--epochs", 1)
    dataset, f = load_dataset(npz, ""), Tiny().eval()
    f.load_state_dict(torch.load(folder / "best.pt", weights_only=True)["model"])
    with torch.no_grad():
        hits = f(dataset.test_images / 255).argmax(1) == dataset.test_labels
    assert float(rows(folder)[0]["test_accuracy"]) == pytest.approx(100 * hits.float().mean().item())


# Killed, stopped, out of disk


def child(argv, rank, world, port):
    """`python train.py argv` in a process of its own, as torchrun would start it, which has imported torch already."""
    torch.set_num_threads(1)
    sys.argv = ["train.py"]
    train.build_model = lambda *_: Tiny()
    if world > 1:
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in variables.items()}}
    sys.exit(utils.run_main(lambda: train.main(argv)))


@pytest.fixture(scope="module")
def start(npz):
    """start(out, *flags, world=1): the processes of a run. They are forked from a server that torch is loaded in."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "pytest"])

    def start(out, *flags, world=1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        argv = [*FLAGS.split(), "--dataset", npz, "--out", str(out), *map(str, flags)]
        processes = [context.Process(target=child, args=(argv, rank, world, port)) for rank in range(world)]
        for process in processes:
            process.start()
        return processes

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield start


def wait(processes):
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def kill_after_an_epoch(processes, folder, rng):
    """SIGKILL at a random moment behind the next epoch's end; False where the run came to its own end before."""
    before = len(rows(folder))
    while processes[0].is_alive() and len(rows(folder)) == before:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 1.5) * float(rows(folder)[-1]["seconds"]))
    for process in processes:
        process.kill()
    return wait(processes) == [-signal.SIGKILL] * len(processes)


@pytest.mark.parametrize(("world", "kills", "flags"), [(1, 3, "--method magnma --n 1 --epochs 12"),
                                                       (2, 1, "--method at --pgd-steps 2 --epochs 8")])  # fmt: skip
def test_a_run_killed_at_random_moments_and_resumed_is_the_undisturbed_one(start, tmp_path, world, kills, flags):
    flags, rng, done = (*flags.split(), "--eval-every", "2", "--resume"), random.Random(0), 0
    whole, folder = start(tmp_path / "whole", *flags, world=world), tmp_path / "run"
    for _ in range(5 * kills):
        if kill_after_an_epoch(start(folder, *flags, world=world), folder, rng):
            done += 1
        else:  # on a machine so busy that the run came to its end
            shutil.rmtree(folder)
        if done == kills:
            break
    assert done == kills
    assert wait(start(folder, *flags, world=world)) == [0] * world
    assert wait(whole) == [0] * world
    assert_same_run(folder, tmp_path / "whole")


def test_two_processes_are_the_plain_loop_over_their_shares(start, npz, tmp_path):
    """The gradient is the mean of theirs, the log the whole batch's loss, the noise each one's own."""
    uneven = start(tmp_path / "uneven", "--epochs", 1, "--batch-size", 15, world=2)
    assert wait(start(tmp_path / "two", "--epochs", 4, "--eval-every", 1, world=2)) == [0, 0]
    again = start(tmp_path / "two", "--epochs", 4, world=2)  # without --resume
    assert_close_to_plain(tmp_path / "two", plain_algorithm_1(npz, 4, world=2))
    assert wait(uneven) == wait(again) == [2, 2]


@pytest.mark.parametrize(("file", "amp"), [("best.pt", "off"), ("last.pt", "fp16"), ("log.csv", "off")])
def test_a_disk_that_fills_between_the_files_of_an_epoch_changes_nothing(run, monkeypatch, file, amp):
    flags = ("--epochs", 3, "--eval-every", 1, "--amp", amp)
    monkeypatch.setattr(train, "accuracy", lambda f, *_: float(f.bn.num_batches_tracked == 8))  # epoch 2 is the best
    whole, atomic_write = run(*flags, out="whole"), utils.atomic_write

    def full(path):
        if path.name == file and len(rows(path.parent)) == 1:  # in epoch 2
            raise OSError(f"cannot write {path}: No space left on device")
        return atomic_write(path)

    with monkeypatch.context() as patch:
        patch.setattr(utils, "atomic_write", full)
        with pytest.raises(OSError, match=f"cannot write .*{file}"):
            run(*flags)
    assert_same_run(run(*flags, "--resume"), whole)


def test_what_resume_does_and_refuses(run, monkeypatch):
    folder = run("--epochs", 1, "--resume")  # nothing there: from the start
    before = (folder / "last.pt").read_bytes()
    for flags, message in (
        ("--lr 0.1 --seed 3", r"--seed 0 \(now 3\), --lr 0\.05 \(now 0\.1\)"), ("--epochs 2", "--epochs 1"),
        ("--joint", "--joint False"), ("--subset 32", "--subset None"), ("--amp bf16", r"--amp off \(now bf16\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"the run in .* with {message}.*go on as it began, or name another --out"):
            run("--epochs", 1, "--resume", *flags.split())
    monkeypatch.setattr(losses.METHODS["at"], "hparams", losses.METHODS["at"].hparams | {"my_flag"})
    parse_args = train.parse_args  # with a flag of a method that was added since
    monkeypatch.setattr(train, "parse_args", lambda argv: argparse.Namespace(**vars(parse_args(argv)), my_flag=3))
    (folder / "log.csv").unlink()
    (folder / ".last.pt.123.tmp").touch()  # of a process that was killed while saving
    may_differ = "--amp off --data elsewhere --recompute --compile --tag x --device auto"
    run("--epochs", 1, "--resume", *may_differ.split())  # finished: nothing to do but to write the log
    assert len(rows(folder)) == 1
    assert {p.name for p in folder.iterdir()} == FILES
    assert (folder / "last.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_epochs_before(run, monkeypatch):
    method = losses.METHODS["gn"]

    def diverging(f, *rest):
        loss, logits = method(f, *rest)
        return loss * (float("nan") if f.bn.num_batches_tracked == 6 else 1), logits

    monkeypatch.setitem(losses.METHODS, "gn", diverging)
    with pytest.raises(ValueError, match=r"the training loss of epoch 2 is nan; .*run keeps .* smaller --lr"):
        run("--epochs", 3)
    monkeypatch.setitem(losses.METHODS, "gn", method)
    assert_same_run(run("--epochs", 3, "--resume"), run("--epochs", 3, out="whole"))
