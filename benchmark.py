"""How fast this program is on this machine: one table and one JSON, in about four minutes.

    python benchmark.py                      # results/benchmark-cpu.json, or benchmark-<name of the GPU>.json

Times are medians by torch.utils.benchmark, on random pixels; what is compared is timed in turns, so that whatever else
the machine does falls on all of it. What was not measured reads "not run", null in the JSON. Augmentation is compared
with its usual form, one image at a time by Pillow and torchvision as in AugMix's own code, with one thread each. A step
is train.py's, with its images' preprocessing, which is made once an epoch there. A pass is one image going forward.
"""

import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
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
from augment import DEGREES, JITTER, OPERATIONS, PADDING, A, augmix, gaussian_noise, mixed_augmentation, preprocess
from corruptions import SEVERITIES, corrupt
from evaluate import predict
from losses import METHODS
from models import build_model, recompute

torchvision = utils.import_torchvision()
transforms, to_tensor = torchvision.transforms, torchvision.transforms.functional.to_tensor

N = 5
HPARAMS = {  # train.py's defaults
    "lambda1": 0.2, "lambda2": 0.3, "sigma_max": 0.2, "beta": 1.0, "n": N, "epsilon": 8 / 255, "pgd_steps": 7,
    "pgd_step_size": 2.5 * 8 / 255 / 7, "trades_lambda": 3.0, "rse_sigma": 0.1, "jsd_lambda": 12.0,
}  # fmt: skip
NOISY, MIXED = partial(gaussian_noise, sigma_max=0.2), partial(mixed_augmentation, beta=1.0)
COPIES = {  # what a method makes of the preprocessed images before its first pass
    "standard": (), "at": (), "trades": (), "rse": (NOISY,), "gn": (NOISY,), "augmix": (augmix,) * 2,
    "magnma": (NOISY,) * N + (MIXED,) * N,
}  # fmt: skip
RUNS = (("resnet18", False), ("resnet18", True), ("densenet121", True), ("inceptionv3", True))  # True: --recompute
COLUMNS = ("usual, one core", "ours, one core", "ratio", "cpu images/s", "cuda images/s", "passes/s", "% of matmul",
           "% augmentation", "cuda MiB", "hours")  # fmt: skip
NOT_RUN = dict.fromkeys(COLUMNS[3:])


# Augmentation, the usual way

USUAL_PREPROCESSING = transforms.Compose([
    transforms.RandomCrop(32, padding=PADDING), transforms.RandomHorizontalFlip(),
    transforms.ColorJitter(JITTER, JITTER, JITTER), transforms.RandomRotation(DEGREES),
])  # fmt: skip


def usual_operation(picture: Image.Image, name: str, v: float) -> Image.Image:
    """One of augment.OPERATIONS by Pillow, |v| in [0.1, 10] on AugMix's scale and its sign the direction."""
    if name in A:
        level = {"posterize": [4 - int(4 * abs(v) / 10)], "solarize": [256 - int(256 * abs(v) / 10)]}.get(name, [])
        return getattr(ImageOps, name)(picture, *level)
    if name == "rotate":
        return picture.rotate(int(30 * v / 10), Image.Resampling.BILINEAR)
    shear, pixels = 0.3 * v / 10, int(picture.width / 3 * v / 10)
    matrix = {"shear_x": (1, shear, 0, 0, 1, 0), "shear_y": (1, 0, 0, shear, 1, 0),
              "translate_x": (1, 0, pixels, 0, 1, 0), "translate_y": (1, 0, 0, 0, 1, pixels)}[name]  # fmt: skip
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def usual_augmix(picture: Image.Image, x: Tensor, rng: np.random.Generator) -> Tensor:
    """augment.augmix of one image: picture, and the same as x (3, 32, 32) in [0, 1]."""
    m, u, mixed = rng.random(), rng.integers(1, 11), torch.zeros_like(x)
    for w in rng.dirichlet([1, 1, 1]):
        chain = picture
        for _ in range(rng.integers(1, 4)):
            v = rng.uniform(0.1, u) * (1 if rng.random() < 0.5 else -1)
            chain = usual_operation(chain, OPERATIONS[rng.integers(len(OPERATIONS))], v)
        mixed += float(w) * to_tensor(chain)
    return (1 - m) * x + m * mixed


