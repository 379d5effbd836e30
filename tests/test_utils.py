"""utils.py: torchvision, device, precision, seeds, files, the command line, provenance."""

import argparse
import hashlib
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refused

import utils

# torchvision, device, precision, seeds

TORCHVISIONS = {
    "fits": "",
    "broken": "raise RuntimeError('something else')",
    "unfit": "import declared\n"
    "if not declared.operators: raise RuntimeError('operator torchvision::nms does not exist')",
}
IMPORT_EACH = """
import sys, types, torch
declared = sys.modules["declared"] = types.SimpleNamespace(operators=[])
torch.library.Library = lambda *_: types.SimpleNamespace(define=declared.operators.append)
for folder in ("fits", "broken", "unfit"):
    sys.path.insert(1, folder)
    try:
        import utils
        print(utils.torchvision.__file__, [o.split("(")[0] for o in declared.operators])
    except RuntimeError as error:
        print(error, declared.operators)
    for name in ("utils", "torchvision"):
        sys.modules.pop(name, None)
"""


def test_torchvisions_operators_are_declared_only_if_its_import_asks_for_them(tmp_path):
    """A second declaration beside a torchvision that fits would abort the process."""
    for name, code in TORCHVISIONS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "torchvision.py").write_text(code)
    shutil.copy(ROOT / "utils.py", tmp_path)
    python = [sys.executable, "-c", IMPORT_EACH]
    lines = subprocess.check_output(python, cwd=tmp_path, text=True).splitlines()
    assert lines == [
        f"{tmp_path}/fits/torchvision.py []",
        "something else []",
        f"{tmp_path}/unfit/torchvision.py ['nms', 'qnms']",
    ]


def test_the_allocator_grows_its_blocks_unless_the_user_has_set_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    new, old, own = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64"
    for name, before, after in (
        ("auto", {}, {new: "expandable_segments:True"}), ("cpu", {}, {}),
        ("auto", {new: own}, {new: own}), ("auto", {old: own}, {old: own}),
    ):  # fmt: skip
        monkeypatch.setattr(os, "environ", before)
        assert utils.pick_device(name) == torch.device("cpu")
        assert os.environ == after


def test_a_device_that_does_not_exist_or_work_is_named(monkeypatch):
    def refuse(device):
        raise RuntimeError(f"CUDA error {device.index}: no kernel image\nis available")

    monkeypatch.setattr(os, "environ", {"LOCAL_RANK": "1"})  # of torchrun's second process
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    for name, message in (
        ("tpu", "unknown device. Use auto, cpu, cuda or cuda:<index>"),
        ("cuda:x", "unknown device"),
        ("cuda:3", "torch sees 3 GPUs here. Try --device cpu"),
        ("cuda", "does not run on this GPU (CUDA error 1: no kernel"),
        ("cuda:2", "(CUDA error 2: no kernel image\nis available). `bash setup.sh cu126` installs"),
    ):
        line = refused(utils.pick_device, name)
        assert line.startswith(f"--device {name}: ")
        assert message in line


