"""tables.py on results.json files made here: every number below was computed by hand or stands in the paper."""

import csv
import io
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import tables
import utils
from data import CORRUPTIONS

ROOT = Path(tables.__file__).parent
PAPER = json.loads((ROOT / "paper/tables.json").read_text())["tables"]
HPARAMS = {"epochs": 150, "batch_size": 512, "lr": 0.1, "weight_decay": 5e-4, "lambda1": 0.2, "lambda2": 0.3,
           "sigma_max": 0.2, "beta": 1.0, "n": 5, "joint": False, "subset": None, "eval_every": 5,
           "data": "data"}  # fmt: skip


def evaluation(clean=90.0, accuracy=80.0, clean_rmse=3.0, corrupt_rmse=5.0, **corruptions):
    """The five severities of a corruption average to `accuracy`, or to its own value."""

    def cell(value, rmse=4.0):
        return {"accuracy": value, "rms_calibration_error": rmse, "rms_calibration_error_adaptive": 99.0}

    means = dict.fromkeys(CORRUPTIONS, accuracy) | corruptions
    return {
        "epoch": 7, "clean": cell(clean, clean_rmse), "mca": sum(means[name] for name in CORRUPTIONS) / 18,
        "corruptions": {name: [cell(mean + d) for d in (2, 1, 0, -1, -2)] for name, mean in means.items()},
        "corrupt_rms_calibration_error": corrupt_rmse, "corrupt_rms_calibration_error_adaptive": 99.0,
        "reliability": {kind: [[0, 0, 0]] * 16 for kind in ("clean", "corrupt")},
    }  # fmt: skip


def put(folder, method="standard", best=None, more=(), **hparams):
    """Write a results.json into a new folder below `folder`, `more` replacing its entries; the path."""
    content = {
        "dataset": "cifar10", "arch": "resnet18", "method": method, "tag": "", "seed": 0, "hparams": HPARAMS | hparams,
        "data_source": "official", "corruption_source": "official", "train_images": 50000, "test_images": 10000,
        "limit": None, "amp": "off", "evaluation": {"amp": "off"}, "best": best or evaluation(), "last": None,
    }  # fmt: skip
    path = folder / f"run{len(list(folder.glob('run*'))):03}" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content | dict(more)))
    return path


def show(capsys, *argv):
    assert tables.main(list(map(str, argv))) == 0
    return capsys.readouterr().out


def github(capsys, *argv):
    """(the table's rows as lists of cells, all of the text)."""
    text = show(capsys, *argv, "--format", "github")
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows], text


def test_published_numbers_are_whole_and_agree():
    cells = [cell for rows in PAPER.values() for row in rows.values() for cell in row.values()]
    assert (2 * len(cells), [len(rows) for rows in PAPER.values()]) == (1032, [12, 12, 20, 20, 21])
    assert all(0 < mean < 100 and 0 < deviation < 4 for mean, deviation in cells)
    assert PAPER["1"]["cifar100/densenet121/clean_rmse"]["magnma 0.2 0.3 0.2 1"] == [5.41, 0.74]
    assert PAPER["2"]["cifar10/inceptionv3/mca"]["augmix"] == [90.52, 0.06]
    assert PAPER["3"]["cifar10/resnet18/contrast"]["trades"] == [40.70, 1.49]
    assert PAPER["4"]["cifar100/resnet18/impulse_noise"]["magnma 0 5 0.2 1"] == [68.38, 1.34]
    assert PAPER["5"]["cifar10/resnet18/magnma 0 10 0.2 1"]["corrupt_rmse"] == [3.10, 0.66]
    for table, place in (("3", "cifar10/resnet18"), ("4", "cifar100/resnet18")):
        assert list(PAPER[table]) == [f"{place}/{name}" for name in ("clean", "mca", *CORRUPTIONS)]
        for column, (mca, _) in PAPER[table][f"{place}/mca"].items():  # rounding: in one column 0.01 away
            rows = [PAPER[table][f"{place}/{name}"][column][0] for name in CORRUPTIONS]
            assert np.mean(rows) == pytest.approx(mca, abs=0.011)
        assert all(PAPER["2"][f"{place}/{m}"].items() <= PAPER[table][f"{place}/{m}"].items() for m in ("clean", "mca"))


