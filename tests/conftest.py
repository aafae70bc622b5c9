"""What all tests share: one thread, no network, a fixed seed."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)  # tiny models: more threads only make them slower and less alike


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VTAB-1k folder of 8 + 4 images to train on."""
    from tests.tasks.vit import save_vtab

    return save_vtab(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders for base to novel; two base classes: as many as are tried on."""
    from tests.tasks import clip

    return clip.folders(tmp_path_factory.mktemp("classes"), classes=4)
