"""What every script needs: seeds, whole files, torchvision, devices and precision, one-line errors, provenance."""

import hashlib
import os
import resource
import sys
import types

import pytest
import torch

import utils


def test_seed_depends_on_its_key_alone():
    def draw(*key):
        utils.seed(*key)
        return torch.rand(4).tolist()

    assert draw(0, 3) == draw(0, 3)
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, "fog", 1), (0, "fog", 2)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    utils.seed(0, 3)  # the same in any process: Python's hash() is not
    assert torch.initial_seed() == int.from_bytes(hashlib.sha256(b"(0, 3)").digest()[:8], "little")


def test_atomic_write_takes_the_files_place_or_leaves_all_as_it_was(tmp_path):
    path = tmp_path / "new" / "f"
    with utils.atomic_write(path) as file:
        file.write(b"before")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), utils.atomic_write(path) as file:
        file.write(b"half" * (1 // 0))
    assert path.read_bytes() == b"before"
    assert os.listdir(path.parent) == ["f"]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"pipe: it is no regular file"), utils.atomic_write(tmp_path / "pipe"):
        pass
    assert not (tmp_path / "pipe").is_file()


def test_a_disk_that_fills_keeps_the_last_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    utils.save_checkpoint(path, {"epoch": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limit[1]))  # half of the next one fits
    try:
        with pytest.raises(OSError, match=r"cannot write .*last\.pt: File too large; what was there before is kept"):
            utils.save_checkpoint(path, {"epoch": 2, "model": {"w": torch.zeros(10000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert utils.load_checkpoint(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_json_is_of_finite_numbers(tmp_path):
    utils.write_json(tmp_path / "a.json", {"x": [1, 2.5, None]})
    with pytest.raises(ValueError, match="nan"):
        utils.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert utils.read_json(tmp_path / "a.json") == {"x": [1, 2.5, None]}


def test_torchvisions_operators_are_declared_only_where_they_do_not_fit(monkeypatch, tmp_path):
    """A second declaration would abort the process. (That its import works elsewhere, all other tests show.)"""
    monkeypatch.setattr(torch.library, "Library", None)  # calling it would fail
    fits = types.ModuleType("torchvision")
    monkeypatch.setitem(sys.modules, "torchvision", fits)
    assert utils.import_torchvision() is fits
    monkeypatch.delitem(sys.modules, "torchvision")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('something else')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="something else"):
        utils.import_torchvision()


def test_precision(monkeypatch):
    cpu, card = torch.device("cpu"), torch.device("cuda", 0)
    names = {amp: utils.amp_name(utils.amp_dtype(amp, cpu)) for amp in ("auto", "bf16", "fp16", "off")}
    assert names == {"auto": "off", "bf16": "bf16", "fp16": "fp16", "off": "off"}
    for capability, name in (((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert utils.amp_name(utils.amp_dtype("auto", card)) == name
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    for dtype, wanted in ((torch.bfloat16, torch.bfloat16), (None, torch.float32)):
        with utils.autocast(cpu, dtype):
            assert layer(x).dtype is wanted


def test_a_gpu_that_this_torch_has_no_kernels_for(monkeypatch):
    def refuse(device):
        raise RuntimeError(f"CUDA error {device.index}: no kernel image\nis available")

    monkeypatch.setenv("LOCAL_RANK", "1")  # of torchrun's second process
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    for name, index in (("cuda", 1), ("cuda:2", 2)):
        with pytest.raises(ValueError, match=rf"--device {name}: .* does not run on this GPU \(CUDA error {index}: no"):
            utils.pick_device(name)


def test_run_main_ends_in_one_line_and_an_exit_code(capsys, monkeypatch):
    def end(error):
        def main():
            raise error

        return utils.run_main(main), capsys.readouterr().err

    monkeypatch.setattr(sys, "argv", ["some/train.py"])
    assert [utils.run_main(lambda code=code: code) for code in (None, 0, 1)] == [0, 0, 1]
    assert end(ValueError("two\nlines")) == (2, "train.py: two lines\n")
    assert end(FileNotFoundError("no such run")) == (2, "train.py: no such run\n")
    assert end(KeyboardInterrupt()) == (130, "train.py: interrupted\n")
    code, line = end(torch.OutOfMemoryError("CUDA\nout of memory"))
    assert (code, "GPU's memory is full" in line, line.count("\n")) == (2, True, 1)
    with pytest.raises(ZeroDivisionError):  # an error of ours keeps its traceback
        end(ZeroDivisionError())


def test_provenance_is_plain_strings_that_a_checkpoint_may_hold(tmp_path):
    about = utils.provenance(torch.device("cpu"))
    assert about.keys() == {"device", "versions", "commit"}
    assert about["versions"].keys() == {"python", "torch", "numpy", "scipy", "cuda"}
    utils.save_checkpoint(tmp_path / "a.pt", about)
    assert utils.load_checkpoint(tmp_path / "a.pt") == about
