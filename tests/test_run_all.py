"""run_all.sh: its list against the published tables, what setup installs, and how the list is worked through.

The last is tried with stand-ins for the scripts, which note their calls; one run at the end is real.
"""

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from train import parse_args

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = """
import json, os, sys, time
from pathlib import Path
def note(*words):
    with open("calls", "a") as calls: calls.write(json.dumps([*map(str, words)]) + "\\n")
# torch
device, dtype, OutOfMemoryError = object, object, MemoryError
class nn: Module = object
class optim: SGD = object
class cuda: device_count = staticmethod(lambda: int(os.environ.get("GPUS", 0)))
# data.py
CORRUPTIONS = ("fog", "snow")
class load_dataset:
    def __init__(self, name, root):
        self.name = Path(name).stem
        note("load", name)
        if "OFFLINE" in os.environ: raise OSError(f"no whole {name}")
def corrupted_folder(name, root): return Path(root, name + "-C")
def is_whole(folder): return all((folder / f"{name}.npy").is_file() for name in (*CORRUPTIONS, "labels"))
# corruptions.py
OFFICIAL = ("cifar10", "cifar100")
def main(argv):
    note("corruptions", *argv)
    folder = Path("data", Path(argv[1]).stem + "-C")
    folder.mkdir()
    for name in (*CORRUPTIONS, "labels"): (folder / f"{name}.npy").touch()
# evaluate.py
def check_results(content):
    if "mca" not in content["best"]: raise ValueError("of an older form")
# train.py
def differing(config, theirs):
    free = {"device", "resume", "out"} | ({"sigma_max"} - theirs.keys())
    return [key for key in config if key not in free and theirs.get(key) != config[key]]
def parse_args(argv):
    import utils
    parser = utils.Parser()
    flags = "method dataset arch seed device out epochs batch-size lr n eval-every lambda1 lambda2 sigma-max"
    for flag in flags.split():
        parser.add_argument("--" + flag)
    for flag in ("resume", "recompute"): parser.add_argument("--" + flag, action="store_true")
    return parser.parse_args(argv)
if __name__ == "__main__" and sys.argv[0] == "train.py":
    args, start, folder = parse_args(sys.argv[1:]), time.monotonic(), Path(sys.argv[sys.argv.index("--out") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    trouble = os.environ.get(args.method)
    if trouble == "fail": sys.exit("train.py: out of luck")
    if trouble == "kill": os.kill(os.getpid(), 9)
    if trouble == "hang": note("hang", os.getpid()), time.sleep(60)
    time.sleep(float(os.environ.get("NAP", 0)))
    (folder / "config.json").write_text(json.dumps(vars(args)))
    note("train", args.out, os.environ.get("CUDA_VISIBLE_DEVICES"), start, time.monotonic(), args.resume)
elif __name__ == "__main__" and sys.argv[0].endswith(".py"):
    note(Path(sys.argv[0]).stem, *sys.argv[1:])
    if sys.argv[0] == "evaluate.py":
        Path(sys.argv[1], "results.json").write_text('{"best": {"mca": 1}, "last": {"mca": 1}, "limit": null}')
"""


