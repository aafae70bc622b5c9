"""What zinit wrote itself, damaged: cut at every byte, every value of another type, is one message with the path."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import nn

from zinit.bench.plan import make_benchmark
from zinit.bench.runner import final_cells, read_cells
from zinit.bench.summary import curves, summarise, table
from zinit.errors import ZinitError
from zinit.runs.directory import load_trained, read_run
from zinit.runs.record import Record
from zinit.runs.settings import resolve
from zinit.train import checkpoint

VALUES: tuple[Any, ...] = (None, True, 7, "text", [[]], {"a": {}})


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The whole, and every value in it."""
    yield path
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield from places(value[key], (*path, key))


def changed(document: Any, *, gone: bool = True, without: str = "") -> Iterator[tuple[str, Any]]:
    """(place, document) with the value there of another type, or gone; values inside ``without`` stay."""
    for path in places(document):
        if without and path[:1] == (without,) and len(path) > 1:
            continue
        own = document
        for key in path:
            own = own[key]
        for value in (*VALUES, ...) if gone else VALUES:
            if value is ... and (not path or isinstance(path[-1], int)):
                continue  # the whole, or an item of a list
            if type(value) is type(own) or {type(value), type(own)} == {int, float}:
                continue
            copied = {"": copy.deepcopy(document)}
            at: Any = copied
            for key in ("", *path)[:-1]:
                at = at[key]
            if value is not ...:
                at[("", *path)[-1]] = value
            else:
                del at[("", *path)[-1]]
            yield ".".join(map(str, path)), copied[""]


def refusal(call: Callable[[], Any], path: Path) -> bool:
    """Whether a file is refused, by its path; anything but one message fails the test."""
    message = ""
    try:
        call()
    except ZinitError as error:
        message = str(error)
    assert not message or (str(path) in message and message.endswith(".")), message
    return bool(message)


def cuts(path: Path, call: Callable[[], Any], *, every: int = 1, mend: Callable[[], None] = lambda: None) -> None:
    """No cut of a file is taken for the file."""
    data = path.read_bytes()
    for size in range(0, len(data), every):
        path.write_bytes(data[:size])
        mend()
        assert refusal(call, path), f"cut to {size} of {len(data)} bytes"
    path.write_bytes(data)
    mend()
    call()


def wrong_types(path: Path, call: Callable[[], Any], **options: Any) -> set[str]:
    """The places of a JSON file at which every value of another type is refused."""
    document = json.loads(path.read_text())
    taken, tried = set(), set()
    for place, wrong in changed(document, **options):
        path.write_text(json.dumps(wrong))
        tried.add(place)
        if not refusal(call, path):
            taken.add(place)
    path.write_text(json.dumps(document))
    call()
    return tried - taken


def test_cells_of_a_benchmark(tmp_path: Path) -> None:
    (tmp_path / "bench.toml").write_text('[[experiment]]\nname = "one"\nbackbone = "llama"\nmetric = "loss"\n')
    plan = make_benchmark(config_file=str(tmp_path / "bench.toml"))
    (cell,) = final_cells(plan, tmp_path)
    measured = {
        "status": "done",
        "metrics": {"base": {"loss": 4.0}, "adapted": {"loss": 1.0}},
        "counts": {"held_out": 8},
        "num_trainable": 7,
        "seconds": 1.5,
        "rates": {"": 0.25},
        "examples": {"loss": [[1.5, 1], [0.5, True]]},
        "curves": {"train loss": [[1, 2.5], [2, None]]},
    }
    path = tmp_path / "cells" / f"{cell.id}.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"cell": cell.to_dict(), "id": cell.id, **measured}))

    def use() -> None:
        read_cells(tmp_path)  # quick: most is refused here
        table(summarise(plan, tmp_path))
        curves(plan, tmp_path)

    cuts(path, use)
    assert wrong_types(path, use, without="cell") >= {
        *("", "id", "status", "cell", "metrics", "metrics.base", "metrics.adapted"),
        *("seconds", "curves", "curves.train loss.0", "examples.loss.0"),
    }
    whole = {"id": cell.id, **measured}
    for own in ({"experiment": "one"}, {"experiment": "one", "method": 7}, {"experiment": None, "method": "lora"}):
        path.write_text(json.dumps(whole | {"cell": own}))
        assert refusal(use, path), own
    path.write_text(json.dumps({"cell": cell.to_dict(), "id": cell.id, "status": "refused", "by_settings": True}))
    assert refusal(use, path), "no reason is given"
    path.write_text("[" * 100_000)
    assert refusal(lambda: read_cells(tmp_path), path)


