"""Algorithm 1: train one network by one method, from flags to checkpoint.

    python train.py --method magnma --arch densenet121              # the paper's recipe, CIFAR-10 under data/
    python train.py --method magnma --lambda2 0                     # MAGNMA with the noise regulariser only
    python train.py --dataset digits --arch resnet20 --epochs 3     # nothing to download, runs on any CPU
    torchrun --nproc-per-node 2 train.py --method augmix            # one run on two GPUs
    python train.py --method magnma --resume                        # go on where an interrupted run stopped

Sec. 4: SGD with Nesterov momentum 0.9, weight decay 5e-4, batches of 128, learning rate 0.1 divided by 10 every third
of the epochs (every 50 of 150). Writes runs/<dataset>/<arch>/<method>[-<tag>]/seed<k>/: config.json, log.csv,
timing.csv, last.pt and best.pt (the epoch with the best clean test accuracy, as the paper selects it).

The draws of a step depend on (seed, epoch, step) alone and images stay on the device as uint8: a run repeats bit for
bit on a CPU, whether it was interrupted or not, and is the same run on one device or several, up to batch norm
and Inception's dropout, which draws from torch's own generator.
"""

import argparse
import itertools
import random
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import device as hardware
import runs
from augment import apply_preprocessing, preprocess
from checkpoints import Saver
from data import DATASETS, Dataset, load_dataset
from draws import Draws
from evaluate import ensemble, predict
from losses import METHODS
from models import ARCHS, build_model

