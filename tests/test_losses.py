"""losses.py: each method against a loop of its equation, PGD, a training step, Sec. 3.1.

The loops are float64, image by image and class by class. They repeat the draws of losses.py: the
same seed, and the augmentations called in the same order.
"""

import contextlib
import copy
import itertools
import math
import re
import sys

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor, nn

import losses
import models
import utils
from augment import augmix, gaussian_noise, mixed_augmentation, preprocess
from models import build_model

EPSILON, STEPS = 8 / 255, 3
PGD = {"epsilon": EPSILON, "pgd_steps": 7, "pgd_step_size": None}
PAPER = {
    "standard": {}, "at": PGD, "trades": {**PGD, "trades_lambda": 3.0, "joint": False},
    "rse": {"rse_sigma": 0.1}, "gn": {"sigma_max": 0.2},
    "augmix": {"jsd_lambda": 12.0, "joint": False},
    "magnma": {"lambda1": 0.2, "lambda2": 0.3, "sigma_max": 0.2, "beta": 1.0, "n": 5,
               "operations": "A", "joint": False},
}  # fmt: skip
SHORT = {"pgd_steps": STEPS, "n": 3}  # for speed


def tiny_network() -> nn.Module:
    """(B, 3, 8, 8) -> 4 logits, float64, with divergences that matter; no batch norm."""
    torch.manual_seed(0)
    f = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    nn.utils.vector_to_parameters(3 * nn.utils.parameters_to_vector(f.parameters()), f.parameters())
    return f


