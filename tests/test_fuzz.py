"""Damaged and hostile files: reading one ends in a documented error of one line that names it, or in what it held.

Each kind of file that the scripts read is damaged at random: its bytes (flipped, cut, inserted, repeated, giant
numbers), what is packed in it (checksums made anew) and its content (types swapped, keys lost, our own hash made anew).
Never another exception, a hang, a gigabyte above the start, or code run.

    pytest tests/test_fuzz.py                # three cases of each kind, and all that is written down by hand
    pytest tests/test_fuzz.py -m slow        # 120 of each kind
"""

import contextlib
import functools
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_unpickle import python2_batch

import checkpoints
import collect
import data
import download
import evaluate
import models
import runs
import tables
import train

SECONDS = 20  # for one case on a busy machine; a sound file takes milliseconds
MAX_KIB = 2**20  # above the start, for one case
N = 3  # images of the corrupted set
RUN_FLAGS = "--dataset digits --arch resnet20 --method rse --epochs 1 --subset 16 --device cpu --amp off"


# Reading under watch


class HangError(BaseException):
    """No Exception, so that a reader that catches those does not take it for a damaged file."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise HangError(f"reading takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def memory_kib(key: str) -> int:
    """VmRSS or VmHWM, the peak, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def reset_peak() -> None:
    with contextlib.suppress(OSError):  # then the peak of all cases counts
        Path("/proc/self/clear_refs").write_text("5")


@pytest.fixture(scope="module")
def code_run() -> Iterator[Callable[[], list[str]]]:
    """Call it before and after: the system commands, processes and connections that were asked for meanwhile."""
    seen, listening = [], [True]
    forbidden = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")

    def hook(event: str, _: tuple) -> None:
        if listening[0] and event in forbidden:
            seen.append(event)

    sys.addaudithook(hook)  # for good: a hook cannot be taken away

    def taken() -> list[str]:
        events = seen[:]
        seen.clear()
        return events

    yield taken
    listening[0] = False


def read_watched(read: Callable[[], object], path: Path, code_run: Callable[[], list[str]]) -> object:
    """What `read` returns, or None for a documented error; anything else fails the test."""
    code_run()
    reset_peak()
    before, value, message = memory_kib("VmRSS"), None, None
    with time_limit(SECONDS):
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                value = read()
        except (ValueError, OSError) as error:
            message = str(error)
    assert memory_kib("VmHWM") - before < MAX_KIB
    assert code_run() == []
    assert message is None or path.name in message or f"{path.parent} is unfinished" in message, message
    assert message is None or (message.isprintable() and len(message) < 500 + len(str(path))), message
    return value


# The kinds of files: what a sound one is, and how the scripts read it


class Kind(NamedTuple):
    """A kind of file. make: a folder with a sound one and all that it needs beside it; read: of that folder."""

    file: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    load: Callable[[Path], object] | None = None  # its content, where types can be swapped
    write: Callable[[Path, object], None] | None = None  # and how it is written again
    same: bool = False  # is all damage to its bytes noticed or harmless


@functools.cache
def digits() -> data.Dataset:
    return data.load_dataset("digits", "data")


def saver(folder: Path) -> checkpoints.Saver:
    model = models.build_model("resnet20", 10, digits().mean, digits().std)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    config = vars(train.parse_args(RUN_FLAGS.split()))
    return checkpoints.Saver(config, folder, digits(), torch.device("cpu"), model, optimizer, None, "off")


def make_run(folder: Path) -> None:
    """The run that trained for one epoch, without the training."""
    torch.manual_seed(0)
    run = saver(folder)
    sum(p.sum() for p in run.f_theta.parameters()).backward()
    run.theta.step()
    runs.write_json(folder / "config.json", run.config)
    run.epoch({"epoch": 1, "step": 0, "loss_sum": 0.0, "correct": 0.0, "seconds": 0.0, "best_epoch": 1,
               "best_accuracy": 10.0, "log": [[1, 0.1, 2.3, 10.0, 10.0]], "timing": [[1, 0.5, 99.0, 1.0]]})  # fmt: skip
    (folder / "DIGITS-C").mkdir()


