"""losses.py: the methods against loops written from their equations, what they forward, PGD, precision, Sec. 3.1.

The loops are float64, image by image and class by class. They make the draws of losses.py by the same seed: the
augmentations are called in the same order.
"""

import copy
import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import torch
from torch import Tensor, nn

import losses
import models
import utils
from augment import augmix, gaussian_noise, mixed_augmentation, preprocess
from models import build_model

OURS = ("standard", "at", "trades", "rse", "gn", "augmix", "magnma")
CLEAN_LOGITS = ("standard", "trades", "augmix", "magnma")
EPSILON, STEPS, STEP_SIZE = 8 / 255, 3, 2.5 * 8 / 255 / 3
HPARAMS = {
    "epsilon": EPSILON, "pgd_steps": STEPS, "pgd_step_size": STEP_SIZE, "trades_lambda": 3.0, "rse_sigma": 0.1,
    "jsd_lambda": 12.0, "lambda1": 0.2, "lambda2": 0.3, "sigma_max": 0.2, "beta": 1.0, "n": 3, "joint": False,
}  # fmt: skip


def tiny_model() -> nn.Module:
    """(B, 3, 8, 8) -> 4 logits, float64, confident enough for the divergences to matter; no batch norm."""
    torch.manual_seed(0)
    f = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    with torch.no_grad():
        for parameter in f.parameters():
            parameter.mul_(3)
    return f


def norm_model() -> nn.Module:
    """(B, 3, 8, 8) -> 4 logits, float64, with batch norm and dropout, its running statistics moved."""
    torch.manual_seed(0)
    f = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(216, 4))
    f.double()(batch()[0])
    return f


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 8, 8, generator=g, dtype=torch.float64), torch.randint(4, (count,), generator=g)


def call(name: str, f: nn.Module, x: Tensor, y: Tensor, seed: int = 5, **changes: object) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return losses.METHODS[name](f, x, y, HPARAMS | changes)


def gradients(loss: Tensor, f: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(f.parameters()), retain_graph=True))


# The equations as loops


def probabilities(f: nn.Module, x: Tensor) -> list[list[Tensor]]:
    """p_c(x) = e^{f_c(x)} / sum_l e^{f_l(x)} (Sec. 2), image by image and class by class."""
    e = [[torch.exp(logit) for logit in f(image[None])[0]] for image in x]
    return [[value / sum(values) for value in values] for values in e]


def D(p: list, q: list) -> Tensor:
    return sum(p_c * torch.log(p_c / q_c) for p_c, q_c in zip(p, q, strict=True))


def JS(*ps: list) -> Tensor:
    p_mix = [sum(values) / len(ps) for values in zip(*ps, strict=True)]
    return sum(D(p, p_mix) for p in ps) / len(ps)


def L(p: list, y: int) -> Tensor:
    return -torch.log(p[y])


def naive_pgd(f: nn.Module, x: Tensor, start: Tensor, objective) -> Tensor:
    """delta <- P(delta + alpha sign(gradient)) from P(start), image by image; pixels may leave [0, 1]."""
    result = []
    for i in range(len(x)):
        delta = np.clip(start[i].numpy(), -EPSILON, EPSILON)
        for _ in range(STEPS):
            moving = (x[i] + torch.from_numpy(delta)).requires_grad_(True)
            (gradient,) = torch.autograd.grad(objective(probabilities(f, moving[None])[0], i), moving)
            delta = np.clip(delta + STEP_SIZE * np.sign(gradient.numpy()), -EPSILON, EPSILON)
        result.append(x[i] + torch.from_numpy(delta))
    return torch.stack(result)