def bash(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`bash run_all.sh <arguments>` with this Python, started from elsewhere."""
    return subprocess.run(["bash", folder / "run_all.sh", *arguments], cwd="/", capture_output=True, text=True,
                          timeout=240, env=os.environ | {"PYTHON": sys.executable} | environment)  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """run_all.sh and stand-ins, in a folder with a space in its name."""
    folder = tmp_path / "the project"
    folder.mkdir()
    for name in ("run_all.sh", "requirements.txt", "utils.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("torch", "data", "corruptions", "train", "evaluate", "tables", "figures"):
        (folder / f"{name}.py").write_text(STAND_IN)
    return folder


def calls(folder: Path, what: str = "") -> list[list[str]]:
    """What the stand-ins noted since the last look, or what `what` did."""
    lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    (folder / "calls").unlink(missing_ok=True)
    return [words for words in map(json.loads, lines) if what in ("", words[0])]


def listed(*arguments: str) -> list[tuple[str, list[str], list[str]]]:
    """(number, flags of train.py, arguments of evaluate.py) of each line of the list."""
    lines = [line.split("\t") for line in bash(ROOT, "list", *arguments, PYTHON="/a b/python").stdout.splitlines()]
    words = [(number, shlex.split(command)) for number, command in lines]
    assert all(w[:2] + w[w.index("&&") + 1 :][:2] == ["/a b/python", "train.py", "/a b/python", "evaluate.py"]
               for _, w in words)  # fmt: skip
    return [(number, w[2 : w.index("&&")], w[w.index("&&") + 3 :]) for number, w in words]


def published(tables: str) -> set[tuple[str, str, str]]:
    """(data set, network, column) of every cell of published tables; Table 5's columns are its rows."""
    cells = set()
    for table in tables:
        for row, columns in json.loads((ROOT / "paper" / "tables.json").read_text())["tables"][table].items():
            dataset, arch, rest = row.split("/")
            cells |= {(dataset, arch, column) for column in ([rest] if table == "5" else columns)}
    return cells


def place(args: object) -> tuple[str, str, str]:
    values = f" {args.lambda1:g} {args.lambda2:g} {args.sigma_max:g} {args.beta:g}" if args.method == "magnma" else ""
    return args.dataset, args.arch, args.method + values


def test_list_is_every_run_of_every_published_table_once_at_the_papers_recipe() -> None:
    lines = listed()
    runs = [parse_args(flags) for _, flags, _ in lines]
    assert [number for number, _, _ in lines] == [str(k + 1) for k in range(144)]
    assert len({args.out for args in runs}) == 144
    for seed in range(3):  # outermost
        assert {place(args) for args in runs[48 * seed : 48 * seed + 48] if args.seed == seed} == published("12345")
    assert [place(args) for args in runs[:3]] == [
        ("cifar10", "resnet18", method) for method in ("standard", "augmix", "magnma 0.2 0.3 0.2 1")
    ]  # fmt: skip
    usual = {"--resume", "--recompute", "--dataset", "--arch", "--method", "--seed", "--device", "--out"}
    for args, (_, flags, evaluated) in zip(runs, lines, strict=True):
        assert {flag for flag in flags if flag[:2] == "--"} <= usual | {"--lambda1", "--lambda2", "--sigma-max"}
        assert (args.resume, args.recompute) == (True, args.arch != "resnet18")
        assert evaluated == [args.out, "--device", "cuda"]
        assert args.out == parse_args(flags[: flags.index("--out")]).out  # where train.py itself would put it


@pytest.mark.parametrize("table", "12345")
def test_each_table_has_its_own_runs(table: str) -> None:
    runs = [parse_args(flags) for _, flags, _ in listed(f"table{table}", "--seeds", "0")]
    assert sorted(map(place, runs)) == sorted(published(table))


def test_flags_of_the_list() -> None:
    assert {parse_args(flags).seed for _, flags, _ in listed("headline", "--seeds", "7, 3")} == {3, 7}
    ((number, flags, evaluated),) = listed("table3", "--only", "5", "--root", "a b", "--cpu", "--", "--n", "1")
    args = parse_args(flags)
    assert (number, args.method, args.n, args.device, args.out) == ("5", "trades", 1, "cpu", evaluated[0])
    assert evaluated == ["a b/cifar10/resnet18/trades/seed0", "--device", "cpu"]
    ((_, flags, evaluated),) = listed("headline", "--only", "1", "--root", "test", "--cpu")
    assert (parse_args(flags).device, evaluated[0]) == ("cpu", "test/cifar10/resnet18/standard/seed0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("table 3", "unknown part or flag 'table'"),
        ("--frobnicate", "unknown part or flag '--frobnicate'"),
        ("table3 table4", "one part at a time"),
        ("--only 145", "--only 145: the list has lines 1 to 144"),
        ("table3 --seeds 0 --only 0", "--only 0: the list has lines 1 to 9"),
        ("--root --cpu", "--root needs a value"),
        ("--gpus 0", "--gpus takes a number"),
        ("--seeds 0-2", "--seeds takes numbers"),
        ("--root ./runs/ -- --epochs 1", "name a folder for them, as --root runs-quick"),
        ("--root r -- --seed=1", "--seed=1"),
        ("--root r --cpu -- --epoch 1", "run_all.sh: unrecognized arguments: --epoch 1"),
        ("table3", "run_all.sh: --gpus 1: torch sees 0 GPUs here"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(project: Path, arguments: str, message: str) -> None:
    done = bash(project, *arguments.split())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
    assert calls(project) == []


@pytest.mark.parametrize(
    ("gpus", "old"),
    [("535.104.05, 9.0", True), ("580.65, 8.0\\n580.65, 7.0", True), ("470.1", True), ("580.65, 7.5", False),
     ("", False), ("570.86, 12.0", None)],  # None: too new for the one, its driver too old for the other
)  # fmt: skip
def test_setup_installs_what_the_gpus_need_once(project: Path, gpus: str, old: bool | None) -> None:
    stand_ins = {
        "python3": """case "$*" in
          "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
          *pip*) [[ ${PIP_FAILS:-} ]] && exit 1
            sleep 0.2; echo "${@:6}" >>pips; [[ $6 == -r ]] && cat "$7" >>pips; true ;;
        esac""",
        # without the comma it is one that is too old to know of compute_cap
        "nvidia-smi": f'[[ "{gpus}" && ("{gpus}" == *,* || $1 != *compute_cap) ]] && echo -e "{gpus}"',
    }
    for name, text in stand_ins.items():
        (project / name).write_text("#!/bin/bash\n" + text)
        (project / name).chmod(0o755)
    setup = ["bash", project / "run_all.sh", "setup"]
    environment = os.environ | {"PYTHON": "", "PATH": f"{project}:{os.environ['PATH']}"}
    assert subprocess.run(setup, env=environment | {"PIP_FAILS": "1"}).returncode == 2
    assert not (project / ".venv" / "installed").exists()
    if old is None:
        done = subprocess.run(setup, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n"), (project / "pips").exists()) == (2, 1, False)
        assert done.stderr.endswith("; update the driver\n")
        return
    together = [subprocess.Popen(setup, env=environment) for _ in range(2)]
    assert [process.wait(60) for process in together] == [0, 0]
    pips = (project / "pips").read_text().splitlines()
    index = "--index-url https://download.pytorch.org/whl/cu126"
    assert (pips[0] == f"torch==2.7.1 torchvision==0.22.1 {index}") == old
    assert any(line.startswith("torch==2.13") for line in pips) != old
    assert sum(line.startswith("torchmetrics==") for line in pips) == 1
    assert pips[-1] == "--no-deps imagecorruptions==1.1.2"
    with open(project / "requirements.txt", "a") as file:
        file.write("six==1\n")
    assert subprocess.run(setup, env=environment).returncode == 0
    assert "six==1" in (project / "pips").read_text()


def test_failed_killed_and_finished_runs_and_the_same_command_again(project: Path) -> None:
    command = ("headline", "--seeds", "0", "--generate")
    done = bash(project, *command, GPUS="1", standard="fail", augmix="kill")
    assert done.returncode == 1
    assert "[3/3] runs/cifar10/resnet18/magnma/seed0: finished after" in done.stdout
    *_, standard, augmix = done.stdout.splitlines()
    folder = "runs/cifar10/resnet18/standard/seed0"
    assert standard == f"failed: {folder}: train.py: out of luck (log: {folder}/output.log)"
    assert augmix.startswith("failed: runs/cifar10/resnet18/augmix/seed0")
    first = calls(project)
    assert first[:2] == [["load", "cifar10"], ["corruptions", "--dataset", "cifar10"]]
    assert [words[0] for words in first[2:]] == ["train", "evaluate", "tables", "tables"]

    done = bash(project, *command, GPUS="1", magnma="fail")  # it is finished
    assert done.returncode == 0, done.stdout + done.stderr
    second = calls(project)
    trained = [words for words in second if words[0] == "train"]
    assert [words[1].split("/")[3] for words in trained] == ["standard", "augmix"]
    assert {words[-1] for words in trained} == {"True"}  # --resume
    assert second[-2:] == [["tables", "runs", "--table", "1"], ["tables", "runs", "--table", "2"]]
    assert not any(words[0] == "corruptions" for words in second)
    old = '{"best": {"x": 1}, "last": {"x": 1}, "limit": null}'
    for method, text in (("magnma", '{"best": {"mca"'), ("augmix", old)):
        (project / f"runs/cifar10/resnet18/{method}/seed0/results.json").write_text(text)
    config = project / "runs/cifar10/resnet18/standard/seed0/config.json"  # before flags of another method, and its own
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "sigma_max"}))
    assert bash(project, *command, GPUS="1").returncode == 0
    assert [words[1].split("/")[3] for words in calls(project, "train")] == ["augmix", "magnma"]
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "dataset"}))
    assert bash(project, *command, GPUS="1").returncode == 0
    assert [words[1].split("/")[3] for words in calls(project, "train")] == ["standard"]
    assert bash(project, *command).returncode == 0  # nothing is left that needs a GPU


