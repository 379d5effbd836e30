"""Sec. 3.1 of the paper, in float64: Eq. (7)-(10), Proposition 1 and Theorem 1 on small networks.

The networks map 12 inputs (an image of 2x2 pixels) to 4 logits. Where sampling is compared with a formula, the noise
is small enough for every sample to stay in the linear region of x, so that the formula's own error is O(sigma^4).
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

import models
from augment import gaussian_noise
from losses import kl_divergence

SHAPE = (3, 2, 2)
CLASSES = 4
SAMPLES = 200_000


def network(activation: type[nn.Module] = nn.ReLU, seed: int = 0) -> nn.Module:
    """A network of two hidden layers in float64, its weights large enough for confident and wrong predictions."""
    torch.manual_seed(seed)
    f = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 24), activation(), nn.Linear(24, 16), activation(), nn.Linear(16, CLASSES)
    ).double()
    with torch.no_grad():
        for parameter in f.parameters():
            parameter.mul_(2.5)
    return f


def points(count: int) -> Tensor:
    """Images (count, 3, 2, 2), exact in float32, so that noise drawn in float32 is added to this very point."""
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(7)).double()


def loss_at(f: nn.Module, x: Tensor, y: int) -> Tensor:
    """L(f(x), y), the cross-entropy of one image x (3, 2, 2)."""
    return F.cross_entropy(f(x[None]), torch.tensor([y]))


def log_probability_gradients(f: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """p (K,) and the gradients of log p_k with respect to x (K, 12), by autograd."""
    gradients = torch.autograd.functional.jacobian(lambda x: F.log_softmax(f(x[None]), dim=1)[0], x)
    return F.softmax(f(x[None]), dim=1)[0].detach(), gradients.flatten(1)


def fisher(f: nn.Module, x: Tensor) -> Tensor:
    """Eq. (7) as written: G = sum_k p_k grad log p_k (grad log p_k)^T, (12, 12)."""
    p, gradients = log_probability_gradients(f, x)
    return sum(p[k] * torch.outer(gradients[k], gradients[k]) for k in range(CLASSES))


def hessian(f: nn.Module, x: Tensor, y: int) -> Tensor:
    """H = the second derivative of L(f(x), y) with respect to x, (12, 12), by autograd."""
    return torch.autograd.functional.hessian(lambda x: loss_at(f, x, y), x).view(12, 12)


def same_region(f: nn.Sequential, x: Tensor, samples: Tensor) -> bool:
    """Whether all samples have the activation pattern of x: the logits are then linear on all of them."""
    patterns = []
    for h in (x[None], samples):
        pattern = []
        for layer in f:
            if isinstance(layer, nn.ReLU):
                pattern.append(h > 0)
            h = layer(h)
        patterns.append(torch.cat(pattern, dim=1))
    return bool((patterns[0] == patterns[1]).all())


def assert_mean(samples: Tensor, expected: Tensor) -> None:
    """The mean is within four standard errors of `expected`, and these are small enough (2%) to mean something."""
    standard_error = samples.std() / len(samples) ** 0.5
    assert standard_error < 0.005 * expected
    assert abs(samples.mean() - expected) < 4 * standard_error


def test_proposition_1_the_hessian_of_a_relu_network_is_the_fisher_matrix():
    """Proposition 1: H(x) = G(x) of Eq. (7), whatever the label."""
    f = network()
    for x in points(5):
        G = fisher(f, x)
        assert G.norm() > 1e-2
        for y in range(CLASSES):
            torch.testing.assert_close(hessian(f, x, y), G, rtol=1e-9, atol=1e-11)


def test_proposition_1_holds_for_resnet20_at_test_time():
    """Proposition 1 for a network of the paper's kind: ReLU, and batch norm in eval mode, are piecewise linear in x.

    H v by differentiating twice, G v = J^T (diag(p) - p p^T) J v by the proof's last line but one (Sec. 7.2).
    """
    torch.manual_seed(0)
    model = models.build_model("resnet20", 10, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).double().eval()
    x, v = torch.rand(1, 3, 32, 32, dtype=torch.float64), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    p = F.softmax(model(x), dim=1)[0].detach()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def f(x):
        return functional_call(model, parameters, (x,))

    _, Jv = jvp(f, (x,), (v,))
    (Gv,) = vjp(f, x)[1](((torch.diag(p) - torch.outer(p, p)) @ Jv[0])[None])
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(f(x), torch.tensor([3])), x, create_graph=True)
    (Hv,) = torch.autograd.grad((gradient * v).sum(), x)
    assert Gv.norm() > 1e-3
    torch.testing.assert_close(Hv, Gv, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus])
def test_proposition_1_fails_for_a_smooth_network_by_the_curvature_of_the_logits(activation):
    """Proposition 1 in general: H = G + sum_k (p_k - y_k) Hess f_k. The last term is neither zero nor small."""
    f = network(activation)
    for x in points(3):
        G, p = fisher(f, x), F.softmax(f(x[None]), dim=1)[0].detach()
        curvature = torch.stack(
            [torch.autograd.functional.hessian(lambda x, k=k: f(x[None])[0, k], x).view(12, 12) for k in range(CLASSES)]
        )
        for y in range(CLASSES):
            e = p - F.one_hot(torch.tensor(y), CLASSES)
            H, term = hessian(f, x, y), torch.einsum("k,kij->ij", e, curvature)
            torch.testing.assert_close(H, G + term, rtol=1e-9, atol=1e-11)
        # G needs no label, the further term does: here that of the last one
        assert term.norm() > 0.01 * G.norm()


def test_the_divergence_is_the_fisher_matrixs_quadratic_form_up_to_third_order():
    """Sec. 3.1's expansion D(p(x) || p(x + delta)) ~ 1/2 delta^T G delta: halving delta divides the error by 8."""
    f = network()
    for x in points(3):
        G = fisher(f, x)
        delta = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        errors = []
        for size in (4e-3, 2e-3):
            step = size * delta / delta.norm()
            moved = x[None] + step.view(1, *SHAPE)
            assert same_region(f, x, moved)
            divergence = kl_divergence(f(x[None]), f(moved))[0]
            errors.append((divergence - step @ G @ step / 2).abs())
            assert errors[-1] < 0.1 * divergence
        assert 6 < errors[0] / errors[1] < 10