def naive_loss(name: str, f: nn.Module, x: Tensor, y: Tensor, h: dict) -> Tensor:
    """The loss of a method by its equation, h its hyperparameters, with the draws of `call`."""
    torch.manual_seed(5)
    images, p = range(len(x)), probabilities(f, x)
    if name == "standard":  # Eq. (1)
        total = [L(p[i], y[i]) for i in images]
    elif name == "at":  # Eq. (2), from delta = 0
        attacked = probabilities(f, naive_pgd(f, x, torch.zeros_like(x), lambda p, i: L(p, y[i])))
        total = [L(attacked[i], y[i]) for i in images]
    elif name == "trades":  # Eq. (3), from 0.001 N(0, I)
        fixed = [[p_c.detach() for p_c in p_i] for p_i in p]
        attacked = probabilities(f, naive_pgd(f, x, 0.001 * torch.randn_like(x), lambda p, i: D(fixed[i], p)))
        total = [L(p[i], y[i]) + h["trades_lambda"] * D(p[i], attacked[i]) for i in images]
    elif name == "rse":  # Eq. (4)
        noisy = probabilities(f, x + h["rse_sigma"] * torch.randn(x.shape, dtype=x.dtype))
        total = [L(noisy[i], y[i]) for i in images]
    elif name == "gn":  # Eq. (12)
        noisy = probabilities(f, gaussian_noise(x, h["sigma_max"]))
        total = [L(noisy[i], y[i]) for i in images]
    elif name == "augmix":  # Eq. (5)
        a1, a2 = (probabilities(f, augmix(x)) for _ in range(2))
        total = [L(p[i], y[i]) + h["jsd_lambda"] * JS(p[i], a1[i], a2[i]) for i in images]
    else:  # Eq. (6), Algorithm 1
        n = h["n"]
        noisy = [probabilities(f, gaussian_noise(x, h["sigma_max"])) for _ in range(n if h["lambda1"] else 0)]
        mixed = [probabilities(f, mixed_augmentation(x, h["beta"])) for _ in range(n if h["lambda2"] else 0)]
        R = [sum(D(p[i], q[i]) for q in noisy) / n for i in images]
        Z = [sum(D(p[i], q[i]) for q in mixed) / n for i in images]
        total = [L(p[i], y[i]) + (h["lambda1"] * R[i] + h["lambda2"] * Z[i]) * p[i][y[i]] for i in images]
    return sum(total) / len(x)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in OURS),
        ("magnma", {"lambda2": 0.0, "sigma_max": 0.5, "n": 5}),
        ("magnma", {"lambda1": 0.0, "lambda2": 5.0, "beta": 0.5}),
    ],
)
def test_each_method_equals_the_loop_of_its_equation_in_value_and_gradient(name, changes):
    """The gradient too: it flows through the weight [p(x)]_y of Eq. (6) and through both arguments of D."""
    f, (x, y) = tiny_model(), batch()
    loss, logits = call(name, f, x, y, **changes)
    naive = naive_loss(name, f, x, y, HPARAMS | changes)
    torch.testing.assert_close(loss, naive, rtol=1e-9, atol=0)
    for ours, theirs in zip(gradients(loss, f), gradients(naive, f), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    joint, joint_logits = call(name, f, x, y, joint=True, **changes)  # without batch norm it is the same
    torch.testing.assert_close(joint, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(joint_logits, logits)
    assert torch.allclose(logits, f(x)) == (name in CLEAN_LOGITS)
    other = call(name, f, x, y, seed=6, **changes)[0]
    assert (abs(loss - other) > 1e-6) == (name not in ("standard", "at"))  # these two draw nothing


def test_n_of_zero_is_named():
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        call("magnma", tiny_model(), *batch(), n=0)


# The divergences


def logits_of(seed: int, count: int = 7) -> Tensor:
    return 4 * torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_divergences_equal_scipys_and_pass_gradcheck():
    logits = [logits_of(seed) for seed in (1, 2)]
    p, q = (values.softmax(1).numpy() for values in logits)
    kl, js = losses.kl_divergence(*logits), losses.jensen_shannon(*logits)
    np.testing.assert_allclose(kl, scipy.special.rel_entr(p, q).sum(1), rtol=1e-10)
    np.testing.assert_allclose(js, scipy.spatial.distance.jensenshannon(p, q, axis=1) ** 2, rtol=1e-10)  # its root
    arguments = [logits_of(seed, 3).requires_grad_(True) for seed in (1, 2, 3)]
    assert torch.autograd.gradcheck(losses.kl_divergence, arguments[:2])
    assert torch.autograd.gradcheck(losses.jensen_shannon, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_divergences_are_finite_and_at_least_float32_for_logits_of_1e4(dtype):
    a = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [1e4, 1e4, -1e4]]).to(dtype).requires_grad_()
    b = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]]).to(dtype).requires_grad_()
    kl, js = losses.kl_divergence(a, b), losses.jensen_shannon(a, b)
    assert kl.dtype == js.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    wide = 2 * a[0, 0].item()  # bfloat16's 1e4 is 9984
    torch.testing.assert_close(kl.double(), torch.tensor([wide, 0.0, wide - math.log(2)]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(js.double(), torch.tensor([math.log(2), 0, math.log(2)]).double())
    for value in (kl, js):
        assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), (a, b), retain_graph=True))


