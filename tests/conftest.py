"""The project root on the path, one torch thread."""

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
