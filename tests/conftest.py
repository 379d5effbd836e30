"""Shared fixtures: the project root on the path, one torch thread, real CIFAR-10 where it is at hand."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


@pytest.fixture
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def real_cifar() -> Path:
    """A folder that holds cifar-10-batches-py: $CIFAR_ROOT or data/. Skips the test where there is none."""
    folder = Path(os.environ.get("CIFAR_ROOT", ROOT / "data"))
    if not (folder / "cifar-10-batches-py").is_dir():
        pytest.skip("no CIFAR-10 images under data/ or $CIFAR_ROOT")
    return folder
