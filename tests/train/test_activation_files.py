"""Stored outputs of the frozen lower blocks on disk: killed, damaged, shared, without room."""

from __future__ import annotations

import json
import os
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from tests.processes import CONTEXT
from tests.train.frozen_blocks import TRAIN, assert_same_bits, trained, vtab
from zinit.errors import ConfigError
from zinit.train import activation_cache, tensor_store

SMALL = 10_000  # bytes: four examples of 17 x 32 x 4 bytes, three files


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_store, "PART_BYTES", SMALL)


def child(action: Callable[[], None]) -> int:
    """A process that does this; forked, so that nothing is imported again."""
    number = os.fork()
    if not number:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return number


def shortened(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def swapped(file: Path) -> None:
    from safetensors.torch import save_file

    save_file({"states": torch.zeros(4, 17, 31)}, file)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("damage", [emptied, flipped, shortened, swapped, Path.unlink])
def test_a_damaged_file_is_made_anew(damage: Callable[[Path], None], pictures: Path, tmp_path: Path) -> None:
    first = trained(vtab(pictures), tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3
    good = files[1].read_bytes()
    damage(files[1])
    again = trained(vtab(pictures), tmp_path)
    assert_same_bits(again, first)
    assert sum(again.calls) == 5 + 4  # of this file only
    assert files[1].read_bytes() == good


@pytest.mark.usefixtures("small_files")
def test_killed_while_storing(pictures: Path, tmp_path: Path) -> None:

    def killed() -> None:
        replace = os.replace

        def dying(source: str, target: Path) -> None:  # the file is written whole under its temporary name
            if target.name == "part-00002.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = dying  # in this process, which is a fork
        trained(vtab(pictures), tmp_path)

    assert os.waitpid(child(killed), 0)[1] == signal.SIGKILL
    left = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("part-*")}
    assert len(left) == 2  # of three
    stored = trained(vtab(pictures), tmp_path)
    assert sum(stored.calls) == 5 + 4
    assert {file: file.stat().st_mtime_ns for file in left} == left
    assert_same_bits(stored, trained(vtab(pictures)))


def one_of_two(number: int, port: int, pictures: Path, cache: Path, output: Path) -> None:
    """What each of two processes does."""
    tensor_store.PART_BYTES = SMALL
    torch.set_num_threads(1)
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}
    found = trained(vtab(pictures), cache)
    assert Accelerator(cpu=True).num_processes == 2
    (output / f"{number}.json").write_text(json.dumps({"losses": found.losses, "calls": found.calls}))


@pytest.mark.integration
@pytest.mark.usefixtures("small_files")
def test_two_processes_share_the_work(pictures: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cache = tmp_path / "cache"

    ranks = [CONTEXT.Process(target=one_of_two, args=(i, port, pictures, cache, tmp_path)) for i in range(2)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    assert [each.exitcode for each in ranks] == [0, 0]
    (folder,) = cache.iterdir()
    assert len([*folder.glob("part-*")]) == 3
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    assert (sum(first["calls"]), sum(second["calls"])) == (5 + 8, 5 + 4)
    plain = trained(vtab(pictures))
    assert first["losses"] == pytest.approx(plain.losses, rel=1e-5)
    assert_same_bits(trained(vtab(pictures), cache), plain)  # on one process, from what the two have stored
    assert [*cache.iterdir()] == [folder]


@pytest.mark.usefixtures("small_files")
def test_a_disk_that_fills_up_keeps_what_is_stored(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = tensor_store.write_atomically

    def full(path: Path, data: bytes) -> None:
        if path.name == "part-00001.safetensors":
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(tensor_store, "write_atomically", full)
    with pytest.raises(ConfigError, match=r"cannot be stored in .*No space left on device.*make room"):
        trained(vtab(pictures), tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(tensor_store, "PART_BYTES", 10_000)
    assert len([*tmp_path.rglob("*.safetensors")]) == 1
    again = trained(vtab(pictures), tmp_path)
    assert sum(again.calls) == 5 + 8
    assert_same_bits(again, trained(vtab(pictures)))


def test_too_little_room_is_said_before_anything_is_written(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = TRAIN * 17 * 32 * 4
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(activation_cache.shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        if fits:
            trained(vtab(pictures), tmp_path)
        else:
            with pytest.raises(ConfigError, match=r"0\.00 GB are needed, 0\.00 GB are free.*make room"):
                trained(vtab(pictures), tmp_path)
            assert not [*tmp_path.rglob("part-*")]


def test_a_folder_that_cannot_be_made(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be stored in"):
        trained(vtab(pictures), tmp_path / "file" / "cache")
