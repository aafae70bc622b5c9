"""Pictures to train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tasks import clip
from tests.tasks.vit import save_vtab


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vtab(tmp_path_factory.mktemp("pictures"))  # 8 + 4 to train on


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip.folders(tmp_path_factory.mktemp("classes"), classes=4)  # two base classes: as many as are tried on