def usual(method: str, array: np.ndarray, rng: np.random.Generator) -> list[Tensor]:
    """`ours` of one image, uint8 (32, 32, 3), with the same distributions; standard, augmix and magnma."""
    picture = USUAL_PREPROCESSING(Image.fromarray(array))
    x = to_tensor(picture)
    made = [x]
    if method == "augmix":
        made += [usual_augmix(picture, x, rng) for _ in range(2)]
    for _ in range(N if method == "magnma" else 0):
        w, v = rng.random(), rng.uniform(0.1, rng.integers(1, 11))  # Beta(1, 1) is uniform
        made.append(x + 0.2 * rng.random() * torch.randn_like(x))
        made.append(w * x + (1 - w) * to_tensor(usual_operation(picture, A[rng.integers(len(A))], v)))
    return made


# Measuring


def ours(method: str, u8: Tensor) -> list[Tensor]:
    """What a step needs of its images, uint8 (B, 3, 32, 32): preprocessed, then the copies; (B, 3, 32, 32) each."""
    x = preprocess(u8, True).float() / 255
    return [x, *(make(x) for make in COPIES[method])]


def interleaved(functions: dict[str, Callable], seconds: float, threads: int = 1) -> dict[str, list[float]]:
    """Seconds of a call of each function, a median a round (Timer warms up first); at least one round."""
    timers = {name: Timer("f()", globals={"f": f}, num_threads=threads) for name, f in functions.items()}
    taken, end = {name: [] for name in functions}, time.monotonic() + seconds
    while True:
        for name, timer in timers.items():
            taken[name].append(timer.blocked_autorange(min_run_time=seconds / 5 / len(timers)).median)
        if time.monotonic() >= end:
            return taken


def augmentation(images: Tensor, u8: Tensor, seconds: float) -> list[dict]:
    """Images a second; images uint8 (N, 3, 32, 32) on the CPU, u8 a batch of them on the GPU if there is one."""
    arrays, rng, rows = list(images.permute(0, 2, 3, 1).numpy()), np.random.default_rng(0), []
    batches = {"ours": images, "gpu": u8} if u8.is_cuda else {"ours": images}
    for method, what in (("standard", "preprocessing"), ("augmix", "and AugMix"), ("magnma", f"and MAGNMA, n = {N}")):
        functions = {"usual": lambda m=method: [usual(m, array, rng) for array in arrays]}
        functions |= {name: partial(ours, method, batch) for name, batch in batches.items()}
        taken = interleaved(functions, seconds / 3)
        rows.append({
            "what": what, "usual, one core": len(images) / median(taken["usual"]),
            "ours, one core": len(images) / median(taken["ours"]),
            "ratio": median(u / o for u, o in zip(taken["usual"], taken["ours"], strict=True)),
            "cuda images/s": len(u8) / median(taken["gpu"]) if u8.is_cuda else None,
        })  # fmt: skip
    return rows


def cost(arch: str, method: str) -> tuple[int, int]:
    """(passes, floating-point operations of convolutions and matrix products) in a step of one image, unrecomputed."""
    f, passes = build_model(arch, 10), []
    f.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    with FlopCounterMode(display=False) as counter:
        METHODS[method](f, torch.rand(1, 3, 32, 32), torch.zeros(1, dtype=torch.long), HPARAMS)[0].backward()
    return sum(passes), counter.get_total_flops()


