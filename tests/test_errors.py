"""Bad input to train.py and evaluate.py: one line on stderr that says what is wrong, and exit code 2."""

import argparse
import importlib
import shutil
import sys

import numpy as np
import pytest
import torch

import train
import utils
from data import CORRUPTIONS

TRAIN = "train.py --dataset {d}/mine.npz --arch resnet20 --method standard --batch-size 8 --epochs 1 --device cpu"
EVALUATE = "evaluate.py {d}/run --data {d} --device cpu"
FOREIGN = "evaluate.py --data {d} --device cpu --dataset {d}/mine.npz --checkpoint"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of good and bad files: data sets, corrupted sets, runs, checkpoints. Their names say what is wrong."""
    d, images = tmp_path_factory.mktemp("errors"), np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    good = {"train_images": images, "train_labels": np.arange(16) % 4, "test_images": images[:4],
            "test_labels": np.arange(4)}  # fmt: skip
    for name, changes in {"mine": {}, "cifar10": {}, "shape": {"train_images": images.transpose(0, 3, 1, 2)},
                          "dtype": {"test_images": images[:4] / 255}, "empty": {"test_images": images[:0]},
                          "negative": {"train_labels": np.arange(16) - 1}, "short": {"train_labels": np.arange(15)},
                          "fractions": {"test_labels": np.arange(4) / 2}, "names": {"classes": np.array(["a", "b"])},
                          "name": {"classes": np.array("abcd")}, "flip": {"hflip": np.array("no")},
                          "objects": {"source": np.array([None])}}.items():  # fmt: skip
        np.savez(d / f"{name}.npz", **good | changes)
    np.savez(d / "lacks.npz", train_images=images)
    (d / "cut.npz").write_bytes((d / "mine.npz").read_bytes()[:5000])
    zeros = np.zeros((20, 32, 32, 3), np.uint8)
    for root, snow in {"": zeros, "others": zeros, "stale": zeros, "cut": zeros, "form": zeros[..., 0],
                       "floats": zeros / 255, "odd": zeros[:19], "few": zeros[:15]}.items():  # fmt: skip
        folder = d / root / "mine-C"
        folder.mkdir(parents=True)
        for name in CORRUPTIONS:
            np.save(folder / f"{name}.npy", snow if name == "snow" else zeros)
        np.save(folder / "labels.npy", np.tile(good["test_labels"] + (root == "others"), 5))
    (d / "stale/mine-C/generated.json").write_text('{"clean_sha256": "0"}')
    (d / "cut/mine-C/snow.npy").write_bytes((d / "mine-C/snow.npy").read_bytes()[:5000])
    train.main([*TRAIN.format(d=d).split()[1:], "--out", str(d / "run")])
    for name in ("unfinished", "never", "cut-run", "no-run"):
        shutil.copytree(d / "run", d / name)
    last = utils.load_checkpoint(d / "run/last.pt")
    utils.save_checkpoint(d / "unfinished/last.pt", last | {"config": last["config"] | {"epochs": 2}})
    (d / "never/best.pt").unlink()
    (d / "cut-run/last.pt").write_bytes((d / "run/last.pt").read_bytes()[:5000])
    utils.save_checkpoint(d / "no-run/best.pt", last["model"])
    torch.save({"model": last["model"], "args": argparse.Namespace(lr=0.1)}, d / "objects.pt")
    torch.save([last["model"]], d / "list.pt")
    (d / "text.pt").write_text("no checkpoint")
    return d


OUT_OF_RANGE = {"--seed": -1, "--epochs": 0, "--batch-size": 0, "--lr": 0, "--weight-decay": -1, "--lambda1": -1,
                "--lambda2": "inf", "--sigma-max": -1, "--beta": 0, "--n": 0, "--epsilon": "nan", "--pgd-steps": -1,
                "--pgd-step-size": -1, "--trades-lambda": -1, "--rse-sigma": -1, "--rse-samples": 0, "--jsd-lambda": -1,
                "--subset": 0, "--eval-every": 0}  # fmt: skip
NEW = f"{TRAIN} --out {{d}}/new"
CASES = [
    *((f"train.py {flag} {value}", f"argument {flag}: {value} is out of") for flag, value in OUT_OF_RANGE.items()),
    ("train.py --epochs 1.5", "argument --epochs: invalid int value: '1.5'"),
    ("train.py --method magma", "argument --method: invalid choice: 'magma' (choose from"),
    ("train.py --arch resnet1", "argument --arch: invalid choice: 'resnet1' (choose from"),
    ("train.py --learning-rate 1", "unrecognized arguments: --learning-rate 1; --help shows the flags"),
    ("train.py --dataset mnist", "unknown data set 'mnist'; use one of cifar10, cifar100, digits, or the path of an"),
    ("train.py --device tpu", "--device tpu: no such device; use auto, cpu, cuda"),
    ("train.py --device cuda", "--device cuda: torch sees 0 CUDA devices here; try --device cpu"),
    ("train.py --data {d}/none", "no whole cifar10 in {d}/none/cifar-10-batches-py, and https://www.cs.toronto.edu/~kriz/"
     "cifar-10-python.tar.gz cannot be had (Name or service not known); unpack that archive into {d}/none,"),
    (f"{NEW} --batch-size 17", "--batch-size 17 is more than the 16 training images"),
    (f"{NEW} --subset 4", "--batch-size 8 is more than the 4 training images"),
    (f"{NEW} --subset 17", "--subset 17: mine has 16 training images"),
    (f"{NEW} --dataset {{d}}/cifar10.npz", "cifar10 is a data set's name here; rename the file"),
    (f"{NEW} --dataset {{d}}/none.npz", "none.npz: there is no such file"),
    (f"{NEW} --dataset {{d}}/cut.npz", "cut.npz is damaged, or lacks one of the plain arrays train_images,"),
    (f"{NEW} --dataset {{d}}/objects.npz", "objects.npz is damaged, or lacks one of the plain arrays train_images,"),
    (f"{NEW} --dataset {{d}}/lacks.npz", "train_images, train_labels, test_images and test_labels ('train_labels')"),
    (f"{NEW} --dataset {{d}}/shape.npz", "train_images is uint8 (16, 3, 32, 32), not uint8 (N, 32, 32, 3)"),
    (f"{NEW} --dataset {{d}}/dtype.npz", "test_images is float64 (4, 32, 32, 3), not uint8 (N, 32, 32, 3)"),
    (f"{NEW} --dataset {{d}}/empty.npz", "test_images is uint8 (0, 32, 32, 3), not uint8 (N, 32, 32, 3)"),
    (f"{NEW} --dataset {{d}}/negative.npz", "train_labels is int64 (16,), not 16 integers >= 0"),
    (f"{NEW} --dataset {{d}}/short.npz", "train_labels is int64 (15,), not 16 integers"),
    (f"{NEW} --dataset {{d}}/fractions.npz", "test_labels is float64 (4,), not 4 integers"),
    (f"{NEW} --dataset {{d}}/name.npz", "name.npz: classes must be a list of names, and hflip True or False"),
    (f"{NEW} --dataset {{d}}/flip.npz", "flip.npz: classes must be a list of names, and hflip True or False"),
    (f"{NEW} --dataset {{d}}/names.npz", "names.npz names 2 classes, but its labels go up to 3"),
    (f"{TRAIN} --out {{d}}/run", "{d}/run holds a run already; --resume goes on with it"),
    (f"{TRAIN} --out {{d}}/run --resume --lr 0.5", "was begun with --lr 0.1 (now 0.5)"),
    (f"{TRAIN} --out {{d}}/cut-run --resume", "cut-run/last.pt is damaged, or no checkpoint of torch's"),
    (f"{TRAIN} --out {{d}}/mine.npz/run", "cannot write {d}/mine.npz/run/config.json: Not a directory"),
    ("evaluate.py", "name a run's folder or --checkpoint FILE, one of the two"),
    ("evaluate.py {d}/nowhere", "{d}/nowhere is no run's folder: it is not there; name one that train.py wrote"),
    ("evaluate.py {d}/mine-C", "it has no config.json"),
    ("evaluate.py {d}/run/best.pt", "{d}/run/best.pt is no run's folder: it is a file"),
    ("evaluate.py {d}/never", "no checkpoint {d}/never/best.pt; train first"),
    ("evaluate.py {d}/unfinished", "{d}/unfinished is unfinished (1 of 2 epochs); train with --resume"),
    ("evaluate.py {d}/cut-run", "cut-run/last.pt is damaged"),
    ("evaluate.py {d}/no-run", "{d}/no-run holds no checkpoints of train.py ('config' is missing); train again"),
    ("evaluate.py {d}/run --arch resnet20", "--arch, --dataset, --mean and --std are for --checkpoint"),
    ("evaluate.py {d}/run --dataset mine", "--arch, --dataset, --mean and --std are for --checkpoint"),
    ("evaluate.py {d}/run --mean 0 0 0 --std 1 1 1", "--arch, --dataset, --mean and --std are for --checkpoint"),
    (f"{FOREIGN} {{d}}/run/best.pt --arch resnet20 --only best", "--only is for a run's folder; --checkpoint is one"),
    (f"{EVALUATE} --limit 5", "--limit 5: mine has 4 test images"),
    (f"{EVALUATE} --data {{d}}/none", "no {d}/none/mine-C/labels.npy; make it with `python corruptions.py"),
    (f"{EVALUATE} --data {{d}}/others", "{d}/others/mine-C was made of other labels than those of mine's test set"),
    (f"{EVALUATE} --data {{d}}/stale", "{d}/stale/mine-C was made of other images than those of mine's test set"),
    (f"{EVALUATE} --data {{d}}/cut", "cut/mine-C/snow.npy is damaged"),
    (f"{EVALUATE} --data {{d}}/few", "snow.npy holds 3 images a severity, not 4"),
    (f"{EVALUATE} --data {{d}}/form", "snow.npy is uint8 (20, 32, 32), not uint8 (5N, 32, 32, 3); make it anew"),
    (f"{EVALUATE} --data {{d}}/floats", "snow.npy is float64 (20, 32, 32, 3), not uint8 (5N, 32, 32, 3)"),
    (f"{EVALUATE} --data {{d}}/odd", "snow.npy is uint8 (19, 32, 32, 3), not uint8 (5N, 32, 32, 3)"),
    (f"{FOREIGN} {{d}}/run/best.pt", "--checkpoint needs --arch, the network that the weights are of"),
    (f"{FOREIGN} {{d}}/none.pt --arch resnet20", "no checkpoint {d}/none.pt"),
    (f"{FOREIGN} {{d}}/run/best.pt --arch resnet18", "best.pt: the checkpoint does not fit this network: conv1.weight"),
    (f"{FOREIGN} {{d}}/objects.pt --arch resnet20", "save the state dict alone: torch.save(model.state_dict(), file)"),
    (f"{FOREIGN} {{d}}/list.pt --arch resnet20", "list.pt holds a list, not a dict of tensors"),
    (f"{FOREIGN} {{d}}/text.pt --arch resnet20", "text.pt is damaged, or no checkpoint of torch's"),
    (f"{FOREIGN} {{d}}/run/best.pt --arch resnet20 --mean 0 0 0", "--mean and --std go together"),
]


@pytest.mark.parametrize(("command", "fragment"), CASES)
def test_bad_input_is_one_line_and_exit_code_2(place, tmp_path, monkeypatch, capsys, command, fragment):
    def offline(*_, **__):
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr(utils.import_torchvision().datasets.utils, "download_url", offline)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", [word.format(d=place) for word in command.split()])
    monkeypatch.chdir(tmp_path)
    script = sys.argv[0]
    code = utils.run_main(importlib.import_module(script.removesuffix(".py")).main)
    line = capsys.readouterr().err
    assert code == 2
    assert line.startswith(f"{script}: ")
    assert line.count("\n") == 1
    assert fragment.format(d=place) in line
    assert not list(tmp_path.iterdir())
    assert not (place / "new").exists()