def test_two_at_a_time_each_with_a_gpu_of_its_own(project: Path) -> None:
    for seed, visible, wanted in (("0", "5,3,9", {"5", "3"}), ("1", "", {"0", "1"})):
        environment = {"GPUS": "2", "NAP": "0.5", "CUDA_VISIBLE_DEVICES": visible}
        done = bash(project, "headline", "--seeds", seed, "--gpus", "2", **environment)
        trained = calls(project, "train")
        assert (done.returncode, len(trained), {words[2] for words in trained}) == (0, 3, wanted)
        spans = sorted((float(start), float(end), gpu) for _, _, gpu, start, end, _ in trained)
        assert any(a[1] > b[0] for a, b in itertools.pairwise(spans))  # at the same time
        for gpu in wanted:
            own = [span for span in spans if span[2] == gpu]
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(own))


def test_one_line_alone_and_half_of_the_list_by_hand(project: Path) -> None:
    assert bash(project, "table3", "--only", "4", "--cpu").returncode == 0
    done = calls(project)
    assert [words[:2] for words in done[2:]] == [[s, "runs/cifar10/resnet18/at/seed0"] for s in ("train", "evaluate")]
    half = "bash run_all.sh list headline | awk 'NR % 2 == 0' | cut -f 2 | bash"
    assert subprocess.run(half, shell=True, cwd=project, env=os.environ | {"PYTHON": sys.executable}).returncode == 0
    assert len(calls(project, "evaluate")) == 4


