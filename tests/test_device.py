"""What the machine offers: torchvision's import, devices, mixed precision, and the README's names."""

import re
import subprocess
import sys
import types

import pytest
import torch

import device

FILE_TYPES = ("py", "json", "sh", "md", "csv", "pt")


def test_torchvision_is_taken_as_it_is_where_it_fits(monkeypatch):
    """Declaring its operators beside a matching torchvision would abort the process."""
    fake = types.ModuleType("torchvision")
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    monkeypatch.setattr(torch.library, "Library", None)  # calling it would fail
    assert device.import_torchvision() is fake


def test_other_errors_of_torchvision_are_not_hidden(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('something else')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(RuntimeError, match="something else"):
        device.import_torchvision()


def test_torchvision_imports_twice_in_a_new_process(root):
    code = (
        "from device import import_torchvision as load\n"
        "assert load() is load()\n"
        "import torchvision.models, torchvision.transforms\n"
        "print(torchvision.models.resnet18(num_classes=2).fc.out_features)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "2\n", done.stderr


@pytest.mark.parametrize(
    ("name", "message"), [("tpu", "no such device"), ("meta", "not supported"), ("cuda:99", "CUDA devices here")]
)
def test_devices_that_are_not_there(name, message):
    with pytest.raises(ValueError, match=message):
        device.pick_device(name)


def test_a_gpu_that_torch_has_no_kernels_for_and_one_gpu_for_several_processes(monkeypatch):
    for name, value in (("is_available", True), ("device_count", 2), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)

    def no_kernel(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors")

    monkeypatch.setattr(torch, "ones", no_kernel)
    with pytest.raises(ValueError, match=r"--device cuda.*no kernel image.*README names a build for V100s"):
        device.pick_device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--device cuda:1: torchrun gives each process its own GPU"):
        device.pick_device("cuda:1")


def test_mixed_precision_on_a_cpu():
    cpu = device.pick_device("cpu")
    assert device.amp_dtype("auto", cpu) is None
    assert device.amp_dtype("off", cpu) is None
    assert device.amp_dtype("bf16", cpu) is torch.bfloat16
    with pytest.raises(ValueError, match="--amp fp16 needs a GPU"):
        device.amp_dtype("fp16", cpu)
    with pytest.raises(ValueError, match="--amp int8"):
        device.amp_dtype("int8", cpu)
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    with device.autocast(cpu, torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    with device.autocast(cpu, None):
        assert layer(x).dtype is torch.float32


def test_mixed_precision_follows_the_card(monkeypatch):
    cuda = torch.device("cuda", 0)
    for capability, wanted in (((7, 0), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert device.amp_dtype("auto", cuda) is wanted


def test_one_process_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert device.init_distributed("cpu") == (0, 1)


def test_every_name_in_the_readme_exists(root):
    """The table from the paper to the code: each `module.name` is there, and each file."""
    text = (root / "README.md").read_text()
    modules = {path.stem for path in root.glob("*.py")} | {"models"}
    names = {m for m in re.findall(r"`(\w+)\.(\w+)`", text) if m[0] in modules and m[1] not in FILE_TYPES}
    assert len(names) > 25
    for module, name in sorted(names):
        assert hasattr(__import__(module), name), f"{module}.{name}"
    for file in re.findall(r"`((?:tests/|paper/|results/)?\w+\.(?:py|sh|cff|txt))`", text):
        assert (root / file).exists() or (root / "results" / "small" / file).exists(), file


def test_no_file_imports_torchvision_past_the_one_place(root):
    for path in [*root.glob("*.py"), *root.glob("models/*.py")]:
        if path.name not in ("device.py", "usual.py"):
            assert not re.search(r"^\s*(import torchvision|from torchvision)", path.read_text(), re.M), path.name
