"""The training criteria of the paper, one function per method, each reading like its equation.

    Eq. (1)  standard_loss      Eq. (4)   rse_loss
    Eq. (2)  at_loss            Eq. (5)   augmix_loss
    Eq. (3)  trades_loss        Eq. (6)   magnma_loss (the inner lines of Algorithm 1)
                                Eq. (12)  gn_loss

Every one takes a model that maps images in [0, 1] to logits, x float (B, 3, 32, 32) in [0, 1] and y int64 (B,), and
returns (the mean loss, logits (B, C)): the clean logits where the method forwards clean x, else those of the perturbed
batch. Clean and perturbed copies go through the network as one batch. `generator` is None, a torch.Generator or an
augment.Draws. Log-softmax throughout, in float32 at least: loss and gradient are finite for logits of +-1e4.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment import Draws, as_draws, augmix, gaussian_noise, mixed_augmentation

Generator = torch.Generator | Draws | None


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """D(p || q) = sum_c p_c log(p_c / q_c) of Eq. (3) and (6), with p, q the softmax of logits (B, C). Returns (B,)."""
    log_p, log_q = F.log_softmax(p_logits, dim=1), F.log_softmax(q_logits, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def jensen_shannon(*logits: Tensor) -> Tensor:
    """JS(p_1; ...; p_k) = 1/k sum_i D(p_i || p_mix), p_mix = 1/k sum_i p_i, of Eq. (5). k times (B, C) to (B,)."""
    log_p = F.log_softmax(torch.stack(logits), dim=2)
    log_p_mix = torch.logsumexp(log_p, dim=0) - math.log(len(logits))
    return (log_p.exp() * (log_p - log_p_mix)).sum(dim=2).mean(dim=0)


def forward(model: nn.Module, *copies: Tensor) -> tuple[Tensor, ...]:
    """The logits of each of `copies` (B_i, 3, 32, 32) from one forward pass of all; at least float32."""
    logits = model(torch.cat(copies) if len(copies) > 1 else copies[0])
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return logits.split([len(copy) for copy in copies])


def pgd_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int,
    step_size: float,
    start: Tensor | None = None,
    objective: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    generator: Generator = None,
) -> Tensor:
    """The inner maximisation of Eq. (2) by projected gradient ascent in the l_inf ball, clipped to [0, 1].

    delta <- P_B(eps)(delta + step_size sign(grad_delta objective(f(x + delta), y))), `steps` times, from `start` (B, 3,
    32, 32), by default uniform in the ball (Madry et al., 2018). The network is in eval mode meanwhile, so that its
    batch-norm statistics stay untouched, and frozen: its parameters get no gradient. Returns x_adv, detached.
    Raises ValueError if epsilon or step_size is negative or steps < 0.
    """
    if not (epsilon >= 0 and step_size >= 0 and steps >= 0):
        raise ValueError(f"epsilon {epsilon}, step size {step_size} and steps {steps} of PGD must not be negative")
    network = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model  # no gradients to sync
    if start is None:
        start = x + epsilon * (2 * as_draws(generator, x).uniform(x.shape) - 1)
    x_adv = project(start, x, epsilon)
    with frozen(network):
        for _ in range(steps):
            x_adv.requires_grad_(True)
            with torch.enable_grad():
                (logits,) = forward(network, x_adv)
                # only its sign counts: the factor keeps small gradients from underflow in half precision
                (gradient,) = torch.autograd.grad(1024.0 * objective(logits, y), x_adv)
            x_adv = project(x_adv.detach() + step_size * gradient.sign(), x, epsilon)
    return x_adv.detach()


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """The network in eval mode with its parameters held fixed, both restored at the end.

    Compiled, a network whose parameters want gradients computes them with that of its input, used or not.
    """
    training, parameters = network.training, [p for p in network.parameters() if p.requires_grad]
    network.eval()
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        network.train(training)
        for p in parameters:
            p.requires_grad_(True)


def project(x_adv: Tensor, x: Tensor, epsilon: float) -> Tensor:
    """The nearest point to x_adv in the l_inf ball of radius epsilon about x (P of Sec. 2) and in [0, 1]."""
    return torch.minimum(torch.maximum(x_adv, x - epsilon), x + epsilon).clamp(0, 1)


def standard_loss(model: nn.Module, x: Tensor, y: Tensor, *, generator: Generator = None) -> tuple[Tensor, Tensor]:
    """Eq. (1): L(f(x), y). Draws nothing."""
    (logits,) = forward(model, x)
    return F.cross_entropy(logits, y), logits


def at_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    pgd_steps: int,
    pgd_step_size: float,
    generator: Generator = None,
) -> tuple[Tensor, Tensor]:
    """Eq. (2), adversarial training: max over |delta|_inf <= epsilon of L(f(x + delta), y), by PGD."""
    x_adv = pgd_attack(model, x, y, epsilon=epsilon, steps=pgd_steps, step_size=pgd_step_size, generator=generator)
    (logits,) = forward(model, x_adv)
    return F.cross_entropy(logits, y), logits


def trades_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    trades_lambda: float,
    epsilon: float,
    pgd_steps: int,
    pgd_step_size: float,
    generator: Generator = None,
) -> tuple[Tensor, Tensor]:
    """Eq. (3), TRADES: L(f(x), y) + lambda max over |delta|_inf <= epsilon of D(p(x) || p(x + delta)).

    PGD starts at x + 0.001 N(0, I), as TRADES' own code does: at delta = 0 the divergence has no gradient.
    """
    network = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    with frozen(network), torch.no_grad():
        (clean,) = forward(network, x)  # p(x) as the attack sees it, in eval mode
    x_adv = pgd_attack(
        model,
        x,
        y,
        epsilon=epsilon,
        steps=pgd_steps,
        step_size=pgd_step_size,
        start=x + 0.001 * as_draws(generator, x).normal(x.shape),
        objective=lambda logits, _: kl_divergence(clean, logits).mean(),
    )
    logits, logits_adv = forward(model, x, x_adv)
    return F.cross_entropy(logits, y) + trades_lambda * kl_divergence(logits, logits_adv).mean(), logits


def rse_loss(
    model: nn.Module, x: Tensor, y: Tensor, *, rse_sigma: float, generator: Generator = None
) -> tuple[Tensor, Tensor]:
    """Eq. (4), random self-ensemble, noise on the input only: E_delta L(f(x + delta), y), delta ~ N(0, sigma^2 I)."""
    if not rse_sigma >= 0:
        raise ValueError(f"the noise level of RSE must not be negative, not {rse_sigma}")
    (logits,) = forward(model, x + rse_sigma * as_draws(generator, x).normal(x.shape))
    return F.cross_entropy(logits, y), logits


def gn_loss(
    model: nn.Module, x: Tensor, y: Tensor, *, sigma_max: float, generator: Generator = None
) -> tuple[Tensor, Tensor]:
    """Eq. (12), Gaussian noise training: E_sigma E_delta L(f(x + delta), y), sigma ~ U(0, sigma_max) per image."""
    (logits,) = forward(model, gaussian_noise(x, sigma_max, generator))
    return F.cross_entropy(logits, y), logits


def augmix_loss(
    model: nn.Module, x: Tensor, y: Tensor, *, jsd_lambda: float, generator: Generator = None
) -> tuple[Tensor, Tensor]:
    """Eq. (5), AugMix: L(f(x), y) + lambda JS(p(x); p(x_a1); p(x_a2)), two augmented variants of each image."""
    x_a1, x_a2 = augmix(x.repeat(2, 1, 1, 1), generator).chunk(2)
    logits, logits_a1, logits_a2 = forward(model, x, x_a1, x_a2)
    return F.cross_entropy(logits, y) + jsd_lambda * jensen_shannon(logits, logits_a1, logits_a2).mean(), logits


def magnma_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    lambda1: float,
    lambda2: float,
    sigma_max: float,
    beta: float,
    n: int,
    generator: Generator = None,
) -> tuple[Tensor, Tensor]:
    """Eq. (6) and the body of Algorithm 1, its two loops over k = 1..n made as one batch of n copies of each image.

    L(f(x), y) + lambda1 [p(x)]_y E D(p(x) || p(x + delta)) + lambda2 [p(x)]_y E D(p(x) || p(x_a(w)))

    A zero lambda skips its branch, which gives the paper's two ablations. The gradient flows through the weight
    [p(x)]_y and both arguments of D. Raises ValueError for a negative lambda, or n < 1 where a lambda is positive.
    """
    if not (lambda1 >= 0 and lambda2 >= 0):  # NaN fails too
        raise ValueError(f"lambda1 {lambda1} and lambda2 {lambda2} must not be negative")
    if n < 1 and (lambda1 > 0 or lambda2 > 0):
        raise ValueError(f"n must be at least 1 where lambda1 or lambda2 is positive, not {n}")
    none = x[:0]
    x_delta = gaussian_noise(x.repeat(n, 1, 1, 1), sigma_max, generator) if lambda1 > 0 else none  # x + delta^(k)
    x_a = mixed_augmentation(x.repeat(n, 1, 1, 1), beta, generator) if lambda2 > 0 else none  # w x + (1 - w) T_a(x)
    logits, logits_delta, logits_a = forward(model, x, x_delta, x_a)

    loss = F.cross_entropy(logits, y, reduction="none")  # L(x_i, y_i)
    true_class_confidence = F.softmax(logits, dim=1).gather(1, y[:, None])[:, 0]  # [p(x_i)]_{y_i}
    if lambda1 > 0:
        R = kl_divergence(logits.repeat(n, 1), logits_delta).view(n, -1).mean(dim=0)
        loss = loss + lambda1 * true_class_confidence * R
    if lambda2 > 0:
        Z = kl_divergence(logits.repeat(n, 1), logits_a).view(n, -1).mean(dim=0)
        loss = loss + lambda2 * true_class_confidence * Z
    return loss.mean(), logits


# Each method's own hyperparameters, by the names of train.py's flags.
HPARAMS = {
    "standard": (),
    "at": ("epsilon", "pgd_steps", "pgd_step_size"),
    "trades": ("trades_lambda", "epsilon", "pgd_steps", "pgd_step_size"),
    "rse": ("rse_sigma",),
    "gn": ("sigma_max",),
    "augmix": ("jsd_lambda",),
    "magnma": ("lambda1", "lambda2", "sigma_max", "beta", "n"),
}


def _with_hparams(loss: Callable, keys: tuple[str, ...]) -> Callable:
    def call(model: nn.Module, x: Tensor, y: Tensor, hparams: dict, generator: Generator = None):
        return loss(model, x, y, **{key: hparams[key] for key in keys}, generator=generator)

    return call


# METHODS[name](model, x, y, hparams, generator=None) -> (mean loss, logits), with the method's own keys of hparams.
METHODS = {
    name: _with_hparams(loss, HPARAMS[name])
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
