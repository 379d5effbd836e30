"""The loop against a plain one, what a run writes, exact resume, two processes, refusals."""

import contextlib
import copy
import csv
import dataclasses
import fcntl
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from torch import nn

import augment
import losses
import train
import utils
from data import load_dataset

FLAGS = [
    "--dataset", "data/tiny.npz", "--arch", "resnet20", "--method", "gn", "--batch-size", "16",
    "--lr", "0.05", "--weight-decay", "0.05", "--sigma-max", "0.3", "--device", "cpu",
]  # fmt: skip
FILES = {"best.pt", "config.json", "last.pt", "lock", "log.csv"}


class Tiny(nn.Module):
    """In place of ResNet-20, to be fast, with what has state: batch norm, and dropout's draws."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 49, 10)

    def forward(self, x):
        hidden = torch.relu(self.bn(self.conv(x))).flatten(1)
        return self.fc(nn.functional.dropout(hidden, 0.3, self.training))


@pytest.fixture(autouse=True)
def _tiny_network(monkeypatch):
    monkeypatch.setattr(train, "build_model", lambda *_: Tiny())
    monkeypatch.setattr(sys, "argv", ["train.py"])


@pytest.fixture
def run(place):
    """Train in this process, with FLAGS; returns the run's folder."""

    def run(*flags, out="run"):
        train.main([*FLAGS, "--out", out, *map(str, flags)])
        return Path(out)

    return run


@pytest.fixture
def refusal(run):
    """The message with which a run ends."""
    return functools.partial(refused, run)


@contextlib.contextmanager
def at_step(step, change, method="gn"):
    """The loss of the `step`-th step from now is change(loss), which may raise."""
    loss_of, steps = losses.METHODS[method].loss, itertools.count(1)

    @functools.wraps(loss_of)
    def changed(*args, **hparams):
        loss, logits = loss_of(*args, **hparams)
        return change(loss) if next(steps) == step else loss, logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses.METHODS, method, losses.Method(changed))
        yield


def fail(error):
    raise error


def rows(folder):
    path = folder / "log.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def assert_same_run(a, b):
    """Weights, optimiser, scaler and log are equal bit for bit, except times; the files too."""
    for name in ("last.pt", "best.pt"):
        first, second = (utils.load_checkpoint(folder / name) for folder in (a, b))
        for key in {"epoch", "model", "optimizer", "scaler"} & first.keys():
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    logs = [[[row[key] for key in train.LOG[:5]] for row in rows(folder)] for folder in (a, b)]
    assert logs[0] == logs[1]
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()} == FILES


# Flags


def test_the_defaults_are_the_papers():
    expected = {k: v for method in losses.METHODS.values() for k, v in method.defaults.items()} | {
        "dataset": "cifar10", "data": "data", "method": "magnma", "arch": "resnet18", "seed": 0,
        "epochs": 150, "batch_size": 512, "lr": 0.1, "weight_decay": 5e-4, "rse_samples": 10,
        "pgd_step_size": 2.5 * 8 / 255 / 7, "subset": None, "eval_every": 5, "device": "auto",
        "amp": "auto", "compile": False, "recompute": False, "tag": "", "resume": False,
        "out": "runs/cifar10/resnet18/magnma/seed0",
    }  # fmt: skip
    assert vars(train.parse_args([])) == pytest.approx(expected)
    flags = "--epsilon 0.1 --pgd-steps 5 --dataset x/mine.npz --method at --tag small --seed 3"
    args = train.parse_args(flags.split())
    assert (args.pgd_step_size, args.out) == (0.05, "runs/mine/resnet18/at-small/seed3")


def test_a_method_of_ones_own_shares_a_flag_but_not_its_default(monkeypatch, recipe_of):
    def mine_loss(f, x, y, *, n=1, sigma_max=0.5, other=7):
        return losses.standard_loss(f, x, y)

    monkeypatch.setitem(losses.METHODS, "mine", losses.Method(mine_loss))
    recipe = recipe_of("--method mine --sigma-max 0.4")
    assert (recipe["n"], recipe["sigma_max"], recipe["other"]) == (1, 0.4, 7)
    recipe = recipe_of("--method magnma")
    assert (recipe["n"], recipe["sigma_max"]) == (5, 0.2)


