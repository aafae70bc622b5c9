"""A folder belongs to one living process; what a dead one leaves is taken over, with a message."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from zinit.errors import ConfigError
from zinit.files import LOCK, OWNER, claim


def dies(act: Callable[[], object]) -> None:
    """Runs something in a child process that is gone at once, as after a kill: nothing is cleaned up."""
    child = os.fork()
    if not child:
        try:
            act()
        finally:
            os._exit(9)
    assert os.waitpid(child, 0)[1]


def ignore(_: object) -> None:
    pass


def test_a_claim_is_exclusive_and_says_who_holds_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with claim(folder, tell=ignore):
        with (
            pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on {socket.gethostname()} \(since"),
            claim(folder, tell=ignore),
        ):
            pass
        assert {path.name for path in folder.iterdir()} == {LOCK, OWNER}
    assert not folder.parent.exists(), "a folder that nothing was put into is gone again"
    with claim(folder, tell=ignore):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_the_claim_of_a_killed_process_is_taken_over_with_a_message(tmp_path: Path) -> None:
    kept = {".notes.settings", ".vimrc.json", "run.json", "x.partial"}
    left = {".run.json.ab12_z9q.partial", ".adapter.safetensors.0a1b2c3d"}  # the second of an earlier version
    for name in kept | left:
        (tmp_path / name).write_text("half")

    def act() -> None:
        with claim(tmp_path, tell=ignore):
            os._exit(9)

    dies(act)
    assert (tmp_path / OWNER).exists()
    told: list[str] = []
    with claim(tmp_path, tell=told.append):
        assert {path.name for path in tmp_path.iterdir()} == {*kept, LOCK, OWNER}
    assert len(told) == 1
    assert f"on {socket.gethostname()}" in told[0]
    assert "was killed" in told[0]
    with claim(tmp_path, tell=told.append):
        pass
    assert len(told) == 1, "who ended in peace is not spoken of"


def test_a_claim_of_another_machine_is_never_taken_over_in_silence(tmp_path: Path) -> None:
    owner = {"host": "elsewhere", "process": 7, "since": "yesterday"}
    (tmp_path / OWNER).write_text(json.dumps(owner))
    message = rf"process 7 on elsewhere .*remove {tmp_path / OWNER} and run the same"
    with pytest.raises(ConfigError, match=message), claim(tmp_path, tell=ignore):
        pass
    assert json.loads((tmp_path / OWNER).read_text()) == owner
    assert not (tmp_path / LOCK).exists()
    (tmp_path / OWNER).unlink()
    with claim(tmp_path, tell=ignore):
        pass