def test_eq_8_gaussian_noise_of_one_scale_costs_half_sigma_squared_times_the_trace():
    """Eq. (8): E D(p(x) || p(x + delta)) = sigma^2 / 2 Tr(G), delta ~ N(0, sigma^2 I), by Monte Carlo."""
    f, generator = network(), torch.Generator().manual_seed(2)
    for x in points(2):
        for sigma in (2e-4, 1e-3):
            noise = torch.randn(SAMPLES, *SHAPE, generator=generator, dtype=torch.float64)
            samples = x + sigma * noise
            with torch.no_grad():
                assert same_region(f, x, samples)
                divergence = kl_divergence(f(x[None]), f(samples))
            assert_mean(divergence, sigma**2 / 2 * fisher(f, x).trace())


def test_eq_9_and_10_the_noise_regulariser_is_a_sixth_of_sigma_max_squared_times_the_weighted_gradients():
    """Eq. (9): sigma_max^2 / 6 Tr(G), and Eq. (10): sigma_max^2 / 6 sum_k p_k |grad log p_k|^2, by Monte Carlo.

    The noise is that of training, `augment.gaussian_noise`, and the divergence that of Eq. (6).
    """
    f, generator, sigma_max = network(), torch.Generator().manual_seed(3), 1e-3
    for x in points(2):
        samples = gaussian_noise(x.expand(SAMPLES, *SHAPE).contiguous(), sigma_max, generator).double()
        with torch.no_grad():
            assert same_region(f, x, samples)
            divergence = kl_divergence(f(x[None]), f(samples))
        assert_mean(divergence, sigma_max**2 / 6 * fisher(f, x).trace())
        p, gradients = log_probability_gradients(f, x)
        assert_mean(divergence, sigma_max**2 / 6 * sum(p[k] * gradients[k].norm() ** 2 for k in range(CLASSES)))


def test_eq_10_weights_the_gradients_of_the_log_probabilities_by_the_probabilities():
    """Eq. (10) from Eq. (9): Tr(G) = sum_k p_k |grad log p_k|^2, without sampling, for smooth networks as well."""
    for activation in (nn.ReLU, nn.Tanh):
        f = network(activation)
        for x in points(5):
            p, gradients = log_probability_gradients(f, x)
            torch.testing.assert_close((p * gradients.square().sum(dim=1)).sum(), fisher(f, x).trace())


