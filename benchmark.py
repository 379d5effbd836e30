"""How fast this project is on this machine, in about three minutes on a CPU.

    python benchmark.py        # writes results/benchmark-cpu.json, or benchmark-<GPU>.json

Augmentation is compared with its usual form: Pillow and torchvision on one image at a time, one
thread each. A training step is that of train.py in its default setting, with the preprocessing of
its images; on a GPU with the networks of the README's cost table. Times are medians on random
pixels. Competing versions are timed alternately, so background load affects both. The last line
printed has what others need to know: please send it in as an issue if you ran this on a GPU.
"""

import gc
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from tabulate import tabulate
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import utils
from augment import (
    DEGREES,
    JITTER,
    OPERATIONS,
    PADDING,
    A,
    augmix,
    gaussian_noise,
    mixed_augmentation,
    preprocess,
)
from corruptions import SEVERITIES, corrupt
from evaluate import predict
from losses import METHODS
from models import build_model, recompute
from utils import torchvision

transforms, to_tensor = torchvision.transforms, torchvision.transforms.functional.to_tensor

N, SIGMA_MAX = (METHODS["magnma"].defaults[name] for name in ("n", "sigma_max"))
RUNS = (  # network, method, whether train.py recomputes it by default
    *(("resnet18", method, False) for method in METHODS),
    ("densenet121", "standard", False),
    ("densenet121", "augmix", True),
    ("densenet121", "magnma", True),
    ("inceptionv3", "standard", False),
    ("inceptionv3", "augmix", True),
    ("inceptionv3", "magnma", True),
)
AUGMENTATIONS = {
    "standard": "preprocessing",
    "augmix": "preprocessing, AugMix",
    "magnma": f"preprocessing, MAGNMA (n = {N})",
}
EPOCHS, IMAGES = 150, 50_000  # of the hours: the paper's run on CIFAR
PICTURES = 250  # for augmentation, corruptions and evaluation


# Augmentation, the usual way

USUAL_PREPROCESSING = transforms.Compose([
    transforms.RandomCrop(32, padding=PADDING), transforms.RandomHorizontalFlip(),
    transforms.ColorJitter(JITTER, JITTER, JITTER), transforms.RandomRotation(DEGREES),
])  # fmt: skip


def usual_operation(picture: Image.Image, name: str, v: float) -> Image.Image:
    """One of augment.OPERATIONS by Pillow; |v| in [0.1, 10] on AugMix's scale, signed."""
    level, shear = abs(v) / 10, 0.3 * v / 10
    right, down = (int(size / 3 * v / 10) for size in picture.size)
    if name == "posterize":
        return ImageOps.posterize(picture, 4 - int(4 * level))
    if name == "solarize":
        return ImageOps.solarize(picture, 256 - int(256 * level))
    if name in A:
        return getattr(ImageOps, name)(picture)
    if name == "rotate":
        return picture.rotate(int(30 * v / 10), Image.Resampling.BILINEAR)
    matrix = {
        "shear_x": (1, shear, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, right, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, down),
    }[name]
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return picture.transform(picture.size, affine, matrix, bilinear)


def usual_augmix(picture: Image.Image, x: Tensor, rng: np.random.Generator) -> Tensor:
    """augment.augmix of one image: picture, and the same as x (3, 32, 32) in [0, 1]."""
    m, u, mixed = rng.random(), rng.integers(1, 11), torch.zeros_like(x)
    for w in rng.dirichlet([1, 1, 1]):
        chain = picture
        for _ in range(rng.integers(1, 4)):
            v = rng.uniform(0.1, u) * rng.choice([-1, 1])
            chain = usual_operation(chain, OPERATIONS[rng.integers(len(OPERATIONS))], v)
        mixed += float(w) * to_tensor(chain)
    return (1 - m) * x + m * mixed


def usual(method: str, array: np.ndarray, rng: np.random.Generator) -> list[Tensor]:
    """`ours` of one image, uint8 (32, 32, 3); for the methods standard, augmix and magnma."""
    picture = USUAL_PREPROCESSING(Image.fromarray(array))
    x = to_tensor(picture)
    copies = [x]
    if method == "augmix":
        copies += [usual_augmix(picture, x, rng) for _ in range(2)]
    for _ in range(N if method == "magnma" else 0):
        w, v = rng.random(), rng.uniform(0.1, rng.integers(1, 11))  # Beta(1, 1) is uniform
        transformed = to_tensor(usual_operation(picture, A[rng.integers(len(A))], v))
        copies.append(x + SIGMA_MAX * rng.random() * torch.randn_like(x))
        copies.append(w * x + (1 - w) * transformed)
    return copies


