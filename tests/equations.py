"""The methods as loops written from the paper's equations, for tests to compare with, and small networks to try.

Float64, image by image and class by class, with plain softmax. The draws are those of `losses` because a generator of
the same seed is handed to the augmentations in the same order.
"""

import numpy as np
import torch
from torch import Tensor, nn

import losses
from augment import augmix, gaussian_noise, mixed_augmentation

EPSILON, STEPS, STEP_SIZE = 8 / 255, 3, 2.5 * 8 / 255 / 3
HPARAMS = {
    "epsilon": EPSILON, "pgd_steps": STEPS, "pgd_step_size": STEP_SIZE, "trades_lambda": 6.0,
    "rse_sigma": 0.1, "jsd_lambda": 12.0, "lambda1": 0.2, "lambda2": 0.3, "sigma_max": 0.2, "beta": 1.0, "n": 3,
}  # fmt: skip


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_model() -> nn.Module:
    """(B, 3, 8, 8) -> 4 logits, float64, confident enough for the divergences to matter; no batch norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def norm_model() -> nn.Module:
    """A small convolutional network with batch norm and dropout, float64, its running statistics settled."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(216, 4)
    ).double()
    model(batch()[0])
    return model


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = seeded(1)
    x = torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (count,), generator=generator)


def call(name: str, model: nn.Module, x: Tensor, y: Tensor, seed: int = 5, **changes: float) -> tuple[Tensor, Tensor]:
    return losses.METHODS[name](model, x, y, HPARAMS | changes, seeded(seed))


# The equations as loops


def probabilities(model: nn.Module, x: Tensor) -> list[list[Tensor]]:
    """p_c(x) = e^{f_c(x)} / sum_l e^{f_l(x)} (Sec. 2), image by image and class by class."""
    result = []
    for image in x:
        e = [torch.exp(f) for f in model(image[None])[0]]
        result.append([value / sum(e) for value in e])
    return result


def D(p: list, q: list) -> Tensor:
    """D(p || q) = sum_c p_c log(p_c / q_c)."""
    return sum(p_c * torch.log(p_c / q_c) for p_c, q_c in zip(p, q, strict=True))


def JS(*ps: list) -> Tensor:
    """JS(p_1; ...) = 1/k (D(p_1 || p_mix) + ...), p_mix = 1/k (p_1 + ...)."""
    p_mix = [sum(values) / len(ps) for values in zip(*ps, strict=True)]
    return sum(D(p, p_mix) for p in ps) / len(ps)


def L(p: list, y: int) -> Tensor:
    """-y^T log p."""
    return -torch.log(p[y])


def naive_pgd(model: nn.Module, start: Tensor, x: Tensor, objective) -> Tensor:
    """delta <- P(delta + alpha sign(gradient)), image by image, then the pixels clipped to [0, 1]."""
    result = []
    for i in range(len(x)):
        image, adversarial = x[i], start[i]
        for step in range(STEPS + 1):
            delta = np.clip((adversarial - image).numpy(), -EPSILON, EPSILON)
            adversarial = torch.from_numpy(np.clip(image.numpy() + delta, 0, 1))
            if step < STEPS:
                moving = adversarial.clone().requires_grad_(True)
                (p,) = probabilities(model, moving[None])
                (gradient,) = torch.autograd.grad(objective(p, i), moving)
                adversarial = adversarial + STEP_SIZE * gradient.sign()
        result.append(adversarial)
    return torch.stack(result)


def naive_at_images(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    start = x + EPSILON * (2 * torch.rand(x.shape, generator=generator) - 1)
    return naive_pgd(model, start, x, lambda p, i: L(p, y[i]))


def naive_trades_images(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    start = x + 0.001 * torch.randn(x.shape, generator=generator)
    clean = [[p_c.detach() for p_c in p] for p in probabilities(model, x)]
    return naive_pgd(model, start, x, lambda p, i: D(clean[i], p))


def naive_loss(name: str, model: nn.Module, x: Tensor, y: Tensor, h: dict, generator: torch.Generator) -> Tensor:
    """The loss of method `name` by its equation; `h` its hyperparameters."""
    count = len(x)
    clean = probabilities(model, x)
    if name == "standard":  # Eq. (1)
        return sum(L(clean[i], y[i]) for i in range(count)) / count
    if name == "at":  # Eq. (2)
        attacked = probabilities(model, naive_at_images(model, x, y, generator))
        return sum(L(attacked[i], y[i]) for i in range(count)) / count
    if name == "trades":  # Eq. (3)
        attacked = probabilities(model, naive_trades_images(model, x, y, generator))
        return sum(L(clean[i], y[i]) + h["trades_lambda"] * D(clean[i], attacked[i]) for i in range(count)) / count
    if name == "rse":  # Eq. (4)
        noisy = probabilities(model, x + h["rse_sigma"] * torch.randn(x.shape, generator=generator))
        return sum(L(noisy[i], y[i]) for i in range(count)) / count
    if name == "gn":  # Eq. (12)
        noisy = probabilities(model, gaussian_noise(x, h["sigma_max"], generator).double())
        return sum(L(noisy[i], y[i]) for i in range(count)) / count
    if name == "augmix":  # Eq. (5)
        p_a1, p_a2 = (probabilities(model, half.double()) for half in augmix(x.repeat(2, 1, 1, 1), generator).chunk(2))
        return sum(L(clean[i], y[i]) + h["jsd_lambda"] * JS(clean[i], p_a1[i], p_a2[i]) for i in range(count)) / count
    n, total = h["n"], 0  # Eq. (6), Algorithm 1
    copies = x.repeat(n, 1, 1, 1)
    if h["lambda1"] > 0:
        p_delta = probabilities(model, gaussian_noise(copies, h["sigma_max"], generator).double())
    if h["lambda2"] > 0:
        p_a = probabilities(model, mixed_augmentation(copies, h["beta"], generator).double())
    for i in range(count):
        total = total + L(clean[i], y[i])
        if h["lambda1"] > 0:
            R = sum(D(clean[i], p_delta[k * count + i]) for k in range(n)) / n
            total = total + h["lambda1"] * clean[i][y[i]] * R
        if h["lambda2"] > 0:
            Z = sum(D(clean[i], p_a[k * count + i]) for k in range(n)) / n
            total = total + h["lambda2"] * clean[i][y[i]] * Z
    return total / count


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def record_inputs(model: nn.Module) -> list[Tensor]:
    inputs: list[Tensor] = []
    model.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0].detach().clone()))
    return inputs