MOMENTUM = 0.9
GO_ON = "the same command with --resume goes on from here"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, each checked for its range. Raises ValueError naming the flag."""
    at_least, above = (lambda kind, low: runs.number(kind, low=low)), (lambda low: runs.number(float, above=low))
    parser = runs.Parser(description="Train one network by one method (Algorithm 1 of the paper).")
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="cifar10", help="digits needs no download")
    add("--data", default="data", help="folder of the data sets")
    add("--method", choices=tuple(METHODS), default="magnma", help="the training criterion, Eq. (1)-(6) and (12)")
    add("--arch", choices=ARCHS, default="resnet18", help="the network")
    add("--seed", type=at_least(int, 0), default=0, help="of the weights and of every draw")
    add("--epochs", type=at_least(int, 1), default=150, help="T of Algorithm 1")
    add("--batch-size", type=at_least(int, 1), default=128, help="|B| of Algorithm 1, over all devices")
    add("--lr", type=above(0), default=0.1, help="first learning rate, divided by 10 every max(1, epochs // 3) epochs")
    add("--weight-decay", type=at_least(float, 0), default=5e-4, help="of SGD")
    add("--lambda1", type=at_least(float, 0), default=0.2, help="MAGNMA: weight of the noise regulariser; 0 skips it")
    add("--lambda2", type=at_least(float, 0), default=0.3, help="MAGNMA: weight of the mixed augmentations; 0 skips it")
    add("--sigma-max", type=at_least(float, 0), default=0.2, help="MAGNMA, GN: noise level, on pixels in [0, 1]")
    add("--beta", type=above(0), default=1.0, help="MAGNMA: w ~ Beta(beta, beta) mixes x with T_a(x)")
    add("--n", type=at_least(int, 0), default=5, help="MAGNMA: samples per regulariser")
    add("--epsilon", type=at_least(float, 0), default=8 / 255, help="AT, TRADES: l_inf radius, on pixels in [0, 1]")
    add("--pgd-steps", type=at_least(int, 0), default=7, help="AT, TRADES")
    add("--pgd-step-size", type=at_least(float, 0), help="AT, TRADES; by default 2.5 epsilon / steps")
    add("--trades-lambda", type=at_least(float, 0), default=6.0, help="TRADES: weight of the robust term")
    add("--rse-sigma", type=at_least(float, 0), default=0.1, help="RSE: noise level, on pixels in [0, 1]")
    add("--rse-samples", type=at_least(int, 1), default=10, help="RSE: draws averaged at test time")
    add("--jsd-lambda", type=at_least(float, 0), default=12.0, help="AugMix: weight of the Jensen-Shannon divergence")
    add("--subset", type=at_least(int, 1), help="train on the first N images only")
    add("--accumulate", type=at_least(int, 1), default=1, help="split each batch's images into K micro-batches, to save"
        " memory: the same loss up to batch-norm statistics, which are then those of a micro-batch")
    add("--sync-bn", action="store_true", help="batch-norm statistics over all devices (torchrun on GPUs)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision of the network; auto:"
        " bf16 where the GPU has it, else fp16, off on a CPU")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; by default on CUDA")
    add("--tag", help="of the run's folder; by default told from MAGNMA's hyperparameters")
    add("--out", help="the run's folder; by default runs/<dataset>/<arch>/<method>[-<tag>]/seed<k>")
    places = [f"{dataset}/{arch}" for dataset in DATASETS for arch in ARCHS]
    add("--stands-for", choices=places, metavar="DATASET/ARCH",
        help="what this run stands in for, when only the machinery is tried")
    add("--resume", action="store_true", help="go on where the run stopped; from the start if there is nothing yet")
    add("--overwrite", action="store_true", help="delete what is in the run's folder and start again")
    add("--max-minutes", type=above(0), help="save and stop after this time; --resume goes on")
    args = parser.parse_args(argv)
    if args.method == "magnma" and args.n == 0 and (args.lambda1 > 0 or args.lambda2 > 0):
        raise ValueError("--n 0 with a positive --lambda1 or --lambda2: MAGNMA needs at least one sample")
    if args.accumulate > args.batch_size:
        raise ValueError(f"--accumulate {args.accumulate} is more than the {args.batch_size} images of --batch-size")
    if args.resume and args.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if args.pgd_step_size is None:
        args.pgd_step_size = 2.5 * args.epsilon / max(1, args.pgd_steps)
    if args.tag is None:
        args.tag = magnma_tag(args) if args.method == "magnma" else ""
    return args


def magnma_tag(args: argparse.Namespace) -> str:
    """The folder's tag for MAGNMA's hyperparameters: none for both, `noise`, `mix` (Table 3), else Table 5's values."""
    setting = (args.lambda1, args.lambda2, args.sigma_max, args.beta)
    names = {(0.2, 0.3, 0.2, 1.0): "", (0.2, 0.0, 0.2, 1.0): "noise", (0.0, 5.0, 0.2, 1.0): "mix"}
    tag = names.get(setting, "l1_{:g}-l2_{:g}-s_{:g}-b_{:g}".format(*setting))
    return tag if args.n == 5 else "-".join(filter(None, (tag, f"n_{args.n}")))


