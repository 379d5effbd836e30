"""Same numbers as before: fixed-seed losses of each method, bf16 beside float32, and what speed on a GPU relies on.

python -m tests.test_precision     # writes golden_losses.json anew, after a change that is meant to change losses
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import augment
import device as hardware
import runs
import train
from draws import Draws
from measure import GRAY
from models import build_model
from speed import VARIANTS, config_of

GOLDEN = Path(__file__).with_name("golden_losses.json")
CPU = torch.device("cpu")


def losses_of(
    variant: str, steps: int, size: int, lr: float, dtype: torch.dtype | None = None, **changes
) -> list[float]:
    """The losses of the first steps on ResNet-20 from fixed seeds, as train.train takes them."""
    torch.manual_seed(0)
    config = config_of(variant, lr=lr, **changes)
    network = build_model("resnet20", 10, *GRAY).to(memory_format=torch.channels_last).train()
    theta, scaler = train.optimiser(network, config, CPU, dtype)
    blobs = torch.rand(size * steps, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    images = nn.functional.interpolate(blobs, 32, mode="bilinear").mul(255).byte()
    labels = (4 * blobs.mean(1).flatten(1)[:, :4]).round().sum(1).long() % 10
    losses = []
    for step, (x, y) in enumerate(zip(images.split(size), labels.split(size), strict=True)):
        seed = runs.seed_of(0, "step", 0, step)
        loss_sum, _ = train.train_step(network, x, y, config, hflip=True, seed=seed, dtype=dtype, scaler=scaler)
        train.update(theta, scaler)
        losses.append(loss_sum.item() / size)
    return losses


def golden(variant: str) -> list[float]:
    return losses_of(variant, steps=3, size=8, lr=0.002, pgd_steps=3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_of_the_stored_run(variant):
    assert golden(variant) == pytest.approx(json.loads(GOLDEN.read_text())[variant], rel=1e-4)


@pytest.mark.parametrize("variant", ["standard", "magnma"])
def test_bf16_stays_within_one_percent_of_float32_over_20_steps(variant):
    """The mean of the losses; each step's own, on 8 images, within 10%."""
    exact, half = (losses_of(variant, steps=20, size=8, lr=0.005, dtype=dtype, n=1) for dtype in (None, torch.bfloat16))
    assert half != exact
    assert sum(half) == pytest.approx(sum(exact), rel=0.01)
    assert half == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_bf16_every_parameter_gets_the_gradient_of_float32_roughly(variant):
    def gradient(dtype):
        torch.manual_seed(0)
        network = build_model("resnet20", 10, *GRAY)
        x = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
        train.train_step(
            network, x, torch.arange(8), config_of(variant, pgd_steps=2, n=1), hflip=True, seed=0, dtype=dtype
        )
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    assert torch.cosine_similarity(gradient(None), gradient(torch.bfloat16), dim=0) > 0.9


def test_autocast_keeps_no_weights_between_forward_passes():
    with hardware.autocast(CPU, torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()


def test_the_gpus_optimiser_skips_overflowed_steps_as_the_plain_one_does():
    """torch's fused SGD leaves the momentum uninitialised when its very first step is skipped."""

    def weights(device):
        torch.manual_seed(0)
        network = nn.Linear(4, 3)
        theta, _ = train.optimiser(network, config_of("standard"), device, None)
        assert theta.param_groups[0]["fused"] == (device.type == "cuda")
        scaler = torch.amp.GradScaler("cpu")
        for gradient in (float("inf"), 1.0, float("nan"), -2.0, 0.5):
            for p in network.parameters():
                p.grad = torch.full_like(p, gradient) * scaler.scale(torch.ones(()))
            train.update(theta, scaler)
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    assert torch.isfinite(weights(CPU)).all()
    torch.testing.assert_close(weights(torch.device("cuda")), weights(CPU))


def test_preprocessing_compiles_as_one_graph_with_the_same_result():
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    compiled = torch.compile(augment.apply_preprocessing, backend="aot_eager", fullgraph=True, dynamic=False)
    expected, got = (
        augment.preprocess(images, True, Draws.seeded(3, CPU), apply)
        for apply in (augment.apply_preprocessing, compiled)
    )
    assert torch.equal(got, expected)


def test_a_machine_that_cannot_compile_says_why(monkeypatch):
    def broken(_):
        raise RuntimeError("no working\n C++ compiler found")

    monkeypatch.setattr(torch, "compile", broken)
    assert hardware.compiler_missing(CPU) == "no working C++ compiler found"


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs.write_json(GOLDEN, {variant: [round(loss, 7) for loss in golden(variant)] for variant in VARIANTS})