def training(arch: str, recomputed: bool, u8: Tensor, dtype: torch.dtype | None, seconds: float) -> list[dict]:
    """A row a method: its steps with the batch u8 (B, 3, 32, 32) on u8's device, beside large matrix products."""
    device, gpu, y = u8.device, u8.is_cuda, torch.arange(len(u8)).to(u8.device) % 10
    f = build_model(arch, 10).to(device, memory_format=torch.channels_last)
    if recomputed:
        recompute(f)
    sgd = utils.optimiser(f, 1e-3, 5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def step(method: str) -> None:
        x = preprocess(u8, True).float() / 255
        with utils.autocast(device, dtype):
            loss, _ = METHODS[method](f, x, y, HPARAMS)
        scaler.scale(loss).backward()
        scaler.step(sgd)
        scaler.update()
        sgd.zero_grad()

    memory = {}
    for m in COPIES if gpu else ():
        step(m)  # while cuDNN tries algorithms, some of them large
        torch.cuda.reset_peak_memory_stats(device)
        step(m)
        memory[m] = torch.cuda.max_memory_allocated(device) / 2**20
    a = torch.rand(2 * [8192 if gpu else 1024], device=device).to(dtype or torch.float32)
    functions = {"matmul": lambda: a @ a} | {m: partial(step, m) for m in COPIES}
    functions |= {f"augmentation, {m}": partial(ours, m, u8) for m in COPIES}
    taken = {name: median(times) for name, times in interleaved(functions, seconds, torch.get_num_threads()).items()}

    rows, matmul = [], 2 * len(a) ** 3 / taken["matmul"]
    for m in COPIES:
        rate, (passes, flops) = len(u8) / taken[m], cost(arch, m)
        rows.append({
            **NOT_RUN, "what": f"{arch}{' --recompute' * recomputed}, {m}", "arch": arch, "recompute": recomputed,
            "method": m, "passes": passes, "GFLOP": flops / 1e9, "matmul GFLOP/s": matmul / 1e9,
            f"{device.type} images/s": rate, "passes/s": passes * rate, "% of matmul": 100 * rate * flops / matmul,
            "% augmentation": 100 * taken[f"augmentation, {m}"] / taken[m], "cuda MiB": memory.get(m),
            "hours": 150 * 50_000 / rate / 3600,
        })  # fmt: skip
    f.__dict__.pop("forward", None)  # which holds f, whose memory would be counted with the next network's
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, write the JSON, print the table."""
    parser = utils.Parser(description="Speed of augmentation, training, corruptions and evaluation on this machine.")
    flag = parser.add_argument
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    flag("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision, as in train.py")
    flag("--batch-size", type=utils.number(int, low=1), help="of a training step; by default 512 on a GPU, else 16")
    flag("--seconds", type=utils.number(float, above=0), default=120.0, help="of timing; preparing comes on top")
    flag("--out", help="the JSON; by default results/benchmark-cpu.json or results/benchmark-<GPU>.json")
    args = parser.parse_args(argv)
    device, load, seconds = utils.pick_device(args.device), os.getloadavg()[0], args.seconds
    gpu, dtype, threads = device.type == "cuda", utils.amp_dtype(args.amp, device), torch.get_num_threads()
    name = re.sub(r"\W+", "-", utils.describe(device).lower()) if gpu else "cpu"
    out, batch = args.out or f"results/benchmark-{name}.json", args.batch_size or (512 if gpu else 16)
    about = utils.provenance(device) | {"precision": utils.amp_name(dtype), "threads": threads, "load_before": load}
    utils.seed("benchmark")
    images = torch.randint(0, 256, (15 * batch, 3, 32, 32), dtype=torch.uint8)
    u8, arrays = images[:batch].to(device), np.ascontiguousarray(images[:250].permute(0, 2, 3, 1).numpy())

    cv2.setNumThreads(1)
    taken = interleaved({"all": lambda: [corrupt(arrays, c.__name__, 3, 0) for c in SEVERITIES]}, 0.05 * seconds)["all"]
    rate = len(SEVERITIES) * len(arrays) / median(taken)
    corruptions = [{"what": f"{len(SEVERITIES)} corruptions", "ours, one core": rate}]
    augmentations = augmentation(images[:250], u8, 0.3 * seconds)
    timed, left_out = (RUNS, ()) if gpu else (RUNS[:1], RUNS[1:])
    trained = [row for run in timed for row in training(*run, u8, dtype, 0.6 * seconds / len(timed))]
    trained += [{"what": f"{arch}{' --recompute' * recomputed}", **NOT_RUN} for arch, recomputed in left_out]
    f = build_model("resnet18", 10).to(device, memory_format=torch.channels_last)
    taken = interleaved({"all": lambda: predict(f, images, dtype=dtype)}, 0.05 * seconds, threads)["all"]
    evaluation = [{"what": "resnet18, evaluation", "cpu images/s": None, "cuda images/s": None}]
    evaluation[0][f"{device.type} images/s"] = len(images) / median(taken)

    about |= {"batch_size": batch, "seconds": seconds, "augmentation": augmentations, "corruptions": corruptions}
    rows = (*augmentations, *corruptions, *evaluation, *trained)  # a column that a row does not have is blank
    cells = [{column: row.get(column, "") for column in ("what", *COLUMNS)} for row in rows]
    print(tabulate(cells, "keys", floatfmt=",.1f", missingval="not run", numalign="right", maxheadercolwidths=12))
    print(f"\n{about['device']}, torch {torch.__version__}, precision {about['precision']}, batch {batch}, load"
          f" {load:.1f} before; hours of 150 epochs. {out}")  # fmt: skip
    utils.write_json(out, about | {"evaluation": evaluation, "training": trained})


if __name__ == "__main__":
    sys.exit(utils.run_main(main))