def read_run(folder: Path, which: str = "last") -> object:
    """evaluate.py on the run, without the forward passes; the weights and all that is written but the times."""
    networks = []

    def evaluation(model: torch.nn.Module, dataset: data.Dataset, root: str, config: dict, *_: object, **__: object):
        networks.append({name: value.clone() for name, value in model.state_dict().items()})
        return evaluate.ensemble(config, "clean")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "evaluate", evaluation)
        patch.setattr(evaluate, "print_column", lambda *_: None)
        evaluate.main([str(folder), "--data", str(folder), "--only", which, "--device", "cpu"])
    results = runs.read_json(folder / "results.json")
    return networks, {key: value for key, value in results.items() if not key.endswith("seconds")}


def resume(folder: Path) -> object:
    """train.py --resume on the finished run."""
    run = saver(folder)
    done = run.restore()
    return run.f_theta.state_dict(), run.theta.state_dict(), (folder / "log.csv").read_bytes(), done


def make_foreign(folder: Path) -> None:
    torch.manual_seed(0)
    torch.save({"net": models.build_model("resnet20", 10, (0, 0, 0), (1, 1, 1)).state_dict()}, folder / "foreign.pt")


def read_foreign(folder: Path) -> object:
    flags = ["--checkpoint", str(folder / "foreign.pt"), "--arch", "resnet20"]
    args = evaluate.parse_args([*flags, "--dataset", "digits"])
    mean_std = evaluate.normalisation(args, digits())
    model, _ = checkpoints.load_foreign(Path(args.checkpoint), args.arch, digits(), *mean_std)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    return model.state_dict()


def load_foreign(path: Path) -> object:
    return torch.load(path, weights_only=True)


def write_foreign(path: Path, content: object) -> None:
    torch.save(content, path)


def load_checkpoint(path: Path) -> object:
    content = torch.load(path, weights_only=True)
    if "optimizer" in content:  # a few of its 60 tensors, so that others are found more often
        content["optimizer"]["state"] = {k: v for k, v in content["optimizer"]["state"].items() if k < 2}
    return content


def make_cifar(folder: Path, python2: bool = True) -> None:
    batches, rng = folder / "cifar-10-batches-py", np.random.default_rng(0)
    batches.mkdir()
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        images, labels = rng.integers(0, 256, (2, 3072), np.uint8), rng.integers(0, 10, 2).tolist()
        new = pickle.dumps({"data": images, "labels": labels, "filenames": ["a", "b"]}, 4)
        (batches / name).write_bytes(python2_batch(images, labels) if python2 else new)
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {k}" for k in range(10)]}, 2))


def read_cifar(folder: Path) -> object:
    dataset = data.load_dataset("cifar10", folder)
    assert len(dataset.train_images) == len(dataset.train_labels) >= 5
    assert dataset.train_images.shape[1:] == dataset.test_images.shape[1:] == (3, 32, 32)
    assert min(dataset.train_labels.min(), dataset.test_labels.min()) >= 0
    assert max(dataset.train_labels.max(), dataset.test_labels.max()) <= 9
    assert all(isinstance(name, str) for name in dataset.classes)
    return None


def load_pickle(path: Path) -> object:
    return pickle.loads(path.read_bytes(), encoding="latin-1")


def write_pickle(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content, 4))


def make_corrupted(folder: Path, record: str = "") -> None:
    corrupted = folder / "CIFAR-10-C"
    corrupted.mkdir()
    rng = np.random.default_rng(0)
    np.save(corrupted / "fog.npy", rng.integers(0, 256, (5 * N, 32, 32, 3), np.uint8))
    np.save(corrupted / "labels.npy", np.tile(np.arange(N, dtype=np.uint8), 5))
    if record:
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in corrupted.glob("*.npy")}
        runs.write_json(corrupted / record, {"dataset": "cifar10", "seed": 0, "files": files})
        data.verify_corrupted("cifar10", folder)


