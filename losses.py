"""The training criteria of the paper, one function per method, each reading like its equation.

    Eq. (1)  standard_loss      Eq. (4)   rse_loss
    Eq. (2)  at_loss            Eq. (5)   augmix_loss
    Eq. (3)  trades_loss        Eq. (6)   magnma_loss (the body of Algorithm 1)
                                Eq. (12)  gn_loss

In your training loop, replace `loss = F.cross_entropy(f(x), y)` by

    loss, logits = magnma_loss(f, x, y)

This file and augment.py need torch and nothing else: copy the two. Each loss takes a network f from
images to logits, x float (B, 3, H, W) in [0, 1] and y int64 (B,), and returns (mean loss, logits
(B, C)): the clean logits if the method forwards clean x, else those of the perturbed images. The
defaults are the paper's values. The clean images and each perturbed copy go through f in separate
passes, or with `joint` as one batch, which changes what batch norm sees. Randomness is torch's
global generators. Half-precision logits are cast to float32. Devices: CPUs and CUDA GPUs.

To add a method: write a function here and name it in METHODS at the end.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment import augmix, check_images, gaussian_noise, mixed_augmentation

SIGMA_MAX = 0.2  # MAGNMA and GN: the largest noise level, for pixels in [0, 1]
EPSILON, PGD_STEPS = 8 / 255, 7  # AT and TRADES: l_inf radius and number of PGD steps


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """D(p || q) = sum_c p_c log(p_c / q_c), Eq. (3), (6); p, q the softmax of (B, C). -> (B,)."""
    log_p = F.log_softmax(at_least_float32(p_logits), dim=1)
    log_q = F.log_softmax(at_least_float32(q_logits), dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def jensen_shannon(*logits: Tensor) -> Tensor:
    """JS(p_1; ...; p_k) = 1/k sum_i D(p_i || p_mix), p_mix = 1/k sum_i p_i (Eq. (5)).

    k logits (B, C) -> (B,).
    """
    log_p = F.log_softmax(at_least_float32(torch.stack(logits)), dim=2)
    log_p_mix = torch.logsumexp(log_p, dim=0) - math.log(len(logits))
    return (log_p.exp() * (log_p - log_p_mix)).sum(dim=2).mean(dim=0)


def at_least_float32(logits: Tensor) -> Tensor:
    """Cast float16 and bfloat16 to float32; float32 and float64 are unchanged."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def forward(f: nn.Module, *copies: Tensor, joint: bool = False) -> list[Tensor]:
    """The logits of each copy (B, 3, H, W): one pass per copy, or with joint one for all."""
    if joint:
        return list(at_least_float32(f(torch.cat(copies))).chunk(len(copies)))
    return [at_least_float32(f(copy)) for copy in copies]


# Eq. (1), (4), (12): no inner problem


