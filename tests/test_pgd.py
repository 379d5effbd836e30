"""The inner maximisation of Eq. (2) and (3): projected gradient ascent, and that it leaves no trace on the network."""

import pytest
import torch
import torch.nn.functional as F
from equations import (
    EPSILON,
    STEP_SIZE,
    STEPS,
    batch,
    call,
    naive_at_images,
    naive_trades_images,
    norm_model,
    record_inputs,
    seeded,
    tiny_model,
)
from torch import Tensor, nn

import losses


def attack(model: nn.Module, x: Tensor, y: Tensor, **changes: object) -> Tensor:
    options = {"epsilon": EPSILON, "steps": STEPS, "step_size": STEP_SIZE, "generator": seeded()}
    return losses.pgd_attack(model, x, y, **(options | changes))


def test_pgd_equals_a_loop_over_images():
    model, (x, y) = tiny_model(), batch()
    torch.testing.assert_close(attack(model, x, y), naive_at_images(model, x, y, seeded()), rtol=0, atol=1e-9)


def test_trades_attacks_the_divergence_from_a_start_of_small_noise():
    model, (x, y) = tiny_model(), batch()
    inputs = record_inputs(model)
    call("trades", model, x, y)
    torch.testing.assert_close(inputs[-1][6:], naive_trades_images(model, x, y, seeded()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("epsilon", [8 / 255, 0.3])
def test_pgd_stays_in_the_ball_and_in_the_image_range_and_raises_the_loss(epsilon):
    model, (x, y) = tiny_model(), batch(32)
    x[:8], x[8:16] = x[:8].round(), x[8:16] * 0.05  # many pixels at and near the ends of the range
    x_adv = attack(model, x, y, epsilon=epsilon, steps=7, step_size=2.5 * epsilon / 7)
    assert (x_adv - x).abs().max() <= epsilon + 1e-12
    assert (x_adv - x).abs().max() > 0.99 * epsilon
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    before, after = (F.cross_entropy(model(images), y, reduction="none") for images in (x, x_adv))
    assert (after > before).all()
    random = x + epsilon * (2 * torch.rand(x.shape, generator=seeded()) - 1)
    assert after.mean() > F.cross_entropy(model(random.clamp(0, 1)), y) + 0.01


def test_pgd_without_steps_gives_its_start_projected_and_without_a_ball_the_images():
    model, (x, y) = tiny_model(), batch()
    start = x + EPSILON * (2 * torch.rand(x.shape, generator=seeded()) - 1)
    torch.testing.assert_close(attack(model, x, y, steps=0), start.clamp(0, 1))
    assert (attack(model, x, y, steps=0) - x).abs().mean() == pytest.approx(EPSILON / 2, rel=0.1)
    assert torch.equal(attack(model, x, y, epsilon=0.0), x)
    far = attack(model, x, y, steps=0, start=x + 5)
    torch.testing.assert_close(far, (x + EPSILON).clamp(max=1))


@pytest.mark.parametrize("training", [True, False])
def test_pgd_leaves_no_trace_on_the_network(training):
    """In eval mode and frozen meanwhile; statistics and parameters untouched, no gradients, all modes restored."""
    model, (x, y) = norm_model(), batch()
    model.train(training)
    model[0].bias.requires_grad_(False)  # frozen by the user: it stays so
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = []
    model.register_forward_pre_hook(
        lambda module, _: modes.append((module.training, any(p.requires_grad for p in module.parameters())))
    )
    given = x.clone()
    x_adv = attack(model, x, y)
    assert modes == [(False, False)] * STEPS
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(x, given)
    assert not x.requires_grad
    assert not x_adv.requires_grad
    torch.testing.assert_close(x_adv, naive_at_images(model.eval(), x, y, seeded()), rtol=0, atol=1e-9)


def test_pgd_restores_the_mode_when_it_fails():
    model, (x, y) = norm_model(), batch()
    with pytest.raises(IndexError):
        attack(model, x, y + 10)
    assert all(module.training for module in model.modules())


def test_pgd_works_without_gradients_around_it_and_with_frozen_parameters():
    model, (x, y) = norm_model(), batch()
    expected = attack(model, x, y)
    with torch.no_grad():
        assert torch.equal(attack(model, x, y), expected)
    assert torch.equal(attack(model.requires_grad_(False), x, y), expected)


@pytest.mark.parametrize(("name", "updates"), [("at", 1), ("trades", 1), ("magnma", 1), ("augmix", 1)])
def test_batch_norm_is_updated_by_the_training_forward_alone(name, updates):
    model, (x, y) = norm_model(), batch()
    count = model[1].num_batches_tracked.item()
    loss, _ = call(name, model, x, y)
    assert model[1].num_batches_tracked.item() == count + updates
    assert model.training
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