def test_float32_is_float32_on_a_gpu(monkeypatch):
    """Not TF32, which is torch's default in convolutions."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # restored, too
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda count, device: ones(count))
    assert utils.pick_device("cuda") == torch.device("cuda", 0)
    assert not torch.backends.cudnn.allow_tf32


def test_precision(monkeypatch):
    cpu, card = torch.device("cpu"), torch.device("cuda", 0)
    assert "--amp fp16 is for GPUs. On a CPU use --amp off" in refused(utils.amp_dtype, "fp16", cpu)
    for capability, device, amp, name in (
        (7, card, "auto", "fp16"), (8, card, "auto", "bf16"), (9, card, "auto", "bf16"),
        (9, card, "fp16", "fp16"), (0, cpu, "auto", "off"), (0, cpu, "bf16", "bf16"),
        (9, card, "off", "off"),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: (c, 5))
        assert utils.amp_name(utils.amp_dtype(amp, device)) == name
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    for dtype, expected in ((torch.float16, torch.float16), (None, torch.float32)):
        with utils.autocast(cpu, dtype):
            assert layer(x).dtype is expected


def test_seed_depends_on_its_key_alone():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, "fog", 1), (0, "fog", 2)]
    assert len({utils.seed(*key) or torch.rand(1).item() for key in keys}) == len(keys)
    utils.seed(0, 3)  # the same in every process, unlike Python's hash()
    expected = int.from_bytes(hashlib.sha256(b"(0, 3)").digest()[:8], "little")
    assert torch.initial_seed() == expected


# Files


def test_atomic_write_replaces_the_file_or_leaves_it_unchanged(tmp_path):
    path = tmp_path / "new" / "f"
    with utils.atomic_write(path) as file:
        file.write(b"before")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), utils.atomic_write(path) as file:
        file.write(b"half" * (1 // 0))
    assert path.read_bytes() == b"before"
    assert os.listdir(path.parent) == ["f"]
    below = path / "below"
    assert refused(utils.write_json, below, {}) == f"cannot write {below}: File exists"


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    path, large = tmp_path / "last.pt", {"epoch": 2, "model": {"w": torch.zeros(10000)}}
    utils.save_checkpoint(path, {"epoch": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limit[1]))  # half of the next one fits
    try:
        line = refused(utils.save_checkpoint, path, large)
        with pytest.raises(utils.UserError, match="requested"), utils.atomic_write(path) as file:
            np.save(file, np.zeros(100_000, np.uint8))  # NumPy's error has no strerror
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert line == f"cannot write {path}: File too large"
    assert utils.load_checkpoint(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_folder_is_made_or_named_if_it_cannot_be_written(tmp_path):
    for _ in range(2):
        utils.make_folder(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []
    file = tmp_path / "file"
    file.touch()
    line = f"cannot write to {file}: it is a file. Choose another --out"
    assert refused(utils.make_folder, file) == line
    below = f"cannot write to {file}/below: Not a directory. Choose another --out"
    assert refused(utils.make_folder, file / "below") == below


def test_json_is_of_finite_numbers(tmp_path):
    utils.write_json(tmp_path / "a.json", {"x": [1, 2.5, None]})
    with pytest.raises(ValueError, match="nan"):
        utils.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert utils.read_json(tmp_path / "a.json") == {"x": [1, 2.5, None]}


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    utils.save_checkpoint("cut.pt", {"w": torch.zeros(1000)})
    os.truncate("cut.pt", 3000)
    torch.save({"args": argparse.Namespace(lr=0.1)}, "objects.pt")
    torch.save([1], "list.pt")
    Path("empty.pt").touch()
    for name, text in (("cut.json", b'{"a": 1'), ("latin.json", b'"\xe9"'), ("list.json", b"[1]")):
        Path(name).write_bytes(text)
    for name, message in (
        ("none.pt", "cannot read none.pt: No such file or directory"),
        ("folder", "cannot read folder: Is a directory"),
        *((f"{name}.pt", f"{name}.pt is damaged or not") for name in ("cut", "empty", "objects")),
        ("list.pt", "list.pt is not a checkpoint of train.py: it holds a list"),
        ("none.json", "cannot read none.json: No such file or directory"),
        ("cut.json", "cut.json is not valid JSON"),
        ("latin.json", "latin.json is not valid JSON"),
        ("list.json", "list.json does not hold a JSON object"),
    ):
        read = utils.read_json if name.endswith("json") else utils.load_checkpoint
        assert refused(read, name).startswith(message)


# The command line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epochs 0", "argument --epochs: 0 is out of range, it must be at least 1"),
        ("--epochs 1.5", "argument --epochs: invalid int value: '1.5'"),
        ("--lr 0", "argument --lr: 0 is out of range, it must be finite and above 0"),
        ("--lr nan", "argument --lr: nan is out of range, it must be finite and above 0"),
        ("--lr inf", "argument --lr: inf is out of range, it must be finite and above 0"),
        ("--epoch 3", "unrecognized arguments: --epoch 3"),  # no abbreviations
    ],
)
def test_wrong_flags_end_in_a_usage_line_and_an_error_line(capsys, words, message):
    parser = utils.Parser(prog="train.py")
    parser.add_argument("--epochs", type=utils.number(int, low=1), default=3, help="passes")
    parser.add_argument("--lr", type=utils.number(float, above=0))
    good = parser.parse_args(["--epochs", "1", "--lr", "1e-9"])
    assert good == argparse.Namespace(epochs=1, lr=1e-9)
    assert "passes (default: 3)" in parser.format_help()
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(words.split())
    usage = "usage: train.py [flags]; --help lists them"
    assert capsys.readouterr().err == f"{usage}\ntrain.py: error: {message}\n"


def test_run_main_ends_in_one_line_and_an_exit_code(capsys, monkeypatch):
    def end(error):
        def main():
            raise error

        return utils.run_main(main), capsys.readouterr().err

    monkeypatch.setattr(sys, "argv", ["some/train.py"])
    assert [utils.run_main(lambda code=code: code) for code in (None, 0, 1)] == [0, 0, 1]
    assert end(utils.UserError("two\nlines")) == (2, "train.py: two lines\n")
    assert end(KeyboardInterrupt()) == (130, "train.py: interrupted\n")
    code, line = end(torch.OutOfMemoryError("CUDA\nout of memory"))
    assert (code, "GPU's memory is full" in line, line.count("\n")) == (2, True, 1)
    for bug in (ValueError, FileNotFoundError, ZeroDivisionError):  # they keep their traceback
        with pytest.raises(bug):
            end(bug())


SCRIPT = """
import sys, utils
def main():
    for k in range({lines}):
        print("±", k, file=sys.std{stream})