def test_flags_of_another_method_are_named(capsys):
    train.parse_args(["--method", "trades", "--epsilon", "0.1", "--joint", "--n", "2"])
    assert capsys.readouterr().err.endswith(": trades does not use --n\n")
    train.parse_args(["--method", "standard", "--lambda1=0.5", "--joint"])
    assert capsys.readouterr().err.endswith(": standard does not use --joint, --lambda1\n")


@pytest.mark.parametrize("arch", ["resnet18", "densenet121", "densenet121_k32", "inceptionv3"])
def test_large_networks_recompute_the_methods_that_forward_several_copies(arch, monkeypatch):
    def mine_loss(f, x, y, *, joint=False):
        """A method that the user has added."""

    monkeypatch.setitem(losses.METHODS, "mine", losses.Method(mine_loss))
    for method in losses.METHODS:
        several = method in ("magnma", "augmix", "trades", "mine")
        for flag, joint, recompute in (
            ("", False, several and arch != "resnet18"), ("--recompute", False, True),
            ("--no-recompute", False, False), ("--joint", several, False),
        ):  # fmt: skip
            args = train.parse_args(["--arch", arch, "--method", method, *flag.split()])
            assert (args.joint, args.recompute) == (joint, recompute)


WRONG = (
    "--seed -1", "--epochs 0", "--batch-size 0", "--lr 0", "--weight-decay -1", "--lambda1 -1",
    "--lambda2 inf", "--sigma-max -1", "--beta 0", "--n 0", "--operations all", "--epsilon nan",
    "--pgd-steps -1", "--pgd-step-size -1", "--trades-lambda -1", "--rse-sigma -1",
    "--rse-samples 0", "--jsd-lambda -1", "--subset 0", "--eval-every 0", "--recompute --joint",
)  # fmt: skip


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_flags_are_a_usage_line_and_a_line(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(flags.split())
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: train.py [flags]; --help lists them"
    wanted = flags.split()[0] if flags.endswith("joint") else f"argument {flags.split()[0]}: "
    assert error.startswith(f"train.py: error: {wanted}")


# The recipe


@pytest.fixture
def recipe_of(place):
    """The recipe of flags on tiny.npz, by one process."""
    dataset, parse = load_dataset("data/tiny.npz", ""), train.parse_args
    return lambda flags, amp="off": train.recipe_of(parse(flags.split()), dataset, amp, 1)


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("standard", ""), ("gn", "sigma_max"), ("rse", "rse_sigma rse_samples"),
        ("at", "epsilon pgd_steps pgd_step_size"), ("augmix", "jsd_lambda"),
        ("trades", "trades_lambda epsilon pgd_steps pgd_step_size"),
        ("magnma", "lambda1 lambda2 sigma_max beta n operations"),
    ],
)  # fmt: skip
def test_a_recipe_holds_the_hyperparameters_of_its_method_alone(recipe_of, method, own):
    recipe = recipe_of(f"--method {method} --lr 0.3 --subset 50", "fp16")
    values = {"dataset": "tiny", "method": method, "lr": 0.3, "train_images": 50, "classes": 9}
    values |= {"amp": "fp16", "processes": 1}
    defaults = vars(train.parse_args(["--method", method]))
    values |= {key: defaults[key] for key in own.split()}
    assert recipe.items() >= values.items()
    shared = "arch epochs batch_size weight_decay eval_every subset joint data_sha256"
    assert recipe.keys() == values.keys() | {*shared.split()}
    assert recipe_of(f"--method {method}")["train_images"] == 70