def read_corrupted(folder: Path) -> object:
    source = data.verify_corrupted("cifar10", folder)
    images, labels = data.load_corrupted("cifar10", folder, "fog", 3)
    assert images.shape == (len(labels), 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.min() >= 0
    assert labels.max() <= 9
    return images, labels, source


def write_npy(path: Path, content: object) -> None:
    with open(path, "wb") as file:
        np.lib.format.write_array(file, np.asanyarray(content), allow_pickle=True)


def make_kept(folder: Path) -> None:
    rng = np.random.default_rng(0)
    checkpoints.write_kept(folder / "fog.npz", "key", rng.random((5, N), np.float32), rng.random((5, N)) < 0.5)


def read_kept(folder: Path) -> object:
    """As evaluate.py goes on with it; damaged, it is made anew."""
    kept = checkpoints.read_kept(folder / "fog.npz", "key", N)
    if kept is not None:
        evaluate.scores(*kept)
        assert kept[0].shape == kept[1].shape == (5, N)
    return kept


def load_npz(path: Path) -> object:
    with np.load(path, allow_pickle=True) as arrays:
        return dict(arrays)


def write_npz(path: Path, content: object) -> None:
    arrays = content if isinstance(content, dict) else {"content": content}
    with open(path, "wb") as file:
        np.savez(file, **{str(key): np.asanyarray(value) for key, value in arrays.items()})


def make_results(folder: Path) -> None:
    def cell(value: float) -> dict:
        return {"accuracy": value, "rms_calibration_error": 4.0, "rms_calibration_error_adaptive": 5.0}

    e = {"epoch": 3, "clean": cell(90.0), "corruptions": {name: [cell(50.0)] * 5 for name in data.CORRUPTIONS},
         "mca": 50.0, "corrupt_rms_calibration_error": 6.0, "corrupt_rms_calibration_error_adaptive": 7.0,
         "reliability": {"clean": [[1, 0.5, 1]] * 15, "corrupt": [[0, 0, 0]] * 15}}  # fmt: skip
    config = vars(train.parse_args(["--method", "magnma"]))
    results = {"dataset": "cifar10", "arch": "resnet18", "method": "magnma", "tag": "", "seed": 0, "stands_for": None,
               "hparams": {k: v for k, v in config.items() if k not in evaluate.NOT_HPARAMS}, "limit": None,
               "data_source": "official", "corruption_source": "official", "train_images": 50000, "test_images": 10000,
               "device": "CPU", "versions": {}, "commit": "0", "wall_seconds": 1.0, "best": e, "last": e}  # fmt: skip
    runs.write_json(folder / "results.json", results)


def read_results(folder: Path) -> object:
    """All five tables, the claims and Welch's tests, and the bins of the figures."""
    flags = [str(folder), "--table", "all", "--claims", "--significance", "--format", "markdown"]
    found, _ = collect.read_runs(folder)
    chosen, _ = collect.choose(collect.group_runs(found))
    collect.reliability_bins(chosen, "best")
    assert tables.main(flags) == 0
    return None


def read_json(path: Path) -> object:
    return json.loads(path.read_bytes())


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, default=repr))


def make_tar(folder: Path, mode: str = "w") -> None:
    with tarfile.open(folder / "set.tar", mode) as tar:
        for name in ("a.npy", "b.npy"):
            member = tarfile.TarInfo(f"set/{name}")
            member.size = 3000
            tar.addfile(member, io.BytesIO(name[:1].encode() * 3000))


