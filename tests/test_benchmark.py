"""benchmark.py: both pipelines make the same copies, operations are counted, the script runs.

Its Pillow operations are those that tests/test_augment.py compares augment.py with.
"""

import json

import numpy as np
import pytest
import torch
from conftest import refused

import benchmark
import train
from models import build_model


@pytest.mark.parametrize(("method", "count"), [("augmix", 3), ("magnma", 11)])
def test_both_pipelines_make_the_same_copies(method, count):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8).repeat(15, 1, 1, 1)
    arrays = images.permute(0, 2, 3, 1).numpy()
    ours = torch.stack(benchmark.ours(method, images), 1)
    usual = torch.stack([torch.stack(benchmark.usual(method, a, rng)) for a in arrays])
    assert ours.shape == usual.shape == (300, count, 3, 32, 32)
    for copies in (ours, usual):
        inside = (copies >= 0).logical_and(copies <= 1).flatten(2).all(2).all(0).sum()
        assert inside == (6 if method == "magnma" else count)  # only noise leaves [0, 1]

    def moved(copies: torch.Tensor) -> torch.Tensor:
        """The copies' mean distances from their image, sorted: their order does not matter."""
        return (copies[:, 1:] - copies[:, :1]).square().mean((0, 2, 3, 4)).sort().values

    torch.testing.assert_close(moved(ours), moved(usual), rtol=0.2, atol=0)


def test_operations_of_resnet18_are_those_of_its_convolutions_and_layers():
    later = 64 * 128 * 9 * 256 + 3 * 128 * 128 * 9 * 256 + 64 * 128 * 256  # stages 2, 3, 4 each
    first = 3 * 64 * 9 * 1024
    forward = first + 4 * 64 * 64 * 9 * 1024 + 3 * later + 512 * 10
    assert round(forward / 1e9, 2) == 0.56
    # a multiply-add is two operations; backward costs two forward passes, less the gradient of x
    assert benchmark.cost("resnet18", "standard") == (1, 2 * (3 * forward - first))
    assert benchmark.cost("resnet18", "at") == (8, 2 * (7 * 2 * forward + 3 * forward - first))


def test_recomputation_is_that_of_train_by_default():
    for arch, method, recomputed in benchmark.RUNS:
        assert train.parse_args(["--arch", arch, "--method", method]).recompute == recomputed


def test_the_script(tmp_path, capsys, monkeypatch):
    small, steps = build_model("resnet20", 10), []
    monkeypatch.setattr(benchmark, "PICTURES", 10)
    monkeypatch.setattr(benchmark, "build_model", lambda arch, classes: small)
    monkeypatch.setattr(benchmark, "cost", lambda arch, method: steps.append(method) or (2, 10**9))
    out = tmp_path / "new" / "b.json"
    flags = ["--device", "cpu", "--batch-size", "1", "--seconds", "0.01", "--out", str(out)]
    benchmark.main(flags)
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert {"device", "versions", "commit", "precision", "batch_size"} < report.keys()
    assert all(row["ratio"] > 0 for row in report["augmentation"])
    assert steps == [row["method"] for row in report["training"]]
    for row in report["training"]:
        assert row["hours"] == pytest.approx(150 * 50_000 / row["images/s"] / 3600)
        assert row["passes/s"] == pytest.approx(2 * row["images/s"])
    line = printed.splitlines()[-1]
    assert line.startswith(f"{report['device']}, torch {torch.__version__}, off, batch 1; ")
    assert line.count("resnet18") == line.count(" h") == 7


def test_an_out_that_cannot_be_written_is_named_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "training", None)
    flags = ["--device", "cpu", "--out", str(tmp_path)]
    assert f"--out {tmp_path} is not a file" in refused(benchmark.main, flags)


def test_a_run_that_does_not_fit_is_named(tmp_path, capsys, monkeypatch):
    def training(arch: str, method: str, *_: object) -> dict:
        if method == "magnma":
            raise torch.OutOfMemoryError
        return {"network": arch, "method": method, "images/s": 9.0, "hours": 1.0, "GPU MiB": 7.0}

    monkeypatch.setattr(benchmark, "training", training)
    monkeypatch.setattr(
        benchmark, "seconds_of", lambda functions, *_, **__: {k: [1.0] for k in functions}
    )
    benchmark.main(["--device", "cpu", "--out", str(tmp_path / "b.json")])
    printed = capsys.readouterr().out
    assert "skipped, out of memory: resnet18 magnma. Try a smaller --batch-size" in printed
    assert "resnet18 standard 9/s 1.00 h 7 MiB; resnet18 at 9/s" in printed.splitlines()[-1]