@pytest.mark.parametrize(
    ("flags", "departures"),
    [
        ("--arch densenet121 --seed 3 --tag x --compile --no-recompute", {}),
        ("--lambda1 0 --lambda2 5 --sigma-max 0.3 --beta 0.5", {}),  # a column of the tables
        ("--operations augmix --n 1 --joint", {"operations": "augmix", "n": 1, "joint": True}),
        ("--method gn --sigma-max 0.1 --n 1", {"sigma_max": 0.1}),
        ("--method rse --rse-samples 3", {"rse_samples": 3}),
        ("--method at --pgd-steps 5", {"pgd_steps": 5, "pgd_step_size": 2.5 * 8 / 255 / 5}),
        ("--method standard --epochs 3 --batch-size 64 --lr 1 --joint --eval-every 2 --subset 9",
         {"epochs": 3, "batch_size": 64, "lr": 1, "subset": 9, "eval_every": 2}),
    ],
)  # fmt: skip
def test_departures_are_what_is_unlike_the_paper(recipe_of, flags, departures):
    assert train.departures_of(recipe_of(flags)) == departures
    assert train.departures_of(recipe_of(flags, "bf16")) == departures | {"amp": "bf16"}


# Algorithm 1


def plain_algorithm_1(path, epochs, world=1, batch=16, lr=0.05, wd=0.05):
    """The run of FLAGS by `world` processes, in one: SGD by its formula. Weights and log rows."""
    dataset, log = load_dataset(str(path), ""), []
    X, Y = dataset.train_images, dataset.train_labels
    utils.seed(0)
    f = Tiny()
    momentum = {name: torch.zeros_like(p) for name, p in f.named_parameters()}
    for t in range(epochs):
        eta = lr / 10 ** (t // -(-epochs // 3))
        utils.seed(0, t)
        images = augment.preprocess(X, False)
        order, total, hits, draws = torch.randperm(70), 0.0, 0, []
        for rank in range(world):
            utils.seed(0, t, rank)
            draws.append(torch.get_rng_state())
        for start in range(0, 64, batch):  # 70 images: the last six are dropped
            mean = {name: torch.zeros_like(p) for name, p in f.named_parameters()}
            for rank in range(world):
                torch.set_rng_state(draws[rank])
                share = order[start : start + batch][rank::world]
                g = (f if rank == 0 else copy.deepcopy(f)).train()  # the first's batch norm counts
                logits = g(augment.gaussian_noise(images[share] / 255, 0.3))
                loss = -logits.log_softmax(1)[range(len(share)), Y[share]].mean()
                gradients = torch.autograd.grad(loss, list(g.parameters()))
                for name, gradient in zip(mean, gradients, strict=True):
                    mean[name] += gradient / world
                draws[rank] = torch.get_rng_state()
                total += loss.item() * len(share)
                hits += (logits.argmax(1) == Y[share]).sum().item()
            with torch.no_grad():
                for name, p in f.named_parameters():
                    step = mean[name] + wd * p
                    momentum[name] = 0.9 * momentum[name] + step
                    p -= eta * (step + 0.9 * momentum[name])
        with torch.no_grad():
            right = f.eval()(dataset.test_images / 255).argmax(1) == dataset.test_labels
        log.append((t + 1, eta, total / 64, 100 * hits / 64, 100 * right.float().mean().item()))
    return f.state_dict(), log


def assert_close_to_plain(folder, plain):
    weights, log = plain
    trained = torch.load(folder / "last.pt", weights_only=True)["model"]
    assert trained.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.allclose(trained[name], value, rtol=1e-4, atol=1e-5), name
    numbers = np.array([[float(row[key]) for key in train.LOG[:5]] for row in rows(folder)])
    assert numbers == pytest.approx(np.array(log), rel=1e-5)


def test_the_loop_is_a_plain_one(run):
    folder = run("--epochs", 4, "--eval-every", 1)  # the rate falls after two epochs
    assert_close_to_plain(folder, plain_algorithm_1("data/tiny.npz", 4))


def test_the_learning_rate_falls_twice():
    rates = [train.learning_rate(0.1, t, 150) for t in range(150)]
    assert rates == pytest.approx([0.1] * 50 + [0.01] * 50 + [0.001] * 50)


def test_hflip_subset_compile_and_recompute_reach_the_loop(run, monkeypatch):
    seen, preprocess, recompute = [], train.preprocess, train.recompute
    dataset = dataclasses.replace(load_dataset("data/tiny.npz", ""), hflip=True)
    spies = {
        "preprocess": lambda X, hflip: seen.append((len(X), hflip)) or preprocess(X, hflip),
        "recompute": lambda f: seen.append("recompute") or recompute(f),
        "load_dataset": lambda *_: dataset,
    }
    for name, spy in spies.items():
        monkeypatch.setattr(train, name, spy)
    monkeypatch.setattr(torch, "compile", lambda forward, **_: seen.append("compile") or forward)
    run("--epochs", 1, "--subset", 32, "--recompute", "--compile")
    assert seen == ["compile", "recompute", (32, True)]


# What a run writes


def test_what_a_run_writes(run, monkeypatch):
    accuracies = iter((0.3, 0.5, 0.5, 0.4))
    monkeypatch.setattr(train, "accuracy", lambda *_: next(accuracies))
    folder = run("--epochs", 12, "--tag", "x")
    log = rows(folder)
    assert ",".join(log[0]) == (
        "epoch,lr,train_loss,train_accuracy,test_accuracy,seconds,images_per_second,peak_memory_mib"
    )
    tested = {row["epoch"]: row["test_accuracy"] for row in log if row["test_accuracy"]}
    assert (len(log), tested) == (12, {"1": "30", "5": "50", "10": "50", "12": "40"})
    assert all(float(row["images_per_second"]) > 0 for row in log)
    assert {row["peak_memory_mib"] for row in log} == {""}  # known on GPUs alone
    config = json.loads((folder / "config.json").read_text())
    assert list(config) == ["recipe", "departures", "seed", "tag", "ran"]
    for name, epoch in (("best", 5), ("last", 12)):  # 5: the first of the best
        saved = torch.load(folder / f"{name}.pt", weights_only=True)
        assert saved.items() >= (config | {"epoch": epoch}).items()
        assert saved["model"].keys() == Tiny().state_dict().keys()  # a bare state dict
    assert (config["seed"], config["tag"], config["departures"]["lr"]) == (0, "x", 0.05)
    ran = {"dataset": "data/tiny.npz", "data": "data", "out": "run", "compile": False}
    ran |= {"recompute": False, "data_source": "digits, enlarged"}
    assert config["ran"].items() >= ran.items()
    assert config["ran"].keys() - ran.keys() == {"device", "versions", "commit"}
    assert config["ran"]["versions"].keys() == {"python", "torch", "numpy", "scipy", "cuda"}


def test_checkpoints_are_written_when_tested_or_a_minute_old_best_first(run, monkeypatch):
    clock, written, preprocess = [0.0], [], train.preprocess

    def slow(X, hflip):  # an epoch takes 25 s
        clock[0] += 25
        return preprocess(X, hflip)

    monkeypatch.setattr(
        utils, "save_checkpoint", lambda path, c: written.append((path.stem, c["epoch"]))
    )
    monkeypatch.setattr(train, "accuracy", lambda run: len(run.log) / 100)
    monkeypatch.setattr(train, "preprocess", slow)
    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    folder = run("--epochs", 12, "--eval-every", 8)
    assert written == [
        ("best", 1), ("last", 1), ("last", 4), ("last", 7), ("best", 8), ("last", 8), ("last", 11),
        ("best", 12), ("last", 12),
    ]  # fmt: skip
    assert float(rows(folder)[0]["seconds"]) == 25


def test_memory_is_logged_on_gpus(monkeypatch, place):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    args, cuda = train.parse_args(["--epochs", "3"]), torch.device("cuda")
    run = train.Run(args, None, cuda, None, 1, 1, Tiny(), None, None, {}, [{}])
    train.finish_epoch(run, 0.1, torch.ones(2), 64, 0.0)
    assert run.log[-1]["peak_memory_mib"] == 3


def test_best_is_selected_without_rses_ensemble(run):
    folder = run("--method", "rse", "--rse-sigma", 5, "--epochs", 1)
    dataset, f = load_dataset("data/tiny.npz", ""), Tiny().eval()
    f.load_state_dict(utils.load_checkpoint(folder / "best.pt")["model"])
    hits = f(dataset.test_images / 255).argmax(1) == dataset.test_labels
    assert float(rows(folder)[0]["test_accuracy"]) == pytest.approx(100 * hits.float().mean())


@pytest.mark.parametrize("terminal", [False, True])
def test_without_a_terminal_there_is_a_line_for_every_epoch(run, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    run("--epochs", 4, "--eval-every", 3)
    lines, bars = capsys.readouterr()
    epochs = [line.split()[1] for line in lines.splitlines() if line.startswith("epoch ")]
    assert epochs == (["1/4", "3/4", "4/4"] if terminal else ["1/4", "2/4", "3/4", "4/4"])
    assert ("epoch 2/4" in bars) is terminal  # the progress bar
    assert lines.splitlines()[0].startswith("run: gn, resnet20, tiny (digits, enlarged), ")
    assert lines.splitlines()[-1] == "evaluate it: python evaluate.py run"


# Killed, stopped, out of disk


def child(argv, rank, world, port, killed_at):
    """`python train.py argv` as torchrun would start it, in a process that has loaded torch.

    SIGKILL ends it before its `killed_at`-th rename of a finished temporary file; 0: never.
    """
    renames, replace = itertools.count(1), os.replace

    def counted(*paths):
        if next(renames) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = counted
    torch.set_num_threads(1)
    sys.argv = ["train.py"]
    train.build_model = lambda *_: Tiny()
    if world > 1:
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {k: str(v) for k, v in about.items()}
    sys.exit(utils.run_main(lambda: train.main(argv)))


@pytest.fixture(scope="module")
def start(home):
    """start(out, *flags, world=1, killed_at=0): a run's processes, forked from a server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "pytest"])

    def start(out, *flags, world=1, killed_at=0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        argv = [*FLAGS, "--dataset", str(home / "data/tiny.npz"), "--out", str(out), *flags]
        about = [(argv, rank, world, port, killed_at) for rank in range(world)]
        processes = [context.Process(target=child, args=args) for args in about]
        for process in processes:
            process.start()
        return processes

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield start


def wait(processes):
    """Their exit codes. A process that hangs is killed after two minutes."""
    codes = [process.join(120) or process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


@pytest.mark.parametrize(
    ("world", "kills", "flags"),
    [(1, (1, 3, 5, 6), "--method magnma --n 1"), (2, (4,), "--method at --pgd-steps 2")],
)
def test_a_run_killed_while_it_saves_ends_bit_for_bit(start, tmp_path, world, kills, flags):
    """Before config.json, best.pt, last.pt or log.csv, in the first epochs of each start."""
    flags = (*flags.split(), "--epochs", "6", "--eval-every", "2", "--resume")
    undisturbed, folder = start(tmp_path / "undisturbed", *flags, world=world), tmp_path / "run"
    for killed_at in kills:
        codes = wait(start(folder, *flags, world=world, killed_at=killed_at))
        assert codes[0] == -signal.SIGKILL
        assert 0 not in codes
    assert wait(start(folder, *flags, world=world)) == [0] * world
    assert wait(undisturbed) == [0] * world
    assert_same_run(folder, tmp_path / "undisturbed")


def test_two_processes_are_the_plain_loop_over_their_shares(start, home, tmp_path):
    """The gradient is the mean of both, the log the batch's loss, the noise each one's own."""
    uneven = start(tmp_path / "uneven", "--epochs", "1", "--batch-size", "15", world=2)
    folder = tmp_path / "two"
    assert wait(start(folder, "--epochs", "4", "--eval-every", "1", world=2)) == [0, 0]
    again = start(folder, "--epochs", "4", "--eval-every", "1", world=2)  # without --resume
    assert_close_to_plain(folder, plain_algorithm_1(home / "data/tiny.npz", 4, world=2))
    assert utils.read_json(folder / "config.json")["recipe"]["processes"] == 2
    assert wait(uneven) == wait(again) == [2, 2]


@pytest.mark.parametrize("file", ["best.pt", "last.pt", "log.csv"])
def test_a_disk_that_fills_between_two_files_changes_nothing(run, refusal, monkeypatch, file):
    flags = ("--epochs", 3, "--eval-every", 1)
    monkeypatch.setattr(train, "accuracy", lambda run: float(len(run.log) == 1))  # 2 is the best
    undisturbed, atomic_write = run(*flags, out="undisturbed"), utils.atomic_write

    def full(path):
        if path.name == file and len(rows(path.parent)) == 1:  # in epoch 2
            raise utils.UserError("No space left on device")
        return atomic_write(path)

    with monkeypatch.context() as patch:
        patch.setattr(utils, "atomic_write", full)
        assert refusal(*flags) == "No space left on device"
    assert_same_run(run(*flags, "--resume"), undisturbed)


def test_ctrl_c_names_resume_and_resume_says_what_it_does(run, capsys):
    flags = ("--epochs", 6, "--eval-every", 2, "--resume")

    def interrupt(step):
        with at_step(step, lambda _: fail(KeyboardInterrupt)):
            assert utils.run_main(lambda: run(*flags)) == 130
        return capsys.readouterr()

    lines, error = interrupt(2)
    assert "run: starts\n" in lines
    assert "run: continue with --resume\n" in lines
    assert error == "train.py: interrupted\n"
    assert "run: starts\n" in interrupt(14).out  # the first left no checkpoint
    utils.write_json("run/config.json", {"recipe": "lost"})  # last.pt has it
    run(*flags)
    assert "run: continues at epoch 3 of 6\n" in capsys.readouterr().out
    saved = utils.load_checkpoint("run/last.pt")
    assert utils.read_json("run/config.json").items() <= saved.items()
    assert_same_run(Path("run"), run(*flags, out="undisturbed"))
    before = Path("run/last.pt").read_bytes()
    Path("run/log.csv").unlink()
    Path("run/.last.pt.123.tmp").touch()  # of a process that was killed while saving
    capsys.readouterr()
    run(*flags, "--data", "elsewhere", "--recompute", "--amp", "off", "--tag", "x")
    command = "python evaluate.py run --data elsewhere"
    assert f"run: is finished\nevaluate it: {command}\n" in capsys.readouterr().out
    assert Path("run/last.pt").read_bytes() == before
    assert len(rows(Path("run"))) == 6  # log.csv is written again
    assert {p.name for p in Path("run").iterdir()} == FILES


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_epochs_before(
    run, refusal, monkeypatch, dtype
):
    """In mixed precision too, whose scaler skips such a step: its state is restored."""
    flags, seen, predict = ("--epochs", 3, "--eval-every", 1), set(), train.predict

    def break_step(loss):
        seen.add(torch.is_autocast_enabled("cpu"))
        return loss * float("nan")

    def spy(*args, dtype):
        seen.add(dtype)
        return predict(*args)

    monkeypatch.setattr(utils, "amp_dtype", lambda *_: dtype)
    monkeypatch.setattr(train, "predict", spy)
    with at_step(6, break_step):
        line = refusal(*flags)
    assert "the training loss of epoch 2 is nan. Start another run (--tag) with a" in line
    assert "smaller --lr" in line
    assert seen == {dtype, dtype is not None}
    assert_same_run(run(*flags, "--resume"), run(*flags, out="undisturbed"))


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ("--amp off", "--amp auto or --recompute or a smaller"),
        ("--amp bf16", "--recompute or a smaller"),
        ("--amp bf16 --recompute", "a smaller"),
        ("--amp bf16 --joint", "a smaller"),
        ("--amp bf16 --method gn", "a smaller"),  # forwards one copy
    ],
)
def test_a_full_gpu_names_only_what_would_help(refusal, flags, advice):
    method = "gn" if "gn" in flags else "magnma"
    with at_step(1, lambda _: fail(torch.OutOfMemoryError), method):
        line = refusal("--method", "magnma", "--n", 1, *flags.split())
    assert line == f"the GPU's memory is full. {advice} --batch-size needs less"


# What is refused


def test_another_recipe_in_the_same_place_is_refused_by_name(run, refusal):
    folder = run("--epochs", 1)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert "run already holds this run. Use --resume to continue it" in refusal("--epochs", 1)
    for other, message in {
        "--lr 0.1 --seed 3": "--lr 0.05, not 0.1; --seed 0, not 3",
        "--amp bf16": "--amp off, not bf16",  # as --amp auto may be on another device
        "--epochs 2": "--epochs 1, not 2",
        "--subset 32": "--subset None, not 32; train images 70, not 32",
    }.items():
        for resume in ("", "--resume"):
            line = refusal("--epochs", 1, *f"{other} {resume}".split())
            assert f"the run in run was started with {message}. Use the same flags" in line
            assert "or --tag or --out to start another" in line
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "last.pt").unlink()  # stopped in its first epoch: config.json tells
    assert "--lr 0.05, not 0.1" in refusal("--epochs", 1, "--lr", 0.1, "--resume")


def test_a_run_that_has_lost_its_last_checkpoint_is_not_started_again(run, refusal):
    folder = run("--epochs", 1)
    (folder / "last.pt").unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert "run has lost its last.pt; --resume would start" in refusal("--epochs", 1, "--resume")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_data_file_may_move_but_not_change(run, refusal, capsys):
    run("--epochs", 1)
    flags = ("--epochs", 1, "--resume", "--dataset")
    shutil.copy("data/tiny.npz", "tiny.npz")
    shutil.copy("data/tiny.npz", "renamed.npz")
    run(*flags, "./tiny.npz")
    assert "run: is finished" in capsys.readouterr().out
    assert "--dataset tiny, not renamed" in refusal(*flags, "renamed.npz")
    with np.load("data/tiny.npz") as file:
        arrays = dict(file)
    np.savez("tiny.npz", **arrays | {"test_labels": arrays["test_labels"][::-1]})  # of one size
    line = refusal(*flags, "tiny.npz")
    assert "was started with other images or labels under this name. Use" in line


def test_files_of_another_kind(run, refusal):
    folder, flags = run("--epochs", 1), ("--epochs", 1, "--resume")
    last = utils.load_checkpoint(folder / "last.pt")
    for content, message in (
        ({"state_dict": last["model"], "epoch": 3}, "was not written by this train.py"),
        (last | {"recipe": "x"}, "was not written by this train.py. Use --tag or --out"),
        (
            last | {"model": {}},
            "is damaged, or from other code (Error(s) in loading state_dict for Tiny",
        ),
        (
            {k: v for k, v in last.items() if k != "log"},
            "is damaged, or from other code ('log'). Use --tag or --out",
        ),
    ):
        utils.save_checkpoint(folder / "last.pt", content)
        assert f"run/last.pt {message}" in refusal(*flags)
    (folder / "last.pt").unlink()
    (folder / "config.json").write_text('{"epochs": 1}')
    assert "run/config.json was not written by this train.py" in refusal(*flags)


def test_a_second_start_in_one_folder_is_refused_while_the_first_one_runs(run, refusal):
    def second(loss):
        line = refusal("--epochs", 1, "--resume")
        assert line == "run is in use by another train.py. Wait for it, or stop it"
        return loss

    with at_step(3, second):
        run("--epochs", 1)
    run("--epochs", 1, "--resume")  # now it is free


def test_training_works_where_files_have_no_locks(run, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: fail(OSError(37, "No locks available")))
    assert len(rows(run("--epochs", 1))) == 1


def test_sizes_and_precision_that_do_not_fit(refusal):
    assert "--batch-size 71: more than the 70 images" in refusal("--batch-size", 71)
    assert "--batch-size 16: more than the 9 images" in refusal("--subset", 9)
    assert "--subset 71: tiny has 70 training images" in refusal("--subset", 71)
    assert "cannot write to /proc/self: " in refusal(out="/proc/self")  # for root too
    assert "--amp fp16 is for GPUs" in refusal("--amp", "fp16")
    assert not Path("run").exists()


def test_nccl_gets_the_device(monkeypatch):
    calls, distributed = [], torch.distributed
    start = lambda backend, device_id, **_: calls.append((backend, device_id))  # noqa: E731
    monkeypatch.setattr(distributed, "init_process_group", start)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    gpu, cpu, args = torch.device("cuda", 1), torch.device("cpu"), train.parse_args([])
    monkeypatch.delenv("RANK", raising=False)
    assert train.start_processes(args, gpu) == (0, 1)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert [train.start_processes(args, device) for device in (gpu, cpu)] == [(1, 2), (1, 2)]
    assert calls == [("nccl", gpu), ("gloo", None)]
    args.device = "cuda:1"
    assert "With torchrun use --device cuda" in refused(train.start_processes, args, gpu)