def read_tar(folder: Path) -> object:
    target = folder / "set"
    try:
        download.extract(folder / "set.tar", target, ["set/a.npy", "set/b.npy"])
        assert sorted(os.listdir(target)) == ["a.npy", "b.npy"]
        assert not (target / "a.npy").is_symlink()
    finally:
        shutil.rmtree(target, ignore_errors=True)
        assert os.listdir(folder) == ["set.tar"]


BATCHES, SET, RECORD = "cifar-10-batches-py/", "CIFAR-10-C/", functools.partial
CHECKPOINT = (load_checkpoint, runs.save_checkpoint, True)
KINDS = {
    "last.pt, evaluated": Kind("last.pt", make_run, read_run, *CHECKPOINT),
    "best.pt, evaluated": Kind("best.pt", make_run, RECORD(read_run, which="best"), *CHECKPOINT),
    "last.pt, resumed": Kind("last.pt", make_run, resume, *CHECKPOINT),
    "another's checkpoint": Kind("foreign.pt", make_foreign, read_foreign, load_foreign, write_foreign),
    "config.json": Kind("config.json", make_run, read_run, read_json, write_json),
    "timing.csv": Kind("timing.csv", make_run, read_run),
    "Python 2 batch": Kind(BATCHES + "data_batch_3", make_cifar, read_cifar, load_pickle, write_pickle),
    "batch, protocol 4": Kind(
        BATCHES + "test_batch", RECORD(make_cifar, python2=False), read_cifar, load_pickle, write_pickle),
    "batches.meta": Kind(BATCHES + "batches.meta", make_cifar, read_cifar, load_pickle, write_pickle),
    "npy": Kind(SET + "fog.npy", make_corrupted, read_corrupted, np.load, write_npy),
    "npy with a hash": Kind(
        SET + "fog.npy", RECORD(make_corrupted, record="generated.json"), read_corrupted, np.load, write_npy, True),
    "labels.npy": Kind(SET + "labels.npy", make_corrupted, read_corrupted, np.load, write_npy),
    "generated.json": Kind(
        SET + "generated.json", RECORD(make_corrupted, record="generated.json"), read_corrupted, read_json, write_json),
    "official.json": Kind(
        SET + "official.json", RECORD(make_corrupted, record="official.json"), read_corrupted, read_json, write_json),
    ".verified.json": Kind(
        SET + ".verified.json", RECORD(make_corrupted, record="official.json"), read_corrupted, read_json, write_json,
        True),
    "kept cells": Kind("fog.npz", make_kept, read_kept, load_npz, write_npz, True),
    "results.json": Kind("results.json", make_results, read_results, read_json, write_json),
    "tar": Kind("set.tar", make_tar, read_tar),
    "tar.gz": Kind("set.tar", RECORD(make_tar, mode="w:gz"), read_tar),
}  # fmt: skip


# Damage

ANYTHING = (None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.5, 1e308, math.nan, math.inf, "", "x",
            "two\nlines", "\x1b[2J", "é" * 500, "magnma", [], {}, [[]], [None] * 3, {"model": 1}, {"": []})  # fmt: skip
TENSORS = (b"bytes", (), (1, 2), torch.ones(1), torch.zeros(0), torch.full((16, 3, 3, 3), math.nan),
           torch.ones(10, dtype=torch.complex64), torch.ones(10, dtype=torch.bool), torch.ones(10, device="meta"),
           torch.eye(10).to_sparse(), torch.ones(1).expand(2**31), torch.ones(10, dtype=torch.float8_e5m2))
ARRAYS = (np.zeros((15, 32, 32, 3)), np.zeros((15, 32, 32, 3), np.int8), np.zeros((0, 32, 32, 3), np.uint8),
          np.zeros((14, 32, 32, 3), np.uint8), np.zeros(15, np.uint8), np.array(3), np.full(15, -1), np.full(15, 10),
          np.zeros(15, "datetime64[s]"), np.zeros(15, "U5"), np.zeros(15, [("a", "u1")]), np.zeros((5, N), bool),
          np.full((5, N), np.nan, np.float32), np.full((5, N), 2.0), np.array([None] * 15),
          np.zeros((1,) * 32, np.uint8))  # fmt: skip