class Line(nn.Linear):
    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())


def test_a_checkpoint(tmp_path: Path) -> None:
    task, accelerator = Line(1, 1), Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(task.parameters())
    task(torch.ones(1)).backward()
    optimizer.step()
    identity = {"seed": 3, "train.steps": 4}
    folder = checkpoint.save(tmp_path, 12, task, optimizer, identity, accelerator)
    manifest, state, chance = (folder / name for name in ("manifest.json", "state.safetensors", "random-0.json"))

    def load() -> int:
        return checkpoint.load_latest(tmp_path, task, optimizer, identity, accelerator)

    def rehash() -> None:
        """As if the manifest had been written for the files as they are."""
        document = json.loads(manifest.read_text())
        document["sha256"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (state, chance)}
        manifest.write_text(json.dumps(document))

    weight = task.weight.item()
    for path, every in ((manifest, 1), (state, 16), (chance, 5000)):
        cuts(path, load, every=every)
    cuts(state, load, every=5, mend=rehash)
    cuts(chance, load, every=3000, mend=rehash)
    assert load() == 12
    assert task.weight.item() == weight
    document = json.loads(manifest.read_text())
    for place, wrong in changed(document):
        manifest.write_text(json.dumps(wrong))
        refused = place.split(".")[0] in ("", "step", "sha256")
        with_path = manifest if place in ("", "step", "sha256", "identity") else folder
        if place.startswith("identity"):
            with_path = tmp_path
        assert refusal(load, with_path) or not refused, place
    for name in ("step", "identity", "sha256"):
        manifest.write_text(json.dumps({key: value for key, value in document.items() if key != name}))
        assert refusal(load, manifest)
    manifest.write_text(json.dumps(document | {"step": 13}))
    assert refusal(load, manifest), "another step than its folder's"
    manifest.write_text(json.dumps(document))
    state.write_bytes(save({"parameter:weight": torch.ones(1, 1), "parameter:bias": torch.ones(1)} | {
        "optimizer:exp_avg:gone": torch.ones(1)}))  # fmt: skip
    rehash()
    assert refusal(load, state)


def test_weights_beside_the_prefix(tmp_path: Path) -> None:
    task, path = Line(2, 1), tmp_path / "trained.safetensors"
    tensors = {name: parameter.detach().clone() for name, parameter in task.named_parameters()}
    path.write_bytes(save(tensors, metadata={"format": "pt"}))

    def load() -> None:
        load_trained(task, tmp_path)  # pyright: ignore[reportArgumentType]

    cuts(path, load)
    data = path.read_bytes()
    size = 8 + struct.unpack("<Q", data[:8])[0]
    for place, wrong in changed(json.loads(data[8:size])):
        header = json.dumps(wrong).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[size:])
        assert refusal(load, path) or place.startswith("__metadata__"), place
        assert all(torch.equal(tensors[name], parameter) for name, parameter in task.named_parameters())
    for dtype in ("I32", "U32", "BF9", "F8_E4M3", "F4", "C64"):
        path.write_bytes(data.replace(b'"F32"', f'"{dtype}"'.encode()))
        assert refusal(load, path), dtype
    path.write_bytes(save({**tensors, "bias": torch.tensor([torch.inf])}))
    assert refusal(load, path)
    path.unlink()
    assert refusal(load, path)


def test_the_record_of_a_run(tmp_path: Path) -> None:
    config = resolve(backbone="llama")[0].to_dict()
    record = Record(config=config, labels=["a"], key_probe=[0.5], identity={"seed": 0}, counts={"a": 1})
    path = tmp_path / "run.json"
    path.write_text(json.dumps(record.to_dict()))
    cuts(path, lambda: read_run(tmp_path), every=7)
    refused = wrong_types(path, lambda: read_run(tmp_path), gone=False, without="config")
    named = ("config", "weights", "weights.0", "identity", "counts", "train", "demo", "versions", "labels.0")
    assert refused >= {"", *named}
