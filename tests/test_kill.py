"""Nothing is lost: runs and evaluations that are killed, stopped, paused or out of disk end as if undisturbed.

Bit for bit: weights, optimiser, random states, log.csv and results.json (its times aside). corruptions.py and
run_all.sh have tests of this kind in their own files.

    pytest tests/test_kill.py               # five kills
    pytest tests/test_kill.py -m slow       # forty, and a run of 200 epochs
"""

import contextlib
import fnmatch
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Process, forks

import checkpoints
import corruptions
import data
import evaluate
import make_corrupted
import runs

FLAGS = "--dataset digits --arch resnet20 --method magnma --n 1 --subset 32 --batch-size 8 --lr 0.01 --device cpu"
TRAIN = ("train.py", *FLAGS.split(), "--epochs", "3", "--resume")
GO_ON = "the same command with --resume goes on from here"
Start = Callable[..., Process]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a script in a process of its own."""
    with forks(tmp_path_factory.mktemp("logs")) as start:
        yield start


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a DIGITS-C of random images."""
    place = tmp_path_factory.mktemp("kill")
    sets = place / "data" / "DIGITS-C"
    sets.mkdir(parents=True)
    labels, rng = data.load_dataset("digits", place).test_labels.numpy(), np.random.default_rng(0)
    for name in data.CORRUPTIONS:
        np.save(sets / f"{name}.npy", rng.integers(0, 256, (5 * len(labels), 32, 32, 3), np.uint8))
    np.save(sets / "labels.npy", np.tile(labels, 5))
    return place


@pytest.fixture(scope="module")
def undisturbed(start: Start, place: Path) -> Path:
    """A run of three epochs, evaluated."""
    run = place / "undisturbed"
    assert start(*TRAIN, "--out", run).wait() == 0
    assert start("evaluate.py", *evaluation(place, run)).wait() == 0
    return run


def evaluation(place: Path, run: Path) -> list[str]:
    return [str(run), "--data", str(place / "data"), "--limit", "3", "--only", "last", "--device", "cpu"]


def assert_equal(run: Path, undisturbed: Path) -> None:
    """All that a run keeps is equal bit for bit, but for times (and the commit, should there be one meanwhile)."""
    for name in ("last.pt", "best.pt"):
        ours, theirs = (runs.load_checkpoint(folder / name, need_hash=True) for folder in (run, undisturbed))
        for content in (ours, theirs):
            content.get("done", {}).pop("timing", None), content.pop("commit")
        assert same(ours, theirs)
    assert (run / "log.csv").read_bytes() == (undisturbed / "log.csv").read_bytes()
    assert (run / "log.csv").read_text().count("\n") == 4
    assert [path.name for path in run.glob(".*") if path.name != ".lock"] == [], "litter"


def assert_equal_results(run: Path, undisturbed: Path) -> None:
    ours, theirs = (
        re.sub(r'"((evaluation|wall)_seconds|commit)": [^,\n]+', "", (folder / "results.json").read_text())
        for folder in (run, undisturbed)
    )
    assert ours == theirs


def same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def entries(folder: Path, pattern: str) -> list[str]:
    """The names in the folder that fit the pattern, `.*.tmp` included."""
    with contextlib.suppress(FileNotFoundError):
        return fnmatch.filter(os.listdir(folder), pattern)
    return []


def kill_while(process: Process, condition: Callable[[], object]) -> bool:
    """Kill the process while the condition holds; False when it ended before."""
    while process.until(condition):
        os.kill(process.pid, signal.SIGSTOP)
        if condition():  # still so, now that it stands
            process.kill()
            return True
        os.kill(process.pid, signal.SIGCONT)
    return False


def check_whole(run: Path) -> None:
    """Whenever a run is killed, every file that is there is whole."""
    for name in entries(run, "*.pt"):
        runs.load_checkpoint(run / name, need_hash=True)
    for name in entries(run, "*.csv"):
        text = (run / name).read_text()
        assert text.endswith("\n")
        assert [int(row.split(",")[0]) for row in text.splitlines()[1:]] == list(range(1, text.count("\n")))
    for name in entries(run, "*.json"):
        json.loads((run / name).read_text())


# Killed


