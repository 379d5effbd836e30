"""make_corrupted.py: the folder it writes, kept through kills, signals and a full disk, and the official one."""

import functools
import hashlib
import http.server
import importlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

import corruptions
import data
import make_corrupted
import runs
from corruptions import corrupt

IMAGES = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)


def generate(folder, names=("contrast", "shot_noise", "spatter"), seed=3, images=None, **options):
    """A small set; its clean images are IMAGES."""
    images = IMAGES if images is None else images
    labels = np.arange(len(images)) % 10
    make_corrupted.generate(folder, images, labels, names, seed=seed, facts={"dataset": "digits"}, **options)


def content(folder):
    """Every file's bytes; nothing but the set and its lock may be there."""
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}
    assert not [name for name in files if not name.endswith((".npy", ".json"))]
    return files


def test_a_set_has_the_official_format_and_a_record(tmp_path):
    generate(tmp_path, names=["fog", "gaussian_blur"])
    assert set(content(tmp_path)) == {"fog.npy", "gaussian_blur.npy", "labels.npy", "generated.json"}
    fog, labels = np.load(tmp_path / "fog.npy"), np.load(tmp_path / "labels.npy")
    assert (fog.dtype, fog.shape, labels.dtype) == (np.uint8, (45, 32, 32, 3), np.uint8)
    assert labels.tolist() == 5 * list(range(9))
    for severity in range(1, 6):
        assert (fog[9 * severity - 9 : 9 * severity] == corrupt(IMAGES, "fog", severity, 3)).all()
    record = json.loads((tmp_path / "generated.json").read_text())
    assert (record["seed"], record["images"], record["dataset"]) == (3, 9, "digits")
    assert set(record["versions"]) == {"python", "numpy", "scipy", "opencv", "pillow"}
    assert record["files"] == {
        name: hashlib.sha256(data).hexdigest() for name, data in content(tmp_path).items() if name.endswith(".npy")
    }


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(corruptions, "CHUNK", 5)
    images = np.concatenate([IMAGES, IMAGES[::-1], IMAGES[:6]])  # 24
    for workers in (1, 2, 3):
        generate(tmp_path / str(workers), names=data.ALL_CORRUPTIONS, images=images, workers=workers)
    assert len(content(tmp_path / "1")) == 21
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")


def test_whole_files_are_kept_and_damaged_or_missing_ones_made_again(tmp_path):
    generate(tmp_path)
    whole = content(tmp_path)
    kept = (tmp_path / "shot_noise.npy").stat().st_mtime_ns
    (tmp_path / "contrast.npy").write_bytes(whole["contrast.npy"][:-1] + b"?")
    (tmp_path / "spatter.npy").unlink()
    (tmp_path / ".fog.npy.abc.tmp").write_bytes(b"half")
    generate(tmp_path)
    assert content(tmp_path) == whole
    assert (tmp_path / "shot_noise.npy").stat().st_mtime_ns == kept


def test_more_corruptions_join_a_set(tmp_path):
    generate(tmp_path, names=["contrast"])
    generate(tmp_path, names=["contrast", "fog"])
    generate(tmp_path, names=["contrast"])
    assert set(runs.read_json(tmp_path / "generated.json")["files"]) == {"contrast.npy", "fog.npy", "labels.npy"}


def test_a_set_made_otherwise_is_refused_until_overwritten(tmp_path):
    generate(tmp_path, names=["contrast", "fog"])
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"was made with seed 3, not 4; --overwrite replaces it, --data names another"):
        generate(tmp_path, seed=4)
    with pytest.raises(ValueError, match=r"was made from other test images; --overwrite"):
        generate(tmp_path, images=IMAGES[:5])
    assert content(tmp_path) == before
    generate(tmp_path, names=["contrast"], seed=4, overwrite=True)
    assert set(content(tmp_path)) == {"contrast.npy", "labels.npy", "generated.json"}
    assert content(tmp_path)["contrast.npy"] == before["contrast.npy"]  # draws nothing