def norm_network() -> nn.Module:
    """(B, 3, 8, 8) -> 4 logits, float64, with dropout and a batch norm that has seen images."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
    f = nn.Sequential(*first, nn.Dropout(), nn.Flatten(), nn.Linear(216, 4)).double()
    f(batch()[0])
    return f


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(count, 3, 8, 8, generator=g, dtype=torch.float64)
    return x, torch.randint(4, (count,), generator=g)


def call(name: str, f: nn.Module, x: Tensor, y: Tensor, seed=5, **changes) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return losses.METHODS[name](f, x, y, SHORT | changes)


# The arguments


def test_the_defaults_are_the_papers():
    assert {name: method.defaults for name, method in losses.METHODS.items()} == PAPER


def test_losses_and_augment_need_torch_alone():
    for file, others in (("augment.py", {"torch"}), ("losses.py", {"torch", "augment"})):
        lines = (ROOT / file).read_text()
        imported = set(re.findall(r"^ *(?:import|from) (\w+)", lines, re.MULTILINE))
        assert imported - set(sys.stdlib_module_names) == others


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


def naive_pgd(f: nn.Module, x: Tensor, start: Tensor, objective, h: dict) -> Tensor:
    """delta <- P(delta + alpha sign(gradient)) from P(start), image by image, not clipped."""
    result, epsilon, steps = [], h["epsilon"], h["pgd_steps"]
    alpha = h["pgd_step_size"] or 2.5 * epsilon / steps
    for i in range(len(x)):
        delta = np.clip(start[i].numpy(), -epsilon, epsilon)
        for _ in range(steps):
            moving = (x[i] + torch.from_numpy(delta)).requires_grad_(True)
            value = objective(probabilities(f, moving[None])[0], i)
            (gradient,) = torch.autograd.grad(value, moving)
            delta = np.clip(delta + alpha * np.sign(gradient.numpy()), -epsilon, epsilon)
        result.append(x[i] + torch.from_numpy(delta))
    return torch.stack(result)


def naive_loss(name: str, f: nn.Module, x: Tensor, y: Tensor, h: dict) -> Tensor:
    """The loss of a method by its equation, h its hyperparameters, with the draws of `call`."""
    torch.manual_seed(5)
    images, p = range(len(x)), probabilities(f, x)
    if name == "standard":  # Eq. (1)
        total = [L(p[i], y[i]) for i in images]
    elif name == "at":  # Eq. (2), from delta = 0
        x_adv = naive_pgd(f, x, torch.zeros_like(x), lambda q, i: L(q, y[i]), h)
        attacked = probabilities(f, x_adv)
        total = [L(attacked[i], y[i]) for i in images]
    elif name == "trades":  # Eq. (3), from 0.001 N(0, I)
        fixed = [[p_c.detach() for p_c in p_i] for p_i in p]
        start = 0.001 * torch.randn_like(x)
        x_adv = naive_pgd(f, x, start, lambda q, i: D(fixed[i], q), h)
        attacked = probabilities(f, x_adv)
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
        n, noisy, mixed = h["n"], [], []
        for _ in range(n if h["lambda1"] else 0):
            noisy.append(probabilities(f, gaussian_noise(x, h["sigma_max"])))
        for _ in range(n if h["lambda2"] else 0):
            mixed.append(probabilities(f, mixed_augmentation(x, h["beta"], h["operations"])))
        total = []
        for i in images:
            R = sum(D(p[i], q[i]) for q in noisy) / n
            Z = sum(D(p[i], q[i]) for q in mixed) / n
            confidence = p[i][y[i]]
            weighted = h["lambda1"] * confidence * R + h["lambda2"] * confidence * Z
            total.append(L(p[i], y[i]) + weighted)
    return sum(total) / len(x)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in PAPER),
        ("magnma", {"operations": "augmix"}),
        ("magnma", {"lambda2": 0.0, "sigma_max": 0.5, "n": 5}),
        ("magnma", {"lambda1": 0.0, "lambda2": 5.0, "beta": 0.5}),
        ("at", {"epsilon": 0.1, "pgd_step_size": 0.02}),
        ("trades", {"trades_lambda": 6.0, "epsilon": 0.1, "pgd_step_size": 0.02, "pgd_steps": 2}),
        ("augmix", {"jsd_lambda": 1.0}),
        ("gn", {"sigma_max": 0.5}),
        ("rse", {"rse_sigma": 0.3}),
    ],
)
def test_each_method_equals_the_loop_of_its_equation_in_value_and_gradient(name, changes):
    """The gradient too: it flows through the weight [p(x)]_y and through both arguments of D."""
    f, (x, y) = tiny_network(), batch()
    loss, logits = call(name, f, x, y, **changes)
    naive = naive_loss(name, f, x, y, PAPER[name] | SHORT | changes)
    torch.testing.assert_close(loss, naive, rtol=1e-9, atol=0)
    gradients, expected = (
        torch.autograd.grad(value, list(f.parameters())) for value in (loss, naive)
    )
    torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-10)
    joint, joint_logits = call(name, f, x, y, joint=True, **changes)  # without batch norm: equal
    torch.testing.assert_close(joint, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(joint_logits, logits)
    clean = name in ("standard", "trades", "augmix", "magnma")
    assert torch.allclose(logits, f(x)) == clean
    other = call(name, f, x, y, seed=6, **changes)[0]
    assert (abs(loss - other) > 1e-6) == (name not in ("standard", "at"))  # these two draw nothing


# The divergences


def test_the_divergences_equal_scipys():
    torch.manual_seed(1)
    logits = [4 * torch.randn(7, 5, dtype=torch.float64) for _ in range(2)]
    p, q = (values.softmax(1).numpy() for values in logits)
    kl, js = losses.kl_divergence(*logits), losses.jensen_shannon(*logits)
    np.testing.assert_allclose(kl, scipy.special.rel_entr(p, q).sum(1), rtol=1e-10)
    root = scipy.spatial.distance.jensenshannon(p, q, axis=1)
    np.testing.assert_allclose(js, root**2, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_divergences_are_finite_and_at_least_float32_for_logits_of_1e4(dtype):
    a = torch.tensor([[1e4, -1e4, 0], [1e4, -1e4, 0], [1e4, 1e4, -1e4]]).to(dtype).requires_grad_()
    b = torch.tensor([[-1e4, 1e4, 0], [1e4, -1e4, 0], [-1e4, -1e4, 1e4]]).to(dtype).requires_grad_()
    kl, js = losses.kl_divergence(a, b), losses.jensen_shannon(a, b)
    assert kl.dtype == js.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    gap, log2 = 2 * a[0, 0].item(), math.log(2)  # bfloat16's 1e4 is 9984
    for value, expected, atol in ((kl, [gap, 0, gap - log2], 0), (js, [log2, 0, log2], 1e-6)):
        torch.testing.assert_close(value, value.new_tensor(expected), rtol=1e-6, atol=atol)
        for gradient in torch.autograd.grad(value.sum(), (a, b), retain_graph=True):
            assert gradient.isfinite().all()


# What is forwarded


@pytest.mark.parametrize("name", PAPER)
def test_every_loss_but_standards_refuses_images_of_another_form(name):
    f, (x, y) = tiny_network(), batch()
    x = (x - 0.5) / 0.25
    if name == "standard":
        expected = F.cross_entropy(f(x), y)
        return torch.testing.assert_close(call(name, f, x, y)[0], expected)
    for weights in ({}, {"lambda1": 0.0, "lambda2": 0.0}):
        with pytest.raises(ValueError, match=r"; expected floats \(B, 3, H, W\) in \[0, 1\]"):
            call(name, None, x, y, **weights)  # before the network is called
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        call("magnma", f, *batch(), n=0)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    ("name", "lambdas", "copies"),
    [
        *((name, (1, 1), 1) for name in ("standard", "at", "rse", "gn")),
        ("trades", (1, 1), 2), ("augmix", (1, 1), 3), ("magnma", (1, 1), 7),
        ("magnma", (1, 0), 4), ("magnma", (0, 1), 4), ("magnma", (0, 0), 1),
    ],
)  # fmt: skip
def test_each_copy_is_forwarded_separately_or_all_as_one_batch(name, lambdas, copies, joint):
    f, seen, passes = norm_network(), [], 1 if joint else copies
    f.register_forward_pre_hook(lambda f, inputs: seen.append((f.training, inputs[0])))
    call(name, f, *batch(), joint=joint, lambda1=lambdas[0], lambda2=lambdas[1])
    trained = [images for training, images in seen if training]
    assert [len(images) for images in trained] == [6 * copies // passes] * passes
    assert len(torch.cat(trained).unique(dim=0)) == 6 * copies  # each copy has its own draws
    assert name in ("at", "rse", "gn") or torch.equal(trained[0][:6], batch()[0])  # x first
    assert len(seen) - passes == {"at": STEPS, "trades": 1 + STEPS}.get(name, 0)  # the attack's


# PGD


def attack(f: nn.Module, x: Tensor, y: Tensor, start=0.0, **changes) -> Tensor:
    options = {"epsilon": EPSILON, "steps": STEPS, "step_size": None}
    options |= {"start": torch.full_like(x, start)} | changes
    return losses.pgd_attack(
        f, x, lambda logits: F.cross_entropy(logits, y, reduction="none"), **options
    )


def test_pgd_has_no_graph_runs_without_gradients_and_projects_its_start():
    f, (x, y) = tiny_network(), batch()
    x_adv = attack(f, x, y, steps=7)
    assert not x_adv.requires_grad
    with torch.no_grad():  # as in a validation loop
        assert torch.equal(attack(f, x, y, steps=7), x_adv)
    torch.testing.assert_close(attack(f, x, y, start=5, steps=0), x + EPSILON)  # projected, too
    assert torch.equal(attack(f, x, y, epsilon=0.0), x)


def test_large_half_precision_gradients_move_the_attack():
    """The derivative by the hidden units is 4e4 and -4e4; float16 ends at 65504."""
    torch.manual_seed(0)
    f = nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.Linear(2, 2, bias=False))
    f[2].weight.data, x = 2e4 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.rand(1, 3, 2, 2)
    y = f(x).argmin(1)
    with utils.autocast(torch.device("cpu"), torch.float16):
        x_adv = attack(f, x, y, steps=1, step_size=EPSILON)
    torch.testing.assert_close(x_adv, attack(f, x, y, steps=1, step_size=EPSILON))


def test_small_half_precision_gradients_move_the_attack():
    """A confident network: the loss's derivative by the other logit, 2.5e-8, is 0 in float16."""
    torch.manual_seed(0)
    f, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(1, 3, 2, 2)
    f.requires_grad_(False)
    f[1].weight[0], f[1].bias[1] = -f[1].weight[1], 0
    f[1].bias[0] += 17.5 - (f(x)[0, 0] - f(x)[0, 1])
    with utils.autocast(torch.device("cpu"), torch.float16):
        x_adv = attack(f, x, torch.tensor([0]), steps=1, step_size=EPSILON)
    torch.testing.assert_close(x_adv, x + EPSILON * f[1].weight[1].sign().view_as(x))