SNIPPETS = (b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, (2**40).to_bytes(8, "little"), b"\xff\xff\xff\x7f",
            b"9" * 30, b"99999999999999", b"(1099511627776, 4)", b"-1", b"NaN", b"1e999", b"[[[[[[[[",
            b"{", b'"', b"\n", b",",
            b"PK\1\2", b"PK\3\4", b"\x8e", b"\x96", b"(", b".", b"R", b"cos\nsystem\n", b"\xc3\x28")  # fmt: skip


def damaged_bytes(whole: bytes, rng: random.Random) -> bytes:
    """One to four damages at the head, the tail or anywhere."""
    damaged = bytearray(whole)
    for _ in range(rng.choice([1, 1, 2, 4])):
        if not damaged:
            break
        size = len(damaged)
        at = rng.choice([rng.randrange(min(size, 300)), size - 1 - rng.randrange(min(size, 300)),
                         rng.randrange(min(size, 20_000)), rng.randrange(size)])  # fmt: skip
        length, snippet = rng.choice([1, 8, 512, 5000]), rng.choice(SNIPPETS)
        match rng.choice(["flip", "flip", "byte", "put", "insert", "cut", "drop", "repeat", "zero", "append"]):
            case "flip":
                damaged[at] ^= 1 << rng.randrange(8)
            case "byte":
                damaged[at] = rng.randrange(256)
            case "put":
                damaged[at : at + len(snippet)] = snippet
            case "insert":
                damaged[at:at] = snippet
            case "cut":
                del damaged[at:]
            case "drop":
                del damaged[at : at + length]
            case "repeat":
                damaged[at:at] = damaged[at : at + length]
            case "zero":
                damaged[at : at + length] = bytes(len(damaged[at : at + length]))
            case "append":
                damaged += snippet
    return bytes(damaged)


def damaged_inside(whole: bytes, rng: random.Random) -> bytes:
    """Damage to what is packed in a zip or gzip, under checksums that fit; to the bytes of any other file."""
    if whole.startswith(b"\x1f\x8b"):
        return gzip.compress(damaged_bytes(gzip.decompress(whole), rng), 1)
    if not whole.startswith(b"PK"):
        return damaged_bytes(whole, rng)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(packed, "w") as new:
        names = old.namelist()
        pickles = [name for name in names if name.endswith(".pkl")]
        chosen = rng.choice(pickles if pickles and rng.random() < 0.7 else names)
        for name in names:
            if not name.endswith("/sha256"):
                new.writestr(name, damaged_bytes(old.read(name), rng) if name == chosen else old.read(name))
        if any(name.endswith("/sha256") for name in names):
            new.writestr(f"{names[0].split('/')[0]}/sha256", runs._digest_of_members(new))
    return packed.getvalue()


def swapped(content: object, rng: random.Random, values: tuple) -> object:
    """The content with one value somewhere in it replaced, or a key lost, gained or renamed."""
    if isinstance(content, dict) and content and rng.random() < 0.9:
        key, changed = rng.choice(list(content)), dict(content)
        match rng.choice(["deeper"] * 6 + ["lose", "gain", "rename"]):
            case "deeper":
                changed[key] = swapped(content[key], rng, values)
            case "lose":
                del changed[key]
            case "gain":
                changed[rng.choice(["", "x", "two\nlines", "data", "gaussian_noise"])] = rng.choice(values)
            case "rename":
                changed[f"{key}\n"] = changed.pop(key)
        return changed
    if isinstance(content, list | tuple) and content and rng.random() < 0.9:
        at, changed = rng.randrange(len(content)), list(content)
        changed[at : at + 1] = rng.choice([[], [content[at]] * 2, *[[swapped(content[at], rng, values)]] * 4])
        return type(content)(changed)
    return rng.choice(values)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Kind, Path]]:
    """Each kind in turn, and the folder with a sound file of it."""
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp("fuzz")
    kind.make(folder)
    yield kind, folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """The scripts without what takes time and reads no file of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "commit", lambda: "0")  # asks git
        patch.setattr(evaluate, "load_dataset", lambda name, root: digits())
        patch.setattr(evaluate, "load_corrupted", lambda *_, **__: None)
        yield


def equal(a: object, b: object) -> bool:
    """Equality through containers, arrays and tensors."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(np.array_equal(a, b))


