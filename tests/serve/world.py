"""Runs and adapters of every kind on one tiny base, made once for each worker, and how the engine is asked."""

from __future__ import annotations

import io
import json
import threading
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from PIL import Image
from transformers import LlamaForCausalLM

import zinit
from tests.encoders.test_encoders import saved
from tests.tiny import save_tiny_llama
from zinit.runs.record import RECORD, Record
from zinit.runs.settings import resolve
from zinit.serve.engine import Engine
from zinit.serve.requests import Event, Failed, Limits, Piece, Sampling, Ticket, Turn
from zinit.serve.served import Models

TEXTS = ("Say red.", "What is the river, and where does the moon go when it is gone?", "Name it", "a")
ALL = ("anna", "bert", "talk", "tuned", "eyes")
RUNS = {"anna": "alpaca", "bert": "alpaca", "talk": "conversation"}


@cache
def folders() -> dict[str, Path]:
    """{name: folder}: three finished runs, an adapter with tuning and one that sees; and "model"."""
    root = Path(mkdtemp())
    found = {"model": save_tiny_llama(root / "model")}
    for seed, (name, task) in enumerate(RUNS.items()):
        found[name] = _run(root / name, found["model"], task, seed)
    part = zinit.PrefixConfig(length=3, layers=2)
    tuned = zinit.AdapterConfig(parts={"prefix": part}, tuning=zinit.TuningConfig())
    sees = zinit.AdapterConfig(
        parts={"late": zinit.PrefixConfig(length=3, layers=2, prompt="table+context")},
        context="projected-image",
        context_options={"layers": 2, "hidden": 6},
    )
    for name, config, more in (("tuned", tuned, {}), ("eyes", sees, {"encoder": saved(root / "encoder")})):
        model = LlamaForCausalLM.from_pretrained(found["model"])
        found[name] = root / name
        _open(zinit.attach(model, config, seed=7, **more), 7).save(found[name])
    return found


def _run(folder: Path, model: Path, task: str, seed: int) -> Path:
    """A finished run as far as serving and chatting look at one: its record and its adapter."""
    options = ["prefix.layers=2", "prefix.length=4", *(["task.template=chat65b"] if task == "conversation" else [])]
    config, _ = resolve(backbone="llama", task=task, model=str(model), data=["none"], options=options, seed=seed)
    adapter = LlamaForCausalLM.from_pretrained(model)
    _open(zinit.attach(adapter, config.prefix, seed=seed), seed).save(folder)
    record = Record(config=config.to_dict(), backbone="llama", task=task, model=str(model), seed=seed)
    (folder / RECORD).write_text(json.dumps(vars(record)))
    return folder


@torch.no_grad()
def _open(handle: zinit.Handle, seed: int) -> zinit.Handle:
    """As if it had been trained for long: no answer is like the base's."""
    generator = torch.Generator().manual_seed(seed)
    for role, parameters in handle.roles().items():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise.sign() if role == "gates" else parameter + {"tuning": 0.2}.get(role, 1.0) * noise)
    return handle


def models(*names: str) -> Models:
    """The base of the first run, and adapters on it."""
    made = Models(str(folders()["anna"]))
    for name in names:
        made.add(name, str(folders()[name]))
    return made


class Asked:
    """A request and what has come of it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.over = threading.Event()
        self.begun = threading.Event()
        self.ticket: Ticket | None = None
        self.open = 1

    def deliver(self, event: Event) -> None:
        self.events.append(event)
        self.begun.set()
        self.open -= isinstance(event, Failed) or event.reason is not None
        if self.open <= 0 or isinstance(event, Failed):
            self.over.set()

    def wait(self) -> list[Piece]:
        """The last piece of each answer, in order."""
        assert self.over.wait(60), "no answer came"
        last = [event for event in self.events if isinstance(event, Piece) and event.reason]
        return sorted(last, key=lambda piece: piece.index)

    @property
    def failure(self) -> Failed:
        assert self.over.wait(60)
        assert isinstance(self.events[-1], Failed), self.events[-1]
        return self.events[-1]


def ask(engine: Engine, model: str, text: str, *, images: Any = (), raw: bool = False, **sampling: Any) -> Asked:
    asked = Asked()
    how = Sampling(**{"temperature": 0.0, "max_tokens": 24, **sampling})
    asked.open = how.n
    if raw:
        asked.ticket = engine.complete(model, [text], how, asked.deliver)
    else:
        asked.ticket = engine.chat(model, [Turn(role="user", text=text, images=images)], how, asked.deliver)
    return asked


def limits(**changes: Any) -> Limits:
    return Limits(**{"batch": 8, "queue": 64, **changes})


class Gate:
    """Holds the engine between two tokens, until it is opened."""

    def __init__(self, engine: Engine) -> None:
        self.holds, self.opened = threading.Event(), threading.Event()
        self.engine = engine

    def __enter__(self) -> Gate:
        def wait() -> None:
            self.holds.set()
            self.opened.wait(60)

        threading.Thread(target=lambda: self.engine._call(wait)).start()
        assert self.holds.wait(60)
        return self

    def __exit__(self, *_: Any) -> None:
        self.opened.set()


def idle(engine: Engine) -> bool:
    for _ in range(500):
        if not engine.gauges()["running"] and not engine.gauges()["waiting"]:
            return True
        threading.Event().wait(0.01)
    return False


def png(colour: tuple[int, int, int], side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def talk(text: str) -> Any:
    from zinit.data.conversations import Conversation, Round

    return Conversation(rounds=(Round(question=text),))
