"""benchmark.py: both pipelines make the same copies; operations are counted; the script with a tiny budget.

Its Pillow operations are those that tests/test_augment.py compares augment.py with.
"""

import json

import numpy as np
import pytest
import torch

import benchmark
from models import build_model


@pytest.mark.parametrize(("method", "count"), [("standard", 1), ("augmix", 3), ("magnma", 11)])
def test_both_pipelines_make_the_same_number_of_copies_with_the_same_statistics(method, count):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8).repeat(15, 1, 1, 1)
    ours = torch.stack(benchmark.ours(method, images), 1)
    usual = torch.stack([torch.stack(benchmark.usual(method, x.permute(1, 2, 0).numpy(), rng)) for x in images])
    assert ours.shape == usual.shape == (300, count, 3, 32, 32)
    for made in (ours, usual):
        inside = (made >= 0).logical_and(made <= 1).flatten(2).all(2).all(0).sum()
        assert inside == (6 if method == "magnma" else count)  # only noise leaves [0, 1]

    def moved(copies):  # how far the copies are from their image, sorted so that the copies' order does not count
        return (copies[:, 1:] - copies[:, :1]).square().mean((0, 2, 3, 4)).sort().values

    if count > 1:
        torch.testing.assert_close(moved(ours), moved(usual), rtol=0.2, atol=0)


def test_operations_of_resnet18_are_those_of_its_convolutions_and_layers():
    later = 64 * 128 * 9 * 256 + 3 * 128 * 128 * 9 * 256 + 64 * 128 * 256  # the same in each of stages 2, 3, 4
    first, forward = 3 * 64 * 9 * 1024, 3 * 64 * 9 * 1024 + 4 * 64 * 64 * 9 * 1024 + 3 * later + 512 * 10
    assert round(forward / 1e9, 2) == 0.56
    # a multiply-and-add is two operations; backward is twice forward, but for the gradient of the training images
    assert benchmark.cost("resnet18", "standard") == (1, 2 * (3 * forward - first))
    assert benchmark.cost("resnet18", "at") == (8, 2 * (7 * 2 * forward + 3 * forward - first))


def test_the_whole_script(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "build_model", lambda arch, classes: build_model("resnet20", classes))  # small
    benchmark.main(["--device", "cpu", "--batch-size", "1", "--seconds", "0.01", "--out", str(tmp_path / "b.json")])
    report, table = json.loads((tmp_path / "b.json").read_text()), capsys.readouterr().out
    assert {"device", "versions", "commit", "precision", "threads"} <= report.keys()
    assert [len(report[k]) for k in ("augmentation", "corruptions", "evaluation", "training")] == [3, 1, 1, 10]
    for row in report["training"][:7]:
        assert row["hours"] == pytest.approx(150 * 50_000 / row["cpu images/s"] / 3600)
        assert row["passes/s"] == pytest.approx(row["cpu images/s"] * row["passes"])
        assert row["% of matmul"] * row["matmul GFLOP/s"] == pytest.approx(100 * row["GFLOP"] * row["cpu images/s"])
    assert [row["passes"] for row in report["training"][:7]] == [1, 8, 10, 1, 1, 3, 11]
    assert {row["cuda images/s"] for row in report["training"]} == {None}
    assert table.count("not run") == 3 + 1 + 7 * 2 + 3 * 7