def try_one(kind: Kind, folder: Path, code_run: Callable, how: str, seed: int) -> None:
    """Damage the file, read it under watch, and put the sound one back."""
    path, rng = folder / kind.file, random.Random(f"{kind.file} {how} {seed}")
    whole, original = path.read_bytes(), kind.read(folder)
    if kind.file.endswith(".npy"):
        (path.parent / ".verified.json").unlink(missing_ok=True)  # it goes by the time, which may be the same
    try:
        if how == "content" and kind.load:
            values = ANYTHING
            values += TENSORS if path.suffix == ".pt" else ARRAYS if path.suffix in (".npy", ".npz") else ()
            values += (b"bytes", (), *ARRAYS) if "batch" in kind.file else ()
            kind.write(path, swapped(kind.load(path), rng, values))
        else:
            path.write_bytes((damaged_inside if how == "inside" else damaged_bytes)(whole, rng))
        value = read_watched(lambda: kind.read(folder), path, code_run)
        if kind.same and how == "bytes" and value is not None:
            assert equal(value, original), "the damage was not noticed"
    finally:
        path.write_bytes(whole)


def fuzz(cases: int) -> Callable:
    """The decorator of a test that takes a `seed` and is run with that many."""

    def decorate(test: Callable) -> Callable:
        few = settings(max_examples=cases, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                       suppress_health_check=list(HealthCheck))  # fmt: skip
        every_way = pytest.mark.parametrize("how", ["bytes", "inside", "content"])
        return pytest.mark.filterwarnings("ignore")(every_way(few(given(seed=st.integers(0, 2**32))(test))))

    return decorate


@fuzz(1)
def test_damage_is_a_documented_error_or_harmless(kind, code_run, how, seed):
    try_one(*kind, code_run, how, seed)


@pytest.mark.slow
@fuzz(40)
def test_much_damage_is_a_documented_error_or_harmless(kind, code_run, how, seed):
    try_one(*kind, code_run, how, seed)


# Hostile files, written down