def test_three_kills_of_a_run_and_two_of_its_evaluation_change_no_bit(start, place, undisturbed, tmp_path):
    run = tmp_path / "run"
    script = subprocess.Popen(  # as users start it
        [sys.executable, *TRAIN, "--out", run], cwd=Path(evaluate.__file__).parent, stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while script.poll() is None and not entries(run, "log.csv"):
        time.sleep(0.001)
    script.kill()
    script.wait()
    check_whole(run)
    for file in ("last.pt", "log.csv"):  # half a checkpoint; a checkpoint that the log lags behind
        process = start(*TRAIN, "--out", run, flush_seconds=0.1)
        assert kill_while(process, lambda file=file: entries(run, f".{file}.*.tmp"))
        check_whole(run)
    assert start(*TRAIN, "--out", run).wait() == 0
    assert_equal(run, undisturbed)
    kill_evaluation(start, place, run, [4, 1])
    assert start("evaluate.py", *evaluation(place, run)).wait() == 0
    assert_equal(run, undisturbed)
    assert_equal_results(run, undisturbed)


@pytest.mark.slow
def test_twenty_kills_of_a_run_and_twenty_of_its_evaluation_change_no_bit(start, place, undisturbed, tmp_path):
    run, rng, seconds = tmp_path / "run", random.Random(time.time()), duration(undisturbed)
    kills, saving = 0, 0
    while kills < 20:
        process = start(*TRAIN, "--out", run, flush_seconds=rng.choice([0, 0.05]))
        if rng.random() < 0.3:
            file = rng.choice(["last.pt", "best.pt", "log.csv", "timing.csv"])
            killed = kill_while(process, lambda file=file: entries(run, f".{file}.*.tmp"))
        else:
            time.sleep(rng.uniform(0, 0.4 * seconds))
            killed = process.kill() == -signal.SIGKILL
        check_whole(run)
        kills, saving = kills + killed, saving + bool(entries(run, ".*.tmp"))
        if not killed:  # it came to its end in spite of all
            assert_equal(run, undisturbed)
            shutil.rmtree(run)
    assert saving
    assert start(*TRAIN, "--out", run).wait() == 0
    assert_equal(run, undisturbed)
    for _ in range(2):  # of 18 corruptions each
        kill_evaluation(start, place, run, [1] * 10)
        assert start("evaluate.py", *evaluation(place, run)).wait() == 0
        assert_equal_results(run, undisturbed)


def duration(run: Path) -> float:
    """Seconds of the training alone."""
    rows = (run / "timing.csv").read_text().splitlines()[1:]
    return sum(float(row.split(",")[1]) for row in rows)


def kill_evaluation(start: Start, place: Path, run: Path, times: list[int]) -> None:
    """Kill evaluate.py each time it has evaluated so many corruptions more; what it kept stays as it is."""
    rng = random.Random(0)
    for more in times:
        process, before = start("evaluate.py", *evaluation(place, run)), kept(run)
        process.until(lambda before=before, more=more: len(kept(run)) >= len(before) + more)
        time.sleep(rng.uniform(0, 0.02))
        assert process.kill() == -signal.SIGKILL
        assert before.items() <= kept(run).items(), "evaluated again"


def kept(run: Path) -> dict[Path, int]:
    """The corruptions already evaluated, and when that was written."""
    return {path: path.stat().st_mtime_ns for path in (run / ".evaluation").glob("*/[!.]*.npz")}


def test_every_random_state_is_saved_and_restored(tmp_path):
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.random(), np.random.normal(), torch.rand(1).item()]  # noqa: NPY002

    draw()
    runs.save_checkpoint(tmp_path / "last.pt", {"rng": checkpoints.rng_state(torch.device("cpu"))})
    expected = draw()
    assert draw() != expected
    checkpoints.set_rng_state(runs.load_checkpoint(tmp_path / "last.pt")["rng"], torch.device("cpu"))
    assert draw() == expected


# Stopped


