"""Algorithm 1: train one network by one method.

    python train.py --method magnma --arch densenet121              # the paper's recipe, CIFAR-10 under data/
    python train.py --method magnma --lambda2 0                     # MAGNMA with the noise regulariser only
    python train.py --dataset path/to/mine.npz                      # images of your own (data.py says in which form)
    python train.py --dataset digits --arch resnet20 --epochs 3 --batch-size 64     # no download, on any CPU
    python train.py --method magnma --resume                        # go on where an interrupted run stopped
    timeout 60m python train.py --method magnma --resume            # for an hour
    torchrun --nproc-per-node 2 -- train.py --method augmix         # one run on two GPUs, each with half of every batch

Writes runs/<dataset>/<arch>/<method>[-<tag>]/seed<k>/: config.json; log.csv, a row an epoch; best.pt, the tested epoch
of best clean test accuracy, as the paper selects it; last.pt, from which --resume goes on.
"""

import argparse
import csv
import io
import math
import os
import resource
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import utils
from augment import preprocess
from data import BUILT_IN, Dataset, load_dataset
from evaluate import WHERE_IT_RAN, predict
from losses import METHODS, of_other_methods
from models import ARCHS, build_model, recompute
from utils import seed

LOG = ("epoch", "lr", "train_loss", "train_accuracy", "test_accuracy",
       "seconds", "images_per_second", "peak_memory_mib")  # fmt: skip