class Evil:
    """A pickle of it runs a command, or so it hopes."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def evil_pickles(folder: Path) -> list[bytes]:
    mark = f"touch {folder / 'code-was-run'}"
    calls = [Evil(os.system, mark), Evil(eval, f"__import__('os').system({mark!r})"), Evil(getattr, "x", "y"),
             Evil(exec, f"import os; os.system({mark!r})"), Evil(functools.partial(os.system, mark)),
             Evil(torch.load, "x"), Evil(np.load, "x", None, True), Evil(bytearray, 2**33),
             Evil(torch.UntypedStorage, 2**40), Evil(torch.nn.Parameter, Evil(os.system, mark))]  # fmt: skip
    return [pickle.dumps({"model": call, "data": call, "labels": [call]}, 2) for call in calls]


@pytest.mark.filterwarnings("ignore")
def test_no_pickle_runs_code_wherever_it_stands(tmp_path, code_run):
    make_foreign(tmp_path)
    (tmp_path / "run").mkdir()
    make_run(tmp_path / "run")
    make_cifar(tmp_path)
    make_corrupted(tmp_path)
    make_kept(tmp_path)
    foreign, own, batch = tmp_path / "foreign.pt", tmp_path / "run" / "last.pt", tmp_path / BATCHES / "test_batch"
    readers = {foreign: lambda: read_foreign(tmp_path), own: lambda: checkpoints.load_own(own),
               batch: lambda: read_cifar(tmp_path)}  # fmt: skip
    for evil in evil_pickles(tmp_path):
        for path, read in readers.items():
            whole = path.read_bytes()
            for content in (evil, whole.startswith(b"PK") and with_member(whole, "data.pkl", evil)):
                if content:
                    path.write_bytes(content)
                    assert read_watched(read, path, code_run) is None
            path.write_bytes(whole)
    objects = np.array([Evil(os.system, f"touch {tmp_path / 'code-was-run'}")])
    write_npy(tmp_path / SET / "fog.npy", objects)
    write_npz(tmp_path / "fog.npz", {"key": np.array("key"), "confidence": objects, "correct": objects})
    assert read_watched(lambda: read_corrupted(tmp_path), tmp_path / SET / "fog.npy", code_run) is None
    assert read_watched(lambda: read_kept(tmp_path), tmp_path / "fog.npz", code_run) is None
    assert not (tmp_path / "code-was-run").exists()


def with_member(whole: bytes, ending: str, content: bytes) -> bytes:
    """The zip with another content of a member, its checksums and our hash made anew."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(packed, "w") as new:
        for name in old.namelist():
            if not name.endswith("/sha256"):
                new.writestr(name, content if name.endswith(ending) else old.read(name))
        if any(name.endswith("/sha256") for name in old.namelist()):
            new.writestr(f"{old.namelist()[0].split('/')[0]}/sha256", runs._digest_of_members(new))
    return packed.getvalue()


def npy_of(shape: str, dtype: str = "|u1") -> bytes:
    """An array file of no bytes whose header claims a shape."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header


def zip_of(**members: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return packed.getvalue()


GIANTS = {
    "results.json": [b"[" * 10**6, b'{"a":' * 10**6, b'{"seed": ' + b"9" * 10**6 + b"}", b"\xff\xfe{}", b"",
                     b'{"a": "' + b"x" * 2**24 + b'"}', b'{"a": [' + b"[]," * 10**6 + b"[]]}"],
    "config.json": [b"[" * 10**6, b'{"seed": 1' + b"0" * 4000 + b"}"],
    "timing.csv": [b'"' + b"x" * 10**6, b"seconds\n" + b"1e308\n" * 9, b"seconds\n" + b"9" * 10**6],
    "fog.npy": [npy_of("(15, 32, 32, 3)"), npy_of("(1099511627776, 32, 32, 3)"), npy_of("(2**99,)"), npy_of("(-5,)"),
                npy_of("(" * 5000 + ")" * 5000), b"\x93NUMPY\x02\0\xff\xff\xff\x7f", b"\x93NUMPY\x09\0", b""],
    "fog.npz": [zip_of(key=npy_of("(1,)"), confidence=npy_of("(5, 1099511627776)", "<f4"), correct=npy_of("(5, 3)")),
                zip_of(key=npy_of("()", "<U999999999") + bytes(10**8)), zip_of(key=bytes(10**8)),
                b"PK\5\6" + bytes(18)],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", GIANTS)
def test_giant_claims_cost_neither_time_nor_memory(tmp_path, code_run, file):
    kind = next(kind for kind in KINDS.values() if kind.file.endswith(file))
    kind.make(tmp_path)
    for content in GIANTS[file]:
        (tmp_path / kind.file).write_bytes(content)
        assert read_watched(lambda: kind.read(tmp_path), tmp_path / kind.file, code_run) is None, content[:50]


def test_a_checkpoint_larger_than_any_is_not_read(tmp_path, code_run):
    with open(tmp_path / "last.pt", "wb") as file:
        file.truncate(runs.MAX_CHECKPOINT_BYTES + 1)
    with pytest.raises(ValueError, match=r"last\.pt is larger than any checkpoint"):
        runs.load_checkpoint(tmp_path / "last.pt")