def test_a_run_paused_and_stopped_by_signals_goes_on_to_the_same_end(start, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = start(*TRAIN, "--out", run, "--max-minutes", 1e-6)
    assert process.wait() == 0
    assert process.messages() == [f"train.py: paused after --max-minutes; {GO_ON}"]
    assert progress(run) == (0, 1), "it stops after a step, not an epoch"
    for epoch, number, code in ((1, signal.SIGTERM, 143), (2, signal.SIGINT, 130)):
        process = start(*TRAIN, "--out", run)
        assert process.until(lambda epoch=epoch: epochs_logged(run) == epoch)
        if number == signal.SIGTERM:  # twice, as when a queue signals each process and run_all.sh passes it on
            os.kill(process.pid, number)
            time.sleep(0.02)
        assert process.kill(number) == code
        assert process.messages() == [f"train.py: stopped by {number.name}; {GO_ON}"]
        assert progress(run) in ((epoch, 1), (epoch, 2)), "it stops after the step that it is at"
        check_whole(run)
    assert start(*TRAIN, "--out", run).wait() == 0
    assert_equal(run, undisturbed)


def progress(run: Path) -> tuple[int, int]:
    """(epochs, steps of the next) in last.pt, (-1, 0) without one."""
    if not (run / "last.pt").exists():
        return -1, 0
    done = runs.load_checkpoint(run / "last.pt")["done"]
    return done["epoch"], done["step"]


def test_a_second_interrupt_acts_at_once_and_a_second_sigterm_changes_nothing():
    with runs.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.pending()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.stopped("go on").exit_code == 143


def test_an_evaluation_stopped_by_a_signal_says_how_to_go_on(start, place, undisturbed, tmp_path):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    (run / "results.json").unlink()
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process, before = start("evaluate.py", *evaluation(place, run)), kept(run)
        assert process.until(lambda before=before: len(kept(run)) > len(before))
        assert process.kill(number) == code
        line = f"evaluate.py: stopped by {number.name}; what is evaluated is kept; the same command goes on"
        assert process.messages() == [line]
        assert not (run / "results.json").exists()
    assert start("evaluate.py", *evaluation(place, run)).wait() == 0
    assert_equal_results(run, undisturbed)


def test_a_second_process_on_a_run_is_refused_and_a_dead_one_is_not_in_the_way(start, place, tmp_path):
    run = tmp_path / "run"
    first = start(*TRAIN, "--out", run)
    assert first.until(lambda: entries(run, "config.json"))
    for flags in (TRAIN, [*TRAIN[:-1], "--overwrite"], ["evaluate.py", *evaluation(place, run)]):
        second = start(*flags, *(["--out", run] if flags[0] == "train.py" else []))
        assert second.wait() == 2
        refused = f"{flags[0]}: {run} is in use by another process; wait for it or choose another folder"
        assert second.messages() == [refused]
    assert first.kill() == -signal.SIGKILL
    assert start(*TRAIN, "--out", run, "--max-minutes", 1e-6).wait() == 0


def test_a_disk_that_fills_costs_the_epoch_alone(start, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = start(*TRAIN, "--out", run)
    assert process.until(lambda: entries(run, "timing.csv"))
    process.kill()
    before = (run / "last.pt").read_bytes()
    process = start(*TRAIN, "--out", run, max_file_bytes=len(before) - 1000)
    assert process.wait() == 2
    message = f"train.py: cannot write {run / 'last.pt'}: File too large; what was there before is kept"
    assert process.messages() == [message]
    assert (run / "last.pt").read_bytes() == before
    check_whole(run)
    assert start(*TRAIN, "--out", run).wait() == 0
    assert_equal(run, undisturbed)


# Beside each other, and for long


def test_an_evaluation_beside_corruptions_sees_whole_files_or_none(start, undisturbed, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "last.pt"):
        shutil.copy(undisturbed / name, run)
    flags = ["evaluate.py", *evaluation(tmp_path, run)]
    digits, evaluations, fsync = data.load_dataset("digits", tmp_path), [], os.fsync

    def corrupt(images: np.ndarray, name: str, severity: int, seed: int, first_index: int) -> np.ndarray:
        if severity == 1 and first_index == 0 and data.CORRUPTIONS.index(name) % 4 == 0:
            assert not evaluations or evaluations[-1].wait() == 2, "the set was not whole"
            evaluations.append(start(*flags))  # at work while the next four are written
        return images ^ np.uint8(severity * len(name))

    monkeypatch.setattr(corruptions, "corrupt", corrupt)
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), time.sleep(0.1)))  # a disk slow enough to be seen
    images = digits.test_images.permute(0, 2, 3, 1).contiguous().numpy()
    make_corrupted.generate(tmp_path / "data" / "DIGITS-C", images, digits.test_labels.numpy(), data.CORRUPTIONS,
                            seed=0, facts={"dataset": "digits"})  # fmt: skip
    assert evaluations[-1].wait() in (0, 2)
    for process in evaluations[:-1]:
        (message,) = process.messages()
        assert re.fullmatch(r"evaluate\.py: (no file|.*generated\.json does not list) .*", message)
    assert len(evaluations) == 5
    assert start(*flags).wait() == 0
    with_what_was_kept = (run / "results.json").read_text()
    assert start(*flags).wait() == 0
    ours, theirs = (json.loads(text)["last"] for text in (with_what_was_kept, (run / "results.json").read_text()))
    assert ours == theirs


@pytest.mark.slow
def test_memory_and_open_files_stay_flat_for_200_epochs(start, tmp_path):
    run = tmp_path / "run"
    flags = [*FLAGS.replace("--subset 32", "--subset 16").split(), "--epochs", "200", "--out", run]
    process, seen = start("train.py", *flags), {}
    for epoch in (20, 195):
        assert process.until(lambda epoch=epoch: epochs_logged(run) >= epoch, seconds=3000)
        status = Path(f"/proc/{process.pid}/status").read_text()
        memory = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024
        seen[epoch] = memory, len(os.listdir(f"/proc/{process.pid}/fd"))
    assert process.wait() == 0
    print(f"MiB and open files at epoch 20 and 195: {seen}; log.csv {(run / 'log.csv').stat().st_size} bytes")
    assert seen[195][0] < seen[20][0] + 20
    assert abs(seen[195][1] - seen[20][1]) <= 1  # the file that is being written


def epochs_logged(run: Path) -> int:
    return (run / "log.csv").read_text().count("\n") - 1 if (run / "log.csv").exists() else 0