MAY_DIFFER = (*WHERE_IT_RAN, "tag")  # flags that --resume may change


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags with every value resolved. Raises ValueError naming the flag that is wrong."""
    parser = utils.Parser(description="Train one network by one method (Algorithm 1 of the paper).")
    positive, not_negative = utils.number(float, above=0), utils.number(float, low=0)
    natural, count = utils.number(int, low=0), utils.number(int, low=1)

    flag = parser.add_argument_group("what").add_argument
    flag("--dataset", default="cifar10", help=f"{', '.join(BUILT_IN)} (no download), or the path of an .npz file")
    flag("--data", default="data", help="the folder of CIFAR, which is downloaded where it is missing")
    flag("--method", choices=tuple(METHODS), default="magnma", help="the training criterion, Eq. (1)-(6) and (12)")
    flag("--arch", choices=ARCHS, default="resnet18", help="the network")
    flag("--seed", type=natural, default=0, help="of the weights and of every draw")
    flag = parser.add_argument_group("Sec. 4, training details").add_argument
    flag("--epochs", type=count, default=150, help="T of Algorithm 1")
    flag("--batch-size", type=count, default=512, help="|B|, over all processes; the last incomplete one is dropped")
    flag("--lr", type=positive, default=0.1, help="learning rate, divided by 10 every ceil(epochs / 3) epochs")
    flag("--weight-decay", type=not_negative, default=5e-4, help="of SGD with Nesterov momentum 0.9")
    flag = parser.add_argument_group("MAGNMA, Eq. (6)").add_argument
    flag("--lambda1", type=not_negative, default=0.2, help="weight of the noise regulariser; 0 leaves it out")
    flag("--lambda2", type=not_negative, default=0.3, help="weight of the mixed augmentations; 0 leaves them out")
    flag("--sigma-max", type=not_negative, default=0.2, help="largest noise level, on pixels in [0, 1]; of GN too")
    flag("--beta", type=utils.number(float, low=0.01), default=1.0, help="w ~ Beta(beta, beta) mixes x with T_a(x)")
    flag("--n", type=count, default=5, help="samples of each regulariser")
    flag("--operations", choices=("A", "augmix"), default="A",
         help="what T_a is drawn from: A, the text's four operations, or AugMix's nine")
    flag = parser.add_argument_group("AT and TRADES, Eq. (2) and (3)").add_argument
    flag("--epsilon", type=not_negative, default=8 / 255, help="l_inf radius, on pixels in [0, 1]; by default 8/255")
    flag("--pgd-steps", type=natural, default=7, help="steps of the attack")
    flag("--pgd-step-size", type=not_negative, help="by default 2.5 epsilon / steps")
    flag("--trades-lambda", type=not_negative, default=3.0, help="weight of TRADES' robust term")
    flag = parser.add_argument_group("RSE, Eq. (4)").add_argument
    flag("--rse-sigma", type=not_negative, default=0.1, help="noise level, on pixels in [0, 1]")
    flag("--rse-samples", type=count, default=10, help="draws that evaluate.py averages")
    flag = parser.add_argument_group("AugMix, Eq. (5)").add_argument
    flag("--jsd-lambda", type=not_negative, default=12.0, help="weight of the Jensen-Shannon divergence")
    flag = parser.add_argument_group("how").add_argument
    flag("--joint", action="store_true", help="MAGNMA, AugMix, TRADES: clean and perturbed copies in one forward pass,"
         " as AugMix's own code has it, and not in passes of their own; batch norm sees the difference")
    flag("--subset", type=count, help="train on the first N images only")
    flag("--eval-every", type=count, default=5, help="test after the first epoch, every N-th and the last")
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:<index>; torchrun gives each process a GPU")
    flag("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
         help="mixed precision; auto: bf16 on GPUs that have it, fp16 on others, off on a CPU")
    flag("--compile", action="store_true", help="torch.compile the network")
    flag("--recompute", action="store_true", help="compute each forward pass again in the backward pass: the same"
         " result, the memory of one copy's activations, a third more time")
    flag("--tag", help="suffix of the run's folder; by default made of MAGNMA's hyperparameters and --joint")
    flag("--out", help="the run's folder; by default runs/<dataset>/<arch>/<method>[-<tag>]/seed<k>")
    flag("--resume", action="store_true", help="go on where the run stopped; from the start if there is nothing yet")

    args = parser.parse_args(argv)
    if args.pgd_step_size is None:
        args.pgd_step_size = 2.5 * args.epsilon / max(1, args.pgd_steps)
    if args.tag is None:
        args.tag = default_tag(args)
    if not args.out:
        name = f"{args.method}-{args.tag}" if args.tag else args.method
        args.out = str(Path("runs", Path(args.dataset).stem, args.arch, name, f"seed{args.seed}"))
    return args


def default_tag(args: argparse.Namespace) -> str:
    """MAGNMA's hyperparameters: nothing for the paper's, `noise`, `mix` (Table 3) or Table 5's values; n; `joint`."""
    parts = []
    if args.method == "magnma":
        setting = (args.lambda1, args.lambda2, args.sigma_max, args.beta)
        names = {(0.2, 0.3, 0.2, 1.0): "", (0.2, 0.0, 0.2, 1.0): "noise", (0.0, 5.0, 0.2, 1.0): "mix"}
        parts.append(names.get(setting, "l1_{:g}-l2_{:g}-s_{:g}-b_{:g}".format(*setting)))
        parts.append("nine" if args.operations == "augmix" else "")
        parts.append("" if args.n == 5 else f"n_{args.n}")
    return "-".join(filter(None, [*parts, "joint" if args.joint else ""]))


# Algorithm 1


