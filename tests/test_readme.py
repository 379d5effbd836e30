"""README.md and NOTES.md: the worked example runs as it stands, and every name and flag that they give exists."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import losses
import tables
import train
from data import CORRUPTIONS
from evaluate import group_runs, read_results
from evaluate import parse_args as evaluate_args

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


METHODS = {"standard", "at", "trades", "rse", "gn", "augmix", "magnma"}


@pytest.mark.skipif(losses.METHODS.keys() != METHODS, reason="there is another method where the example goes")
def test_worked_example_trains_evaluates_and_is_listed(tmp_path):
    (patch,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("models/*.py"), *ROOT.glob("paper/*.json")]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())
    subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=tmp_path, check=True)

    rng, n = np.random.default_rng(0), 20
    images, labels = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 2
    np.savez(tmp_path / "mine.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    (tmp_path / "data/mine-C").mkdir(parents=True)
    for name in CORRUPTIONS:
        np.save(tmp_path / f"data/mine-C/{name}.npy", np.tile(images, (5, 1, 1, 1)))
    np.save(tmp_path / "data/mine-C/labels.npy", np.tile(labels, 5))

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    small = ["--dataset", "mine.npz", "--arch", "resnet20", "--epochs", "1", "--batch-size", "10", "--device", "cpu"]
    run("train.py", "--method", "mixup", *small)
    run("evaluate.py", "runs/mine/resnet20/mixup/seed0", "--device", "cpu")
    assert "mixup" in run("tables.py", "runs")


def test_names_exist():
    names = set(re.findall(r"`(augment|corruptions|data|evaluate|losses|models|tables|train)\.([A-Za-z_]+)`", README))
    assert len(names) > 20
    missing = [f"{m}.{name}" for m, name in names if name != "py" and not hasattr(importlib.import_module(m), name)]
    assert not missing
    files = re.findall(r"[`(]((?:tests|paper|results)/[\w./-]+\.\w+)[`)]", README)
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_commands_parse():
    commands = re.findall(r"^    (?:python|torchrun .* --) (train|evaluate|tables)\.py(.*?)(?:  +#.*)?$", README, re.M)
    assert len(commands) > 8
    parse = {"train": train.parse_args, "evaluate": evaluate_args, "tables": tables.parse_args}
    for script, arguments in commands:
        parse[script](arguments.split())


def test_the_table_holds_our_runs_numbers_and_the_papers():
    groups = group_runs(read_results(ROOT / "results/cifar10_copies")[0])
    ours = {place[2]: tables.cells_of(same[0], "best") for place, same in tables.choose(groups, "best").items()}
    theirs = tables.published("123")
    (table,) = re.findall(r"^\| ours \(the paper's\) .*\n\|[-:|]+\n((?:\|.*\n)+)", README, re.M)
    columns = [*tables.BASELINES, tables.NOISE, tables.MIX, tables.MAGNMA]
    wanted = []
    for metric in ("clean", "mca", *CORRUPTIONS):
        wanted.append(tables.label(metric))
        for column in columns:
            own, paper = ours.get(column, {}).get(metric), theirs.get(("cifar10", "resnet18", column, metric))
            wanted.append((f"{own.mean:.2f}" if own else "—") + (f" ({paper.mean:.2f})" if paper else ""))
    assert re.findall(r"[^|\s][^|]*[^|\s]|—", table) == wanted


def test_readme_is_short_and_finished():
    assert len(README.splitlines()) <= 150
    assert not re.findall(r"_SECTION|_HUNK|TODO", README)