def test_a_set_begun_with_other_versions_is_refused_unless_it_is_whole(tmp_path):
    generate(tmp_path, names=["contrast", "fog"])
    record = json.loads((tmp_path / "generated.json").read_text())
    record["versions"]["numpy"] = "1.0"
    (tmp_path / "generated.json").write_text(json.dumps(record))
    generate(tmp_path, names=["fog"])
    with pytest.raises(ValueError, match=r"was begun with other versions of the libraries; --overwrite"):
        generate(tmp_path, names=["fog", "snow"])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("official.json", "{}", "holds the official set; --overwrite replaces it"),
        ("fog.npy", "", "holds arrays without a generated.json, so another program made them; --overwrite"),
        ("generated.json", "{", "generated.json is not valid JSON"),
        ("generated.json", "{}", "was made from other test images"),
    ],
)
def test_anothers_files_are_refused(tmp_path, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        generate(tmp_path)
    assert (tmp_path / file).read_text() == text
    generate(tmp_path, names=["contrast"], overwrite=True)


def test_a_record_without_files_is_refused(tmp_path):
    generate(tmp_path, names=["contrast"])
    record = json.loads((tmp_path / "generated.json").read_text())
    for files in (None, ["contrast.npy"], {"contrast.npy": 3, "../x": "y"}):
        (tmp_path / "generated.json").write_text(json.dumps(record | {"files": files}))
        with pytest.raises(ValueError, match=r"the record in .* lists no files with their SHA-256; --overwrite"):
            generate(tmp_path, names=["contrast"])


def test_a_folder_in_use_is_refused(tmp_path):
    with runs.lock(tmp_path), pytest.raises(ValueError, match="is in use by another process"):
        generate(tmp_path)


def test_a_reader_sees_whole_files_or_none(tmp_path):
    done, seen = threading.Event(), {}

    def read():
        while not done.is_set():
            for path in tmp_path.glob("*.npy"):
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                assert digest == json.loads((tmp_path / "generated.json").read_text())["files"][path.name]
                seen[path.name] = seen.get(path.name, 0) + 1
        done.result = "ended well"

    reader = threading.Thread(target=read)
    reader.start()
    generate(tmp_path, names=["contrast", "fog", "frost", "shot_noise", "snow", "glass_blur"])
    time.sleep(0.1)
    done.set()
    reader.join()
    assert done.result == "ended well"
    assert len(seen) == 7


def test_workers_import_neither_torch_nor_the_modules_that_need_it(root):
    code = "import sys, make_corrupted; print({'torch', 'runs', 'data', 'sklearn'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("set()\n", "")


# The script as a process

FORK = multiprocessing.get_context("fork")  # a fresh interpreter would spend most of its time importing torch


def run_apart(folder, workers, names):
    """generate() in a process group of its own, as a script: its exit code, its error line in <folder>.err."""
    os.setsid()
    sys.argv, images = ["corruptions.py"], np.tile(IMAGES, (20, 1, 1, 1))
    with open(f"{folder}.err", "w") as errors, redirect_stderr(errors), redirect_stdout(io.StringIO()):
        code = runs.run_main(lambda: generate(folder, names, images=images, workers=workers))
    sys.exit(code)


@pytest.fixture
def start(tmp_path):
    """Starts run_apart on tmp_path / "set"."""

    def start_set(workers, names=("fog", "contrast", "elastic_transform", "glass_blur", "snow", "shot_noise")):
        process = FORK.Process(target=run_apart, args=(tmp_path / "set", workers, names))
        process.start()
        return process

    return start_set


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def group_is_gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def check_kills(start, folder, kills):
    """kills: (workers, what to wait for before SIGKILL) of one process after the other; the last is left to end."""
    for workers, moment in kills:
        process = start(workers)
        moment()
        process.kill()
        process.join()
        wait_for(lambda group=process.pid: group_is_gone(group))  # workers do not outlive their parent
    last = start(1)
    last.join()
    assert last.exitcode == 0
    killed = content(folder)
    shutil.rmtree(folder)
    start(1).join()
    assert killed == content(folder)


def test_kills_and_restarts_change_no_byte(start, tmp_path):
    folder = tmp_path / "set"

    def after(files, pattern="*.npy"):
        return lambda: wait_for(lambda: len(list(folder.glob("*.npy"))) >= files and list(folder.glob(pattern)))

    check_kills(start, folder, [(1, after(2)), (2, after(3)), (1, after(4, ".*.tmp"))])


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_byte(start, tmp_path):
    rng = np.random.default_rng()
    check_kills(start, tmp_path / "set", [(n % 3 + 1, lambda: time.sleep(rng.uniform(0, 2))) for n in range(20)])


@pytest.mark.parametrize(("number", "code", "workers"), [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 1)])
def test_a_signal_ends_it_with_one_line_and_no_litter(start, tmp_path, number, code, workers):
    process = start(workers)
    wait_for((tmp_path / "set" / "contrast.npy").exists)
    os.killpg(process.pid, number)  # as a terminal does: workers get it, too
    process.join()
    assert process.exitcode == code
    line = f"corruptions.py: stopped by {number.name}; finished files are kept, the same command goes on\n"
    assert (tmp_path / "set.err").read_text() == line
    wait_for(lambda: group_is_gone(process.pid))
    assert "shot_noise.npy" not in content(tmp_path / "set")