def theorem_1(f: nn.Module, x: Tensor, y: int) -> tuple[float, float]:
    """Eq. (11)'s coefficients of |delta| and |delta|^2: sqrt(sum_k y_k |grad log p_k|^2), lambda_max(H) / 2."""
    _, gradients = log_probability_gradients(f, x)
    one_hot = F.one_hot(torch.tensor(y), CLASSES)
    slope = (one_hot * gradients.square().sum(dim=1)).sum().sqrt()
    return slope.item(), torch.linalg.eigvalsh(hessian(f, x, y))[-1].item() / 2


def test_theorem_1_bounds_the_quadratic_model_of_the_loss_for_every_perturbation():
    """Theorem 1 without its o(|delta|^2): |<grad L, delta> + 1/2 delta^T H delta| <= Eq. (11), whatever the size."""
    f, generator = network(), torch.Generator().manual_seed(4)
    for x in points(4):
        for y in range(CLASSES):
            slope, curvature = theorem_1(f, x, y)
            g = torch.autograd.functional.jacobian(lambda x, y=y: loss_at(f, x, y), x).flatten()
            H = hessian(f, x, y)
            delta = torch.randn(500, 12, generator=generator, dtype=torch.float64)
            delta *= torch.logspace(-4, 2, 500, dtype=torch.float64)[:, None] / delta.norm(dim=1, keepdim=True)
            # the worst directions too: along the gradient and along the first eigenvector
            worst = torch.stack([g / g.norm(), torch.linalg.eigh(H).eigenvectors[:, -1]])
            delta = torch.cat([delta, worst, -worst, 1e-3 * worst])
            change = (delta @ g + ((delta @ H) * delta).sum(dim=1) / 2).abs()
            size = delta.norm(dim=1)
            bound = size * slope + curvature * size**2
            assert (change <= bound * (1 + 1e-10)).all()
            assert change[-2] > 0.95 * bound[-2]  # a short step along the gradient all but reaches it


def test_theorem_1_bounds_the_loss_itself_up_to_a_remainder_that_vanishes_faster_than_the_square():
    """Theorem 1, Eq. (11): the excess of |L(x + delta) - L(x)| over the bound is o(|delta|^2).

    Within a linear region the loss differs from its quadratic model by O(|delta|^3): over |delta|^2 that is at most
    in proportion to |delta|.
    """
    f, generator = network(), torch.Generator().manual_seed(5)
    for x in points(4):
        direction = torch.randn(200, 12, generator=generator, dtype=torch.float64)
        direction /= direction.norm(dim=1, keepdim=True)
        for y in range(CLASSES):
            slope, curvature = theorem_1(f, x, y)
            g = torch.autograd.functional.jacobian(lambda x, y=y: loss_at(f, x, y), x).flatten()
            H, start, labels = hessian(f, x, y), loss_at(f, x, y).detach(), torch.full((200,), y)
            remainders = []
            for size in (4e-3, 2e-3, 1e-3):
                delta = size * direction
                samples = x + delta.view(-1, *SHAPE)
                assert same_region(f, x, samples)
                with torch.no_grad():
                    change = F.cross_entropy(f(samples), labels, reduction="none") - start
                model = delta @ g + ((delta @ H) * delta).sum(dim=1) / 2
                remainder = (change - model).abs()
                remainders.append((remainder.max() / size**2).item())
                assert (change.abs() <= slope * size + curvature * size**2 + remainder).all()
            assert remainders[0] > 1.7 * remainders[1] > 1.7**2 * remainders[2]


def test_theorem_1_links_the_gradient_to_the_regulariser_through_the_prediction_error():
    """Sec. 7.3: |grad L|^2 = sum_k e_k |grad log p_k|^2 + sum_k p_k |grad log p_k|^2; lambda_max(H) <= Tr(H).

    The last sum is the one that Eq. (10) makes small, which bounds the gradient where e = y - p is small.
    """
    f = network()
    for x in points(4):
        p, gradients = log_probability_gradients(f, x)
        squares = gradients.square().sum(dim=1)
        for y in range(CLASSES):
            e = F.one_hot(torch.tensor(y), CLASSES) - p
            g = torch.autograd.functional.jacobian(lambda x, y=y: loss_at(f, x, y), x)
            torch.testing.assert_close((e * squares).sum() + (p * squares).sum(), g.square().sum())
            torch.testing.assert_close(torch.tensor(theorem_1(f, x, y)[0], dtype=g.dtype), g.norm())
            H = hessian(f, x, y)
            assert torch.linalg.eigvalsh(H)[-1] <= H.trace()