def test_list_is_of_means_and_population_deviations_over_seeds(tmp_path, capsys):
    for seed, shift in enumerate((0, 1, 5)):  # mean 2; deviation over n sqrt(14/3) = 2.16, over n - 1 2.65
        best = evaluation(90 + shift, 70 + shift, 3 + shift, 5 + shift)
        put(tmp_path, best=best, more={"seed": seed, "last": evaluation(clean=50) if seed else None})
    more = {"tag": "ab", "dataset": "mine", "arch": "vgg", "data_source": "my cat", "amp": "bf16"}
    put(tmp_path, "mixup", evaluation(my_corruption=11.0), more, epochs=7)
    rows, _ = github(capsys, tmp_path)
    assert " ".join(rows[1]) == ("cifar10 resnet18 standard 0 1 2 150 off 50000/10000 official"
                                 " 92.00±2.16 72.00±2.16 5.00±2.16 7.00±2.16")  # fmt: skip
    assert " ".join(rows[2]) == "mine vgg mixup-ab 0 7 bf16/off 50000/10000 official 90.00 80.00 3.00 5.00"
    assert re.search(r"& standard +& 0 1 2 +& ", show(capsys, tmp_path, "--format", "latex"))
    first, second = csv.DictReader(io.StringIO(show(capsys, tmp_path, "--checkpoint", "last", "--csv")))
    assert (first["seeds"], first["clean"], first["clean_deviation"]) == ("1 2", "50.0", "0.0")
    assert (second["seeds"], second["clean"], second["mca_deviation"]) == ("—", "", "")
    assert "resnet18" not in show(capsys, tmp_path, "--arch", "vgg")


def test_unlike_runs_are_never_averaged_and_a_second_of_a_seed_is_named(tmp_path, capsys):
    bad = evaluation(clean=10)
    put(tmp_path)
    again = put(tmp_path, best=bad, data="elsewhere")
    for change in ({"amp": "bf16"}, {"evaluation": {"amp": "fp16"}}, {"data_source": "a copy"}, {"tag": "my_code"},
                   {"corruption_source": "generated"}, {"limit": 100, "test_images": 100}):  # fmt: skip
        put(tmp_path, best=bad, more=change | {"seed": 1})
    put(tmp_path, best=bad, more={"seed": 1}, lr=0.05)
    rows, text = github(capsys, tmp_path)
    assert sorted(row[8] for row in rows[1:]) == ["10.00"] * 7 + ["90.00"]
    for note in (f"its seed is there already: {again}", "rows of cifar10 resnet18 standard differ in ",
                 "lr 0.1 | 0.1 | 0.1 | 0.1 | 0.1 | 0.1 | 0.05"):  # fmt: skip
        assert note in text
    rows, text = github(capsys, tmp_path, "--table", "3")  # shows the run nearest to the paper's
    assert rows[1][2] == "90.00"
    assert text.count("Standard was also run with (shown | not shown) ") == 7
    put(tmp_path, "gn", bad)
    for seed in (0, 1):
        put(tmp_path, "gn", evaluation(clean=20), {"seed": seed, "tag": "two"})
    assert github(capsys, tmp_path, "--table", "3")[0][1][6] == "20.00±0.00"  # of runs alike, that of more seeds


def test_table_3_has_ours_the_papers_and_the_difference(tmp_path, capsys):
    for seed in range(3):  # more seeds, but further from the paper's recipe
        put(tmp_path, "magnma", evaluation(clean=11), {"seed": seed}, n=2)
    put(tmp_path, "magnma", evaluation(clean=12), joint=True)
    for seed, shift in enumerate((-1, 1)):
        put(tmp_path, "magnma", evaluation(95 + shift, 91.5 + shift, glass_blur=80 + shift), {"seed": seed})
    put(tmp_path, "magnma", evaluation(clean=93.70), {"corruption_source": "generated"}, lambda2=0.0, epochs=20)
    put(tmp_path, "magnma", None, {"amp": "bf16"}, lambda1=0.0, lambda2=5.0, eval_every=1)
    put(tmp_path, "magnma", None, {"tag": "l1_0.7"}, lambda1=0.7)  # of no table
    put(tmp_path, "mixup", evaluation(my_corruption=11.0))
    (header, *rows), text = github(capsys, tmp_path, "--table", "3")
    assert header[6:] == ["GN", "AugMix", "MAGNMA noise", "MAGNMA mix", "MAGNMA", "magnma-l1_0.7", "mixup"]
    assert rows[0] == ["Clean", "ours", *["—"] * 6, "93.70", "90.00", "95.00±1.00", "90.00", "90.00"]
    assert rows[1][6:] == ["91.84±0.27", "95.33±0.40", "93.70±0.34", "95.47±0.16", "95.14±0.17", "—", "—"]
    assert rows[2][1:] == ["difference", *["—"] * 6, "+0.00", "-5.47", "-0.14", "—", "—"]
    assert rows[3][10] == "90.86±1.00"  # mCA: (17 * 91.5 + 80) / 18
    glass = [row[0] for row in rows].index("Glass Blur")
    assert [row[10] for row in rows[glass : glass + 3]] == ["80.00±1.00", "84.21±0.38", "-4.21"]
    assert rows[-1] == ["my_corruption", "ours", *["—"] * 10, "11.00"]
    assert len(rows) == 3 * 20 + 1
    for note in ("corruption_source generated (paper: official): MAGNMA noise", "epochs 20 (paper: 150): MAGNMA noise",
                 "eval_every 1 (paper: 5): MAGNMA mix", "amp bf16 (paper: off): MAGNMA mix",
                 "2 of the paper's 3 seeds: MAGNMA\n",
                 "MAGNMA was also run with (shown | not shown) n 5 | 2; seeds 0 1 2",
                 "MAGNMA was also run with (shown | not shown) joint False | True; seeds 0"):  # fmt: skip
        assert f"- {note}" in text


