"""Stored outputs of the frozen lower blocks: the same bits as without, found again, or refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import traceback
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from tests.engine.test_crash import steps
from tests.tasks import test_base_to_novel as towers
from tests.tasks.vit import save_tiny, save_vtab, tiny
from tests.tiny import save_records, save_tiny_llama
from zinit import adapter_file, rows, trunk
from zinit.attach import attach
from zinit.config import PrefixConfig, TrainConfig
from zinit.engine import fit
from zinit.errors import ConfigError
from zinit.hosts import ClipProcessor
from zinit.methods import METHODS
from zinit.run import train_run
from zinit.settings import resolve
from zinit.tasks.base_to_novel import BaseToNovel, BaseToNovelConfig
from zinit.tasks.vtab import VTAB, VTABConfig

TRAIN, DEPTH = 12, 4  # pictures, blocks
TRIED = 3  # passes through the trunk before any is stored: one example, two, two in training
Fit = namedtuple("Fit", "losses weights calls folders")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vtab(tmp_path_factory.mktemp("pictures"))  # 8 + 4 to train on


def vtab(
    data: Path, *, layers: int | tuple[int, ...] | None = 2, length: int = 3, model: Any = None, **settings: Any
) -> VTAB:
    model = model or tiny(depth=DEPTH)
    handle = attach(model, PrefixConfig(length=length, layers=layers, gate_init=0.3), seed=1)
    seed = settings.pop("seed", 0)
    return VTAB(model, None, handle, VTABConfig(**settings), data=str(data), seed=seed)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return towers.folders(tmp_path_factory.mktemp("classes"), classes=4)  # two base classes: as many as are tried on


def base_to_novel(data: Path, prefix: dict[str, Any], **settings: Any) -> Any:
    model = towers.clip()
    handle = attach(model, PrefixConfig(**{"length": 3, "layers": 1, "gate_init": 0.3, **prefix}), seed=1)
    config = BaseToNovelConfig(**{"shots": 2, **settings})
    return BaseToNovel(model, ClipProcessor(towers.tokenizer()), handle, config, data=str(data), seed=0)


def lowest_norm(model: Any) -> nn.Module:
    """A part of the lowest block that runs once with it."""
    return model.blocks[0].norm1 if hasattr(model, "blocks") else model.vision_model.encoder.layers[0].layer_norm1


def trained(task: Any, cache: Path | None = None, *, lowest: Any = None, **settings: Any) -> Fit:
    """A run of three epochs in steps of four examples. ``lowest`` is the module whose calls are counted."""
    events: list[dict[str, Any]] = []
    calls: list[int] = []
    hook = (lowest or lowest_norm(task.model)).register_forward_hook(
        lambda module, args, output: calls.append(len(output))
    )
    config = TrainConfig(
        **{"epochs": 3, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.05, "warmup_steps": 1}
        | {"evaluate_every": 0, "trunk_cache": None if cache is None else str(cache), **settings}
    )
    fit(task, config, seed=3, accelerator=Accelerator(cpu=True), on_event=events.append)
    hook.remove()
    return Fit(
        [event["loss"] for event in events if event["event"] == "step"],
        {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad},
        calls,
        sorted(cache.iterdir()) if cache else [],
    )


def assert_same_bits(found: Fit, expected: Fit) -> None:
    assert found.losses == expected.losses
    assert found.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        assert torch.equal(found.weights[name], value), name


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 2},
        {"micro_batch_size": 4},
        {"batch_size": 6, "micro_batch_size": 3},
        {"gradient_checkpointing": True},
        {"workers": 1},
        {"evaluate_every": 2},
        {"mixed_precision": "bf16"},
    ],
    ids=lambda settings: next(f"{name}={value}" for name, value in reversed(settings.items())),
)
def test_the_same_bits_as_without(settings: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    plain = trained(vtab(pictures), **settings)
    stored = trained(vtab(pictures), tmp_path, **settings)
    assert_same_bits(stored, plain)
    assert len(set(plain.losses)) == len(plain.losses)  # it does train
    held_out = sum(plain.calls) - 3 * TRAIN  # these pass through the whole host
    assert (held_out > 0) == ("evaluate_every" in settings)
    assert sum(stored.calls) == TRAIN + 5 + held_out  # each once, and those that it was tried on


def test_uneven_batches_differ_by_rounding(classes: Path, tmp_path: Path) -> None:
    """A matrix product may round its rows otherwise where it has more of them, with and without stored states."""
    plain = trained(base_to_novel(classes, {}, views=3), batch_size=5, micro_batch_size=2)
    for size in (1, 2, 5):  # the first fills
        stored = trained(base_to_novel(classes, {}, views=3), tmp_path, batch_size=5, micro_batch_size=size)
        assert stored.losses == pytest.approx(plain.losses, rel=1e-5)
        for name, value in plain.weights.items():
            torch.testing.assert_close(stored.weights[name], value, rtol=1e-5, atol=1e-5)
    assert len(stored.folders) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hosts_of_half_precision(dtype: torch.dtype, pictures: Path, tmp_path: Path) -> None:
    plain, stored = (trained(vtab(pictures, model=tiny(depth=DEPTH).to(dtype)), cache) for cache in (None, tmp_path))
    assert_same_bits(stored, plain)
    assert rows._read(next(stored.folders[0].iterdir()))[0].dtype == dtype


def test_layers_that_are_not_neighbours(pictures: Path, tmp_path: Path) -> None:
    plain, stored = (trained(vtab(pictures, layers=(1, 3)), cache) for cache in (None, tmp_path))
    assert_same_bits(stored, plain)
    assert sum(stored.calls) == TRAIN + 5


def test_blocks_that_give_tuples(pictures: Path, tmp_path: Path) -> None:
    """As layers of transformers did: ``hidden, None = block(hidden)``."""

    class Paired(nn.Module):
        def __init__(self, number: int, block: nn.Module) -> None:
            super().__init__()
            self.number, self.block = number, block

        def forward(self, x: Any) -> tuple[Tensor, None]:
            return self.block(x[0] if self.number else x), None

    class First(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: tuple[Tensor, None]) -> Tensor:
            return self.norm(x[0])

    def paired() -> Any:
        model = tiny(depth=DEPTH)
        model.blocks = nn.Sequential(*(Paired(*each) for each in enumerate(model.blocks)))
        model.norm = First(model.norm)
        return model

    found = []
    for cache in (None, tmp_path):
        task = vtab(pictures, model=paired())
        found.append(trained(task, cache, lowest=task.model.blocks[0].block.norm1))
    plain, stored = found
    assert_same_bits(stored, plain)
    assert sum(stored.calls) == TRAIN + 5


def test_dropout_above_draws_the_same(pictures: Path, tmp_path: Path) -> None:
    found = []
    for cache in (None, tmp_path, tmp_path):
        model = tiny(depth=DEPTH)
        model.blocks[3].mlp.drop1.p = 0.5
        torch.manual_seed(7)
        found.append(trained(vtab(pictures, model=model), cache))
    plain, filling, reading = found
    assert_same_bits(filling, plain)
    assert_same_bits(reading, plain)


def test_only_batches_that_carry_states_skip(pictures: Path, tmp_path: Path) -> None:
    task = vtab(pictures)
    batch = task.collate(task.train_stream, [0, 1])
    with torch.no_grad():
        expected, features = task(batch), task.model(batch["images"].float())
        config = TrainConfig(trunk_cache=str(tmp_path))
        with trunk.kept_trunk(task, config, Accelerator(cpu=True), lambda event: None) as stored:
            assert stored is not None
            other = task({**batch, trunk.KEY: stored[[2, 3]]})
            assert torch.equal(task.model(batch["images"].float()), features)  # past the task
            assert torch.equal(task(batch), expected)
            assert torch.equal(task({**batch, trunk.KEY: stored[[0, 1]]}), expected)
            assert not torch.equal(other, expected)


def test_the_host_is_left_as_it_was(pictures: Path, tmp_path: Path) -> None:
    task = vtab(pictures)
    batch = task.collate(task.train_stream, [0, 1])
    trained(task, tmp_path)
    assert not any("forward" in vars(block) for block in task.model.blocks)
    assert not task._forward_pre_hooks
    assert not task._forward_hooks
    fresh = vtab(pictures)
    fresh.load_state_dict(task.state_dict())
    assert torch.equal(task.eval()(batch), fresh.eval()(batch))


# --- found again ------------------------------------------------------------------------------------------------------


def test_another_rate_seed_and_prefix_fill_nothing(pictures: Path, tmp_path: Path) -> None:
    first = trained(vtab(pictures), tmp_path)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    for task, settings in (
        (vtab(pictures), {"learning_rate": 0.01}),
        (vtab(pictures, seed=5, length=7), {"batch_size": 6, "micro_batch_size": 3}),
    ):
        again = trained(task, tmp_path, **settings)
        assert again.folders == first.folders
        assert len(again.calls) == TRIED
        assert again.losses != first.losses
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == written


def changed(where: str) -> Any:
    """The smallest change of one weight."""
    model = tiny(depth=DEPTH)
    with torch.no_grad():
        weight = model.get_parameter(where)
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))
    return model


def bigger_eps() -> Any:
    model = tiny(depth=DEPTH)
    model.blocks[0].norm1.eps *= 8
    return model


@pytest.mark.parametrize(
    ("make", "same"),
    [
        pytest.param(lambda data: vtab(data, layers=1), False, id="layers"),
        pytest.param(lambda data: vtab(data, model=tiny(depth=DEPTH).bfloat16()), False, id="dtype"),
        pytest.param(lambda data: vtab(data, model=changed("blocks.1.mlp.fc2.weight")), False, id="trunk"),
        pytest.param(lambda data: vtab(data, model=changed("pos_embed")), False, id="embedding"),
        pytest.param(lambda data: vtab(data, model=bigger_eps()), False, id="constant"),
        pytest.param(lambda data: vtab(data, normalisation="none"), False, id="normalisation"),
        pytest.param(lambda data: vtab(data, interpolation="bilinear"), False, id="pixels"),
        pytest.param(lambda data: vtab(data, split="train800"), False, id="examples"),
        pytest.param(lambda data: vtab(data, model=changed("blocks.2.mlp.fc2.weight")), True, id="above"),
        pytest.param(lambda data: vtab(data, length=1, seed=9), True, id="prefix"),
    ],
)
def test_what_has_a_folder_of_its_own(make: Callable[[Path], VTAB], same: bool, pictures: Path, tmp_path: Path) -> None:
    first = trained(vtab(pictures), tmp_path, steps=2)
    assert len(first.folders) == 1
    other = make(pictures)
    assert len(trained(other, tmp_path, steps=2).folders) == (1 if same else 2)


def test_one_other_picture_in_the_middle_has_a_folder_of_its_own(pictures: Path, tmp_path: Path) -> None:
    """Only the first and the last are tried on."""
    copy = shutil.copytree(pictures, tmp_path / "copy")
    shutil.copy(copy / "images" / "train800" / "000001.png", copy / "images" / "train800" / "000004.png")
    cache = tmp_path / "cache"
    assert len(trained(vtab(pictures), cache, steps=2).folders) == 1
    assert len(trained(vtab(copy), cache, steps=2).folders) == 2


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PART_BYTES", 10_000)  # four examples of 17 x 32 x 4 bytes: three files


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

        adapter_file.os.replace = dying
        trained(vtab(pictures), tmp_path)

    assert os.waitpid(child(killed), 0)[1] == signal.SIGKILL
    left = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("part-*")}
    assert len(left) == 2  # of three
    stored = trained(vtab(pictures), tmp_path)
    assert sum(stored.calls) == 5 + 4
    assert {file: file.stat().st_mtime_ns for file in left} == left
    assert_same_bits(stored, trained(vtab(pictures)))


@pytest.mark.usefixtures("small_files")
def test_two_processes_share_the_work(pictures: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cache = tmp_path / "cache"

    def rank(number: int) -> None:
        names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}
        AcceleratorState._reset_state(reset_partial_state=True)
        found = trained(vtab(pictures), cache)
        assert Accelerator(cpu=True).num_processes == 2
        (tmp_path / f"{number}.json").write_text(json.dumps({"losses": found.losses, "calls": found.calls}))

    children = [child(partial(rank, number)) for number in range(2)]
    assert [os.waitpid(each, 0)[1] for each in children] == [0, 0]
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
    write = rows.write_atomically

    def full(path: Path, data: bytes) -> None:
        if path.name == "part-00001.safetensors":
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(rows, "write_atomically", full)
    with pytest.raises(ConfigError, match=r"cannot be stored in .*No space left on device.*Make room"):
        trained(vtab(pictures), tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(rows, "PART_BYTES", 10_000)
    assert len([*tmp_path.rglob("*.safetensors")]) == 1
    again = trained(vtab(pictures), tmp_path)
    assert sum(again.calls) == 5 + 8
    assert_same_bits(again, trained(vtab(pictures)))


def test_too_little_room_is_said_before_anything_is_written(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = TRAIN * 17 * 32 * 4
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(trunk.shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        if fits:
            trained(vtab(pictures), tmp_path)
        else:
            with pytest.raises(ConfigError, match=r"0\.00 GB are needed, 0\.00 GB are free\. Make room"):
                trained(vtab(pictures), tmp_path)
            assert not [*tmp_path.rglob("part-*")]


def test_a_folder_that_cannot_be_made(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be stored in"):
        trained(vtab(pictures), tmp_path / "file" / "cache")


# --- refused ----------------------------------------------------------------------------------------------------------


def with_batch_norm() -> Any:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(32)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.transpose(1, 2)).transpose(1, 2)

    model = tiny(depth=DEPTH)
    model.norm_pre = Norm()
    return model


def with_shortcut() -> Any:
    """What the lowest block gives is added to what the topmost gives."""
    model, kept = tiny(depth=DEPTH), []
    model.blocks[0].register_forward_hook(lambda block, args, output: kept.append(output))
    model.norm.register_forward_pre_hook(lambda norm, args: (args[0] + 1e-3 * kept.pop(),))
    return model


def shared_blocks() -> Any:
    """The second block runs twice."""
    model = tiny(depth=DEPTH)
    model.norm_pre.register_forward_hook(lambda norm, args, output: model.blocks[1](output))
    return model


def rarely_dropping() -> Any:
    model = tiny(depth=DEPTH)
    model.blocks[1].attn.attn_drop.p = 1e-9  # no draw would show it
    return model


def trained_embedding(task: VTAB) -> None:
    task.model.patch_embed.proj.bias.requires_grad_(True)


def no_handle(task: VTAB) -> None:
    task.handle = None


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        pytest.param({"layers": None}, {}, "every layer is adapted.*prefix.layers=L", id="all-layers"),
        pytest.param({"layers": DEPTH}, {}, "every layer is adapted", id="as-many-layers"),
        pytest.param({"drop_path": 0.2}, {}, "draw random numbers in training.*task.drop_path=0", id="drop-path"),
        pytest.param({"model": rarely_dropping}, {}, "draw random numbers", id="attention-dropout"),
        pytest.param(
            {"model": lambda: tiny(depth=DEPTH, pos_drop_rate=0.1)}, {}, "draw random", id="embedding-dropout"
        ),
        pytest.param({"model": with_batch_norm}, {}, "something else in training", id="batch-norm"),
        pytest.param({"model": with_shortcut}, {}, "gives another loss: it uses them elsewhere", id="shortcut"),
        pytest.param({"model": shared_blocks}, {}, "0 of 1 towers", id="called-twice"),
        pytest.param({"then": trained_embedding}, {}, "below the lowest adapted block is trained", id="trained"),
        pytest.param({"then": no_handle}, {}, "the method adds nothing to the topmost layers", id="no-prefix"),
        pytest.param({}, {"compile": True}, "train.compile=false", id="compile"),
    ],
)
def test_refused(
    settings: dict[str, Any], options: dict[str, Any], message: str, pictures: Path, tmp_path: Path
) -> None:
    settings = dict(settings)
    then = settings.pop("then", lambda task: None)
    if "model" in settings:
        settings["model"] = settings["model"]()
    task = vtab(pictures, **settings)
    then(task)
    with pytest.raises(ConfigError, match=rf"train\.trunk_cache cannot be used: .*{message}"):
        trained(task, tmp_path, **options)
    assert not [*tmp_path.iterdir()]


def test_sharded_hosts_are_refused(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk, "is_sharded", lambda accelerator: True)
    with pytest.raises(ConfigError, match=r"FSDP2.*plain data parallelism"):
        trained(vtab(pictures), tmp_path)


def test_texts_of_uneven_length_are_refused(tmp_path: Path) -> None:
    inputs = {"model": str(save_tiny_llama(tmp_path / "model")), "data": str(save_records(tmp_path / "data.json"))}
    options = ["prefix.layers=1", f"train.trunk_cache={tmp_path / 'cache'}", "task.evaluation_limit=0"]
    config, _ = resolve(backbone="llama", options=options, **inputs)
    with pytest.raises(ConfigError, match=r"the examples differ in length, from \d+ to \d+"):
        train_run(config, tmp_path / "run")


@pytest.mark.parametrize("method", ["full", "head-only", "lora"])
def test_methods_without_a_prefix_are_refused(method: str, pictures: Path, tmp_path: Path) -> None:
    found = METHODS.get(method)
    adapted = found(found.Config()).apply(tiny(depth=DEPTH), prefix=PrefixConfig(), backbone="vit", seed=0)
    task = VTAB(adapted.model, None, adapted.handle, VTABConfig(), data=str(pictures), seed=0)
    with pytest.raises(ConfigError, match="Use one with a prefix"):
        trained(task, tmp_path, lowest=task.head)


@pytest.mark.parametrize("value", ["", 3, True])
def test_the_setting_is_a_folder(value: Any) -> None:
    with pytest.raises(ConfigError, match="trunk_cache must be a folder, or none"):
        TrainConfig(trunk_cache=value)


# --- CLIP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "settings"),
    [
        ({"towers": ("vision_model",)}, {}),
        ({}, {}),  # both towers
        ({}, {"views": 3}),
        ({"towers": ("vision_model",)}, {"gradient_checkpointing": True}),
    ],
    ids=["vision", "both", "views", "checkpointing"],
)
def test_clip(prefix: dict[str, Any], settings: dict[str, Any], classes: Path, tmp_path: Path) -> None:
    options = {name: settings[name] for name in settings if name != "views"}
    settings = {name: settings[name] for name in settings if name == "views"}
    found = []
    for cache in (None, tmp_path, tmp_path):
        task = base_to_novel(classes, prefix, **settings)
        found.append(trained(task, cache, **options))
    plain, filling, reading = found
    assert_same_bits(filling, plain)
    assert_same_bits(reading, plain)
    count = len(task.train_stream)
    assert count == 4 * settings.get("views", 1)
    assert (sum(plain.calls), sum(filling.calls), sum(reading.calls)) == (3 * count, count + 5, 5)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ({"towers": ("text_model",)}, "0 of 1 towers"),  # its features of the pictures are kept in memory
        ({"layers": 2}, "every layer is adapted"),
    ],
)
def test_clip_refused(prefix: dict[str, Any], message: str, classes: Path, tmp_path: Path) -> None:
    task = base_to_novel(classes, prefix)
    with pytest.raises(ConfigError, match=message):
        trained(task, tmp_path)


# --- whole runs -------------------------------------------------------------------------------------------------------

OPTIONS = ["prefix.layers=1", "prefix.length=3", "prefix.gate_init=0.3", "steps=6", "batch_size=5", "save_every=2",
           "micro_batch_size=2", "evaluate_every=3", "warmup_steps=1", "learning_rate=0.05"]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> dict[str, str]:
    return {"model": str(save_tiny(tmp_path_factory.mktemp("model"))), "data": str(pictures)}


@pytest.fixture(scope="module")
def plain_run(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("plain") / "run"
    train_run(resolve(backbone="vit", options=OPTIONS, **inputs)[0], output)
    return output


def test_a_resumed_run_may_begin_and_end_to_use_it(
    inputs: dict[str, str], plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zinit.engine import Interrupted

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.chdir(tmp_path)
    without, _ = resolve(backbone="vit", options=OPTIONS, **inputs)
    using, _ = resolve(backbone="vit", options=[*OPTIONS, "train.trunk_cache=cache"], **inputs)
    assert using.train.trunk_cache == str(tmp_path / "cache")  # the same from any folder
    for name, first, then in (("begins", without, using), ("ends", using, without)):
        with pytest.raises(Interrupted):
            train_run(first, tmp_path / name, on_event=stop)
        train_run(then, tmp_path / name, resume=True)
        assert steps(tmp_path / name) == steps(plain_run)
        found, expected = (json.loads((run / "metrics.json").read_text()) for run in (tmp_path / name, plain_run))
        assert found["metrics"] == expected["metrics"]