def train(args: argparse.Namespace, dataset: Dataset, device: torch.device, rank: int = 0, world: int = 1) -> None:
    """Algorithm 1: train f_theta for T epochs, with a checkpoint after each.

    Process `rank` of `world` takes its share of each batch; against one device, batch norm and the draws differ. Raises
    ValueError when the loss is no longer finite, or the run to resume is another.
    """
    T, B, folder, dtype = args.epochs, args.batch_size, Path(args.out), utils.amp_dtype(args.amp, device)
    X, Y = dataset.train_images[: args.subset].to(device), dataset.train_labels[: args.subset].to(device)
    X_test = dataset.test_images.to(device) if rank == 0 else None
    resolved = {"amp": utils.amp_name(dtype), "processes": world, "data_source": dataset.source, "train_images": len(X)}
    about = {"config": vars(args) | resolved, **utils.provenance(device)}
    method, hparams = METHODS[args.method], vars(args)

    seed(args.seed)
    f = build_model(args.arch, len(dataset.classes)).to(device, memory_format=torch.channels_last)
    sgd = utils.optimiser(f, args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    log = open_run(folder, about["config"], f, sgd, scaler, rank)
    if args.compile:
        f.forward = torch.compile(f.forward, dynamic=False)
    if args.recompute:
        recompute(f)

    for t in range(len(log), T):  # for t = 0 to T-1 do
        start = time.monotonic()
        eta_t = learning_rate(args.lr, t, T)
        sgd.param_groups[0] |= {"lr": eta_t, "fused": device.type == "cuda"}
        if world > 1:
            for buffer in f.buffers():  # batch norm's, which only the first process saves
                dist.broadcast(buffer, 0)
        seed(args.seed, t)  # the same in every process
        X_t = preprocess(X, dataset.hflip)  # Sec. 4
        order = torch.randperm(len(X))[: len(X) // B * B].to(device)
        seed(args.seed, t, rank)
        loss_sum, correct = torch.zeros(2, dtype=torch.float64, device=device).unbind()  # read once an epoch
        f.train()
        for batch in tqdm(order.split(B), f"epoch {t + 1}/{T}", leave=False, unit="batch",
                          disable=None if rank == 0 else True):  # for each batch (x, y) ~ D do  # fmt: skip
            share = batch[rank::world]
            x, y = X_t[share].float() / 255, Y[share]
            with utils.autocast(device, dtype):
                loss, logits = method(f, x, y, hparams)  # L_T, its mean over the batch
            scaler.scale(loss / world).backward()
            add_up_gradients(f, world)
            scaler.step(sgd)  # theta = theta - eta_t 1/|B| sum_i grad L_T(x_i, y_i)
            scaler.update()
            sgd.zero_grad()
            loss_sum += loss.detach() * len(share)
            correct += (logits.detach().argmax(dim=1) == y).sum()

        if world > 1:
            dist.all_reduce(loss_sum)
            dist.all_reduce(correct)
        train_loss, train_accuracy = loss_sum.item() / len(order), 100 * correct.item() / len(order)
        seconds = time.monotonic() - start
        if not math.isfinite(train_loss):
            raise ValueError(f"the training loss of epoch {t + 1} is {train_loss}; {folder} keeps the epochs before."
                             " Try another run (--tag, --out) with a smaller --lr, or with --amp off")  # fmt: skip
        tested = rank == 0 and (t == 0 or (t + 1) % args.eval_every == 0 or t + 1 == T)
        test_accuracy = 100 * accuracy(f, X_test, dataset.test_labels, dtype) if tested else None
        row = (t + 1, eta_t, train_loss, train_accuracy, test_accuracy, seconds, len(order) / seconds, memory(device))
        log.append(dict(zip(LOG, row, strict=True)))
        if rank == 0:
            save_run(folder, about, f, sgd, scaler, log)
        if tested:
            tqdm.write(f"epoch {t + 1}/{T}  lr {eta_t:g}  loss {train_loss:.4f}  train {train_accuracy:.2f}%"
                       f"  test {test_accuracy:.2f}%  {seconds:.1f} s")  # fmt: skip


def learning_rate(lr: float, t: int, epochs: int) -> float:
    """eta_t of Algorithm 1, t = 0 ... epochs - 1: divided by 10 every ceil(epochs / 3) epochs (Sec. 4: 50 of 150)."""
    return lr * 0.1 ** (t // math.ceil(epochs / 3))


def add_up_gradients(f: nn.Module, world: int) -> None:
    """Replace each gradient by its sum over the processes."""
    if world == 1:
        return
    gradients = [p.grad for p in f.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(part.view_as(g))


def accuracy(f: nn.Module, images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype | None) -> float:
    """Clean test accuracy in [0, 1], by which best.pt is selected; for RSE too of one pass without noise."""
    _, prediction = predict(f, images, dtype=dtype)
    return (prediction == labels).double().mean().item()


def memory(device: torch.device) -> float:
    """Peak memory so far, MiB: the GPU's, or this process' on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# A run's folder


def open_run(
    folder: Path, config: dict, f: nn.Module, sgd: torch.optim.SGD, scaler: torch.amp.GradScaler, rank: int
) -> list[dict]:
    """Start the run in `folder`, or restore it into f, sgd and scaler; returns the log's rows so far.

    Raises ValueError where another run is there, and OSError for a disk that is full.
    """
    last = folder / "last.pt"
    if rank == 0:
        for leftover in folder.glob(".*.tmp"):  # of a process that was killed while saving
            leftover.unlink()
    if config["resume"] and last.exists():
        saved = utils.load_checkpoint(last)
        try:
            theirs, log = saved["config"], saved["log"]
            differ = differing(config, theirs)
            if not differ:
                f.load_state_dict(saved["model"])
                sgd.load_state_dict(saved["optimizer"])
                scaler.load_state_dict(saved["scaler"])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{last} is no checkpoint of train.py ({str(error)[:80]}); name another --out") from error
        if differ:
            no_flags = ("processes", "data_source", "train_images")
            names = [k if k in no_flags else "--" + k.replace("_", "-") for k in differ]
            told = ", ".join(f"{n} {theirs.get(k)} (now {config[k]})" for n, k in zip(names, differ, strict=True))
            raise ValueError(f"the run in {folder} was begun with {told}; go on as it began, or name another --out")
        if rank == 0:
            write_log(folder, log)  # where it was killed between last.pt and the log
        return log
    if (folder / "config.json").exists() and not config["resume"]:
        raise ValueError(f"{folder} holds a run already; --resume goes on with it, --tag or --out makes another")
    if dist.is_initialized():
        dist.barrier()  # the first process writes config.json when all have seen that there is none
    if rank == 0:
        utils.write_json(folder / "config.json", config)
    return []


def differing(config: dict, theirs: dict) -> list[str]:
    """The keys of `config` that make it another run than that of `theirs`, a config.json.

    A flag that theirs does not know and that only other methods take came with a method added since: it does not.
    """
    unknown = of_other_methods(config["method"]) - theirs.keys()
    return [k for k in config if k not in (*MAY_DIFFER, *unknown) and theirs.get(k) != config[k]]


def save_run(
    folder: Path, about: dict, f: nn.Module, sgd: torch.optim.SGD, scaler: torch.amp.GradScaler, log: list[dict]
) -> None:
    """Write best.pt, if the last epoch is the best of those tested, then last.pt, then log.csv.

    Killed in between, the run goes on from the last.pt before, makes the same epoch and writes the same files.
    """
    content = about | {"epoch": len(log), "model": f.state_dict()}
    best = max((row for row in log if row["test_accuracy"] is not None), key=lambda row: row["test_accuracy"])
    if best is log[-1]:
        utils.save_checkpoint(folder / "best.pt", content)
    states = {"optimizer": sgd.state_dict(), "scaler": scaler.state_dict(), "log": log}
    utils.save_checkpoint(folder / "last.pt", content | states)
    write_log(folder, log)


def write_log(folder: Path, log: list[dict]) -> None:
    """log.csv, a row an epoch; test_accuracy is empty where the epoch was not tested."""
    text = io.StringIO()
    writer = csv.DictWriter(text, LOG, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()} for row in log)
    with utils.atomic_write(folder / "log.csv") as file:
        file.write(text.getvalue().encode())


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = utils.pick_device(args.device)
    rank, world = 0, 1
    if "RANK" in os.environ:  # torchrun started this process
        if ":" in args.device:
            raise ValueError(f"--device {args.device} is for one process; under torchrun use --device cuda")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
        rank, world = dist.get_rank(), dist.get_world_size()
    if rank > 0:
        dist.barrier()  # the first process may have to download
    dataset = load_dataset(args.dataset, args.data)
    if world > 1 and rank == 0:
        dist.barrier()
    images = len(dataset.train_images)
    if args.subset is not None and args.subset > images:
        raise ValueError(f"--subset {args.subset}: {dataset.name} has {images} training images")
    if args.batch_size > (args.subset or images):
        raise ValueError(f"--batch-size {args.batch_size} is more than the {args.subset or images} training images")
    if args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size} does not divide by the {world} processes")
    if rank == 0:
        tqdm.write(f"{args.out}: {args.method}, {args.arch}, {dataset.name} ({dataset.source}), "
                   f"{utils.describe(device)}" + (f" x {world}" if world > 1 else ""))  # fmt: skip
    train(args, dataset, device, rank, world)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(utils.run_main(main))