def test_flags_behind_two_dashes_reach_every_run_and_runs_of_other_flags_are_not_skipped(project: Path) -> None:
    command = ("headline", "--seeds", "0", "--cpu", "--gpus", "3", "--root", "runs-quick", "--",
               "--dataset", "x/my.npz", "--arch=resnet20", "--epochs")  # fmt: skip
    assert bash(project, *command, "1").returncode == 0
    done = calls(project)
    assert done[:2] == [["load", "x/my.npz"], ["corruptions", "--dataset", "x/my.npz"]]
    assert {words[1] for words in done if words[0] == "train"} == {
        f"runs-quick/cifar10/resnet18/{method}/seed0" for method in ("standard", "augmix", "magnma")
    }  # fmt: skip
    assert done[-1] == ["tables", "runs-quick", "--table", "2", "--arch", "resnet20", "--dataset", "my"]
    assert bash(project, *command, "1").returncode == 0
    assert calls(project, "train") == []
    assert bash(project, *command, "2").returncode == 0
    assert len(calls(project, "train")) == 3


def test_data_alone_and_data_that_cannot_be_had(project: Path) -> None:
    done = bash(project, "table3", "--cpu", OFFLINE="1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "run_all.sh: no whole cifar10\n")
    assert calls(project) == [["load", "cifar10"]]
    assert bash(project, "data").returncode == 0
    made = [words for words in calls(project) if words[0] != "load"]
    assert made == [["corruptions", "--dataset", name, "--download"] for name in ("cifar10", "cifar100")]


def test_the_demo_ends_with_a_list_and_a_figure(project: Path) -> None:
    done = bash(project, "demo")
    assert done.returncode == 0
    assert done.stdout.endswith(": runs-demo/figures/figure5.png\n")
    made = calls(project)
    folders = {f"runs-demo/digits/resnet20/{method}/seed0" for method in ("standard", "augmix", "magnma")}
    assert {words[1] for words in made if words[0] == "evaluate"} == folders
    assert made[-1] == ["tables", "runs-demo"]


def test_ctrl_c_ends_everything_at_once_and_the_same_command_goes_on(project: Path) -> None:
    command, environment = ("headline", "--seeds", "0", "--gpus", "2"), {"GPUS": "2", "PYTHON": sys.executable}
    run = subprocess.Popen(["bash", "run_all.sh", *command], cwd=project, start_new_session=True, text=True,
                           stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                           env=os.environ | environment | {"augmix": "hang", "magnma": "hang"})  # fmt: skip
    end = time.monotonic() + 60
    while not (project / "calls").exists() or (project / "calls").read_text().count("hang") < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=10)
    assert (run.returncode, errors) == (130, "run_all.sh: stopped; the same command goes on\n")
    for _, pid in calls(project, "hang"):
        while Path(f"/proc/{pid}").exists() and "(zombie)" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
    assert bash(project, *command, GPUS="2").returncode == 0
    assert len(calls(project, "train")) == 2


def test_a_real_run_on_images_of_ones_own(tmp_path: Path) -> None:
    for path in (*ROOT.glob("*.py"), ROOT / "run_all.sh"):
        shutil.copy(path, tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    images, labels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8), np.arange(12) % 3
    np.savez(tmp_path / "my.npz", train_images=images, train_labels=labels, test_images=images[:4],
             test_labels=labels[:4])  # fmt: skip
    done = bash(tmp_path, "headline", "--only", "3", "--cpu", "--root", "runs-quick", "--", "--dataset", "my.npz",
                "--arch", "resnet20", "--epochs", "1", "--batch-size", "4", "--n", "1")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "runs-quick/cifar10/resnet18/magnma/seed0/results.json").read_text())
    assert (results["dataset"], results["arch"], results["test_images"]) == ("my", "resnet20", 4)