def test_a_full_disk_gives_one_line_and_keeps_what_is_whole(tmp_path, root):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    command = [sys.executable, "corruptions.py", "--dataset", "digits", "--data", tmp_path, "--workers", "1"]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, preexec_fn=small_files)
    file = tmp_path / "DIGITS-C" / "brightness.npy"
    assert ended.stderr == f"corruptions.py: cannot write {file}: File too large; what was there before is kept\n"
    assert ended.returncode == 2
    assert set(content(file.parent)) == {"labels.npy", "generated.json"}


def test_a_dead_worker_gives_one_line(tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text("import os\n\n\ndef die(*_):\n    os.kill(os.getpid(), 9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(corruptions, "corrupt", importlib.import_module("dying").die)
    monkeypatch.setattr(corruptions, "CHUNK", 5)
    with pytest.raises(OSError, match=r"a worker process was killed .too little memory.*; run it again"):
        generate(tmp_path / "set", workers=2)


# Flags


@pytest.fixture
def few_digits(monkeypatch):
    """load_dataset gives five images, so that main ends soon."""
    whole = data.load_dataset("digits", "unused")
    few = types.SimpleNamespace(
        test_images=whole.test_images[:5], test_labels=whole.test_labels[:5], source=whole.source
    )
    monkeypatch.setattr(data, "load_dataset", lambda name, root: few)
    return few


def test_main_writes_eighteen_and_with_all19_nineteen(tmp_path, few_digits, capsys):
    flags = ["--dataset", "digits", "--data", str(tmp_path), "--workers", "1"]
    make_corrupted.main(flags)
    folder = tmp_path / "DIGITS-C"
    names = {path.stem for path in folder.glob("*.npy")} - {"labels"}
    assert names == set(data.CORRUPTIONS)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"{folder}: 18 corruptions of 5 images at five severities, seed 0"
    )
    make_corrupted.main([*flags, "--all19"])
    assert (folder / "gaussian_noise.npy").exists()
    record = runs.read_json(folder / "generated.json")
    assert (record["dataset"], record["data_source"]) == ("digits", "embedded")
    assert record["frost"] == "photographs of imagecorruptions 1.1.2"
    clean = few_digits.test_images.permute(0, 2, 3, 1).numpy()
    assert (np.load(folder / "snow.npy")[10:15] == corrupt(clean, "snow", 3, 0)).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "--workers: 0 is out of range, it must be at least 1"),
        (["--workers", "two"], "--workers: 'two' is not a whole number"),
        (["--seed", "-1"], "--seed: -1 is out of range, it must be at least 0"),
        (["--dataset", "mnist"], "--dataset: invalid choice: 'mnist'"),
        (["--dataset", "digits", "--download"], "--download: there is no official corrupted set of digits"),
    ],
)
def test_bad_flags_are_refused_by_name(flags, message):
    with pytest.raises(ValueError, match=message):
        make_corrupted.main(flags)