def test_smaller_runs_in_the_papers_layout(tmp_path, capsys):
    more = {"dataset": "copies", "arch": "resnet20", "limit": 500}
    put(tmp_path, "magnma", evaluation(81.0, 71.0, 2.0, 6.0), more, n=2)
    for number, row, want in (
        ("1", 1, ["ResNet-20", "copies", "ours", "—", "—", "2.00"]),
        ("1", 3, ["ResNet-20", "copies-C", "ours", "—", "—", "6.00"]),
        ("2", 4, ["ResNet-18", "CIFAR-10-C", "paper", "77.83±0.11", "89.70±0.40", "91.46±0.28"]),
        ("3", 3, ["mCA", "ours", *["—"] * 8, "71.00"]),
        ("4", 3, ["mCA", "ours", *["—"] * 8, "71.00"]),
        ("5", 33, ["(0.2, 0.3, 0.2, 1)", "ours", "81.00", "71.00", "2.00", "6.00"]),
    ):
        rows, text = github(capsys, tmp_path, "--table", number, "--dataset", "dir/copies.npz", "--arch", "resnet20")
        assert rows[row] == want
        place = "CIFAR-100" if number == "4" else "CIFAR-10"
        assert f"copies in the place of {place}, ResNet-20 in the place of ResNet-18" in text.splitlines()[0]
        assert ["difference" in text, "limit 500: all" in text, "n 2 (paper: 5): all" in text] == [False, True, True]
    assert show(capsys, tmp_path, "--table", "all").count("ours: no run of these data sets") == 5