# What is forwarded


@pytest.mark.parametrize(
    ("name", "changes", "copies"),
    [
        *((name, {}, 1) for name in ("standard", "at", "rse", "gn")),
        ("trades", {}, 2),
        ("augmix", {}, 3),
        ("magnma", {}, 7),
        ("magnma", {"lambda2": 0.0}, 4),
        ("magnma", {"lambda1": 0.0}, 4),
        ("magnma", {"lambda1": 0.0, "lambda2": 0.0}, 1),
    ],
)
def test_each_copy_is_forwarded_apart_or_all_in_one_pass(name, changes, copies):
    for joint, passes in ((False, copies), (True, 1)):
        f, seen = norm_model(), []
        f.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append((inputs[0], module.training)))
        call(name, f, *batch(), joint=joint, **changes)
        trained = [images for images, training in seen if training]
        assert [len(images) for images in trained] == [6 * copies // passes] * passes
        assert len(torch.cat(trained).unique(dim=0)) == 6 * copies  # each copy has draws of its own
        assert len(seen) - passes == {"at": STEPS, "trades": 1 + STEPS}.get(name, 0)  # the attack's, in eval mode


# PGD


def attack(f: nn.Module, x: Tensor, y: Tensor, start: float = 0.0, **changes: object) -> Tensor:
    options = {"epsilon": EPSILON, "steps": STEPS, "step_size": STEP_SIZE, "start": torch.full_like(x, start)}
    return losses.pgd_attack(f, x, lambda z: nn.functional.cross_entropy(z, y, reduction="none"), **options | changes)


def test_pgd_stays_in_the_ball_but_not_in_the_image_range_and_raises_the_loss():
    f, (x, y) = tiny_model(), batch(32)
    x[:8], x[8:16] = x[:8].round(), x[8:16] * 0.05  # many pixels at and near the ends of the range
    x_adv = attack(f, x, y, steps=7, step_size=2.5 * EPSILON / 7)
    assert 0.999 * EPSILON < (x_adv - x).abs().max() <= EPSILON + 1e-12
    assert x_adv.min() == pytest.approx(-EPSILON)
    assert x_adv.max() == pytest.approx(1 + EPSILON)
    before, after = (nn.functional.cross_entropy(f(images), y, reduction="none") for images in (x, x_adv))
    assert (after > before).all()
    torch.testing.assert_close(attack(f, x, y, start=5, steps=0), x + EPSILON)  # the start is projected, too
    assert torch.equal(attack(f, x, y, epsilon=0.0), x)


@pytest.mark.parametrize("training", [True, False])
def test_pgd_leaves_no_trace_on_the_network(training):
    f, (x, y) = norm_model().train(training), batch()
    f[0].bias.requires_grad_(False)  # frozen by the user: it stays so
    before, given, modes = copy.deepcopy(f.state_dict()), x.clone(), []
    f.register_forward_pre_hook(lambda m, _: modes.append((m.training, any(p.requires_grad for p in m.parameters()))))
    x_adv = attack(f, x, y)
    assert modes == [(False, False)] * STEPS
    assert [name for name, parameter in f.named_parameters() if not parameter.requires_grad] == ["0.bias"]
    assert all(module.training is training for module in f.modules())
    assert all(torch.equal(value, before[name]) for name, value in f.state_dict().items())
    assert all(parameter.grad is None for parameter in f.parameters())
    assert torch.equal(x, given)
    assert not x_adv.requires_grad


# A training step: device, precision, memory, compiler


def network(arch: str = "resnet20") -> nn.Module:
    torch.manual_seed(0)
    return build_model(arch, 10).to(memory_format=torch.channels_last)


def images(count: int) -> tuple[Tensor, Tensor]:
    blobs = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(blobs, 32, mode="bilinear"), torch.arange(count) % 10


def step(f: nn.Module, name: str, count: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The loss, and all gradients in one, of a step as train.py takes it."""
    x, y = images(count)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    sgd = torch.optim.SGD(f.parameters(), lr=0.1)
    with utils.autocast(torch.device("cpu"), dtype):
        loss, _ = call(name, f, x, y, n=1, pgd_steps=2)
    scaler.scale(loss).backward()
    scaler.unscale_(sgd)
    return loss.detach(), torch.cat([p.grad.flatten() for p in f.parameters()])


@pytest.mark.parametrize("name", OURS)
def test_a_step_waits_for_no_device_and_mixes_none(name):
    """Meta tensors have no values to wait for, and refuse to meet a CPU tensor: as a GPU would, at any place.

    It does not see a host index into a device tensor, which waits, nor the gradient scaler, which has no meta device.
    """
    f = network().to("meta")
    sgd = torch.optim.SGD(f.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    u8 = preprocess(torch.empty(16, 3, 32, 32, dtype=torch.uint8, device="meta"), True)
    y = torch.empty(16, dtype=torch.int64, device="meta")
    loss, logits = call(name, f, u8.float() / 255, y)
    loss.backward()
    sgd.step()
    assert u8.device.type == loss.device.type == logits.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OURS)
def test_mixed_precision_stays_close_to_float32(name, dtype):
    count = 4 if dtype is torch.float16 else 8  # fp16 is slow on a CPU
    (exact, gradient), (loss, rough) = step(network(), name, count), step(network(), name, count, dtype)
    assert loss.dtype == torch.float32
    assert loss != exact
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    least = 0.7 if name == "at" else 0.9  # the attack's signs differ where its gradient is small
    assert torch.cosine_similarity(gradient, rough, dim=0) > least


@pytest.mark.parametrize(
    ("arch", "name", "count", "dtype"),
    [
        *(("resnet20", name, 8, None) for name in ("standard", "at", "trades", "magnma")),
        ("resnet20", "trades", 8, torch.bfloat16),
        ("inceptionv3", "magnma", 2, None),  # dropout
    ],
)
def test_recompute_changes_neither_loss_nor_gradient_nor_buffers(arch, name, count, dtype):
    plain, f, passes = network(arch), network(arch), []
    next(f.children()).register_forward_pre_hook(lambda *_: passes.append(1))
    models.recompute(f)
    (loss, gradient), (ours, theirs) = step(plain, name, count, dtype), step(f, name, count, dtype)
    assert torch.equal(ours, loss)
    assert torch.equal(theirs, gradient)
    assert all(torch.equal(a, b) for a, b in zip(f.buffers(), plain.buffers(), strict=True))
    assert len(passes) == {"standard": 2, "at": 6, "trades": 9, "magnma": 6}[name]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["standard", "trades", "magnma"])
def test_a_compiled_step_is_close_to_an_eager_one(name, recompute):
    plain, f = network(), network()
    f.forward = torch.compile(f.forward, dynamic=False)
    if recompute:
        models.recompute(f)
    (loss, gradient), (ours, theirs) = step(plain, name, 8), step(f, name, 8)
    torch.testing.assert_close(ours, loss, rtol=1e-3, atol=0)
    assert torch.cosine_similarity(gradient, theirs, dim=0) > 0.99  # a few signs of the attack may differ
    for a, b in zip(f.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3)


# Sec. 3.1, on a network of 12 inputs and 4 logits, piecewise linear in its input

SHAPE = (3, 2, 2)


def theory_network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)
    f = nn.Sequential(nn.Flatten(), *layers).double().requires_grad_(False)
    for parameter in f.parameters():
        parameter.mul_(2.5)
    return f


def loss_of(f: nn.Module, y: int):
    """x -> L(f(x), y) of one image."""
    return lambda x: nn.functional.cross_entropy(f(x[None]), torch.tensor([y]))


def fisher(f: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (7) as written, G = sum_k p_k grad log p_k (grad log p_k)^T; p (4,), the gradients (4, 12)."""
    gradients = torch.autograd.functional.jacobian(lambda x: f(x[None])[0].log_softmax(0), x).flatten(1)
    p = f(x[None])[0].softmax(0)
    return sum(p[k] * torch.outer(gradients[k], gradients[k]) for k in range(4)), p, gradients


def hessian(function, x: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(function, x).view(12, 12)


def test_proposition_1_the_hessian_is_the_fisher_matrix():
    f = theory_network()
    for x in torch.rand(3, *SHAPE).double():
        G, _, _ = fisher(f, x)
        for y in range(4):
            torch.testing.assert_close(hessian(loss_of(f, y), x), G, rtol=1e-9, atol=1e-11)


def test_eq_8_to_10_what_gaussian_noise_costs_by_monte_carlo():
    """Noise so small that x + delta stays in the linear region of x; training's noise and divergence."""
    f, count, sigma = theory_network(), 60_000, 1e-3
    for x in torch.rand(2, *SHAPE).double():
        G, p, gradients = fisher(f, x)
        torch.testing.assert_close(G.trace(), (p * gradients.square().sum(1)).sum())  # Eq. (10)
        copies = x.expand(count, *SHAPE)
        for samples, expected in (
            (copies + sigma * torch.randn_like(copies), sigma**2 / 2 * G.trace()),  # Eq. (8)
            (gaussian_noise(copies, sigma), sigma**2 / 6 * G.trace()),  # Eq. (9)
        ):
            divergence = losses.kl_divergence(f(x[None]), f(samples))
            error = divergence.std() / count**0.5
            assert error < 0.01 * expected
            assert abs(divergence.mean() - expected) < 4 * error


def test_theorem_1_bounds_the_loss_up_to_a_remainder_that_vanishes_faster_than_the_square():
    """Eq. (11), and around it: |grad L|^2 = sum_k y_k |grad log p_k|^2, lambda_max(H) <= Tr(H)."""
    f = theory_network()
    for x in torch.rand(3, *SHAPE).double():
        _, _, gradients = fisher(f, x)
        for y in range(4):
            slope, H = gradients[y].norm(), hessian(loss_of(f, y), x)
            eigenvalues, vectors = torch.linalg.eigh(H)
            torch.testing.assert_close(torch.autograd.functional.jacobian(loss_of(f, y), x).norm(), slope)
            assert eigenvalues[-1] <= H.trace() * (1 + 1e-12)
            directions = torch.cat([torch.randn(200, 12).double(), gradients[y : y + 1], vectors[:, -1:].T])
            directions /= directions.norm(dim=1, keepdim=True)
            excess = []
            for size in (4e-3, 1e-3):
                samples = x + (size * directions).view(-1, *SHAPE)
                labels = torch.full((len(samples),), y)
                change = nn.functional.cross_entropy(f(samples), labels, reduction="none") - loss_of(f, y)(x)
                excess.append((change.abs() - size * slope - eigenvalues[-1] / 2 * size**2).amax() / size**2)
                assert change.abs().amax() > 0.9 * size * slope  # along the gradient the bound is all but reached
            assert excess[1] < max(0.3 * excess[0], 1e-6)  # o(|delta|^2)
