"""The methods against loops written from their equations, their gradients, and what is forwarded how often."""

import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import torch
from equations import HPARAMS, JS, D, batch, call, gradients, naive_loss, record_inputs, seeded, tiny_model
from torch import Tensor, nn
from torch.func import functional_call

import losses
from augment import Draws, gaussian_noise, mixed_augmentation

CLEAN_LOGITS = ("standard", "trades", "augmix", "magnma")


# The divergences


def logits_of(seed: int, count: int = 7, classes: int = 5) -> Tensor:
    return 4 * torch.randn(count, classes, generator=seeded(seed), dtype=torch.float64)


def test_kl_divergence_equals_its_definition_and_scipys():
    p_logits, q_logits = logits_of(1), logits_of(2)
    divergence = losses.kl_divergence(p_logits, q_logits)
    assert divergence.shape == (7,)
    p, q = p_logits.softmax(1), q_logits.softmax(1)
    loop = torch.stack([D(list(p[i]), list(q[i])) for i in range(7)])
    torch.testing.assert_close(divergence, loop, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(divergence, scipy.special.rel_entr(p.numpy(), q.numpy()).sum(1), rtol=1e-10)
    assert not torch.allclose(divergence, losses.kl_divergence(q_logits, p_logits))
    assert losses.kl_divergence(p_logits, p_logits + 3).abs().max() < 1e-12


def test_jensen_shannon_equals_its_definition_and_scipys():
    first, second, third = logits_of(1), logits_of(2), logits_of(3)
    ps = [logits.softmax(1) for logits in (first, second, third)]
    divergence = losses.jensen_shannon(first, second, third)
    loop = torch.stack([JS(*(list(p[i]) for p in ps)) for i in range(7)])
    torch.testing.assert_close(divergence, loop, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(losses.jensen_shannon(third, first, second), divergence)
    two = scipy.spatial.distance.jensenshannon(ps[0].numpy(), ps[1].numpy(), axis=1) ** 2  # scipy gives the root
    np.testing.assert_allclose(losses.jensen_shannon(first, second), two, rtol=1e-10)


def test_the_divergences_pass_gradcheck():
    arguments = tuple(logits_of(seed, count=3).requires_grad_(True) for seed in (1, 2, 3))
    assert torch.autograd.gradcheck(losses.kl_divergence, arguments[:2])
    assert torch.autograd.gradcheck(losses.jensen_shannon, arguments)


def test_the_divergences_and_their_gradients_are_finite_and_right_for_logits_of_1e4():
    a = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [1e4, 1e4, -1e4]], requires_grad=True)
    b = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]], requires_grad=True)
    kl, js = losses.kl_divergence(a, b), losses.jensen_shannon(a, b)
    torch.testing.assert_close(kl, torch.tensor([2e4, 0.0, 2e4 - math.log(2)]))
    torch.testing.assert_close(js, torch.tensor([math.log(2), 0.0, math.log(2)]))
    for value in (kl, js):
        for gradient in torch.autograd.grad(value.sum(), (a, b), retain_graph=True):
            assert gradient.isfinite().all()


# Each method against its equation