sys.exit(utils.run_main(main))
"""


@pytest.mark.parametrize(
    ("stream", "lines", "pipe", "output"),
    [
        ("out", 100_000, "| head -1", "? 0\n0\n"),
        ("out", 3, "| true", "0\n"),  # closed when the lines are flushed
        ("err", 3, "2>&1 | true", "0\n"),
    ],
)
def test_a_closed_pipe_ends_quietly_and_an_ascii_terminal_shows_a_question_mark(
    tmp_path, stream, lines, pipe, output
):
    (tmp_path / "script.py").write_text(SCRIPT.format(lines=lines, stream=stream))
    (tmp_path / "torchvision.py").touch()  # faster
    command = f"{sys.executable} {tmp_path}/script.py {pipe}; echo ${{PIPESTATUS[0]}}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    env["PYTHONUNBUFFERED"] = ""  # unbuffered, nothing is left to flush
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (output, "")


@pytest.mark.parametrize(
    "words",
    ["train.py --dataset none.npz", "evaluate.py none", "tables.py none", "figures.py none",
     "benchmark.py --device cuda:99"],
)  # fmt: skip
def test_each_script_ends_with_2_and_a_line_on_a_user_error(words, tmp_path):
    script, *arguments = words.split()
    command = [sys.executable, ROOT / script, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"{script}: ")


# Provenance


def test_commit_is_of_this_repository_only(tmp_path):
    def git(words):
        user = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", *user, *words.split()]
        return subprocess.check_output(command, cwd=tmp_path, text=True).strip()

    def commit_of(folder):
        folder.mkdir(exist_ok=True)
        path = Path(shutil.copy(ROOT / "utils.py", folder))
        spec = importlib.util.spec_from_file_location("copied", path)
        copied = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copied)
        return copied.commit()

    assert commit_of(tmp_path) == "unknown"  # no repository
    for words in ("init -q", "add utils.py", "commit -qm all", "tag -am release v1"):
        git(words)
    assert commit_of(tmp_path) == git("rev-parse HEAD")  # the hash, not the tag
    assert commit_of(tmp_path / "inside") == "unknown"
    (tmp_path / "utils.py").write_text("")
    git("commit -aqm another")
    assert commit_of(tmp_path) == git("rev-parse HEAD") + "+changes"
