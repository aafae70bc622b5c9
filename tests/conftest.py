"""What all tests share: one thread, no network, a fixed seed."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

TESTS = Path(__file__).parent

gc.set_threshold(50_000, 20, 100)  # searches of all that is imported take longer than many a test
torch.set_num_threads(1)  # tiny models: more threads only make them slower and less alike


# Modules whose tests are done in a moment. All of them together stay under 30 seconds with -n 2.
FAST = (
    "adapter/test_file.py",
    "data/test_images.py",
    "data/test_labelled.py",
    "docs/test_project.py",
    "golden/test_interop_reading.py",
    "models/test_loading.py",
    "models/test_losses.py",
    "tasks/test_base_to_novel_data.py",
    "tasks/test_encoder_figures.py",
    "tasks/test_squad_data.py",
    "tasks/test_vtab_facts.py",
    "test_architecture.py",
    "test_compat.py",
    "test_config.py",
    "test_messages.py",
    "test_prefix.py",
    "test_registry.py",
    "train/test_plan.py",
)
NOT_FAST = ("integration", "slow", "gpu")

# Where figures are drawn. Elsewhere reports are made without them: matplotlib takes longer than a tiny run.
DRAWN = ("bench/", "cli/test_commands.py", "runs/test_command.py", "runs/test_plots.py", "runs/test_report.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves other modules unread where only fast tests are asked for: their imports take longer than the tests."""
    if config.option.markexpr != "fast" or not collection_path.is_relative_to(TESTS):
        return None
    name = collection_path.relative_to(TESTS).as_posix()
    inside = collection_path == TESTS or any(fast == name or fast.startswith(f"{name}/") for fast in FAST)
    return None if inside or collection_path.name == "__init__.py" else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of fast modules, those with another mark about their costs excepted; long modules come first."""
    fast = {TESTS / name for name in FAST}
    if missing := [str(path) for path in fast if not path.is_file()]:
        raise pytest.UsageError(f"tests/conftest.py: FAST names modules that are gone: {', '.join(missing)}")
    for item in items:
        if item.path in fast and not any(item.get_closest_marker(mark) for mark in NOT_FAST):
            item.add_marker("fast")
    long = {item.path for item in items if item.get_closest_marker("integration") or item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)  # whole modules, so that the last that workers do are short


@pytest.fixture(scope="module")
def flags_task() -> Iterator[None]:
    """The task "flags" (`tests.tasks.flags`): texts with none, one and two images."""
    from zinit.tasks import TASKS

    TASKS.register("flags", "tests.tasks.flags:Flags")
    yield
    del TASKS._where["flags"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _plain_reports(request: pytest.FixtureRequest) -> Iterator[None]:
    """All of a report but the drawing; see `tests.preload` for processes."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.path.relative_to(TESTS).as_posix().startswith(DRAWN):
            patch.setattr("zinit.runs.plots.figure", lambda *size, **how: (MagicMock(), MagicMock()))
            patch.setattr("zinit.runs.plots.svg", lambda figure, label: "")
        yield


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
