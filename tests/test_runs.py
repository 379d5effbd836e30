"""Run folders: atomic files, hashed checkpoints, locks, the one-line user error."""

import argparse
import os
import pickle
import signal
import subprocess
import sys
import zipfile

import pytest
import torch

import runs


def checkpoint(path, **extra):
    runs.save_checkpoint(path, {"model": {"w": torch.arange(6.0).view(2, 3)}, "epoch": 3, **extra})
    return path


def test_checkpoint_round_trip_and_plain_torch_load(tmp_path):
    path = checkpoint(tmp_path / "a.pt", rng=[1, (2, "x")], none=None)
    assert os.listdir(tmp_path) == ["a.pt"]
    for content in (runs.load_checkpoint(path, need_hash=True), torch.load(path, weights_only=True)):
        assert torch.equal(content["model"]["w"], torch.arange(6.0).view(2, 3))
        assert content["epoch"] == 3
        assert content["rng"] == [1, (2, "x")]


def test_every_damaged_byte_of_a_checkpoint_is_noticed(tmp_path):
    whole = checkpoint(tmp_path / "a.pt").read_bytes()
    damaged_file = tmp_path / "b.pt"
    reference = runs.load_checkpoint(tmp_path / "a.pt")
    unnoticed, messages = 0, set()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        damaged_file.write_bytes(damaged)
        try:
            content = runs.load_checkpoint(damaged_file, need_hash=True)
        except ValueError as error:
            messages.add(str(error))
        else:  # zip fields that nothing reads, such as dates: the content must be what it was
            unnoticed += 1
            assert torch.equal(content["model"]["w"], reference["model"]["w"])
    assert unnoticed < len(whole) / 7 / 2
    assert messages
    assert all("b.pt" in m and "\n" not in m for m in messages)


def test_a_changed_member_with_a_right_crc_is_noticed_by_the_hash(tmp_path):
    path = checkpoint(tmp_path / "a.pt")
    forged = tmp_path / "forged.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(forged, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            new.writestr(member, b"\1" * len(data) if "/data/" in member.filename else data)
    with pytest.raises(ValueError, match="SHA-256 does not match"):
        runs.load_checkpoint(forged)


@pytest.mark.parametrize("cut", [0, 1, 100, -1, -40])
def test_a_truncated_checkpoint_is_refused(tmp_path, cut):
    path = checkpoint(tmp_path / "a.pt")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="not a whole torch checkpoint"):
        runs.load_checkpoint(path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_checkpoint_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, "evil.pt")
    with pytest.raises(ValueError, match="not a whole torch checkpoint"):
        runs.load_checkpoint("evil.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="not a whole torch checkpoint"):
        runs.load_checkpoint("pickle.pt")
    assert not (tmp_path / "evil").exists()


def test_a_zip_bomb_is_refused_before_it_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(ValueError, match="compressed"):
        runs.load_checkpoint(tmp_path / "bomb.pt")


def test_checkpoints_of_other_kinds(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        runs.load_checkpoint(tmp_path / "list.pt")
    torch.save({"w": torch.ones(1)}, tmp_path / "foreign.pt")
    assert "w" in runs.load_checkpoint(tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="no SHA-256"):
        runs.load_checkpoint(tmp_path / "foreign.pt", need_hash=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        runs.load_checkpoint(tmp_path / "none.pt")


def test_atomic_write_keeps_what_was_there_when_the_block_fails(tmp_path):
    path = tmp_path / "f"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), runs.atomic_write(path) as file:
        file.write(b"half" * (1 // 0))
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["f"]


def test_a_full_disk_is_one_line_and_keeps_the_file(tmp_path, root):
    script = (
        "import resource, signal, sys, runs\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "def main():\n"
        "    with runs.atomic_write(sys.argv[1]) as f: f.write(bytes(5000))\n"
        "sys.exit(runs.run_main(main))\n"
    )
    path = tmp_path / "f"
    path.write_text("before")
    done = subprocess.run(
        [sys.executable, "-c", script, path],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot write" in done.stderr
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["f"]


def test_a_lock_is_exclusive_and_dies_with_its_process(tmp_path, root):
    script = "import runs, sys\nwith runs.lock(sys.argv[1]):\n print('held', flush=True)\n sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="in use by another process"), runs.lock(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with runs.lock(tmp_path):
        pass


def test_json_files(tmp_path):
    runs.write_json(tmp_path / "a.json", {"x": [1, 2.5, None]})
    assert runs.read_json(tmp_path / "a.json") == {"x": [1, 2.5, None]}
    with pytest.raises(ValueError):
        runs.write_json(tmp_path / "b.json", {"x": float("nan")})
    for text, message in (("[1]", "holds a JSON list"), ("{", "not valid JSON"), ("[" * 10**5, "not valid JSON")):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            runs.read_json(tmp_path / "c.json")
    with pytest.raises(ValueError, match="more than the 3"):
        runs.read_json(tmp_path / "a.json", limit_bytes=3)
    with pytest.raises(FileNotFoundError, match="no such file"):
        runs.read_json(tmp_path / "none.json")


@pytest.mark.parametrize(("text", "message"), [("x", "not a number"), ("nan", "out of range"), ("inf", "out of range"),
                                               ("0", "above 0"), ("2", "at most 1")])  # fmt: skip
def test_numeric_flags_name_the_flag_and_the_range(text, message):
    parser = runs.Parser()
    parser.add_argument("--lr", type=runs.number(float, above=0, high=1))
    with pytest.raises(ValueError, match=f"--lr.*{message}"):
        parser.parse_args(["--lr", text])
    assert parser.parse_args(["--lr", "0.5"]).lr == 0.5


def test_run_main_maps_errors_to_exit_codes(capsys):
    def raising(error):
        def main():
            raise error

        return main

    assert runs.run_main(lambda: None) == 0
    assert runs.run_main(lambda: 1) == 1
    assert runs.run_main(raising(ValueError("two\nlines"))) == 2
    assert capsys.readouterr().err.endswith(": two lines\n")
    assert runs.run_main(raising(FileNotFoundError("no such run"))) == 2
    assert runs.run_main(raising(runs.Stopped("paused", 0))) == 0
    assert runs.run_main(raising(KeyboardInterrupt())) == 130
    assert runs.run_main(raising(torch.OutOfMemoryError("CUDA out of memory"))) == 2
    assert "the GPU's memory is full; is another process on it?" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        runs.run_main(raising(ZeroDivisionError()))


def test_stop_request_notes_signals_and_time():
    with runs.StopRequest() as stop:
        assert not stop.pending()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.pending()
        assert stop.stopped("go on").exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with runs.StopRequest(minutes=1e-9) as stop:
        assert stop.pending()
        assert stop.stopped("go on").exit_code == 0
        assert "paused" in str(stop.stopped("go on"))


def test_plain_state_dict_strips_wrappers():
    state = {"module._orig_mod.conv1.weight": 1, "_orig_mod.module.fc.bias": 2, "bn1.weight": 3}
    assert runs.plain_state_dict(state) == {"conv1.weight": 1, "fc.bias": 2, "bn1.weight": 3}


def test_seeds_depend_on_the_whole_key():
    assert runs.seed_of(0, "step", 1, 2) == runs.seed_of(0, "step", 1, 2)
    assert len({runs.seed_of(s, k, t) for s in range(10) for k in ("order", "step") for t in range(10)}) == 200


def test_parser_errors_are_value_errors():
    assert issubclass(runs.Parser, argparse.ArgumentParser)
    with pytest.raises(ValueError, match="unrecognized arguments"):
        runs.Parser().parse_args(["--nonsense"])