def test_a_module_with_a_train_of_its_own_is_switched_back():
    class Adapter(nn.Linear):  # as LoRA's: in eval mode its weights are merged
        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    f = nn.Sequential(nn.Flatten(), Adapter(192, 4, dtype=torch.float64)).train()
    call("at", f, *batch())
    assert not f[1].merged


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["at", "trades"])
def test_the_network_comes_back_as_it_was(name, fails):
    """Each submodule's mode, frozen parameters, buffers; also when the network raises an error."""
    f, (x, y), seen = norm_network().eval(), batch(), []
    f[0].bias.requires_grad_(False)  # frozen by the user
    f[3].train()  # dropout, in eval mode too: the user's own idea

    def look(*_):
        modes = any(module.training for module in f.modules())
        seen.append((modes, any(p.requires_grad for p in f.parameters())))
        if fails and len(seen) == 2:
            raise ZeroDivisionError

    f.register_forward_pre_hook(look)
    modes, before, given = (
        [m.training for m in f.modules()],
        copy.deepcopy(f.state_dict()),
        x.clone(),
    )
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        call(name, f, x, y)
    passes = 2 if fails else {"at": STEPS, "trades": 1 + STEPS}[name]
    assert seen[:passes] == [(False, False)] * passes
    assert [module.training for module in f.modules()] == modes
    assert [key for key, p in f.named_parameters() if not p.requires_grad] == ["0.bias"]
    torch.testing.assert_close(f.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in f.parameters())
    assert torch.equal(x, given)


