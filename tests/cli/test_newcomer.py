"""What somebody meets who tries zinit for the first time."""

from __future__ import annotations

import logging
import tomllib
import warnings
from pathlib import Path

import pytest

import zinit as package
from tests.cli.conftest import QUICK, Zinit
from tests.shared import ROOT
from zinit.errors import install_extra
from zinit.ui.doctor import EXTRAS


def test_the_version(zinit: Zinit) -> None:
    done = zinit("--version")
    assert (done.code, done.out, done.err) == (0, f"zinit {package.__version__}\n", "")


def test_a_run_says_nothing_of_libraries(zinit: Zinit, model: Path, data: Path, tmp_path: Path) -> None:
    """Its own lines, and no bar or report of transformers'."""
    done = zinit("train", "--backbone", "llama", "--model", model, "--data", data, *QUICK, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    said = [line for line in done.err.splitlines() if line.strip()]
    own = (
        "loading model",
        "evaluating",
        "training 3 prompts in 3 of 3 layers; ",
        "step ",
        "Everything is in",
        "Talk to it",
        "/",
    )
    assert said
    assert [line for line in said if not line.startswith(own)] == []
    assert "%|" not in done.out + done.err


def test_warnings_for_who_writes_code_are_not_shown_to_who_runs_a_command(zinit: Zinit) -> None:
    logging.getLogger("torch.utils._pytree").setLevel(logging.NOTSET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zinit("--version")
        warnings.warn("of a library", FutureWarning, stacklevel=1)
    assert not logging.getLogger("torch.utils._pytree").isEnabledFor(logging.WARNING)


def test_a_preset_of_a_large_model_is_scaled_and_said(zinit: Zinit, tmp_path: Path) -> None:
    done = zinit("train", "--backbone", "llama", "--preset", "llama-7b", "-o", "steps=2", "-o", "batch_size=4",
                 "-o", "task.evaluation_limit=0", "--output", tmp_path / "run")  # fmt: skip
    assert done.code == 0, done.err
    assert "note: the preset is scaled to this run: prefix.layers=4 of 4 (the preset: 30 of 32)" in " ".join(
        done.err.split()
    )


def test_doctor_looks_for_every_extra_that_a_user_may_install() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"test", "test-all", "dev", "docs"}


@pytest.mark.parametrize("extra", ["quantize", "tensorboard", "deepspeed"])
def test_what_messages_say_to_install_is_there_to_install(extra: str) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]
    assert install_extra(extra) == f"In zinit's source folder: pip install -e '.[{extra}]'"


def test_nobody_is_sent_to_an_index_that_does_not_have_zinit() -> None:
    texts = [*(ROOT / "zinit").rglob("*.py"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.yaml"),
             ROOT / "README.md"]  # fmt: skip
    assert not [
        str(path)
        for path in texts
        if "pip install 'zinit" in path.read_text() or "pip install zinit" in path.read_text()
    ]
