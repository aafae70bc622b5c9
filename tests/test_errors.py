"""Which refusals are final: those of settings, and nothing that somebody may mend."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import save_tiny_llama
from zinit.cli import main
from zinit.errors import BackboneError, CheckpointError, ConfigError, DataError, ZinitError, is_by_settings
from zinit.tasks import TASKS
from zinit.tasks.base import load_host


def caused(error: ZinitError, cause: BaseException) -> ZinitError:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (ConfigError("wrong"), True),
        (BackboneError("no attention"), True),
        (caused(ConfigError("wrong"), ValueError()), True),
        (caused(ConfigError("cannot be written"), PermissionError()), False),
        (caused(BackboneError("not there"), caused(ConfigError("x"), FileNotFoundError())), False),
        (DataError("no such file"), False),
        (CheckpointError("damaged"), False),
        (RuntimeError("a fault"), False),
    ],
    ids=repr,
)
def test_only_settings_are_refused_for_good(error: BaseException, final: bool) -> None:
    assert is_by_settings(error) is final


def test_a_model_that_cannot_be_loaded_may_be_there_another_time(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"torn")
    for folder in (tmp_path / "none", tmp_path, tmp_path / "damaged"):
        with pytest.raises(BackboneError) as caught:
            load_host(TASKS.get("alpaca"), folder, trains=False, dtype=torch.float32)
        assert not is_by_settings(caught.value)


def test_with_json_a_refusal_is_a_document(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, final in ((["ls", "nothing"], True), (["eval", "no-such-run"], False)):
        monkeypatch.setattr(sys, "argv", ["zinit", *arguments, "--json"])
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr()
        assert caught.value.code == 2
        assert json.loads(said.out) == {"error": said.err.removeprefix("zinit: ").strip(), "by_settings": final}