@pytest.mark.parametrize("name", losses.METHODS)
def test_each_method_equals_the_loop_of_its_equation_in_value_and_gradient(name):
    model, (x, y) = tiny_model(), batch()
    loss, _ = call(name, model, x, y)
    naive = naive_loss(name, model, x, y, HPARAMS, seeded())
    torch.testing.assert_close(loss, naive, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients(loss, model), gradients(naive, model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    if name != "standard":
        assert abs(loss - call(name, model, x, y, seed=6)[0]) > 1e-4  # other draws, another loss


@pytest.mark.parametrize(("lambda1", "lambda2", "n"), [(0.2, 0, 5), (0, 5.0, 2), (0.4, 0.3, 1), (0, 0, 5), (0, 0, 0)])
def test_magnma_and_its_ablations_equal_the_loop_of_eq_6(lambda1, lambda2, n):
    model, (x, y) = tiny_model(), batch()
    changes = {"lambda1": lambda1, "lambda2": lambda2, "n": n, "sigma_max": 0.5, "beta": 0.5}
    loss, _ = call("magnma", model, x, y, **changes)
    naive = naive_loss("magnma", model, x, y, HPARAMS | changes, seeded())
    torch.testing.assert_close(loss, naive, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", losses.METHODS)
def test_each_method_passes_gradcheck(name):
    """In the parameters, with the draws fixed. (The attack's images do not move with them: its steps are signs.)"""

    class Criterion(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.Tanh(), nn.Linear(2, 3)).double()

        def forward(self, x, y):
            return call(name, self.model, x, y, n=2)[0]

    torch.manual_seed(0)
    criterion, x = Criterion(), batch(3)[0][:, :, 3:5, 3:5]
    names, parameters = zip(*criterion.named_parameters(), strict=True)
    y = torch.tensor([2, 0, 1])
    assert torch.autograd.gradcheck(
        lambda *values: functional_call(criterion, dict(zip(names, values, strict=True)), (x, y)), parameters
    )


def test_the_weight_of_eq_6_carries_gradient_and_so_does_the_clean_side_of_the_divergence():
    model, (x, y) = tiny_model(), batch()
    changes = {"lambda1": 3.0, "lambda2": 0.0, "n": 2}
    ours = gradients(call("magnma", model, x, y, **changes)[0], model)
    x_delta = gaussian_noise(x.repeat(2, 1, 1, 1), HPARAMS["sigma_max"], seeded()).double()

    def expression(detach_weight: bool, detach_clean: bool) -> list[Tensor]:
        p, q = model(x).softmax(1), model(x_delta).softmax(1)
        weight = p[torch.arange(len(x)), y].repeat(2)
        weight = weight.detach() if detach_weight else weight
        clean = (p.detach() if detach_clean else p).repeat(2, 1)
        R = (clean * (clean / q).log()).sum(1)
        return gradients(-p[torch.arange(len(x)), y].log().mean() + 3.0 * (weight * R).mean(), model)

    for gradient, expected in zip(ours, expression(False, False), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
    for wrong in (expression(True, False), expression(False, True)):
        difference = sum((gradient - other).norm() for gradient, other in zip(ours, wrong, strict=True))
        assert difference > 0.005 * sum(gradient.norm() for gradient in ours)


class ExtremeModel(nn.Module):
    """Logits of +-1e4 whose signs change under small perturbations, with a gradient to x and to its parameters."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(192, 4, generator=seeded(3)))
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        h = (x - 0.5).flatten(1) @ self.weight
        return (h + 1e4 * h.detach().sign()).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", losses.METHODS)
def test_loss_and_gradient_are_finite_for_logits_of_1e4(name, dtype):
    model, (x, y) = ExtremeModel(dtype), batch(16)
    loss, logits = call(name, model, x.float(), y)
    assert logits.abs().max() > 9e3
    assert logits.dtype == loss.dtype == torch.float32
    assert loss.isfinite()
    assert loss > 1e3
    assert all(gradient.isfinite().all() for gradient in gradients(loss, model))


# What is forwarded


@pytest.mark.parametrize(
    ("name", "changes", "sizes"),
    [
        ("standard", {}, [6]),
        ("at", {}, [6, 6, 6, 6]),  # the attack's three steps, then the loss
        ("trades", {}, [6, 6, 6, 6, 12]),  # p(x), the attack's three steps, then clean and adversarial
        ("rse", {}, [6]),
        ("gn", {}, [6]),
        ("augmix", {}, [18]),
        ("magnma", {}, [42]),
        ("magnma", {"lambda2": 0.0}, [24]),
        ("magnma", {"lambda1": 0.0}, [24]),
        ("magnma", {"lambda1": 0.0, "lambda2": 0.0}, [6]),
    ],
)
def test_clean_and_perturbed_copies_go_through_the_network_as_one_batch(name, changes, sizes):
    model, (x, y) = tiny_model(), batch()
    inputs = record_inputs(model)
    call(name, model, x, y, **changes)
    assert [len(images) for images in inputs] == sizes
    if name in CLEAN_LOGITS:
        assert torch.equal(inputs[-1][:6], x)
    copies = inputs[-1].flatten(1)
    assert len(copies.unique(dim=0)) == len(copies)  # each copy has draws of its own


@pytest.mark.parametrize("changes", [{"lambda1": 0.0}, {"lambda2": 0.0}, {"lambda1": 0.0, "lambda2": 0.0}])
def test_a_zero_lambda_draws_nothing_for_its_branch(changes):
    x, y = batch()
    generator, expected = seeded(), seeded()
    losses.METHODS["magnma"](tiny_model(), x, y, HPARAMS | changes, generator)
    copies = x.repeat(HPARAMS["n"], 1, 1, 1)
    if "lambda1" not in changes:
        gaussian_noise(copies, HPARAMS["sigma_max"], expected)
    if "lambda2" not in changes:
        mixed_augmentation(copies, HPARAMS["beta"], expected)
    assert torch.equal(generator.get_state(), expected.get_state())


@pytest.mark.parametrize("name", losses.METHODS)
def test_the_logits_are_the_clean_ones_where_clean_images_are_forwarded(name):
    model, (x, y) = tiny_model(), batch()
    inputs = record_inputs(model)
    _, logits = call(name, model, x, y)
    assert logits.shape == (6, 4)
    torch.testing.assert_close(logits, model(inputs[-1][:6]))
    assert torch.allclose(logits, model(x)) == (name in CLEAN_LOGITS)


@pytest.mark.parametrize("name", losses.METHODS)
def test_shares_of_a_batch_make_the_draws_of_the_whole(name):
    """Micro-batches (and ranks) with `Draws` of their share: the mean of their losses is the whole batch's loss."""
    model, (x, y) = tiny_model(), batch()
    whole, _ = losses.METHODS[name](model, x, y, HPARAMS, Draws.seeded(9, x.device))
    shares = []
    for start in (0, 2, 4):
        draws = Draws.seeded(9, x.device, start=start, count=2, total=6)
        shares.append(losses.METHODS[name](model, x[start : start + 2], y[start : start + 2], HPARAMS, draws)[0])
    torch.testing.assert_close(sum(shares) / 3, whole, rtol=1e-6, atol=0)


# The table of methods, and bad input


def test_each_method_reads_its_own_hyperparameters_alone():
    model, (x, y) = tiny_model(), batch()
    assert tuple(losses.METHODS) == ("standard", "at", "trades", "rse", "gn", "augmix", "magnma")
    for name, keys in losses.HPARAMS.items():
        own = {key: HPARAMS[key] for key in keys}
        poisoned = dict.fromkeys(HPARAMS, "not a number") | own
        loss, _ = losses.METHODS[name](model, x, y, poisoned, seeded())
        direct, _ = getattr(losses, f"{name}_loss")(model, x, y, **own, generator=seeded())
        assert torch.equal(loss, direct)
        for key in keys:  # and each of them matters
            changed = own | {key: 2 * own[key]}
            assert not torch.equal(losses.METHODS[name](model, x, y, changed, seeded())[0], loss), key


def test_without_a_generator_torchs_global_one_is_used():
    model, (x, y) = tiny_model(), batch()
    for name in losses.METHODS:
        values = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            values.append(losses.METHODS[name](model, x, y, HPARAMS)[0].item())
        assert values[0] == values[1]
        assert (values[0] == values[2]) == (name == "standard")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("magnma", {"n": 0}, "n must be at least 1 where lambda1 or lambda2 is positive, not 0"),
        ("magnma", {"n": -1, "lambda1": 0.0}, "n must be at least 1"),
        ("magnma", {"lambda1": -0.1}, r"lambda1 -0\.1 and lambda2 0\.3 must not be negative"),
        ("magnma", {"lambda2": -0.1}, r"lambda1 0\.2 and lambda2 -0\.1 must not be negative"),
        ("magnma", {"sigma_max": -0.2}, r"sigma_max -0\.2"),
        ("magnma", {"beta": 0.0}, r"beta 0\.0"),
        ("gn", {"sigma_max": -0.2}, r"sigma_max -0\.2"),
        ("rse", {"rse_sigma": -0.1}, r"noise level of RSE must not be negative, not -0\.1"),
        ("at", {"epsilon": -0.1}, r"epsilon -0\.1, .* must not be negative"),
        ("at", {"pgd_steps": -1}, "steps -1 of PGD must not be negative"),
        ("at", {"pgd_step_size": -0.1}, r"step size -0\.1 .* must not be negative"),
        ("trades", {"epsilon": -0.1}, r"epsilon -0\.1, .* must not be negative"),
        ("trades", {"pgd_steps": -1}, "steps -1 of PGD must not be negative"),
    ],
)
def test_bad_hyperparameters_are_named(name, changes, message):
    x, y = batch()
    with pytest.raises(ValueError, match=message) as caught:
        call(name, tiny_model(), x, y, **changes)
    assert "\n" not in str(caught.value)