def standard_loss(f: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (1): L(f(x), y), the cross-entropy."""
    (logits,) = forward(f, x)
    return F.cross_entropy(logits, y), logits


def rse_loss(
    f: nn.Module, x: Tensor, y: Tensor, *, rse_sigma: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Eq. (4), random self-ensemble with noise on the input only.

    E_delta L(f(x + delta), y), delta ~ N(0, sigma^2 I)
    """
    check_images(x)
    (logits,) = forward(f, x + rse_sigma * torch.randn_like(x))
    return F.cross_entropy(logits, y), logits


def gn_loss(
    f: nn.Module, x: Tensor, y: Tensor, *, sigma_max: float = SIGMA_MAX
) -> tuple[Tensor, Tensor]:
    """Eq. (12), Gaussian noise training.

    E_sigma E_delta L(f(x + delta), y), sigma ~ U(0, sigma_max) per image, delta ~ N(0, sigma^2 I)
    """
    (logits,) = forward(f, gaussian_noise(x, sigma_max))
    return F.cross_entropy(logits, y), logits


# Eq. (2), (3): adversarial


def pgd_attack(
    f: nn.Module,
    x: Tensor,
    objective: Callable[[Tensor], Tensor],
    *,
    epsilon: float,
    steps: int,
    step_size: float | None,
    start: Tensor,
) -> Tensor:
    """The inner maximisation of Eq. (2) by projected gradient ascent. Returns x_adv, not clipped.

    delta <- P_B(epsilon)(delta + step_size sign(grad_delta objective(f(x + delta)))) in the l_inf
    ball, `steps` times from P(start). objective: logits (B, C) -> (B,); start like x. step_size
    None is 2.5 epsilon / steps. f is in eval mode during the attack, so its batch norm is fixed.
    """
    step_size = 2.5 * epsilon / max(1, steps) if step_size is None else step_size
    delta = start.clamp(-epsilon, epsilon)
    with eval_mode(f), parameters_fixed(f), torch.enable_grad():
        for _ in range(steps):
            delta.requires_grad_(True)
            (logits,) = forward(f, x + delta)
            # Only the sign of the gradient counts. Per image, its largest value at the logits is
            # made 1, so that half precision neither underflows nor overflows.
            (slope,) = torch.autograd.grad(objective(logits).sum(), logits)
            slope /= slope.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
            (gradient,) = torch.autograd.grad(logits, delta, slope)
            delta = (delta.detach() + step_size * gradient.sign()).clamp(-epsilon, epsilon)
    return x + delta


@contextmanager
def eval_mode(f: nn.Module) -> Iterator[None]:
    """Switch f to eval mode and each submodule back: a frozen batch norm stays frozen."""
    modes = [(module, module.training) for module in f.modules()]
    f.eval()
    try:
        yield
    finally:
        f.train(modes[0][1])  # undoes what a module's own train() may have done, as LoRA's
        for module, training in modes:
            module.training = training


@contextmanager
def parameters_fixed(f: nn.Module) -> Iterator[None]:
    """Compute no gradients of f's parameters: only the input's are wanted."""
    parameters = [p for p in f.parameters() if p.requires_grad]
    f.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def at_loss(
    f: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float = EPSILON,
    pgd_steps: int = PGD_STEPS,
    pgd_step_size: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Eq. (2), adversarial training: max over |delta|_inf <= epsilon of L(f(x + delta), y).

    PGD starts at delta = 0.
    """
    check_images(x)
    x_adv = pgd_attack(
        f,
        x,
        lambda logits: F.cross_entropy(logits, y, reduction="none"),
        epsilon=epsilon,
        steps=pgd_steps,
        step_size=pgd_step_size,
        start=torch.zeros_like(x),
    )
    (logits,) = forward(f, x_adv)
    return F.cross_entropy(logits, y), logits


def trades_loss(
    f: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    trades_lambda: float = 3.0,
    epsilon: float = EPSILON,
    pgd_steps: int = PGD_STEPS,
    pgd_step_size: float | None = None,
    joint: bool = False,
) -> tuple[Tensor, Tensor]:
    """Eq. (3), TRADES: L(f(x), y) + lambda max over |delta|_inf <= epsilon D(p(x) || p(x + delta)).

    PGD starts at 0.001 N(0, I), as in TRADES' own code: at 0 the divergence has no gradient.
    """
    check_images(x)
    # p(x) as the attack sees it. With no_grad alone, autocast in torch < 2.10 would reuse these
    # half-precision weights, which have no gradient, in the passes below
    with eval_mode(f), parameters_fixed(f), torch.no_grad():
        (clean,) = forward(f, x)
    x_adv = pgd_attack(
        f,
        x,
        lambda logits: kl_divergence(clean, logits),
        epsilon=epsilon,
        steps=pgd_steps,
        step_size=pgd_step_size,
        start=0.001 * torch.randn_like(x),
    )
    logits, logits_adv = forward(f, x, x_adv, joint=joint)
    robust = kl_divergence(logits, logits_adv).mean()
    return F.cross_entropy(logits, y) + trades_lambda * robust, logits


# Eq. (5), (6): consistency between a clean image and its perturbed copies


def augmix_loss(
    f: nn.Module, x: Tensor, y: Tensor, *, jsd_lambda: float = 12.0, joint: bool = False
) -> tuple[Tensor, Tensor]:
    """Eq. (5), AugMix: L(f(x), y) + lambda JS(p(x); p(x_a1); p(x_a2)), two variants of x."""
    x_a1, x_a2 = augmix(x), augmix(x)
    logits, logits_a1, logits_a2 = forward(f, x, x_a1, x_a2, joint=joint)
    consistency = jensen_shannon(logits, logits_a1, logits_a2).mean()
    return F.cross_entropy(logits, y) + jsd_lambda * consistency, logits


def magnma_loss(
    f: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    lambda1: float = 0.2,
    lambda2: float = 0.3,
    sigma_max: float = SIGMA_MAX,
    beta: float = 1.0,
    n: int = 5,
    operations: str = "A",
    joint: bool = False,
) -> tuple[Tensor, Tensor]:
    """Eq. (6), MAGNMA, and the body of Algorithm 1.

    L(f(x), y) + lambda1 [p(x)]_y E D(p(x) || p(x + delta))
               + lambda2 [p(x)]_y E D(p(x) || p(x_a(w)))

    A zero lambda skips its loop over k, as in the paper's two ablations. The gradient flows through
    everything: the weight [p(x)]_y and both arguments of D. operations: what T_a is drawn from, "A"
    or "augmix" (see mixed_augmentation). Raises ValueError for n < 1.
    """
    check_images(x)
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    noisy = [gaussian_noise(x, sigma_max) for k in range(n if lambda1 else 0)]  # x + delta^(k)
    mixed = [mixed_augmentation(x, beta, operations) for k in range(n if lambda2 else 0)]  # x_a^(k)
    logits, *others = forward(f, x, *noisy, *mixed, joint=joint)

    divergence = [kl_divergence(logits, other) for other in others]  # D(p(x) || p(x^(k)))
    R, Z = sum(divergence[: len(noisy)]) / n, sum(divergence[len(noisy) :]) / n  # 0 if left out
    confidence = F.softmax(logits, dim=1).gather(1, y[:, None])[:, 0]  # [p(x)]_y
    loss = F.cross_entropy(logits, y, reduction="none")  # L(x, y)
    loss = loss + lambda1 * confidence * R + lambda2 * confidence * Z  # L_T(x, y)
    return loss.mean(), logits


# The names of --method


@dataclass(frozen=True)
class Method:
    """A loss that takes its keyword arguments from a dict: METHODS[name](f, x, y, hparams)."""

    loss: Callable[..., tuple[Tensor, Tensor]]

    @property
    def defaults(self) -> dict[str, object]:
        """The loss's hyperparameters and their defaults, the paper's values."""
        parameters = inspect.signature(self.loss).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def __call__(
        self, f: nn.Module, x: Tensor, y: Tensor, hparams: dict[str, object]
    ) -> tuple[Tensor, Tensor]:
        taken = {name: hparams[name] for name in self.defaults if name in hparams}
        return self.loss(f, x, y, **taken)


METHODS = {
    "standard": Method(standard_loss),
    "at": Method(at_loss),
    "trades": Method(trades_loss),
    "rse": Method(rse_loss),
    "gn": Method(gn_loss),
    "augmix": Method(augmix_loss),
    "magnma": Method(magnma_loss),
}