# The official sets


@pytest.fixture
def archive(tmp_path):
    """A tiny CIFAR-10-C.tar served over HTTP: (url, size, md5, its files)."""
    rng = np.random.default_rng(0)
    files = {}
    with tarfile.open(tmp_path / "official.tar", "w") as tar:
        for file in make_corrupted.FILES:
            shape = (50,) if file == "labels.npy" else (50, 32, 32, 3)
            np.save(buffer := io.BytesIO(), rng.integers(0, 10, shape, np.uint8))
            files[file] = buffer.getvalue()
            member = tarfile.TarInfo(f"CIFAR-10-C/{file}")
            member.size = len(files[file])
            tar.addfile(member, io.BytesIO(files[file]))
    whole = (tmp_path / "official.tar").read_bytes()
    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/official.tar", len(whole), hashlib.md5(whole).hexdigest(), files
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_the_official_set_is_fetched_and_recorded(tmp_path, archive):
    url, size, md5, files = archive
    folder = tmp_path / "data" / "CIFAR-10-C"
    make_corrupted.fetch_official(folder, url, size, md5)
    got = content(folder)
    record = json.loads(got.pop("official.json"))
    assert got == files
    hashes = {name: hashlib.sha256(part).hexdigest() for name, part in files.items()}
    assert record == {"url": url, "md5": md5, "files": hashes}
    assert [path.name for path in folder.parent.iterdir()] == ["CIFAR-10-C"]  # the archive is gone

    make_corrupted.fetch_official(folder, "http://127.0.0.1:9/nothing", size, md5)  # complete: no download
    (folder / "fog.npy").unlink()
    make_corrupted.fetch_official(folder, url, size, md5)
    assert (folder / "fog.npy").read_bytes() == files["fog.npy"]
    with pytest.raises(ValueError, match="holds the official set"):
        generate(folder)


def test_an_archive_of_another_md5_leaves_no_record(tmp_path, archive):
    url, size, _, _ = archive
    folder = tmp_path / "data" / "CIFAR-10-C"
    with pytest.raises(ValueError, match="has md5 "):
        make_corrupted.fetch_official(folder, url, size, "0" * 32)
    assert content(folder) == {}


def test_the_official_set_does_not_replace_a_generated_one_unasked(tmp_path, archive):
    url, size, md5, files = archive
    folder = tmp_path / "CIFAR-10-C"
    generate(folder, names=["contrast"])
    with pytest.raises(ValueError, match="holds a set that is not the official one; --overwrite replaces it"):
        make_corrupted.fetch_official(folder, url, size, md5)
    make_corrupted.fetch_official(folder, url, size, md5, overwrite=True)
    assert set(content(folder)) == {*files, "official.json"}


def test_main_knows_the_official_archives(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(make_corrupted, "fetch_official", lambda *a, **k: asked.append((*a, k)))
    make_corrupted.main(["--dataset", "cifar100", "--data", str(tmp_path), "--download"])
    url = "https://zenodo.org/records/3555552/files/CIFAR-100-C.tar?download=1"
    md5 = "11f0ed0f1191edbf9fa23466ae6021d3"
    assert asked == [(tmp_path / "CIFAR-100-C", url, 2918473216, md5, {"overwrite": False})]
    url = "https://zenodo.org/records/2535967/files/CIFAR-10-C.tar?download=1"
    assert make_corrupted.OFFICIAL["cifar10"] == (url, 2918471680, "56bf5dcef84df0e2308c6dcbcbbd8499")
