"""The training criteria of the paper, one function a method, each reading like its equation.

    Eq. (1)  standard_loss      Eq. (4)   rse_loss
    Eq. (2)  at_loss            Eq. (5)   augmix_loss
    Eq. (3)  trades_loss        Eq. (6)   magnma_loss (the inner lines of Algorithm 1)
                                Eq. (12)  gn_loss

Each takes a network f from images in [0, 1] to logits, x float (B, 3, 32, 32) in [0, 1] and y int64 (B,), and returns
(mean loss, logits (B, C)): the clean logits where the method forwards clean x, else those of the perturbed images.
Clean images and each perturbed copy go through f in passes of their own, or with `joint` as one batch, which changes
what batch norm sees. Randomness is torch's global generators. Logits of half precision are raised to float32.

A method of your own: a function here and its line in METHODS at the end.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment import augmix, gaussian_noise, mixed_augmentation


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """D(p || q) = sum_c p_c log(p_c / q_c) of Eq. (3) and (6), p and q the softmax of logits (B, C). Returns (B,)."""
    log_p, log_q = F.log_softmax(at_least_float32(p_logits), dim=1), F.log_softmax(at_least_float32(q_logits), dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def jensen_shannon(*logits: Tensor) -> Tensor:
    """JS(p_1; ...; p_k) = 1/k sum_i D(p_i || p_mix), p_mix = 1/k sum_i p_i, of Eq. (5). k times (B, C) to (B,)."""
    log_p = F.log_softmax(at_least_float32(torch.stack(logits)), dim=2)
    log_p_mix = torch.logsumexp(log_p, dim=0) - math.log(len(logits))
    return (log_p.exp() * (log_p - log_p_mix)).sum(dim=2).mean(dim=0)


def at_least_float32(logits: Tensor) -> Tensor:
    """float16 and bfloat16 raised to float32; float32 and float64 as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def forward(f: nn.Module, *copies: Tensor, joint: bool = False) -> list[Tensor]:
    """The logits, at least float32, of each of `copies` (B, 3, 32, 32): a pass each, or one pass of all (`joint`)."""
    if joint:
        return list(at_least_float32(f(torch.cat(copies))).chunk(len(copies)))
    return [at_least_float32(f(copy)) for copy in copies]


# Eq. (1), (4), (12): no inner problem