# A training step: device, precision, memory, compiler


def resnet20() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet20", 10).to(memory_format=torch.channels_last)


def images(count: int) -> tuple[Tensor, Tensor]:
    blobs = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(blobs, 32, mode="bilinear"), torch.arange(count) % 10


def step(f: nn.Module, name: str, x: Tensor, y: Tensor, dtype=None) -> tuple[Tensor, Tensor]:
    """The loss, and all gradients in one vector, of a step as train.py takes it."""
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    with utils.autocast(torch.device("cpu"), dtype):
        loss, _ = call(name, f, x, y, n=1, pgd_steps=2)
    scaler.scale(loss).backward()
    scaler.unscale_(torch.optim.SGD(f.parameters(), lr=0.1))
    return loss.detach(), torch.cat([p.grad.flatten() for p in f.parameters()])


@pytest.mark.parametrize("name", PAPER)
def test_a_step_never_waits_for_the_device_nor_mixes_devices(name):
    """Meta tensors have no values to wait for, and operations with a CPU tensor are refused.

    Not seen: a host index into a device tensor, which waits, and the gradient scaler.
    """
    f = resnet20().to("meta")
    sgd = utils.optimiser(f, lr=0.1, weight_decay=5e-4)
    u8 = preprocess(torch.empty(16, 3, 32, 32, dtype=torch.uint8, device="meta"), True)
    y = torch.empty(16, dtype=torch.int64, device="meta")
    loss, logits = call(name, f, u8.float() / 255, y)
    loss.backward()
    sgd.step()
    assert u8.device.type == loss.device.type == logits.device.type == "meta"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in PAPER),
        *((name, torch.float16) for name in ("trades", "magnma")),  # slow on a CPU
    ],
)
def test_mixed_precision_stays_close_to_float32(name, dtype):
    x, y = images(4 if dtype is torch.float16 else 8)  # float16 is slow on a CPU
    exact, gradient = step(resnet20(), name, x, y)
    loss, rough = step(resnet20(), name, x, y, dtype)
    assert loss.dtype == torch.float32
    assert loss != exact
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    least = 0.7 if name == "at" else 0.9  # the attack's signs differ where its gradient is small
    assert torch.cosine_similarity(gradient, rough, dim=0) > least


