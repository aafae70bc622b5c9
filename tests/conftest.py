"""What all tests share: one thread, no network, a fixed seed."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)  # tiny models: more threads only make them slower and less alike


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