def ours(method: str, u8: Tensor) -> list[Tensor]:
    """What a step's passes see of its images, uint8 (B, 3, 32, 32): x, then its copies."""
    x = preprocess(u8, True).float() / 255
    if method == "augmix":
        return [x, augmix(x), augmix(x)]
    if method == "magnma":
        noisy = [gaussian_noise(x, SIGMA_MAX) for _ in range(N)]
        return [x, *noisy, *(mixed_augmentation(x, 1.0) for _ in range(N))]
    return [x]


# Measuring


def seconds_of(
    functions: dict[str, Callable], seconds: float, threads: int
) -> dict[str, list[float]]:
    """Call the functions in turn for about `seconds`; each one's median time, one per round."""
    timers = {
        name: Timer("f()", globals={"f": f}, num_threads=threads) for name, f in functions.items()
    }
    taken, end = {name: [] for name in functions}, time.monotonic() + seconds
    while not all(taken.values()) or time.monotonic() < end:
        for name, timer in timers.items():
            run = timer.blocked_autorange(min_run_time=seconds / 5 / len(timers))
            taken[name].append(run.median)
    return taken


def augmentation(method: str, images: Tensor, u8: Tensor, seconds: float) -> dict[str, object]:
    """Images per second, of images uint8 (N, 3, 32, 32) on the CPU and of a GPU's batch u8."""
    arrays, rng = list(images.permute(0, 2, 3, 1).numpy()), np.random.default_rng(0)
    functions = {
        "usual": lambda: [usual(method, array, rng) for array in arrays],
        "ours": partial(ours, method, images),
    }
    if u8.is_cuda:
        functions["gpu"] = partial(ours, method, u8)
    taken = seconds_of(functions, seconds, threads=1)
    row = {
        "augmentation": AUGMENTATIONS[method],
        "Pillow, images/s": len(images) / median(taken["usual"]),
        "ours, images/s": len(images) / median(taken["ours"]),
        "ratio": median(a / b for a, b in zip(taken["usual"], taken["ours"], strict=True)),
    }
    return row | ({"GPU, images/s": len(u8) / median(taken["gpu"])} if u8.is_cuda else {})


def cost(arch: str, method: str) -> tuple[int, int]:
    """(passes, floating-point operations) of a step for one image, without recomputation."""
    passes = []
    with torch.device("meta"):
        f, x, y = build_model(arch, 10), torch.rand(1, 3, 32, 32), torch.zeros(1).long()
    f.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    with FlopCounterMode(display=False) as counter:
        METHODS[method](f, x, y, {})[0].backward()
    return sum(passes), counter.get_total_flops()