@pytest.mark.parametrize(("name", "passes"), [("at", 6), ("trades", 9), ("magnma", 6)])
def test_recompute_changes_neither_loss_nor_gradient_nor_buffers(name, passes):
    """In mixed precision; tests/test_models.py has dropout and other batch norms."""
    plain, f, seen = resnet20(), resnet20(), []
    next(f.children()).register_forward_pre_hook(lambda *_: seen.append(1))
    models.recompute(f)
    expected = step(plain, name, *images(8), torch.bfloat16)
    torch.testing.assert_close(step(f, name, *images(8), torch.bfloat16), expected, rtol=0, atol=0)
    torch.testing.assert_close(f.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert len(seen) == passes


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["standard", "trades", "magnma"])
def test_a_compiled_step_is_close_to_an_eager_one(name, recompute):
    plain, f = resnet20(), resnet20()
    f.forward = torch.compile(f.forward, dynamic=False)
    if recompute:
        models.recompute(f)
    expected_loss, expected = step(plain, name, *images(8))
    loss, gradient = step(f, name, *images(8))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=0)
    # a few signs of the attack may differ
    assert torch.cosine_similarity(gradient, expected, dim=0) > 0.99
    torch.testing.assert_close(f.state_dict(), plain.state_dict(), rtol=1e-2, atol=2e-3)


# Sec. 3.1, on a network of 12 inputs and 4 logits, piecewise linear in its input

SHAPE = (3, 2, 2)


def theory_network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)
    f = nn.Sequential(nn.Flatten(), *layers).double().requires_grad_(False)
    nn.utils.vector_to_parameters(
        2.5 * nn.utils.parameters_to_vector(f.parameters()), f.parameters()
    )
    return f


def loss_of(f: nn.Module, y: int):
    """x -> L(f(x), y) of one image."""
    return lambda x: F.cross_entropy(f(x[None]), torch.tensor([y]))


def fisher(f: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (7) as written, G = sum_k p_k grad log p_k (grad log p_k)^T; p; grad log p_k."""

    def log_p(x: Tensor) -> Tensor:
        return f(x[None])[0].log_softmax(0)

    gradients = torch.autograd.functional.jacobian(log_p, x).flatten(1)
    p = log_p(x).exp()
    return sum(p[k] * torch.outer(gradients[k], gradients[k]) for k in range(4)), p, gradients


def hessian(function, x: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(function, x).view(12, 12)


def test_proposition_1_the_hessian_is_the_fisher_matrix():
    f = theory_network()
    for x, y in itertools.product(torch.rand(3, *SHAPE).double(), range(4)):
        G, _, _ = fisher(f, x)
        torch.testing.assert_close(hessian(loss_of(f, y), x), G, rtol=1e-9, atol=1e-11)


def test_eq_8_to_10_what_gaussian_noise_costs_by_monte_carlo():
    """Noise so small that x + delta stays in the linear region of x; training's noise and D."""
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
    """Eq. (11), |grad L|^2 = sum_k y_k |grad log p_k|^2, and lambda_max(H) <= Tr(H)."""
    f = theory_network()
    for x, y in itertools.product(torch.rand(3, *SHAPE).double(), range(4)):
        gradients, loss = fisher(f, x)[2], loss_of(f, y)
        slope, H = gradients[y].norm(), hessian(loss, x)
        eigenvalues, vectors = torch.linalg.eigh(H)
        torch.testing.assert_close(torch.autograd.functional.jacobian(loss, x).norm(), slope)
        assert eigenvalues[-1] <= H.trace() * (1 + 1e-12)
        directions = [torch.randn(200, 12).double(), gradients[y : y + 1], vectors[:, -1:].T]
        directions, excess = F.normalize(torch.cat(directions)), []
        for size in (4e-3, 1e-3):
            samples = x + (size * directions).view(-1, *SHAPE)
            change = torch.stack([loss(sample) for sample in samples]) - loss(x)
            bound = size * slope + eigenvalues[-1] / 2 * size**2
            excess.append((change.abs() - bound).amax() / size**2)
            assert change.abs().amax() > 0.9 * size * slope  # nearly reached by the gradient
        assert excess[1] < max(0.3 * excess[0], 1e-6)  # o(|delta|^2)