def standard_loss(f: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (1): L(f(x), y), the cross-entropy."""
    (logits,) = forward(f, x)
    return F.cross_entropy(logits, y), logits


def rse_loss(f: nn.Module, x: Tensor, y: Tensor, *, rse_sigma: float) -> tuple[Tensor, Tensor]:
    """Eq. (4), random self-ensemble, noise on the input only: E_delta L(f(x + delta), y), delta ~ N(0, sigma^2 I)."""
    (logits,) = forward(f, x + rse_sigma * torch.randn_like(x))
    return F.cross_entropy(logits, y), logits


def gn_loss(f: nn.Module, x: Tensor, y: Tensor, *, sigma_max: float) -> tuple[Tensor, Tensor]:
    """Eq. (12), Gaussian noise training: E_sigma E_delta L(f(x + delta), y), sigma ~ U(0, sigma_max) per image."""
    (logits,) = forward(f, gaussian_noise(x, sigma_max))
    return F.cross_entropy(logits, y), logits


# Eq. (2), (3): adversarial


def pgd_attack(
    f: nn.Module, x: Tensor, objective: Callable[[Tensor], Tensor], *,
    epsilon: float, steps: int, step_size: float, start: Tensor,
) -> Tensor:  # fmt: skip
    """The inner maximisation of Eq. (2) by projected gradient ascent in the l_inf ball; x_adv, not clipped to [0, 1].

    delta <- P_B(eps)(delta + step_size sign(grad_delta sum objective(f(x + delta)))), `steps` times from P(start).
    objective: logits (B, C) -> (B,); start like x. f is in eval mode meanwhile, so that its batch norm is fixed, and
    its parameters take no gradient.
    """
    delta = start.clamp(-epsilon, epsilon)
    with frozen(f):
        for _ in range(steps):
            delta.requires_grad_(True)
            with torch.enable_grad():
                (logits,) = forward(f, x + delta)
                # only its sign counts: the factor keeps small gradients from underflow in half precision
                (gradient,) = torch.autograd.grad(1024.0 * objective(logits).sum(), delta)
            delta = (delta.detach() + step_size * gradient.sign()).clamp(-epsilon, epsilon)
    return x + delta.detach()


@contextmanager
def frozen(f: nn.Module) -> Iterator[None]:
    """f in eval mode with its parameters held fixed, both as before at the end."""
    training, parameters = f.training, [p for p in f.parameters() if p.requires_grad]
    f.eval().requires_grad_(False)
    try:
        yield
    finally:
        f.train(training)
        for p in parameters:
            p.requires_grad_(True)


def at_loss(
    f: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, pgd_steps: int, pgd_step_size: float
) -> tuple[Tensor, Tensor]:
    """Eq. (2), adversarial training: max over |delta|_inf <= epsilon of L(f(x + delta), y), by PGD from delta = 0."""
    x_adv = pgd_attack(
        f, x, lambda logits: F.cross_entropy(logits, y, reduction="none"),
        epsilon=epsilon, steps=pgd_steps, step_size=pgd_step_size, start=torch.zeros_like(x),
    )  # fmt: skip
    (logits,) = forward(f, x_adv)
    return F.cross_entropy(logits, y), logits


def trades_loss(
    f: nn.Module, x: Tensor, y: Tensor, *,
    trades_lambda: float, epsilon: float, pgd_steps: int, pgd_step_size: float, joint: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Eq. (3), TRADES: L(f(x), y) + lambda max over |delta|_inf <= epsilon of D(p(x) || p(x + delta)).

    PGD starts at 0.001 N(0, I), as TRADES' own code does: at delta = 0 the divergence has no gradient.
    """
    with frozen(f), torch.no_grad():
        (clean,) = forward(f, x)  # p(x) as the attack sees it, in eval mode
    x_adv = pgd_attack(
        f, x, lambda logits: kl_divergence(clean, logits),
        epsilon=epsilon, steps=pgd_steps, step_size=pgd_step_size, start=0.001 * torch.randn_like(x),
    )  # fmt: skip
    logits, logits_adv = forward(f, x, x_adv, joint=joint)
    return F.cross_entropy(logits, y) + trades_lambda * kl_divergence(logits, logits_adv).mean(), logits


# Eq. (5), (6): consistency between a clean image and its perturbed copies


def augmix_loss(f: nn.Module, x: Tensor, y: Tensor, *, jsd_lambda: float, joint: bool = False) -> tuple[Tensor, Tensor]:
    """Eq. (5), AugMix: L(f(x), y) + lambda JS(p(x); p(x_a1); p(x_a2)), two augmented variants of each image."""
    x_a1, x_a2 = augmix(x), augmix(x)
    logits, logits_a1, logits_a2 = forward(f, x, x_a1, x_a2, joint=joint)
    return F.cross_entropy(logits, y) + jsd_lambda * jensen_shannon(logits, logits_a1, logits_a2).mean(), logits


def magnma_loss(
    f: nn.Module, x: Tensor, y: Tensor, *,
    lambda1: float, lambda2: float, sigma_max: float, beta: float, n: int, operations: str = "A", joint: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Eq. (6), MAGNMA, and the body of Algorithm 1.

    L(f(x), y) + lambda1 [p(x)]_y E D(p(x) || p(x + delta)) + lambda2 [p(x)]_y E D(p(x) || p(x_a(w)))

    A zero lambda leaves its loop over k out: the paper's two ablations. The gradient flows through everything, the
    weight [p(x)]_y and both arguments of D. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    noisy = [gaussian_noise(x, sigma_max) for _ in range(n if lambda1 else 0)]  # x + delta^(k)
    mixed = [mixed_augmentation(x, beta, operations) for _ in range(n if lambda2 else 0)]  # w x + (1 - w) T_a(x)
    logits, *others = forward(f, x, *noisy, *mixed, joint=joint)

    divergence = [kl_divergence(logits, other) for other in others]  # D(p(x) || p(x^(k)))
    R, Z = mean(divergence[: len(noisy)]), mean(divergence[len(noisy) :])
    confidence = F.softmax(logits, dim=1).gather(1, y[:, None])[:, 0]  # [p(x)]_y
    loss = F.cross_entropy(logits, y, reduction="none") + lambda1 * confidence * R + lambda2 * confidence * Z
    return loss.mean(), logits


def mean(values: list[Tensor]) -> Tensor | float:
    """1/n sum_k of n tensors (B,), or 0 of none."""
    return torch.stack(values).mean(dim=0) if values else 0.0


# The names of --method


def _with_hparams(loss: Callable) -> Callable:
    """`loss` called with the dict of all flags, hparams, of which it gets its keyword arguments, if there."""
    keys = [k for k, p in inspect.signature(loss).parameters.items() if p.kind is p.KEYWORD_ONLY]

    def call(f: nn.Module, x: Tensor, y: Tensor, hparams: dict) -> tuple[Tensor, Tensor]:
        return loss(f, x, y, **{key: hparams[key] for key in keys if key in hparams})

    call.hparams = frozenset(keys)
    return call


# METHODS[name](f, x, y, hparams) -> (mean loss, logits)
METHODS = {
    name: _with_hparams(loss)
    for name, loss in {
        "standard": standard_loss,
        "at": at_loss,
        "trades": trades_loss,
        "rse": rse_loss,
        "gn": gn_loss,
        "augmix": augmix_loss,
        "magnma": magnma_loss,
    }.items()
}


def of_other_methods(method: str) -> set[str]:
    """The hyperparameters that other methods take and `method` does not: runs that differ in them alone are alike."""
    taken = set().union(*(loss.hparams for loss in METHODS.values()))
    return taken - METHODS[method].hparams if method in METHODS else set()