def learning_rate(lr: float, t: int, epochs: int) -> float:
    """eta_t of Algorithm 1 in epoch t = 0 ... epochs - 1: divided by 10 every max(1, epochs // 3) epochs (Sec. 4)."""
    return lr * 0.1 ** (t // max(1, epochs // 3))


def shares(start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """`parts` consecutive ranges of [start, stop), as equal as can be; those left without a row are empty."""
    cuts = [start + (stop - start) * k // parts for k in range(parts + 1)]
    return list(itertools.pairwise(cuts))


def train_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: dict,
    *,
    hflip: bool,
    seed: int,
    rank: int = 0,
    world: int = 1,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    apply: Callable[..., Tensor] = apply_preprocessing,
) -> tuple[Tensor, Tensor]:
    """The loss of one batch and its gradient, up to the update of theta.

    images uint8 (|B|, 3, 32, 32) and labels (|B|,) are the whole batch; this rank takes its share of the rows, in
    `accumulate` micro-batches, and of the draws, which depend on `seed` alone. Returns this rank's (sum of losses,
    number of correct predictions), on the device: nothing here waits for it.
    """
    total, device = len(images), images.device
    loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)
    micro_batches = [m for m in shares(*shares(0, total, world)[rank], config["accumulate"]) if m[0] < m[1]]
    for k, (start, stop) in enumerate(micro_batches):
        draws = Draws.seeded(seed, device, start=start, count=stop - start, total=total)
        x = preprocess(images[start:stop], hflip, draws, apply).float() / 255
        y = labels[start:stop]
        last = k == len(micro_batches) - 1  # ranks exchange gradients once a step
        with nullcontext() if last or world == 1 else model.no_sync():
            with hardware.autocast(device, dtype):
                loss, logits = METHODS[config["method"]](model, x, y, config, draws)
            # DistributedDataParallel averages over ranks: weigh each share by its images
            weighted = loss * ((stop - start) * world / total)
            (weighted if scaler is None else scaler.scale(weighted)).backward()
        loss_sum += loss.detach() * (stop - start)
        correct += (logits.detach().argmax(dim=1) == y).sum()
    return loss_sum, correct


def train(
    config: dict,
    folder: Path,
    dataset: Dataset,
    device: torch.device,
    stop: runs.StopRequest,
    *,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
    resume: bool = False,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Algorithm 1: train f_theta for T epochs, with a checkpoint after each.

    Raises ValueError when the loss is no longer finite, or the checkpoint to resume does not fit; runs.Stopped when
    `stop` is pending, with what was done saved: on one device within a step, on several at the end of the epoch.
    """
    seed, T, batch_size, hflip = config["seed"], config["epochs"], config["batch_size"], dataset.hflip
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - nothing draws from it; its state is saved all the same
    f_theta = build_model(config["arch"], len(dataset.classes), dataset.mean, dataset.std)
    f_theta = f_theta.to(device, memory_format=torch.channels_last)
    network = parallel(f_theta, config, device, compiled, world)
    # dozens of small kernels for a GPU, made a few; on a CPU the pieces in its cache are faster
    apply = hardware.compile_if(compiled and device.type == "cuda", apply_preprocessing, dynamic=False)
    theta, scaler = optimiser(f_theta, config, device, dtype)
    done = {"epoch": 0, "step": 0, "loss_sum": 0.0, "correct": 0.0, "seconds": 0.0,
            "best_epoch": 0, "best_accuracy": -1.0, "log": [], "timing": []}  # fmt: skip
    save = Saver(config, folder, dataset, device, f_theta, theta, scaler, hardware.amp_name(dtype))
    if resume and (folder / "last.pt").exists():
        done = save.restore(follow=rank == 0)

    def pause(t: int, step: int, loss_sum: Tensor, correct: Tensor, seconds: float) -> None:
        """Save and end the run if it was told to stop; several processes stop together, at the end of the epoch."""
        if stop.pending() and world == 1:
            check_finite(loss_sum.item(), t, folder)
            save.last(done | {"epoch": t, "step": step, "loss_sum": loss_sum.item(), "correct": correct.item(),
                              "seconds": seconds})  # fmt: skip
            raise stop.stopped(GO_ON)

    X, Y = dataset.train_images[: config["subset"]].to(device), dataset.train_labels[: config["subset"]].to(device)
    test_images = dataset.test_images.to(device)
    for t in range(done["epoch"], T):  # for t = 0 to T-1 do
        eta_t = learning_rate(config["lr"], t, T)
        theta.param_groups[0] |= {"lr": eta_t, "fused": device.type == "cuda"}
        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(runs.seed_of(seed, "order", t)))
        batches = [b for b in order.to(device).split(batch_size) if len(b) >= world]
        # losses and counts add up on the device and are read once an epoch
        before = (done["loss_sum"], done["correct"]) if rank == 0 else (0.0, 0.0)  # of steps before a resume, once
        loss_sum, correct = torch.tensor(before, dtype=torch.float64, device=device)
        began = time.monotonic() - done["seconds"]
        network.train()
        with tqdm(total=len(X), initial=min(len(X), done["step"] * batch_size), desc=f"epoch {t + 1}/{T}", unit="img",
                  mininterval=0.5, leave=False, disable=None if rank == 0 else True) as bar:  # fmt: skip
            for step in range(done["step"], len(batches)):  # for each batch (x, y) ~ D do
                batch = batches[step]
                step_loss, step_correct = train_step(
                    network, X[batch], Y[batch], config, hflip=hflip, seed=runs.seed_of(seed, "step", t, step),
                    rank=rank, world=world, dtype=dtype, scaler=scaler, apply=apply,
                )  # fmt: skip
                update(theta, scaler)  # theta = theta - eta_t 1/|B| sum_i grad L_T(x_i, y_i)
                loss_sum += step_loss
                correct += step_correct
                bar.update(len(batch))
                pause(t, step + 1, loss_sum, correct, time.monotonic() - began)
        pending = torch.tensor(float(stop.pending()), device=device)
        if world > 1:
            for total in (loss_sum, correct, pending):
                dist.all_reduce(total)
        images = sum(map(len, batches))
        train_loss, train_accuracy = loss_sum.item() / images, 100 * correct.item() / images
        seconds = time.monotonic() - began  # of the device too, whose sums were just read
        check_finite(train_loss, t, folder)
        if rank > 0:
            done |= {"step": 0, "loss_sum": 0.0, "correct": 0.0, "seconds": 0.0}
            if pending and t + 1 < T:
                dist.barrier()  # the first process saves
                raise stop.stopped(GO_ON)
            continue
        poll = partial(pause, t, len(batches), loss_sum, correct, seconds)
        test_accuracy = 100 * accuracy(f_theta, test_images, dataset.test_labels, config, dtype, poll)
        if test_accuracy > done["best_accuracy"]:
            done |= {"best_epoch": t + 1, "best_accuracy": test_accuracy}
        done["log"].append([t + 1, eta_t, train_loss, train_accuracy, test_accuracy])
        done["timing"].append([t + 1, round(seconds, 3), round(images / seconds, 1), peak_memory_mib(device)])
        done |= {"epoch": t + 1, "step": 0, "loss_sum": 0.0, "correct": 0.0, "seconds": 0.0}
        save.epoch(done)
        tqdm.write(f"epoch {t + 1}/{T}  lr {eta_t:g}  loss {train_loss:.4f}  train {train_accuracy:.2f}%"
                   f"  test {test_accuracy:.2f}%  {seconds:.1f} s")  # fmt: skip
        if pending and t + 1 < T:
            if world > 1:
                dist.barrier()  # the others wait, since torchrun ends all when one does
            raise stop.stopped(GO_ON)


def check_finite(loss: float, t: int, folder: Path) -> None:
    """Raise ValueError if the loss of epoch t is not a finite number, before anything of it is saved."""
    if not np.isfinite(loss):
        raise ValueError(f"the training loss of epoch {t + 1} is {loss}; {folder} keeps what was saved before."
                         " Try a smaller --lr, or --amp off")  # fmt: skip


def parallel(f_theta: nn.Module, config: dict, device: torch.device, compiled: bool, world: int) -> nn.Module:
    """f_theta as it is run: batch norm in common, compiled, replicated; its parameters are f_theta's own."""
    if config["sync_bn"]:
        nn.SyncBatchNorm.convert_sync_batchnorm(f_theta)
    # Standard at |B| = 128 is bound by kernel launches, which CUDA graphs take away
    graphs = device.type == "cuda" and config["method"] == "standard" and world == 1 and config["accumulate"] == 1
    network = hardware.compile_if(compiled, f_theta, mode="reduce-overhead" if graphs else "default", dynamic=False)
    if world > 1:
        ids = [device.index] if device.type == "cuda" else None
        network = nn.parallel.DistributedDataParallel(network, device_ids=ids)
    return network


def optimiser(
    f_theta: nn.Module, config: dict, device: torch.device, dtype: torch.dtype | None
) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler | None]:
    """SGD as in Sec. 4, and the gradient scaler that float16 needs.

    On a GPU in one fused kernel, which skips a step that overflowed without asking the host. It takes the momentum for
    initialised after the first step, skipped or not, so it is here: from zero it grows to the same.
    """
    fused = device.type == "cuda"
    theta = torch.optim.SGD(f_theta.parameters(), lr=config["lr"], momentum=MOMENTUM, nesterov=True,
                            weight_decay=config["weight_decay"], fused=fused)  # fmt: skip
    if fused:
        for p in f_theta.parameters():
            theta.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return theta, torch.amp.GradScaler(device.type) if dtype is torch.float16 else None


def update(theta: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    """One step of SGD along the gradients that were added up, which are then cleared."""
    if scaler is None:
        theta.step()
    else:
        scaler.step(theta)
        scaler.update()
    theta.zero_grad(set_to_none=True)


def accuracy(
    f_theta: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: dict,
    dtype: torch.dtype | None,
    poll: Callable[[], None],
) -> float:
    """Clean test accuracy in [0, 1]; RSE with its test-time ensemble. `poll` is called before each batch."""
    _, prediction = predict(f_theta, images, dtype=dtype, poll=poll, **ensemble(config, "clean"))
    return (prediction == labels).double().mean().item()


def peak_memory_mib(device: torch.device) -> float:
    """Most memory used so far in MiB: the GPU's by this process, or the process' own on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)


def open_folder(folder: Path, config: dict, resume: bool, overwrite: bool) -> None:
    """Make the run's folder ready and write config.json. Raises ValueError where a run is there already."""
    if (folder / "last.pt").exists() or (folder / "results.json").exists():
        if not (resume or overwrite):
            raise ValueError(f"{folder} holds a run already; --resume goes on with it, --overwrite deletes it")
        if overwrite:
            # last.pt before what it explains: whenever this is killed, --resume does not go on with the old run
            for name in ("results.json", "last.pt", "best.pt", "log.csv", "timing.csv", "config.json"):
                (folder / name).unlink(missing_ok=True)
    if not (folder / "last.pt").exists():
        runs.write_json(folder / "config.json", config)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rank, world = hardware.init_distributed(args.device)
    device = hardware.pick_device(args.device)
    hardware.set_fast_math(device)
    dtype = hardware.amp_dtype(args.amp, device)
    compiled = args.compile if args.compile is not None else device.type == "cuda"
    if compiled and (reason := hardware.compiler_missing(device)):
        tqdm.write(f"not compiling: {reason}")
        compiled = False
    if rank > 0:
        dist.barrier()  # the first process may have to download
    dataset = load_dataset(args.dataset, args.data)
    if world > 1 and rank == 0:
        dist.barrier()
    if min(args.batch_size, args.subset or args.batch_size) < world:
        raise ValueError(f"--batch-size or --subset is less than the {world} processes, which share each batch")
    if args.subset is not None and args.subset > len(dataset.train_images):
        raise ValueError(f"--subset {args.subset}: {args.dataset} has {len(dataset.train_images)} training images")
    if args.sync_bn and (device.type != "cuda" or world == 1):
        raise ValueError("--sync-bn needs GPUs and torchrun; leave it out on one device")
    folder = Path(args.out or runs.run_folder("runs", args.dataset, args.arch, args.method, args.tag, args.seed))
    config = vars(args)
    with runs.lock(folder) if rank == 0 else nullcontext(), runs.StopRequest(args.max_minutes) as stop:
        if rank == 0:
            open_folder(folder, config, args.resume, args.overwrite)
            tqdm.write(f"{folder}: {args.method}, {args.arch}, {args.dataset} ({dataset.source}), "
                       f"{hardware.describe(device)}" + (f" x {world}" if world > 1 else ""))  # fmt: skip
        if world > 1:
            dist.barrier()  # the folder is ready
        train(config, folder, dataset, device, stop, dtype=dtype, compiled=compiled, resume=args.resume,
              rank=rank, world=world)  # fmt: skip
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