def test_the_slips_come_out_of_the_papers_own_tables(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no runs at all
    rows = github(capsys, "--claims")[0][1:]
    assert {tuple(row[4:]) for row in rows[:-1]} == {("not all run", "cannot say")}
    assert [row[3] for row in rows].count("does not hold") == 14
    found = {f"{row[0]}, {row[1]}": f"{row[2]} {row[3]}" for row in rows}
    best, alone, spread = (
        "MAGNMA best for most corruptions",
        "alone in {} of 18, tied in 1 {}",
        "(spread: noise; mix; both)",
    )
    for words, said in (
        ("Sec. 7.4, CIFAR-100: mCA of MAGNMA better than Standard's by 13.6", "16.65 does not hold"),
        ("Sec. 4, CIFAR-10: Corrupt RMSE of MAGNMA better than AugMix's by 2.81, mean of 3 networks", "1.81 does not"),
        (f"Sec. 4, CIFAR-10: {best}", alone.format(4, "does not")),
        (f"Sec. 4, CIFAR-100: {best}", alone.format(1, "does not")),
        ("Sec. 4, CIFAR-10: the same, its ablations left out", alone.format(11, "holds")),
        ("Sec. 4, CIFAR-100: the same, its ablations left out", alone.format(9, "does not hold")),
        ("Sec. 4, CIFAR-10: the same, its ablations counted as MAGNMA", alone.format(13, "holds")),
        ("Sec. 4, CIFAR-100: the same, its ablations counted as MAGNMA", alone.format(11, "holds")),
        ("Sec. 4, CIFAR-100: AugMix ahead within the deviation only", "13 of 18; Defocus Blur +0.45; Gaussian Blur"),
        ("Table 1, CIFAR-10: RMSE below AugMix's", "5 of 6; Clean RMSE over AugMix -0.09 (ResNet-18) does not"),
        ("Table 1, CIFAR-100: RMSE below AugMix's", "5 of 6; Clean RMSE over AugMix -2.26 (DenseNet-121) does not"),
        ("Table 2, CIFAR-10: mCA above AugMix's by 0.5 (a moderate gain)",
         "1 of 3; mCA over AugMix +0.19 (DenseNet-121); mCA over AugMix -0.03 (Inception-V3) does not"),
        ("Fig. 2, CIFAR-10: largest mCA, but for one at most", "5 of 6; mCA over AugMix -0.03 (Inception-V3) holds"),
        ("Tables, 1, 3 and 5 agree on the same runs", "MAGNMA noise mCA 87.14 and 87.13 does not hold"),
        ("Sec. 4, CIFAR-10: mix only leads noise only on blur and contrast", "5 of 6; Glass Blur over MAGNMA noise -8"),
        ("Sec. 4, CIFAR-100: noise only leads mix only on noise", "2 of 3; Impulse Noise over MAGNMA mix -2.43 does"),
        ("Sec. 4, CIFAR-100: mix only leads noise only on blur and contrast",
         "5 of 6; Glass Blur over MAGNMA noise -18.03 does not hold"),
        (f"Sec. 7.4, Table 5: Clean RMSE does not change significantly {spread}", "0.53; 0.69; 0.84 holds"),
        (f"Sec. 7.4, Table 5: Corrupt RMSE does not change significantly {spread}", "0.64; 2.64; 1.73 does not"),
    ):  # fmt: skip
        assert found[words].startswith(said), words


@pytest.mark.parametrize("place", [{}, {"dataset": "copies", "arch": "resnet20"}])
def test_claims_from_our_runs(tmp_path, capsys, place):
    put(tmp_path, best=evaluation(90, 70, 5, 20), more=place)
    put(tmp_path, "augmix", evaluation(91, 80, 5, 9), place)
    put(tmp_path, "at", evaluation(89, 70, 5, 9), place)
    put(tmp_path, "magnma", evaluation(89.5, 83.5, 5, 8), place)
    put(tmp_path, "magnma", evaluation(80, 69, 5, 8), place, lambda2=0.0)
    put(tmp_path, "magnma", evaluation(80, 97, 5, 8), place, lambda1=0.0, lambda2=5.0, epochs=9)
    flags = [part for name, value in place.items() for part in (f"--{name}", value)]
    rows, text = github(capsys, tmp_path, "--claims", *flags)
    found = {row[1]: row[4:] for row in rows}
    for words, said, verdict in (
        ("mCA of MAGNMA better than Standard's by 13.6", "13.50", "supports"),
        ("mCA of AugMix better than Standard's by 11.9", "10.00", "in part"),
        ("mCA of MAGNMA noise better than Standard's by 9.3", "-1.00", "contradicts"),
        ("mCA of MAGNMA mix better than Standard's by 11.8", "not all run", "cannot say"),
        ("MAGNMA keeps clean accuracy, to a point", "1 of 1", "supports"),
        ("MAGNMA's mCA above every baseline's", "3 of 3; 3 not run", "cannot say"),
        ("AT and TRADES lose more than a point of it", "0 of 1; Clean over AT +1.00", "contradicts"),  # just a point
        ("AugMix ahead within the deviation only", "one seed has no deviation", "cannot say"),
    ):
        assert found[f"CIFAR-10: {words}"] == [said, verdict]
    assert "- not compared, since run otherwise (epochs): CIFAR-10, ResNet-18, MAGNMA mix\n" in text


def test_other_peoples_folders_end_in_no_traceback(tmp_path, capsys):
    put(tmp_path, "theirs", evaluation(mine=11.0), {"tag": None, "train_images": None})
    put(tmp_path, "magnma", lambda1="a", epochs="many", subset=[1])
    put(tmp_path, None, None, {"seed": None, "best": None, "foreign": evaluation(), "amp": None,
                                 "hparams": {"checkpoint": "their/foreign.pt"}})
    put(tmp_path).write_text("{")
    for argv in ("", "--csv", "--claims", "--table all", "--checkpoint last", "--table 3 --format latex"):
        assert tables.main([str(tmp_path), *argv.split()]) == 1
        out, err = capsys.readouterr()
        assert re.fullmatch(r"tables.py: \S+run003/results.json is left out: .*\n", err)
        assert argv == "--claims" or "theirs" in out
        assert not [line for line in out.splitlines() if "foreign" in line and "None" in line]


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    for argv, said in (("empty", "no results.json below empty"), ("nowhere --claims", "no results.json below nowhere"),
                       ("--arch resnet2O", "--arch resnet2O: no such run; there are runs of resnet18"),
                       ("--csv --claims", "--csv is for the list"), ("--table 6", "invalid choice")):  # fmt: skip
        assert utils.run_main(partial(tables.main, argv.split())) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), said in err) == ("", 1, True)
    assert not re.search(r"^(import|from) (train|figures|benchmark)\b", (ROOT / "tables.py").read_text(), re.MULTILINE)
