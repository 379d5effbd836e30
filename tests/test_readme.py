"""README.md: its Python runs as it stands, its commands parse, its names exist, and it is short."""

import importlib
import re
import sys
import textwrap

import numpy as np
import torch
from conftest import ROOT
from PIL import Image

import data
import evaluate
import losses
import models
import tables
import train
import utils

README = (ROOT / "README.md").read_text()
# code blocks: fenced, or lines indented by four spaces
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SNIPPETS += [
    textwrap.dedent(code) for code in re.findall(r"\n\n((?:    .*\n|\n(?=    ))+)", README)
]


def snippet(words: str) -> str:
    """The Python of the README that contains `words`."""
    (found,) = [code for code in SNIPPETS if words in code]
    return found


def test_training_loop(monkeypatch):
    """As it stands, with torchvision's ResNet-18 on 64x64 images."""
    monkeypatch.setitem(sys.modules, "torchvision", utils.torchvision)
    torch.manual_seed(0)
    batches = [(torch.rand(2, 3, 64, 64), torch.tensor([3, 7]))] * 2
    names = {"loader": batches}
    exec(snippet("in loader"), names)
    assert names["loss"].isfinite()
    assert names["logits"].shape == (2, 10)
    assert all(p.grad.isfinite().all() for p in names["f"].parameters())


def test_evaluation_of_any_network(place):
    (code,) = re.findall(r"`(evaluate\.evaluate\(f, .*?)`", README)
    f = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten(), torch.nn.Linear(12, 9))
    names = {"f": f, "data": data, "evaluate": evaluate}
    assert 0 <= eval(code.replace('"cifar10"', '"data/tiny.npz"'), names) <= 100


def test_a_method_of_ones_own(monkeypatch):
    """Mixup's loss is a mean over images that the network gets; --method takes its name."""
    names = vars(losses).copy()
    exec(snippet("def mixup_loss"), names)
    f = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    loss, logits = names["mixup_loss"](f, torch.rand(6, 3, 2, 2), torch.arange(6) % 4)
    assert logits.shape == (6, 4)
    loss.backward()
    assert '"mixup": Method(mixup_loss)' in README
    monkeypatch.setitem(losses.METHODS, "mixup", losses.Method(names["mixup_loss"]))
    args = train.parse_args(["--method", "mixup"])
    assert args.out == "runs/cifar10/resnet18/mixup/seed0"


def test_a_folder_of_pictures_becomes_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part, count in (("train", 3), ("test", 1)):
        for k, name in enumerate(("cat", "dog")):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("L", (40, 50), 100 * k + i).save(folder / f"{i}.png")
    exec(snippet('Path("pictures"'), {})
    dataset = data.load_dataset("mine.npz", "")
    assert dataset.classes == ["cat", "dog"]
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.train_images.shape == (6, 3, 32, 32)
    assert dataset.train_images[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]
    assert np.array_equal(dataset.test_labels, [0, 1])


def test_commands_parse():
    commands = re.findall(
        r"^    (?:python|torchrun \S+ \d+) (train|evaluate|tables)\.py(.*?)(?:  +#.*)?$",
        README,
        re.MULTILINE,
    )
    assert len(commands) >= 3
    scripts = {"train": train, "evaluate": evaluate, "tables": tables}
    for script, arguments in commands:
        scripts[script].parse_args(arguments.split())


def test_the_weights_in_results_are_of_todays_networks():
    weights = [*ROOT.glob("results/**/best.pt")]
    assert weights
    for path in weights:
        saved = utils.load_checkpoint(path)
        recipe = saved["recipe"]
        assert recipe == utils.read_json(path.with_name("config.json"))["recipe"]
        models.build_model(recipe["arch"], recipe["classes"]).load_state_dict(saved["model"])


def test_names_and_files_exist():
    modules = "augment|corruptions|data|evaluate|losses|models|tables|train"
    names = re.findall(rf"`({modules})\.([A-Za-z_]+)`", README)
    assert len(names) > 20
    for module, name in names:
        assert name == "py" or hasattr(importlib.import_module(module), name), (module, name)
    files = re.findall(r"[`(]((?:tests|paper|results)/[\w./-]+\.\w+)[`)]", README)
    assert files
    assert not [file for file in files if not (ROOT / file).is_file()]


def rows(head: str) -> list[list[str]]:
    """The cells of the table whose head starts with `head`."""
    lines = README.split(f"\n| {head}")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_tables_are_the_results():
    """Our numbers are those of results/demo and results/fitted, in brackets the paper's."""
    cells, digits = {}, data.data_sha256(data.load_dataset("digits", ""))
    for folder in ("demo", "fitted"):
        runs, problems = tables.read_results(ROOT / "results" / folder)
        assert not problems
        for group in tables.group_runs(runs):
            column = tables.column_of(group)
            cells[folder, tables.label(column)] = column, tables.cells_of(group, "best")
            if folder == "demo":  # of the digits that are loaded today
                assert group.shared["data_sha256"] == digits
    for method, *numbers in rows("method | Clean | mCA | Clean"):
        _, ours = cells["demo", tables.label(method if method != "magnma" else tables.MAGNMA)]
        assert numbers == [str(ours[metric]) for metric in tables.SUMMARY]
    # Table 5 has what the others lack; where they differ (mCA of noise), they come last and count
    shown, paper = rows("method | Clean | mCA | Corrupt"), tables.published("5123")
    fitted = {column for (folder, _), (column, _) in cells.items() if folder == "fitted"}
    columns = {*next(iter(tables.PAPER["tables"]["3"].values()))}
    columns |= {tables.MIX + tables.NINE, tables.MAGNMA + tables.NINE}
    assert len(shown) == len(fitted & columns)  # Table 5's settings are in results/fitted alone
    for name, *numbers in shown:
        column, ours = cells["fitted", name]
        for metric, number in zip(("clean", "mca", "corrupt_rmse"), numbers, strict=True):
            cell = paper.get(("cifar10", "resnet18", column, metric))
            assert number == str(ours[metric]) + (f" ({cell.mean:.2f})" if cell else "")


def test_it_is_short_and_finished():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]
    assert not [line for line in lines if line.startswith("|") and line.count("|") > 6]
    for page in [ROOT / "README.md", ROOT / "NOTES.md", *ROOT.glob("results/**/*.md")]:
        assert not re.search(r"TODO|BULLETS|_TABLE\b|NOT_YET|REMAINING", page.read_text()), page