def training(
    arch: str, method: str, recomputed: bool, u8: Tensor, dtype: torch.dtype | None, seconds: float
) -> dict[str, object]:
    """Speed of training steps with the batch u8, beside that of large matrix products."""
    device, y = u8.device, torch.arange(len(u8), device=u8.device) % 10
    f = build_model(arch, 10).to(device, memory_format=torch.channels_last)
    if recomputed:
        recompute(f)
    sgd = utils.optimiser(f, 1e-3, 5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def step() -> None:
        x = preprocess(u8, True).float() / 255
        with utils.autocast(device, dtype):
            loss, _ = METHODS[method](f, x, y, {})
        scaler.scale(loss).backward()
        scaler.step(sgd)
        scaler.update()
        sgd.zero_grad()

    mib = None
    if u8.is_cuda:
        step()  # cuDNN tries its algorithms, and some need much memory
        torch.cuda.reset_peak_memory_stats(device)
        step()
        mib = torch.cuda.max_memory_allocated(device) / 2**20
    size = 8192 if u8.is_cuda else 1024
    a = torch.rand(size, size, device=device, dtype=dtype)
    functions = {"step": step, "matmul": lambda: a @ a, "augmentation": partial(ours, method, u8)}
    taken = seconds_of(functions, seconds, torch.get_num_threads())
    taken = {name: median(times) for name, times in taken.items()}
    f.__dict__.pop("forward", None)  # recompute's refers to f and would keep its memory in use
    rate, (passes, flops) = len(u8) / taken["step"], cost(arch, method)
    return {
        "network": arch + " --recompute" * recomputed,
        "method": method,
        "images/s": rate,
        "passes/s": passes * rate,
        "% of matmul": 100 * rate * flops / (2 * size**3 / taken["matmul"]),
        "% augmentation": 100 * taken["augmentation"] / taken["step"],
        "GPU MiB": mib,
        "hours": EPOCHS * IMAGES / rate / 3600,
    }


def send_back(about: dict, trained: list[dict]) -> str:
    """The line for an issue: card, torch, precision, then images/s, hours and MiB of each run."""
    runs = [
        f"{row['network']} {row['method']} {row['images/s']:.0f}/s {row['hours']:.2f} h"
        + (f" {row['GPU MiB']:.0f} MiB" if row["GPU MiB"] else "")
        for row in trained
    ]
    head = [about["device"], f"torch {about['versions']['torch']}", about["precision"]]
    return "; ".join([", ".join(head) + f", batch {about['batch_size']}", *runs])


def main(argv: list[str] | None = None) -> None:
    """Measure, write the JSON, print the tables and the line to send back."""
    parser = utils.Parser(description="Speed of augmentation, training, corruptions, evaluation.")
    flag = parser.add_argument
    positive = utils.number(float, above=0)
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    flag("--amp", choices=utils.AMP, default="auto", help=utils.AMP_HELP)
    flag("--batch-size", type=utils.number(int, low=1), help="by default 512 on a GPU, else 16")
    flag("--seconds", type=positive, default=120.0, help="for timing; preparing comes on top")
    flag("--out", help="the JSON file; by default results/benchmark-cpu.json or -<GPU>.json")
    args = parser.parse_args(argv)
    device, load, seconds = utils.pick_device(args.device), os.getloadavg()[0], args.seconds
    gpu, dtype = device.type == "cuda", utils.amp_dtype(args.amp, device)
    name = re.sub(r"\W+", "-", utils.describe(device).lower()) if gpu else "cpu"
    out, batch = Path(args.out or f"results/benchmark-{name}.json"), args.batch_size
    batch = batch or (512 if gpu else 16)
    utils.check_out(out)
    precision = {"precision": utils.amp_name(dtype), "batch_size": batch, "seconds": seconds}
    about = utils.provenance(device) | precision | {"load_before": load}

    utils.seed("benchmark")
    images = torch.randint(0, 256, (max(PICTURES, batch), 3, 32, 32), dtype=torch.uint8)
    u8, images = images[:batch].to(device), images[:PICTURES]
    trained, skipped = [], []
    runs = [run for run in RUNS if gpu or run[0] == "resnet18"]
    for run in runs:
        try:
            trained.append(training(*run, u8, dtype, 0.6 * seconds / len(runs)))
        except torch.OutOfMemoryError:
            skipped.append(f"{run[0]} {run[1]}")
            gc.collect()  # a recomputed network refers to itself
            torch.cuda.empty_cache()
    f = build_model("resnet18", 10).to(device, memory_format=torch.channels_last)
    functions = {"evaluation": lambda: predict(f, images, dtype=dtype)}
    taken = seconds_of(functions, 0.05 * seconds, torch.get_num_threads())
    about["evaluation, images/s"] = len(images) / median(taken["evaluation"])
    # after the networks, since the allocator then keeps freed memory, as it does during training
    augmented = [augmentation(method, images, u8, 0.1 * seconds) for method in AUGMENTATIONS]
    cv2.setNumThreads(1)
    names = [function.__name__ for function in SEVERITIES]
    arrays = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    functions = {"corrupt": lambda: [corrupt(arrays, name, 3) for name in names]}
    taken = seconds_of(functions, 0.05 * seconds, threads=1)
    about["corruptions, images/s"] = len(names) * len(arrays) / median(taken["corrupt"])

    utils.write_json(out, about | {"augmentation": augmented, "training": trained})
    for rows in (augmented, trained):
        print(tabulate(rows, "keys", floatfmt=",.1f", missingval="", numalign="right"), "\n")
    for what in ("evaluation", "corruptions"):
        print(f"{what}: {about[f'{what}, images/s']:,.0f} images/s")
    if skipped:
        print(f"skipped, out of memory: {', '.join(skipped)}. Try a smaller --batch-size")
    print(f"written to {out}\n\n{send_back(about, trained)}")


if __name__ == "__main__":
    sys.exit(utils.run_main(main))
